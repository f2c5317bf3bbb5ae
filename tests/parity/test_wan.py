"""Wan's video transformer against diffusers' `WanTransformer3DModel`."""

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

from fm_jax.models import Compute, wan, wan_blocks
from fm_jax.models.conditioning import Border, Conditions
from fm_jax.weights.folder import open_model, save_model
from fm_jax.weights.wan import wan_config, wan_from_config, wan_rules

CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 14,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 3,
}
T = np.asarray([0.25, 0.625], np.float32)
FRAME_TIMES = np.asarray([[1.0, 0.375], [0.75, 0.125]], np.float32)


def build(**changes):
    return wan_from_config(CONFIG | changes)


def inputs(shape, length, *, channels=3, t=T, padded=0):
    """Two examples that differ in time and text, the second with zeros behind its text."""
    tokens = random_input("tokens", (2, length, 20))
    tokens[1, length - padded :] = 0
    return {"t": t, "x": random_input("x", (2, channels, *shape)), "tokens": tokens}


def ours(module, params, arrays):
    x = jnp.moveaxis(arrays["x"], 1, -1)
    x, local = x[..., : module.channels], x[..., module.channels :]
    text, image = arrays["tokens"], arrays.get("image")
    tokens = text if image is None else {"text": text, "image": image}
    cond = Conditions(tokens=tokens, local=local if module.local_channels else None)
    return {"out": module.apply({"params": params}, arrays["t"], x, cond)}


def trace_ours(module, params, arrays):
    x = jnp.moveaxis(arrays["x"], 1, -1)
    kept = {"capture_intermediates": lambda module, _: type(module).__name__ == "WanBlock", "mutable": True}
    cond = Conditions(tokens=arrays["tokens"])
    _, state = module.apply({"params": params}, arrays["t"], x, cond, **kept)
    return {str(i): h for i, h in enumerate(state["intermediates"]["blocks"]["__call__"][0])}


def peer(config, tensors):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    model.load_state_dict(to_torch(tensors), strict=True)
    return model


def call(model, arrays, dtype=None):
    import torch

    x, tokens = (torch.from_numpy(arrays[name]).to(dtype or torch.float32) for name in ("x", "tokens"))
    time = 1000 * (1 - arrays["t"].astype(np.float64))
    if time.ndim == 2:  # a time for every patch
        p_h, p_w = model.config.patch_size[1:]
        time = time.repeat(x.shape[3] // p_h * (x.shape[4] // p_w), axis=1)
    with torch.no_grad():
        image = torch.from_numpy(arrays["image"]) if "image" in arrays else None
        out = model(x, torch.from_numpy(time), tokens, image).sample
    return -first_last(out.float())


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
        loud = ("patch_embedding", "to_out.0", "ffn.net.2", "to_q", "to_k")
        tensors = super().tensors()
        return {key: 0.1 * value if any(part in key for part in loud) else value for key, value in tensors.items()}


def case(name, given, kind=Case, **changes):
    module, config = build(**changes), CONFIG | changes
    return kind(
        f"wan_{name}",
        rules=functools.partial(wan_rules, module),
        inputs=lambda: given,
        ours=functools.partial(ours, module),
        theirs=functools.partial(theirs, config),
        blocks=tuple((str(i), str(i)) for i in range(module.num_layers)),
        trace_ours=functools.partial(trace_ours, module),
        trace_theirs=functools.partial(trace_theirs, config),
        extra={"module": module, "config": config},
    )


VIDEO = case("video", inputs((3, 4, 6), 7, padded=3))
# A time for each frame, an image that is joined to the latents, patches over frames, other heads.
FRAMES = case(
    "frames",
    inputs((4, 4, 6), 5, channels=5, t=FRAME_TIMES),
    in_channels=5,
    patch_size=(2, 2, 3),
    num_attention_heads=3,
    attention_head_dim=8,
)
IMAGE = case("image", inputs((1, 6, 4), 5), Quiet, eps=1e-5, out_channels=None)
# Features of an image; the peer takes 512 tokens for text and those before them for the image.
FROM_IMAGE = case(
    "from_image",
    inputs((2, 4, 6), 512, channels=5) | {"image": random_input("image", (2, 5, 12))},
    in_channels=5,
    image_dim=12,
    added_kv_proj_dim=28,
)
CASES = [VIDEO, FRAMES, IMAGE, FROM_IMAGE]


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


@pytest.mark.parity
def test_folders_go_to_the_peer_and_come_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    module, params = FRAMES.extra["module"], FRAMES.rules().to_ours(FRAMES.tensors())
    save_model(tmp_path / "ours", module, params)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours").eval()
    assert distances({"out": call(model, FRAMES.inputs())}, FRAMES.recorded())["out"] < 1e-6
    config = wan_config(module)
    del config["_class_name"]
    assert {name: model.config[name] for name in config} == config
    model.save_pretrained(tmp_path / "theirs")
    again, back = open_model(tmp_path / "theirs")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, back, params)


# Mistakes, each of which has to show.


def erf(monkeypatch):
    monkeypatch.setattr("flax.linen.gelu", lambda x, approximate: jax.nn.gelu(x, approximate=False))


