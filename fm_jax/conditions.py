"""Conditions: pytrees of [batch, ...], such as a label, a vector, or tokens with their mask, and what stands for none.

"No condition" is a value of the condition itself, `null_cond`: a pytree like it, each leaf broadcast to that of `cond`.
It is a number, such as the number of a class that does not exist; an array of one example, [...]; or [batch, ...]. The
same value drops conditions in training and is the unconditional branch of classifier-free guidance.

Parts of it are called by their names, and several that come and go together by a tuple of names (`fm_jax.parts`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_key, check_number, check_setting, is_traced, shown
from fm_jax.parts import Group, group_of, names_of, places_of, rates_of
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


class _ByValue:
    """Equal, and hashed, by `_values()`."""

    _values: Callable[[], tuple[Any, ...]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())


@dataclass(frozen=True, eq=False)
class DropCondition(_ByValue):
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
        return self.rate, *_known(self.null_cond)


def drop_conditions(key: Key, cond: Cond, null_cond: Cond, rates: Mapping[Group, Scalar | float]) -> Cond:
    """Takes parts of the condition from some examples, each group of parts independently of the others.

    So a network learns the velocity under every subset of the groups, as guidance by several of them needs
    (`fm_jax.guidance.nested`). What no group names is never dropped.

    Args:
        key: typed key.
        cond: pytree of [batch, ...] whose parts have names: a NamedTuple such as `Conditions`, or a dict.
        null_cond: what stands for "no condition": a pytree like `cond`, each leaf broadcast to that of `cond`.
        rates: probability of losing each group, `{"label": 0.1, ("tokens", "mask"): 0.2}`; their order is immaterial.

    Returns:
        In the structure, shapes and dtypes of `cond`.

    Raises:
        ValueError: if a rate is not in [0, 1], a name is not that of a part that is there, or one part has two rates;
            and as `drop_condition`.

    Example:
        >>> cond, null_cond = {"label": jnp.arange(6), "size": jnp.ones(6)}, {"label": -1, "size": 0.0}
        >>> drop_conditions(jax.random.key(0), cond, null_cond, {"label": 0.5, "size": 0.5})["label"]
        Array([ 0, -1, -1, -1, -1,  5], dtype=int32)

    References:
        Brooks et al. 2023, "InstructPix2Pix: Learning to Follow Image Editing Instructions", section 3.2.1.
    """
    check_key(key)
    groups = rates_of(rates)
    nulls, structure = jax.tree.flatten(null_like(cond, null_cond))
    leaves = jax.tree.leaves(cond)
    places = [places_of(cond, group, "rates") for group, _ in groups]
    for i, name in enumerate(names_of(cond)):
        if sum(i in at for at in places) > 1:
            raise ValueError(f"rates must have one rate for each part of cond, got two for {name!r}.")
    for each, (_, rate), at in zip(jax.random.split(key, len(groups)), groups, places, strict=True):
        dropped = jax.random.bernoulli(each, jnp.asarray(rate, float), nulls[0].shape[:1])
        for i in at:
            leaves[i] = jnp.where(expand_time(dropped, nulls[i]), nulls[i], leaves[i])
    return jax.tree.unflatten(structure, map(jnp.asarray, leaves))


@dataclass(frozen=True, eq=False)
class DropConditions(_ByValue):
    """`drop_conditions` as a value, called as `drop(key, cond)`: the option `drop` of the losses.

    Equal, and hashed, by its values, those of the arrays in `null_cond` included.

    Attributes:
        rates: probability of losing each group of parts, in [0, 1], by its name or names.
        null_cond: what stands for "no condition", as in `drop_conditions`: of all parts, dropped or not.

    Raises:
        ValueError: if `rates` is no such mapping; when called, as `drop_conditions`.

    Example:
        >>> drop = DropConditions({"label": 0.1, ("tokens", "mask"): 0.1}, {"label": 10, "tokens": 0, "mask": False})
        >>> cond = {"label": jnp.arange(2), "tokens": jnp.ones((2, 3, 8)), "mask": jnp.ones((2, 3), bool)}
        >>> drop(jax.random.key(0), cond)["label"]
        Array([0, 1], dtype=int32)
    """

    rates: Mapping[Group, float]
    null_cond: Cond

    def __post_init__(self) -> None:
        known = {group: rate if is_traced(rate) else float(rate) for group, rate in rates_of(self.rates)}
        object.__setattr__(self, "rates", known)

    def __call__(self, key: Key, cond: Cond) -> Cond:
        """Takes the groups of parts of the condition, a pytree of [batch, ...], from their shares of the examples."""
        return drop_conditions(key, cond, self.null_cond, self.rates)

    def _values(self) -> tuple[Any, ...]:
        return tuple(self.rates.items()), *_known(self.null_cond)


def without(cond: Cond, null_cond: Cond, group: Group) -> Cond:
    """The condition with "no condition" in place of some of its parts, for every example.

    Args:
        cond: pytree of [batch, ...] whose parts have names.
        null_cond: what stands for "no condition", as in `drop_conditions`.
        group: the name, or the names, of what to leave out.

    Returns:
        In the structure, shapes and dtypes of `cond`.

    Raises:
        ValueError: if a name is not that of a part that is there; as `null_like`.

    Example:
        >>> without({"label": jnp.arange(2), "size": jnp.ones(2)}, {"label": -1, "size": 0.0}, "size")["size"]
        Array([0., 0.], dtype=float32)
    """
    nulls, structure = jax.tree.flatten(null_like(cond, null_cond))
    at = places_of(cond, group_of("group", group), "group")
    parts = enumerate(zip(nulls, jax.tree.leaves(cond), strict=True))
    return jax.tree.unflatten(structure, [null if i in at else jnp.asarray(leaf) for i, (null, leaf) in parts])


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


def _known(null_cond: Cond) -> tuple[Any, ...]:
    """A null condition as what can be compared and hashed."""
    leaves, structure = jax.tree.flatten(null_cond)
    return structure, tuple((each.shape, each.dtype, each.tobytes()) for each in map(np.asarray, leaves))


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
