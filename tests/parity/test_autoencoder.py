"""Autoencoder against diffusers' AutoencoderKL and AutoencoderKLFlux2: encode, decode, files."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from parity.harness import (
    Arrays,
    Case,
    assert_close,
    check_mutation,
    check_peer,
    check_record,
    first_last,
    random_input,
    to_torch,
)

from fm_jax.latents import FLUX, SD
from fm_jax.models import autoencoder, autoencoder_blocks
from fm_jax.models.autoencoder import Autoencoder, latent_space
from fm_jax.models.compute import Compute
from fm_jax.weights.autoencoder import autoencoder_config, autoencoder_rules

SMALL: dict[str, Any] = {"channels": (16, 32, 48), "num_blocks": 1, "num_groups": 8}
MODULES = {
    "autoencoder_quantized": Autoencoder(**SMALL, latents=SD),
    "autoencoder_plain": Autoencoder(**(SMALL | {"num_blocks": 2}), latent_channels=6, quantize=False, latents=FLUX),
    "autoencoder_no_attention": Autoencoder((16, 16), 1, image_channels=1, num_groups=4, attention=False),
    "autoencoder_flux2": Autoencoder(
        (8, 16), 1, latent_channels=3, decoder_channels=(16, 24), num_groups=8, statistics=True
    ),
}


def inputs(module: Autoencoder) -> Arrays:
    height, width = 4 * module.factor, 6 * module.factor
    return {
        "x": np.tanh(random_input("x", (2, height, width, module.image_channels))),
        "z": random_input("z", (2, 4, 6, module.latent_channels)),
    }


def ours(module: Autoencoder, params: Any, inputs: Arrays) -> dict[str, Any]:
    moments = module.apply({"params": params}, inputs["x"], method="encode")
    decoded = module.apply({"params": params}, inputs["z"], method="decode")
    return {"mean": moments.mean, "log_variance": moments.log_variance, "decoded": decoded}


@cache
def peer_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def peer(module: Autoencoder, tensors: Arrays) -> Any:
    config = autoencoder_config(module)
    model = peer_class(config.pop("_class_name"))(**config).eval()
    state = to_torch(tensors)
    if module.statistics:
        state["bn.num_batches_tracked"] = model.bn.num_batches_tracked
    model.load_state_dict(state, strict=True)
    return model


def run_peer(model: Any, inputs: Arrays, dtype: Any = None) -> Arrays:
    """In float64 by default: PyTorch's float32 is 1e-6 from itself with another number of threads."""
    import torch

    dtype = torch.float64 if dtype is None else dtype
    model = model.to(dtype)
    with torch.no_grad():
        x, z = (torch.from_numpy(np.moveaxis(inputs[name], -1, 1).copy()).to(dtype) for name in ("x", "z"))
        posterior = model.encode(x).latent_dist
        outputs = {"mean": posterior.mean, "log_variance": posterior.logvar, "decoded": model.decode(z).sample}
    return {name: first_last(value.float()) for name, value in outputs.items()}


def blocks(module: Autoencoder) -> tuple[tuple[str, str], ...]:
    last = len(module.channels) - 1
    pairs = [("encoder/stem", "encoder.conv_in")]
    for level in range(last + 1):
        for i in range(module.num_blocks):
            pairs.append((f"encoder/down_{level}_{i}", f"encoder.down_blocks.{level}.resnets.{i}"))
        if level < last:
            pairs.append((f"encoder/down_{level}_resample", f"encoder.down_blocks.{level}.downsamplers.0"))
    for half in ("encoder", "decoder"):
        pairs.append((f"{half}/middle_1", f"{half}.mid_block"))
        if half == "encoder":
            pairs.append((f"{half}/out", f"{half}.conv_out"))
    for level in range(last, -1, -1):
        for i in range(module.num_blocks + 1):
            pairs.append((f"decoder/up_{level}_{i}", f"decoder.up_blocks.{last - level}.resnets.{i}"))
        if level > 0:
            pairs.append((f"decoder/up_{level}_resample", f"decoder.up_blocks.{last - level}.upsamplers.0"))
    return (*pairs, ("decoder/out", "decoder.conv_out"))


def trace_ours(module: Autoencoder, params: Any, inputs: Arrays) -> dict[str, Any]:
    outputs = {}
    for method, name in (("encode", "x"), ("decode", "z")):
        _, state = module.apply({"params": params}, inputs[name], method=method, capture_intermediates=True)
        for half, layers in state["intermediates"].items():
            if half in ("encoder", "decoder"):
                outputs |= {f"{half}/{key}": v["__call__"][0] for key, v in layers.items() if key != "__call__"}
    return outputs


