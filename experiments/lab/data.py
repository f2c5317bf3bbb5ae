"""The images of an experiment: one of four data sets by name, or a user's own."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from experiments.lab.options import as_typed, check_options, option
from experiments.lab.processes import by_first, is_first
from fm_jax.data.arrays import Split, fingerprint, load_npz, standardise
from fm_jax.data.digits import load_digits
from fm_jax.data.folder import load_folder
from fm_jax.data.images import ImageDataset, load_images
from fm_jax.data.latents import Latents, latent_batches, latent_dataset, open_latents
from fm_jax.data.picture import Background, Colour, Fit
from fm_jax.data.records import load_records, load_tfds
from fm_jax.latents import FLUX, PIXELS, SD, SD3, SDXL, LatentSpace, check_latents
from fm_jax.train.folder import write_text

T = TypeVar("T")
FACTS = "data.json"
"""The file of a run that says what its data are."""
SOURCES = ("dataset", "folder", "npz", "tfds", "array_record", "encoded")
"""Options that say which images; one is given."""
SIDES = (1, 65_536)
Space = Literal["measured", "own", "sd", "sdxl", "sd3", "flux"]
SPACES = {"sd": SD, "sdxl": SDXL, "sd3": SD3, "flux": FLUX}
"""The published latent spaces by name."""
_OPTIONS = ", ".join(map(option, SOURCES))
_WHERE = ("folder", "npz", "array_record", "encoded", "decoder", "data_dir", "csv")
"""Options that say where data are, which may move: what they are is told by their checksum."""
MAY_CHANGE = (*(f"data.{name}" for name in (*_WHERE, "stream")), "corpus", "tokenizer", "folder")
_PICTURES = ("size", "colour", "background", "skip_broken", "stream")
_TYPED = {
    "skip_broken=True": "--skip-broken",
    "stream=True": "--stream True",
    "labels='none'": "--labels none",
    "labels=False": "--labels none",
    "give size,": "give --size,",
    "a smaller size,": "a smaller --size,",
    "test_share": "--test-share",
    "value_range=(low, high), or (-inf, inf) for latents": "--value-range LOW HIGH, or --latents",
    r"value_range=\(([^,]*), ([^)]*)\)": r"--value-range \1 \2",
    "value_range": "--value-range",
    "name one by images": "name one by --image-entry",
    "name one by labels": "name one by --label-entry",
    "channels must be said": "--channels must be said",
    "'first' for": "first for",
    "'last' for": "last for",
}
"""What options are called on a command line."""
_TAKERS = {
    **dict.fromkeys(_PICTURES, ("folder", "tfds", "array_record")),
    "labels": ("folder", "npz", "tfds", "array_record", "encoded"),
    "csv": ("folder",),
    "image_entry": ("npz",),
    "label_entry": ("npz",),
    "value_range": ("npz",),
    "latents": ("npz",),
    "channels": ("npz",),
    "decoder": ("encoded",),
    "space": ("encoded",),
    **dict.fromkeys(("fit", "width"), ("folder", "tfds", "array_record")),
    "test_share": ("folder", "npz", "tfds", "array_record"),
}


@dataclass(frozen=True)
class Data:
    """Which images, and what is made of them."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] | None = None
    """One of four by name: "digits" are embedded in scikit-learn, the others come from TFDS."""
    folder: Path | None = None
    """A folder of pictures, with a subfolder for each class or without."""
    npz: Path | None = None
    """A file of arrays, .npz with images and perhaps labels, or .npy with images."""
    tfds: str | None = None
    """Any data set of TFDS that was prepared as array_record."""
    array_record: Path | None = None
    """A file of ArrayRecord, or a folder of them, whose records are pictures or tf.train.Examples."""
    encoded: Path | None = None
    """A folder of latents that `python -m experiments.encode` wrote; each epoch draws them anew."""
    decoder: Path | None = None
    """The autoencoder that made them, where it is no longer where it was."""
    space: Space = "measured"
    """What a model sees of them: mean 0 and variance 1 in each channel (measured), what the authors of the autoencoder
    make of its latents (own), or the published constants of that name."""
    size: int | None = None
    """Height and width that pictures are brought to; by default they must all have one size."""
    width: int | None = None
    """Their width, where it is not the height."""
    fit: Fit = "crop"
    """How: the middle is cut out (crop), sides change apart (resize), or a border is put around (pad)."""
    colour: Colour | None = None
    """By default grey if all pictures are."""
    background: Background = "white"
    """What lies behind transparent parts, and around what is padded."""
    labels: Literal["given", "none"] = "given"
    """Train with the labels that there are, such as names of subfolders, or with none."""
    csv: Path | None = None
    """A table with a file and a label in each row, in place of subfolders."""
    image_entry: str | None = None
    """The entry of an .npz with the images."""
    label_entry: str | None = None
    """The entry of an .npz with the labels."""
    value_range: tuple[float, float] | None = None
    """What becomes -1 and 1, of arrays that are not uint8."""
    channels: Literal["first", "last"] | None = None
    """Where the channels of arrays are, where their shape does not say."""
    latents: bool = False
    """The arrays are latents: each channel is brought to mean 0 and variance 1, and samples are brought back."""
    test_share: float | None = None
    """Share of every class that is held out; by default a tenth, where the data have no test images of their own."""
    skip_broken: bool = False
    """Leave out what cannot be read, and list it, in place of ending."""
    stream: bool | None = None
    """Read pictures when they are drawn; by default if they would not fit into memory."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets."""
    num_images: int | None = None
    """Only so many of the real images of each split; by default all."""

    def __post_init__(self) -> None:
        check_options(self, test_share="[0, 1)", value_range="(-inf, inf)", size=SIDES, width=SIDES)
        if len(self._given()) > 1:
            named = " and ".join(map(option, self._given()))
            raise ValueError(f"One of {_OPTIONS} must say which images, got {named}. experiments.images takes any one.")
        if self.latents and self.value_range is not None:
            raise ValueError("--latents are used as they are, and --value-range says what is not: give one.")
        if self.csv is not None and self.labels == "none":
            raise ValueError("--csv gives labels, and --labels none takes none: give one.")

    @property
    def source(self) -> str:
        """The option that says which images."""
        if not self._given():
            raise ValueError(f"One of {_OPTIONS} must say which images: give one.")
        return self._given()[0]

    def _given(self) -> list[str]:
        return [name for name in SOURCES if getattr(self, name) is not None]

    def unused(self, prefix: str = "data.") -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        for name, takers in _TAKERS.items():
            if self.source not in takers:
                would = " and ".join(map(option, takers))
                yield prefix + name, f"{option(self.source)} does not take it; {would} would"
        if self.size is None:
            for name in ("fit", "width"):
                yield prefix + name, "without --size pictures keep theirs"
        if self.source not in ("dataset", "tfds") or self.dataset == "digits":
            yield prefix + "data_dir", "only data sets of TFDS are read from there"
        if self.labels == "none":
            yield prefix + "label_entry", "--labels none takes none"


