"""Latents of your images by an autoencoder, once, for training on latents; and features of captions by a text encoder.

Paper: Rombach et al. 2022 (arXiv:2112.10752), section 3 and appendix G.
Command: `python -m experiments.encode --dataset cifar10 --autoencoder FOLDER --out latents/cifar10`; any data of
`experiments.images` in place of `--dataset`; `--flip` encodes the mirrored images too. Then
`python -m experiments.latent --encoded latents/cifar10`. For captions, a line each:
`python -m experiments.encode --text FOLDER --captions FILE --out latents/captions`.
The autoencoder is a folder that `fm_jax.weights.open_model` opens, a run of `experiments.autoencoder`, or a file of
safetensors of a published one. Killed at any point, the same command goes on, to the same bits.
Hardware: two CPU cores for small images; an accelerator for more. One process, all of its devices.
Expect: a folder of ArrayRecord with the mean and the deviation of the latents of each image in float16, labels, and
`latents.json` with statistics and checksums. `docs/howto/latents.md` goes through it.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command_line
from experiments.lab.codecs import open_codec, sha256_of
from experiments.lab.data import SOURCES, Data, load
from experiments.lab.options import as_typed, check_options, of_smoke
from experiments.lab.processes import everywhere, gathered, own_folder, spread
from experiments.lab.small_codec import write_small_autoencoder, write_small_text_encoder
from experiments.lab.smoke import smoke
from experiments.lab.training import config_to_json
from fm_jax.data.encoding import write_latents
from fm_jax.data.latents import Latents
from fm_jax.data.texts import TextBatch, Texts, write_texts
from fm_jax.text import ClipText, T5Encoder, read_tokenizer
from fm_jax.train.folder import FolderInUseError
from fm_jax.types import Array, Params
from fm_jax.weights import WeightsError, open_model

_TYPED = {
    "give another folder": "give another --out",
    "texts of another encoder": "texts of another encoder or tokenizer",
    "batch_size": "--batch-size",
    "another flip": "another --flip",
}
"""What the library calls its arguments, and what they are here."""
_SMOKE = {"data": {"num_images": 40}, "batch_size": 8}
SHARD = 4096
"""Images in a file, or the next multiple of `batch_size`."""


@dataclass(frozen=True)
class Config:
    """What to encode, and by what."""

    data: Data = field(default_factory=Data)
    autoencoder: Path | None = None
    """Folder or file of the autoencoder."""
    out: Path = Path("latents")
    """Folder of the latents."""
    flip: bool = False
    """Encode mirrored images as well, for training with --flip."""
    batch_size: int = 64
    """Images, or captions, encoded at once, over all devices."""
    text: Path | None = None
    """Folder of a text encoder, CLIP or T5."""
    captions: Path | None = None
    """A text file with a caption in each line, such as those of the images in their order."""
    tokenizer: Path | None = None
    """Folder of its tokenizer; by default the folder itself, or the one beside it with tokenizer in place of
    text_encoder in its name."""
    max_tokens: int | None = None
    """Tokens of every caption; by default 77 for CLIP, and for T5 as many as the longest caption has."""
    features: Literal["last", "penultimate"] = "last"
    """Which state is kept: behind the last block and its normalisation, as of Stable Diffusion 1 and T5, or in front of
    the last block, as of Stable Diffusion 2, XL and 3."""
    padding: Literal["seen", "masked"] | None = None
    """Whether the encoder sees padding, whose features are then kept too: as of CLIP, and of T5 in Stable Diffusion 3
    and FLUX; or not, as of T5 in PixArt and Wan. By default seen for CLIP and masked for T5."""
    truncate: bool = False
    """Cut captions that are too long, in place of refusing them."""
    smoke: bool = False
    """Run the whole path once on a few digits with small random encoders."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.data.encoded is not None:
            raise ValueError("--encoded names latents already: give images, such as --dataset cifar10.")
        if (self.text is None) != (self.captions is None):
            raise ValueError("--text, the encoder, and --captions, what it encodes, go together: give both.")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        if not self.smoke and self.text is None and self.autoencoder is None:
            raise ValueError("--autoencoder must be given, for images; or --text and --captions, for captions.")
        if self.smoke:
            yield from of_smoke(_SMOKE | dict.fromkeys(("text", "captions", "autoencoder", "tokenizer")))
            yield from ((f"data.{name}", "--smoke has its own images") for name in SOURCES)
        elif self.autoencoder is None:
            for each in dataclasses.fields(Data):
                yield f"data.{each.name}", "--autoencoder is not given, by which images are encoded"
            yield "flip", "--autoencoder is not given, by which images are encoded"
        else:
            yield from self.data.unused()
        if self.text is None:
            for name in ("tokenizer", "max_tokens", "features", "padding", "truncate"):
                yield name, "--text is not given"


