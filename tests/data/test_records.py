"""Pictures in ArrayRecord, and any data set of TFDS: the same images as in memory, streamed or not."""

import io
import re

import numpy as np
import pytest

from fm_jax.data.arrays import NoSplitError
from fm_jax.data.images import ImageDataset, load_images
from fm_jax.data.lazy import LazyImages
from fm_jax.data.picture import PictureError
from fm_jax.data.records import load_records, load_tfds, write_records

module = pytest.importorskip("array_record.python.array_record_module", reason="needs the extra fm_jax[data]")
pytest.importorskip("tensorflow_datasets", reason="needs the extra fm_jax[data]")
Image = pytest.importorskip("PIL.Image", reason="needs the extra fm_jax[data]")

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3), dtype=np.uint8)
LABELS = (np.arange(12) % 3).astype(np.int32)
# In this order, which is no natural one.
DATASET = ImageDataset(PIXELS, LABELS, ("zebra", "ant 10", "ant 9"))
QUIET = {"say": lambda text: None, "progress": False}


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def example(**features):
    from tensorflow_datasets.proto import tf_example_pb2

    found = tf_example_pb2.Example()
    for name, value in features.items():
        feature = found.features.feature[name.replace("__", "/")]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.extend(np.ravel(value).tolist())
    return found.SerializeToString()


def write(path, records):
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "dataset", [DATASET, ImageDataset(PIXELS), ImageDataset(PIXELS[..., :1], LABELS, ("a", "b", "c"))]
)
def test_what_is_written_is_read(dataset, stream, tmp_path):
    found = load_records(write_records(tmp_path / "a.array_record", dataset), stream=stream, **QUIET)
    assert isinstance(found.images, LazyImages) == stream
    np.testing.assert_array_equal(found.images[:], dataset.images)
    assert found.class_names == dataset.class_names
    if dataset.labels is None:
        assert found.labels is None
    else:
        np.testing.assert_array_equal(found.labels, dataset.labels)


def test_lazy_images_are_written(tmp_path):
    lazy = ImageDataset(LazyImages(lambda i: PIXELS[i], 12, PIXELS.shape[1:]))
    found = load_records(write_records(tmp_path / "a.array_record", lazy), **QUIET)
    np.testing.assert_array_equal(found.images, PIXELS)


