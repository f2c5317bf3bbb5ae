"""The types that every other file speaks in.

Time runs from 0 (source, noise) to 1 (data). Batches come first, images are NHWC.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import jax
from jaxtyping import PyTree

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array
"""A typed PRNG key, as made by `jax.random.key`."""
Params: TypeAlias = PyTree
Cond: TypeAlias = PyTree
"""Conditioning with a leading batch axis; `None` is unconditional."""
Batch: TypeAlias = Mapping[str, PyTree]
"""`x1` [batch, ...] is required; `x0` [batch, ...], `cond`, `t` [batch] and `weight` [batch] are optional.
`losses.trajectory_matching` takes `x` [batch, times, ...] in place of `x0` and `x1`."""
Metrics: TypeAlias = Mapping[str, Array]

Kind = Literal["velocity", "data", "noise", "score"]
"""What a network predicts."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class Coefficients(NamedTuple):
    """Coefficients of `x_t = alpha x1 + sigma x0` and their time derivatives, in the shape of `t`."""

    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array


class PathSample(NamedTuple):
    """A point on a conditional path: `t` [batch]; `x_t`, `u_t` = dx_t/dt, `x0`, `x1` all [batch, ...].

    `z` [batch, ...] is the latent noise of a bridge, standard normal; `None` where the path has none.
    """

    t: Array
    x_t: Array
    u_t: Array
    x0: Array
    x1: Array
    z: Array | None = None


class Prediction(NamedTuple):
    """The four equivalent descriptions of a Gaussian marginal path at (t, x_t), each [batch, ...]."""

    velocity: Array
    data: Array
    noise: Array
    score: Array


class Pairing(NamedTuple):
    """What a coupling returns: `x0[i]` goes with `x1[i]` and `cond[i]`.

    `index0` [batch] says where each `x0[i]` came from: `x0 == x0_before[index0]`, a permutation. `weight` [batch], of
    mean 1 or of expectation 1, is what the pair counts for in a loss, where the transport weighs pairs; `None` counts
    all alike.
    """

    x0: Array
    x1: Array
    cond: Cond
    index0: Array
    weight: Array | None = None


class Solution(NamedTuple):
    """What a sampler returns.

    `x` [batch, ...] is the state at `t1`; `nfe` the network evaluations spent on each example (a
    scalar, or [batch] under per-sample step control); `trajectory` [num_times, batch, ...] only where it was asked for.
    """

    x: Array
    nfe: Array
    trajectory: Array | None = None


class VelocityFn(Protocol):
    """`v(t, x) -> dx/dt`: `t` a scalar or [batch], `x` [batch, ...]. Samplers take one; everything else returns one."""

    def __call__(self, t: Array, x: Array, /) -> Array: ...


class ModelFn(Protocol):
    """`f(t, x, cond) -> prediction`: a network whose parameters are bound. `t` a scalar or [batch]."""

    def __call__(self, t: Array, x: Array, cond: Cond = None, /) -> Array: ...


class ApplyFn(Protocol):
    """A network in any library, as the losses see it: `t` [batch], `x` [batch, ...], the result like `x`.

    `rngs` is a dict with the key `"dropout"`, or `None`, in which case nothing may be random.
    """

    def __call__(
        self,
        params: Params,
        t: Array,
        x: Array,
        cond: Cond,
        /,
        *,
        train: bool,
        rngs: Mapping[str, Key] | None,
    ) -> Array: ...


class LossFn(Protocol):
    """What `jax.value_and_grad(loss_fn, has_aux=True)` sees: a scalar and a dict of scalars."""

    def __call__(
        self, params: Params, key: Key, batch: Batch, /, *, target_params: Params | None = None
    ) -> tuple[Array, Metrics]: ...


class Schedule(Protocol):
    """Coefficients of an affine path, elementwise in `t`; see `fm_jax.schedules`.

    `domain` is the closed range of `t` on which alpha, sigma and both derivatives are finite.
    """

    @property
    def domain(self) -> tuple[float, float]: ...

    def alpha(self, t: Array, /) -> Array: ...

    def sigma(self, t: Array, /) -> Array: ...

    def t_from_log_snr(self, log_snr: Array, /) -> Array: ...


class Path(Protocol):
    """A conditional probability path: where an (x0, x1) pair is at time t, and how fast it moves.

    `domain` is the closed range of `t` on which the velocity is finite. An affine path also has a `schedule`.
    """

    @property
    def domain(self) -> tuple[float, float]: ...

    def sample(self, key: Key | None, t: Array, x0: Array, x1: Array, /) -> PathSample: ...


class Coupling(Protocol):
    """Pairs source with data samples within a batch. Never drops or repeats an example."""

    def __call__(self, key: Key | None, x0: Array, x1: Array, cond: Cond = None, /) -> Pairing: ...


class TimeSampler(Protocol):
    """Draws training times [batch] inside `domain`."""

    @property
    def domain(self) -> tuple[float, float]: ...

    def __call__(self, key: Key, batch_size: int, /) -> Array: ...


Weight: TypeAlias = Callable[[Array, Kind, Schedule], Array]
"""`weight(t, kind, schedule) -> [batch]`: multiplies the squared error of a prediction of that kind."""
Diffusion: TypeAlias = float | Callable[[Array], Array]
"""The noise coefficient g(t) of an SDE: a number, or a function of a scalar time."""
ArrayTree: TypeAlias = Any
"""Anything that `jnp.asarray` or `jax.tree` takes."""


def check_member(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises `ValueError` naming the closed set if `value` is not in it."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