def run(config: Config) -> dict[str, Any]:
    """Encodes images, or captions, or both; returns what it prints."""
    if jax.process_count() > 1:
        raise ValueError(f"experiments.encode is one process with all of its devices, got {jax.process_count()}.")
    small = config.smoke
    config = smoke(config, **_SMOKE)
    try:
        with own_folder(config.out):
            if small:
                config = _with_small_encoders(config)
            found = dict[str, Any]()
            if config.autoencoder is not None:
                found |= _report_latents(encode_images(config))
            if config.text is not None:
                found |= _report_texts(encode_captions(config))
    except FolderInUseError as error:
        raise FolderInUseError(str(error).replace("--run-dir", "--out")) from None
    return found


def encode_images(config: Config, progress: bool | None = None) -> Latents:
    """The latents of all images, in `config.out`."""
    assert config.autoencoder is not None
    loaded = load(config.data)
    codec = open_codec(config.autoencoder, loaded.facts.shape)
    size = "x".join(map(str, loaded.facts.shape))
    print(f"{loaded.facts.source}: {loaded.facts.num_images + loaded.facts.num_test:,} images {size}.")
    datasets = {"train": loaded.train} | ({} if loaded.test is None else {"test": loaded.test})
    about = {
        "source": loaded.facts.source,
        "image_shape": list(loaded.facts.shape),
        "autoencoder": str(config.autoencoder.absolute()),
        "data": _absolute(config_to_json(config.data)),
    }
    with _in_words():
        return write_latents(
            config.out,
            datasets,
            codec.encoder(),
            autoencoder=sha256_of(codec.params),
            space=codec.space,
            flip=config.flip,
            batch_size=config.batch_size,
            shard_size=-(-SHARD // config.batch_size) * config.batch_size,
            about=about,
            progress=progress,
        )


def _absolute(record: dict[str, Any]) -> dict[str, Any]:
    """Paths of data as they are found from anywhere."""
    paths = {name for name in ("folder", "npz", "array_record", "csv", "data_dir") if record[name] is not None}
    return {name: str(Path(value).absolute()) if name in paths else value for name, value in record.items()}


def encode_captions(config: Config, progress: bool | None = None) -> Texts:
    """The features of all captions, in `config.out`."""
    assert config.text is not None
    assert config.captions is not None
    captions = read_captions(config.captions)
    module, params = open_model(config.text, dtype=jnp.float32)
    if not isinstance(module, ClipText | T5Encoder):
        raise WeightsError(f"--text {config.text} is a {type(module).__name__}, and no encoder of text.")
    if config.features == "penultimate":
        module = module.clone(keep_hidden=2)
    places: dict[str, int] = {}
    for i, caption in enumerate(captions):
        places.setdefault(caption, i + 1)
    unique = list(places)
    tokenizer = read_tokenizer(config.tokenizer or tokenizer_beside(config.text), length=config.max_tokens)
    try:
        tokens = tokenizer(unique, truncate=config.truncate)
    except ValueError as error:
        told = re.sub(
            r"^prompt (\d+) has", lambda m: f"Line {places[unique[int(m[1])]]} of {config.captions} has", str(error)
        )
        raise ValueError(told.replace("truncate=True", "--truncate")) from None
    with_padding = isinstance(module, ClipText) if config.padding is None else config.padding == "seen"
    function = _text_function(module, config.features, masked=not with_padding)
    params, rows = everywhere(params), {caption: i for i, caption in enumerate(unique)}

    def encode(some: Sequence[str]) -> TextBatch:
        numbers = np.array([rows[caption] for caption in some])
        ids, mask = tokens.ids[numbers], tokens.mask[numbers]
        features, pooled = function(params, spread(ids), spread(mask))
        return TextBatch(
            gathered(features)[: len(some)], mask, None if pooled is None else gathered(pooled)[: len(some)]
        )

    with _in_words():
        return write_texts(
            config.out,
            captions,
            encode,
            encoder=f"{config.features}, {tokens.ids.shape[1]} tokens {sha256_of(tokens)[:16]}, {sha256_of(params)}",
            with_padding=with_padding,
            batch_size=config.batch_size,
            shard_size=-(-1024 // config.batch_size) * config.batch_size,
            about={"encoder": str(config.text.absolute()), "features": config.features},
            progress=progress,
        )


def _text_function(module: Any, features: str, *, masked: bool) -> Any:
    @partial(jax.jit)
    def function(params: Params, ids: Array, mask: Array) -> tuple[Array, Array | None]:
        found = module.apply({"params": params}, ids, mask if masked else None)
        pooled = found.pooled if found.projected is None else found.projected
        return found.last if features == "last" else found.hidden[-2], pooled

    return function


def read_captions(path: Path) -> list[str]:
    """The lines of a text file, none of them empty; what ends one is a line feed, with a carriage return or without.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, has an empty line, or is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--captions {path} does not exist: give a text file with a caption in each line.")
    try:
        lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--captions {path} must be a text in UTF-8: {error}.") from None
    if lines == [""]:
        raise ValueError(f"--captions {path} must have a caption in each line: it is empty.")
    if empty := [i for i, line in enumerate(lines, 1) if not line.strip()]:
        raise ValueError(f"--captions {path} must have a caption in each line: line {empty[0]} is empty.")
    return [line.strip() for line in lines]


def tokenizer_beside(folder: Path) -> Path:
    """The folder of the tokenizer of a text encoder: itself, or one beside it as pipelines of diffusers have it."""
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    for each in (folder, beside):
        if (each / "tokenizer_config.json").is_file():
            return each
    raise FileNotFoundError(f"Neither {folder} nor {beside} has a tokenizer_config.json: give --tokenizer.")


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """What the library refuses, in the words of the command line."""
    try:
        yield
    except ValueError as error:
        raise type(error)(as_typed(str(error), _TYPED)) from error


def _with_small_encoders(config: Config) -> Config:
    """A smoke run's: digits, a random autoencoder, a random text encoder and a few captions."""
    write_small_autoencoder(config.out / "autoencoder")
    write_small_text_encoder(config.out / "text_encoder")
    captions = config.out / "captions.txt"
    captions.write_text("a three\na seven\na three\n")
    own: dict[str, Any] = {"autoencoder": config.out / "autoencoder", "text": config.out / "text_encoder"}
    data = Data(dataset="digits", num_images=_SMOKE["data"]["num_images"])  # type: ignore[index]
    return dataclasses.replace(config, data=data, captions=captions, **own)


def _report_latents(latents: Latents) -> dict[str, Any]:
    num = {name: len(split) for name, split in latents.splits.items()}
    low, high = float(latents.std.min()), float(latents.std.max())
    shape = "x".join(map(str, latents.shape))
    mirrored = ", and of mirrored ones" if latents.splits["train"].flipped else ""
    print(
        f"{latents.folder}: latents {shape} of {sum(num.values()):,} images{mirrored}; mean of a channel from "
        f"{latents.mean.min():.3f} to {latents.mean.max():.3f}, deviation {low:.3f} to {high:.3f}\n"
        f"train on them: python -m experiments.latent --encoded {latents.folder}"
    )
    return {"num": num, "shape": latents.shape, "mean": latents.mean.tolist(), "std": latents.std.tolist()}


def _report_texts(texts: Texts) -> dict[str, Any]:
    tokens, width = texts.shape
    print(
        f"{texts.folder}: {len(texts.captions):,} different captions of {len(texts.index):,}, {tokens} tokens of "
        f"{width} features" + (f" and {texts.num_pooled} pooled" if texts.num_pooled else "")
    )
    return {"captions": len(texts.captions), "tokens": tokens, "width": width, "pooled": texts.num_pooled}


def main() -> None:
    """The command line."""
    command_line.main(run, Config, Config(), __doc__)


if __name__ == "__main__":
    main()