KINDS = {
    "pictures": ([png(x) for x in PIXELS], None),
    "image, label": ([example(image=png(x), label=int(y)) for x, y in zip(PIXELS, LABELS)], ("0", "1", "2")),
    "from 1": ([example(image=png(x), label=int(y) + 9) for x, y in zip(PIXELS, LABELS)], ("9", "10", "11")),
    "ImageNet's": (
        [example(image__encoded=png(x), image__class__label=int(y)) for x, y in zip(PIXELS, LABELS)],
        ("0", "1", "2"),
    ),
    "names": ([example(image=png(x), class_name=b"abc"[y : y + 1]) for x, y in zip(PIXELS, LABELS)], ("a", "b", "c")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_records(kind, tmp_path):
    records, names = KINDS[kind]
    path = write(tmp_path / "a.array_record", records)
    found = load_records(path, **QUIET)
    np.testing.assert_array_equal(found.images, PIXELS)
    if names is None:
        assert found.labels is None
    else:
        assert found.class_names == names
        np.testing.assert_array_equal(found.labels, LABELS)
    assert load_records(path, labels=False, **QUIET).labels is None


def test_splits_are_those_of_the_names_of_the_files(tmp_path):
    write_records(tmp_path / "x-train.array_record-00000-of-00002", DATASET.subset(np.arange(5)))
    write_records(tmp_path / "x-train.array_record-00001-of-00002", DATASET.subset(np.arange(5, 9)))
    write_records(tmp_path / "x-test.array_record-00000-of-00001", DATASET.subset(np.arange(9, 12)))
    (tmp_path / "features.json").write_text("{}")
    train, test = load_records(tmp_path, ("train", "test"), test_share=None, **QUIET)
    np.testing.assert_array_equal(train.images, PIXELS[:9])
    np.testing.assert_array_equal(test.images, PIXELS[9:])
    assert train.fingerprint != test.fingerprint
    with pytest.raises(ValueError, match="which has splits of its own"):
        load_records(tmp_path, "train", test_share=0.5, **QUIET)


def test_a_share_is_held_out(tmp_path):
    path = write_records(tmp_path / "a.array_record", DATASET)
    train, test = load_records(path, ("train", "test"), test_share=0.25, **QUIET)
    assert (len(train.images), len(test.images)) == (9, 3)
    assert load_records(path, ("train", "test"), **QUIET)[1] is None
    with pytest.raises(NoSplitError):
        load_records(path, "test", **QUIET)


def test_a_broken_record_is_named(tmp_path):
    records = [*KINDS["pictures"][0]]
    records[7] = records[7][:60]
    path = write(tmp_path / "a.array_record", records)
    with pytest.raises(PictureError, match=r"a\.array_record:7 cannot be read"):
        load_records(path, **QUIET)
    said = []
    found = load_records(path, skip_broken=True, say=said.append, progress=False)
    np.testing.assert_array_equal(found.images, np.delete(PIXELS, 7, axis=0))
    assert "a.array_record:7" in " ".join(said)


def test_classes_without_pictures_keep_their_numbers(tmp_path):
    some = ImageDataset(PIXELS[:3], np.array([0, 2, 2]), ("a", "b", "c"))
    found = load_records(write_records(tmp_path / "a.array_record", some), **QUIET)
    assert (found.labels.tolist(), found.class_names) == ([0, 2, 2], ("a", "b", "c"))
    with pytest.raises(ValueError, match="labels must be from 0 to 2"):
        write_records(tmp_path / "b", some._replace(labels=np.array([0, 2, 3])))


def test_a_damaged_file_names_the_record(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    path = write_records(tmp_path / "a.array_record", ImageDataset(pixels))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(PictureError, match=r"a\.array_record:\d+ cannot be read: the record is damaged"):
        load_records(path, **QUIET)
    found = load_records(path, skip_broken=True, **QUIET)
    assert 30 <= len(found.images) < 40


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([example(image=png(PIXELS[0]), label=0), example(image=png(PIXELS[1]))], "must have a label, got none in"),
        (
            [example(text=b"a"), example(text=b"b")],
            ":0 cannot be read: it is an Example without an image",
        ),
        ([], "has no records"),
        ([png(PIXELS[0]), png(PIXELS[1, :4])], "give size"),
    ],
)
def test_records_that_are_refused(records, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_records(write(tmp_path / "a.array_record", records), **QUIET)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.array_record does not exist"):
        load_records(tmp_path / "a.array_record")
    with pytest.raises(FileNotFoundError, match='no files with "array_record" in their names'):
        load_records(tmp_path)
    (tmp_path / "a.array_record").write_bytes(b"no" * 100)
    with pytest.raises(ValueError, match="is no file of ArrayRecord, or damaged"):
        load_records(tmp_path / "a.array_record")
    with pytest.raises(ValueError, match="images must be uint8"):
        write_records(tmp_path / "b", DATASET._replace(images=PIXELS.astype(np.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", pytest.param("cifar10", marks=pytest.mark.slow)])
def test_tfds(name, prepared):
    tfds_dir = prepared(name)
    expected = load_images(name, "test", data_dir=tfds_dir)
    found = load_tfds(name, "test", data_dir=tfds_dir, stream=True, test_share=None, **QUIET)
    assert found.class_names == expected.class_names
    np.testing.assert_array_equal(found.labels, expected.labels)
    some = np.array([0, 77, 9999])
    np.testing.assert_array_equal(found.images[some], expected.images[some])


def test_tfds_that_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be that of a data set of TFDS"):
        load_tfds("nonesuch", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="mnist is not prepared"):
        load_tfds("mnist", data_dir=tmp_path)
