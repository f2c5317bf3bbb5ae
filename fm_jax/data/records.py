"""Pictures in records: files of ArrayRecord, and the data sets of TFDS that lie in such files."""

import io
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.checks import check_bool, imported, shown
from fm_jax.data.arrays import Split, check_dataset, natural
from fm_jax.data.images import ImageDataset, open_builder
from fm_jax.data.picture import PictureError, shown_path
from fm_jax.data.reading import Found, gather

_IMAGE = ("image", "image/encoded", "picture", "img", "png", "jpg", "jpeg")
_LABEL = ("label", "image/class/label", "class", "target")
_NAME = ("class_name", "image/class/text", "label_name")
_SPLIT = re.compile(r"(?:^|[-_.])(train|test|val|valid|validation)(?:[-_.]|$)")
_CHUNK = 1000


def load_records(
    path: str | os.PathLike[str], split: Split | tuple[Split, ...] = "all", *, labels: bool = True, **options: Any
) -> Any:
    """Makes training data of ArrayRecord: each record a picture's file, or a `tf.train.Example` with one.

    Of an Example the picture is `image` or `image/encoded`, the label `label` or `image/class/label`, and the name of
    its class, if there is one, `class_name` or `image/class/text`. `write_records` writes such files.

    Args:
        path: a file, or a folder of files with "array_record" in their names.
        split: "all"; "train" or "test" by such a word in the names of the files, or by `test_share`; several as in
            `load_folder`.
        labels: whether to use the labels that there are.
        options: as in `fm_jax.data.folder.load_folder`, from `size` on.

    Raises:
        FileNotFoundError: if there is nothing.
        PictureError: names records that cannot be read.
        ValueError: as `load_folder`.
        ImportError: if array_record is not installed.
    """
    check_bool("labels", labels)
    files = _files_of(Path(path))
    source = _source_of(files)
    sizes = [len(_source_of([each])) for each in files]
    names = [f"{file.name}:{i}" for file, num in zip(files, sizes, strict=True) for i in range(num)]
    if not names:
        raise ValueError(f"{shown_path(path)} has no records.")

    def record(number: int) -> bytes:
        try:
            return source[number]
        except Exception as error:  # of its own library
            told = " ".join(str(error).split())[:120] or type(error).__name__
            raise PictureError(f"{names[number]} cannot be read: the record is damaged ({told}).") from None

    kinds: list[tuple[int | None, str | None] | None] = []
    for start in range(0, len(names), _CHUNK):
        numbers = list(range(start, min(start + _CHUNK, len(names))))
        try:
            some: list[bytes | None] = source.__getitems__(numbers)
        except Exception:  # one of them is damaged: each for itself
            some = [_or_none(record, number) for number in numbers]
        for number, each in zip(numbers, some, strict=True):
            kinds.append(None if each is None else _parsed(each, names[number])[1:])
    words = [_SPLIT.search(file.name) for file in files]
    is_test = None
    if all(words) and any(word[1] == "train" for word in words if word):
        of_files = [word is not None and word[1] != "train" for word in words]
        is_test = np.repeat(of_files, sizes)
    whole = next((i for i, kind in enumerate(kinds) if kind is not None), None)
    listed = () if whole is None else _class_names(record(whole))
    numbers_of, class_names = _classes(kinds, names, listed) if labels else (None, ())

    def read(number: int) -> bytes:
        return _parsed(record(number), names[number])[0]

    reads = tuple(partial(read, number) for number in range(len(names)))
    found = Found(reads, tuple(names), numbers_of, class_names, is_test, (), ())
    return gather(found, shown_path(path), split, **options)