@dataclass(frozen=True)
class Facts:
    """What a run has to know of its data: written to its folder, for whoever draws from it without them."""

    source: str
    """Where they are from, in words."""
    num_images: int
    """To train on."""
    num_test: int
    """Held out."""
    shape: tuple[int, ...]
    """Of one image, (h, w, c)."""
    class_names: tuple[str, ...] = ()
    """Empty without labels."""
    mean: tuple[float, ...] | None = None
    """Of each channel of latents, with `std`."""
    std: tuple[float, ...] | None = None
    checksum: str | None = None
    """Of the images to train on, with their labels and names."""
    checksum_test: str | None = None
    """Of those held out."""
    square: int = 1
    """Side of the squares of latent pixels whose places have a mean and a deviation of their own."""
    autoencoder: str | None = None
    """SHA-256 of the autoencoder that made the latents, if one did."""
    image_shape: tuple[int, ...] | None = None
    """Of one of the images that they were made of."""

    @property
    def latent_space(self) -> LatentSpace:
        """What a model sees of the data: they themselves but for latents."""
        if self.mean is None or self.std is None:
            return PIXELS
        return LatentSpace(self.mean, tuple(1 / number for number in self.std), self.square)

    def identity(self) -> dict[str, Any]:
        """What a run that continues must find again."""
        return {
            "num_images": self.num_images,
            "shape": list(self.shape),
            "classes": list(self.class_names),
            "checksum": self.checksum,
        }


