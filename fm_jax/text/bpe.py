"""The tokenizer of CLIP: pairs of bytes, in our own code. The vocabulary is a file of the user's."""

import gzip
import html
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fm_jax.checks import check_bool, check_integer
from fm_jax.text.tokens import Tokens, check_prompts, pad_tokens

START, END = "<|startoftext|>", "<|endoftext|>"
_NUM_MERGES = 49152 - 256 - 2
"""Merges of CLIP's own file that count; the file has more lines."""
_SPACES = frozenset(
    chr(i) for i in (*range(9, 14), 32, 133, 160, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F)
)
_SPACES |= {"\u205f", "\u3000"}
"""White space of Unicode; `str.isspace` takes four control characters more."""
_FIXED = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)")


def _characters() -> list[str]:
    """A printable character for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


_OF_BYTE = _characters()


def _kind(char: str) -> str:
    """`"L"` for a letter, `"N"` for a number, `" "` for white space, `"."` for all else."""
    if char in _SPACES:
        return " "
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "."


def _words(text: str) -> Iterator[str]:
    """Runs of letters, single digits, runs of other signs; `'s` and its like are words, white space is dropped."""
    i = 0
    while i < len(text):
        if found := _FIXED.match(text, i):
            word = found[0]
            # What looks like a special token after lower case is none: its signs and letters are words.
            yield from re.findall(r"[<|>]+|\w+", word) if word[0] == "<" else [word]
            i = found.end()
            continue
        kind, stop = _kind(text[i]), i + 1
        while kind in "L." and stop < len(text) and _kind(text[stop]) == kind:
            stop += 1
        if kind != " ":
            yield text[i:stop]
        i = stop


def clean(text: str) -> str:
    """A text as the tokenizer sees it: composed characters (NFC), single spaces, lower case character by character."""
    text = "".join(" " if char in _SPACES else char for char in unicodedata.normalize("NFC", text))
    return "".join(char.lower() for char in re.sub(" +", " ", text))


@dataclass(frozen=True)
class ClipTokenizer:
    """CLIP's tokenizer; `read_clip_tokenizer` makes one of a file or folder. The ids are those of transformers.

    A start, the text, an end, padding. White space and case make no difference.

    Attributes:
        vocabulary: id of every token.
        merges: pairs of tokens that become one, the first ones first.
        pad: id of the padding: 49407, the end, for CLIP-L; 0 for bigG.
        length: tokens of every row, start and end included.
        special: strings that are one token each wherever they stand in a prompt, the start and the end among them.
        unescape: whether `&amp;` in a prompt becomes `&`, twice over, as OpenAI's own code does and transformers does
            not.

    References:
        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2. Radford et al.
        2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4.
    """

    vocabulary: Mapping[str, int] = field(repr=False)
    merges: Sequence[tuple[str, str]] = field(repr=False)
    pad: int
    length: int = 77
    special: tuple[str, ...] = (START, END)
    unescape: bool = False

    def __post_init__(self) -> None:
        check_integer("length", self.length, least=2)
        check_bool("unescape", self.unescape)
        if not all(isinstance(i, int) and i >= 0 for i in self.vocabulary.values()):
            raise ValueError("vocabulary must map tokens to integers that are not negative.")
        for token in (START, END, *self.special):
            if token not in self.vocabulary:
                raise ValueError(f"vocabulary must have {token!r}, got {len(self.vocabulary)} tokens without it.")
        lacking = [first + second for first, second in self.merges if first + second not in self.vocabulary]
        lacking += [char + end for char in _OF_BYTE for end in ("", "</w>") if char + end not in self.vocabulary]
        if lacking:
            raise ValueError(f"vocabulary must have all bytes and merges, it lacks {len(lacking)}: {lacking[:3]}.")
        check_integer("pad", self.pad, least=0, most=max(self.vocabulary.values()))
        object.__setattr__(self, "_ranks", {pair: rank for rank, pair in enumerate(self.merges)})
        object.__setattr__(self, "_known", {})

    def __call__(self, prompts: str | Sequence[str], *, truncate: bool = False) -> Tokens:
        """Ids of prompts.

        Args:
            prompts: one, or several.
            truncate: whether one that is too long loses its last tokens; otherwise it is refused.

        Raises:
            ValueError: if a prompt is too long, or no string.
        """
        check_bool("truncate", truncate)
        start, end = self.vocabulary[START], self.vocabulary[END]
        rows = [[start, *self.encode(prompt), end] for prompt in check_prompts(prompts)]
        return pad_tokens(rows, self.length, self.pad, truncate=truncate)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start, end and padding."""
        if self.unescape:
            text = html.unescape(html.unescape(text))
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, self.special))})", text):
            if part in self.special:
                ids.append(self.vocabulary[part])
            else:
                ids += [i for word in _words(clean(part)) for i in self._word(word)]
        return ids

    def _word(self, word: str) -> list[int]:
        known: dict[str, list[int]] = self._known  # type: ignore[attr-defined]
        if word not in known:
            known[word] = [self.vocabulary[token] for token in self._merge([_OF_BYTE[byte] for byte in word.encode()])]
        return known[word]

    def _merge(self, tokens: list[str]) -> list[str]:
        """The tokens of a word, of its bytes: the pair with the first merge is joined wherever it stands, and again."""
        ranks: dict[tuple[str, str], int] = self._ranks  # type: ignore[attr-defined]
        tokens = [*tokens[:-1], tokens[-1] + "</w>"]
        while len(tokens) > 1:
            pair = min(pairwise(tokens), key=lambda pair: ranks.get(pair, len(ranks)))
            if pair not in ranks:
                break
            merged: list[str] = []
            for token in tokens:
                if merged and (merged[-1], token) == pair:
                    merged[-1] += token
                else:
                    merged.append(token)
            tokens = merged
        return tokens


