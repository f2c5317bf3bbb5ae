"""Rules of `fm_jax.models.sequence_unet.SequenceUNet`: the layout of Diffusion Policy's ConditionalUnet1D."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.models.sequence_unet import SequenceUNet
from fm_jax.weights.rules import Piece, Rules, conv, dense, norm, template_of


def sequence_unet_rules(module: SequenceUNet) -> Rules:
    """Rules of a `SequenceUNet` in its authors' layout, the only one.

    Args:
        module: with `in_channels`, and `"transposed"` convolutions on the way up. The published local condition is
            that of `local_up=False`: the parameters of its way up, which take no part in what the published network
            computes, are left out.

    Raises:
        ValueError: for a network that the published class is not.
    """
    if module.in_channels is None:
        raise ValueError("The rules of a SequenceUNet need its in_channels: module.clone(in_channels=2).")
    if module.resample != "transposed":
        raise ValueError(f"resample must be 'transposed', as the published class has it, got {module.resample!r}.")
    if module.embed is not None:
        raise ValueError(f"embed must be None, as the published class has none, got {module.embed}.")
    if module.local_dim == module.channels[0]:
        raise ValueError(
            f"local_dim must not be channels[0] = {module.local_dim}: the published class has no 1x1 then."
        )
    x = jax.ShapeDtypeStruct((1, 2 ** (len(module.channels) - 1), module.in_channels), jnp.float32)
    template = template_of(module, jax.ShapeDtypeStruct((1,), jnp.float32), x)
    ignored = () if module.local_up else (r"local_cond_encoder\.1\..*",)
    return Rules(template, tuple(_pieces(module, template)), ignored=ignored)


def blocks_of(module: SequenceUNet) -> Iterator[tuple[str, str]]:
    """The residual blocks of a network in the order of the computation: their names here and their keys."""
    last = len(module.channels) - 1
    for level in range(last + 1):
        yield f"down_{level}_0", f"down_modules.{level}.0"
        if level == 0 and module.local_dim is not None:
            yield "local_down", "local_cond_encoder.0"
        yield f"down_{level}_1", f"down_modules.{level}.1"
    for i in range(2):
        yield f"middle_{i}", f"mid_modules.{i}"
    for level in range(last, 0, -1):
        for i in range(2):
            yield f"up_{level}_{i}", f"up_modules.{last - level}.{i}"
    if module.local_dim is not None and module.local_up:
        yield "local_up", "local_cond_encoder.1"


def _pieces(module: SequenceUNet, template: Any) -> Iterator[Piece]:
    last = len(module.channels) - 1
    yield from dense("time_in", "diffusion_step_encoder.1")
    yield from dense("time_out", "diffusion_step_encoder.3")
    for path, key in blocks_of(module):
        for i, place in enumerate(("in", "out")):
            yield from conv(f"{path}/conv_{place}", f"{key}.blocks.{i}.block.0", axes="l")
            yield from norm(f"{path}/norm_{place}", f"{key}.blocks.{i}.block.1")
        yield from dense(f"{path}/embed", f"{key}.cond_encoder.1")
        if "skip" in template[path]:
            yield from conv(f"{path}/skip", f"{key}.residual_conv", axes="l")
    for level in range(last):
        yield from conv(f"down_{level}_resample", f"down_modules.{level}.2.conv", axes="l")
        path, key = f"up_{level + 1}_resample", f"up_modules.{last - level - 1}.2.conv"
        yield Piece(f"{path}/kernel", f"{key}.weight", "i o l -> l o i")
        yield Piece(f"{path}/bias", f"{key}.bias", "o -> o")
    yield from conv("last", "final_conv.0.block.0", axes="l")
    yield from norm("norm", "final_conv.0.block.1")
    yield from conv("out", "final_conv.1", axes="l")
