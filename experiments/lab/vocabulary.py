"""What a text is read as: characters, or the tokens of any `tokenizers` file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fm_jax.checks import imported


class Vocabulary(NamedTuple):
    """What a text is read as, and written from.

    Attributes:
        size: of the vocabulary, the mask not included; ids are from 0 to size - 1.
        what: one token, in words.
        encode: from a text to its ids, int32 [n]; raises `ValueError` for what it has no ids for.
        decode: from ids to a text.
    """

    size: int
    what: str
    encode: Callable[[str], np.ndarray]
    decode: Callable[[Sequence[int]], str]


def no_file(path: Path) -> str:
    """What is wrong with a path that is no file, in words."""
    return "is a folder" if path.is_dir() else "does not exist"


def of_characters(characters: str) -> Vocabulary:
    """Each character is a token.

    Args:
        characters: all that there are, distinct.
    """
    ids = {character: i for i, character in enumerate(characters)}

    def encode(text: str) -> np.ndarray:
        if unknown := sorted(set(text) - ids.keys()):
            raise ValueError(
                f"must consist of the {len(ids)} characters that the network knows, got {unknown[0]!r}: they are "
                f"{characters!r}."
            )
        return np.fromiter((ids[each] for each in text), np.int32, len(text))

    return Vocabulary(len(ids), "character", encode, lambda found: "".join(characters[i] for i in found))


def of_tokenizer(path: Path) -> Vocabulary:
    """The tokens of a `tokenizers` file.

    Raises:
        SystemExit: for what is no such file.
    """
    package = imported("tokenizers", f"reading {path}")
    try:
        tokenizer = package.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower one
        raise SystemExit(f"--tokenizer {path} must be a file of the package tokenizers: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> np.ndarray:
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(found: Sequence[int]) -> str:
        return tokenizer.decode([int(i) for i in found], skip_special_tokens=False)

    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return Vocabulary(size, "token", encode, decode)
