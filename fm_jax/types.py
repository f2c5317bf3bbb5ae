"""The types that every other file speaks in.

Time runs from 0 (source, noise) to 1 (data). Batches come first, images are NHWC.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

import jax
from jaxtyping import Integer, PyTree, Real, Shaped

Array: TypeAlias = jax.Array

if TYPE_CHECKING:  # a type checker is told what the code of a function does with its arguments
    AnyArray: TypeAlias = jax.Array
    Number: TypeAlias = jax.Array
else:
    AnyArray = Any  # whatever has a shape and a dtype, NumPy's arrays too
    Number = float | int

# Within a call, all arguments and results agree in `batch`, and in `*event`.
State: TypeAlias = Real[AnyArray, " batch *event"]
"""A batch of points x [batch, ...], or of what is like them: velocities, data, noise, scores."""
Examples: TypeAlias = Shaped[AnyArray, " batch ..."]
"""A batch [batch, ...], whose events may differ from those of others."""
TokenState: TypeAlias = Integer[AnyArray, " batch *event"]
"""A batch of tokens [batch, ...], each from 0 to K - 1."""
Logits: TypeAlias = Real[AnyArray, " batch *event k"]
"""K numbers for each token: logits, probabilities or rates."""
Points: TypeAlias = Real[AnyArray, "batch d"]
"""A batch of points in d dimensions."""
Scalar: TypeAlias = Real[AnyArray, ""]
PerExample: TypeAlias = Real[AnyArray, " batch"]
"""A number for each example."""
Time: TypeAlias = Scalar | PerExample | Number
"""One time for all examples, or one for each, [batch]; and what else is given so, such as a guidance scale."""
Elementwise: TypeAlias = Real[AnyArray, " *shape"] | Number
"""An array of any shape, or a number. A function of it works on each element: it returns the same shape."""
Like: TypeAlias = Shaped[Any, " batch *event"]
"""What has the shape and the dtype that a batch is to have: an array, or a `jax.ShapeDtypeStruct`."""
Key: TypeAlias = jax.Array
"""A typed PRNG key, as made by `jax.random.key`."""
Params: TypeAlias = PyTree
Cond: TypeAlias = PyTree
"""Conditioning with a leading batch axis; `None` is unconditional."""
Batch: TypeAlias = Mapping[str, PyTree]
"""`x1` [batch, ...] is required; `x0` [batch, ...], `cond`, `t` [batch] and `weight` [batch] are optional.
`losses.trajectory_matching` takes `x` [batch, times, ...] in place of `x0` and `x1`."""
Metrics: TypeAlias = Mapping[str, Scalar]
ArrayTree: TypeAlias = Any
"""Anything that `jnp.asarray` or `jax.tree` takes."""

Kind = Literal["velocity", "data", "noise", "score"]
"""What a network predicts."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Returns = Literal["prediction", "logits", "next_logits", "rates"]
"""What a function of (t, x) returns: what a network does, logits of x1, those of a causal network one place late, or
rates."""
RETURNS: tuple[Returns, ...] = get_args(Returns)


class Coefficients(NamedTuple):
    """Coefficients of `x_t = alpha x1 + sigma x0` and their time derivatives, in the shape of `t`.

    Notebooks: (3.2).
    """

    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array


class PathSample(NamedTuple):
    """A point on a conditional path: `t`, a scalar or [batch]; `x_t`, `u_t` = dx_t/dt, `x0`, `x1` all [batch, ...].

    `z` [batch, ...] is the latent noise of a bridge, standard normal; `None` where the path has none.

    Notebooks: (3.4).
    """

    t: Array
    x_t: Array
    u_t: Array
    x0: Array
    x1: Array
    z: Array | None = None


class TokenSample(NamedTuple):
    """A point on a conditional path of tokens: `t`, a scalar or [batch]; `x_t`, `x0`, `x1` [batch, ...], integers.

    Between tokens there is no velocity: what moves them are rates of jumps, see `fm_jax.rates`.
    """

    t: Array
    x_t: Array
    x0: Array
    x1: Array


