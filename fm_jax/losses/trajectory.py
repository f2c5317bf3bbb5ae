"""Flow matching through several marginals: snapshots of a population, each drawn at its own time."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Real

from fm_jax.checks import (
    check_condition,
    check_coupling,
    check_data,
    check_has,
    check_holds,
    check_key,
    check_network,
)
from fm_jax.conditions import Drop
from fm_jax.couplings import independent
from fm_jax.losses.matching import (
    Pairs,
    Times,
    check_drop,
    check_pairing,
    check_weight,
    dropped,
    product,
    squared_error,
    times_within,
)
from fm_jax.paths.spline import SplinePath
from fm_jax.types import (
    AnyArray,
    ApplyFn,
    Array,
    Batch,
    Cond,
    Coupling,
    Key,
    LossFn,
    Metrics,
    Params,
    Scalar,
    TimeSampler,
)

Snapshots: TypeAlias = Real[AnyArray, "batch snapshots *event"]


class Chain(NamedTuple):
    """Snapshots coupled into trajectories: `x[i]` [K, ...] goes with `cond[i]`.

    `indices` [batch, K] say where each snapshot came from, `x[i, k] == x_before[indices[i, k], k]`, a permutation for
    each k; `weight` [batch] is the product of the couplings' weights, `None` if they have none.
    """

    x: Array
    indices: Array
    weight: Array | None


def couple_snapshots(coupling: Coupling, key: Key | None, x: Snapshots, cond: Cond = None) -> Chain:
    """Couples each snapshot with the next: under a Markov chain of optimal couplings, trajectories.

    It goes backward from the last snapshot, which stays in place with its conditions, as data do in a coupling.

    Args:
        coupling: of consecutive snapshots.
        key: typed key, or `None` for couplings that are not random.
        x: snapshots; the examples of different snapshots need not belong together.
        cond: [batch, ...] or `None`. An example has one for all of its snapshots.

    Returns:
        `Chain`. Nothing is dropped or repeated.

    Raises:
        ValueError: unless `x` has at least two snapshots, or where the coupling does.

    Example:
        >>> from fm_jax.couplings import minibatch_ot
        >>> x = jnp.array([[[0.0], [5.0], [0.2]], [[4.0], [1.0], [6.0]]])  # two examples, three snapshots
        >>> couple_snapshots(minibatch_ot, None, x).x[..., 0]
        Array([[0. , 1. , 0.2],
               [4. , 5. , 6. ]], dtype=float32)
    """
    check_coupling(coupling)
    if key is not None:
        check_key(key)
    check_data("x", x)
    check_condition(x, cond)
    if x.ndim < 2 or x.shape[1] < 2:
        raise ValueError(f"x must be [batch, K, ...] with K >= 2 snapshots, got shape {x.shape}.")
    links = x.shape[1] - 1
    keys: Any = [None] * links if key is None else jax.random.split(key, links)
    coupled, indices, weight = [x[:, -1]], [jnp.arange(len(x))], None
    for k in reversed(range(links)):
        pairing = coupling(keys[k], x[:, k], coupled[0], cond)
        check_pairing(pairing, coupled[0])
        coupled.insert(0, pairing.x0)
        indices.insert(0, pairing.index0)
        weight = product(weight, pairing.weight)
    return Chain(jnp.stack(coupled, axis=1), jnp.stack(indices, axis=1), weight)


def trajectory_matching(
    apply_fn: ApplyFn,
    path: SplinePath,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    drop: Drop | None = None,
) -> LossFn:
    """Flow matching on curves through coupled snapshots: a flow from the first marginal through all of the others.

    `E |f(t, x_t, cond) - u_t|^2`, averaged over the dimensions of x, with x_t on the spline through a chain of
    snapshots. Where sigma of the path is 0, the flow's marginal at the k-th knot is that of the k-th snapshot.

    Args:
        apply_fn: the network, `apply_fn(params, t, x, cond, train=, rngs=)`.
        path: the spline, with its knots.
        coupling: of consecutive snapshots; `paired` if the data are trajectories.
        time_sampler: training times; `None` is uniform on [0, 1].
        drop: takes conditions away from some examples, as in `flow_matching`.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)`, pure, for `jax.value_and_grad(loss_fn, has_aux=True)`. The
        batch is a dict: `x` [batch, K, ...], where `x[:, k]` are draws at the k-th knot; optional `cond`, `t` [batch]
        and `weight` [batch]. Metrics are `loss` and `mse`, the unweighted error. With `key=None`, nothing may be
        random: `t` must be in the batch, no condition is dropped, and the network runs with `train=False`.

    Raises:
        ValueError: if `path` has no knots or `time_sampler` leaves [0, 1]; when the loss is traced, if the batch has
            no `x` or its shapes do not fit.

    References:
        Tong et al. 2020 (arXiv:2002.04461) for the problem; Tong et al. 2023 (arXiv:2302.00482).
    """
    check_network("apply_fn", apply_fn)
    check_has("the path", path, ("times", "weights"), "a SplinePath")
    check_coupling(coupling)
    check_drop(drop)
    times = times_within(time_sampler, path.target_domain("velocity"), f"the velocity of {path}")

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params
        pairs, x = _draw(key, batch, coupling, times, drop)
        sample = path.sample(pairs.key_path, pairs.t, x)
        mse = squared_error(apply_fn, params, sample, pairs, path.targets(sample)["velocity"])
        loss = (mse if pairs.weight is None else pairs.weight * mse).mean()
        return loss, {"loss": loss, "mse": mse.mean()}

    return loss_fn


def _draw(key: Key | None, batch: Batch, coupling: Coupling, times: Times, drop: Drop | None) -> tuple[Pairs, Array]:
    """What else than the path is random, and the coupled snapshots [batch, K, ...]."""
    check_holds(batch, "x")
    x = batch["x"]
    check_data("x", x)
    if key is not None:
        check_key(key)
    if key is None and batch.get("t") is None:
        raise ValueError("without a key the batch must hold 't'.")
    keys: Any = [None] * 5 if key is None else jax.random.split(key, 5)
    key_t, key_coupling, key_path, key_dropout, key_drop = keys
    t = times.of(key_t, batch, x)
    check_weight(batch, x)
    check_condition(x, batch.get("cond"))
    chain = couple_snapshots(coupling, key_coupling, x, batch.get("cond"))
    weight = product(batch.get("weight"), chain.weight)
    rngs = None if key is None else {"dropout": key_dropout}
    x, cond = chain.x, dropped(drop, key_drop, batch.get("cond"))
    return Pairs(x[:, 0], x[:, -1], cond, weight, t, key_path, rngs), x
