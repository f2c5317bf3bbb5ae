"""Reflow: a flow trained on its own pairs of noise and sample, whose paths are straighter, down to one step.

A flow sends x0 to x1 = x0 + integral of v(t, x_t) dt. Trained anew on these pairs in place of independent ones, it
keeps its marginals, pays no more for any convex cost of transport, and its paths become straighter (Liu et al. 2022,
arXiv:2209.03003, thm. 3.3, 3.5 and 3.7). Once they are straight, one step samples, and `distillation` polishes it.

The training is the caller's: `flow_matching(apply_fn, AffinePath(), coupling=paired)` on the pairs of `make_pairs`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import (
    check_data,
    check_function,
    check_holds,
    check_integer,
    check_key,
    check_network,
    check_numbers_of,
    check_shape,
    check_source,
    check_velocity,
    shown,
)
from fm_jax.couplings import paired
from fm_jax.losses.matching import draw_pairs, times_within
from fm_jax.samplers import RungeKutta, sample
from fm_jax.samplers.sample import check_sampler
from fm_jax.shapes import mean_over_event
from fm_jax.sources import Normal
from fm_jax.types import (
    ApplyFn,
    ArrayTree,
    Batch,
    Key,
    LossFn,
    Metrics,
    Params,
    PerExample,
    Sampler,
    Scalar,
    Source,
    State,
    VelocityFn,
)

PairBatch: TypeAlias = dict[str, np.ndarray]
"""`x0` and `x1`, both [num, ...]: a batch for losses with `coupling=paired`."""
Distance: TypeAlias = Callable[[State, State], PerExample]
"""`distance(x, y)`, for each example."""
_NORMAL, _MIDPOINT = Normal(), RungeKutta("midpoint")


def make_pairs(
    v: VelocityFn,
    key: Key,
    shape: tuple[int, ...],
    *,
    source: Source = _NORMAL,
    sampler: Sampler = _MIDPOINT,
    times: int | ArrayTree | None = None,
    batch_size: int = 256,
) -> tuple[PairBatch, np.ndarray | None]:
    """Pairs of a source point and the sample that a flow makes of it.

    Args:
        v: velocity function of the flow.
        key: typed key; batch i draws its x0 with `fold_in(key, i)`.
        shape: of all x0 together, (number of pairs, *event).
        source: what x0 is drawn from, as the sampler starts from it: `paths.start(schedule)` on schedules such as VE.
        sampler: any that draws no noise, or x1 would be no function of x0.
        times: as in `sample`.
        batch_size: pairs sampled at once, jitted; the last batch is smaller where it does not divide their number.

    Returns:
        The pairs, {"x0": shape, "x1": shape}, on the host; and the NFE spent on each, [number of pairs], `None` if it
        is not known what a call of `v` costs.

    Raises:
        ValueError: for a random sampler, no pairs or a `batch_size` less than 1; if a sample is not finite; and as the
            source and `sample`.

    Example:
        >>> pairs, _ = make_pairs(lambda t, x: x, jax.random.key(0), (3, 2), times=50)
        >>> bool(np.allclose(pairs["x1"], np.e * pairs["x0"], rtol=1e-3))
        True

    References:
        Liu et al. 2022 (arXiv:2209.03003, algorithm 1).
    """
    check_velocity(v)
    check_key(key)
    check_source(source)
    check_sampler(sampler)
    if not isinstance(shape, tuple) or not shape:
        raise ValueError(f"shape must be (number of pairs, *event), got {shown(shape)}.")
    num, *event = shape
    check_integer("shape[0], the number of pairs,", num)
    for i, size in enumerate(event, start=1):
        check_integer(f"shape[{i}]", size)
    check_integer("batch_size", batch_size)
    if sampler.stochastic:
        raise ValueError(f"sampler must not be random, for x1 to be a function of x0, got {sampler}.")
    solve = jax.jit(lambda x0: sample(v, x0, sampler, times=times))
    batches = []
    for i, start in enumerate(range(0, num, batch_size)):
        size = min(batch_size, num - start)
        x0 = source.draw(jax.random.fold_in(key, i), jax.ShapeDtypeStruct((size, *event), jnp.result_type(float)))
        x1, _, nfe, _ = solve(x0)
        batches.append(jax.device_get((x0, x1, None if nfe is None else jnp.broadcast_to(nfe, (size,)))))
    all_x0, all_x1 = (np.concatenate([batch[part] for batch in batches]) for part in range(2))
    if bad := int((~np.isfinite(all_x1.reshape(num, -1)).all(axis=1)).sum()):
        raise ValueError(
            f"samples must be finite, got {bad} of {num} that are not: look at v, its times and the steps."
        )
    all_nfe = None if batches[0][2] is None else np.concatenate([batch[2] for batch in batches])
    return {"x0": all_x0, "x1": all_x1}, all_nfe


def reflow(
    fit: Callable[[int, PairBatch], VelocityFn],
    v: VelocityFn,
    key: Key,
    shape: tuple[int, ...],
    *,
    rounds: int = 1,
    **options: Any,
) -> list[VelocityFn]:
    """Rectifies a flow `rounds` times: pairs of the last flow, then a new flow fitted to them.

    Notebooks: (8.9).

    Args:
        fit: `fit(round, pairs) -> v`, the training, on a linear path with `coupling=paired`; rounds count from 0.
        v: velocity function of the first flow, the "1-rectified flow" if it was trained on a linear path.
        key: round k draws its pairs with `fold_in(key, k)`.
        shape: of the pairs of a round, (number, *event).
        rounds: how often.
        options: of `make_pairs`: `source`, `sampler`, `times` and `batch_size`.

    Returns:
        The velocity functions of the rounds, [rounds].

    Raises:
        ValueError: if `rounds` is less than 1, and as `make_pairs`.

    References:
        Liu et al. 2022 (arXiv:2209.03003, algorithm 1).
    """
    check_function("fit", fit, "a function fit(round, pairs) -> v", 2)
    check_velocity(v)
    check_key(key)
    check_integer("rounds", rounds)
    flows = [v]
    for k in range(rounds):
        pairs, _ = make_pairs(flows[-1], jax.random.fold_in(key, k), shape, **options)
        flows.append(fit(k, pairs))
        check_velocity(flows[-1], "what fit returns")
    return flows[1:]


def distillation(apply_fn: ApplyFn, *, distance: Distance | None = None) -> LossFn:
    """The loss of a one-step sampler, regressed on the pairs of a flow.

    `E distance(x0 + v(0, x0), x1)`, by default the squared distance averaged over the dimensions of x. Its minimiser is
    the flow's map, sampled by one Euler step, `sample(v, x0, RungeKutta("euler"), times=1)`.

    Args:
        apply_fn: the network, predicting velocities, best begun from the parameters of a reflowed one.
        distance: `distance(x, y) -> [batch]`, such as a perceptual one.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)` as from `flow_matching`. The batch holds pairs, `x0` and `x1`
        [batch, ...], and optionally `cond` and `weight`. Metrics are `loss` and `distance`, the unweighted one. With
        `key=None` the network runs with `train=False`.

    Raises:
        ValueError: when the loss is traced, if `x0` or `x1` is missing, `t` is given, or shapes do not fit.

    Example:
        >>> loss_fn = distillation(lambda params, t, x, cond, **_: params * x)
        >>> batch = {"x0": jnp.ones((2, 3)), "x1": 3 * jnp.ones((2, 3))}
        >>> float(loss_fn(1.0, None, batch)[0]), float(loss_fn(2.0, None, batch)[0])
        (1.0, 0.0)

    References:
        Liu et al. 2022 (arXiv:2209.03003).
    """
    check_network("apply_fn", apply_fn)
    times = times_within(None, (0.0, 1.0), "the pair")
    if distance is not None:
        check_function("distance", distance, "a function distance(x, y) -> [batch]", 2)

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params
        check_holds(batch, "x1")
        if "t" in batch:
            raise ValueError("distillation is for t = 0: take 't' out of the batch.")
        check_data("x1", batch["x1"])
        t = jnp.zeros(batch["x1"].shape[:1])
        pairs = draw_pairs(key, {**batch, "t": t}, None, paired, times)
        train = pairs.rngs is not None
        v = apply_fn(params, pairs.t, pairs.x0, pairs.cond, train=train, rngs=pairs.rngs)
        check_shape("x0", pairs.x0, pairs.x1, "x1")
        check_shape("what the network returns", v, pairs.x1, "x1")
        end = pairs.x0 + v.astype(pairs.x0.dtype)
        error = mean_over_event((end - pairs.x1) ** 2) if distance is None else distance(end, pairs.x1)
        check_numbers_of("distance(x, y)", error, pairs.x1, scalar=False)
        loss = (error if pairs.weight is None else pairs.weight * error).mean()
        return loss, {"loss": loss, "distance": error.mean()}

    return loss_fn
