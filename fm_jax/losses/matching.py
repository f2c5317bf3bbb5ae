"""Regression losses on a conditional path: flow matching and its relatives, all one function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fm_jax.checks import (
    check_condition,
    check_coupling,
    check_data,
    check_finite,
    check_function,
    check_has,
    check_holds,
    check_key,
    check_member,
    check_network,
    check_numbers_of,
    check_per_example,
    check_same_shape,
    check_shape,
    check_times,
    is_traced,
)
from fm_jax.conditions import Drop
from fm_jax.couplings import independent, paired
from fm_jax.paths.affine import where_finite
from fm_jax.shapes import check_not_steps, mean_over_event, time_dtype
from fm_jax.times import Uniform
from fm_jax.types import (
    AnyArray,
    ApplyFn,
    Batch,
    Cond,
    Coupling,
    Key,
    LossFn,
    Manifold,
    Metrics,
    Params,
    Path,
    PathSample,
    PerExample,
    Scalar,
    Schedule,
    Source,
    State,
    TimeSampler,
    Weight,
)


def flow_matching(
    apply_fn: ApplyFn,
    path: Path,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    kind: str = "velocity",
    weight: Weight | None = None,
    drop: Drop | None = None,
) -> LossFn:
    """The conditional flow matching loss, or with another `kind` its relatives: a regression for marginalisation.

    `E_t,x0,x1 w(t) |f(t, x_t, cond) - target|^2`, averaged over the dimensions of x. The target is `u_t` (conditional
    flow matching, Lipman et al. 2022, arXiv:2210.02747, eq. 14), `x1`, `x0` (DDPM's noise prediction) or the
    conditional score (denoising score matching, Vincent 2011). By the marginalisation trick its minimiser is the
    marginal quantity, `E[target | x_t]`. On a `GeodesicPath` f is projected onto the tangent space, and the norm and
    the dimensions are those of the manifold (Chen & Lipman 2023, arXiv:2302.03660).

    Notebooks: (5.2), (5.3), (8.1), (9.1), (10.4), (11.1).

    Args:
        apply_fn: the network, `apply_fn(params, t, x, cond, train=, rngs=)`.
        path: conditional path, e.g. `AffinePath(Linear())` or `BrownianBridge(1.0)`.
        coupling: pairs x0 with x1 within the batch; its weights of pairs, if it has any, multiply the loss.
        time_sampler: training times; `None` is uniform on the range where the target and the weight are finite.
        kind: what the network predicts, one of `path.kinds`.
        weight: `weight(t, kind, schedule) -> [batch]` on a path with a schedule; `None` is 1.
        drop: takes conditions away from some examples, as `DropCondition(0.1, null_cond)`, or any `drop(key, cond)`; so
            the network, of any library, learns what classifier-free guidance needs. The coupling still sees them.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)`, pure, for `jax.value_and_grad(loss_fn, has_aux=True)`. The
        batch is a dict: `x1` [batch, ...]; optional `x0` (drawn from `path.source` if absent), `cond`, `t` [batch]
        (drawn if absent) and `weight` [batch], what each example counts for. Metrics are `loss` and `mse`, the
        unweighted error. With `key=None`, nothing may be random: `x0` and `t` must be in the batch, no condition is
        dropped, and the network runs with `train=False`.

    Raises:
        ValueError: if the path has no such kind, `time_sampler` leaves the range where target and weight are finite, or
            `weight` needs a schedule and the path has none; when the loss is traced, if the batch has no `x1`, is not
            floating point or its shapes do not fit, there is no `x0` where pairs of data are to be kept (`paired`) or
            the path has no source, a condition is to be dropped that is not there or that `null_cond` does not fit, or
            the network returns anything but real numbers in the shape of x; if its `t` are known to leave the range.

    Example:
        >>> import jax.numpy as jnp
        >>> from fm_jax.paths import AffinePath
        >>> loss_fn = flow_matching(lambda params, t, x, cond, **_: params * x, AffinePath())
        >>> batch = {"x1": jnp.ones((2, 3)), "x0": jnp.zeros((2, 3)), "t": jnp.array([0.25, 0.5])}
        >>> loss, metrics = loss_fn(2.0, None, batch)  # the mean of (2 t - 1)^2
        >>> float(loss)
        0.125
    """
    check_has("path", path, ("kinds", "targets", "target_domain", "sample"), "a path, such as AffinePath()")
    check_member("kind", kind, path.kinds)
    check_network("apply_fn", apply_fn)
    check_coupling(coupling)
    check_drop(drop)
    schedule, manifold = path.schedule, getattr(path, "manifold", None)
    domain, what = path.target_domain(kind), f"the {kind} target of {path}"
    if weight is not None:
        check_function("weight", weight, "a function weight(t, kind, schedule), such as SNRWeight()", 3)
        if schedule is None:
            raise ValueError(f"weight needs a path with a schedule, by which kinds convert; {path} has none.")
        domain = where_finite(weight, kind, schedule, domain)
        what = f"{what}, weighted by {weight},"
    times = times_within(time_sampler, domain, what)

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params  # for losses with a second network; a regression on the path has none
        pairs = draw_pairs(key, batch, path.source, coupling, times, drop)
        sample = path.sample(pairs.key_path, pairs.t, pairs.x0, pairs.x1)
        mse = squared_error(apply_fn, params, sample, pairs, path.targets(sample)[kind], manifold)
        weighted = mse if pairs.weight is None else pairs.weight * mse
        if weight is not None and schedule is not None:
            factor = weight(pairs.t, kind, schedule)
            check_numbers_of("weight(t, kind, schedule)", factor, mse)
            weighted = factor * weighted
        return weighted.mean(), {"loss": weighted.mean(), "mse": mse.mean()}

    return loss_fn


class Times(NamedTuple):
    """The times of a loss: those of the batch, or draws of `sampler`, all in `domain`, where `what` is finite."""

    sampler: TimeSampler
    domain: tuple[float, float]
    what: str

    def of(self, key: Any, batch: Batch, x: State) -> PerExample:
        """A time for every example of `x`, in `time_dtype(x)`; raises `ValueError` for what is none in the domain."""
        t = batch.get("t")
        if t is None:
            t = self.sampler(key, x.shape[0])
        check_per_example(x, t=t)
        check_not_steps("t", t)
        check_times("t", t, self.domain, f"where {self.what} is finite")
        return t.astype(time_dtype(x))  # in double precision it would bring the rest there


def times_within(time_sampler: TimeSampler | None, domain: tuple[float, float], what: str) -> Times:
    """With the time sampler, by default uniform on `domain`; raises `ValueError` if that leaves it."""
    low, high = domain
    if time_sampler is None:
        return Times(Uniform(low, high), domain, what)
    check_has("time_sampler", time_sampler, ("domain", "__call__"), "a time sampler, such as LogitNormal()")
    first, last = time_sampler.domain
    if not (is_traced(first) or low <= first) or not (is_traced(last) or last <= high):
        raise ValueError(
            f"time_sampler draws from {list(time_sampler.domain)}, but {what} is finite only on {[low, high]}; bring "
            f"it there with times.Rescale(sampler, {low}, {high})."
        )
    return Times(time_sampler, domain, what)


class Pairs(NamedTuple):
    """What a loss draws before it asks the path: a paired batch, times, and what else is random."""

    x0: State
    x1: State
    cond: Cond
    weight: PerExample | None
    t: PerExample
    key_path: Key | None
    rngs: dict[str, Key] | None


def draw_pairs(
    key: Key | None,
    batch: Batch,
    source: Source | None,
    coupling: Coupling,
    times: Times,
    drop: Drop | None = None,
    *,
    check: Callable[[str, AnyArray], None] = check_data,
) -> Pairs:
    """Source, times, pairing and conditions of a batch, as `flow_matching` says; raises `ValueError` where it does.

    `check(name, x)` refuses what is no `x1` or no `x0`: by default all but floating-point numbers.
    """
    check_holds(batch, "x1")
    if key is not None:
        check_key(key)
    x1 = batch["x1"]
    x0: Any = batch.get("x0")
    if x0 is None and coupling is paired:
        raise ValueError("coupling=paired keeps the pairs of the data: the batch must hold 'x0'.")
    if x0 is None and source is None:
        raise ValueError("the path has no source to draw x0 from: the batch must hold 'x0'.")
    if key is None and (x0 is None or batch.get("t") is None):
        raise ValueError("without a key the batch must hold 'x0' and 't'.")
    check("x1", x1)
    # The last: a split into more keys begins with the same ones, so that runs without `drop` are what they were.
    keys: Any = [None] * 6 if key is None else jax.random.split(key, 6)
    key_x0, key_t, key_coupling, key_path, key_dropout, key_drop = keys
    if x0 is None and source is not None:
        x0 = source.draw(key_x0, x1)
    check("x0", x0)
    t = times.of(key_t, batch, x1)
    check_weight(batch, x1)
    check_condition(x1, batch.get("cond"))
    pairing = coupling(key_coupling, x0, x1, batch.get("cond"))
    check_pairing(pairing, x1)
    weight = product(batch.get("weight"), pairing.weight)
    rngs = None if key is None else {"dropout": key_dropout}
    cond = dropped(drop, key_drop, pairing.cond)
    return Pairs(pairing.x0, pairing.x1, cond, weight, t, key_path, rngs)


def check_weight(batch: Batch, x: State) -> None:
    """Raises `ValueError` unless the weight of a batch, if it has one, is finite and [batch]."""
    weight = batch.get("weight")
    check_per_example(x, weight=weight)
    if weight is not None:
        check_finite("weight", weight)


def check_drop(drop: Drop | None) -> None:
    """Raises `ValueError` unless `drop` takes conditions away, or nothing is to do so."""
    if drop is not None:
        check_function("drop", drop, "a function drop(key, cond), such as DropCondition(0.1, null_cond)", 2)


def check_pairing(pairing: Any, x1: State) -> None:
    """Raises `ValueError` unless a coupling has returned a `Pairing` of as many examples as it was given."""
    check_has("what the coupling returns", pairing, ("x0", "x1", "cond", "weight"), "a Pairing")
    check_same_shape(x1=x1, **{"x1 of the pairing": pairing.x1})
    check_per_example(x1, **{"weight of the pairing": pairing.weight})
    check_condition(x1, pairing.cond)


def dropped(drop: Drop | None, key: Key | None, cond: Cond) -> Cond:
    """The condition as the network is to see it: without a key, nothing is dropped."""
    return cond if drop is None or key is None else drop(key, cond)


def product(*weights: PerExample | None) -> PerExample | None:
    """The product of those weights that are there, `None` if none is."""
    return functools.reduce(lambda a, b: b if a is None else a if b is None else a * b, weights)


def squared_error(
    apply_fn: ApplyFn,
    params: Params,
    sample: PathSample,
    pairs: Pairs,
    target: State,
    manifold: Manifold | None = None,
) -> PerExample:
    """The network's squared error against a target, averaged over the event; on a manifold over its dimensions.

    There what the network returns is projected onto the tangent space, and the norm is that of the metric.
    """
    train = pairs.rngs is not None
    prediction = apply_fn(params, sample.t, sample.x_t, pairs.cond, train=train, rngs=pairs.rngs)
    check_shape("what the network returns", prediction, target)
    if manifold is None:
        return mean_over_event((prediction.astype(target.dtype) - target) ** 2)
    error = manifold.tangent(sample.x_t, prediction.astype(target.dtype)) - target
    return mean_over_event(manifold.squared_norm(sample.x_t, error)) / manifold.dim


def score_matching(apply_fn: ApplyFn, path: Path, *, weight: Weight | None = None, **options) -> LossFn:
    """Denoising score matching, by default weighted with sigma^2 so that all times count alike.

    Vincent 2011; Song et al. 2021 (arXiv:2011.13456, eq. 7). Arguments as in `flow_matching`.

    Notebooks: (5.5).
    """
    weight = _sigma_squared if weight is None else weight
    return flow_matching(apply_fn, path, kind="score", weight=weight, **options)


def _sigma_squared(t: PerExample, kind: str, schedule: Schedule) -> PerExample:
    del kind
    return schedule.sigma(t) ** 2


def noise_prediction(apply_fn: ApplyFn, path: Path, **options) -> LossFn:
    """DDPM's simple loss |f - x0|^2 (Ho et al. 2020, arXiv:2006.11239, eq. 14). Arguments as in `flow_matching`.

    Notebooks: (5.5).
    """
    return flow_matching(apply_fn, path, kind="noise", **options)


def data_prediction(apply_fn: ApplyFn, path: Path, **options) -> LossFn:
    """The denoiser's loss |f - x1|^2 (Karras et al. 2022, arXiv:2206.00364, eq. 2). Arguments as in `flow_matching`."""
    return flow_matching(apply_fn, path, kind="data", **options)
