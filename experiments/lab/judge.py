"""Judges of samples: a classifier that has only ever seen real images, and the training images nearest to them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from fm_jax.data.arrays import to_unit_range
from fm_jax.data.images import ImageDataset
from fm_jax.models.compute import once
from fm_jax.models.layers import halve
from fm_jax.types import Params

Classify = Callable[[np.ndarray], np.ndarray]


def fit_classifier(
    images: np.ndarray, labels: np.ndarray, max_examples: int = 10_000, gamma: float | Literal["scale"] = "scale"
) -> Classify:
    """Fits a support vector machine with a Gaussian kernel to pixels.

    Args:
        images: [n, h, w, c], real training images in [-1, 1].
        labels: [n].
        max_examples: the first so many are used.
        gamma: of the kernel, `exp(-gamma |x - y|^2)`; by default one over the number of pixels and their variance.

    Returns:
        A function from images [m, h, w, c] to labels [m].
    """
    from sklearn.svm import SVC

    machine = SVC(C=10.0, gamma=gamma).fit(images[:max_examples].reshape(-1, images[0].size), labels[:max_examples])
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


class _Classifier(nn.Module):
    """Three convolutions and two layers: logits [n, classes] of pictures [n, h, w, c]."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(nn.Conv(24, (3, 3))(x))
        h = halve(h[:, : h.shape[1] // 2 * 2, : h.shape[2] // 2 * 2])
        h = nn.relu(nn.Conv(48, (3, 3))(h))
        h = nn.relu(nn.Conv(48, (3, 3))(h)).reshape(len(h), -1)
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(128)(h)))


def fit_network(
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], *, num_classes: int, seed: int, num_steps: int
) -> Classify:
    """Trains a small convolutional network on pictures without end.

    Args:
        draw: gives pictures [n, h, w, c], the same n each time, and labels [n].
        num_classes: of the labels.
        seed: of the network and of the pictures.
        num_steps: batches that it learns from, with Adam at a rate that falls along a cosine from 2e-3.

    Returns:
        A function from pictures [m, h, w, c] to labels [m].
    """
    rng, network = np.random.default_rng(seed), _Classifier(num_classes)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    x, _ = draw(rng)
    params = once(network.init)(jax.random.key(seed), x[:1])["params"]
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: Any, x: np.ndarray, y: np.ndarray) -> tuple[Params, Any]:
        def loss(params: Params) -> jax.Array:
            logits = network.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = step(params, state, *draw(rng))
    logits_of = jax.jit(lambda x: network.apply({"params": params}, x))
    return lambda x: np.asarray(logits_of(x)).argmax(axis=-1)
