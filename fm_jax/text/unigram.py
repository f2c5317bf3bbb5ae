"""The tokenizer of T5 and UMT5, a unigram model, run by the packages that made it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fm_jax.checks import check_bool, check_function, check_integer, imported
from fm_jax.text.tokens import Tokens, check_prompts, pad_tokens


@dataclass(frozen=True)
class UnigramTokenizer:
    """The tokenizer of T5 and UMT5; `read_unigram_tokenizer` makes one of a folder.

    Attributes:
        encode: ids of a text, without its end.
        length: tokens of every row, the end included; `None` for those of the longest prompt.
        pad: id of the padding.
        end: id of the end of a text.

    References:
        Kudo 2018, "Subword Regularization", section 3.2. Raffel et al. 2020, section 3.3.1.
    """

    encode: Callable[[str], list[int]] = field(repr=False)
    length: int | None = None
    pad: int = 0
    end: int = 1

    def __post_init__(self) -> None:
        check_function("encode", self.encode, "a function from a text to its ids", 1)
        for name in ("pad", "end"):
            check_integer(name, getattr(self, name), least=0)
        if self.length is not None:
            check_integer("length", self.length)

    def __call__(self, prompts: str | Sequence[str], *, truncate: bool = False) -> Tokens:
        """Ids of prompts.

        Args:
            prompts: one, or several.
            truncate: whether one that is too long loses its last tokens; otherwise it is refused.

        Raises:
            ValueError: if a prompt is too long, or no string.
        """
        check_bool("truncate", truncate)
        rows = [[*self.encode(prompt), self.end] for prompt in check_prompts(prompts)]
        return pad_tokens(rows, self.length, self.pad, truncate=truncate)


def read_unigram_tokenizer(folder: str | os.PathLike[str], *, length: int | None = None) -> UnigramTokenizer:
    """Reads the tokenizer of T5 or UMT5.

    Args:
        folder: with `tokenizer.json`, read by the package `tokenizers`, or `spiece.model`, read by `sentencepiece`. If
            it holds both, the former is taken, as transformers does.
        length: tokens of every row, the end included; `None` for those of the longest prompt of a call.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if the folder has neither file, or one that is of another kind.
    """
    fast, slow = Path(folder) / "tokenizer.json", Path(folder) / "spiece.model"
    if fast.is_file():
        return _of_json(fast, length)
    if slow.is_file():
        return _of_sentencepiece(slow, length)
    raise ValueError(f"{folder} must hold tokenizer.json or spiece.model: it holds neither.")


def _of_json(path: Path, length: int | None) -> UnigramTokenizer:
    package = imported("tokenizers", f"reading {path}")
    try:
        tokenizer = package.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower one
        raise ValueError(f"{path} must be a tokenizer.json: {error}.") from None
    if (kind := type(tokenizer.model).__name__) != "Unigram":
        raise ValueError(f"{path} must hold a Unigram model, as of T5, got {kind}.")
    pad, end = tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")
    if pad is None or end is None:
        raise ValueError(f"{path} must have the tokens '<pad>' and '</s>', as of T5: it has not.")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return UnigramTokenizer(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, length, pad, end)


def _of_sentencepiece(path: Path, length: int | None) -> UnigramTokenizer:
    package = imported("sentencepiece", f"reading {path}, without a tokenizer.json beside it,")
    try:
        model = package.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} must be a model of sentencepiece: {error}.") from None
    if model.pad_id() < 0 or model.eos_id() < 0:
        raise ValueError(f"{path} must have tokens for padding and for the end of a text, as of T5: it has not.")
    return UnigramTokenizer(lambda text: model.encode(text), length, model.pad_id(), model.eos_id())
