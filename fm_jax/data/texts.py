"""Features of captions from a frozen text encoder, in records: each caption once, however many images it belongs to.

`python -m experiments.encode --text FOLDER --captions FILE` writes such a folder: files of ArrayRecord, `text-00000`
and so on, and `texts.json`, which says of which encoder they are.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fm_jax.checks import check_bool, check_function, check_integer, shown
from fm_jax.data.lazy import watched
from fm_jax.data.shards import ENCODING, Records, read_finished, read_json, shards, write_array, write_json, write_shard

INFO = "texts.json"
_HALF = np.dtype("<f2")


class TextBatch(NamedTuple):
    """What a text encoder makes of some captions, on the host.

    Attributes:
        tokens: features of the tokens, float32 [batch, n, d]; 0 where nothing was written.
        mask: which tokens are of the text, bool [batch, n], padding on the right.
        pooled: of the whole text, float32 [batch, p]; `None` for an encoder without it.
    """

    tokens: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray | None = None


EncodeText = Callable[[Sequence[str]], TextBatch]
"""`encode(captions)`: features of captions, of as many tokens in every call."""


@dataclass(frozen=True, eq=False)
class Texts:
    """A folder of features of captions.

    Attributes:
        folder: where it is.
        captions: each once, in the order in which they came first.
        index: int32 [n], for each caption that was given, such as those of the images in their order, its number.
        shape: tokens and width of the features, (n, d).
        num_pooled: width of what is pooled; 0 for none.
        encoder: what tells its features from those of another one.
        records: a caption each.
        about: whatever the writer added.
    """

    folder: Path
    captions: tuple[str, ...]
    index: np.ndarray
    shape: tuple[int, int]
    num_pooled: int
    encoder: str
    records: Records
    about: Mapping[str, Any]

    def read(self, numbers: np.ndarray) -> TextBatch:
        """The features of captions by their numbers, [batch] integers, such as `index[images]`.

        Raises:
            ValueError: for a number that there is not.
        """
        numbers = np.asarray(numbers)
        if numbers.ndim != 1 or (numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self.captions)):
            raise ValueError(f"numbers must be [batch] from 0 to {len(self.captions) - 1}, got {shown(numbers)}.")
        tokens = np.zeros((len(numbers), *self.shape), np.float32)
        mask = np.zeros(tokens.shape[:2], bool)
        pooled = np.zeros((len(numbers), self.num_pooled), np.float32)
        for i, record in enumerate(self.records.read(numbers)):
            stored, length = np.frombuffer(record, "<i4", 2)
            tokens[i, :stored] = np.frombuffer(record, _HALF, stored * self.shape[1], 8).reshape(stored, -1)
            mask[i, :length] = True
            pooled[i] = np.frombuffer(record, "<f4", self.num_pooled, 8 + 2 * stored * self.shape[1])
        return TextBatch(tokens, mask, pooled if self.num_pooled else None)


def write_texts(
    folder: Path,
    captions: Sequence[str],
    encode: EncodeText,
    *,
    encoder: str,
    with_padding: bool,
    batch_size: int = 64,
    shard_size: int = 1024,
    about: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Texts:
    """Encodes each caption once and writes its features in float16; a pass that was killed goes on to the same bits.

    Args:
        folder: made if need be.
        captions: one for each image, say; most may be there many times.
        encode: is always given `batch_size` captions, the last ones repeated.
        encoder: SHA-256 of its parameters and of what its tokenizer gives, say: what tells its features from those of
            another one.
        with_padding: whether the features of padding are written: published networks see those of CLIP. Otherwise
            they are read as 0, for a network that masks them.
        batch_size: captions encoded at once.
        shard_size: captions in a file, a multiple of `batch_size`.
        about: JSON values to be kept with them.
        progress: as in `fm_jax.data.encoding.write_latents`.

    Raises:
        ValueError: for no captions, an empty one, a folder with those of another encoder or with other captions, and
            features that are not finite or too large for float16.
        ImportError: if array_record is not installed.
    """
    check_function("encode", encode, "a function of captions", 1)
    check_bool("with_padding", with_padding)
    check_integer("batch_size", batch_size)
    check_integer("shard_size", shard_size)
    if shard_size % batch_size:
        raise ValueError(f"shard_size must be a multiple of batch_size={batch_size}, got {shard_size}.")
    if isinstance(captions, str) or not len(captions):
        raise ValueError(f"captions must be several strings, at least one, got {shown(captions)}.")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"captions[{i}] must be a text, got {shown(caption)}.")
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(caption, len(numbers)) for caption in captions], np.int32)
    unique, folder = list(numbers), Path(folder)
    what = {
        "encoder": encoder,
        "captions": hashlib.sha256(json.dumps(unique).encode()).hexdigest(),
        "with_padding": with_padding,
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    if (folder / INFO).is_file():
        before = read_json(folder / INFO, "a folder of texts")
        for name, ours in what.items():
            if (theirs := before.get(name)) != ours:
                words = {"encoder": "of another encoder", "captions": "of other captions"}
                raise ValueError(
                    f"{folder} holds texts {words.get(name, f'made with another {name}')} ({shown(theirs)}, and this "
                    f"is {shown(ours)}): give another folder. Nothing was overwritten."
                )
    elif left := sorted(path.name for path in folder.glob("text-*.array_record")):
        raise ValueError(
            f"{folder} holds {left[0]} and no {INFO} to say what it is: remove it, or give another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / INFO, {"finished": False} | what)

    def encoded(start: int, stop: int) -> TextBatch:
        part = unique[start:stop]
        found = encode([part[i % len(part)] for i in range(batch_size)])
        return TextBatch(*(None if each is None else np.asarray(each)[: stop - start] for each in found))  # type: ignore[arg-type]

    first = encoded(0, 1)
    todo = [each for each in shards(folder, "text", len(unique), shard_size) if not each[0].is_file()]
    parts = [(b, min(b + batch_size, stop)) for _, start, stop in todo for b in range(start, stop, batch_size)]
    batches = (_records(encoded(*part), with_padding) for part in parts)
    told: Iterator[list[bytes]] = watched(batches, len(parts), f"batches of {batch_size} captions", progress, ENCODING)
    for path, start, stop in todo:
        num = len(range(start, stop, batch_size))
        write_shard(path, (record for _ in range(num) for record in next(told)))
    for _ in told:  # to its end, which takes the bar away
        pass
    write_json(folder / "captions.json", {"captions": unique})
    write_array(folder / "captions_index.npy", index)
    info = what | {
        "shape": list(first.tokens.shape[1:]),
        "num_pooled": 0 if first.pooled is None else first.pooled.shape[1],
        "about": dict(about or {}),
    }
    write_json(folder / INFO, {"finished": True} | info)
    return open_texts(folder)


def open_texts(folder: str | Path) -> Texts:
    """Opens a folder of features of captions; none of them is read.

    Raises:
        FileNotFoundError: if it is none, or a file is missing.
        ValueError: if it is not finished, or damaged.
        ImportError: if array_record is not installed.
    """
    folder = Path(folder)
    info = read_finished(folder, INFO, "texts")
    try:
        captions = tuple(read_json(folder / "captions.json", "a folder of texts")["captions"])
        index = np.load(folder / "captions_index.npy", allow_pickle=False)
        records = Records(shards(folder, "text", len(captions), info["shard_size"]))
        shape = (int(info["shape"][0]), int(info["shape"][1]))
        return Texts(folder, captions, index, shape, info["num_pooled"], info["encoder"], records, info["about"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder / INFO} is damaged ({type(error).__name__}: {error}).") from None


def _records(batch: TextBatch, with_padding: bool) -> list[bytes]:
    records, largest = [], float(np.finfo(_HALF).max)
    for i, (tokens, mask) in enumerate(zip(batch.tokens, batch.mask, strict=True)):
        length = int(mask.sum())
        if not mask[:length].all():
            raise ValueError("mask must be True up to the length of a text and False behind it.")
        stored = len(tokens) if with_padding else length
        kept = tokens[:stored].astype(np.float32)
        if not (np.abs(kept) <= largest).all():
            raise ValueError(
                f"features must be finite and at most {largest:g}, as float16 is, got {np.abs(kept).max():g}."
            )
        parts = [np.array([stored, length], "<i4"), kept.astype(_HALF)]
        if batch.pooled is not None:
            parts.append(batch.pooled[i].astype("<f4"))
        records.append(b"".join(part.tobytes() for part in parts))
    return records
