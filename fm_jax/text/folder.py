"""The tokenizer of a folder as transformers and diffusers write them."""

import json
import os
from pathlib import Path
from typing import Any

from fm_jax.checks import check_member
from fm_jax.text.bpe import read_clip_tokenizer
from fm_jax.text.byte_tokens import ByteTokenizer
from fm_jax.text.unigram import read_unigram_tokenizer

CLASSES = {"CLIP": "CLIPTokenizer", "T5": "T5Tokenizer", "ByT5": "ByT5Tokenizer"}


def read_tokenizer(folder: str | os.PathLike[str], *, length: int | None = None) -> Any:
    """Reads the tokenizer of a folder, of the class that its `tokenizer_config.json` names.

    Args:
        folder: such as `tokenizer`, `tokenizer_2` and `tokenizer_3` of a pipeline of diffusers.
        length: tokens of every row; by default 77 or what the folder says for CLIP, those of the longest prompt for
            T5 and ByT5.

    Returns:
        A function `tokenizer(prompts, truncate=False)` to `Tokens`: a `ClipTokenizer`, `UnigramTokenizer` or
        `ByteTokenizer`.

    Raises:
        ImportError: if a package that reads the file is not installed.
        ValueError: if the class is another one, or a file is missing or of another kind.
    """
    path = Path(folder) / "tokenizer_config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    except OSError:
        raise ValueError(f"{folder} must hold tokenizer_config.json: it does not.") from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be a JSON object: {error}.") from None
    base = name.removesuffix("Fast") if isinstance(name, str) else name
    check_member(f"tokenizer_class of {path}", base, tuple(CLASSES.values()))
    if base == CLASSES["CLIP"]:
        return read_clip_tokenizer(folder, length=length)
    return ByteTokenizer(length) if base == CLASSES["ByT5"] else read_unigram_tokenizer(folder, length=length)
