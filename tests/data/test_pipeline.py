import itertools
import json
import re
import sys
import threading
import time

import numpy as np
import pytest

from fm_jax.data.images import ImageDataset, to_float
from fm_jax.data.pipeline import batches

pytest.importorskip("grain")
ONE = {"process_index": 0, "process_count": 1}


def _dataset(num=24, shape=(2, 4, 1)):
    """Images that name themselves: the pixels of image i begin with i."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num, *shape), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(num)
    return ImageDataset(images, np.arange(num, dtype=np.int32), tuple(map(str, range(num))))


def _take(iterator, num):
    return list(itertools.islice(iterator, num))


def _labels(iterator, num):
    return np.concatenate([batch["cond"] for batch in _take(iterator, num)])


def _assert_equal(a, b):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left["x1"], right["x1"])
        np.testing.assert_array_equal(left["cond"], right["cond"])


def test_batches_are_images_with_their_labels():
    dataset = _dataset()
    for batch in _take(batches(dataset, batch_size=5, seed=0, **ONE), 10):
        assert batch["x1"].dtype == np.float32
        assert batch["cond"].dtype == np.int32
        np.testing.assert_array_equal(batch["x1"], to_float(dataset.images[batch["cond"]]))


@pytest.mark.parametrize("batch_size", [1, 6, 7, 23, 24])
def test_every_epoch_has_each_example_once(batch_size):
    """Also where the batch size does not divide 24: batches run across the border and nothing is dropped."""
    epochs = 5
    labels = _labels(batches(_dataset(), batch_size=batch_size, seed=3, **ONE), -(-epochs * 24 // batch_size))
    orders = labels[: epochs * 24].reshape(epochs, 24)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(24), (epochs, 1)))
    assert len({tuple(order) for order in orders}) == epochs
    assert tuple(range(24)) not in map(tuple, orders)


def test_seed_decides():
    options = {"batch_size": 6, "flip": True, "dequantize": True, **ONE}
    first, again, other = (_take(batches(_dataset(), seed=seed, **options), 9) for seed in (0, 0, 1))
    _assert_equal(first, again)
    assert not np.array_equal(first[0]["cond"], other[0]["cond"])
    # The next seed is not the same run one epoch later.
    assert not np.array_equal(first[4]["cond"], other[0]["cond"])


def test_global_random_state_does_not_matter():
    options = {"batch_size": 6, "seed": 0, "flip": True, "dequantize": True, **ONE}
    np.random.seed(0)  # noqa: NPY002
    first = _take(batches(_dataset(), **options), 2)
    np.random.seed(1)  # noqa: NPY002
    _assert_equal(first, _take(batches(_dataset(), **options), 2))


@pytest.mark.parametrize("consumed", [0, 1, 5, 13])
def test_resumes_bit_identically(consumed):
    options = {"batch_size": 7, "seed": 11, "flip": True, "dequantize": True, **ONE}
    iterator = batches(_dataset(), **options)
    _take(iterator, consumed)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _take(iterator, 6)

    fresh = batches(_dataset(), **options)
    _take(fresh, 2)
    fresh.set_state(state)
    _assert_equal(_take(fresh, 6), expected)
    iterator.set_state(state)
    _assert_equal(_take(iterator, 6), expected)


def test_processes_are_disjoint_and_complete():
    shards = [
        _labels(batches(_dataset(), batch_size=4, seed=5, process_index=p, process_count=3), 4).reshape(2, 8)
        for p in range(3)
    ]
    for epoch in range(2):
        together = np.concatenate([shard[epoch] for shard in shards])
        np.testing.assert_array_equal(np.sort(together), np.arange(24))


def _shares(dataset, batch_size, process_count, **options):
    """The iterators of all processes that train on `batch_size` examples together."""
    options = {"batch_size": batch_size // process_count, "seed": 5, "process_count": process_count} | options
    return [batches(dataset, process_index=p, **options) for p in range(process_count)]


def _together(shares, num):
    """The next `num` steps, each the rows of all processes one after the other."""
    steps = zip(*(_take(share, num) for share in shares), strict=True)
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in steps]


OPTIONS = [{"flip": flip, "dequantize": dequantize} for flip in (False, True) for dequantize in (False, True)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("process_count", [2, 4])
def test_rows_of_all_processes_are_those_of_one(process_count, options):
    """Also in batches of 20 that run across the borders of epochs of 24, within a process's rows and between them."""
    expected = _together(_shares(_dataset(), 20, 1, **options), 12)
    _assert_equal(_together(_shares(_dataset(), 20, process_count, **options), 12), expected)
    epochs = np.concatenate([step["cond"] for step in expected]).reshape(10, 24)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(24), (10, 1)))


