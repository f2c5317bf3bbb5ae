"""Learning-rate schedules and the default optimiser."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from fm_jax.checks import check_integer, check_member, check_number
from fm_jax.types import Params

Decay = Literal["constant", "cosine", "linear"]
"""How the learning rate goes on after its warm-up."""


def make_schedule(
    learning_rate: float, *, total_steps: int, warmup_steps: int = 0, decay: Decay = "constant"
) -> optax.Schedule:
    """Learning rate as a function of the step: a linear warm-up from 0, then constant, cosine or linear decay to 0.

    With s = (step - warmup_steps) / (total_steps - warmup_steps) the rate after warm-up is `learning_rate` times
    1, (1 + cos(pi s)) / 2 or 1 - s.

    Args:
        learning_rate: the peak, reached at `warmup_steps`.
        total_steps: where the decay ends.
        warmup_steps: length of the warm-up; 0 for none.
        decay: `"constant"`, `"cosine"` or `"linear"`.

    Returns:
        `schedule(step) -> rate`.

    Raises:
        ValueError: if a number is out of range or `decay` is unknown.

    Example:
        >>> schedule = make_schedule(0.1, total_steps=20, warmup_steps=10, decay="linear")
        >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 15, 20)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    check_member("decay", decay, get_args(Decay))
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_integer("total_steps", total_steps)
    check_integer("warmup_steps", warmup_steps, least=0)
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps must be less than {total_steps=}, got {warmup_steps}.")
    steps = total_steps - warmup_steps
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, steps),
        "linear": optax.linear_schedule(learning_rate, 0.0, steps),
    }[decay]
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), after], [warmup_steps])


def make_optimizer(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    decay: Decay = "constant",
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Adam with a schedule, clipping by the global norm and decoupled weight decay (AdamW).

    Args:
        learning_rate: peak of the schedule; see `make_schedule` for it and the next three.
        total_steps: where the decay ends.
        warmup_steps: length of the linear warm-up.
        decay: `"constant"`, `"cosine"` or `"linear"`.
        clip_norm: gradients longer than this are scaled back to it; `None` clips nothing.
        weight_decay: applied to leaves of rank 2 and more, hence not to biases and the scales of normalisation.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.

    Returns:
        An Optax gradient transformation.

    Raises:
        ValueError: if a number is out of range or `decay` is unknown.

    References:
        Kingma and Ba, "Adam", 2015, Algorithm 1. Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
        2019, Algorithm 2.
    """
    schedule = make_schedule(learning_rate, total_steps=total_steps, warmup_steps=warmup_steps, decay=decay)
    if clip_norm is not None:
        check_number("clip_norm", clip_norm, "(0, inf)")
    check_number("weight_decay", weight_decay, "[0, inf)")
    check_number("b1", b1, "[0, 1)")
    check_number("b2", b2, "[0, 1)")
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=_matrices))


def _matrices(params: Params) -> Params:
    def is_matrix(path: tuple, x: Any) -> bool:  # stacked blocks have an axis of layers, which is none of their own
        return jnp.ndim(x) - any(getattr(key, "key", None) == "blocks" for key in path) > 1

    return jax.tree_util.tree_map_with_path(is_matrix, params)
