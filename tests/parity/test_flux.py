"""FLUX.1 against diffusers' `FluxTransformer2DModel`, in its layout and in the authors' own."""

import functools
import inspect
import types

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
    distance,
    first_difference,
    first_last,
    random_input,
    to_torch,
)

from fm_jax.models import Compute, flux
from fm_jax.models.conditioning import Conditions
from fm_jax.weights import flux as weights
from fm_jax.weights.flux import flux_config, flux_from_config, flux_rules

CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 12,
    "out_channels": None,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "guidance_embeds": False,
    "axes_dims_rope": [4, 4, 8],
}
GUIDED = {"guidance_embeds": True, "axes_dims_rope": [2, 8, 6]}
MASK = np.arange(5) < np.asarray([[5], [3]])


def given(height, width, length, *, guidance=False, mask=None, local=0, hole=False):
    """Two examples that differ in time, guidance and length of their text; channels first, as PyTorch wants them.

    Small numbers, among which an epsilon shows.
    """
    arrays = {
        "t": np.asarray([0.25, 0.7], np.float32),
        "x": 0.2 * random_input("x", (2, 3, height, width)),
        "tokens": 0.2 * random_input("tokens", (2, length, 20)),
        "vector": random_input("vector", (2, 12)),
    }
    if guidance:
        arrays["guidance"] = np.asarray([3.5, 1.25], np.float32)
    if mask is not None:
        arrays["mask"] = mask
    if local:
        arrays["local"] = random_input("local", (2, local, height, width))
    if hole:
        arrays["hole"] = (random_input("hole", (2, 1, 8 * height, 8 * width)) > 0).astype(np.float32)
    return arrays


def last(x):
    return jnp.moveaxis(x, 1, -1)


def apply(module, params, arrays, **options):
    local = last(arrays["local"]) if "local" in arrays else None
    if "hole" in arrays:
        local = flux.fill_local(local, last(arrays["hole"]))
    names = ("tokens", "vector", "guidance", "mask")
    cond = Conditions(local=local, **{name: arrays[name] for name in names if name in arrays})
    return module.apply({"params": params}, arrays["t"], last(arrays["x"]), cond, **options)


def ours(module, params, arrays):
    return {"out": apply(module, params, arrays)}


def trace_ours(module, params, arrays):
    kinds = (flux.DoubleBlock, flux.SingleBlock)
    kept = {"capture_intermediates": lambda block, _: isinstance(block, kinds), "mutable": True}
    found = apply(module, params, arrays, **kept)[1]["intermediates"]
    patches = arrays["x"].shape[2] * arrays["x"].shape[3] // 4
    traces = {f"double {i}": h for i, h in enumerate(found["doubles"]["__call__"][0][0])}
    return traces | {f"single {i}": h[:, :patches] for i, h in enumerate(found["singles"]["__call__"][0])}


def published(tensors, hidden):
    """Tensors of the authors' layout in that of diffusers, by the function of diffusers, which has one width in it."""
    from diffusers.loaders import single_file_utils

    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {hidden}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(tensors))


def peer(config, layout, tensors):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    tensors = to_torch(tensors)
    model.load_state_dict(tensors if layout == "diffusers" else published(tensors, model.inner_dim), strict=True)
    return model


def call(model, arrays, dtype=None):
    """As the pipelines of diffusers call it, with their packing."""
    import torch
    from diffusers import FluxFillPipeline, FluxPipeline

    dtype = dtype or torch.float32
    to = {name: torch.from_numpy(value) for name, value in arrays.items()}
    batch_size, channels, height, width = to["x"].shape
    packed = FluxPipeline._pack_latents(to["x"], batch_size, channels, height, width)
    if "hole" in to:
        vae = types.SimpleNamespace(config=types.SimpleNamespace(shift_factor=0.0, scaling_factor=1.0))
        pipeline = types.SimpleNamespace(vae=vae, vae_scale_factor=8, _pack_latents=FluxFillPipeline._pack_latents)
        sizes = (batch_size, to["local"].shape[1], 1, 8 * height, 8 * width, torch.float32, "cpu", None)
        hole, local = FluxFillPipeline.prepare_mask_latents(pipeline, to["hole"], to["local"], *sizes)
        packed = torch.cat([packed, local, hole], dim=2)
    elif "local" in to:
        local = FluxPipeline._pack_latents(to["local"], batch_size, to["local"].shape[1], height, width)
        packed = torch.cat([packed, local], dim=2)
    kwargs = None
    if "mask" in to:  # text comes first there
        seen = torch.cat([to["mask"], torch.ones(batch_size, packed.shape[1], dtype=bool)], dim=1)
        kwargs = {"attention_mask": seen[:, None, None, :]}
    with torch.no_grad():
        out = model(
            packed.to(dtype),
            encoder_hidden_states=to["tokens"].to(dtype),
            pooled_projections=to["vector"].to(dtype),
            timestep=1 - to["t"],
            img_ids=FluxPipeline._prepare_latent_image_ids(batch_size, height // 2, width // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(to["tokens"].shape[1], 3),
            guidance=to.get("guidance"),
            joint_attention_kwargs=kwargs,
        ).sample
    return -first_last(FluxPipeline._unpack_latents(out.float(), 8 * height, 8 * width, 8))


def theirs(config, layout, tensors, arrays):
    return {"out": call(peer(config, layout, tensors), arrays)}


def trace_theirs(config, layout, tensors, arrays):
    model, kept = peer(config, layout, tensors), {}
    for kind, blocks in (("double", model.transformer_blocks), ("single", model.single_transformer_blocks)):
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda _, __, out, name=f"{kind} {i}": kept.update({name: out[1].numpy()}))
    call(model, arrays)
    return kept


