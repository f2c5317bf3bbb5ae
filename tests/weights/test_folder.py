"""Folders as diffusers and transformers write them: opened, saved, and opened again, by us and by them."""

import importlib
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from parity.harness import random_tensors
from weights.toy import same_bits

from fm_jax import models
from fm_jax.models import MLP
from fm_jax.models.conditioning import DDPM, Border
from fm_jax.models.conditioning import OURS as OUR_BORDER
from fm_jax.weights.folder import FAMILIES, LAYOUTS, open_model, save_model
from fm_jax.weights.formats import WeightsError
from fm_jax.weights.safetensors import open_tensors
from fm_jax.weights.write import write_tensors

# Written by diffusers 0.42 and transformers 5.24 for small networks of each class.
CONFIGS = json.loads((Path(__file__).parent / "configs.json").read_text())
WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = {"DiTTransformer2DModel": {"size": 8, "channels": 3}, "SiT": {"size": 8, "channels": 4}}


def rules_of(name, module):
    file, prefix = FAMILIES[name].split(":")
    return getattr(importlib.import_module(f"fm_jax.weights.{file}"), f"{prefix}_rules")(
        module, **OPTIONS.get(name, {})
    )


def folder_of(name, folder, **changes) -> Path:
    """A folder with the configuration and random weights of a class."""
    folder.mkdir(exist_ok=True)
    file, prefix = FAMILIES[name].split(":")
    family = importlib.import_module(f"fm_jax.weights.{file}")
    rules = rules_of(name, getattr(family, f"{prefix}_from_config")(CONFIGS[name]))
    tensors = random_tensors(rules.shapes)
    tensors |= {key: tensors[original] for key, original in rules.copies.items()}
    tensors |= {key: table() for key, table in rules.tables.items()}
    stem = "model" if "architectures" in CONFIGS[name] else "diffusion_pytorch_model"
    write_tensors(folder / f"{stem}.safetensors", tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    return folder


def test_every_class_has_a_configuration():
    assert CONFIGS.keys() == FAMILIES.keys()
    assert set(LAYOUTS) <= {each.split(":")[0] for each in FAMILIES.values()}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", FAMILIES)
def test_opened_saved_and_opened(tmp_path, name):
    module, params = open_model(folder_of(name, tmp_path / "a"))
    saved = tmp_path / "b"
    save_model(saved, module, params, **OPTIONS.get(name, {}))
    again, same = open_model(saved)
    assert again == module
    assert same_bits(same, params)
    before, after = open_tensors(tmp_path / "a"), open_tensors(saved)
    assert same_bits(dict(after), dict(before))
    config = json.loads((saved / "config.json").read_text())
    assert {"_class_name", "architectures"} & config.keys()


def test_options_of_loading_and_saving(tmp_path):
    module, params = open_model(folder_of("T5EncoderModel", tmp_path / "a"))
    written = save_model(tmp_path / "b", module, params, max_shard_bytes=4000, dtype=np.float16)
    assert len(written) > 3
    half = open_model(tmp_path / "b", dtype=np.float16, sharding=jax.devices()[1])[1]
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(half)} == {jax.devices()[1]}
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(np.float16)}


# Of the library; of inputs that a network takes in any size; of what the class has not; what is None is as good as one.
SAYS_NOTHING = {"_name_or_path", "name_or_path", "dtype", "_diffusers_version", "transformers_version"}
SAYS_NOTHING |= {"sample_size", "bos_token_id", "projection_dim", "is_encoder_decoder", "interpolation_scale"}
SAYS_NOTHING |= {"scale_factor_temporal", "scale_factor_spatial"}  # of pipelines; theirs here are the class's defaults


OURS = {"SiT", "VideoDiT", "TAESD"}  # of which PyTorch has no class in these libraries


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DiTTransformer2DModel", {"_class_name": "Transformer2DModel"}),
        ("PixArtTransformer2DModel", {"_class_name": "Transformer2DModel"}),
        ("T5EncoderModel", {"architectures": ["T5ForConditionalGeneration"]}),
    ],
)
def test_what_a_class_was_called_or_is_a_part_of(tmp_path, name, changes):
    module, params = open_model(folder_of(name, tmp_path / "a"))
    again, same = open_model(folder_of(name, tmp_path / "b", **changes))
    assert again == module
    assert same_bits(same, params)


@pytest.mark.parametrize(
    ("network", "options", "match"),
    [
        (
            models.make_crossdit("tiny", border=OUR_BORDER),
            {},
            "cannot say border=Border.*and would be opened with Border",
        ),
        (models.make_unet_condition("tiny", border=OUR_BORDER), {}, "cannot say border="),
        (models.UNet(in_channels=3, border=Border(scale=5.0)), {}, "border"),
        (models.make_mmdit("tiny", skip_layers=(1,)), {}, r"cannot say skip_layers=\(1,\)"),
        (models.DiT(embed=models.LabelEmbedding(3), border=DDPM, frequency_shift=1.0), {}, "needs size for a DiT"),
    ],
)
def test_what_a_folder_cannot_say_is_not_written(tmp_path, network, options, match):
    with pytest.raises(ValueError, match=match):
        save_model(tmp_path / "a", network, {}, **options)
    assert not (tmp_path / "a").exists()


