"""PixArt against diffusers' `PixArtTransformer2DModel`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import (
    Case,
    check_mutation,
    check_peer,
    check_record,
    distances,
    first_difference,
    first_last,
    random_input,
    to_torch,
)

from fm_jax.models import Compute, crossdit
from fm_jax.models.conditioning import Border, Conditions
from fm_jax.weights.crossdit import crossdit_config, crossdit_from_config, crossdit_rules
from fm_jax.weights.folder import open_model, save_model

CONFIG = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "sample_size": 8,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
T = np.asarray([0.25, 0.625], np.float32)
STEP = 1000 * (1 - T.astype(np.float64)) - 1


def build(**changes):
    return crossdit_from_config(CONFIG | changes)


def inputs(height, width, length, *, masked, sized):
    """Two examples that differ in time, in text and its length, and in size."""
    arrays = {
        "t": T,
        "x": random_input("x", (2, 4, height, width)),
        "tokens": random_input("tokens", (2, length, 20)),
    }
    if masked:
        arrays["mask"] = np.arange(length) < np.asarray([[length - 2], [3]])
    if sized:
        arrays["vector"] = np.asarray([[512.0, 768.0, 512 / 768], [1024.0, 640.0, 1.6]], np.float32)
    return arrays


def conditions(arrays):
    return Conditions(tokens=arrays["tokens"], mask=arrays.get("mask"), vector=arrays.get("vector"))


def ours(module, params, arrays):
    x = jnp.moveaxis(arrays["x"], 1, -1)
    return {"out": module.apply({"params": params}, arrays["t"], x, conditions(arrays))}


def trace_ours(module, params, arrays):
    x = jnp.moveaxis(arrays["x"], 1, -1)
    kept = {"capture_intermediates": lambda module, _: type(module).__name__ == "CrossDiTBlock", "mutable": True}
    _, state = module.apply({"params": params}, arrays["t"], x, conditions(arrays), **kept)
    return {str(i): h for i, h in enumerate(state["intermediates"]["blocks"]["__call__"][0])}


def peer(config, tensors):
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    model.load_state_dict(to_torch(tensors), strict=True)
    return model


def call(model, arrays, dtype=None):
    import torch

    given = {name: torch.from_numpy(value) for name, value in arrays.items()}
    if dtype is not None:
        given |= {name: given[name].to(dtype) for name in ("x", "tokens")}
    sizes = given.get("vector")
    added = {"resolution": None, "aspect_ratio": None}
    if sizes is not None:
        added = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
    with torch.no_grad():
        out = model(
            given["x"],
            encoder_hidden_states=given["tokens"],
            timestep=torch.from_numpy(STEP),
            added_cond_kwargs=added,
            encoder_attention_mask=given.get("mask"),
        ).sample
    return first_last(out.float())


def theirs(config, tensors, arrays):
    return {"out": call(peer(config, tensors), arrays)}


def trace_theirs(config, tensors, arrays):
    model, kept = peer(config, tensors), {}
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: kept.update({str(i): out.numpy()}))
    call(model, arrays)
    return kept


class Quiet(Case):
    """With small numbers before every norm, so that its epsilon shows."""

    def tensors(self):
        loud = ("pos_embed.proj", "to_out.0", "ff.net.2")
        tensors = super().tensors()
        return {key: 0.1 * value if any(part in key for part in loud) else value for key, value in tensors.items()}


def case(name, given, kind=Case, **changes):
    module, config = build(**changes), CONFIG | changes
    return kind(
        f"crossdit_{name}",
        rules=functools.partial(crossdit_rules, module),
        inputs=lambda: given,
        ours=functools.partial(ours, module),
        theirs=functools.partial(theirs, config),
        blocks=tuple((str(i), str(i)) for i in range(module.num_layers)),
        trace_ours=functools.partial(trace_ours, module),
        trace_theirs=functools.partial(trace_theirs, config),
        extra={"module": module, "config": config},
    )


MASKED = case("masked", inputs(8, 12, 7, masked=True, sized=False))
SIZED = case("sized", inputs(8, 6, 5, masked=True, sized=True), use_additional_conditions=True)
# The table's own size, all text seen, as many channels as the input has, another patch.
PLAIN = case(
    "plain",
    inputs(12, 12, 5, masked=False, sized=False),
    Quiet,
    sample_size=12,
    interpolation_scale=0.5,
    out_channels=None,
    patch_size=3,
)
CASES = [MASKED, SIZED, PLAIN]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_record(case):
    check_record(case)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_peer(case):
    check_peer(case)


def bfloat16(case):
    module = case.extra["module"].clone(compute=Compute("bfloat16"))
    params = case.rules().to_ours(case.tensors())
    return {"out": np.asarray(jax.jit(functools.partial(ours, module))(params, case.inputs())["out"])}


def test_bfloat16_is_close_to_float32():
    assert distances(bfloat16(SIZED), SIZED.recorded())["out"] < 2e-2


@pytest.mark.parity
def test_bfloat16_is_close_to_the_peer_in_bfloat16():
    torch = pytest.importorskip("torch")
    model = peer(SIZED.extra["config"], SIZED.tensors()).to(torch.bfloat16)
    assert distances(bfloat16(SIZED), {"out": call(model, SIZED.inputs(), torch.bfloat16)})["out"] < 2e-2


@pytest.mark.parity
def test_folders_go_to_the_peer_and_come_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    module, tensors = SIZED.extra["module"], SIZED.tensors()
    params = SIZED.rules().to_ours(tensors)
    save_model(tmp_path / "ours", module, params)
    model = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    assert distances({"out": call(model, SIZED.inputs())}, SIZED.recorded())["out"] < 1e-6
    config = crossdit_config(module)
    del config["_class_name"]
    assert {name: model.config[name] for name in config} == config
    model.save_pretrained(tmp_path / "theirs")
    again, back = open_model(tmp_path / "theirs")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parity
@pytest.mark.parametrize(("rows", "columns", "base", "scale"), [(64, 64, 64, 2), (40, 96, 64, 2), (7, 5, 4, 0.5)])
def test_the_position_table_is_the_peers_to_the_bit(rows, columns, base, scale):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    table = embeddings.get_2d_sincos_pos_embed(24, (rows, columns), base_size=base, interpolation_scale=scale)
    ours = crossdit.position_table(rows, columns, 24, base, scale)
    np.testing.assert_allclose(ours, table.float().numpy(), rtol=0, atol=6e-8)  # a last place of two sines


# Mistakes, each of which has to show.


def erf(monkeypatch):
    monkeypatch.setattr("flax.linen.gelu", lambda x, approximate: jax.nn.gelu(x, approximate=False))


def epsilon(monkeypatch):
    wrong = lambda dtype, name: nn.LayerNorm(1e-5, use_scale=False, use_bias=False, dtype=dtype, name=name)  # noqa: E731
    monkeypatch.setattr(crossdit, "layer_norm", wrong)


def silu_of_the_last_embedding(monkeypatch):
    right = crossdit.modulations
    wrong = lambda table, emb: right(table, nn.silu(emb) if len(table) == 2 else emb)  # noqa: E731
    monkeypatch.setattr(crossdit, "modulations", wrong)


def replace_cross_attention(monkeypatch, change):
    """`change(parts, query, call)` in place of `call(query)`, with the parts of the block's modulation."""
    right, seen = crossdit.modulations, []

    def modulations(table, emb):
        seen.append(right(table, emb))
        return seen[-1]

    class Attention(crossdit.Attention):
        @nn.compact
        def __call__(self, x, context, mask=None):
            attention = super().__call__
            if self.name != "cross":
                return attention(x, context, mask)
            return change(seen[-1], x, lambda query: attention(query, context, mask))

    monkeypatch.setattr(crossdit, "modulations", modulations)
    monkeypatch.setattr(crossdit, "Attention", Attention)


