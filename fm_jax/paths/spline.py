"""Paths through several snapshots in time: splines through K points, of which the straight line is the case K = 2."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real

from fm_jax.checks import as_number, check_data, check_key, check_member, check_setting, shown
from fm_jax.shapes import batch_time
from fm_jax.types import AnyArray, Array, ArrayTree, Key, PathSample, Scalar, Time

SplineKind: TypeAlias = Literal["natural", "linear"]


@dataclass(frozen=True)
class SplinePath:
    """The path `x_t = sum_k w_k(t) x_k + sigma z` through snapshots x_k at knots t_k; `u_t = sum_k w_k'(t) x_k`.

    "natural" is the natural cubic spline: of all curves through the points the one of least `int |x''|^2 dt`. "linear"
    joins them by straight lines, with a jump of u_t at the knots (there, u_t is that of the line to the right).

    Attributes:
        times: the knots, kept as a tuple: 0 = t_0 < ... < t_{K-1} = 1.
        kind: "natural" or "linear".
        sigma: amplitude of the latent noise z, constant in time; 0 for none.

    Raises:
        ValueError: if the knots do not increase from 0 to 1, `kind` is unknown, or `sigma` is negative.

    Example:
        >>> path = SplinePath((0.0, 0.5, 1.0), kind="linear")
        >>> x = jnp.array([[[0.0], [2.0], [1.0]]])  # one trajectory, three snapshots
        >>> sample = path.sample(None, jnp.array([0.75]), x)
        >>> sample.x_t, sample.u_t
        (Array([[1.5]], dtype=float32), Array([[-2.]], dtype=float32))

    References:
        Tong et al. 2020 (arXiv:2002.04461) for the problem; Tong et al. 2023 (arXiv:2302.00482) for flow matching.
    """

    times: ArrayTree
    kind: SplineKind = "natural"
    sigma: float = 0.0
    source: ClassVar[None] = None
    schedule: ClassVar[None] = None
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)
    kinds: ClassVar[tuple[str, ...]] = ("velocity",)

    def __post_init__(self) -> None:
        times = tuple(map(as_number, self.times)) if np.ndim(self.times) == 1 else ()
        increasing = all(a < b for a, b in pairwise(times))
        if len(times) < 2 or times[0] != 0 or times[-1] != 1 or not increasing:
            raise ValueError(f"times must increase from 0 to 1, got {shown(self.times)}.")
        object.__setattr__(self, "times", times)  # a list or an array would not be hashable
        check_member("kind", self.kind, get_args(SplineKind))
        check_setting(self, "sigma", "[0, inf)")

    def weights(self, t: Scalar) -> Real[AnyArray, " knots"]:
        """The weights w_k(t) of the snapshots.

        On the interval i, of length h, with `b = (t - t_i) / h` and `a = 1 - b`,

            x_t = a x_i + b x_{i+1} + h^2 / 6 ((a^3 - a) x_i'' + (b^3 - b) x_{i+1}''),

        where the second derivatives x'' at the knots are a fixed linear map of the x_k, 0 if the spline is linear.

        Args:
            t: one time.
        """
        times = jnp.asarray(self.times, dtype=t.dtype)
        second = jnp.asarray(second_derivatives(self.times, self.kind), dtype=t.dtype)
        unit = jnp.eye(len(times), dtype=t.dtype)
        i = jnp.clip(jnp.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
        h = times[i + 1] - times[i]
        b = (t - times[i]) / h
        a = (times[i + 1] - t) / h
        curved = (a**3 - a) * second[i] + (b**3 - b) * second[i + 1]
        return a * unit[i] + b * unit[i + 1] + h**2 / 6 * curved

    def sample(self, key: Key | None, t: Time, x: Real[AnyArray, "batch knots *event"]) -> PathSample:
        """The point at `t` of the curve through the snapshots, and its velocity.

        Args:
            key: typed key of z; may be `None` if `sigma` is 0.
            t: times.
            x: trajectories, one snapshot for each knot.

        Returns:
            `PathSample`: its `x0` and `x1` are the first and the last snapshot.

        Raises:
            ValueError: if `x` has not K snapshots, or there is noise and no key.
        """
        check_data("x", x)
        if x.ndim < 2 or x.shape[1] != len(self.times):
            raise ValueError(f"x must be [batch, K, ...] with K = {len(self.times)} snapshots, got shape {x.shape}.")
        times = batch_time(t, x)
        weights, slopes = jax.jvp(jax.vmap(self.weights), (times,), (jnp.ones_like(times),))
        # "highest": by default accelerators multiply matrices with fewer digits, and x_t would miss its knots.
        x_t, u_t = (jnp.einsum("bk,bk...->b...", w, x, precision="highest") for w in (weights, slopes))
        if not self.sigma:
            return PathSample(jnp.asarray(t), x_t, u_t, x[:, 0], x[:, -1])
        if key is None:
            raise ValueError("a path with noise, sigma > 0, needs a key, got None.")
        check_key(key)
        z = jax.random.normal(key, x_t.shape, x_t.dtype)
        return PathSample(jnp.asarray(t), x_t + self.sigma * z, u_t, x[:, 0], x[:, -1], z)

    def targets(self, sample: PathSample) -> dict[str, Array]:
        """The velocity."""
        return {"velocity": sample.u_t}

    def target_domain(self, kind: str) -> tuple[float, float]:
        """All of [0, 1]."""
        check_member("kind", kind, self.kinds)
        return self.domain


def second_derivatives(times: ArrayTree, kind: SplineKind = "natural") -> Float[np.ndarray, "knots knots"]:
    """The matrix that takes values at the knots to the second derivatives there of the spline through them.

    The natural spline's are 0 at both ends, and in between, with `h_k = t_{k+1} - t_k`,

        h_{k-1} x_{k-1}'' + 2 (h_{k-1} + h_k) x_k'' + h_k x_{k+1}''
            = 6 ((x_{k+1} - x_k) / h_k - (x_k - x_{k-1}) / h_{k-1}).

    Args:
        times: the knots, increasing.
        kind: "natural" or "linear", of which all are 0.
    """
    check_member("kind", kind, get_args(SplineKind))
    if np.ndim(times) != 1 or len(times) < 2 or not (np.diff(np.asarray(times, dtype=float)) > 0).all():
        raise ValueError(f"times must be at least two numbers that increase, got {shown(times)}.")
    num, h = len(times), np.diff(np.asarray(times, dtype=float))
    left, right = np.eye(num), np.zeros((num, num))
    if kind == "natural":
        for k in range(1, num - 1):
            left[k, k - 1 : k + 2] = h[k - 1], 2 * (h[k - 1] + h[k]), h[k]
            right[k, k - 1 : k + 2] = 6 / h[k - 1], -6 / h[k - 1] - 6 / h[k], 6 / h[k]
    return np.linalg.solve(left, right)
