"""From a module of Flax Linen, Flax NNX or Equinox to the function that the losses see, `fm_jax.types.ApplyFn`."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax

from fm_jax.types import ApplyFn, Array, Cond, Key, Params

Rngs = Mapping[str, Key] | None


def linen_apply(module: nn.Module) -> ApplyFn:
    """Makes the function that the losses see of a Flax Linen module.

    Args:
        module: called as `module(t, x, cond, train=train)`, with no state but its parameters.

    Returns:
        `apply_fn(params, t, x, cond, *, train, rngs)`. With `train=True`, a module that has dropout needs
        `rngs={"dropout": key}`; Flax raises without it. More keywords are handed on to a module that takes
        them, as `estimate=` to one that is self-conditioned.

    Raises:
        ValueError: if `module` is no Linen module.

    Example:
        >>> import jax.numpy as jnp
        >>> from fm_jax.models import MLP, init_params
        >>> model = MLP(features=(8,))
        >>> params = init_params(model, jax.random.key(0), (2,))
        >>> linen_apply(model)(params, jnp.zeros(3), jnp.ones((3, 2)), None, train=False, rngs=None).shape
        (3, 2)
    """
    check_kind("module", module, nn.Module, "flax.linen.Module")

    def apply_fn(params: Params, t: Array, x: Array, cond: Cond, /, *, train: bool, rngs: Rngs, **more: Any) -> Array:
        keys = None if rngs is None else dict(rngs)
        out = module.apply({"params": params}, t, x, cond, train=train, rngs=keys, **more)
        return cast(Array, out)

    apply_fn.module = module  # type: ignore[attr-defined]  # which some losses ask for its mask
    return apply_fn


def from_nnx(model: Any) -> tuple[Params, ApplyFn]:
    """Parameters of a Flax NNX module, and the function that the losses see.

    The parameters are the module's `nnx.Param`s. They no longer change with it: an optimiser updates them, and
    `nnx.update(model, params)` puts them back. All other state is constant, as it was when this was called, but for the
    random streams: in training each of the names among them (`dropout`, `default`, ...) starts from a key of its own,
    made of that of the step, so that a draw is never repeated and `apply_fn` is pure.

    Args:
        model: an `nnx.Module`, called as `model(t, x, cond)` on a batch, `t` [batch], `x` [batch, ...]. Dropout is on
            in training alone, as by `model.train()` and `model.eval()`.

    Returns:
        `params`, an `nnx.State`, and `apply_fn(params, t, x, cond, *, train, rngs)`. With `train=True`, a module with
        random streams needs `rngs={"dropout": key}`.

    Raises:
        ImportError: if Flax is older than NNX.
        ValueError: if `model` is no instance of `nnx.Module`, cannot be called with three arguments, or has running
            statistics, as of batch normalisation, which nothing would update; when called, without the key that it
            needs.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> class Field(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.out = nnx.Linear(3, 2, rngs=rngs)
        ...     def __call__(self, t, x, cond=None):
        ...         return self.out(jnp.concatenate([x, t[:, None]], axis=1))
        >>> params, apply_fn = from_nnx(Field(nnx.Rngs(0)))
        >>> apply_fn(params, jnp.zeros(3), jnp.ones((3, 2)), None, train=False, rngs=None).shape
        (3, 2)
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("from_nnx needs Flax with NNX: pip install -U flax.") from error

    check_kind("model", model, nnx.Module, "nnx.Module")
    _check_call(model, "a batch")
    # Unflattened anew, as nnx.split hands out the module's own variables, which change when the module does.
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, rest = (jax.tree.map(lambda leaf: leaf, state) for state in states)
    variables = [(path, variable) for path, variable in nnx.to_flat_state(rest)]
    if statistics := [path for path, variable in variables if isinstance(variable, nnx.BatchStat)]:
        raise ValueError(
            f"model must have no running statistics, got nnx.BatchStat at {'.'.join(map(str, statistics[0]))}: nothing "
            "would update them. Normalise each example by itself, as nnx.GroupNorm and nnx.LayerNorm do."
        )
    streams = sorted({variable.tag for _, variable in variables if isinstance(variable, nnx.RngKey)})

    def apply_fn(params: Params, t: Array, x: Array, cond: Cond, /, *, train: bool, rngs: Rngs) -> Array:
        module = nnx.merge(graph, params, rest, copy=True)
        if not train:
            module.eval()
            return module(t, x, cond)
        module.train()
        if streams:
            keys = jax.random.split(_dropout_key(rngs), len(streams))
            # Layers under nnx.vmap hold a key each.
            nnx.reseed(module, policy="match_shape", **dict(zip(streams, keys, strict=True)))
        return module(t, x, cond)

    return params, apply_fn


def from_equinox(model: Any) -> tuple[Params, ApplyFn]:
    """Parameters of an Equinox module, and the function that the losses see.

    The parameters are the module's floating-point arrays, as for `eqx.filter_grad`: an array that is no parameter hides
    behind `jax.lax.stop_gradient`. `eqx.combine(params, model)` puts them back. All else is constant.

    Args:
        model: an `equinox.Module` for one example, as is Equinox's habit: called as `model(t, x, cond)`, `t` a scalar,
            `x` [...], `cond` the leaves' [...] or `None`, and mapped over the batch. If it has a parameter `key`, it
            gets a key of its own for each example in training, and `None` otherwise. Dropout is on in training alone,
            as by `eqx.nn.inference_mode`.

    Returns:
        `params`, a pytree, and `apply_fn(params, t, x, cond, *, train, rngs)`. With `train=True`, a module that takes a
        `key` needs `rngs={"dropout": key}`.

    Raises:
        ImportError: if Equinox is missing.
        ValueError: if `model` is no instance of `equinox.Module`, cannot be called with three arguments, or has state,
            as of batch normalisation, which nothing would update; when called, without the key that it needs.

    Example:
        >>> import equinox as eqx
        >>> import jax.numpy as jnp
        >>> class Field(eqx.Module):
        ...     out: eqx.nn.Linear
        ...     def __call__(self, t, x, cond=None):
        ...         return self.out(jnp.append(x, t))
        >>> params, apply_fn = from_equinox(Field(eqx.nn.Linear(3, 2, key=jax.random.key(0))))
        >>> apply_fn(params, jnp.zeros(3), jnp.ones((3, 2)), None, train=False, rngs=None).shape
        (3, 2)
    """
    try:
        import equinox as eqx
    except ImportError as error:
        raise ImportError("from_equinox needs Equinox: pip install equinox.") from error

    check_kind("model", model, eqx.Module, "equinox.Module")
    takes_key = _check_call(model, "one example")
    is_index = lambda node: isinstance(node, eqx.nn.StateIndex)  # noqa: E731
    if any(map(is_index, jax.tree.leaves(model, is_leaf=is_index))):
        raise ValueError(
            "model must have no state, got an equinox.nn.StateIndex, as of BatchNorm: nothing would update it. "
            "Normalise each example by itself, as eqx.nn.GroupNorm and eqx.nn.LayerNorm do."
        )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply_fn(params: Params, t: Array, x: Array, cond: Cond, /, *, train: bool, rngs: Rngs) -> Array:
        module = eqx.nn.inference_mode(eqx.combine(params, static), value=not train)
        if not takes_key:
            return jax.vmap(module)(t, x, cond)
        keys = jax.random.split(_dropout_key(rngs), len(x)) if train else None
        return jax.vmap(lambda t, x, cond, key: module(t, x, cond, key=key))(t, x, cond, keys)

    return params, apply_fn


def check_kind(name: str, module: Any, kind: type, title: str) -> None:
    """Raises `ValueError` unless `module` is an instance of a class of modules."""
    if not isinstance(module, kind):
        of_class, cls = inspect.isclass(module), module if inspect.isclass(module) else type(module)
        got = f"{'the class' if of_class else 'a'} {cls.__module__}.{cls.__qualname__}"
        raise ValueError(f"{name} must be an instance of {title}, got {got}.")


def _check_call(model: Any, of: str) -> bool:
    """Raises `ValueError` unless `model(t, x, cond)` is a call that it takes; whether it also takes a `key`."""
    signature = inspect.signature(model)
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise ValueError(f"model must be called as model(t, x, cond) on {of}, got the signature {signature}.") from None
    return "key" in signature.parameters


def _dropout_key(rngs: Rngs) -> Key:
    if rngs is None:
        raise ValueError("train=True needs rngs={'dropout': key} where the model is random, got rngs=None.")
    return rngs["dropout"]