class Loaded(NamedTuple):
    """The images of a run."""

    train: ImageDataset
    test: ImageDataset | None
    facts: Facts
    latents: Latents | None = None
    """What the training draws from, where the images are latents of `--encoded`."""


DIGITS = tuple(map(str, range(10)))
PRESETS = {
    "digits": Facts("scikit-learn's digits", 1500, 297, (8, 8, 1), DIGITS),
    "mnist": Facts("mnist", 60_000, 10_000, (28, 28, 1), DIGITS),
    "fashion_mnist": Facts("fashion_mnist", 60_000, 10_000, (28, 28, 1), DIGITS),
    "cifar10": Facts("cifar10", 50_000, 10_000, (32, 32, 3), DIGITS),
}
"""What is known of the four without reading them, the names of their classes aside."""


def load(data: Data, progress: bool | None = None) -> Loaded:
    """Reads the images of both splits, or finds where they are."""
    if data.encoded is not None:
        return load_latents(data)
    try:
        train, test = _load(data, progress)
    except ValueError as error:  # in the words of the library
        raise type(error)(as_typed(str(error), _TYPED)) from error
    mean = std = None
    if data.latents:
        train, mean, std = standardise(train)
        if test is not None:
            scaled = ((test.images[:] - mean) / std).astype(np.float32)
            test = test._replace(images=scaled, value_range=train.value_range)
    facts = Facts(
        data.dataset or data.tfds or f"{data.source} {Path(getattr(data, data.source)).name}",
        len(train.images),
        0 if test is None else len(test.images),
        tuple(train.images.shape[1:]),
        tuple(train.class_names),
        None if mean is None else tuple(mean.tolist()),
        None if std is None else tuple(std.tolist()),
        fingerprint(train),
        None if test is None else fingerprint(test),
    )
    return Loaded(train, test, facts)


def _load(data: Data, progress: bool | None) -> tuple[ImageDataset, ImageDataset | None]:
    """The images to train on, and those held out."""
    num = data.num_images
    if data.dataset == "digits":
        train, test = (load_digits(split) for split in ("train", "test"))
        return train.subset(slice(num)), test.subset(slice(num))
    if data.dataset is not None:
        train, test = (
            load_images(data.dataset, split if num is None else f"{split}[:{num}]", data_dir=data.data_dir)
            for split in ("train", "test")
        )
        return train, test
    labelled, notes = data.labels == "given", list[str]()

    def said(text: str) -> None:
        notes.append(text)
        if is_first():
            print(text)

    where: Any = getattr(data, data.source)
    of_pictures: dict[str, Any] = {
        "size": None if data.size is None else (data.size, data.width or data.size),
        "fit": data.fit,
        "colour": data.colour,
        "background": data.background,
        "test_share": data.test_share,
        "skip_broken": data.skip_broken,
        "stream": data.stream,
        "num_images": num,
        "say": said,
        "progress": progress if is_first() else False,
    }
    both: tuple[Split, ...] = ("train", "test")
    found: tuple[ImageDataset, ImageDataset | None] | None = None
    match data.source:
        case "folder":
            labels = data.csv or ("folders" if labelled else "none")
            found = load_folder(where, both, labels=labels, **of_pictures)
        case "tfds":
            found = load_tfds(where, both, data_dir=data.data_dir, labels=labelled, **of_pictures)
        case "array_record":
            found = load_records(where, both, labels=labelled, **of_pictures)
    if found is not None:
        read = isinstance(found[0].images, np.ndarray)
        if read and data.background != "white" and data.fit != "pad" and not any("laid on" in note for note in notes):
            raise ValueError(
                f"--background {data.background} would have no effect: no picture has transparent parts. Leave it out."
            )
        return found
    arrays = load_npz(
        where,
        both,
        images=data.image_entry,
        labels=data.label_entry,
        test_share=data.test_share,
        value_range=(-math.inf, math.inf) if data.latents else data.value_range,
        channels=data.channels,
        say=said,
    )
    return _asked_for(data, arrays[0]), None if arrays[1] is None else _asked_for(data, arrays[1])