def test_integers_are_no_parameters(tmp_path):
    module, params = open_model(folder_of("T5EncoderModel", tmp_path / "a"))
    whole = jax.tree.map(lambda leaf: np.asarray(leaf, np.int32), params)
    with pytest.raises(WeightsError, match="must be of a floating-point dtype, got"):
        save_model(tmp_path / "b", module, whole)


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OURS])
def test_their_class_loads_ours_and_we_theirs(tmp_path, name):
    torch = pytest.importorskip("torch")
    peers = {"diffusers": pytest.importorskip("diffusers"), "transformers": pytest.importorskip("transformers")}
    kind = getattr(peers["transformers" if "architectures" in CONFIGS[name] else "diffusers"], name)
    module, params = open_model(folder_of(name, tmp_path / "a"))
    save_model(tmp_path / "b", module, params, max_shard_bytes=20_000, **OPTIONS.get(name, {}))
    loaded, said = kind.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(said[each] for each in ("unexpected_keys", "mismatched_keys"))
    assert set(said["missing_keys"]) <= {"bn.num_batches_tracked"}  # a counter of training that says nothing
    loaded.save_pretrained(tmp_path / "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, same = open_model(tmp_path / "c")
    assert again == module
    assert same_bits(same, params)
    # As theirs with the same weights and their own configuration says.
    original = kind.from_pretrained(tmp_path / "a")
    states = original.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    of_transformers = hasattr(original.config, "to_dict")
    configs = [each.config.to_dict() if of_transformers else dict(each.config) for each in (original, loaded)]
    for key, value in configs[0].items():
        if key not in SAYS_NOTHING:
            other = configs[1].get(key)
            assert other == value or (isinstance(other, list) and set(other) == {value}), (key, value, other)


REFUSALS = {
    "no configuration": (None, r"has no config\.json to say what network it is"),
    "no JSON": ("{", r"config\.json is no configuration of a network: it is not JSON"),
    "a list": ("[]", "must be a JSON object, got a list"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    "no class": ("{}", "names no class: it has neither '_class_name' nor 'architectures'"),
    "no class in a list": ('{"architectures": []}', "names no class"),
    "another class": ('{"_class_name": "DDIMScheduler"}', "is of DDIMScheduler, which is not among .*: SD3Transformer"),
    "quantised": (
        json.dumps(CONFIGS["DiTTransformer2DModel"] | {"quantization_config": {"quant_method": "bitsandbytes"}}),
        r"is of a quantised model \(bitsandbytes\)",
    ),
    "a field too few": ('{"_class_name": "DiTTransformer2DModel"}', r"config\.json is not of a network that is read"),
    "a field of another": (
        json.dumps(CONFIGS["DiTTransformer2DModel"] | {"activation_fn": "geglu"}),
        r"config\.json is not of a network that is read: .*geglu",
    ),
    "another network's numbers": (
        json.dumps(CONFIGS["DiTTransformer2DModel"] | {"num_attention_heads": 4}),
        "does not fit the network",
    ),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_refusals(tmp_path, fault):
    content, message = REFUSALS[fault]
    folder = folder_of("DiTTransformer2DModel", tmp_path / "a")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=message) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value)


def test_a_pipeline_a_file_and_nothing(tmp_path):
    folder_of("DiTTransformer2DModel", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(WeightsError, match="is a whole pipeline: open its folders one by one, transformer"):
        open_model(tmp_path)
    with pytest.raises(WeightsError, match="is not a folder"):
        open_model(tmp_path / "transformer" / WEIGHTS)
    with pytest.raises(WeightsError, match="is not a folder"):
        open_model(tmp_path / "absent")
    with pytest.raises(ValueError, match="folder must be a path"):
        open_model(None)
    (tmp_path / "transformer" / WEIGHTS).rename(tmp_path / "transformer" / "model.bin")
    with pytest.raises(WeightsError, match="holds no safetensors"):
        open_model(tmp_path / "transformer")


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(WeightsError, match=r"must be a network with a published layout, got the class MLP"):
        save_model(tmp_path / "b", MLP(features=(8,)), {})
    module, params = open_model(folder_of("DiTTransformer2DModel", tmp_path / "a"))
    with pytest.raises(ValueError, match="takes no colour for a DiT"):
        save_model(tmp_path / "b", module, params, colour=3)
    with pytest.raises(WeightsError, match="params are not those of the network"):
        save_model(tmp_path / "b", module, params, size=8)  # of four channels
    with pytest.raises(ValueError, match="folder must be a path"):
        save_model(3, module, params)
    assert not (tmp_path / "b").exists()
