"""Images through an autoencoder and back: what is restored, how well, and the pictures of it."""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.data import Loaded
from experiments.lab.figures import save_sheet
from experiments.lab.judge import fit_classifier
from experiments.lab.perceptual import Fitted
from fm_jax.data.arrays import to_unit_range
from fm_jax.data.images import ImageDataset
from fm_jax.losses.autoencoder import gaussian_kl
from fm_jax.models.autoencoder import Autoencoder
from fm_jax.types import Array, Params

COLUMNS = 10
"""Of a picture."""
MOST_VALUES = 1024
"""In an image that a classifier of pixels judges."""


class Restored(NamedTuple):
    """Images through an autoencoder and back, by the means of their latents.

    `images` [n, h, w, c], clipped to [-1, 1]; `mean` and `variance` of the latents, [n, h', w', channels]; `kl` [n] in
    nats an image.
    """

    images: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    kl: np.ndarray


@functools.lru_cache(maxsize=4)
def _restorer(model: Autoencoder, decode: bool) -> Any:
    @jax.jit
    def function(params: Params, x: Array) -> tuple[Array, ...]:
        moments: Any = model.apply({"params": params}, x, method="encode")
        mean, log_variance = moments
        images: Any = model.apply({"params": params}, mean, method="decode") if decode else x
        return jnp.clip(images, -1, 1), mean, jnp.exp(log_variance), gaussian_kl(mean, log_variance)

    return function


def restore(model: Autoencoder, params: Params, x: np.ndarray, *, decode: bool = True, chunk: int = 64) -> Restored:
    """Images [n, h, w, c] in [-1, 1] there and back, a chunk at a time; without `decode` only there."""
    function, found = _restorer(model, decode), []
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        filled = part if len(part) == chunk else np.resize(part, (chunk, *part.shape[1:]))  # one size is compiled
        found.append([np.asarray(each)[: len(part)] for each in function(params, filled)])
    return Restored(*map(np.concatenate, zip(*found, strict=True)))


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """The mean over images of `-10 log10` of the mean squared error, dB; the range of pixels is 2."""
    error = np.square((x.astype(np.float64) - y) / 2).mean(axis=(1, 2, 3))
    return float(-10 * np.log10(np.maximum(error, 1e-12)).mean())


def some_images(dataset: ImageDataset, num: int) -> tuple[np.ndarray, Any]:
    """At most so many images, float32 in [-1, 1], drawn with a seed of their own, and their labels."""
    some = dataset.subset(np.sort(np.random.default_rng(0).permutation(len(dataset.images))[:num]))
    return to_unit_range(some.images[:], some.value_range), some.labels


def save_rows(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    """Rows of images, each above a row of what becomes of them."""
    shown = range(0, len(x) // COLUMNS * COLUMNS or len(x), COLUMNS)
    rows = [each[i : i + COLUMNS] for i in shown for each in (x, y)]
    channels = x.shape[-1] if x.shape[-1] in (1, 3) else 3 if x.shape[-1] > 3 else 1
    save_sheet(path, np.concatenate(rows)[..., :channels], columns=min(COLUMNS, len(x)))


def is_judged(loaded: Loaded) -> bool:
    """Whether a classifier of pixels is to name the decoded images: of small ones with classes, and some held out."""
    facts = loaded.facts
    several = loaded.train.labels is not None and len(np.unique(loaded.train.labels)) > 1
    return several and facts.num_test > 0 and math.prod(facts.shape) <= MOST_VALUES


def judge(model: Autoencoder, params: Params, loaded: Loaded, num: int, fitted: Fitted | None = None) -> dict[str, Any]:
    """How well images come back, and what their latents are like, by at most `num` images of each split.

    Errors are those of held-out images, or of training images where none are held out. The deviation of the latents is
    that of draws, over images, places and noise; the mean and variance are found in double precision.
    """
    x, labels = some_images(loaded.test or loaded.train, num)
    restored = restore(model, params, x)
    results: dict[str, Any] = {
        "judged_images": len(x),
        "held_out": loaded.test is not None,
        "psnr": psnr(x, restored.images),
        "absolute_error": float(np.abs(x - restored.images).mean(dtype=np.float64)),
        "kl": float(restored.kl.mean(dtype=np.float64)),
    }
    latents = restore(model, params, some_images(loaded.train, num)[0], decode=False)
    axes = (0, 1, 2)
    mean, noise = latents.mean.mean(axes, dtype=np.float64), latents.variance.mean(axes, dtype=np.float64)
    variance = latents.mean.astype(np.float64).var(axes) + noise  # of a draw, whose mean varies from image to image
    results["latent_mean"], results["latent_std"] = mean.tolist(), np.sqrt(variance).tolist()
    results["latent_noise"] = np.sqrt(noise).tolist()
    if is_judged(loaded):
        classify = fit_classifier(*some_images(loaded.train, 10_000))
        results["classifier_accuracy_on_real"] = float((classify(x) == labels).mean())
        results["classifier_accuracy"] = float((classify(restored.images) == labels).mean())
    if fitted is not None:
        results["features_accuracy_on_real"] = float((fitted.classify(x) == labels).mean())
    return results
