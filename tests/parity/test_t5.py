"""The encoders of the T5 family against transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import Case, check_mutation, check_peer, check_record, distance, to_torch

import fm_jax.text.encoder
import fm_jax.text.t5
from fm_jax.models.compute import Compute
from fm_jax.text.t5 import T5Encoder, distance_buckets
from fm_jax.weights.load import load
from fm_jax.weights.t5 import t5_config, t5_from_config, t5_rules

SMALL = {"vocabulary": 50, "hidden": 32, "num_layers": 3, "num_heads": 3, "head_dim": 8, "mlp": 40}
# 40 tokens, beyond the buckets of single distances; the last bucket begins at 24.
DISTANCES = {"buckets": 16, "max_distance": 24}
IDS = np.random.default_rng(0).integers(0, 50, (2, 40)).astype(np.int32)
MASK = np.arange(40) < np.array([[9], [33]])
CLASSES = {True: "T5", False: "UMT5"}


def ours_of(module):
    def ours(params, inputs):
        out = module.clone(keep_hidden=2).apply({"params": params}, inputs["ids"], inputs.get("mask"))
        assert out.pooled is None
        return seen(inputs, {"last": out.last, "hidden": out.hidden[-2]})

    return ours


def seen(inputs, outputs):
    """What padding gives is nobody's business; and 8 channels of each are enough."""
    if "mask" not in inputs:
        return {name: value[..., :8] for name, value in outputs.items()}
    return {name: value[np.nonzero(MASK)][:, :8] for name, value in outputs.items()}


def torch_model(module, tensors):
    import transformers

    name = CLASSES[module.shared_bias]
    config = getattr(transformers, f"{name}Config")(**t5_config(module))
    model = getattr(transformers, f"{name}EncoderModel")(config).eval()
    model.load_state_dict(to_torch(tensors), strict=True)
    return model


def run_torch(model, inputs, hidden=-2):
    import torch

    with torch.no_grad():
        mask = torch.from_numpy(inputs["mask"]).long() if "mask" in inputs else None
        ids = torch.from_numpy(inputs["ids"]).long()
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    found = {"last": out.last_hidden_state, "hidden": out.hidden_states[hidden]}
    return seen(inputs, {name: value.float().numpy() for name, value in found.items()})


def case(name, inputs, **options):
    module = T5Encoder(**(SMALL | options))
    count = module.num_layers
    names = [("h" + str(i), "h" + str(i)) for i in range(count)]

    def trace_ours(params, inputs):
        out = module.clone(keep_hidden=count + 1).apply({"params": params}, inputs["ids"], inputs.get("mask"))
        return seen(inputs, {name: state for (name, _), state in zip(names, out.hidden[:-1], strict=True)})

    def trace_theirs(tensors, inputs):
        model = torch_model(module, tensors)
        return {name: run_torch(model, inputs, i)["hidden"] for i, (_, name) in enumerate(names)}

    return Case(
        name,
        lambda: t5_rules(module),
        lambda: inputs,
        ours_of(module),
        lambda tensors, inputs: run_torch(torch_model(module, tensors), inputs),
        tuple(names),
        trace_ours,
        trace_theirs,
        extra={"module": module},
    )


CASES = [
    case("t5_v1_1", {"ids": IDS}, **DISTANCES),
    case("t5_v1_1_masked", {"ids": IDS, "mask": MASK}, scan_layers=False),
    case("t5_v1_0", {"ids": IDS[:, :20]}, activation="relu"),
    case("t5_ul2_masked", {"ids": IDS, "mask": MASK}, activation="gated-silu", head_dim=16),
    case("t5_umt5_masked", {"ids": IDS, "mask": MASK}, shared_bias=False, **DISTANCES),
    case("t5_umt5", {"ids": IDS[:, :20]}, shared_bias=False, scan_layers=False),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def peer(name):
    return pytest.importorskip(
        name, reason=f"{name} is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md"
    )


@pytest.mark.slow_but_one
@every_case
def test_record(case):
    check_record(case)


@pytest.mark.parity
@every_case
def test_peer(case):
    check_peer(case)


@pytest.mark.parity
@every_case
def test_export_is_read_by_transformers(case, tmp_path):
    transformers = peer("transformers")
    from safetensors.numpy import load_file, save_file

    module, name = case.extra["module"], CLASSES[case.extra["module"].shared_bias]
    params = case.rules().to_ours(case.tensors())
    tensors = t5_rules(module).to_theirs(params)
    cls = getattr(transformers, f"{name}EncoderModel")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(t5_config(module)))
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    theirs, ours = run_torch(model.eval(), case.inputs()), case.outputs()
    assert max(distance(ours[name], theirs[name]) for name in theirs) < 5e-6
    # What it saves holds the table once.
    model.save_pretrained(tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert len(tensors) == len(back) + 1
    assert jax.tree.all(jax.tree.map(np.array_equal, load(back, t5_rules(module)), params))
    again = t5_from_config(json.loads((tmp_path / "back" / "config.json").read_text()))
    assert again == module.clone(scan_layers=True)


@pytest.mark.parity
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 24), (8, 20), (64, 256)])
def test_buckets_are_those_of_transformers(buckets, max_distance):
    torch = peer("torch")
    attention = peer("transformers.models.t5.modeling_t5").T5Attention

    distances = np.arange(-5000, 5001)
    theirs = attention._relative_position_bucket(torch.from_numpy(distances), True, buckets, max_distance)
    np.testing.assert_array_equal(distance_buckets(distances, buckets, max_distance), theirs.numpy())


@pytest.mark.parity
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_bfloat16_is_near_that_of_pytorch(case):
    torch = peer("torch")

    module = case.extra["module"].clone(compute=Compute("bfloat16"))
    theirs = run_torch(torch_model(module, case.tensors()).to(torch.bfloat16), case.inputs())
    ours = dataclasses.replace(case, ours=ours_of(module)).outputs(jnp.bfloat16)
    assert max(distance(ours[name], theirs[name]) for name in theirs) < 2e-2


def test_scaled_scores_are_seen(monkeypatch):
    attend = fm_jax.text.encoder.attend
    monkeypatch.setattr(
        fm_jax.text.encoder, "attend", lambda *args, **options: attend(*args, **(options | {"scale": None}))
    )
    check_mutation(CASES[0])


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_the_sign_of_the_distances_is_seen(case, monkeypatch):
    monkeypatch.setattr(fm_jax.text.t5, "distance_buckets", lambda d, *rest: distance_buckets(-d, *rest))
    check_mutation(case)


def test_relu_in_the_gate_is_seen(monkeypatch):
    activations = fm_jax.text.t5.ACTIVATIONS
    monkeypatch.setitem(activations, "gated-gelu", activations["relu"])
    check_mutation(CASES[0])


def test_exact_gelu_in_the_gate_is_seen(monkeypatch):
    monkeypatch.setitem(
        fm_jax.text.t5.ACTIVATIONS, "gated-gelu", lambda h: fm_jax.text.t5.nn.gelu(h, approximate=False)
    )
    check_mutation(CASES[0])


@pytest.mark.slow
def test_a_forgotten_mask_is_seen():
    case = CASES[1]
    check_mutation(dataclasses.replace(case, ours=lambda params, inputs: without_mask(case, params, inputs)))


def without_mask(case, params, inputs):
    out = case.extra["module"].clone(keep_hidden=2).apply({"params": params}, inputs["ids"])
    return seen(inputs, {"last": out.last, "hidden": out.hidden[-2]})
