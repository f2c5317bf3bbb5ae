"""A small language: a tokenizer of whole words, and a small transformer that is trained with the network it serves."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_integer, shown
from fm_jax.models.attention import layer_norm
from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense
from fm_jax.models.layers import check_options
from fm_jax.text.encoder import SelfAttention, TextFeatures, TokenEmbed, check_ids
from fm_jax.text.tokens import Tokens, check_prompts, pad_tokens
from fm_jax.types import Array

PAD, END, FIRST = 0, 1, 2
"""Ids of padding and of the end of a text; that of the first word."""


@dataclass(frozen=True)
class WordTokenizer:
    """Whole words as ids: word k of `words` is k + 2, then the end, 1; padded with 0.

    Case and punctuation do not count. The empty text is the end alone: what stands for "no text".

    Attributes:
        words: the vocabulary, in lower case, each once.
        length: tokens of every row, the end included; `None` for those of the longest prompt.

    Raises:
        ValueError: for no words, one that is no single lower-case word, or one that is there twice; when called, for a
            word that is not in the vocabulary, with the nearest that is, and for a prompt that is too long.

    Example:
        >>> WordTokenizer(("a", "red", "three"))(["A red three.", "a three"]).ids
        array([[2, 3, 4, 1],
               [2, 4, 1, 0]], dtype=int32)
    """

    words: tuple[str, ...]
    length: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.words, tuple | list) or not self.words:
            raise ValueError(f"words must be a tuple of words, got {shown(self.words)}.")
        object.__setattr__(self, "words", tuple(self.words))
        for i, word in enumerate(self.words):
            if not isinstance(word, str) or split_words(word) != [word]:
                raise ValueError(f"words[{i}] must be one word in lower case, got {shown(word)}.")
            if word in self.words[:i]:
                raise ValueError(f"words must differ, got {word!r} twice.")
        if self.length is not None:
            check_integer("length", self.length)

    @property
    def vocabulary(self) -> int:
        """Number of ids, padding and end included."""
        return FIRST + len(self.words)

    def __call__(self, prompts: str | Sequence[str], *, truncate: bool = False) -> Tokens:
        """Tokenizes prompts.

        Args:
            prompts: a string, or several.
            truncate: whether a prompt that is too long loses its last words; otherwise it is refused.
        """
        check_bool("truncate", truncate)
        ids = {word: FIRST + i for i, word in enumerate(self.words)}
        rows = []
        for i, prompt in enumerate(check_prompts(prompts)):
            found = split_words(prompt)
            if prompt.strip() and not found:
                raise ValueError(f"prompt {i} must have words, got {prompt!r}.")
            if unknown := [word for word in found if word not in ids]:
                near = difflib.get_close_matches(unknown[0], self.words, n=3)
                meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
                raise ValueError(
                    f"prompt {i} has a word that the network has never seen, {unknown[0]!r}: {meant}"
                    f"It knows {' '.join(self.words)}."
                )
            rows.append([*(ids[word] for word in found), END])
        return pad_tokens(rows, self.length, PAD, truncate=truncate)


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


class WordBlock(nn.Module):
    """A transformer block, whose branches count from the first step on; attributes as in `WordEncoder`."""

    num_heads: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, h: Array, mask: Array | None) -> Array:
        """Maps tokens [batch, n, d] to tokens."""
        width, dtype = h.shape[-1], self.compute.dtype
        attention = SelfAttention(self.num_heads, width // self.num_heads, True, compute=self.compute, name="attention")
        # Not zero at first: a network learns digits long before it asks who stands where, and by then would hardly open
        # a branch that started as nothing.
        h = h + attention(layer_norm(dtype, "norm_attention", affine=True)(h), mask, None)
        m = nn.gelu(Dense(4 * width, dtype=dtype, name="mlp_in")(layer_norm(dtype, "norm_mlp", affine=True)(h)))
        return h + Dense(width, dtype=dtype, name="mlp_out")(m)


class WordEncoder(nn.Module):
    """A small transformer over words, read out everywhere and as the mean of what is no padding.

    Each word sees all others. Words start with vectors of variance 1, and places with vectors of standard deviation
    `position_std`: large enough that who stands where is seen from the first step on.

    Attributes:
        vocabulary: number of ids.
        max_tokens: longest text, its end included: rows of the learned table of positions.
        hidden: width, divisible by `num_heads`.
        num_layers: number of blocks.
        num_heads: attention heads.
        position_std: standard deviation of the initial table of positions.
        compute: dtype and attention.

    Raises:
        ValueError: for sizes that do not fit each other.

    Example:
        >>> import jax
        >>> tokens = WordTokenizer(("a", "red", "three"))("a red three")
        >>> encoder = WordEncoder(vocabulary=5, max_tokens=8, hidden=16, num_heads=2)
        >>> features, _ = encoder.init_with_output(jax.random.key(0), tokens.ids, tokens.mask)
        >>> features.last.shape, features.pooled.shape
        ((1, 4, 16), (1, 16))
    """

    vocabulary: int
    max_tokens: int
    hidden: int = 96
    num_layers: int = 1
    num_heads: int = 4
    position_std: float = 0.5
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("vocabulary", "max_tokens", "hidden", "num_layers", "num_heads"):
            check_integer(name, getattr(self, name))
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads must divide hidden={self.hidden}, got {self.num_heads}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Any, mask: Any = None) -> TextFeatures:
        """Encodes prompts.

        Args:
            ids: token ids, integers [batch, n].
            mask: which tokens are no padding, bool [batch, n]; `None` for all.

        Returns:
            `last` [batch, n, hidden] and `pooled` [batch, hidden] of `TextFeatures`.

        Raises:
            ValueError: if `ids` are longer than the table of positions, or not of the vocabulary.
        """
        check_ids(ids, mask, self.vocabulary)
        if ids.shape[1] > self.max_tokens:
            raise ValueError(f"ids must be at most {self.max_tokens} tokens, the table of positions, got {ids.shape}.")
        mask = None if mask is None else jnp.asarray(mask, bool)
        dtype, normal = self.compute.dtype, nn.initializers.normal
        h = TokenEmbed(self.vocabulary, self.hidden, normal(1.0), name="tokens")(ids).astype(dtype)
        places = self.param("positions", normal(self.position_std), (self.max_tokens, self.hidden))
        h = h + places[None, : ids.shape[1]].astype(dtype)
        for i in range(self.num_layers):
            h = WordBlock(self.num_heads, self.compute, name=f"block_{i}")(h, mask)
        last = layer_norm(jnp.float32, "norm", affine=True)(h)
        seen = jnp.ones(ids.shape) if mask is None else mask.astype(jnp.float32)
        pooled = (last * seen[..., None]).sum(axis=1) / jnp.maximum(seen.sum(axis=1, keepdims=True), 1.0)
        return TextFeatures(last, (), pooled)
