import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fm_jax.data.arrays import fingerprint
from fm_jax.data.images import ImageDataset
from fm_jax.data.lazy import LazyImages, watched
from fm_jax.data.pipeline import batches

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 4, 6, 3), dtype=np.uint8)
LABELS = np.arange(24, dtype=np.int32) % 3


def lazy(read=lambda i: PIXELS[i], num=24):
    return LazyImages(read, num, (4, 6, 3))


@pytest.mark.parametrize("index", [np.array([5, 1, 5]), slice(3, 9, 2), [0, -1], np.arange(24) % 2 == 0, slice(0), -1])
def test_indexed_like_the_array(index):
    np.testing.assert_array_equal(lazy()[index], PIXELS[index])
    assert (lazy().shape, lazy().dtype, lazy().ndim, len(lazy())) == (PIXELS.shape, PIXELS.dtype, 4, 24)


def test_only_what_is_asked_for_is_read():
    asked = []
    some = lazy(lambda i: asked.append(i) or PIXELS[i]).subset(np.array([3, 7, 11]))
    assert not asked
    np.testing.assert_array_equal(some[np.array([2, 0])], PIXELS[[11, 3]])
    assert sorted(asked) == [3, 11]
    np.testing.assert_array_equal(some.subset(np.array([1]))[:], PIXELS[[7]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LazyImages(None, 3, (2, 2, 1)), "read must be a function of the number of an image"),
        (lambda: LazyImages(lambda i: i, 2.5, (2, 2, 1)), "num must be an integer, got 2.5"),
        (lambda: LazyImages(lambda i: i, 2, (2, 2)), "shape must be (h, w, c), of one image, got (2, 2)"),
        (lambda: LazyImages(lambda i: i, 2, (2, 0, 1)), "shape must be at least 1, got 0"),
        (
            lambda: lazy(lambda i: PIXELS[i, :2])[:2],
            "image 0 must be uint8 of shape (4, 6, 3), got uint8 of shape (2, 6, 3)",
        ),
        (lambda: lazy(lambda i: PIXELS[i] / 255)[3], "image 3 must be uint8 of shape (4, 6, 3), got float64"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("index", [24, np.array([24]), np.array([[0, 1]]), "a"])
def test_what_there_is_not(index):
    with pytest.raises(IndexError):
        lazy()[index]


@pytest.mark.parametrize("options", [{}, {"flip": True, "dequantize": True}])
@pytest.mark.parametrize("labels", [LABELS, None])
def test_streamed_batches_have_the_bits_of_those_in_memory(options, labels, tmp_path):
    pytest.importorskip("grain")
    names = () if labels is None else ("a", "b", "c")
    np.save(tmp_path / "pixels.npy", PIXELS)
    options |= {"batch_size": 7, "seed": 3, "process_count": 1, "process_index": 0}
    kinds = [PIXELS, lazy(), np.load(tmp_path / "pixels.npy", mmap_mode="r")]
    whole, *others = (batches(ImageDataset(each, labels, names), **options) for each in kinds)
    for _ in range(9):
        expected = next(whole)
        assert ("cond" in expected) == (labels is not None)
        for other in others:
            found = next(other)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value)
    # The position is that of what was taken, not of what was read ahead.
    for other in others:
        assert other.get_state() == whole.get_state()


def test_an_error_while_reading_reaches_the_training():
    pytest.importorskip("grain")

    def read(i):
        if i == 13:
            raise ValueError("b/13.jpg cannot be read: it is truncated.")
        return PIXELS[i]

    iterator = batches(ImageDataset(lazy(read)), batch_size=8, seed=0, process_count=1, process_index=0)
    with pytest.raises(ValueError, match=re.escape("b/13.jpg cannot be read")):
        list(itertools.islice(iterator, 3))


def test_fingerprint_is_that_of_where_they_come_from():
    one = ImageDataset(lazy(), LABELS, ("a", "b", "c"), fingerprint="9f3a")
    assert fingerprint(one) == fingerprint(one._replace(images=lazy(lambda i: PIXELS[i])))
    others = [
        one._replace(fingerprint="9f3b"),
        one._replace(labels=LABELS[::-1]),
        one._replace(class_names=("a", "c", "b")),
        one._replace(images=lazy(num=23), labels=LABELS[:23]),
    ]
    assert len({fingerprint(each) for each in [one, *others]}) == 5


def test_watched_passes_everything_on(capsys, monkeypatch):
    assert list(watched(iter(range(5)), 5, "pictures", progress=False)) == list(range(5))
    monkeypatch.setattr("fm_jax.data.lazy._SECONDS", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert list(watched(iter(range(3)), 3, "pictures")) == [0, 1, 2]
    assert capsys.readouterr().out.splitlines() == [f"Read {i} of 3 pictures." for i in (1, 2, 3)]


@pytest.mark.slow
def test_available_memory_minds_the_limits_of_the_process():
    """Half a gigabyte more than it has: that is what is left."""
    code = (
        "import resource; from fm_jax.data.lazy import available_memory\n"
        "before = available_memory()\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))\n"
        "print(before, available_memory())"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux says what a process has taken")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, limited = map(int, found.stdout.split())
    assert 0 < limited <= 2**29 < before
    assert limited > 2**28
