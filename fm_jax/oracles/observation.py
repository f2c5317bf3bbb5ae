"""What is seen of a field: operators A for `y = A x1 + noise`, dense, [*grid_y, c_y, *grid, c].

Filling holes is `known_values`, super-resolution `block_means`, colouring `channel_means`, deblurring `blur`.
"""

import math

import numpy as np

from fm_jax.checks import check_integer, check_number, shown
from fm_jax.oracles.gaussian import as_numbers
from fm_jax.types import ArrayTree


def known_values(known: ArrayTree, channels: int = 1) -> np.ndarray:
    """What is known: y is x where it is known and 0 elsewhere, as an image with a hole.

    Args:
        known: which places are known, bool [*grid].
        channels: of x, all of which are known there.

    Returns:
        A [*grid, c, *grid, c].

    Raises:
        ValueError: unless `known` is bool and `channels` a positive integer.

    Example:
        >>> known_values(np.array([True, False]))[..., 0].tolist()
        [[[1.0, 0.0]], [[0.0, 0.0]]]
    """
    known = np.asarray(known)
    if known.dtype != bool or not known.ndim:
        raise ValueError(f"known must be bool [*grid], true where x is told, got {shown(known)}.")
    check_integer("channels", channels)
    return _dense(np.diag(known.ravel().astype(np.float64)), np.eye(channels), known.shape, known.shape)


def block_means(grid: tuple[int, ...], factor: int, channels: int = 1) -> np.ndarray:
    """A low resolution: y is the mean of x over blocks of `factor` points along each axis.

    Args:
        grid: points of x along each axis, divisible by `factor`.
        factor: how much lower the resolution is.
        channels: of x.

    Returns:
        A [*grid / factor, c, *grid, c].

    Raises:
        ValueError: unless `factor` divides every axis.

    Example:
        >>> block_means((4,), 2)[:, 0, :, 0].tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    grid = check_grid(grid)
    check_integer("factor", factor)
    check_integer("channels", channels)
    if any(size % factor for size in grid):
        raise ValueError(f"factor must divide the grid {grid}, got {factor}.")
    matrix: np.ndarray = np.ones((1, 1))
    for size in grid:
        matrix = np.kron(matrix, np.kron(np.eye(size // factor), np.full((1, factor), 1 / factor)))
    return _dense(matrix, np.eye(channels), tuple(size // factor for size in grid), grid)


def channel_means(grid: tuple[int, ...], channels: int, weights: ArrayTree | None = None) -> np.ndarray:
    """Grey: y is one channel, the mean of those of x.

    Args:
        grid: points along each axis.
        channels: of x.
        weights: of the channels, [c]; equal, with the sum 1, if `None`.

    Returns:
        A [*grid, 1, *grid, c].

    Raises:
        ValueError: unless there is a weight for each channel.

    Example:
        >>> channel_means((1,), 2).tolist()
        [[[[0.5, 0.5]]]]
    """
    grid = check_grid(grid)
    check_integer("channels", channels)
    weights = np.full(channels, 1 / channels) if weights is None else as_numbers("weights", weights)
    if weights.shape != (channels,):
        raise ValueError(f"weights must be [c] = [{channels}], got shape {weights.shape}.")
    return _dense(np.eye(math.prod(grid)), weights[None], grid, grid)


def blur(grid: tuple[int, ...], width: float, channels: int = 1) -> np.ndarray:
    """A blurred image: y is x, averaged with weights `exp(-r^2 / (2 width^2))`, r the distance on a periodic grid.

    Args:
        grid: points along each axis.
        width: standard deviation of the kernel, in points.
        channels: of x.

    Returns:
        A [*grid, c, *grid, c].

    Raises:
        ValueError: unless `width` is positive and finite.
    """
    grid = check_grid(grid)
    check_number("width", width, "(0, inf)")
    check_integer("channels", channels)
    matrix: np.ndarray = np.ones((1, 1))
    for size in grid:
        apart = abs(np.arange(size)[:, None] - np.arange(size)[None, :])
        kernel = np.exp(-0.5 * (np.minimum(apart, size - apart) / width) ** 2)
        matrix = np.kron(matrix, kernel / kernel.sum(axis=1, keepdims=True))
    return _dense(matrix, np.eye(channels), grid, grid)


def check_grid(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Raises `ValueError` for what is not the points along each axis."""
    if not isinstance(grid, tuple | list) or not grid:
        raise ValueError(f"grid must be the points along each axis, such as (8, 8), got {shown(grid)}.")
    for i, size in enumerate(grid):
        check_integer(f"grid[{i}]", size)
    return tuple(grid)


def _dense(in_space: np.ndarray, in_channels: np.ndarray, seen: tuple[int, ...], grid: tuple[int, ...]) -> np.ndarray:
    return np.kron(in_space, in_channels).reshape(*seen, in_channels.shape[0], *grid, in_channels.shape[1])
