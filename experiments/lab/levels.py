"""Pixels as tokens: so many even levels from black to white, and back."""

import numpy as np


def to_levels(pixels: np.ndarray, levels: int) -> np.ndarray:
    """The nearest of so many even levels, int32 from 0 to `levels` - 1, of pixels in [-1, 1]; the upper one of two.

    Example:
        >>> to_levels(np.array([-1.0, -0.1, 0.0, 1.0]), 2)
        array([0, 0, 1, 1], dtype=int32)
    """
    return np.clip(np.floor((pixels + 1) / 2 * (levels - 1) + 0.5), 0, levels - 1).astype(np.int32)


def to_pixels(tokens: np.ndarray, levels: int) -> np.ndarray:
    """The pixels float32 in [-1, 1] that levels stand for.

    Example:
        >>> to_pixels(np.array([0, 1, 2]), 3)
        array([-1.,  0.,  1.], dtype=float32)
    """
    return (2 * np.asarray(tokens, np.float64) / (levels - 1) - 1).astype(np.float32)
