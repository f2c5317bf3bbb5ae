"""Samplers on manifolds beside `RungeKutta(method, manifold)`: solvers of the ambient space, and random walks."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fm_jax.checks import check_diffusion, check_function
from fm_jax.manifolds import check_manifold, tangent_velocity
from fm_jax.nfe import spent
from fm_jax.samplers.loop import run_steps
from fm_jax.samplers.sample import check_sampler
from fm_jax.samplers.sde import ScoreFn, diffusion_fn, drift_fn, functions
from fm_jax.types import Array, ArrayTree, Diffusion, Key, Manifold, Sampler, Solution, State, VelocityFn


@dataclass(frozen=True)
class Ambient:
    """A sampler of flows in R^n, run in the ambient space of a manifold: its adaptive steps, its dense methods.

    It follows `manifolds.tangent_velocity(manifold, v)`, which leaves the manifold as it is, and what rounding and the
    sampler's own error are off it at the end is projected: the error is the sampler's tolerance. `RungeKutta(method,
    manifold)` does not leave it in between either.

    Attributes:
        manifold: where the states are.
        sampler: without noise, such as `Adaptive()`.

    Raises:
        ValueError: for what is no manifold, and a sampler that draws noise or moves tokens; from `sample`, for states
            off the manifold.

    Example:
        >>> from fm_jax.manifolds import Sphere
        >>> from fm_jax.samplers import Adaptive, sample
        >>> x0 = jnp.array([[1.0, 0.0, 0.0]])
        >>> turn = lambda t, x: jnp.pi * jnp.stack([-x[:, 1], x[:, 0], 0 * x[:, 2]], axis=1)
        >>> jnp.abs(sample(turn, x0, Ambient(Sphere(2), Adaptive())).x + x0).max() < 1e-3
        Array(True, dtype=bool)
    """

    manifold: Manifold
    sampler: Sampler
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_manifold(self.manifold)
        check_sampler(self.sampler)
        if self.sampler.stochastic or getattr(self.sampler, "manifold", None) is not None:
            raise ValueError(f"sampler must be one of R^n that draws no noise, such as Adaptive(), got {self.sampler}.")

    @property
    def order(self) -> int | None:
        return self.sampler.order

    @property
    def nfe_per_step(self) -> int | None:
        return self.sampler.nfe_per_step

    @property
    def domain(self) -> tuple[float, float]:
        return self.sampler.domain

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        said = getattr(self.sampler, "skips_last", None)
        return said is not None and said(times)

    def solve(self, v: VelocityFn, key: None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        self.manifold.check("x0", x0)
        found = self.sampler.solve(tangent_velocity(self.manifold, v), key, times, x0, trajectory)
        states = None if found.trajectory is None else self.manifold.project(found.trajectory)
        return found._replace(x=self.manifold.project(found.x), trajectory=states)


@dataclass(frozen=True)
class GeodesicRandomWalk:
    """The SDE extension of a flow on a manifold, in steps `x <- exp_x(h (v + s g^2 / 2 score) + g sqrt|h| xi)`.

    xi is standard normal in the tangent space at x, and s the sign of h, as of `EulerMaruyama`, which this is on
    `Euclidean`. With the score of the marginals, the Riemannian gradient of log p_t, they are those of the flow; with
    none it is the diffusion of drift v alone, and of v = 0 Brownian motion, of generator g^2 / 2 times the Laplacian.
    Weak order 1.

    Attributes:
        manifold: where the states are.
        diffusion: g, a number or a function of a scalar time.
        score: `score(t, x)`, one more evaluation each time; its part that is not tangent does not count.

    Step i draws its noise from `fold_in(key, i)`.

    Raises:
        ValueError: for what is no manifold, no diffusion, or no score; from `sample`, for states off the manifold.

    Example:
        >>> from fm_jax.manifolds import Sphere
        >>> from fm_jax.samplers import sample
        >>> walk, x0 = GeodesicRandomWalk(Sphere(2)), jnp.tile(jnp.array([[1.0, 0.0, 0.0]]), (1000, 1))
        >>> x = sample(lambda t, x: 0 * x, x0, walk, times=50, key=jax.random.key(0)).x
        >>> bool(abs(x[:, 0].mean() - jnp.exp(-1)) < 0.1)  # E cos of the angle falls as exp(-t)
        True
    """

    manifold: Manifold
    diffusion: Diffusion = 1.0
    score: ScoreFn | None = None
    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_manifold(self.manifold)
        check_diffusion(self.diffusion)
        if self.score is not None:
            check_function("score", self.score, "a function score(t, x)", 2)

    @property
    def nfe_per_step(self) -> int:
        return 1 if self.score is None else 2

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return True

    def solve(self, v: VelocityFn, key: Key, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        self.manifold.check("x0", x0)
        score: Any = self.score or (lambda t, x: jnp.zeros_like(x))
        drift, g = drift_fn(v, score, self.diffusion), diffusion_fn(self.diffusion)

        def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
            h = t_next - t
            slope = self.manifold.tangent(x, drift(t, x, jnp.sign(h)).astype(x.dtype))
            noise = self.manifold.normal(jax.random.fold_in(key, i), x)
            return self.manifold.exp(x, (h * slope + g(t) * jnp.sqrt(jnp.abs(h)) * noise).astype(x.dtype)), memory

        num = len(times) - 1
        return run_steps(step, x0, times, spent(num, *functions(v, self.score)), trajectory=trajectory)
