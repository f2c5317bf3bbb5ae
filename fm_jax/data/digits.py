"""The 8 x 8 handwritten digits that come inside scikit-learn: 1,797 real images, no download."""

from typing import Literal, get_args

import numpy as np

from fm_jax.checks import check_member
from fm_jax.data.images import ImageDataset

Split = Literal["train", "test"]
_NUM_TEST = 297
_LEVELS = 17


def load_digits(split: Split) -> ImageDataset:
    """Loads one split of scikit-learn's digits.

    Every sixth example of each digit, in the order of the file, is a test image: a split that is stratified, the same
    everywhere, and needs no random number.

    Args:
        split: `"train"` (1,500 images) or `"test"` (297).

    Returns:
        Images [n, 8, 8, 1] float32, the 17 grey levels evenly spaced in [-1, 1]; labels [n] int32.

    Raises:
        ValueError: if there is no such split.
        ImportError: if scikit-learn is not installed.

    References:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    check_member("split", split, get_args(Split))
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("load_digits needs scikit-learn: pip install 'fm_jax[experiments]'.") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)

    by_digit = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_digit[np.arange(_NUM_TEST) * len(labels) // _NUM_TEST]] = True
    chosen = is_test if split == "test" else ~is_test
    class_names = tuple(str(digit) for digit in range(10))
    return ImageDataset(images[chosen], labels[chosen].astype(np.int32), class_names, _LEVELS, (-1.0, 1.0))
