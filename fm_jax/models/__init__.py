"""Vector fields as Flax Linen modules, called `module(t, x, cond=None, *, train=False)`.

The losses and samplers see any network as a function (`fm_jax.types.ApplyFn`); `linen_apply`, `from_nnx` and
`from_equinox` make one of a module of these libraries.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from fm_jax.checks import check_integer, check_key, shown
from fm_jax.models.adapters import check_kind, from_equinox, from_nnx, linen_apply
from fm_jax.models.attention import apply_rope, attend, rope_angles
from fm_jax.models.autoencoder import Autoencoder, Moments, make_autoencoder, sample_moments
from fm_jax.models.branched import Branched
from fm_jax.models.branches import ChannelConcat, CrossBranch, ImagePrompt, LocalBranch, VectorBranch
from fm_jax.models.compute import Compute, once
from fm_jax.models.conditioning import Border, Conditions
from fm_jax.models.control import Controlled
from fm_jax.models.crossdit import CrossDiT, make_crossdit
from fm_jax.models.dit import DiT, make_dit
from fm_jax.models.embed import LabelEmbedding, TokenEmbedding, VectorEmbedding
from fm_jax.models.flux import Flux, fill_local, make_flux
from fm_jax.models.grafting import base_of, trainable, with_base
from fm_jax.models.icnn import ICNN, linen_potential
from fm_jax.models.lightning import LightningDiT, make_lightning
from fm_jax.models.mlp import MLP, PlainMLP
from fm_jax.models.mmdit import MMDiT, make_mmdit
from fm_jax.models.pixel_tokens import PixelTokens
from fm_jax.models.sequence_unet import SequenceUNet, make_sequence_unet
from fm_jax.models.song_unet import SongUNet, make_song_unet
from fm_jax.models.stack import stack_layers, unstack_layers
from fm_jax.models.temporal_autoencoder import (
    TemporalAutoencoder,
    inflate,
    make_temporal_autoencoder,
    outlier_penalty,
)
from fm_jax.models.tiny_autoencoder import TinyAutoencoder, make_tiny_autoencoder
from fm_jax.models.token_transformer import TokenTransformer, make_token_transformer
from fm_jax.models.unet import UNet, make_unet
from fm_jax.models.unet_condition import UNetCondition, make_unet_condition
from fm_jax.models.videodit import VideoDiT, make_videodit
from fm_jax.models.wan import Wan, make_wan
from fm_jax.models.wan_autoencoder import WanAutoencoder, make_wan_autoencoder
from fm_jax.types import Cond, Key, Params

__all__ = [
    "ICNN",
    "MLP",
    "Autoencoder",
    "Border",
    "Branched",
    "ChannelConcat",
    "Compute",
    "Conditions",
    "Controlled",
    "CrossBranch",
    "CrossDiT",
    "DiT",
    "Flux",
    "ImagePrompt",
    "LabelEmbedding",
    "LightningDiT",
    "LocalBranch",
    "MMDiT",
    "Moments",
    "PixelTokens",
    "PlainMLP",
    "SequenceUNet",
    "SongUNet",
    "TemporalAutoencoder",
    "TinyAutoencoder",
    "TokenEmbedding",
    "TokenTransformer",
    "UNet",
    "UNetCondition",
    "VectorBranch",
    "VectorEmbedding",
    "VideoDiT",
    "Wan",
    "WanAutoencoder",
    "apply_rope",
    "attend",
    "base_of",
    "fill_local",
    "forward_flops",
    "from_equinox",
    "from_nnx",
    "inflate",
    "init_params",
    "linen_apply",
    "linen_potential",
    "make_autoencoder",
    "make_crossdit",
    "make_dit",
    "make_flux",
    "make_lightning",
    "make_mmdit",
    "make_sequence_unet",
    "make_song_unet",
    "make_temporal_autoencoder",
    "make_tiny_autoencoder",
    "make_token_transformer",
    "make_unet",
    "make_unet_condition",
    "make_videodit",
    "make_wan",
    "make_wan_autoencoder",
    "num_params",
    "outlier_penalty",
    "rope_angles",
    "sample_moments",
    "stack_layers",
    "trainable",
    "unstack_layers",
    "with_base",
]


def init_params(module: nn.Module, key: Key, event_shape: tuple[int, ...], cond: Cond = None) -> Params:
    """Draws the initial parameters of a module, those of its `embed` included.

    Args:
        module: called as `module(t, x)`, or `module(t, x, cond)` where it needs a condition.
        key: PRNG key.
        event_shape: shape of one example, without the batch.
        cond: a condition of one example, [1, ...], for a network that cannot be without: `Conditions(tokens=...)`.

    Returns:
        The parameters, float32.

    Example:
        >>> params = init_params(make_dit("tiny", embed=LabelEmbedding(10)), jax.random.key(0), (8, 8, 1))
        >>> params["embed"]["table"].shape
        (11, 128)
    """
    check_kind("module", module, nn.Module, "flax.linen.Module")
    check_key(key)
    _check_event_shape(event_shape)

    def init(key: Key) -> Params:
        x = jnp.zeros((1, *event_shape), _state_dtype(module))
        return module.init(key, jnp.zeros(1), x, *_given(cond))["params"]

    return once(init)(key)


def num_params(params: Params) -> int:
    """Counts the parameters; shapes suffice, as `jax.eval_shape` gives them.

    Example:
        >>> num_params({"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)})
        8
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def forward_flops(module: nn.Module, event_shape: tuple[int, ...], cond: Cond = None) -> float:
    """Counts the floating-point operations of one evaluation on one example, as XLA counts them before optimising.

    A multiplication and the addition that follows are two, and what is in a `jax.lax.scan` counts as often as it runs;
    in a loop of unknown length, once. Nothing is computed and nothing compiled.

    Args:
        module: called as `module(t, x)`, or `module(t, x, cond)` where it needs a condition.
        event_shape: shape of one example, without the batch.
        cond: a condition of one example, [1, ...]; shapes suffice, as `jax.eval_shape` gives them.
    """
    check_kind("module", module, nn.Module, "flax.linen.Module")
    _check_event_shape(event_shape)
    t, x = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, *event_shape), _state_dtype(module))
    variables = jax.eval_shape(module.init, jax.random.key(0), t, x, *_given(cond))
    given = (variables, t, x, *_given(cond))
    program = _unrolled(jax.make_jaxpr(module.apply)(*given))
    return jax.jit(jaxpr_as_fun(program)).lower(*jax.tree.leaves(given)).cost_analysis()["flops"]