def load_tfds(
    name: str,
    split: Split | tuple[Split, ...] = "all",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    labels: bool = True,
    **options: Any,
) -> Any:
    """Makes training data of any data set of TFDS with an image in each example, without TensorFlow.

    Args:
        name: as TFDS calls it, such as "eurosat/rgb"; prepared once by `python -m fm_jax.data.images NAME`.
        split: "all"; "train" or "test" by the data set's own splits (validation, where there is no test), or by
            `test_share`; several as in `load_folder`.
        data_dir: as in `fm_jax.data.images.load_images`.
        labels: whether to use the labels that there are.
        options: as in `fm_jax.data.folder.load_folder`, from `size` on.

    Raises:
        FileNotFoundError: if the data set was not prepared there as array_record; says how to.
        PictureError: names examples that cannot be read.
        ValueError: if it has no images, or two of them; as `load_folder`.
        ImportError: if tensorflow-datasets is not installed.
    """
    check_bool("labels", labels)
    builder = open_builder(name, data_dir)
    features = dict(builder.info.features.items())
    tfds = imported("tensorflow_datasets", "load_tfds", "'fm_jax[data]'")
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    if len(images) != 1:
        raise ValueError(f"{name} must have one image in each example, got the features {', '.join(features)}.")
    kinds = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    kind = next((key for key in ("label", *kinds) if key in kinds), None)
    own = [each for each in ("train", "test", "validation") if each in builder.info.splits]
    if "train" not in own:
        raise ValueError(f"{name} must have a split 'train', got {', '.join(builder.info.splits)}.")
    parts = own[:2] if "test" in own else own
    encoded = {images[0]: tfds.decode.SkipDecoding()}
    sources = [builder.as_data_source(each, decoders=encoded) for each in parts]
    names = [f"{name} {part} {i}" for part, source in zip(parts, sources, strict=True) for i in range(len(source))]
    starts = np.concatenate([[0], np.cumsum([len(source) for source in sources])])

    def example(number: int) -> Any:
        place = int(np.searchsorted(starts, number, side="right")) - 1
        return sources[place][number - int(starts[place])]

    def read(number: int) -> bytes:
        return example(number)[images[0]]

    numbers, class_names = None, ()
    if labels and kind is not None:
        numbers = np.empty(len(names), np.int32)
        for source, start in zip(sources, starts[:-1], strict=True):
            for first in range(0, len(source), _CHUNK):
                some = range(first, min(first + _CHUNK, len(source)))
                numbers[start + first : start + first + len(some)] = [
                    each[kind] for each in source.__getitems__(list(some))
                ]
        class_names = tuple(features[kind].names)
        if numbers.min() < 0:
            raise ValueError(f"{name} must have a label for every image, got {numbers.min()}: give labels=False.")
    is_test = np.arange(len(names)) >= starts[1] if len(parts) > 1 else None
    shape = features[images[0]].shape
    if None not in shape[:2]:  # of all, which need not be looked at for it
        options = {"size": (shape[0], shape[1]), **{k: v for k, v in options.items() if (k, v) != ("size", None)}}
    if shape[-1] is not None and options.get("colour") is None:
        options["colour"] = "grey" if shape[-1] == 1 else "rgb"
    reads = tuple(partial(read, number) for number in range(len(names)))
    return gather(Found(reads, tuple(names), numbers, class_names, is_test, (), ()), name, split, **options)


def write_records(path: str | os.PathLike[str], dataset: ImageDataset) -> Path:
    """Writes a data set as one file of ArrayRecord, which `load_records` streams: PNG and label, record by record.

    Args:
        path: of the file, which is replaced.
        dataset: of uint8 images with 1 or 3 channels; those that are read when drawn are read once.

    Returns:
        The path.

    Raises:
        ValueError: for other images.
        ImportError: if array_record, tensorflow-datasets or Pillow is not installed.

    Example:
        >>> import tempfile
        >>> dataset = ImageDataset(np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1), np.array([0, 1, 0]), ("a", "b"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_records(write_records(folder + "/grey.array_record", dataset), progress=False)
        >>> bool((again.images == dataset.images).all()), again.labels.tolist(), again.class_names
        (True, [0, 1, 0], ('a', 'b'))
    """
    module = imported("array_record.python.array_record_module", "write_records", "'fm_jax[data]'")
    picture = imported("PIL.Image", "write_records", "pillow")
    images = dataset.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be uint8 [n, h, w, 1 or 3], got {shown(images)}.")
    dataset, path = check_dataset(dataset), Path(path)
    writer = module.ArrayRecordWriter(str(path), "group_size:1")  # so that one is read without its neighbours
    try:
        for start in range(0, len(images), _CHUNK):
            for offset, pixels in enumerate(images[start : start + _CHUNK]):
                file = io.BytesIO()
                picture.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
                example = _example()
                example.features.feature["image"].bytes_list.value.append(file.getvalue())
                if dataset.labels is not None:
                    label = int(dataset.labels[start + offset])
                    example.features.feature["label"].int64_list.value.append(label)
                    name = dataset.class_names[label].encode("utf-8", "surrogateescape")
                    example.features.feature["class_name"].bytes_list.value.append(name)
                    if start + offset == 0:  # also those of which there is no picture
                        example.features.feature["class_names"].bytes_list.value.extend(
                            each.encode("utf-8", "surrogateescape") for each in dataset.class_names
                        )
                writer.write(example.SerializeToString())
    finally:
        writer.close()
    return path


