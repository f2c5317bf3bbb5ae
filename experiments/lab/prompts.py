"""How sentences reach a network: words, tokens of CLIP, features of a frozen encoder; and how it learns from them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from experiments.lab.codecs import sha256_of
from experiments.lab.data import noted
from experiments.lab.experiment import Experiment, begin_with
from experiments.lab.method import couple_ahead, make_loss
from experiments.lab.sampling import Generate, check_generate, generate_many
from experiments.lab.training import sampling_params, train
from fm_jax.data.texts import open_texts
from fm_jax.models.conditioning import Conditions
from fm_jax.text import TextConditioned, Tokens, WordEncoder, WordTokenizer, read_clip_tokenizer
from fm_jax.text.tokens import check_prompts
from fm_jax.train import TrainState
from fm_jax.train.loop import DataIterator
from fm_jax.types import Cond, Key, Params


class Reader(NamedTuple):
    """What reads sentences for a network."""

    tell: Callable[[list[str]], Cond]
    """From sentences to what the network is told, [n, ...]; of the empty one, what stands for none."""
    width: int
    """Of the features of a token, and of the whole text."""
    vector_width: int
    """Of the features of the whole text."""
    wrap: Callable[[nn.Module], nn.Module]
    """From a network of encoded text to one of what `tell` gives."""
    checksum: str | None = None
    """Of what files give for the sentences that the network will learn from; `None` where no files are read."""


@dataclass(frozen=True)
class TextFacts:
    """What a run has to know of the files that its sentences are read by: written to its folder as `data.json`."""

    path: str
    """Where they are, as it is found from anywhere."""
    checksum: str
    """As of `Reader`."""

    def identity(self) -> dict[str, Any]:
        """What a run that continues must find again."""
        return {"checksum of what sentences are read as": self.checksum}


def read_text_facts(run_dir: Path) -> TextFacts | None:
    """What a run noted of the files that its sentences are read by; `None` for one that noted nothing.

    Raises:
        ValueError: if its `data.json` is damaged.
    """
    try:
        return noted(run_dir, TextFacts)
    except FileNotFoundError:
        return None


def of_words(words: tuple[str, ...], length: int, width: int, *, frozen: bool) -> Reader:
    """Whole words, read by a small encoder that is trained with the network, or left as it was drawn.

    Args:
        words: the vocabulary.
        length: words of the longest sentence, its end included.
        width: of the encoder.
        frozen: whether the encoder is left as it was drawn.
    """
    tokenizer = WordTokenizer(words, length)
    return _joint(lambda prompts: tokenizer(prompts), tokenizer.vocabulary, length, width, frozen)


def of_clip_tokens(path: Path, sentences: Sequence[str], width: int, *, frozen: bool) -> Reader:
    """Tokens of CLIP's, of which those that occur in the sentences are numbered anew, in the place of words.

    Args:
        path: as for `read_clip_tokenizer`.
        sentences: all that the network will learn from.
        width: of the encoder.
        frozen: whether the encoder is left as it was drawn.

    Raises:
        ValueError: if it is no such tokenizer; when called, for a token that is in none of the sentences.
    """
    tokenizer = read_clip_tokenizer(path)
    rows = tokenizer(list(sentences))
    length = int(rows.mask.sum(axis=1).max())
    known = np.unique(rows.ids[rows.mask])

    def tell(prompts: list[str]) -> Tokens:
        ids, mask = tokenizer(prompts)
        place = np.searchsorted(known, ids).clip(max=len(known) - 1)
        unknown = mask & (known[place] != ids)
        if unknown.any():
            i = int(np.argmax(unknown.any(axis=1)))
            word = _first_unknown(tokenizer.encode, prompts[i], set(known.tolist()))
            raise ValueError(
                f"prompt {i} has a word that the network has never seen, {word!r}: it knows those of sentences such as "
                f"{sentences[0]!r}."
            )
        if mask[:, length:].any():
            i, num = int(np.argmax(mask.sum(axis=1))), int(mask.sum(axis=1).max())
            raise ValueError(f"prompt {i} has {num} tokens, and the longest sentence of the training {length}.")
        return Tokens(np.where(mask, place, 0).astype(np.int32)[:, :length], mask[:, :length])

    return _joint(tell, len(known), length, width, frozen)._replace(checksum=sha256_of(rows))


def _first_unknown(encode: Callable[[str], list[int]], prompt: str, known: set[int]) -> str:
    words = prompt.split()
    return next((word for word in words if set(encode(word)) - known), prompt)


def _joint(tell: Callable[[list[str]], Tokens], vocabulary: int, length: int, width: int, frozen: bool) -> Reader:
    encoder = WordEncoder(vocabulary, length, width)
    return Reader(tell, width, width, lambda network: TextConditioned(network, encoder, frozen=frozen))


def of_features(folder: Path, sentences: Sequence[str]) -> Reader:
    """Features of sentences as `python -m experiments.encode --text` stored them; zero stands for none.

    Args:
        folder: that they were stored in.
        sentences: all that the network will learn from.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they are not finished, or damaged, or the encoder pools nothing; when called, for a sentence that
            is not among them.
    """
    texts = open_texts(folder)
    if not texts.num_pooled:
        raise ValueError(f"{folder} must hold pooled features too, as of CLIP, and its encoder gives none.")
    stored = texts.read(np.arange(len(texts.captions)))
    assert stored.pooled is not None
    tokens, length = stored.tokens.astype(np.float16), int(stored.mask.sum(axis=1).max())
    places = {caption: i for i, caption in enumerate(texts.captions)}
    digest = hashlib.sha256()
    for sentence in sentences:
        if (i := places.get(sentence)) is not None:
            digest.update(sentence.encode() + tokens[i, stored.mask[i]].tobytes() + stored.pooled[i].tobytes())

    def tell(prompts: list[str]) -> Conditions:
        for i, prompt in enumerate(prompts := check_prompts(prompts)):
            if prompt and prompt not in places:
                raise ValueError(f"prompt {i}, {prompt!r}, is not among the {len(places)} captions of {folder}.")
        rows = np.array([places.get(prompt, 0) for prompt in prompts])
        empty = np.array([not prompt for prompt in prompts])
        features: Any = np.where(empty[:, None, None], 0, tokens[rows, :length]).astype(np.float32)
        mask: Any = stored.mask[rows, :length] & ~empty[:, None]
        pooled: Any = np.where(empty[:, None], 0, stored.pooled[rows])
        return Conditions(tokens=features, mask=mask, vector=pooled)

    return Reader(tell, texts.shape[1], texts.num_pooled, lambda network: network, digest.hexdigest())


def learn(
    config: Any,
    experiment: Experiment,
    params: Params,
    generate: Generate,
    keys: tuple[Key, Key, Key],
    data_of: Callable[[int, int], DataIterator],
    texts: list[str],
    save: Callable[[str, np.ndarray, list[str]], None],
    facts: Any = None,
) -> Params:
    """Trains a network on sentences, and draws on the way what it makes of some of them.

    Args:
        config: of the run.
        experiment: the network.
        params: initial parameters.
        generate: draws with the network, as `make_generate` makes it.
        keys: of the training, of what is drawn on the way, and of the coupling.
        data_of: as in `couple_ahead`.
        texts: what is drawn on the way.
        save: called with the name of a step, samples [n, ...] and their sentences.
        facts: a `TextFacts`, which a run that continues must find again.

    Returns:
        What to sample with.
    """
    key_train, key_draw, key_pairs = keys
    data = couple_ahead(config.method, data_of, key_pairs, experiment.source)
    told, size = experiment.told(texts), min(len(texts), config.sampling.sample_batch)
    check_generate(generate, params, key_draw, experiment, jax.tree.map(lambda leaf: leaf[:size], told))

    def draw(step: int, state: TrainState) -> None:
        params = sampling_params(state, config.training)
        save(f"step_{step:06d}", generate_many(generate, params, key_draw, experiment, told, size)[0], texts)

    begin = partial(begin_with, config, ())
    state = train(config, key_train, params, make_loss(config.method, experiment), data, draw, facts=facts, begin=begin)
    return sampling_params(state, config.training)
