"""The text of a run, what is noted of it, and prompts with gaps."""

import hashlib
import pydoc_data.topics
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lab.data import noted
from experiments.lab.token_sampling import GivenTokens
from experiments.lab.vocabulary import Vocabulary, no_file, of_characters, of_tokenizer
from fm_jax.train.folder import write_text

TOKENIZER = "tokenizer.json"
"""In the folder of a run, a copy of the file that its text is read by."""
SEPARATOR = "\n" + 40 * "-" + "\n"
"""Between texts in a file."""
_GAP = re.compile(r"(?<!\{)\{(\d+)\}(?!\})")
_LITERAL = re.compile(r"\{(\{\d+\})\}")


@dataclass(frozen=True)
class CorpusFacts:
    """What a run has to know of its text, for whoever draws from it without: written to its folder as `data.json`."""

    source: str
    """Where the text is from, in words."""
    checksum: str
    """SHA-256 of the text."""
    characters: str | None
    """All that are in it, in their order; `None` where a tokenizer reads it."""
    tokenizer: str | None
    """SHA-256 of the tokenizer's file."""

    def identity(self) -> dict[str, Any]:
        """What a run that continues must find again."""
        return {"checksum of the text": self.checksum, "checksum of the tokenizer": self.tokenizer}


def read_corpus(path: Path | None) -> tuple[str, str]:
    """A text and what it is, in words; `None` is what every Python has with it, its help on the language.

    Raises:
        SystemExit: for what is no file of text.
    """
    if path is None:
        topics = pydoc_data.topics.topics
        return "\n".join(topics[name] for name in sorted(topics)), "Python's help on itself"
    if not path.is_file():
        raise SystemExit(f"--corpus {path} {no_file(path)}: give a file of text.")
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SystemExit(f"--corpus {path} must be a text in UTF-8: {error}.") from error
    if len(set(text)) < 2:
        raise SystemExit(f"--corpus {path} must hold a text, got {len(text)} characters of {len(set(text))} kinds.")
    return text, path.name


def facts_of(text: str, source: str, tokenizer: Path | None) -> CorpusFacts:
    """What is to be noted of a text."""
    checksum = hashlib.sha256(text.encode()).hexdigest()
    if tokenizer is None:
        return CorpusFacts(source, checksum, "".join(sorted(set(text))), None)
    if not tokenizer.is_file():
        raise SystemExit(f"--tokenizer {tokenizer} {no_file(tokenizer)}: give a file of the package tokenizers.")
    return CorpusFacts(source, checksum, None, _sha256(tokenizer))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vocabulary_of(facts: CorpusFacts, tokenizer: Path | None) -> Vocabulary:
    """What a noted text is read by; characters need no file.

    Raises:
        ValueError: if the tokenizer is not the one that was noted.
    """
    if facts.characters is not None:
        return of_characters(facts.characters)
    assert tokenizer is not None
    found = of_tokenizer(tokenizer)
    if _sha256(tokenizer) != facts.tokenizer:
        raise ValueError(f"{tokenizer} is not the file that the run was trained with.")
    return found


def read_corpus_facts(run_dir: Path) -> CorpusFacts:
    """What a run noted of its text; raises `ValueError` if that is nothing."""
    try:
        return noted(run_dir, CorpusFacts)
    except FileNotFoundError:
        raise ValueError(f"{run_dir} has no data.json: the command that trained the run writes it anew.") from None


def write_texts(path: Path, texts: list[str]) -> None:
    """Writes texts to a file, a line between them."""
    write_text(path, SEPARATOR.join(texts) + "\n")


def given_of(prompt: str, vocabulary: Vocabulary, length: int, *, gaps: bool = True) -> GivenTokens:
    """The tokens of a prompt and where they are; what comes behind it, and `{n}` in it, n tokens, is to be drawn.

    Args:
        prompt: such as `"ROMEO:{40}the moon"`; `{{40}}` is `{40}` itself.
        vocabulary: what reads it.
        length: tokens of a whole sample.
        gaps: whether there may be something to be drawn before the end of the prompt.

    Raises:
        ValueError: for a prompt longer than the sequence, and for what the vocabulary has no tokens for; for a gap
            before something that is given, where there may be none.
    """
    tokens, known = np.zeros(length, np.int32), np.zeros(length, bool)
    at, pieces = 0, _GAP.split(prompt)
    for i, piece in enumerate(pieces):
        if i % 2:
            at += int(piece)
            continue
        try:
            ids = vocabulary.encode(_LITERAL.sub(r"\1", piece))
        except ValueError as error:
            if "got '{'" not in str(error):
                raise
            raise ValueError(f"{str(error)[:-1]}. A gap of n is {{n}}, n from 0 on.") from None
        fits = ids[: max(length - at, 0)]
        tokens[at : at + len(fits)], known[at : at + len(fits)] = fits, True
        at += len(ids)
    if at > length:
        raise ValueError(
            f"must be at most as long as a sample of the run, {length} {vocabulary.what}s with its gaps, got {at}."
        )
    if known.all():
        raise ValueError(f"must leave something to be drawn: it is as long as a sample of the run, {length}.")
    if not gaps and not known[: known.sum()].all():
        raise ValueError(
            f"must have no gap before something that is given: the network was told what comes before a "
            f"{vocabulary.what}, and never what comes behind it."
        )
    return GivenTokens(tokens, known)