def trace_theirs(module: Autoencoder, tensors: Arrays, inputs: Arrays) -> Arrays:
    model, outputs = peer(module, tensors), {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
    run_peer(model, inputs)
    return {name: first_last(outputs[name]) for _, name in blocks(module)}


def case(name: str) -> Case:
    module = MODULES[name]
    return Case(
        name,
        cache(lambda: autoencoder_rules(module)),
        lambda: inputs(module),
        lambda params, inputs: ours(module, params, inputs),
        lambda tensors, inputs: run_peer(peer(module, tensors), inputs),
        blocks(module),
        lambda params, inputs: trace_ours(module, params, inputs),
        lambda tensors, inputs: trace_theirs(module, tensors, inputs),
    )


CASES = [case(name) for name in MODULES]
each = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.slow
@each
def test_equals_the_record(case: Case) -> None:
    check_record(case)


@pytest.mark.parity
@each
def test_equals_the_peer(case: Case) -> None:
    check_peer(case)


@pytest.mark.parity
@each
def test_blocks_have_the_peers_names(case: Case) -> None:
    ours = case.trace_ours(case.rules().to_ours(case.tensors()), case.inputs())
    theirs = case.trace_theirs(case.tensors(), case.inputs())
    assert {mine for mine, _ in case.blocks} <= set(ours)
    assert {other for _, other in case.blocks} <= set(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name", "value"),
    [(autoencoder, "DOWN_PADDING", ((1, 1), (1, 1))), (autoencoder_blocks, "EPSILON", 1e-5)],
    ids=["symmetric", "epsilon"],
)
def test_sees_mistake(file: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, name, value)
    check_mutation(CASES[0])


@pytest.mark.parity
def test_the_peer_opens_our_export(tmp_path: Any) -> None:
    import json

    safetensors = pytest.importorskip("safetensors.numpy")
    for case in CASES:
        module, folder = MODULES[case.name], tmp_path / case.name
        folder.mkdir()
        config = autoencoder_config(module)
        (folder / "config.json").write_text(json.dumps(config))
        params = case.rules().to_ours(case.tensors())
        safetensors.save_file(case.rules().to_theirs(params), folder / "diffusion_pytorch_model.safetensors")
        model = peer_class(config["_class_name"]).from_pretrained(folder)
        assert_close(case.outputs(), run_peer(model.eval(), case.inputs()))


@pytest.mark.parity
def test_the_peer_opens_our_export_of_old_names(tmp_path: Any) -> None:
    import json

    safetensors = pytest.importorskip("safetensors.numpy")
    case = CASES[0]
    config = autoencoder_config(MODULES[case.name])
    (tmp_path / "config.json").write_text(json.dumps(config))
    params = case.rules().to_ours(case.tensors())
    old = autoencoder_rules(MODULES[case.name], "diffusers_old").to_theirs(params)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old
    safetensors.save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    model = peer_class("AutoencoderKL").from_pretrained(tmp_path)
    assert_close(case.outputs(), run_peer(model.eval(), case.inputs()))


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_ldm_layout_is_what_the_peer_converts(case: Case) -> None:
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    module = MODULES[case.name]
    ldm = autoencoder_rules(module, "ldm").to_theirs(case.rules().to_ours(case.tensors()))
    assert ldm["encoder.mid.attn_1.q.weight"].ndim == 4
    converted = convert_ldm_vae_checkpoint(to_torch(ldm), autoencoder_config(module))
    assert converted.keys() == case.tensors().keys()
    for key, value in case.tensors().items():
        np.testing.assert_array_equal(converted[key].numpy(), value, err_msg=key)


@pytest.mark.parity
def test_statistics_normalise_as_the_peer_does() -> None:
    torch = pytest.importorskip("torch")
    case = next(case for case in CASES if "flux2" in case.name)
    module, tensors = MODULES[case.name], case.tensors()
    tensors["bn.running_var"] = np.abs(tensors["bn.running_var"]) + 0.1
    z = case.inputs()["z"]
    model = peer(module, tensors)
    with torch.no_grad():
        packed = torch.nn.functional.pixel_unshuffle(torch.from_numpy(np.moveaxis(z, -1, 1).copy()), 2)
        theirs = torch.nn.functional.pixel_shuffle(model.bn(packed), 2)
    space = latent_space(module, case.rules().to_ours(tensors))
    np.testing.assert_allclose(space.to_model(jax.numpy.asarray(z)), first_last(theirs), rtol=2e-6, atol=2e-6)


@pytest.mark.slow
def test_bfloat16_is_near_float32() -> None:
    case, module = CASES[0], MODULES[CASES[0].name].clone(compute=Compute("bfloat16"))
    params, exact = case.rules().to_ours(case.tensors()), case.recorded()
    found = jax.jit(lambda params, inputs: ours(module, params, inputs))(params, case.inputs())
    for name, value in exact.items():
        assert found[name].dtype == np.float32
        assert np.linalg.norm(found[name] - value) <= 2e-2 * np.linalg.norm(value), name


@pytest.mark.parity
@each
def test_bfloat16_is_as_near_to_float32_as_the_peers(case: Case) -> None:
    torch = pytest.importorskip("torch")
    module, exact = MODULES[case.name], case.recorded()
    half = module.clone(compute=Compute("bfloat16"))
    params = case.rules().to_ours(case.tensors())
    found = jax.jit(lambda params, inputs: ours(half, params, inputs))(params, case.inputs())
    theirs = run_peer(peer(module, case.tensors()), case.inputs(), torch.bfloat16)
    for name, value in theirs.items():
        mine, other = (
            np.linalg.norm(each - exact[name]) / np.linalg.norm(exact[name]) for each in (found[name], value)
        )
        assert mine <= min(2e-2, 1.1 * other), (name, mine, other)
