"""The tokenizer of ByT5: the bytes of a text."""

from collections.abc import Sequence
from dataclasses import dataclass

from fm_jax.checks import check_bool, check_integer
from fm_jax.text.tokens import Tokens, check_prompts, pad_tokens

PAD, END, FIRST = 0, 1, 3
"""Ids of padding and of the end of a text; that of byte 0. Id 2 is never made: there is no unknown byte."""


@dataclass(frozen=True)
class ByteTokenizer:
    """Bytes of UTF-8 as ids: byte + 3, then the end, 1; padded with 0. A text that looks like `</s>` is bytes too.

    Attributes:
        length: tokens of every row, the end included; `None` for those of the longest prompt.

    References:
        Xue et al. 2021, "ByT5: Towards a Token-Free Future with Pre-trained Byte-to-Byte Models", section 3.1.

    Example:
        >>> ByteTokenizer()(["A", "é!"]).ids
        array([[ 68,   1,   0,   0],
               [198, 172,  36,   1]], dtype=int32)
    """

    length: int | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            check_integer("length", self.length)

    def __call__(self, prompts: str | Sequence[str], *, truncate: bool = False) -> Tokens:
        """Ids of prompts.

        Args:
            prompts: one, or several.
            truncate: whether one that is too long loses its last bytes; otherwise it is refused.

        Raises:
            ValueError: if a prompt is too long, or no string.
        """
        check_bool("truncate", truncate)
        rows = [[*(byte + FIRST for byte in prompt.encode()), END] for prompt in check_prompts(prompts)]
        return pad_tokens(rows, self.length, PAD, truncate=truncate)
