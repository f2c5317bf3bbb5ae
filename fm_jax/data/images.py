"""Images with or without labels, and those of TFDS: MNIST, Fashion-MNIST, CIFAR-10 and any other, without TensorFlow.

Prepare a dataset once, which downloads it: `python -m fm_jax.data.images mnist --data-dir DIR`.
"""

import argparse
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from fm_jax.checks import check_array, check_finite, check_member, shown, why_no_folder
from fm_jax.data.lazy import LazyImages

Name = Literal["mnist", "fashion_mnist", "cifar10"]
NAMES: tuple[Name, ...] = get_args(Name)
_CHUNK = 1000


class ImageDataset(NamedTuple):
    """Images, with labels or without.

    Attributes:
        images: [n, h, w, c], uint8 or float32; an array, a memory-mapped one, or `LazyImages`, read when drawn.
        labels: [n] integers that index `class_names`; `None` without labels.
        class_names: a name for every class; empty without labels.
        levels: pixels take so many evenly spaced values (256; digits 17), so that in [-1, 1] one is `2 / (levels - 1)`
            from the next.
        value_range: of float images, (low, high), which become -1 and 1; (-inf, inf) for what is used as it is, such as
            latents. It has to be said unless there are negative values, and all lie in [-1, 1].
        fingerprint: of the data where they come from; by default it is computed of the arrays, see
            `fm_jax.data.arrays.fingerprint`.
    """

    images: Any
    labels: Any = None
    class_names: tuple[str, ...] = ()
    levels: int = 256
    value_range: tuple[float, float] | None = None
    fingerprint: str | None = None

    @property
    def num_classes(self) -> int:
        """0 without labels."""
        return len(self.class_names)

    def subset(self, indices: np.ndarray | slice) -> "ImageDataset":
        """Some of the examples, by their numbers; a slice copies nothing."""
        images, lazy = self.images, isinstance(self.images, LazyImages)
        if isinstance(images, np.memmap) and not isinstance(indices, slice):  # whose rows would be read into memory
            images = LazyImages(images.__getitem__, len(images), images.shape[1:], images.dtype)
        images = images.subset(indices) if isinstance(images, LazyImages) else images[indices]
        labels = None if self.labels is None else self.labels[indices]
        return self._replace(images=images, labels=labels, fingerprint=None if not lazy else self.fingerprint)