class Prediction(NamedTuple):
    """The four equivalent descriptions of a Gaussian marginal path at (t, x_t), each [batch, ...].

    Notebooks: (5.6).
    """

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

    `x` [batch, ...] is the state at the last time. `calls` says how often the velocity function was called for each
    example, a scalar, or [batch] under per-sample step control; `None` where no solver reports it. `nfe`, in the same
    shape, is the network evaluations of these calls; `None` where it is not known what a call costs (see `fm_jax.nfe`).
    `trajectory` [num + 1, batch, ...], the states at all times, is there only where it was asked for.
    """

    x: Array
    calls: Array | None
    nfe: Array | None
    trajectory: Array | None = None


@runtime_checkable
class VelocityFn(Protocol):
    """`v(t, x) -> dx/dt`. Samplers take one; everything else returns one.

    Notebooks: (1.1).
    """

    def __call__(self, t: Time, x: State, /) -> State: ...


@runtime_checkable
class DenoiserFn(Protocol):
    """`f(t, x) -> logits` [batch, ..., K] of the tokens of the data, x1, given tokens x [batch, ...]."""

    def __call__(self, t: Time, x: TokenState, /) -> Logits: ...


@runtime_checkable
class RateFn(Protocol):
    """`u(t, x) -> rates` [batch, ..., K] of the jumps of each token of x [batch, ...] to every other.

    Never negative, and 0 at the token that is there. To chains what `VelocityFn` is to flows.
    """

    def __call__(self, t: Time, x: TokenState, /) -> Logits: ...


@runtime_checkable
class ModelFn(Protocol):
    """`f(t, x, cond) -> prediction`: a network whose parameters are bound."""

    def __call__(self, t: Time, x: State, cond: Cond = None, /) -> State: ...


@runtime_checkable
class ApplyFn(Protocol):
    """A network in any library, as the losses see it.

    `rngs` is a dict with the key `"dropout"`, or `None`, in which case nothing may be random.
    """

    def __call__(
        self,
        params: Params,
        t: PerExample,
        x: State,
        cond: Cond,
        /,
        *,
        train: bool,
        rngs: Mapping[str, Key] | None,
    ) -> State: ...


@runtime_checkable
class LossFn(Protocol):
    """What `jax.value_and_grad(loss_fn, has_aux=True)` sees: a scalar and a dict of scalars."""

    def __call__(
        self, params: Params, key: Key, batch: Batch, /, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]: ...


@runtime_checkable
class Schedule(Protocol):
    """Coefficients of an affine path, elementwise in `t`; see `fm_jax.schedules`.

    `domain` is the closed range of `t` on which alpha, sigma and both derivatives are finite.
    """

    @property
    def domain(self) -> tuple[float, float]: ...

    def alpha(self, t: Elementwise, /) -> Elementwise: ...

    def sigma(self, t: Elementwise, /) -> Elementwise: ...

    def t_from_log_snr(self, log_snr: Elementwise, /) -> Elementwise: ...


@runtime_checkable
class Source(Protocol):
    """A distribution p_0 that a path starts from; see `fm_jax.sources`.

    `draw(key, like)` is a batch in the shape and dtype of `like`, an array or a `jax.ShapeDtypeStruct`; `log_prob(x)`
    is in nats.
    """

    def draw(self, key: Key, like: Like, /) -> State: ...

    def log_prob(self, x: State, /) -> PerExample: ...


@runtime_checkable
class TokenSource(Protocol):
    """A distribution p_0 of tokens, each for itself; see `fm_jax.sources`.

    `num_tokens` is K, `probs` [K] how often the source draws each of them, and `mask` the one that no data hold, or
    `None`.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def mask(self) -> int | None: ...

    @property
    def probs(self) -> Any: ...

    def draw(self, key: Key, like: Like, /) -> TokenState: ...

    def log_prob(self, x: TokenState, /) -> PerExample: ...


@runtime_checkable
class Path(Protocol):
    """A conditional probability path: where an (x0, x1) pair is at time t, and what can be learned there.

    `source` is p_0, or `None` where x0 can only come with the data. `schedule` is the one by which velocity, data,
    noise and score convert into each other, or `None` where they do not. `domain` is the closed range of `t` on which
    the velocity is finite. `kinds` are the names of what a network can regress, `targets` their values [batch, ...] at
    a point of the path, and `target_domain` is where the target of a kind is finite.
    """

    @property
    def source(self) -> Source | None: ...

    @property
    def schedule(self) -> Schedule | None: ...

    @property
    def domain(self) -> tuple[float, float]: ...

    @property
    def kinds(self) -> tuple[str, ...]: ...

    def sample(self, key: Key | None, t: Time, x0: State, x1: State, /) -> PathSample: ...

    def targets(self, sample: PathSample, /) -> Mapping[str, Array]: ...

    def target_domain(self, kind: str, /) -> tuple[float, float]: ...


@runtime_checkable
class TokenPath(Protocol):
    """A conditional probability path of tokens, each by itself; see `fm_jax.paths`.

    `source` is p_0 and `num_tokens` K. `probs(t, x1)` is `p_t(x | x1)` [batch, ..., K] of every token x, the source
    integrated out, and `log_probs` its logarithm. `domain` is the closed range of `t` on which they have a finite
    slope. `log_posterior(logits, x)` is `log p(x1 | x_t = x)` [batch, ..., K] as a network has it, with what
    is known without one put right, and `posterior` its exponential. `check_data` refuses what is no data of the path.
    """

    @property
    def source(self) -> TokenSource: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def domain(self) -> tuple[float, float]: ...

    def sample(self, key: Key, t: Time, x0: TokenState, x1: TokenState, /) -> TokenSample: ...

    def probs(self, t: Time, x1: TokenState, /) -> Logits: ...

    def log_probs(self, t: Time, x1: TokenState, /) -> Logits: ...

    def log_posterior(self, logits: Logits, x: TokenState, /) -> Logits: ...

    def posterior(self, logits: Logits, x: TokenState, /) -> Logits: ...

    def check_data(self, x1: TokenState, /) -> None: ...


