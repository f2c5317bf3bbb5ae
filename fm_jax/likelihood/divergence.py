"""The divergence of a velocity function, `div v = trace(dv/dx)` per example, together with the velocity.

Each estimator is a value. `draw` draws its random probes once for a whole solve: with probes that stay the same the
right-hand side is a smooth function of time, without it an adaptive solver rejects nearly every step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Real

from fm_jax.checks import check_integer, check_key, check_member, check_shape, check_state, check_velocity
from fm_jax.shapes import time_of
from fm_jax.types import AnyArray, Array, Key, Like, PerExample, State, Time, VelocityFn

Distribution = Literal["rademacher", "gaussian"]
Probes: TypeAlias = Real[AnyArray, "probes batch *event"]


@runtime_checkable
class Divergence(Protocol):
    """A way to compute the divergence: draw probes for the shape of `x`, then use them at every (t, x)."""

    @property
    def stochastic(self) -> bool:
        """Whether the result depends on probes, that is on a key."""

    def draw(self, key: Key | None, x: Like, /) -> Any: ...

    def __call__(self, v: VelocityFn, probes: Any, t: Time, x: State, /) -> tuple[State, PerExample]: ...


@dataclass(frozen=True)
class Exact:
    """All d diagonal entries of the Jacobian, by d forward-mode products with basis vectors, `chunk` at a time.

    The examples of a batch share each basis vector, since `v` acts on each alone. Memory is that of one linearisation
    and `chunk` products, not d, also when differentiated in reverse. Draws nothing and ignores a key.

    Notebooks: (7.1).

    Args:
        chunk: products computed at once.

    Raises:
        ValueError: if `chunk` is less than 1.

    Example:
        >>> Exact()(lambda t, x: x**2, None, 0.0, jnp.array([[1.0, 2.0]]))
        (Array([[1., 4.]], dtype=float32), Array([6.], dtype=float32))
    """

    chunk: int = 16

    def __post_init__(self) -> None:
        check_integer("chunk", self.chunk)

    @property
    def stochastic(self) -> bool:
        return False

    def draw(self, key: Key | None, x: Like) -> None:
        """Nothing."""

    def __call__(self, v: VelocityFn, probes: None, t: Time, x: State) -> tuple[State, PerExample]:
        """`v(t, x)` and its divergence."""
        velocity, product = _linearize(v, t, x)
        dim = math.prod(x.shape[1:])

        def entry(i: Array) -> Array:
            basis = (jnp.arange(dim) == i).astype(x.dtype).reshape(1, *x.shape[1:])
            return product(jnp.broadcast_to(basis, x.shape)).reshape(x.shape[0], dim)[:, i]

        if self.chunk >= dim:
            entries = jax.vmap(entry)(jnp.arange(dim))
        else:
            # Without checkpointing, reverse mode would keep what each of the d products went through.
            entries = jax.lax.map(jax.checkpoint(entry), jnp.arange(dim), batch_size=self.chunk)
        return velocity, entries.sum(axis=0)


@dataclass(frozen=True)
class Hutchinson:
    """The mean of `e' J e` over probes e with unit covariance: unbiased, for the price of `num_probes` products.

    With S = (J + J') / 2, one probe has variance `2 (|S|_F^2 - sum_i S_ii^2)` if Rademacher, which has the least, and
    `2 |S|_F^2` if Gaussian.

    Notebooks: (7.7).

    Args:
        num_probes: how many, all at once in memory.
        distribution: "rademacher", signs +1 and -1, or "gaussian".

    Raises:
        ValueError: if `num_probes` is less than 1 or the distribution is unknown.

    References:
        Hutchinson 1990; for flows Grathwohl et al. 2018 (FFJORD, arXiv:1810.01367, sec. 3.1).
    """

    num_probes: int = 1
    distribution: Distribution = "rademacher"

    def __post_init__(self) -> None:
        check_integer("num_probes", self.num_probes)
        check_member("distribution", self.distribution, get_args(Distribution))

    @property
    def stochastic(self) -> bool:
        return True

    def draw(self, key: Key | None, x: Like) -> Probes:
        """The probes, all at once."""
        check_state(x, "x")
        draw = jax.random.rademacher if self.distribution == "rademacher" else jax.random.normal
        return draw(_checked_key(self, key), (self.num_probes, *x.shape), x.dtype)

    def __call__(self, v: VelocityFn, probes: Probes, t: Time, x: State) -> tuple[State, PerExample]:
        """`v(t, x)` and an estimate of its divergence."""
        velocity, product = _linearize(v, t, x)
        estimates = jax.vmap(lambda e: (e * product(e)).reshape(x.shape[0], math.prod(x.shape[1:])).sum(axis=1))(probes)
        return velocity, estimates.mean(axis=0)


@dataclass(frozen=True)
class HutchPlusPlus:
    """Hutch++: the trace exactly on a subspace that catches most of J, and by Hutchinson on the rest.

    With k = num_probes / 3, Q an orthonormal basis of J S for k random probes S, and k further probes g projected off
    Q: `trace(Q' J Q) + mean_g g' J g`. Unbiased, exact where J has rank k or less, and far less noisy than Hutchinson
    with as many products where the singular values of J decay. Each example has its own Q, from a QR decomposition.

    Args:
        num_probes: Jacobian products spent on a call: a third each on the sketch, the subspace and the rest.

    Raises:
        ValueError: if `num_probes` is not a positive multiple of 3.

    References:
        Meyer et al. 2021 (arXiv:2010.09649, algorithm 1).
    """

    num_probes: int = 6

    def __post_init__(self) -> None:
        check_integer("num_probes", self.num_probes, least=3)
        if self.num_probes % 3:
            raise ValueError(f"num_probes must be a positive multiple of 3, got {self.num_probes}.")

    @property
    def stochastic(self) -> bool:
        return True

    def draw(self, key: Key | None, x: Like) -> tuple[Probes, Probes]:
        """Gaussian probes for the sketch and Rademacher ones for the rest, a third of `num_probes` each.

        In few dimensions, Rademacher vectors are too often equal up to sign, which would waste one of the sketch.
        """
        check_state(x, "x")
        key_sketch, key_rest = jax.random.split(_checked_key(self, key))
        shape = (self.num_probes // 3, *x.shape)
        return jax.random.normal(key_sketch, shape, x.dtype), jax.random.rademacher(key_rest, shape, x.dtype)

    def __call__(self, v: VelocityFn, probes: tuple[Probes, Probes], t: Time, x: State) -> tuple[State, PerExample]:
        """`v(t, x)` and an estimate of its divergence."""
        sketch, rest = probes
        velocity, product = _linearize(v, t, x)

        def columns(vectors: Array) -> Array:
            return jnp.moveaxis(vectors.reshape(len(vectors), len(x), math.prod(x.shape[1:])), 0, 2)

        def products(matrix: Array) -> Array:
            """J times each column of [batch, d, n]."""
            vectors = jnp.moveaxis(matrix, 2, 0)
            return columns(jax.vmap(product)(vectors.reshape(len(vectors), *x.shape)))

        # Whatever Q is, the estimate is unbiased: nothing is lost by not differentiating through the decomposition,
        # whose derivative is infinite where J has a low rank.
        q, _ = jnp.linalg.qr(jax.lax.stop_gradient(products(columns(sketch))))
        rest = columns(rest)
        rest = rest - q @ (q.mT @ rest)
        on_subspace = jnp.einsum("bdk,bdk->b", q, products(q))
        return velocity, on_subspace + jnp.einsum("bdk,bdk->b", rest, products(rest)) / rest.shape[2]


def _linearize(v: VelocityFn, t: Time, x: State) -> tuple[State, Callable[[State], State]]:
    """`v(t, x)`, and the product of its Jacobian in x with a vector, from one evaluation."""
    check_velocity(v)
    check_state(x, "x")
    time_of(t, x)  # refuses what is no time

    def velocity_fn(x: State) -> State:
        velocity = v(t, x)
        check_shape("v(t, x)", velocity, x)
        return velocity

    velocity, product = jax.linearize(velocity_fn, x)
    return velocity, product


def _checked_key(divergence: Divergence, key: Key | None) -> Key:
    if key is None:
        raise ValueError(f"{divergence} draws random probes and needs a key, as from jax.random.key(0).")
    check_key(key)
    return key