def gate_on_cross_attention(monkeypatch):
    replace_cross_attention(monkeypatch, lambda parts, x, call: parts[2] * call(x))


def norm_before_cross_attention(monkeypatch):
    replace_cross_attention(monkeypatch, lambda parts, x, call: call(jax.nn.standardize(x, epsilon=1e-6)))


def adaln_before_cross_attention(monkeypatch):
    wrong = lambda parts, x, call: call(crossdit.modulate(jax.nn.standardize(x), *parts[:2]))  # noqa: E731
    replace_cross_attention(monkeypatch, wrong)


def rows_first(monkeypatch):
    right = crossdit.position_table
    wrong = lambda rows, columns, dim, *rest: np.roll(right(rows, columns, dim, *rest), dim // 2, axis=1)  # noqa: E731
    monkeypatch.setattr(crossdit, "position_table", wrong)


def positions_not_interpolated(monkeypatch):
    right = crossdit.position_table
    wrong = lambda rows, columns, dim, base, scale: right(rows, columns, dim, base, 1.0)  # noqa: E731
    monkeypatch.setattr(crossdit, "position_table", wrong)


def step_from_one(monkeypatch):
    right = Border.time
    monkeypatch.setattr(Border, "time", lambda self, t: right(self, t) + 1)


def mask_forgotten(monkeypatch):
    right = crossdit.attend
    monkeypatch.setattr(crossdit, "attend", lambda q, k, v, mask, **rest: right(q, k, v, **rest))


def channels_before_patch(monkeypatch):
    wrong = lambda x, p: crossdit.jnp.swapaxes(PATCHIFY(x, p).reshape(len(x), -1, p * p, x.shape[-1]), 2, 3)  # noqa: E731
    monkeypatch.setattr(crossdit, "patchify", lambda x, p: wrong(x, p).reshape(PATCHIFY(x, p).shape))


PATCHIFY = crossdit.patchify
MISTAKES = [erf, epsilon, silu_of_the_last_embedding, gate_on_cross_attention]
MORE = [
    norm_before_cross_attention,
    adaln_before_cross_attention,
    rows_first,
    positions_not_interpolated,
    step_from_one,
    mask_forgotten,
    channels_before_patch,
]
EVERY = [*MISTAKES, *(pytest.param(mistake, marks=pytest.mark.slow) for mistake in MORE)]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("mistake", EVERY, ids=lambda mistake: mistake.__name__)
def test_mistakes_show(mistake, monkeypatch):
    mistake(monkeypatch)
    check_mutation(PLAIN if mistake is epsilon else MASKED)


@pytest.mark.slow
def test_height_and_width_swapped_show():
    given = SIZED.inputs()
    swapped = given | {"vector": given["vector"][:, [1, 0, 2]]}
    check_mutation(Case(SIZED.name, SIZED.rules, lambda: swapped, SIZED.ours, SIZED.theirs))


@pytest.mark.parity
def test_a_failure_names_its_block(monkeypatch):
    pytest.importorskip("torch")
    replace_cross_attention(monkeypatch, lambda parts, x, call: parts[2] * call(x))
    assert "first difference: 0 and 0" in first_difference(MASKED)
    monkeypatch.undo()
    silu_of_the_last_embedding(monkeypatch)
    assert "all blocks agree" in first_difference(MASKED)
