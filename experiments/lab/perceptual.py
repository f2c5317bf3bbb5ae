"""Features that images are compared by beside their pixels: maps within a small classifier of the run's own images."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fm_jax.data.images import ImageDataset
from fm_jax.data.pipeline import batches
from fm_jax.types import Array, Key, Params

BATCH = 64
LEAST = 1e-6
"""Added to squared norms of features, of which a map may have none."""


class Classifier(nn.Module):
    """Convolutions with stride 2 and a linear layer.

    Attributes:
        num_classes: how many logits.
        widths: channels of each convolution.
    """

    num_classes: int
    widths: tuple[int, ...] = (16, 32)

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, tuple[Array, ...]]:
        """Maps [batch, h, w, c] to logits [batch, num_classes], and gives what each convolution gives."""
        maps = []
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
            maps.append(x)
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1)), tuple(maps)


class Fitted(NamedTuple):
    """A classifier that is frozen.

    `features(x)` are its maps, each pixel's channels of norm 1; `classify(x)` are classes.
    """

    features: Callable[[Array], tuple[Array, ...]]
    classify: Callable[[np.ndarray], np.ndarray]


def fit_features(key: Key, dataset: ImageDataset, *, num_steps: int, seed: int) -> Fitted:
    """Fits a classifier to the labels of a dataset, by Adam: the same one for the same arguments.

    Args:
        key: of its initial parameters.
        dataset: with labels of two classes or more.
        num_steps: of batches of 64.
        seed: of their order.
    """
    model = Classifier(dataset.num_classes)
    data = batches(dataset, batch_size=min(BATCH, len(dataset.images)), seed=seed, process_index=0, process_count=1)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

    @jax.jit
    def step(params: Params, state: optax.OptState, x: Array, labels: Array) -> tuple[Params, optax.OptState]:
        def loss(params: Params) -> Array:
            logits, _ = model.apply({"params": params}, x)  # type: ignore[misc]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = model.init(key, jnp.zeros((1, *dataset.images.shape[1:])))["params"]
    state = optimizer.init(params)
    for _ in range(num_steps):
        batch = next(data)
        params, state = step(params, state, batch["x1"], batch["cond"])
    params = jax.device_get(params)

    def features(x: Array) -> tuple[Array, ...]:
        _, maps = model.apply({"params": params}, x)  # type: ignore[misc]
        return tuple(each / jnp.sqrt((each**2).sum(axis=-1, keepdims=True) + LEAST) for each in maps)

    logits = jax.jit(lambda x: model.apply({"params": params}, x)[0])

    def classify(x: np.ndarray) -> np.ndarray:
        found = [np.asarray(logits(_filled(x[i : i + BATCH])))[: len(x) - i] for i in range(0, len(x), BATCH)]
        return np.concatenate(found).argmax(axis=1)

    return Fitted(features, classify)


def _filled(x: np.ndarray) -> np.ndarray:
    """A batch of the one size that is compiled."""
    return x if len(x) == BATCH else np.resize(x, (BATCH, *x.shape[1:]))
