"""CLIP's text encoder against transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import Case, check_mutation, check_peer, check_record, distance, to_torch

import fm_jax.text.clip
from fm_jax.models.compute import Compute
from fm_jax.text.clip import ClipText
from fm_jax.weights.clip import clip_config, clip_from_config, clip_layout, clip_rules
from fm_jax.weights.load import load

SMALL = {"vocabulary": 60, "max_tokens": 12, "hidden": 32, "num_layers": 3, "num_heads": 4, "mlp": 48, "end": 57}
IDS = np.array([[56, 5, 9, 33, 57, 0, 0, 0, 0], [56, 41, 59, 8, 12, 30, 57, 57, 57]], np.int32)
"""Two lengths, both ways of padding; a token above the end of the text, and the end more than once."""
MASK = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)


def ours_of(module):
    def ours(params, inputs):
        out = module.apply({"params": params}, inputs["ids"], inputs.get("mask"))
        found = {"last": out.last, "hidden": out.hidden[-2], "pooled": out.pooled}
        return found if out.projected is None else found | {"projected": out.projected}

    return ours


def torch_model(module, tensors=None):
    import transformers

    config = clip_config(module)
    with_projection = module.projection is not None
    cls = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    model = cls(transformers.CLIPTextConfig(**config)).eval()
    if tensors is not None:
        prefix = "" if with_projection else "text_model."  # transformers 5 has dropped it from this class alone
        state = {key.removeprefix(prefix): value for key, value in to_torch(tensors).items()}
        model.load_state_dict(state, strict=True)
    return model


def run_torch(model, inputs, hidden=-2):
    import torch

    with torch.no_grad():
        ids = torch.from_numpy(inputs["ids"]).long()
        mask = torch.from_numpy(inputs["mask"]).long() if "mask" in inputs else None
        inner = getattr(model, "text_model", model)
        out = inner(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        found = {
            "last": out.last_hidden_state,
            "hidden": out.hidden_states[hidden],
            "pooled": out.pooler_output,
        }
        if inner is not model:
            found["projected"] = model(input_ids=ids, attention_mask=mask).text_embeds
    return {name: value.float().numpy() for name, value in found.items()}


def case(name, inputs, **options):
    module = ClipText(**(SMALL | options))
    every = module.num_layers + 1
    names = [("h" + str(i), "h" + str(i)) for i in range(every)]

    def trace_ours(params, inputs):
        out = module.clone(keep_hidden=every).apply({"params": params}, inputs["ids"], inputs.get("mask"))
        return {name: state for (name, _), state in zip(names, out.hidden, strict=True)}

    def trace_theirs(tensors, inputs):
        model = torch_model(module, tensors)
        return {name: run_torch(model, inputs, i)["hidden"] for i, (_, name) in enumerate(names)}

    return Case(
        name,
        lambda: clip_rules(module),
        lambda: inputs,
        ours_of(module),
        lambda tensors, inputs: run_torch(torch_model(module, tensors), inputs),
        tuple(names),
        trace_ours,
        trace_theirs,
        extra={"module": module},
    )


CASES = [
    case("clip_quick_gelu", {"ids": IDS}),
    case("clip_gelu_projection", {"ids": IDS, "mask": MASK}, activation="gelu", projection=24, scan_layers=False),
    case("clip_largest_id", {"ids": IDS}, end=None, projection=40),
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

    module, tensors = case.extra["module"], case.tensors()
    params = case.rules().to_ours(tensors)
    for layout in ("transformers", "bare")[: 1 + (module.projection is None)]:
        exported = clip_rules(module, layout).to_theirs(params)
        save_file(exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(clip_config(module)))
        cls = transformers.CLIPTextModelWithProjection if module.projection else transformers.CLIPTextModel
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        theirs, ours = run_torch(model.eval(), case.inputs()), case.outputs()
        assert max(distance(ours[name], theirs[name]) for name in theirs) < 5e-6
        model.save_pretrained(tmp_path / "back")
        back = load_file(tmp_path / "back" / "model.safetensors")
        assert clip_layout(back) == layout
        assert jax.tree.all(jax.tree.map(np.array_equal, load(back, clip_rules(module, layout)), params))
        assert clip_from_config(json.loads((tmp_path / "back" / "config.json").read_text())) == module.clone(
            scan_layers=True
        )


@pytest.mark.parity
def test_bfloat16_is_near_that_of_pytorch():
    torch = peer("torch")

    case = CASES[0]
    module = case.extra["module"].clone(compute=Compute("bfloat16"))
    theirs = run_torch(torch_model(module, case.tensors()).to(torch.bfloat16), case.inputs())
    ours = dataclasses.replace(case, ours=ours_of(module)).outputs(jnp.bfloat16)
    assert max(distance(ours[name], theirs[name]) for name in theirs) < 2e-2


def norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["norm"]["scale"][None, None] + params["norm"]["bias"][None, None]


def test_exact_gelu_for_the_quick_one_is_seen(monkeypatch):
    activations = fm_jax.text.clip.ACTIVATIONS
    monkeypatch.setitem(activations, "quick_gelu", activations["gelu"])
    check_mutation(CASES[0])


def test_a_final_norm_on_the_state_before_the_last_is_seen():
    case = CASES[0]

    def mistaken(params, inputs):
        out = case.ours(params, inputs)
        return out | {"hidden": norm(params, out["hidden"])}

    check_mutation(dataclasses.replace(case, ours=mistaken))


def test_no_final_norm_is_seen():
    case = CASES[0]

    def mistaken(params, inputs):
        out = case.extra["module"].apply({"params": params}, inputs["ids"])
        return case.ours(params, inputs) | {"last": out.hidden[-1]}

    check_mutation(dataclasses.replace(case, ours=mistaken))


@pytest.mark.parametrize("end", [57, None])
@pytest.mark.slow
def test_another_end_of_the_text_is_seen(end):
    """The largest id is not the end here, and the last end not the first."""
    case = CASES[0] if end is None else CASES[2]
    module = case.extra["module"].clone(end=end)
    check_mutation(dataclasses.replace(case, ours=ours_of(module)))
