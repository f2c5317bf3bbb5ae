"""The floor of a metric: what it says of real data against real data, for want of more samples.

A distance between two finite samples is not 0 when both come from one distribution, and a model at that floor cannot be
told from the data. Path energy and straightness need none of this: W_2^2 and 0 bound them whatever the sample.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Real

from fm_jax.checks import check_array, check_data, check_function, check_integer, check_key, check_number
from fm_jax.metrics.wasserstein import wasserstein
from fm_jax.types import AnyArray, ArrayTree, Key

Distance: TypeAlias = Callable[[AnyArray, AnyArray], ArrayTree]
"""`metric(x [n, ...], y [n, ...]) -> number`, with its options bound by `functools.partial`."""
Draw: TypeAlias = Callable[[Key, int], AnyArray]
"""`draw(key, num) -> [num, ...]`, as in `fm_jax.data.toy`."""


class Floor(NamedTuple):
    """A metric over repeated pairs of real samples: mean, standard deviation, the values, and the size of a sample."""

    mean: float
    std: float
    values: np.ndarray
    num: int

    def __str__(self) -> str:
        return f"{_round(self.mean, self.std)} +- {_round(self.std, self.std)}, n = {self.num:,}"


class Measured(NamedTuple):
    """A metric of samples against real ones, beside its floor. Prints as `0.612 (floor 0.547 +- 0.127, n = 1,000)`."""

    value: float
    floor: Floor

    def __str__(self) -> str:
        return f"{_round(self.value, self.floor.std)} (floor {self.floor})"


def floor(metric: Distance, draw: Draw, key: Key, num: int, *, repeats: int = 20) -> Floor:
    """The metric between two samples of the target itself, of `num` examples each.

    Both halves of one draw of 2 num: independent where `draw` samples a distribution, disjoint where it picks from a
    data set without replacement, as `lambda key, num: jax.random.choice(key, data, (num,), replace=False)`.

    Args:
        metric: `metric(x, y)`, e.g. `wasserstein` or `functools.partial(mmd, bandwidths=1.0)`.
        draw: `draw(key, num) -> [num, ...]` from the target.
        key: PRNG key.
        num: examples in a sample. The floor is that of this number only.
        repeats: pairs of samples.

    Returns:
        `Floor`; its standard deviation is that of one value, not of the mean.

    Raises:
        ValueError: if `num` is less than 1 or `repeats` less than 2, or `draw` returns another number of examples.

    Example:
        >>> from fm_jax.data.toy import eight_gaussians
        >>> print(floor(wasserstein, eight_gaussians, jax.random.key(0), 50, repeats=5))
        1.678 +- 0.218, n = 50
    """
    _check(key, num, repeats, metric=metric, draw=draw)

    def value(key: Key) -> float:
        sample = _drawn(draw, key, 2 * num)
        return _number(metric(sample[:num], sample[num:]))

    return _summary([value(each) for each in jax.random.split(key, repeats)], num)


def measure(metric: Distance, draw: Draw, key: Key, x: Real[AnyArray, "num ..."], *, repeats: int = 20) -> Measured:
    """The metric between samples and a fresh draw of the target of the same size, beside its floor.

    Args:
        metric: `metric(x, y)`.
        draw: `draw(key, num) -> [num, ...]` from the target.
        key: PRNG key.
        x: samples to judge.
        repeats: pairs of samples for the floor.

    Returns:
        `Measured`, which prints with the floor.

    Raises:
        ValueError: as `floor`.
    """
    check_data("x", x)
    num = len(x)
    _check(key, num, repeats, metric=metric, draw=draw)
    key_y, key_floor = jax.random.split(key)
    value = _number(metric(x, _drawn(draw, key_y, num)))
    return Measured(value, floor(metric, draw, key_floor, num, repeats=repeats))


def normalised_path_energy_floor(draw_x0: Draw, draw_x1: Draw, key: Key, num: int, *, repeats: int = 20) -> Floor:
    """What `normalised_path_energy` is uncertain by, as it is computed from an estimate of W_2.

    `|A - B| / B` for two independent estimates A and B of W_2^2, each from `num` examples of the source and as many of
    the data. An optimal flow whose energy were known no better than W_2 would show as much; a difference below it says
    nothing. The bias of the estimates, which is common to both, is not in it.

    Args:
        draw_x0: `draw_x0(key, num) -> [num, ...]` from the source.
        draw_x1: the same from the data.
        key: PRNG key.
        num: examples in each sample.
        repeats: pairs of estimates.

    Returns:
        `Floor`.

    Raises:
        ValueError: as `floor`.
    """
    _check(key, num, repeats, draw_x0=draw_x0, draw_x1=draw_x1)

    def value(key: Key) -> float:
        key_x0, key_x1 = jax.random.split(key)
        x0, x1 = _drawn(draw_x0, key_x0, 2 * num), _drawn(draw_x1, key_x1, 2 * num)
        return abs((wasserstein(x0[:num], x1[:num]) / wasserstein(x0[num:], x1[num:])) ** 2 - 1)

    return _summary([value(each) for each in jax.random.split(key, repeats)], num)


def _check(key: Key, num: int, repeats: int, **functions: Callable) -> None:
    for name, function in functions.items():
        check_function(
            name, function, "a function (x, y) -> number" if name == "metric" else "a function (key, num)", 2
        )
    check_key(key)
    check_integer("num", num)
    check_integer("repeats", repeats, least=2)


def _number(value: ArrayTree) -> float:
    check_number("metric(x, y)", value, "(-inf, inf)")
    return float(value)


def _drawn(draw: Draw, key: Key, num: int) -> AnyArray:
    sample = draw(key, num)
    check_array("draw(key, num)", sample)
    if len(sample) != num:
        raise ValueError(f"draw(key, num) must return [num, ...] with num = {num}, got shape {sample.shape}.")
    return sample


def _summary(values: list[float], num: int) -> Floor:
    array = np.array(values)
    return Floor(float(array.mean()), float(array.std(ddof=1)), array, num)


def _round(value: float, std: float) -> str:
    """As many decimals as give the standard deviation three digits, so that what is printed lines up."""
    decimals = 2 - math.floor(math.log10(std)) if 0 < std < math.inf else 3
    return f"{value:,.{max(decimals, 0)}f}"
