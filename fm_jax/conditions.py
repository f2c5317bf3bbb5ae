"""Conditions: pytrees of [batch, ...], such as a label, a vector, or tokens with their mask, and what stands for none.

"No condition" is a value of the condition itself, `null_cond`: a pytree like it, each leaf broadcast to that of `cond`.
It is a number, such as the number of a class that does not exist; an array of one example, [...]; or [batch, ...]. The
same value drops conditions in training and is the unconditional branch of classifier-free guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_key, check_number, check_setting, is_traced, shown
from fm_jax.shapes import expand_time
from fm_jax.types import Array, Cond, Key, Scalar

Drop: TypeAlias = Callable[[Key, Cond], Cond]
"""`drop(key, cond) -> cond`: takes conditions away from some examples, as `DropCondition` does."""


def drop_condition(key: Key, cond: Cond, null_cond: Cond, rate: Scalar | float) -> Cond:
    """Takes the condition from some examples, chosen independently of each other: what classifier-free guidance needs.

    An example loses its whole condition, all leaves at once, or nothing. So a network learns both v(t, x | cond) and,
    under `null_cond`, v(t, x).

    Args:
        key: typed key.
        cond: pytree of [batch, ...].
        null_cond: what stands for "no condition": a pytree like `cond`, each leaf broadcast to that of `cond`.
        rate: probability of losing the condition; 0 drops nothing and 1 everything.

    Returns:
        In the structure, shapes and dtypes of `cond`.

    Raises:
        ValueError: if `rate` is not in [0, 1], `cond` is `None` or its leaves have no batch axis in common, or
            `null_cond` has another structure, or a leaf that does not fit the shape or the dtype of that of `cond`.

    Example:
        >>> labels = jnp.arange(6)
        >>> drop_condition(jax.random.key(0), labels, -1, 0.5)
        Array([ 0,  1, -1, -1,  4, -1], dtype=int32)

    References:
        Ho & Salimans 2022 (arXiv:2207.12598), algorithm 1.
    """
    check_key(key)
    check_number("rate", rate, "[0, 1]")
    nulls = null_like(cond, null_cond)
    batch_size = jax.tree.leaves(nulls)[0].shape[0]
    dropped = jax.random.bernoulli(key, jnp.asarray(rate, float), (batch_size,))
    return jax.tree.map(lambda null, leaf: jnp.where(expand_time(dropped, null), null, leaf), nulls, cond)


@dataclass(frozen=True, eq=False)
class DropCondition:
    """`drop_condition` as a value, called as `drop(key, cond)`: the option `drop` of the losses.

    Equal, and hashed, by its values, those of the arrays in `null_cond` included.

    Attributes:
        rate: probability of losing the condition, in [0, 1]; 0.1 is usual.
        null_cond: what stands for "no condition", as in `drop_condition`.

    Raises:
        ValueError: if `rate` is not in [0, 1]; when called, as `drop_condition`.

    Example:
        >>> DropCondition(0.5, null_cond=10)(jax.random.key(0), jnp.arange(6))
        Array([ 0,  1, 10, 10,  4, 10], dtype=int32)
    """

    rate: float
    null_cond: Cond

    def __post_init__(self) -> None:
        check_setting(self, "rate", "[0, 1]")

    def __call__(self, key: Key, cond: Cond) -> Cond:
        """Takes the condition, a pytree of [batch, ...], from a share `rate` of the examples."""
        return drop_condition(key, cond, self.null_cond, self.rate)

    def _values(self) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten(self.null_cond)
        arrays = map(np.asarray, leaves)
        return self.rate, structure, tuple((each.shape, each.dtype, each.tobytes()) for each in arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DropCondition) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())


def null_like(cond: Cond, null_cond: Cond) -> Cond:
    """`null_cond` for every example: each leaf broadcast to the shape, and brought to the dtype, of that of `cond`.

    Args:
        cond: pytree of [batch, ...].
        null_cond: pytree of the same structure. A leaf is a number, [...] as one example's, or [batch, ...].

    Returns:
        In the structure, shapes and dtypes of `cond`.

    Raises:
        ValueError: if `cond` is `None` or its leaves have no batch axis in common; if `null_cond` has another
            structure, or a leaf that does not broadcast, or whose value the dtype of `cond` cannot hold.

    Example:
        >>> cond = {"tokens": jnp.array([[4, 2], [4, 9]]), "mask": jnp.array([[True, True], [True, False]])}
        >>> null_like(cond, {"tokens": 0, "mask": False})["mask"]
        Array([[False, False],
               [False, False]], dtype=bool)
    """
    given, structure = jax.tree_util.tree_flatten_with_path(cond)
    if not given:
        raise ValueError(f"cond must be a pytree of [batch, ...], got {cond}: there is no condition.")
    if jax.tree.structure(null_cond) != structure:
        raise ValueError(
            f"null_cond must have the structure of cond, {structure}, got {jax.tree.structure(null_cond)}."
        )
    names = ["cond" + jax.tree_util.keystr(path) for path, _ in given]
    for name, (_, leaf) in zip(names, given, strict=True):
        if _kind(np.asarray(leaf).dtype if not is_traced(leaf) else leaf.dtype) == len(_KINDS):
            raise ValueError(f"{name} must be numbers [batch, ...], got {shown(leaf)}.")
    leaves = [jnp.asarray(leaf) for _, leaf in given]
    shapes = {name: leaf.shape for name, leaf in zip(names, leaves, strict=True)}
    if len({shape[:1] for shape in shapes.values()} | {()}) != 2:
        raise ValueError(f"cond must be a pytree of [batch, ...] with one batch axis, got shapes {shapes}.")
    nulls = map(_broadcast, names, leaves, jax.tree.leaves(null_cond))
    return jax.tree.unflatten(structure, list(nulls))


def _broadcast(name: str, leaf: Array, null: Any) -> Array:
    try:
        fits = jnp.broadcast_shapes(np.shape(null), leaf.shape) == leaf.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"null_{name} must broadcast to {name}, [batch, ...] = {leaf.shape}, got shape {np.shape(null)}."
        )
    if not _holds(leaf.dtype, null):
        got = f"dtype {null.dtype.name}" if is_traced(null) else null
        raise ValueError(f"null_{name} must be a value of the dtype of {name}, {leaf.dtype.name}, got {got}.")
    return jnp.broadcast_to(jnp.asarray(null, dtype=leaf.dtype), leaf.shape)


_KINDS = (np.bool_, np.integer, np.floating, np.complexfloating)


def _kind(dtype: Any) -> int:
    return next((i for i, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind)), len(_KINDS))


def _holds(dtype: Any, null: Any) -> bool:
    """Whether `dtype` has the value `null`, but for rounding of real numbers; of a traced one, whether its kind."""
    if is_traced(null):
        return _kind(null.dtype) <= _kind(dtype)
    value, real = np.asarray(null), _kind(np.float32)
    if _kind(value.dtype) > max(_kind(dtype), real):  # no number, or a complex one for a real one
        return False
    with np.errstate(all="ignore"):
        cast = value.astype(dtype)
    same = cast == value if _kind(dtype) < real else np.isfinite(cast) == np.isfinite(value)
    return bool(same.all())
