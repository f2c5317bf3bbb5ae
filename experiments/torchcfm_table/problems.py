"""The columns of the table: from where to where, with training and test points.

Paper: Tong et al. 2023 (arXiv:2302.00482), and its published code for the numbers of points.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.data.toy import make_toy
from fm_jax.sources import Normal, Sampled
from fm_jax.types import Array, Key, Source


class Problem(NamedTuple):
    """From where to where; the source `None` is a standard normal."""

    source: str | None
    data: str


PROBLEMS = {
    "N to 8gaussians": Problem(None, "eight_gaussians"),
    "moons to 8gaussians": Problem("moons", "eight_gaussians"),
    "N to moons": Problem(None, "moons"),
    "N to s-curve": Problem(None, "s_curve"),
}
NUM_TRAIN = 10_000


class Splits(NamedTuple):
    """Training and test points, NumPy [n, 2]; `x0_train` is `None` where the source is a normal."""

    x0_train: np.ndarray | None
    x1_train: np.ndarray
    x0_test: np.ndarray
    x1_test: np.ndarray


def draw(toy: str | None, key: Key, num: int) -> Array:
    """Points [num, 2] of a toy distribution or, for `None`, of the standard normal."""
    return jax.random.normal(key, (num, 2)) if toy is None else make_toy(toy)(key, num)


def make_splits(problem: str, seed: int, num_test: int) -> Splits:
    """Training and test points, the same for all methods of a column and seed."""
    source, data = PROBLEMS[problem]
    key_x0, key_x1 = jax.random.split(jax.random.key(seed))
    x0, x1 = (np.asarray(draw(toy, key, NUM_TRAIN + num_test)) for toy, key in ((source, key_x0), (data, key_x1)))
    return Splits(None if source is None else x0[:NUM_TRAIN], x1[:NUM_TRAIN], x0[NUM_TRAIN:], x1[NUM_TRAIN:])


def draws(splits: Splits, batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of independent pairs of training points."""
    rng = np.random.default_rng(seed)
    while True:
        yield {"x0": _rows(splits.x0_train, rng, batch_size), "x1": _rows(splits.x1_train, rng, batch_size)}


def draws_of_pairs(x0: np.ndarray, x1: np.ndarray, batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of rows of `x0` with the same rows of `x1`."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(len(x1), size=batch_size)
        yield {"x0": x0[rows], "x1": x1[rows]}


def _rows(points: np.ndarray | None, rng: np.random.Generator, num: int) -> np.ndarray:
    return (
        rng.standard_normal((num, 2), dtype=np.float32)
        if points is None
        else points[rng.integers(len(points), size=num)]
    )


def source_of(splits: Splits) -> Source:
    """The training points, or the standard normal."""
    if splits.x0_train is None:
        return Normal()
    points = jnp.asarray(splits.x0_train)
    return Sampled(lambda key, num: points[jax.random.randint(key, (num,), 0, len(points))])