def test_an_example_of_the_order_does_not_depend_on_the_batch_size():
    options = {"flip": True, "dequantize": True}
    by_twenty, by_three = (_together(_shares(_dataset(), size, 1, **options), 60 // size) for size in (20, 3))
    for name in ("x1", "cond"):
        np.testing.assert_array_equal(*(np.concatenate([b[name] for b in each]) for each in (by_twenty, by_three)))


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_position_is_that_of_any_number_of_processes(before, after):
    options = {"flip": True, "dequantize": True}
    shares = _shares(_dataset(), 20, before, **options)
    _together(shares, 7)
    states = [json.dumps(share.get_state()) for share in shares]
    assert set(states) == {json.dumps({"next_index": 7})}
    resumed = _shares(_dataset(), 20, after, **options)
    for share in resumed:
        share.set_state(json.loads(states[0]))
    _assert_equal(_together(resumed, 6), _together(_shares(_dataset(), 20, 1, **options), 13)[7:])


def test_processes_default_to_jax(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    expected = batches(_dataset(), batch_size=5, seed=5, process_index=1, process_count=2)
    _assert_equal(_take(batches(_dataset(), batch_size=5, seed=5), 3), _take(expected, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_flip_mirrors_half_of_the_images(channels, kind):
    dataset = _dataset(shape=(2, 4, channels))
    plain = to_float(dataset.images)
    flipped = dataset._replace(images=dataset.images if kind == np.uint8 else plain.copy())
    flips = []
    for batch in _take(batches(flipped, batch_size=24, seed=0, flip=True, **ONE), 50):
        expected = plain[batch["cond"]]
        is_plain = (batch["x1"] == expected).all(axis=(1, 2, 3))
        is_mirrored = (batch["x1"] == expected[:, :, ::-1]).all(axis=(1, 2, 3))
        assert (is_plain ^ is_mirrored).all()
        flips.append(is_mirrored)
    # 1,200 fair coins: five standard deviations; so are neighbours, of the order and of an epoch.
    flips = np.array(flips) - 0.5
    assert abs(flips.mean()) < 5 * 0.5 / np.sqrt(1200)
    order = flips.ravel()
    for neighbours in (order[1:] * order[:-1], flips[1:] * flips[:-1]):
        assert abs(neighbours.mean()) < 5 * 0.25 / np.sqrt(neighbours.size)
    np.testing.assert_array_equal(flipped.images, dataset.images if kind == np.uint8 else plain)


def test_images_may_be_a_transposed_view():
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 4, 2), dtype=np.uint8).transpose(0, 2, 3, 1)
    options = {"batch_size": 7, "seed": 0, "flip": True, "dequantize": True, **ONE}
    view, copy = (_dataset()._replace(images=each) for each in (images, np.ascontiguousarray(images)))
    _assert_equal(*(_take(batches(each, **options), 5) for each in (view, copy)))


def test_dequantisation_fills_each_bin_uniformly():
    dataset = _dataset(num=64, shape=(16, 16, 3))
    noise = []
    for batch in _take(batches(dataset, batch_size=64, seed=0, dequantize=True, **ONE), 10):
        assert batch["x1"].dtype == np.float32
        assert -1 < batch["x1"].min() < batch["x1"].max() < 1
        position = (batch["x1"].astype(np.float64) + 1) * 128
        np.testing.assert_array_equal(np.floor(position), dataset.images[batch["cond"]])
        noise.append(position % 1)
    u = np.stack(noise).ravel()
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * len(u))
    counts, _ = np.histogram(u, bins=16, range=(0, 1))
    # Chi-square with 15 degrees of freedom: above 44.3 with probability 1e-4.
    assert ((counts - len(u) / 16) ** 2 / (len(u) / 16)).sum() < 44.3
    # Neighbouring batches, examples, channels, and pixels.
    for axis in range(5):
        a, b = (np.delete(np.stack(noise), end, axis=axis).ravel() for end in (0, -1))
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)


def test_flips_and_noise_are_independent():
    options = {"batch_size": 64, "seed": 0, "flip": True, **ONE}
    flipped, noise = [], []
    dataset = _dataset(num=64, shape=(2, 4, 1))
    for plain, batch in zip(
        *(_take(batches(dataset, dequantize=on, **options), 40) for on in (False, True)), strict=True
    ):
        flipped.append((plain["x1"] != to_float(dataset.images[plain["cond"]])).any(axis=(1, 2, 3)))
        noise.append((batch["x1"].astype(np.float64) + 1) * 128 % 1)
    flips, u = np.concatenate(flipped), np.concatenate(noise).reshape(-1, 8)
    # Of each of the 8 pixels: five standard deviations.
    assert (np.abs(np.corrcoef(flips, u, rowvar=False)[0, 1:]) < 5 / np.sqrt(len(u))).all()
    # Nor are they two readings of the same random bytes, of which a flip takes one and a pixel two.
    odd = flips[1::2]
    assert abs(np.corrcoef(odd, u.ravel()[: len(odd)])[0, 1]) < 5 / np.sqrt(len(odd))


def test_float_images_pass_unchanged_and_dequantise_by_their_levels():
    levels = np.random.default_rng(0).integers(0, 17, (30, 8, 8, 1))
    dataset = ImageDataset(
        (levels / 8 - 1).astype(np.float32), np.arange(30, dtype=np.int32), tuple(map(str, range(30))), 17
    )
    batch = next(batches(dataset, batch_size=30, seed=0, **ONE))
    np.testing.assert_array_equal(batch["x1"], dataset.images[batch["cond"]])
    batch = next(batches(dataset, batch_size=30, seed=0, dequantize=True, **ONE))
    np.testing.assert_array_equal(np.floor((batch["x1"].astype(np.float64) + 1) * 8.5), levels[batch["cond"]])


def test_no_threads_are_started():
    before = threading.active_count()
    _take(batches(_dataset(), batch_size=4, seed=0, **ONE), 20)
    assert threading.active_count() == before


def test_overhead_is_small():
    iterator = batches(_dataset(256, (28, 28, 1)), batch_size=128, seed=0, flip=True, dequantize=True, **ONE)
    _take(iterator, 3)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        next(iterator)
        times.append(time.perf_counter() - start)
    # 0.4 ms measured; the best of 30, so that a busy machine does not fail it.
    assert min(times) < 5e-3


GOOD = _dataset()


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (GOOD, {"batch_size": 0}, "batch_size must be at least 1, got 0."),
        (GOOD, {"batch_size": 25}, "batch_size must be at most 24, the 24 examples over 1 process(es), got 25."),
        (GOOD, {"batch_size": 9, "process_count": 3}, "batch_size must be at most 8, the 24 examples over 3 process"),
        (GOOD, {"process_index": 2, "process_count": 2}, "process_index must be from 0 to 1, got 2."),
        (GOOD, {"seed": -1}, "seed must be from 0 to 4294967295, got -1."),
        (GOOD._replace(images=GOOD.images[..., 0]), {}, "images must be [n, h, w, c], got shape (24, 2, 4)."),
        (GOOD._replace(images=GOOD.images.astype(np.int64)), {}, "images must be uint8 or float32, got int64."),
        (GOOD._replace(labels=GOOD.labels[:5]), {}, "labels must be [n] = (24,) integers, got int32 (5,)."),
        (GOOD._replace(labels=GOOD.labels / 2), {}, "labels must be [n] = (24,) integers, got float64 (24,)."),
        (GOOD._replace(levels=17), {}, "levels must be 256 for uint8 images, got 17."),
        (GOOD._replace(images=GOOD.images.astype(np.float32)), {}, "value_range must be said of floating-point images"),
        (GOOD._replace(images=to_float(GOOD.images) * np.float32(np.nan)), {}, "images must be finite, got NaN"),
        (GOOD._replace(images=to_float(GOOD.images), levels=17), {"dequantize": True}, "on 17 even levels of [-1, 1]"),
    ],
)
def test_bad_input_is_refused(dataset, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        batches(dataset, **{"batch_size": 4, "seed": 0, **ONE, **options})


def test_missing_grain_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"fm_jax\[data\]"):
        batches(_dataset(), batch_size=4, seed=0)
