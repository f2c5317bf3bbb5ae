"""Classifier-free guidance: by another velocity function, or by the same network under another condition."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_condition, check_function, check_shape, check_velocity, shown
from fm_jax.conditions import null_like
from fm_jax.guidance.rules import Extrapolate, Rule
from fm_jax.guidance.scale import ALWAYS, check_interval, check_scale, is_number, scale_at
from fm_jax.nfe import Counted, cost, domain_of, reach_of, total
from fm_jax.parameterization import velocity_fn
from fm_jax.shapes import expand_time, time_dtype
from fm_jax.types import Array, ArrayTree, Cond, Kind, ModelFn, Schedule, State, Time, VelocityFn

_EXTRAPOLATE = Extrapolate()
RULE = "a rule of guidance, such as Extrapolate()"


def classifier_free(
    v_cond: VelocityFn,
    v_uncond: VelocityFn,
    scale: ArrayTree,
    *,
    interval: tuple[float, float] = ALWAYS,
    rule: Rule = _EXTRAPOLATE,
) -> VelocityFn:
    """The guided velocity `v_u + scale (v_c - v_u)`, or another rule's, from two velocity functions.

    Any two will do. With a weaker model of the same data as `v_uncond`, smaller or less trained and under the same
    condition, this is autoguidance (Karras et al. 2024, arXiv:2406.02507).

    Notebooks: (6.4).

    Args:
        v_cond: conditional velocity function.
        v_uncond: unconditional velocity function.
        scale: a number, or [batch]. 1 is off (`v_cond` itself is returned for the number 1), 0 unconditional.
        interval: guidance only for t inside, `v_cond` alone outside, whatever the rule (Kynkaanniemi et al. 2024,
            arXiv:2404.07724). Both are evaluated everywhere. The velocity jumps at the ends: put them on the time grid.
        rule: how the two velocities become one: `Extrapolate`, `Rescale`, `ZeroStar`, `Projected` or your own.

    Returns:
        `v(t, x)`; a call of it costs what a call of both does.

    Raises:
        ValueError: if `scale` is not finite or has two axes, or `interval` is reversed or outside [0, 1]; when called,
            if `scale` is of another batch than `x`.

    Example:
        >>> v = classifier_free(lambda t, x: x, lambda t, x: 0 * x, 3.0)
        >>> v(0.5, jnp.ones((1, 2)))
        Array([[3., 3.]], dtype=float32)
    """
    check_velocity(v_cond, "v_cond")
    check_velocity(v_uncond, "v_uncond")
    check_scale(scale)
    check_interval(interval)
    check_function("rule", rule, RULE, 5)
    if is_number(scale, 1):
        return v_cond

    def guided(t: Time, x: State) -> State:
        scale_t = scale_at(scale, t, x, interval=interval, outside=1)
        conditional, unconditional = v_cond(t, x), v_uncond(t, x)
        check_shape("v_cond(t, x)", conditional, x)
        check_shape("v_uncond(t, x)", unconditional, x)
        velocity = rule(t, x, conditional, unconditional, scale_t)
        check_shape("what the rule returns", velocity, x)
        return velocity

    nfe = total(cost(v_cond), cost(v_uncond))
    return Counted(guided, nfe, domain_of(v_cond, v_uncond), reach_of(v_cond, v_uncond))


def classifier_free_batched(
    model_fn: ModelFn,
    kind: Kind,
    schedule: Schedule,
    cond: Cond,
    null_cond: Cond,
    scale: ArrayTree,
    *,
    interval: tuple[float, float] = ALWAYS,
    rule: Rule = _EXTRAPOLATE,
) -> VelocityFn:
    """`classifier_free` of one network under two conditions, both in one call of twice the batch.

    A negative condition, to be avoided, is given as `null_cond`: `v_negative + scale (v_cond - v_negative)`.

    Notebooks: (6.4).

    Args:
        model_fn: `model_fn(t, x, cond)`, with its parameters bound.
        kind: what it predicts.
        schedule: of the path it was trained on.
        cond: what to guide towards, a pytree of [batch, ...].
        null_cond: what stands for "no condition", as it was dropped in training (`fm_jax.conditions`): a pytree like
            `cond`, each leaf broadcast to that of `cond`, such as the number of the null class.
        scale: a number, or [batch]. 1 is off (`velocity_fn` under `cond` is returned for the number 1).
        interval: as in `classifier_free`.
        rule: as in `classifier_free`; it sees velocities, whatever the kind.

    Returns:
        `v(t, x)`; a call of it costs two network evaluations, or one where the scale is the number 1.

    Raises:
        ValueError: as `classifier_free`; if `cond` is `None`, `null_cond` does not fit it or `kind` is unknown.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> model_fn = lambda t, x, cond: x * cond[:, None]
        >>> v = classifier_free_batched(model_fn, "velocity", Linear(), jnp.array([1, 2]), 0, 3.0)
        >>> v(0.5, jnp.ones((2, 1)))
        Array([[3.],
               [6.]], dtype=float32)
    """
    check_scale(scale)
    check_interval(interval)
    check_function("rule", rule, RULE, 5)
    branches = _one_batch(model_fn, kind, schedule, [cond], null_cond)
    if is_number(scale, 1):
        return velocity_fn(model_fn, kind, schedule, cond)

    def guided(t: Time, x: State) -> State:
        scale_t = scale_at(scale, t, x, interval=interval, outside=1)
        conditional, unconditional = branches(t, x)
        velocity = rule(t, x, conditional, unconditional, scale_t)
        check_shape("what the rule returns", velocity, x)
        return velocity

    return Counted(guided, cost(branches), domain_of(branches), reach_of(branches))


def compose(
    model_fn: ModelFn,
    kind: Kind,
    schedule: Schedule,
    conds: Sequence[Cond],
    null_cond: Cond,
    scales: Sequence[ArrayTree],
    *,
    interval: tuple[float, float] = ALWAYS,
) -> VelocityFn:
    """Several conditions at once, `v_u + sum_i scale_i (v_i - v_u)`, all in one call of the network.

    Liu et al. 2022 (arXiv:2206.01714): a positive scale asks for its condition, a negative one for its contrary.

    Args:
        model_fn: `model_fn(t, x, cond)`, with its parameters bound.
        kind: what it predicts.
        schedule: of the path it was trained on.
        conds: the conditions, pytrees of [batch, ...] of one structure and shape.
        null_cond: what stands for "no condition", as in `classifier_free_batched`.
        scales: one for each condition, each a number or [batch].
        interval: guidance only for t inside. Outside, each scale is clipped to [-1, 1]: every condition still counts,
            and none is exaggerated; for one condition and a scale of at least 1 as in `classifier_free`.

    Returns:
        `v(t, x)`; a call of it costs one network evaluation more than there are conditions.

    Raises:
        ValueError: without conditions, if one is `None` or there are more or fewer scales; as
            `classifier_free_batched`.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> model_fn = Counted(lambda t, x, cond: x * cond[:, None], 1)
        >>> conds = [jnp.array([1, 2]), jnp.array([3, 3])]
        >>> v = compose(model_fn, "velocity", Linear(), conds, 0, [2.0, -1.0])
        >>> v(0.5, jnp.ones((2, 1))), v.nfe
        (Array([[-1.],
               [ 1.]], dtype=float32), 3)
    """
    scales = _checked_scales(conds, scales)
    check_interval(interval)
    branches = _one_batch(model_fn, kind, schedule, conds, null_cond)

    def guided(t: Time, x: State) -> State:
        *conditional, unconditional = branches(t, x)
        total = unconditional
        for scale, each in zip(scales, conditional, strict=True):
            clipped = jnp.clip(jnp.asarray(scale, dtype=time_dtype(x)), -1, 1)
            scale_t = scale_at(scale, t, x, interval=interval, outside=clipped)
            total = total + expand_time(scale_t, x) * (each - unconditional)
        return total

    return Counted(guided, cost(branches), domain_of(branches), reach_of(branches))


def nested(
    model_fn: ModelFn,
    kind: Kind,
    schedule: Schedule,
    conds: Sequence[Cond],
    null_cond: Cond,
    scales: Sequence[ArrayTree],
    *,
    interval: tuple[float, float] = ALWAYS,
) -> VelocityFn:
    """Conditions each of which adds to the one before, `v_0 + sum_i scale_i (v_i - v_{i-1})`, in one call.

    Each scale asks for what its condition adds to what was known already: with `conds = [image alone, image and text]`
    how faithful to the image, and how faithful to the text given the image. `fm_jax.conditions.without` makes the first
    of the second, `DropConditions` a network that knows both. Computed as `v_n + sum_i (scale_i - 1) (v_i - v_{i-1})`,
    so that scales of 1 are the velocity under the last condition, `v_n` of that call, to the bit.

    Notebooks: (13.8).

    Args:
        model_fn: `model_fn(t, x, cond)`, with its parameters bound.
        kind: what it predicts.
        schedule: of the path it was trained on.
        conds: the conditions, from the one that says least to the one that says all, pytrees of [batch, ...] of one
            structure and shape.
        null_cond: what stands for "no condition", `v_0`, as in `classifier_free_batched`.
        scales: one for each condition, each a number or [batch].
        interval: guidance only for t inside; the velocity under the last condition outside.

    Returns:
        `v(t, x)`; a call of it costs one network evaluation more than there are conditions, or one where all scales
        are the number 1 (`velocity_fn` under the last condition is returned).

    Raises:
        ValueError: as `compose`.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> model_fn = Counted(lambda t, x, cond: x * cond[:, None], 1)
        >>> v = nested(model_fn, "velocity", Linear(), [jnp.array([1, 2]), jnp.array([3, 3])], 0, [2.0, 5.0])
        >>> v(0.5, jnp.ones((2, 1))), v.nfe
        (Array([[12.],
               [ 9.]], dtype=float32), 3)

    References:
        Brooks et al. 2023, "InstructPix2Pix: Learning to Follow Image Editing Instructions", equation 3.
    """
    scales = _checked_scales(conds, scales)
    check_interval(interval)
    branches = _one_batch(model_fn, kind, schedule, conds, null_cond)
    if all(is_number(scale, 1) for scale in scales):
        return velocity_fn(model_fn, kind, schedule, conds[-1])

    def guided(t: Time, x: State) -> State:
        *conditional, unconditional = branches(t, x)
        velocity = conditional[-1]
        for scale, each, before in zip(scales, conditional, [unconditional, *conditional], strict=False):
            scale_t = scale_at(scale, t, x, interval=interval, outside=1)
            velocity = velocity + expand_time(scale_t - 1, x) * (each - before)
        return velocity

    return Counted(guided, cost(branches), domain_of(branches), reach_of(branches))


def _checked_scales(conds: Any, scales: Any) -> Sequence[ArrayTree]:
    """One scale for each condition, or `ValueError`."""
    scales = list(scales) if hasattr(scales, "shape") and np.ndim(scales) else scales
    for name, each in (("conds", conds), ("scales", scales)):
        if not isinstance(each, list | tuple):
            raise ValueError(f"{name} must be a list, with one for each condition, got {shown(each)}.")
    if len(conds) != len(scales) or len(conds) == 0:
        raise ValueError(
            f"conds and scales must be of one length, at least 1, got {len(conds)} conditions and {len(scales)} scales."
        )
    for scale in scales:
        check_scale(scale)
    return scales


def _one_batch(
    model_fn: ModelFn, kind: Kind, schedule: Schedule, conds: Sequence[Cond], null_cond: Cond
) -> Callable[[Array, Array], list[Array]]:
    """`branches(t, x)`: the velocities under each of `conds` and, last, `null_cond`, by one call of the network."""
    if any(cond is None for cond in conds):
        raise ValueError("cond must be given: classifier-free guidance needs a condition to guide towards.")
    nulls = null_like(conds[0], null_cond)
    for i, cond in enumerate(conds):
        if jax.tree.map(np.shape, cond) != jax.tree.map(np.shape, conds[0]):
            raise ValueError(f"conds must be of one structure and shape, got another in conds[{i}] than in conds[0].")
    num = len(conds) + 1
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conds, nulls)
    v = velocity_fn(model_fn, kind, schedule, stacked)

    def branches(t: Time, x: State) -> list[State]:
        check_condition(x, conds[0])
        repeated_t = t if jnp.ndim(t) == 0 else jnp.concatenate([t] * num)
        return jnp.split(v(repeated_t, jnp.concatenate([x] * num)), num)

    return Counted(branches, total(*[cost(model_fn)] * num), domain_of(v), reach_of(v))
