"""Arrays as they come: each is converted, with a sentence that says so, or refused with what makes it right."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.data.arrays import (
    NoSplitError,
    check_dataset,
    fingerprint,
    held_out,
    load_npz,
    make_dataset,
    natural,
    part,
    standardise,
    to_unit_range,
)
from fm_jax.data.images import ImageDataset, to_float
from fm_jax.data.lazy import LazyImages
from fm_jax.data.pipeline import batches

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 6, 8, 3), dtype=np.uint8)
GREY = PIXELS[..., :1]
UNIT = (PIXELS / 255).astype(np.float32)
FIRST = RNG.normal(size=(12, 16, 32, 32)).astype(np.float32)
LABELS = np.arange(12) % 3
ABC = ("a", "b", "c")
INFINITE = (-math.inf, math.inf)


def made(*args, **options):
    said = []
    return make_dataset(*args, say=said.append, **options), " ".join(said)


def first(dataset):
    """What a training is given: all examples, in their order."""
    batch = next(batches(dataset, batch_size=12, seed=0, process_count=1, process_index=0))
    order = np.random.default_rng((0, 0)).permutation(12)
    return {name: value[np.argsort(order)] for name, value in batch.items()}


CUBES = {"value_range": INFINITE}
IMAGES = [
    ("as they are", PIXELS, {}, to_float(PIXELS), ""),
    ("JAX", jnp.asarray(PIXELS), {}, to_float(PIXELS), ""),
    ("lists", PIXELS.tolist(), {}, to_float(PIXELS), "images are int64 from 0 to 255; they became uint8."),
    ("int64", PIXELS.astype(np.int64), {}, to_float(PIXELS), "images are int64 from 0 to 255; they became uint8."),
    ("channels first", np.moveaxis(PIXELS, -1, 1), {}, to_float(PIXELS), "have channels first; they were moved last"),
    (
        "latents first",
        np.zeros((12, 4, 32, 32), np.float32),
        {"value_range": INFINITE},
        np.zeros((12, 32, 32, 4)),
        "first",
    ),
    (
        "many first",
        np.zeros((12, 16, 32, 32), np.float32),
        {"value_range": INFINITE},
        np.zeros((12, 32, 32, 16)),
        "first",
    ),
    ("as many first", FIRST[:, :, :8, :8], {"value_range": INFINITE}, np.moveaxis(FIRST[:, :, :8, :8], 1, -1), "first"),
    (
        "said to be first",
        FIRST[:, :, :16, :16],
        CUBES | {"channels": "first"},
        np.moveaxis(FIRST[..., :16, :16], 1, -1),
        "",
    ),
    ("said to be last", FIRST[:, :, :16, :16], CUBES | {"channels": "last"}, FIRST[:, :, :16, :16], ""),
    ("no channel axis", GREY[..., 0], {}, to_float(GREY), ""),
    ("one channel first", np.moveaxis(GREY, -1, 1), {}, to_float(GREY), "were moved last, [12, 6, 8, 1]"),
    ("bool", GREY > 127, {}, np.where(GREY > 127, 1.0, -1.0), "True and False; they became 255 and 0"),
    ("[0, 1]", UNIT, {"value_range": (0, 1)}, to_float(PIXELS), ""),
    ("float64", UNIT.astype(float), {"value_range": (0, 1)}, to_float(PIXELS), ""),
    ("bfloat16", jnp.ones((12, 6, 8, 1), jnp.bfloat16) / 2, {"value_range": (0, 1)}, np.zeros((12, 6, 8, 1)), ""),
    ("[-1, 1]", UNIT * 2 - 1, {}, to_float(PIXELS), ""),
    ("[0, 255]", PIXELS.astype(np.float32), {"value_range": (0, 255)}, to_float(PIXELS), ""),
    ("uint16", PIXELS.astype(np.uint16) * 257, {"value_range": (0, 65535)}, to_float(PIXELS), ""),
    ("a mask", (GREY > 127).astype(np.uint8), {"value_range": (0, 1)}, np.where(GREY > 127, 1.0, -1.0), ""),
    ("latents", 7 * UNIT - 3, {"value_range": INFINITE}, 7 * UNIT - 3, ""),
]


@pytest.mark.parametrize(
    ("images", "options", "wanted", "say"), [each[1:] for each in IMAGES], ids=[i[0] for i in IMAGES]
)
def test_images(images, options, wanted, say):
    pytest.importorskip("grain")
    dataset, said = made(images, **options)
    found = first(dataset)["x1"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert (say in said) if say else not said


REFUSED = [
    ("floats in [0, 1]", UNIT, {}, "value_range must be said of floating-point images from 0 to 1", "(0.0, 1.0)"),
    ("floats to 255", PIXELS.astype(np.float32), {}, "value_range must be said", "(0.0, 255.0)"),
    ("latents", 7 * UNIT - 3, {}, "value_range must be said", "(-inf, inf) for latents"),
    ("uint16", PIXELS.astype(np.uint16) * 257, {}, "value_range must be said of uint16 images", "65535"),
    ("a mask", (GREY > 127).astype(np.uint8), {}, "of uint8 images of 0 and 1 alone", ""),
    ("half of [-1, 1]", UNIT - 0.5, {}, "value_range must be said of floating-point images from -0.5 to 0.5", ""),
    ("[0, 1] with an undershoot", UNIT - 0.001, {}, "value_range must be said of floating-point images", ""),
    ("cubes", FIRST[:, :, :16, :16], CUBES, "channels must be said of images of shape (12, 16, 16, 16)", "'first' for"),
    ("oblong latents", FIRST[:, :, :20, :24], CUBES, "channels must be said of images of shape (12, 16, 20, 24)", ""),
    ("of MATLAB", np.zeros((32, 32, 3, 50), np.uint8), {}, "channels must be said of images of shape", ""),
    ("greys of MATLAB", np.zeros((32, 32, 50), np.uint8), {}, "images must be [n, h, w], got shape (32, 32, 50)", ""),
    ("one, channels first", np.zeros((3, 32, 32), np.uint8), {}, "images must be [n, h, w], got shape (3, 32, 32)", ""),
    ("masked", np.ma.masked_greater(PIXELS, 200), {}, "images must not be masked, got", "masked values"),
    ("outside", UNIT * 3, {"value_range": (0, 1)}, "images must lie in value_range=(0.0, 1.0), got values", "to 3"),
    ("a range upside down", UNIT, {"value_range": (1, 0)}, "value_range must be a pair (low, high)", ""),
    ("half a range", UNIT, {"value_range": (0, math.inf)}, "value_range must be a pair (low, high)", ""),
    ("NaN", np.where(np.arange(12)[:, None, None, None] == 7, np.nan, UNIT), {"value_range": (0, 1)}, "image 7", "NaN"),
    ("infinity", np.where(UNIT > 0.99, np.inf, UNIT), {"value_range": INFINITE}, "images must be finite", "image"),
    ("ragged", [np.zeros((4, 4, 3)), np.zeros((5, 4, 3))], {}, "images must all have one shape", ""),
    ("one image", PIXELS[0], {}, "images must be [n, h, w, c]", "one image"),
    ("flat", PIXELS.reshape(12, -1), {}, "images must be [n, h, w, c], [n, c, h, w] or [n, h, w]", "(12, 144)"),
    ("empty", PIXELS[:0], {}, "images must not be empty", ""),
    ("complex", UNIT + 1j, {}, "images must be numbers, got complex", ""),
    ("strings", np.full((2, 4, 4, 1), "a"), {}, "images must be numbers", ""),
    ("a path", "images.npz", {}, "images must be an array, got 'images.npz'", ""),
    ("nothing", None, {}, "images must be an array, got None", ""),
]


@pytest.mark.parametrize(
    ("images", "options", "message", "also"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_images_that_are_refused(images, options, message, also):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_dataset(images, **options)
    assert also in str(error.value)


LABELLED = [
    ("int64", LABELS, {}, LABELS, ("0", "1", "2"), ""),
    ("a list", LABELS.tolist(), {"class_names": ABC}, LABELS, ABC, ""),
    ("a column", LABELS[:, None], {"class_names": ABC}, LABELS, ABC, ""),
    ("floats", LABELS.astype(float), {"class_names": ABC}, LABELS, ABC, ""),
    ("1 to N", LABELS + 1, {}, LABELS, ("1", "2", "3"), "labels are 1, 2, 3; they became 0 to 2"),
    ("1 to N, named", LABELS + 1, {"class_names": ABC}, LABELS, ABC, "labels are from 1 to 3; they became 0 to 2."),
    ("gaps", LABELS * 5, {}, LABELS, ("0", "5", "10"), "labels are 0, 5, 10; they became 0 to 2"),
    ("negative", LABELS - 1, {}, LABELS, ("-1", "0", "1"), "they became 0 to 2"),
    ("one-hot", np.eye(3)[LABELS], {}, LABELS, ("0", "1", "2"), "one-hot; they became the numbers"),
    ("one-hot of a class more", np.eye(4)[LABELS], {}, LABELS, ("0", "1", "2", "3"), "one-hot"),
    ("strings", np.array(ABC)[LABELS], {}, LABELS, ABC, ""),
    ("bytes", np.array([b"a", b"b", b"c"])[LABELS], {}, LABELS, ABC, ""),
    ("objects", np.array(ABC, object)[LABELS], {}, LABELS, ABC, ""),
    ("numbers as strings", [str(9 + i) for i in LABELS], {}, LABELS, ("9", "10", "11"), ""),
    ("strings in an order", np.array(ABC)[LABELS], {"class_names": ["c", "b", "a"]}, 2 - LABELS, ("c", "b", "a"), ""),
    ("bools", LABELS > 0, {}, (LABELS > 0).astype(int), ("False", "True"), ""),
    ("JAX", jnp.asarray(LABELS), {"class_names": ABC}, LABELS, ABC, ""),
]


@pytest.mark.parametrize(
    ("labels", "options", "wanted", "names", "say"), [each[1:] for each in LABELLED], ids=[each[0] for each in LABELLED]
)
def test_labels(labels, options, wanted, names, say):
    pytest.importorskip("grain")
    dataset, said = made(PIXELS, labels, **options)
    assert dataset.class_names == names
    found = first(dataset)["cond"]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)
    assert (say in said) if say else not said


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS[:5], {}, "labels must be [n] = (12,), one an image, got shape (5,)"),
        (np.full((12, 3), 1 / 3), {}, "labels [n, 3] must be one-hot, a single 1 in each row"),
        (LABELS / 2, {}, "labels must be integers or names, got float64 such as 0.5"),
        (np.where(LABELS == 1, np.nan, LABELS), {}, "labels must not be missing, got nan for image 1"),
        (np.array(["a", None, *["b"] * 10], object), {}, "labels must not be missing, got None for image 1"),
        (["a", "b", "d"] * 4, {"class_names": ABC}, "labels must be of class_names, got 'd'"),
        (LABELS + 5, {"class_names": ABC}, "labels must be from 0 to 2, as class_names has 3, got 5 to 7"),
        (LABELS, {"class_names": ("a", "a", "b")}, "class_names must be distinct names"),
        (LABELS, {"class_names": "abc"}, "class_names must be distinct names, got 'abc'"),
        (None, {"class_names": ABC}, "class_names must be None without labels"),
    ],
)
def test_labels_that_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_dataset(PIXELS, labels, **options)


def test_a_class_without_images_is_told():
    said = made(PIXELS, LABELS + 1, class_names=("a", "b", "c", "d"))[1]
    assert said == "no image is of the class 'a'."


def test_what_is_changed_is_warned_of_by_default():
    with pytest.warns(UserWarning, match="channels first"):
        make_dataset(np.moveaxis(PIXELS, -1, 1))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (ImageDataset(PIXELS, LABELS + 1, ABC), "labels must be from 0 to 2, as class_names has 3, got 1 to 3"),
        (ImageDataset(PIXELS, LABELS, ("a", "b")), "labels must be from 0 to 1, as class_names has 2, got 0 to 2"),
        (ImageDataset(PIXELS, LABELS), "class_names must be a tuple with a name for every class, got ()"),
        (ImageDataset(PIXELS, np.eye(3)[LABELS], ABC), "labels must be [n] = (12,) integers, got float64 (12, 3)"),
        (ImageDataset(PIXELS, np.array(ABC)[LABELS], ABC), "labels must be [n] = (12,) integers, got <U1"),
        (ImageDataset((PIXELS > 9).astype(np.uint8)), "images must reach to 255, got uint8 of 0 and 1 alone"),
        (
            ImageDataset(np.zeros((32, 32, 3, 50), np.uint8)),
            "which looks like [h, w, c, n]: np.moveaxis(images, -1, 0)",
        ),
        (ImageDataset(np.zeros((9, 16, 8, 8), np.float32)), "channels first: np.moveaxis(images, 1, -1)"),
        (ImageDataset(UNIT, LABELS, ABC), "value_range must be said of floating-point images from 0 to 1"),
        (ImageDataset(np.zeros((9, 4, 32, 32), np.float32)), "channels first: np.moveaxis(images, 1, -1)"),
        (ImageDataset(np.moveaxis(PIXELS, -1, 1)), "channels first"),
        (ImageDataset(np.where(UNIT > 0.99, np.nan, UNIT), value_range=(0, 1)), "images must be finite"),
        (ImageDataset(UNIT.astype(np.float16), value_range=(0, 1)), "images must be uint8 or float32, got float16"),
        (ImageDataset(PIXELS, value_range=(0, 1)), "value_range must be None for uint8 images"),
        (ImageDataset(PIXELS, class_names=ABC), "class_names must be empty without labels"),
        ((PIXELS, LABELS), "dataset must be an ImageDataset, as fm_jax.data.arrays.make_dataset makes"),
        ({"images": PIXELS}, "dataset must be an ImageDataset"),
        (PIXELS, "dataset must be an ImageDataset"),
    ],
)
def test_batches_refuse_what_would_train_something_else(dataset, message):
    for function in (check_dataset, lambda each: batches(each, batch_size=2, seed=0)):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(dataset)


def test_few_rows_and_many_channels_have_a_way_in():
    """What is taken for channels first may be right; its height and width swapped it passes, the same images."""
    x = np.zeros((9, 4, 32, 32), np.float32)
    x[0, 0, 0, :2] = -1, 1
    assert check_dataset(ImageDataset(np.swapaxes(x, 1, 2))).images.shape == (9, 32, 4, 32)


def test_lists_and_jax_arrays_in_a_dataset_lose_nothing():
    dataset = check_dataset(ImageDataset(jnp.asarray(PIXELS), LABELS.tolist(), ABC))
    assert isinstance(dataset.images, np.ndarray)
    np.testing.assert_array_equal(dataset.images, PIXELS)
    np.testing.assert_array_equal(dataset.labels, LABELS)


def test_an_npz_handle_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS)
    with np.load(tmp_path / "a.npz") as handle:
        with pytest.raises(ValueError, match="got an npz file with x: load_npz reads it"):
            make_dataset(handle)
        with pytest.raises(ValueError, match="dataset must be an ImageDataset"):
            batches(handle, batch_size=2, seed=0)


NPZ = {
    "our samples": ({"samples": PIXELS, "labels": LABELS}, {}),
    "ADM": ({"arr_0": PIXELS, "arr_1": LABELS}, {}),
    "by name": ({"a": PIXELS, "b": LABELS}, {"images": "a", "labels": "b"}),
}


@pytest.mark.parametrize("kind", NPZ)
def test_npz(kind, tmp_path):
    entries, options = NPZ[kind]
    np.savez(tmp_path / "a.npz", **entries)
    dataset = load_npz(tmp_path / "a.npz", **options)
    np.testing.assert_array_equal(dataset.images, PIXELS)
    np.testing.assert_array_equal(dataset.labels, LABELS)
    train, test = (load_npz(tmp_path / "a.npz", split, test_share=0.25, **options) for split in ("train", "test"))
    assert (len(train.images), len(test.images)) == (9, 3)
    assert sorted(test.labels) == [0, 1, 2]
    together = np.concatenate([train.images, test.images])
    assert {x.tobytes() for x in together} == {x.tobytes() for x in PIXELS}


@pytest.mark.parametrize("pattern", ["x_{}", "{}_images", "images_{}"])
def test_npz_with_splits(pattern, tmp_path):
    labels = "y_{}" if pattern == "x_{}" else pattern.replace("images", "labels")
    entries = {pattern.format("train"): PIXELS[:8], pattern.format("test"): PIXELS[8:]}
    # Class 2 is in the test split alone.
    entries |= {labels.format("train"): LABELS[:8] % 2, labels.format("test"): LABELS[8:]}
    np.savez(tmp_path / "a.npz", **entries)
    train, test = (load_npz(tmp_path / "a.npz", split) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, PIXELS[:8])
    np.testing.assert_array_equal(test.images, PIXELS[8:])
    assert train.class_names == test.class_names == ("0", "1", "2")
    with pytest.raises(ValueError, match="which has splits of its own"):
        load_npz(tmp_path / "a.npz", "train", test_share=0.1)


def loaded(path, split="all", **options):
    said = []
    return load_npz(path, split, say=said.append, **options), " ".join(said)


def test_npz_whose_test_images_have_no_labels_keeps_those_for_training(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=PIXELS[:8], y_train=LABELS[:8], x_test=PIXELS[8:])
    dataset, said = loaded(tmp_path / "a.npz", "train")
    np.testing.assert_array_equal(dataset.labels, LABELS[:8])
    assert "only the images for training of a.npz have labels; those for testing were left aside" in said
    assert len(loaded(tmp_path / "a.npz", "test", test_share=0.5)[0].images) > 0


def test_npz_of_which_something_is_left_aside(tmp_path):
    entries = {"images": PIXELS, "fine_labels": LABELS, "labels": LABELS, "class_names": np.array(ABC)}
    np.savez(tmp_path / "a.npz", **entries)
    dataset, said = loaded(tmp_path / "a.npz")
    assert said == "of a.npz images, labels were read; left aside: fine_labels."
    assert dataset.class_names == ABC
    np.savez(tmp_path / "a.npz", x_train=PIXELS[:8], x_val=PIXELS[8:])
    np.testing.assert_array_equal(loaded(tmp_path / "a.npz", "test")[0].images, PIXELS[8:])
    np.savez(tmp_path / "a.npz", x_train=PIXELS)
    assert len(loaded(tmp_path / "a.npz", "test", test_share=0.25)[0].images) == 3
    np.savez(tmp_path / "a.npz", x=PIXELS, labels=LABELS, y=LABELS)
    with pytest.raises(
        ValueError,
        match="has several entries that could be the labels, labels, y",
    ):
        loaded(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded(tmp_path / "a.npz", labels="y")[0].labels, LABELS)


def test_npy_is_not_read_into_memory(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    dataset = load_npz(tmp_path / "a.npy")
    assert isinstance(dataset.images, np.memmap)
    assert dataset.labels is None
    train, test = load_npz(tmp_path / "a.npy", ("train", "test"), test_share=0.25)
    for each in (train, test):
        assert isinstance(each.images, LazyImages)
    together = np.concatenate([train.images[:], test.images[:]])
    assert sorted(x.tobytes() for x in together) == sorted(x.tobytes() for x in PIXELS)
    in_memory = load_npz(tmp_path / "a.npy")._replace(images=PIXELS)
    assert fingerprint(train) == fingerprint(
        in_memory.subset(np.flatnonzero(~held_out([str(i) for i in range(12)], None, 0.25)))
    )


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (
            lambda path: path.write_bytes(b"no"),
            {},
            "is no file of NumPy, .npz or .npy without pickled objects, or damaged",
        ),
        (lambda path: path.mkdir(), {}, "is no file of NumPy, .npz or .npy without pickled objects, or damaged"),
        (
            lambda path: np.savez(path, thing=PIXELS),
            {},
            "must have an entry for the images, such as 'images', got thing",
        ),
        (lambda path: np.savez(path, x=PIXELS), {"images": "z"}, "must have an entry 'z' for the images, got x"),
        (lambda path: np.savez(path, x=PIXELS), {"labels": "z"}, "must have an entry 'z' for the labels, got x"),
        (lambda path: np.savez(path, x=np.array([None, 1])), {}, "without pickled objects"),
        (lambda path: np.savez(path, x=PIXELS), {"split": "valid"}, "split must be one of 'train', 'test', 'all'"),
        (lambda path: np.savez(path, x=PIXELS), {"test_share": 1.0}, "test_share must be in [0, 1), got 1.0"),
    ],
)
def test_npz_that_is_refused(write, options, message, tmp_path):
    write(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_npz(tmp_path / "a.npz", **options)


def test_npz_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.npz does not exist"):
        load_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=PIXELS)
    with pytest.raises(NoSplitError, match="split 'test' has no images"):
        load_npz(tmp_path / "a.npz", "test")


def test_held_out_is_a_share_of_each_class_whatever_else_there_is():
    names, labels = [f"{i}.png" for i in range(1000)], np.arange(1000) % 7
    chosen = held_out(names, labels, 0.2)
    for label in range(7):
        assert chosen[labels == label].sum() == round(0.2 * (labels == label).sum())
    more = held_out([*names, "new.png"], np.append(labels, 3), 0.2)
    assert (more[:1000] != chosen).sum() <= 1
    assert not held_out(names, labels, 0.0).any()
    assert not held_out(["only one"], None, 0.9).any()
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="share must be in"):
            held_out(names, None, bad)


def test_part_is_disjoint_and_whole():
    dataset, mask = ImageDataset(PIXELS, LABELS, ABC), np.arange(12) % 4 == 0
    train, test = part(dataset, "train", mask), part(dataset, "test", mask)
    np.testing.assert_array_equal(train.images, PIXELS[~mask])
    np.testing.assert_array_equal(test.labels, LABELS[mask])
    assert part(dataset, "all", mask) is dataset
    with pytest.raises(NoSplitError):
        part(dataset, "test", np.zeros(12, bool))


def test_fingerprints_differ_when_the_data_do():
    one = ImageDataset(PIXELS, LABELS, ABC)
    changed = PIXELS.copy()
    changed[11, 5, 7, 2] ^= 1
    others = [
        one._replace(images=changed),
        one._replace(images=PIXELS[::-1]),
        one._replace(images=PIXELS[:11], labels=LABELS[:11]),
        one._replace(labels=LABELS[::-1]),
        one._replace(class_names=("a", "c", "b")),
        one._replace(images=PIXELS.reshape(12, 8, 6, 3)),
        one._replace(images=UNIT, value_range=(0, 1)),
        one._replace(images=UNIT, value_range=(0, 2)),
        one._replace(labels=None, class_names=()),
    ]
    found = [fingerprint(each) for each in [one, *others]]
    assert len(set(found)) == len(found)
    assert fingerprint(one._replace(images=PIXELS.copy(), labels=LABELS.astype(np.int64))) == found[0]
    assert fingerprint(one._replace(images=np.asfortranarray(PIXELS))) == found[0]


def test_latents_have_mean_0_and_variance_1_and_come_back():
    x = RNG.normal(3.0, [0.5, 2.0, 7.0, 1.0], (64, 4, 4, 4)).astype(np.float32)
    dataset, mean, std = standardise(ImageDataset(x, value_range=INFINITE))
    np.testing.assert_allclose(dataset.images.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.images.std((0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(dataset.images * std + mean, x, atol=1e-4)
    x[..., 2] = 0.0
    with pytest.raises(ValueError, match="images must vary in every channel"):
        standardise(ImageDataset(x, value_range=INFINITE))


@pytest.mark.parametrize(
    ("images", "value_range", "wanted"),
    [
        (np.array([0, 51, 255], np.uint8), None, [-1, -0.6, 1]),
        (np.array([-0.5, 1], np.float32), None, [-0.5, 1]),
        (np.array([0, 0.25, 1], np.float32), (0, 1), [-1, -0.5, 1]),
        (np.array([-3, 0, 5], np.float32), (-3, 5), [-1, -0.25, 1]),
        (np.array([-30, 12], np.float32), INFINITE, [-30, 12]),
    ],
)
def test_to_unit_range(images, value_range, wanted):
    np.testing.assert_allclose(to_unit_range(images, value_range), wanted, atol=1e-6)


def test_natural_order():
    names = ["10", "2", "b", "a10", "a2", "A2", "", "1.5", "é", "²"]
    assert sorted(["10", "9", "2"], key=natural) == ["2", "9", "10"]
    assert sorted(["a10", "a2", "a1"], key=natural) == ["a1", "a2", "a10"]
    assert len({natural(name) for name in names}) == len(names)
    upside_down = names[::-1]
    assert sorted(names, key=natural) == sorted(upside_down, key=natural)
