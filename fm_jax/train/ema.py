"""Exponential moving averages of the parameters."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_number, is_traced, shown
from fm_jax.types import Array, Params


def check_decay(decay: float, name: str) -> None:
    """Raises `ValueError` unless `decay` lies strictly between 0 and 1."""
    check_number(name, decay, "(0, 1)")


def update_ema(ema: dict[str, Params], params: Params, step: Array, *, warmup: bool = True) -> dict[str, Params]:
    """Moves every average towards the parameters.

        ema <- ema + (1 - decay_t) (params - ema),    decay_t = min(decay, (1 + step) / (10 + step))

    The warm-up forgets the initial parameters within tens of steps however slow the average; without it
    `decay_t = decay`.

    Args:
        ema: `str(decay)` -> averaged parameters, as in `TrainState.ema`.
        params: the parameters after the update.
        step: scalar, the number of updates made before this one.
        warmup: whether `decay_t` starts low.

    Returns:
        The new averages, in the dtypes of the old.

    Example:
        >>> update_ema({"0.75": jnp.zeros(())}, jnp.ones(()), jnp.zeros((), jnp.int32), warmup=False)
        {'0.75': Array(0.25, dtype=float32)}
    """
    if not isinstance(ema, Mapping):
        raise ValueError(f"ema must be a dict of averages by their decays, as in TrainState, got {shown(ema)}.")
    check_bool("warmup", warmup)
    if not is_traced(step):
        check_number("step", step, "[0, inf)")
    step = jnp.asarray(step, jnp.float32)
    averages = {}
    for name, average in ema.items():
        decay = jnp.minimum(float(name), (1.0 + step) / (10.0 + step)) if warmup else jnp.float32(name)
        averages[name] = jax.tree.map(lambda e, p, d=decay: (e + (1.0 - d) * (p - e)).astype(e.dtype), average, params)
    return averages