class Quiet(Case):
    """With queries and keys so small that the epsilon of their normalisation shows."""

    def tensors(self):
        small = ("to_q.", "to_k.", "add_q_proj.", "add_k_proj.")
        return {
            key: value * np.float32(0.03) if any(name in key for name in small) else value
            for key, value in super().tensors().items()
        }


def case(name, arrays, layout="diffusers", scan_layers=True, kind=Case, **changes):
    config = CONFIG | changes
    module = flux_from_config(config).clone(scan_layers=scan_layers)
    blocks = [f"double {i}" for i in range(module.num_double)] + [f"single {i}" for i in range(module.num_single)]
    return kind(
        f"flux-{name}",
        rules=functools.partial(flux_rules, module, layout),
        inputs=lambda: arrays,
        ours=functools.partial(ours, module),
        theirs=functools.partial(theirs, config, layout),
        blocks=tuple((block, block) for block in blocks),
        trace_ours=functools.partial(trace_ours, module),
        trace_theirs=functools.partial(trace_theirs, config, layout),
        extra={"module": module, "config": config},
    )


PLAIN = case("plain", given(4, 6, 5), kind=Quiet)
GUIDANCE = case("guided", given(8, 4, 4, guidance=True), **GUIDED)
AUTHORS = case("bfl", given(8, 4, 4, guidance=True), "bfl", **GUIDED)
MASKED = case("masked", given(4, 6, 5, mask=MASK))
FILL = case("fill", given(4, 6, 3, guidance=True, local=3, hole=True), in_channels=280, out_channels=12, **GUIDED)
CONTROL = case("control", given(4, 2, 3, local=3), scan_layers=False, in_channels=24, out_channels=12)
CASES = [PLAIN, GUIDANCE, MASKED, FILL, CONTROL, AUTHORS]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_record(case):
    check_record(case)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_peer(case):
    check_peer(case)


def bfloat16(case, arrays):
    module = case.extra["module"].clone(compute=Compute("bfloat16"))
    params = case.rules().to_ours(case.tensors())
    return np.asarray(jax.jit(functools.partial(ours, module))(params, arrays)["out"])


def test_bfloat16_is_close_to_float32():
    assert distance(bfloat16(GUIDANCE, GUIDANCE.inputs()), GUIDANCE.recorded()["out"]) < 2e-2


@pytest.mark.parity
@pytest.mark.parametrize("case", [PLAIN, MASKED, FILL, CONTROL], ids=repr)
def test_bfloat16_is_close_to_the_peer_in_bfloat16(case):
    """At times and scales whose thousandfold has eight bits: there PyTorch rounds before the sines, and we do not."""
    torch = pytest.importorskip("torch")
    exact = {"t": np.asarray([0.5, 0.75], np.float32), "guidance": np.asarray([4.0, 2.0], np.float32)}
    arrays = {name: exact.get(name, value) for name, value in case.inputs().items()}
    model = peer(case.extra["config"], "diffusers", case.tensors()).to(torch.bfloat16)
    assert distance(bfloat16(case, arrays), call(model, arrays, torch.bfloat16)) < 2e-2


@pytest.mark.parity
@pytest.mark.parametrize("case", [PLAIN, FILL], ids=repr)
def test_an_export_is_loaded_by_the_peer(case, tmp_path):
    """Our config and our tensors are the class's own."""
    diffusers = pytest.importorskip("diffusers")
    config = flux_config(case.extra["module"])
    model = diffusers.FluxTransformer2DModel.from_config(config)
    written = {name: value for name, value in model.config.items() if name[0] != "_"}
    assert written == {name: value for name, value in config.items() if name[0] != "_"}
    rules = case.rules()
    tensors = rules.to_theirs(rules.to_ours(case.tensors()))
    model.load_state_dict(to_torch(tensors), strict=True)
    model.save_pretrained(tmp_path)
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    assert distance(call(again, case.inputs()), case.recorded()["out"]) < 1e-6