def to_float(images: np.ndarray) -> np.ndarray:
    """Maps uint8 images to float32 in [-1, 1]: `x / 127.5 - 1`.

    Example:
        >>> to_float(np.array([0, 255], dtype=np.uint8))
        array([-1.,  1.], dtype=float32)
    """
    check_array("images", images)
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}.")
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Maps floats to the nearest uint8 pixel: the inverse of `to_float`. Values outside [-1, 1] are clipped.

    NaN and infinity have no pixel, and are refused, as integers are, which may be pixels already.

    Example:
        >>> to_uint8(np.array([-1.5, 0.999]))
        array([  0, 255], dtype=uint8)
    """
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"x must be floating point, got {x.dtype}.")
    check_finite("x", x)
    return np.rint((np.clip(np.asarray(x, dtype=np.float32), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def load_images(name: Name, split: str, *, data_dir: str | os.PathLike | None = None) -> ImageDataset:
    """Decodes a prepared dataset into memory: 47 MB for MNIST, 154 MB for CIFAR-10, in a few seconds.

    Args:
        name: `"mnist"`, `"fashion_mnist"` or `"cifar10"`.
        split: `"train"`, `"test"`, or a slice of either: `"train[:1000]"`, `"test[10%:20%]"`.
        data_dir: where TFDS keeps its datasets; by default the environment variable `TFDS_DATA_DIR`, and without it
            `~/tensorflow_datasets`.

    Returns:
        Images [n, 28, 28, 1] or [n, 32, 32, 3] uint8, labels [n] int32.

    Raises:
        ValueError: if there is no such dataset or split, or the slice is empty.
        FileNotFoundError: if the dataset was not prepared there; says how to.
        ImportError: if tensorflow-datasets is not installed.
    """
    check_member("name", name, NAMES)
    if not isinstance(split, str) or not re.fullmatch(r"(train|test)(\[(-?\d+%?)?:(-?\d+%?)?\])?", split):
        raise ValueError(f"split must be 'train', 'test' or a slice of them like 'train[:1000]', got {shown(split)}.")
    builder = open_builder(name, data_dir)
    if builder.info.splits[split].num_examples == 0:
        raise ValueError(f"split must have at least 1 example, got {split!r}.")

    source = builder.as_data_source(split)
    images = np.empty((len(source), *builder.info.features["image"].shape), dtype=np.uint8)
    labels = np.empty(len(source), dtype=np.int32)
    for start in range(0, len(source), _CHUNK):
        chunk = source.__getitems__(list(range(start, min(start + _CHUNK, len(source)))))
        images[start : start + len(chunk)] = [example["image"] for example in chunk]
        labels[start : start + len(chunk)] = [example["label"] for example in chunk]
    return ImageDataset(images, labels, tuple(builder.info.features["label"].names))


def open_builder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Any:
    """TFDS's builder of a data set that lies prepared as array_record, which can be read without TensorFlow.

    Args:
        name: as TFDS calls it, such as "mnist" or "eurosat/rgb".
        data_dir: as in `load_images`.

    Raises:
        ValueError: if TFDS knows no such data set.
        FileNotFoundError: if the data set was not prepared there; says how to.
        ImportError: if tensorflow-datasets is not installed.
    """
    tfds = _import_tfds("open_builder")
    directory, origin = _find_data_dir(data_dir)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name must be that of a data set of TFDS, such as 'mnist', got {shown(name)}.")
    try:
        builder = tfds.builder(name, data_dir=directory)
    except Exception as error:  # of many classes
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"name must be that of a data set of TFDS, such as 'mnist', got {name!r}: {told}") from None
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"{name} is not prepared in {directory} ({origin}). Run `python -m fm_jax.data.images {name} --data-dir "
            f"{directory}`, or name a directory that has it by data_dir or TFDS_DATA_DIR."
        )
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise FileNotFoundError(
            f"{name} is in {directory} ({origin}) as {file_format}, not as array_record. Run "
            f"`python -m fm_jax.data.images {name} --data-dir DIR` with another DIR."
        )
    return builder


def prepare(name: str, *, data_dir: str | os.PathLike | None = None) -> Path:
    """Downloads a dataset and writes it as array_record, which is what can be read without TensorFlow.

    Args:
        name: `"mnist"`, `"fashion_mnist"`, `"cifar10"` or any other that TFDS knows.
        data_dir: as in `load_images`.

    Returns:
        The directory written. Does nothing if it is there already.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name must be that of a data set of TFDS, such as 'mnist', got {shown(name)}.")
    directory, _ = _find_data_dir(data_dir)
    builder = _import_tfds("prepare").builder(name, data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def _find_data_dir(data_dir: str | os.PathLike | None) -> tuple[Path, str]:
    # TFDS reads the variable only once, when it is imported.
    if data_dir is not None:
        return Path(os.path.expanduser(data_dir)), "data_dir"
    if environment := os.environ.get("TFDS_DATA_DIR"):
        return Path(os.path.expanduser(environment)), "TFDS_DATA_DIR"
    return Path(os.path.expanduser("~/tensorflow_datasets")), "the default: neither data_dir nor TFDS_DATA_DIR is set"


def _import_tfds(caller: str) -> ModuleType:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(f"{caller} needs tensorflow-datasets: pip install 'fm_jax[data]'.") from error
    return tensorflow_datasets


def main() -> None:
    """Prepares one dataset from the command line."""
    parser = argparse.ArgumentParser(prog="python -m fm_jax.data.images", description="Download and prepare a dataset.")
    parser.add_argument("name", help=f"{', '.join(NAMES)}, or any other that TFDS knows")
    parser.add_argument("--data-dir", help="default: TFDS_DATA_DIR, else ~/tensorflow_datasets")
    arguments = parser.parse_args()
    if arguments.data_dir is not None and not arguments.data_dir.strip():
        parser.error("--data-dir must not be empty. Give a value, or leave it out.")
    directory, origin = _find_data_dir(arguments.data_dir)
    if why := why_no_folder(directory):
        raise SystemExit(f"{directory} ({origin}) cannot be a folder: {why}. Give another --data-dir.")
    print(f"Preparing {arguments.name} in {directory} ({origin}).")
    print("This needs the network and pip install 'fm_jax[data]' (tensorflow-datasets, array_record, pillow,")
    print("importlib_resources), but not TensorFlow.")
    try:
        print(f"Ready: {prepare(arguments.name, data_dir=arguments.data_dir)}")
    except Exception as error:  # of TFDS, its network and its files, in many classes
        if os.environ.get("FM_JAX_TRACEBACK"):
            raise
        raise SystemExit(
            f"{arguments.name} could not be prepared in {directory}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:500]} (FM_JAX_TRACEBACK=1 shows where.)"
        ) from None


if __name__ == "__main__":
    main()