def _state_dtype(module: nn.Module) -> Any:
    """What a state of the module is made of: integers where it says that it takes `tokens`."""
    return jnp.int32 if getattr(module, "tokens", False) else jnp.float32


def _given(cond: Cond) -> tuple[Cond, ...]:
    """The condition as the last argument of a call, if there is one."""
    return () if cond is None else (cond,)


def _unrolled(value: Any) -> Any:
    """A program, or what a parameter of its equations holds, with every `scan` written out: XLA counts a body once."""
    if type(value) is tuple:
        return tuple(map(_unrolled, value))
    if isinstance(value, ClosedJaxpr) and value.jaxpr is not value:  # from jax 0.11 on the two are one
        return value.replace(jaxpr=_unrolled(value.jaxpr))
    kinds: Any = (Jaxpr, ClosedJaxpr)
    if not isinstance(value, kinds):
        return value
    eqns = []
    for eqn in value.eqns:
        params = {name: _unrolled(each) for name, each in eqn.params.items()}
        eqns.append(eqn.replace(params=params | ({"unroll": params["length"]} if eqn.primitive.name == "scan" else {})))
    return value.replace(eqns=eqns)


def _check_event_shape(event_shape: tuple[int, ...]) -> None:
    if not isinstance(event_shape, tuple | list):
        raise ValueError(f"event_shape must be a tuple, such as (28, 28, 1), got {shown(event_shape)}.")
    for i, size in enumerate(event_shape):
        check_integer(f"event_shape[{i}]", size)