def epsilon_of_norms(monkeypatch):
    right = wan_blocks.layer_norm
    wrong = lambda dtype, name, *, affine=False, epsilon: right(dtype, name, affine=affine, epsilon=1e-6)  # noqa: E731
    monkeypatch.setattr(wan_blocks, "layer_norm", wrong)


def heads_normalised_apart(monkeypatch):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones_init(), x.shape[-2:])
            return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale[None, None]

    monkeypatch.setattr(wan_blocks.WanAttention, "_norm", lambda self, name: Norm(name=name))


def epsilon_of_queries_and_keys(monkeypatch):
    axes = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}
    monkeypatch.setattr(
        wan_blocks.WanAttention, "_norm", lambda self, name: nn.RMSNorm(epsilon=1e-6, name=name, **axes)
    )


def silu_of_the_last_embedding(monkeypatch):
    right = wan.modulations
    monkeypatch.setattr(wan, "modulations", lambda table, emb: right(table, nn.silu(emb) if len(table) == 2 else emb))


def axes_in_thirds(monkeypatch):
    monkeypatch.setattr(wan_blocks, "rope_axes", lambda head_dim: (4, 4, 6))


def columns_before_rows(monkeypatch):
    right = wan.grid_angles
    wrong = lambda grid, head_dim: (  # noqa: E731
        right((grid[0], grid[2], grid[1]), head_dim)
        .reshape(grid[0], grid[2], grid[1], -1)
        .swapaxes(1, 2)
        .reshape(-1, head_dim // 2)
    )
    monkeypatch.setattr(wan, "grid_angles", wrong)


def halves_turned(monkeypatch):
    def wrong(x, turn):
        cos, sin = (jnp.concatenate([part, part], -1)[None, :, None] for part in turn)
        first, second = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-second, first], -1) * sin

    monkeypatch.setattr(wan_blocks, "apply_rope", wrong)


def gate_on_cross_attention(monkeypatch):
    """In effect: the text's attention is scaled."""
    right = wan_blocks.from_heads
    scaled = lambda features, dtype, name: lambda h: 0.5 * right(features, dtype, name)(h)  # noqa: E731
    monkeypatch.setattr(wan_blocks, "from_heads", scaled)


def cross_attention_without_norm(monkeypatch):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, init in (("scale", nn.initializers.ones_init()), ("bias", nn.initializers.zeros_init())):
                self.param(name, init, (x.shape[-1],))
            return x

    right = wan_blocks.layer_norm
    wrong = lambda dtype, name, **rest: Plain(name=name) if "cross" in name else right(dtype, name, **rest)  # noqa: E731
    monkeypatch.setattr(wan_blocks, "layer_norm", wrong)


def time_not_reversed(monkeypatch):
    monkeypatch.setattr(Border, "time", lambda self, t: 1000 * t)


def sign_forgotten(monkeypatch):
    monkeypatch.setattr(Border, "output", lambda self, out: out)


def channels_before_patch(monkeypatch):
    right = wan.patchify_video

    def wrong(x, patch):
        patches = right(x, patch)
        return patches.reshape(*patches.shape[:2], -1, x.shape[-1]).swapaxes(2, 3).reshape(patches.shape)

    monkeypatch.setattr(wan, "patchify_video", wrong)


MISTAKES = [erf, heads_normalised_apart, columns_before_rows, silu_of_the_last_embedding]


def image_among_the_text(monkeypatch):
    """In one attention, as one more text."""
    right, kept = wan_blocks.attend, []

    def wrong(q, k, v, **rest):
        kept.append((k, v))
        if k.shape[1] != 5:
            return right(q, k, v, **rest)
        text = kept[-2]
        joined = [jnp.concatenate([part, other], axis=1) for part, other in zip((k, v), text, strict=True)]
        return right(q, *joined, **rest) - right(q, *text, **rest)

    monkeypatch.setattr(wan_blocks, "attend", wrong)


QUIET = [epsilon_of_norms, epsilon_of_queries_and_keys]
MORE = [
    axes_in_thirds,
    halves_turned,
    gate_on_cross_attention,
    cross_attention_without_norm,
    time_not_reversed,
    sign_forgotten,
    channels_before_patch,
    image_among_the_text,
    *QUIET,
]
EVERY = [*MISTAKES, *(pytest.param(mistake, marks=pytest.mark.slow) for mistake in MORE)]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("mistake", EVERY, ids=lambda mistake: mistake.__name__)
def test_mistakes_show(mistake, monkeypatch):
    mistake(monkeypatch)
    case = IMAGE if mistake in QUIET else FROM_IMAGE if mistake is image_among_the_text else VIDEO
    check_mutation(case)


@pytest.mark.slow
def test_times_of_other_frames_show(monkeypatch):
    right = wan_blocks.spread
    monkeypatch.setattr(wan_blocks, "spread", lambda part, x: right(part, x)[:, ::-1])
    check_mutation(FRAMES)


@pytest.mark.parity
def test_a_failure_names_its_block(monkeypatch):
    pytest.importorskip("torch")
    halves_turned(monkeypatch)
    assert "first difference: 0 and 0" in first_difference(VIDEO)
    monkeypatch.undo()
    silu_of_the_last_embedding(monkeypatch)
    assert "all blocks agree" in first_difference(VIDEO)
