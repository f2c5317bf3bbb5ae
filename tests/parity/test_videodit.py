"""Movie Gen's video transformer against an independent PyTorch module of the same architecture."""

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

from fm_jax.models import Compute, crossdit, videodit
from fm_jax.models.conditioning import Conditions
from fm_jax.weights.videodit import videodit_from_config, videodit_rules

CONFIG = {
    "_class_name": "VideoDiT",
    "hidden": 24,
    "num_layers": 3,
    "num_heads": 2,
    "mlp_hidden": 40,
    "channels": 3,
    "epsilon": 1e-5,
    "patch_size": [1, 2, 2],
    "positions": [5, 4, 6],
    "encoders": {"ul2": 20, "byt5": 12},
}
T = np.asarray([0.25, 0.625], np.float32)


def inputs(frames, height, width, *, masked=True, channels=3):
    """Two examples that differ in time, in text and in its lengths."""
    arrays = {
        "t": T,
        "x": random_input("video", (2, channels, frames, height, width)),
        "ul2": random_input("ul2", (2, 5, 20)),
        "byt5": random_input("byt5", (2, 4, 12)),
    }
    if masked:
        arrays["mask"] = np.arange(5) < np.asarray([[4], [2]])
    return arrays


def conditions(arrays):
    """One encoder with a mask, where there is one at all, and one without."""
    mask = {"ul2": arrays["mask"]} if "mask" in arrays else None
    return Conditions(tokens={name: arrays[name] for name in ("byt5", "ul2")}, mask=mask)


def ours(module, params, arrays):
    x = jnp.moveaxis(arrays["x"], 1, -1)
    return {"out": module.apply({"params": params}, arrays["t"], x, conditions(arrays))}


def trace_ours(module, params, arrays):
    x = jnp.moveaxis(arrays["x"], 1, -1)
    kept = {"capture_intermediates": lambda module, _: type(module).__name__ == "VideoDiTBlock", "mutable": True}
    _, state = module.apply({"params": params}, arrays["t"], x, conditions(arrays), **kept)
    return {str(i): h for i, h in enumerate(state["intermediates"]["blocks"]["__call__"][0])}


def peer(config, tensors):
    from parity.reference_videodit import MovieGen

    options = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    model = MovieGen(**{name: value for name, value in options.items() if name[0] != "_"}).eval()
    model.load_state_dict(to_torch(tensors), strict=True)
    return model


def call(model, arrays, dtype=None):
    import torch

    given = {name: torch.from_numpy(value) for name, value in arrays.items()}
    if dtype is not None:
        given |= {name: given[name].to(dtype) for name in ("x", "ul2", "byt5")}
    seen = {"ul2": given["mask"]} if "mask" in given else {}
    with torch.no_grad():
        out = model(given["t"], given["x"], {name: given[name] for name in ("ul2", "byt5")}, seen)
    return first_last(out.float())


def theirs(config, tensors, arrays):
    return {"out": call(peer(config, tensors), arrays)}


def trace_theirs(config, tensors, arrays):
    model, kept = peer(config, tensors), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: kept.update({str(i): out.numpy()}))
    call(model, arrays)
    return kept


class Quiet(Case):
    """With small numbers before every norm, so that its epsilon shows."""

    def tensors(self):
        loud = ("patches.weight", "positions", ".out.weight", "mlp_out", "text.")
        tensors = super().tensors()
        return {key: 0.1 * value if any(part in key for part in loud) else value for key, value in tensors.items()}


def case(name, given, kind=Case, **changes):
    config = CONFIG | changes
    module = videodit_from_config(config)
    return kind(
        f"videodit_{name}",
        rules=functools.partial(videodit_rules, module),
        inputs=lambda: given,
        ours=functools.partial(ours, module),
        theirs=functools.partial(theirs, config),
        blocks=tuple((str(i), str(i)) for i in range(module.num_layers)),
        trace_ours=functools.partial(trace_ours, module),
        trace_theirs=functools.partial(trace_theirs, config),
        extra={"module": module, "config": config},
    )


