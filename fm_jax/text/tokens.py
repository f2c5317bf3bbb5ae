"""Token ids of a batch of prompts, padded, and the prompts that are too long."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fm_jax.checks import shown


class Tokens(NamedTuple):
    """What a tokenizer makes of a batch of prompts, for the host: NumPy arrays.

    Attributes:
        ids: int32 [batch, n].
        mask: which tokens are of the text, its start and end included, and not padding: bool [batch, n].
    """

    ids: np.ndarray
    mask: np.ndarray


def check_prompts(prompts: Any) -> list[str]:
    """The prompts as a list: one string, or several; refuses all else."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence | np.ndarray) or not len(prompts):
        raise ValueError(f"prompts must be a string, or a sequence of at least one, got {shown(prompts)}.")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{i}] must be a string, got {shown(prompt)}.")
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise ValueError(f"prompts[{i}] must be text, got half a character in {prompt!r}.")
    return [str(prompt) for prompt in prompts]


def pad_tokens(rows: Sequence[Sequence[int]], length: int | None, pad: int, *, truncate: bool) -> Tokens:
    """Pads on the right.

    Args:
        rows: ids of each prompt, the last of them the end of the text.
        length: of all rows afterwards; `None` for that of the longest.
        pad: id of the padding.
        truncate: whether what is too long loses tokens in front of its end; otherwise it is refused.

    Raises:
        ValueError: for a prompt that is too long, with its number of tokens and the limit.
    """
    n = max(map(len, rows)) if length is None else length
    ids = np.full((len(rows), n), pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        if len(row) > n and not truncate:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens, marks of its ends included, and the limit is {n}: shorten it, or "
                f"drop its last {len(row) - n} with truncate=True."
            )
        kept = [*row[: n - 1], row[-1]] if len(row) > n else row
        ids[i, : len(kept)], mask[i, : len(kept)] = kept, True
    return Tokens(ids, mask)
