"""Judges of samples: a classifier that has only ever seen real images, and the training images nearest to them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fm_jax.data.arrays import to_unit_range
from fm_jax.data.images import ImageDataset

Classify = Callable[[np.ndarray], np.ndarray]


def fit_classifier(images: np.ndarray, labels: np.ndarray, max_examples: int = 10_000) -> Classify:
    """Fits a support vector machine with a Gaussian kernel to pixels.

    Args:
        images: [n, h, w, c], real training images in [-1, 1].
        labels: [n].
        max_examples: the first so many are used.

    Returns:
        A function from images [m, h, w, c] to labels [m].
    """
    from sklearn.svm import SVC

    machine = SVC(C=10.0).fit(images[:max_examples].reshape(-1, images[0].size), labels[:max_examples])
    return lambda x: machine.predict(np.asarray(x).reshape(len(x), -1).clip(-1, 1))


class Nearest(NamedTuple):
    """Of each of n images those k training images that are nearest to it, the nearest first."""

    indices: np.ndarray
    """[n, k]"""
    distances: np.ndarray
    """[n, k], root mean squared differences of pixels in [-1, 1]."""


def nearest(images: np.ndarray, dataset: ImageDataset, num: int = 3, chunk: int = 2048) -> Nearest:
    """The training images nearest to some others, by the Euclidean distance of their pixels.

    Args:
        images: [n, h, w, c], as they are trained on.
        dataset: the training images; all are read, a chunk at a time.
        num: how many of each.
        chunk: images in memory at a time.
    """
    x = np.asarray(images, np.float32).reshape(len(images), -1)
    num = min(num, len(dataset.images))
    indices, squares = np.zeros((len(x), 0), int), np.zeros((len(x), 0), np.float32)
    for start in range(0, len(dataset.images), chunk):
        part = np.asarray(dataset.images[start : start + chunk])
        y = to_unit_range(part, dataset.value_range).reshape(len(part), -1)
        found = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)[None]
        squares = np.concatenate([squares, found], axis=1)
        indices = np.concatenate([indices, np.broadcast_to(np.arange(start, start + len(y)), found.shape)], axis=1)
        order = np.argsort(squares, axis=1, kind="stable")[:, :num]
        squares, indices = np.take_along_axis(squares, order, 1), np.take_along_axis(indices, order, 1)
    return Nearest(indices, np.sqrt(np.maximum(squares, 0) / x.shape[1]))