def read_clip_tokenizer(
    path: str | os.PathLike[str], *, pad: int | None = None, length: int | None = None, unescape: bool = False
) -> ClipTokenizer:
    """Reads CLIP's tokenizer.

    Args:
        path: a folder with `vocab.json` and `merges.txt`, or with `tokenizer.json`, as of transformers; or CLIP's own
            file `bpe_simple_vocab_16e6.txt.gz`.
        pad: id of the padding: by default the folder's, otherwise the end of the text, 49407; bigG's is 0.
        length: tokens of every row; by default the folder's, otherwise 77.
        unescape: see `ClipTokenizer`.

    Raises:
        ValueError: if a file is missing or not what its name says, or the folder adds tokens to the vocabulary.
    """
    path = Path(path)
    if path.is_file():
        vocabulary, merges = _of_merges(path)
        settings: dict[str, Any] = {}
    elif path.is_dir():
        vocabulary, merges = _of_folder(path)
        settings = _settings(path, vocabulary)
    else:
        raise ValueError(f"{path} must be a folder with vocab.json and merges.txt, or CLIP's own file: it is neither.")
    token = settings.get("pad_token")
    special = (START, END) if token in (None, START, END) else (START, END, token)
    limit = settings.get("model_max_length")
    if length is None:
        length = limit if isinstance(limit, int) and limit < 100_000 else 77
    try:
        return ClipTokenizer(
            vocabulary,
            merges,
            pad=vocabulary[token or END] if pad is None else pad,
            length=length,
            special=special,
            unescape=unescape,
        )
    except KeyError as error:
        raise ValueError(f"{path} has no token {error} in its vocabulary.") from None


def _of_merges(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's own file: the bytes, the bytes that end a word, the merges, start and end are numbered in this order."""
    merges = _merges(path)[:_NUM_MERGES]
    order = sorted(_OF_BYTE)
    tokens = [*order, *(char + "</w>" for char in order), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _of_folder(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _json(folder / "vocab.json"), _merges(folder / "merges.txt")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} must hold vocab.json and merges.txt, or tokenizer.json, of CLIP: it does not.")
    model = _json(folder / "tokenizer.json").get("model", {})
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise ValueError(f"{folder / 'tokenizer.json'} is not of CLIP: its model is {model.get('type')!r}.")
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", ())]
    return model.get("vocab", {}), pairs


def _settings(folder: Path, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """The padding and length of a folder; refuses tokens that it adds to the vocabulary."""
    added: set[str] = set()
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json", "tokenizer.json"):
        if not (folder / name).is_file():
            continue
        found = _json(folder / name)
        if name == "added_tokens.json":
            added |= found.keys()
        elif name == "tokenizer.json":
            added |= {str(token.get("content")) for token in found.get("added_tokens", ())}
        else:
            pad = found.get("pad_token")
            settings |= {"pad_token": pad.get("content") if isinstance(pad, dict) else pad} if pad else {}
            settings |= {"model_max_length": found["model_max_length"]} if "model_max_length" in found else {}
            added |= {str(token.get("content")) for token in found.get("added_tokens_decoder", {}).values()}
    if unknown := sorted(added - vocabulary.keys()):
        raise ValueError(f"{folder} adds tokens to CLIP's vocabulary, which are not supported: {unknown[:5]}.")
    return settings


def _merges(path: Path) -> list[tuple[str, str]]:
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path} must be a text of merges, or such a text zipped: {error}.") from None
    lines = text.split("\n")
    lines = [line for line in lines[lines[0].startswith(("#version", '"bpe_simple_vocab')) :] if line]
    pairs = [tuple(line.split()) for line in lines]
    wrong = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
    if wrong is not None or not pairs:
        got = "none" if wrong is None else repr(lines[wrong])
        raise ValueError(f"{path} must hold merges, two tokens a line, got {got}.")
    return pairs  # type: ignore[return-value]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(found).__name__}.")
    return found