def load_latents(data: Data) -> Loaded:
    """The latents of `data.encoded`, none of which is read but for a look at their spread.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they are damaged, or a space is asked for in which they are far from unit variance.
    """
    assert data.encoded is not None
    latents = open_latents(data.encoded)
    part, labelled = slice(data.num_images), data.labels == "given"
    splits = {name: split.subset(part) for name, split in latents.splits.items()}
    if not labelled:
        splits = {name: dataclasses.replace(split, labels=None) for name, split in splits.items()}
    class_names = latents.class_names if labelled else ()
    latents = dataclasses.replace(latents, splits=splits, class_names=class_names)
    space = _space(data, latents)
    train = latent_dataset(latents, "train", space)
    test = latent_dataset(latents, "test", space) if "test" in splits else None
    numbers = latents.shape[-1] * space.square**2
    shift, scale = (x if isinstance(x, tuple) else (x,) * numbers for x in (space.shift, space.scale))
    std = latents.std.tolist() if data.space == "measured" else [1 / number for number in scale]  # as they were found
    image_shape = latents.about.get("image_shape")
    facts = Facts(
        f"encoded {data.encoded.name}",
        len(splits["train"]),
        0 if test is None else len(splits["test"]),
        latents.shape,
        class_names,
        None if space == PIXELS else shift,
        None if space == PIXELS else tuple(std),
        fingerprint(train),
        None if test is None else fingerprint(test),
        space.square,
        latents.autoencoder,
        None if image_shape is None else tuple(image_shape),
    )
    return Loaded(train, test, facts, latents)


def _space(data: Data, latents: Latents) -> LatentSpace:
    """What a model sees of latents; refuses a space in which they are far from unit variance."""
    if data.space == "measured":
        return latents.measured()
    space = latents.space if data.space == "own" else SPACES[data.space]
    split = latents.splits["train"]
    size = min(256, len(split))
    drawn = next(latent_batches(split, space=space, batch_size=size, seed=0, process_index=0, process_count=1))
    try:
        check_latents(drawn["x1"], f"latents in --space {data.space}")
    except ValueError as error:
        raise ValueError(
            f"{str(error).partition(': LatentSpace')[0]}: --space measured brings each channel to it."
        ) from None
    return space


def _asked_for(data: Data, dataset: ImageDataset) -> ImageDataset:
    """Of arrays, as many as are asked for, with labels or without."""
    if data.labels == "none":
        dataset = dataset._replace(labels=None, class_names=())
    if data.num_images is None or data.num_images >= len(dataset.images):
        return dataset
    return dataset.subset(np.linspace(0, len(dataset.images) - 1, data.num_images).astype(int))


def class_names_of(run_dir: Path) -> tuple[str, ...] | None:
    """The names of the classes of a run; `None` where its folder does not say."""
    try:
        return tuple(json.loads((run_dir / FACTS).read_bytes())["class_names"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Noted(Protocol):
    """A dataclass of what a run has to know of its data."""

    def identity(self) -> dict[str, Any]:
        """What a run that continues must find again."""
        ...


@by_first
def write_facts(run_dir: Path, facts: Noted) -> None:
    """Writes `data.json`."""
    write_text(run_dir / FACTS, json.dumps(dataclasses.asdict(facts), indent=2) + "\n")  # type: ignore[call-overload]


def read_facts(run_dir: Path, data: Data) -> Facts:
    """What is known of the data of a run without reading them.

    Raises:
        ValueError: if that is nothing, for want of its `data.json`.
    """
    try:
        return noted(run_dir, Facts)
    except FileNotFoundError:
        if data.dataset is not None:
            return PRESETS[data.dataset]
        raise ValueError(f"{run_dir} has no {FACTS}: the command that trained the run writes it anew.") from None


def noted(run_dir: Path, kind: Callable[..., T]) -> T:
    """What a run noted in its `data.json`, as a dataclass of that kind.

    Raises:
        FileNotFoundError: if it noted nothing.
        ValueError: if that is damaged.
    """
    content = (run_dir / FACTS).read_bytes()
    try:
        record = json.loads(content)
        lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
        return kind(**(record | lists))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run_dir / FACTS} is damaged ({error}). The command that trained the run writes it anew."
        ) from None