@runtime_checkable
class Manifold(Protocol):
    """A Riemannian manifold; see `fm_jax.manifolds`.

    Its points are arrays of `shape` in an ambient space, and so are tangent vectors. All methods take [..., *shape],
    the leading axes being examples, and points of one example; what is a number a point is [...]. `dim` is the
    dimension of the manifold itself.

    `exp(x, u)` goes from x along the geodesic of velocity u for a unit of time, and `log(x, y)` is the shortest u that
    arrives at y, with a documented answer where there are several. `project(x)` is the point to a place nearby: of a
    field that is constant along its fibres, the divergence in the ambient space is that on the manifold.
    `tangent(x, u)` is the tangent vector nearest to u, `gradient(x, g)` the Riemannian gradient, g the ambient one.
    `squared_norm(x, u)` and `distance(x, y)` are those of the metric; `log_volume(x)` is the logarithm of the
    Riemannian volume in relation to that of the ambient coordinates, up to a constant. `normal(key, x)` draws a tangent
    vector, standard normal in the metric; `log_jacobian(x, u)` is the logarithm of what exp_x stretches volumes by at
    u. `log_total` is the logarithm of the whole volume, and `uniform(key, like)` draws from it: `None`, and an error,
    where it is infinite. `check(name, x)` refuses what is no points of it.
    """

    @property
    def dim(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def log_total(self) -> float | None: ...

    def exp(self, x: Examples, u: Examples, /) -> Examples: ...

    def log(self, x: Examples, y: Examples, /) -> Examples: ...

    def project(self, x: Examples, /) -> Examples: ...

    def tangent(self, x: Examples, u: Examples, /) -> Examples: ...

    def gradient(self, x: Examples, g: Examples, /) -> Examples: ...

    def squared_norm(self, x: Examples, u: Examples, /) -> Examples: ...

    def distance(self, x: Examples, y: Examples, /) -> Examples: ...

    def log_volume(self, x: Examples, /) -> Examples: ...

    def log_jacobian(self, x: Examples, u: Examples, /) -> Examples: ...

    def normal(self, key: Key, x: Examples, /) -> Examples: ...

    def uniform(self, key: Key, like: Like, /) -> Examples: ...

    def check(self, name: str, x: Examples, /) -> None: ...


@runtime_checkable
class Coupling(Protocol):
    """Pairs source with data samples within a batch. Never drops or repeats an example."""

    def __call__(self, key: Key | None, x0: State, x1: State, cond: Cond = None, /) -> Pairing: ...


@runtime_checkable
class TimeSampler(Protocol):
    """Draws training times inside `domain`."""

    @property
    def domain(self) -> tuple[float, float]: ...

    def __call__(self, key: Key, batch_size: int, /) -> PerExample: ...


@runtime_checkable
class Sampler(Protocol):
    """How a velocity function is followed; see `fm_jax.samplers`, and `fm_jax.samplers.sample`, which runs it.

    `order` is that of convergence in the step size, the weak order where it is random; `None` where there is none.
    Where a method begins with steps of lower order, it is the order from a start with short steps. `nfe_per_step` is
    the calls of the velocity, and of a score beside it, in a step, `None` where steps are adaptive. `stochastic` says
    whether it draws noise, and so needs a key. `domain` is the range of times over which a number of even steps goes. A
    sampler that goes through times of its own, and no others, has them as `own_times`.

    `solve(v, key, times, x0, trajectory)` does the work, on arguments that have been checked: `times` [num + 1] is
    monotone, a NumPy array unless it is traced; `key` is there exactly where the sampler is random.
    """

    @property
    def order(self) -> int | None: ...

    @property
    def nfe_per_step(self) -> int | None: ...

    @property
    def stochastic(self) -> bool: ...

    @property
    def domain(self) -> tuple[float, float]: ...

    def solve(self, v: VelocityFn, key: Any, times: ArrayTree, x0: State, trajectory: bool, /) -> Solution: ...


Weight: TypeAlias = Callable[[PerExample, Any, Schedule], PerExample]
"""`weight(t, kind, schedule)`: multiplies the squared error of a prediction of that kind."""
Diffusion: TypeAlias = float | Callable[[Scalar], Scalar | float]
"""The noise coefficient g(t) of an SDE: a number, or a function of a scalar time.

Notebooks: (2.2).
"""
