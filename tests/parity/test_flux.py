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
    RELATIVE,
    Case,
    check_mutation,
    check_peer,
    check_record,
    distance,
    first_difference,
    first_last,
    random_input,
    random_tensor,
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
    """Two examples that differ in time, guidance and length of their text; channels first, as PyTorch wants them."""
    arrays = {
        "t": np.asarray([0.25, 0.7], np.float32),
        "x": random_input("x", (2, 3, height, width)),
        "tokens": random_input("tokens", (2, length, 20)),
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


def case(name, arrays, layout="diffusers", scan_layers=True, **changes):
    config = CONFIG | changes
    module = flux_from_config(config).clone(scan_layers=scan_layers)
    blocks = [f"double {i}" for i in range(module.num_double)] + [f"single {i}" for i in range(module.num_single)]
    return Case(
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


PLAIN = case("plain", given(4, 6, 5))
GUIDANCE = case("guided", given(8, 4, 4, guidance=True), **GUIDED)
MASKED = case("masked", given(6, 4, 5, mask=MASK), scan_layers=False)
FILL = case("fill", given(4, 6, 3, guidance=True, local=3, hole=True), in_channels=280, out_channels=12, **GUIDED)
CONTROL = case("control", given(4, 2, 3, guidance=True, local=3), in_channels=24, out_channels=12, **GUIDED)
AUTHORS = case("bfl", given(4, 6, 5, guidance=True), "bfl", **GUIDED)
CASES = [PLAIN, GUIDANCE, MASKED, FILL, CONTROL, AUTHORS]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_record(case):
    check_record(case)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_peer(case):
    check_peer(case)
