"""What a training step reads and writes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fm_jax.checks import check_array, check_has, shown
from fm_jax.train.ema import check_decay
from fm_jax.types import Array, Params


class TrainState(NamedTuple):
    """The whole state of a run, save its key and its place in the data.

    `step` is an int32 scalar, the number of updates made; `ema` maps `str(decay)`, such as `"0.999"`, to averaged
    parameters.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    ema: dict[str, Params]


def check_train_state(name: str, state: Any) -> None:
    """Raises `ValueError` for what is no `TrainState`."""
    if not isinstance(state, TrainState):
        raise ValueError(f"{name} must be a TrainState, as create_state makes, got {shown(state)}.")


def create_state(
    params: Params, optimizer: optax.GradientTransformation, ema_decays: Sequence[float] = ()
) -> TrainState:
    """Builds the state at step 0; every average starts at the parameters.

    Args:
        params: any pytree of arrays. It is copied, so that donating the state leaves the caller's arrays alive.
        optimizer: as given to `make_step`.
        ema_decays: one average is kept for each.

    Returns:
        A `TrainState` no two of whose leaves share memory.

    Raises:
        ValueError: if a decay is not strictly between 0 and 1, or is given twice.

    Example:
        >>> state = create_state({"w": jnp.ones(2)}, optax.sgd(0.1), ema_decays=(0.9, 0.999))
        >>> sorted(state.ema)
        ['0.9', '0.999']
    """
    check_has("optimizer", optimizer, ("init", "update"), "an Optax transformation, such as optax.adam(1e-3)")
    if not isinstance(ema_decays, Sequence) or isinstance(ema_decays, str):
        raise ValueError(f"ema_decays must be a tuple, such as (0.999,), got {shown(ema_decays)}.")
    for i, decay in enumerate(ema_decays):
        check_decay(decay, f"ema_decays[{i}]")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"params must be a pytree of arrays, got {shown(params)}.")
    for path, leaf in leaves:
        name = "params" + jax.tree_util.keystr(path)
        check_array(name, leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(f"{name} must be floating point, to have a gradient, got {leaf.dtype}.")
    if len(set(ema_decays)) < len(ema_decays):
        raise ValueError(f"ema_decays must be distinct, got {tuple(ema_decays)}.")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=_copy(params),
        opt_state=_copy(optimizer.init(params)),
        ema={str(float(decay)): jax.tree.map(_average_of, params) for decay in ema_decays},
    )


def _copy(tree: Params) -> Params:
    # Naming the dtype also drops weak types, which would make the second step compile again.
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True), tree)


def _average_of(x: Array) -> Array:
    # In bfloat16 an update of relative size 1 - decay rounds to nothing.
    return jnp.array(x, dtype=jnp.promote_types(jnp.asarray(x).dtype, jnp.float32), copy=True)