VIDEO = case("video", inputs(3, 4, 6))
IMAGE = case("image", inputs(1, 8, 4, masked=False), Quiet)
# Patches over frames too, and all numbers of positions and of patches different.
DEEP = case("deep", inputs(4, 3, 6, channels=2), patch_size=[2, 1, 3], channels=2, epsilon=1e-3)
CASES = [VIDEO, IMAGE, DEEP]


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
    assert distances(bfloat16(VIDEO), VIDEO.recorded())["out"] < 2e-2


@pytest.mark.parity
def test_bfloat16_is_close_to_the_peer_in_bfloat16():
    torch = pytest.importorskip("torch")
    model = peer(VIDEO.extra["config"], VIDEO.tensors()).to(torch.bfloat16)
    assert distances(bfloat16(VIDEO), {"out": call(model, VIDEO.inputs(), torch.bfloat16)})["out"] < 2e-2


# Mistakes, each of which has to show.


def positions_at_the_input_alone(monkeypatch):
    right = videodit.run_blocks

    def wrong(block, options, length, h, positions, *args, **loop):
        return right(block, options, length, h + positions[None], jnp.zeros_like(positions), *args, **loop)

    monkeypatch.setattr(videodit, "run_blocks", wrong)


def positions_outside_of_the_residual(monkeypatch):
    class Block(videodit.VideoDiTBlock):
        @nn.compact
        def __call__(self, x, positions, *rest):
            return super().__call__(x, positions, *rest) - positions[None]

    monkeypatch.setattr(videodit, "VideoDiTBlock", Block)


def epsilon(monkeypatch):
    right = videodit.rms_norm
    monkeypatch.setattr(videodit, "rms_norm", lambda dtype, name, epsilon: right(dtype, name, epsilon=1e-6))


def silu_of_the_last_embedding(monkeypatch):
    right = crossdit.modulations
    wrong = lambda table, emb: right(table, nn.silu(emb) if len(table) == 2 else emb)  # noqa: E731
    monkeypatch.setattr(videodit, "modulations", wrong)


def gate_on_cross_attention(monkeypatch):
    right, seen = videodit.modulations, []

    def modulations(table, emb):
        seen.append(right(table, emb))
        return seen[-1]

    class Attention(videodit.Attention):
        @nn.compact
        def __call__(self, x, context, mask=None):
            h = super().__call__(x, context, mask)
            return seen[-1][2] * h if self.name == "cross" else h

    monkeypatch.setattr(videodit, "modulations", modulations)
    monkeypatch.setattr(videodit, "Attention", Attention)


def mask_forgotten(monkeypatch):
    right = crossdit.attend
    monkeypatch.setattr(crossdit, "attend", lambda q, k, v, mask, **rest: right(q, k, v, **rest))


def time_from_data(monkeypatch):
    monkeypatch.setattr(videodit, "OURS", crossdit.Border(reverse=True))


MISTAKES = [positions_at_the_input_alone, silu_of_the_last_embedding, gate_on_cross_attention, epsilon]
MORE = [positions_outside_of_the_residual, mask_forgotten, time_from_data]
EVERY = [*MISTAKES, *(pytest.param(mistake, marks=pytest.mark.slow) for mistake in MORE)]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("mistake", EVERY, ids=lambda mistake: mistake.__name__)
def test_mistakes_show(mistake, monkeypatch):
    mistake(monkeypatch)
    check_mutation(IMAGE if mistake is epsilon else VIDEO)


@pytest.mark.parity
def test_a_failure_names_its_block(monkeypatch):
    pytest.importorskip("torch")
    positions_at_the_input_alone(monkeypatch)
    assert "first difference: 1 and 1" in first_difference(VIDEO)  # the first block sees its positions
