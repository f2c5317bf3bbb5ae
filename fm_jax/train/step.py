"""One training step as one pure function of one device's share of the batch."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from fm_jax.checks import (
    check_array,
    check_bool,
    check_function,
    check_has,
    check_holds,
    check_integer,
    check_key,
    shown,
)
from fm_jax.train.ema import check_decay, update_ema
from fm_jax.train.state import TrainState
from fm_jax.types import Array, Batch, Key, LossFn, Metrics, Params

AXIS = "data"
"""The name of the device axis."""
Step: TypeAlias = Callable[[TrainState, Key, Batch], tuple[TrainState, Metrics]]


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_warmup: bool = True,
    accumulate: int = 1,
    axis_name: str | None = AXIS,
    target_ema: float | None = None,
) -> Step:
    """Builds `step(state, key, batch) -> (state, metrics)`, to be run by `fm_jax.train.parallel` or plain `jax.jit`.

    The loss sees `fold_in(fold_in(key, state.step), device index)`, so the same `key` serves the whole run, a
    resumed run draws what the unbroken one would, and no two devices draw the same noise. Gradients and metrics
    are averaged over devices.

    Notebooks: (11.3).

    Args:
        loss_fn: `(params, key, batch) -> (scalar, metrics)`, a mean over the batch.
        optimizer: any Optax transformation.
        ema_warmup: see `update_ema`.
        accumulate: the batch is cut into this many micro-batches, one in memory at a time, and their gradients
            are averaged. Each has its own key, and anything a loss does across its batch (minibatch
            optimal transport, say) stays within a micro-batch.
        axis_name: the device axis; `None` for a step without collectives, under plain `jax.jit`.
        target_ema: if given, the average of this decay is passed to the loss as `target_params`.

    Returns:
        The step. Its metrics are those of the loss and `loss`, `grad_norm` (before clipping), `update_norm` and
        `param_norm` (after the update); these four names win over the loss's own.

    Raises:
        ValueError: if `accumulate` is less than 1; when traced, if it does not divide the batch, or if the
            state keeps no average for `target_ema`.

    Example:
        >>> from fm_jax.train.state import create_state
        >>> def loss_fn(params, key, batch):
        ...     return jnp.mean((batch["x1"] - params) ** 2), {}
        >>> optimizer = optax.sgd(0.5)
        >>> step = jax.jit(make_step(loss_fn, optimizer, axis_name=None), donate_argnums=0)
        >>> state, metrics = step(create_state(jnp.zeros(()), optimizer), jax.random.key(0), {"x1": jnp.ones(8)})
        >>> float(state.params), float(metrics["loss"])
        (1.0, 1.0)
    """
    check_function("loss_fn", loss_fn, "a function loss_fn(params, key, batch), such as flow_matching(...)", 3)
    check_has("optimizer", optimizer, ("init", "update"), "an Optax transformation, such as optax.adam(1e-3)")
    check_bool("ema_warmup", ema_warmup)
    check_integer("accumulate", accumulate)
    if axis_name is not None and not isinstance(axis_name, str):
        raise ValueError(f"axis_name must be the name of a device axis, or None, got {shown(axis_name)}.")
    if target_ema is not None:
        check_decay(target_ema, "target_ema")

    def checked_loss(params: Params, key: Key, batch: Batch, **options: Params) -> tuple[Array, Metrics]:
        found = loss_fn(params, key, batch, **options)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
            raise ValueError(f"loss_fn must return (loss, metrics), a scalar and a dict, got {shown(found)}.")
        check_array("the loss", found[0])
        if found[0].shape or not jnp.issubdtype(found[0].dtype, jnp.floating):
            raise ValueError(f"the loss must be a floating-point scalar, got {shown(found[0])}.")
        return found

    def gradients(params: Params, key: Key, batch: Batch, options: dict) -> tuple[Params, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(checked_loss, has_aux=True)(params, key, batch, **options)
        return grads, {**metrics, "loss": loss}

    def accumulated(params: Params, key: Key, batch: Batch, options: dict) -> tuple[Params, Metrics]:
        def add(total, index_and_batch):
            index, micro = index_and_batch
            one = gradients(params, jax.random.fold_in(key, index), micro, options)
            return jax.tree.map(jnp.add, total, one), None

        micros = split_leading(batch, accumulate, "accumulate")
        shapes = jax.eval_shape(gradients, params, key, jax.tree.map(lambda x: x[0], micros), options)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        # A rolled loop keeps one micro-batch in memory and compiles its body once, but XLA's CPU backend
        # differentiates convolutions inside one some 50 times slower.
        unroll = accumulate if jax.default_backend() == "cpu" else 1
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), micros), unroll=unroll)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        check_has("state", state, ("step", "params", "opt_state", "ema"), "a TrainState, as from create_state")
        check_key(key)
        check_holds(batch)
        wanted, found = jax.eval_shape(optimizer.init, state.params), state.opt_state
        if jax.tree.structure(wanted) != jax.tree.structure(found):
            raise ValueError("state must come from create_state with the optimizer of the step, got another one's.")
        key = jax.random.fold_in(key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, _device_of(axis_name))
        options = {} if target_ema is None else {"target_params": _average(state, target_ema)}
        grads, metrics = (gradients if accumulate == 1 else accumulated)(state.params, key, batch, options)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            **metrics,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
        }
        ema = update_ema(state.ema, params, state.step, warmup=ema_warmup)
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    step.axis_name = axis_name  # type: ignore[attr-defined]
    return step


def _device_of(axis_name: str) -> Array:
    try:
        return jax.lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"the step averages over the device axis {axis_name!r}, and must run under pmap_step or shard_map_step: "
            "for plain jax.jit make it with axis_name=None."
        ) from None


def scan_steps(step: Step) -> Step:
    """Several steps in one `lax.scan`: each leaf of a batch has a leading axis of steps.

    The bits are those of one step at a time. It saves the dispatching, which is most of the time of a small network; on
    CPU gradients of convolutions are some 50 times slower in there.

    Args:
        step: from `make_step`.

    Returns:
        `steps(state, key, batches) -> (state, metrics)`, the metrics those of the last step.

    Example:
        >>> from fm_jax.train.state import create_state
        >>> def loss_fn(params, key, batch):
        ...     return jnp.mean((batch["x1"] - params) ** 2), {}
        >>> optimizer = optax.sgd(0.25)
        >>> steps = jax.jit(scan_steps(make_step(loss_fn, optimizer, axis_name=None)))
        >>> state, _ = steps(create_state(jnp.zeros(()), optimizer), jax.random.key(0), {"x1": jnp.ones((3, 8))})
        >>> int(state.step), float(state.params)
        (3, 0.875)
    """
    check_function("step", step, "a step(state, key, batch), as from make_step", 3)

    def steps(state: TrainState, key: Key, batches: Batch) -> tuple[TrainState, Metrics]:
        check_holds(batches)
        state, metrics = jax.lax.scan(lambda state, batch: step(state, key, batch), state, batches)
        return state, jax.tree.map(lambda x: x[-1], metrics)

    steps.axis_name = getattr(step, "axis_name", None)  # type: ignore[attr-defined]
    return steps


def split_leading(batch: Batch, parts: int, name: str, axis: int = 0) -> Batch:
    """Reshapes every leaf [b, ...] to [parts, b / parts, ...]; `name` says in the error what `parts` is.

    With `axis=1` it is [steps, b, ...] that becomes [steps, parts, b / parts, ...].
    """

    def split(path, x):
        check_array(f"{jax.tree_util.keystr(path, simple=True, separator='.')!r} of the batch", x)
        if x.ndim <= axis or x.shape[axis] % parts:
            leaf = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{name}={parts} must divide the batch axis of {leaf!r}, which has shape {x.shape}.")
        return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])

    return jax.tree_util.tree_map_with_path(split, batch)


def _average(state: TrainState, decay: float) -> Params:
    if str(float(decay)) not in state.ema:
        raise ValueError(f"target_ema={decay} must be one of the state's averages, {sorted(state.ema)}.")
    return state.ema[str(float(decay))]
