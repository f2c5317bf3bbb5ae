"""Products of manifolds: a point is one array, the points of the parts one after the other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_key, shown
from fm_jax.manifolds.euclidean import Euclidean
from fm_jax.manifolds.fields import check_manifold
from fm_jax.manifolds.points import check_shape_of, norm, refuse_uniform
from fm_jax.manifolds.rotations import SO3
from fm_jax.types import AnyArray, Array, Key, Like, Manifold


@dataclass(frozen=True)
class Product:
    """M_1 x M_2 x ...: geodesics go on in each part by themselves, and squared distances add.

    A point [total] is the points of the parts, flattened and put together: `split` takes it apart, `join` makes it. The
    same manifold several times over needs no product: leading axes are points of one example.

    Attributes:
        parts: the manifolds.

    Raises:
        ValueError: for what is not a tuple of manifolds.

    Example:
        >>> from fm_jax.manifolds import Sphere
        >>> manifold = Product((Sphere(1), Euclidean(1)))
        >>> x, y = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> manifold.log(x, y).round(1)
        Array([0. , 1.6, 2. ], dtype=float32)
        >>> manifold.split(y)
        (Array([0., 1.], dtype=float32), Array([2.], dtype=float32))
    """

    parts: tuple[Manifold, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts:
            raise ValueError(
                f"parts must be a tuple of manifolds, such as (SO3(), Euclidean(3)), got {shown(self.parts)}."
            )
        for part in self.parts:
            check_manifold(part)

    @property
    def dim(self) -> int:
        return sum(part.dim for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(math.prod(part.shape) for part in self.parts),)

    @property
    def log_total(self) -> float | None:
        totals = [part.log_total for part in self.parts]
        known = [total for total in totals if total is not None]
        return math.fsum(known) if len(known) == len(totals) else None

    def split(self, x: AnyArray) -> tuple[AnyArray, ...]:
        """[..., total] -> a [..., *shape] for each part.

        Args:
            x: points or tangent vectors.
        """
        ends = np.cumsum([math.prod(part.shape) for part in self.parts])[:-1].tolist()
        pieces = jnp.split(x, ends, axis=-1)
        return tuple(piece.reshape(*x.shape[:-1], *part.shape) for piece, part in zip(pieces, self.parts))

    def join(self, points: Sequence[AnyArray]) -> AnyArray:
        """A [..., *shape] for each part -> [..., total].

        Args:
            points: of each part, or tangent vectors, with the same leading axes.

        Raises:
            ValueError: for another number of them, and for what is of another shape.
        """
        if len(points) != len(self.parts):
            raise ValueError(f"points must be one array for each of the {len(self.parts)} parts, got {len(points)}.")
        flat = []
        for i, (each, part) in enumerate(zip(points, self.parts)):
            check_shape_of(f"points[{i}]", each, part)
            flat.append(each.reshape(*each.shape[: each.ndim - len(part.shape)], math.prod(part.shape)))
        if len({each.shape[:-1] for each in flat}) > 1:
            raise ValueError(f"points must have the same leading axes, got shapes {[each.shape for each in points]}.")
        return jnp.concatenate(flat, axis=-1)

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """Of each part."""
        return self.join(self._each("exp", x, u))

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """Of each part."""
        return self.join(self._each("log", x, y))

    def several_ways(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """Whether there are in a part."""
        found = jnp.zeros(x.shape[:-1], bool)
        for part, a, b in zip(self.parts, self.split(x), self.split(y), strict=True):
            found = found | part.several_ways(a, b) if hasattr(part, "several_ways") else found
        return found

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """The root of the sum of squares."""
        return norm(jnp.stack(self._each("distance", x, y), axis=-1))[..., 0]

    def project(self, x: AnyArray) -> AnyArray:
        """Of each part."""
        return self.join(self._each("project", x))

    def tangent(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """Of each part."""
        return self.join(self._each("tangent", x, u))

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """Of each part."""
        return self.join(self._each("gradient", x, g))

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """The sum."""
        return jnp.stack(self._each("squared_norm", x, u), axis=-1).sum(axis=-1)

    def log_volume(self, x: AnyArray) -> AnyArray:
        """The sum."""
        return jnp.stack(self._each("log_volume", x), axis=-1).sum(axis=-1)

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """The sum."""
        return jnp.stack(self._each("log_jacobian", x, u), axis=-1).sum(axis=-1)

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """Independent of each part."""
        check_key(key)
        keys = jax.random.split(key, len(self.parts))
        return self.join([part.normal(k, each) for k, part, each in zip(keys, self.parts, self.split(x))])

    def uniform(self, key: Key, like: Like) -> AnyArray:
        """Independent of each part; raises `ValueError` where the volume of one is infinite."""
        if self.log_total is None:
            return refuse_uniform(self)
        check_key(key)
        check_shape_of("like", like, self)
        keys = jax.random.split(key, len(self.parts))
        likes = [jax.ShapeDtypeStruct((*like.shape[:-1], *part.shape), like.dtype) for part in self.parts]
        return self.join([part.uniform(k, each) for k, part, each in zip(keys, self.parts, likes)])

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it."""
        check_shape_of(name, x, self)
        for i, (part, each) in enumerate(zip(self.parts, self.split(x))):
            part.check(f"part {i} of {name}", each)

    def _each(self, method: str, *points: AnyArray) -> list[Array]:
        """What the method of each part says of its part of the points."""
        split = zip(*(self.split(each) for each in points))
        methods: list[Callable[..., Array]] = [getattr(part, method) for part in self.parts]
        return [of(*each) for of, each in zip(methods, split)]


def SE3() -> Product:
    """SE(3), the rigid motions, as `Product((SO3(), Euclidean(3)))`: rotations and translations by themselves.

    The metric is the sum of both, not one that the group leaves as it is, as usual for frames of proteins (Yim et al.,
    "Fast protein backbone generation with SE(3) flow matching", 2023).

    Example:
        >>> SE3().split(jnp.zeros(12))[0].shape
        (3, 3)
    """
    return Product((SO3(), Euclidean(3)))