@pytest.mark.parity
@pytest.mark.parametrize("name", flux.FLUX_CONFIGS)
def test_names_and_shapes_are_the_peers(name):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    module = flux.make_flux(name)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(flux_config(module))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == flux_rules(module).shapes


# Mistakes, each of which has to show.


def packed_as_ours(monkeypatch):
    monkeypatch.setattr(weights, "PACKED", "(p q c)")


def rope_of_halves(monkeypatch):
    def halves(x, turn):
        first, second = jnp.split(x, 2, axis=-1)
        cos, sin = (part[None, :, None, :] for part in turn)
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    monkeypatch.setattr(flux, "apply_rope", halves)


def guidance_as_it_is(monkeypatch):
    monkeypatch.setattr(flux, "GUIDANCE_SCALE", 1.0)


def erf(monkeypatch):
    monkeypatch.setattr("flax.linen.gelu", lambda x, approximate: jax.nn.gelu(x, approximate=False))


def epsilon(monkeypatch):
    wrong = lambda dtype, name: nn.LayerNorm(1e-5, use_scale=False, use_bias=False, dtype=dtype, name=name)  # noqa: E731
    monkeypatch.setattr(flux, "layer_norm", wrong)


def epsilon_of_heads(monkeypatch):
    monkeypatch.setattr(flux, "rms_norm", lambda dtype, name: nn.RMSNorm(1e-5, dtype=dtype, name=name))


def last_halves(monkeypatch):
    right = weights.dense

    def wrong(path, key, **where):
        if path == "modulation":
            part = where.pop("part", None)
            rows = where.pop("rows", (0, 64))
            if part is None:  # the authors' layout
                yield from right(path, key, rows=(0, 32), part=(32, 64))
                yield from right(path, key, rows=(32, 64), part=(0, 32))
            else:
                yield from right(path, key, rows=rows, part=rows)
        else:
            yield from right(path, key, **where)

    monkeypatch.setattr(weights, "dense", wrong)


def ids(change):
    right = flux.joint_ids
    return lambda monkeypatch: monkeypatch.setattr(flux, "joint_ids", lambda *sizes: change(right(*sizes), sizes[2]))


columns_first = ids(lambda found, _: found[:, [0, 2, 1]])
text_in_a_row = ids(lambda found, length: found + np.arange(-len(found), 0)[:, None].clip(-length - 1) + length + 1)


def mask_forgotten(monkeypatch):
    right = flux.attend
    monkeypatch.setattr(flux, "attend", lambda q, k, v, mask, **rest: right(q, k, v, **rest))


def time_as_it_is(monkeypatch):
    monkeypatch.setattr(flux, "RECTIFIED", flux.RECTIFIED.__class__(1.0, reverse=True, sign=-1.0))


def pixels_column_by_column(monkeypatch):
    right = flux.space_to_depth
    wrong = lambda x, size: right(x, size).reshape(*x.shape[:1], -1, size, size).swapaxes(-1, -2)  # noqa: E731
    monkeypatch.setattr(flux, "space_to_depth", lambda x, size: wrong(x, size).reshape(right(x, size).shape))


MISTAKES = [
    (packed_as_ours, PLAIN),
    (rope_of_halves, PLAIN),
    (guidance_as_it_is, GUIDANCE),
    (erf, PLAIN),
    (epsilon, PLAIN),
    (epsilon_of_heads, PLAIN),
    (last_halves, PLAIN),
    (last_halves, AUTHORS),
    (columns_first, PLAIN),
    (text_in_a_row, PLAIN),
    (mask_forgotten, MASKED),
    (time_as_it_is, PLAIN),
    (pixels_column_by_column, FILL),
]
NAMES = [
    f"{mistake.__name__}-{case}" if mistake.__name__ != "<lambda>" else f"ids-{i}"
    for i, (mistake, case) in enumerate(MISTAKES)
]


@pytest.mark.parametrize(("mistake", "case"), MISTAKES, ids=NAMES)
@pytest.mark.slow
def test_mistakes_show(mistake, case, monkeypatch):
    mistake(monkeypatch)
    check_mutation(case)


@pytest.mark.parity
def test_a_failure_names_its_block(monkeypatch):
    pytest.importorskip("torch")
    rope_of_halves(monkeypatch)
    assert "first difference: double 0 and double 0" in first_difference(PLAIN)
    monkeypatch.undo()
    last_halves(monkeypatch)
    assert "all blocks agree, the last single 2" in first_difference(PLAIN)
