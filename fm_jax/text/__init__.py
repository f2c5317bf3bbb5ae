"""Text: tokenizers, and the encoders of the published systems."""

from fm_jax.text.bpe import ClipTokenizer, read_clip_tokenizer
from fm_jax.text.byte_tokens import ByteTokenizer
from fm_jax.text.clip import CLIP_CONFIGS, ClipText, make_clip_text
from fm_jax.text.conditioned import TextConditioned
from fm_jax.text.encoder import TextFeatures
from fm_jax.text.folder import read_tokenizer
from fm_jax.text.t5 import T5_CONFIGS, T5Encoder, make_t5
from fm_jax.text.tokens import Tokens
from fm_jax.text.unigram import UnigramTokenizer, read_unigram_tokenizer
from fm_jax.text.words import WordEncoder, WordTokenizer

__all__ = [
    "CLIP_CONFIGS",
    "T5_CONFIGS",
    "ByteTokenizer",
    "ClipText",
    "ClipTokenizer",
    "T5Encoder",
    "TextConditioned",
    "TextFeatures",
    "Tokens",
    "UnigramTokenizer",
    "WordEncoder",
    "WordTokenizer",
    "make_clip_text",
    "make_t5",
    "read_clip_tokenizer",
    "read_tokenizer",
    "read_unigram_tokenizer",
]
