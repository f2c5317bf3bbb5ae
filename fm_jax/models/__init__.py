"""Vector fields as Flax Linen modules, called `module(t, x, cond=None, *, train=False)`.

The losses and samplers see any network as a function (`fm_jax.types.ApplyFn`); `linen_apply` makes one of a module.
"""

import math
from collections.abc import Mapping
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.models.dit import DiT, make_dit
from fm_jax.models.icnn import ICNN, linen_potential
from fm_jax.models.mlp import MLP, PlainMLP
from fm_jax.models.unet import UNet, make_unet
from fm_jax.types import ApplyFn, Array, Cond, Key, Params

__all__ = [
    "ICNN",
    "MLP",
    "DiT",
    "PlainMLP",
    "UNet",
    "forward_flops",
    "init_params",
    "linen_apply",
    "linen_potential",
    "make_dit",
    "make_unet",
    "num_params",
]


def linen_apply(module: nn.Module) -> ApplyFn:
    """Makes the function that the losses see of a Linen module.

    Args:
        module: called as `module(t, x, cond, train=train)`, with no state but its parameters.

    Returns:
        `apply_fn(params, t, x, cond, *, train, rngs)`. With `train=True`, a module that has dropout or label dropout
        needs `rngs={"dropout": key}`; Flax raises without it.

    Example:
        >>> model = MLP(features=(8,))
        >>> params = init_params(model, jax.random.key(0), (2,))
        >>> linen_apply(model)(params, jnp.zeros(3), jnp.ones((3, 2)), None, train=False, rngs=None).shape
        (3, 2)
    """

    def apply_fn(
        params: Params, t: Array, x: Array, cond: Cond, /, *, train: bool, rngs: Mapping[str, Key] | None
    ) -> Array:
        out = module.apply({"params": params}, t, x, cond, train=train, rngs=None if rngs is None else dict(rngs))
        return cast(Array, out)

    return apply_fn


def init_params(module: nn.Module, key: Key, event_shape: tuple[int, ...]) -> Params:
    """Draws the initial parameters of a module, the label embedding included.

    Args:
        module: called as `module(t, x)`.
        key: PRNG key.
        event_shape: shape of one example, without the batch.

    Returns:
        The parameters, float32.

    Example:
        >>> params = init_params(make_dit("tiny", num_classes=10), jax.random.key(0), (8, 8, 1))
        >>> params["embed"]["labels"]["table"].shape
        (11, 128)
    """

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros(1), jnp.zeros((1, *event_shape)))["params"]

    # Random initialisers are slow to compile, and run once: 11 s become 3 s for a small U-Net on a CPU.
    on_cpu = jax.default_backend() == "cpu" and not isinstance(key, jax.core.Tracer)
    return jax.jit(init, compiler_options={"xla_backend_optimization_level": 0} if on_cpu else None)(key)


def num_params(params: Params) -> int:
    """Counts the parameters; shapes suffice, as `jax.eval_shape` gives them.

    Example:
        >>> num_params({"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)})
        8
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def forward_flops(module: nn.Module, event_shape: tuple[int, ...]) -> float:
    """Counts the floating-point operations of one evaluation on one example, as XLA counts them before optimising.

    A multiplication and the addition that follows are two. Nothing is computed and nothing compiled.

    Args:
        module: called as `module(t, x)`.
        event_shape: shape of one example, without the batch.
    """
    t, x = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, *event_shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), t, x)
    return jax.jit(module.apply).lower(variables, t, x).cost_analysis()["flops"]
