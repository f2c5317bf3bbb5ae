"""An independent judge of conditional samples: a classifier that has only ever seen real images."""

from collections.abc import Callable

import numpy as np

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