def _example() -> Any:
    return imported("tensorflow_datasets.proto", "ArrayRecord", "'fm_jax[data]'").tf_example_pb2.Example()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted((each for each in path.iterdir() if "array_record" in each.name), key=lambda p: natural(p.name))
        if not found:
            raise FileNotFoundError(f'{shown_path(path)} has no files with "array_record" in their names.')
        return found
    if not path.exists():
        raise FileNotFoundError(f"{shown_path(path)} does not exist: give a file of ArrayRecord, or a folder of them.")
    return [path]


def _source_of(files: Sequence[Path]) -> Any:
    module = imported("array_record.python.array_record_data_source", "load_records", "'fm_jax[data]'")
    try:
        return module.ArrayRecordDataSource([str(each) for each in files])
    except Exception as error:  # of several classes
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{shown_path(files[0])} is no file of ArrayRecord, or damaged: {told}") from None


def _features(record: bytes) -> Any:
    """What a `tf.train.Example` holds, by name; nothing of a record that is none."""
    example = _example()
    try:
        example.ParseFromString(record)
    except Exception:  # of protobuf
        return {}
    return example.features.feature


def _parsed(record: bytes, name: str) -> tuple[bytes, int | None, str | None]:
    """The file of a picture, its label and the name of its class."""
    features = _features(record)
    image = next((features[key].bytes_list.value for key in _IMAGE if key in features), None)
    if image is None:
        if features:
            raise PictureError(f"{name} cannot be read: it is an Example without an image, of {', '.join(features)}.")
        return record, None, None
    if len(image) != 1:
        raise PictureError(f"{name} cannot be read: it has {len(image)} images.")
    label: Any = next((features[key].int64_list.value for key in _LABEL if key in features), [])
    text: Any = next((features[key].bytes_list.value for key in _NAME if key in features), [])
    return (
        image[0],
        int(label[0]) if len(label) == 1 else None,
        text[0].decode("utf-8", "backslashreplace") if len(text) == 1 else None,
    )


def _or_none(record: Callable[[int], bytes], number: int) -> bytes | None:
    try:
        return record(number)
    except PictureError:  # told when it is read
        return None


def _class_names(record: bytes) -> tuple[str, ...]:
    """The names of all classes, where the records say them."""
    features = _features(record)
    values = features["class_names"].bytes_list.value if "class_names" in features else ()
    return tuple(value.decode("utf-8", "backslashreplace") for value in values)


def _classes(
    kinds: list[tuple[int | None, str | None] | None], names: list[str], listed: tuple[str, ...]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels from numbers and names: names count where all have one. Of damaged records they are 0, and not used."""
    known = [kind for kind in kinds if kind is not None]
    if all(label is None and text is None for label, text in known):
        return None, ()
    if listed and all(label is not None and 0 <= label < len(listed) for label, _ in known):
        return np.array([0 if kind is None else kind[0] for kind in kinds], np.int32), listed
    words: list[Any] = [
        known[0][1] or known[0][0] if kind is None else kind[0] if kind[1] is None else kind[1] for kind in kinds
    ]
    if any(word is None for word in words):
        raise ValueError(f"every record must have a label, got none in {names[words.index(None)]}: give labels=False.")
    if all(label is not None and text is not None for label, text in known):
        pairs: set[Any] = set(known)
        if len(pairs) == len({label for label, _ in pairs}) == len({text for _, text in pairs}):
            order = [text for _, text in sorted(pairs)]  # as they were numbered
            return np.array([order.index(word) for word in words], np.int32), tuple(map(str, order))
    found = sorted(set(map(str, words)), key=natural)
    places = {word: number for number, word in enumerate(found)}
    return np.array([places[str(word)] for word in words], np.int32), tuple(found)
