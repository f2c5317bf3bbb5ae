import sys

import numpy as np
import pytest

from fm_jax.data.digits import load_digits


@pytest.fixture(scope="module")
def splits():
    pytest.importorskip("sklearn")
    return load_digits("train"), load_digits("test")


def test_shapes_dtypes_and_values(splits):
    for dataset, num in zip(splits, (1500, 297), strict=True):
        assert dataset.images.shape == (num, 8, 8, 1)
        assert dataset.images.dtype == np.float32
        assert dataset.labels.shape == (num,)
        assert dataset.labels.dtype == np.int32
        assert (dataset.num_classes, dataset.levels, dataset.class_names[3]) == (10, 17, "3")
        np.testing.assert_array_equal(np.unique(dataset.images), np.linspace(-1, 1, 17))


def test_splits_partition_the_file(splits):
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    both = np.concatenate([np.c_[(s.images.reshape(len(s.images), 64) + 1) * 8, s.labels] for s in splits])
    expected = np.c_[pixels, labels]
    np.testing.assert_array_equal(both[np.lexsort(both.T)], expected[np.lexsort(expected.T)])


def test_split_is_stratified(splits):
    train, test = (np.bincount(dataset.labels) for dataset in splits)
    assert np.abs(test - (train + test) * 297 / 1797).max() < 1


def test_same_every_time(splits):
    np.testing.assert_array_equal(load_digits("test").images, splits[1].images)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'test', got 'valid'\."):
        load_digits("valid")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"fm_jax\[experiments\]"):
        load_digits("train")
