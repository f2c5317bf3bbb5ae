"""From a module of Flax Linen to the function that the losses see, `fm_jax.types.ApplyFn`."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn

from fm_jax.types import ApplyFn, Array, Cond, Key, Params

Rngs = Mapping[str, Key] | None


def linen_apply(module: nn.Module) -> ApplyFn:
    """Makes the function that the losses see of a Flax Linen module.

    Args:
        module: called as `module(t, x, cond, train=train)`, with no state but its parameters.

    Returns:
        `apply_fn(params, t, x, cond, *, train, rngs)`. With `train=True`, a module that has dropout needs
        `rngs={"dropout": key}`; Flax raises without it.

    Raises:
        ValueError: if `module` is no Linen module.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fm_jax.models import MLP, init_params
        >>> model = MLP(features=(8,))
        >>> params = init_params(model, jax.random.key(0), (2,))
        >>> linen_apply(model)(params, jnp.zeros(3), jnp.ones((3, 2)), None, train=False, rngs=None).shape
        (3, 2)
    """
    _check_kind("module", module, nn.Module, "flax.linen.Module")

    def apply_fn(params: Params, t: Array, x: Array, cond: Cond, /, *, train: bool, rngs: Rngs) -> Array:
        out = module.apply({"params": params}, t, x, cond, train=train, rngs=None if rngs is None else dict(rngs))
        return cast(Array, out)

    return apply_fn


def _check_kind(name: str, module: Any, kind: type, title: str) -> None:
    if not isinstance(module, kind):
        of_class, cls = inspect.isclass(module), module if inspect.isclass(module) else type(module)
        got = f"{'the class' if of_class else 'a'} {cls.__module__}.{cls.__qualname__}"
        raise ValueError(f"{name} must be an instance of {title}, got {got}.")
