"""Moving digits: clips of one or two digits, the sentences that describe them, and batches of clips and pictures."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from experiments.lab.scenes import NUMBERS, FreshBatches, with_article
from fm_jax.checks import check_integer
from fm_jax.text.words import split_words

WAYS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")
"""The directions, 45 degrees from one to the next."""
STEPS = np.array([(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)])
"""Rows and columns [8, 2] that each of them takes at a speed of 1; rows count downwards."""
PACES = ("slow", "fast")
TEMPLATES = ("{x} moves {way}", "{x} is going {way}", "{way} goes {x}")
HELD_OUT_TEMPLATE = "{x} goes {way}"
"""A sentence of words that are all known, in an order that training has not seen."""


class Motion(NamedTuple):
    """What a sentence says of a digit."""

    digit: int
    way: int
    """An index of `WAYS`."""
    pace: int | None = None
    """An index of `PACES`, where there are two."""


Meaning: TypeAlias = tuple[Motion, ...]
"""What a sentence says: one digit, or two."""


def is_held_out(motion: Motion) -> bool:
    """Whether this digit never goes this way in training: one way of eight for each digit."""
    return motion.way == (3 * motion.digit + 5) % 8


def describe(meaning: Meaning, template: str) -> str:
    """The sentence.

    Example:
        >>> describe((Motion(3, 2), Motion(7, 4)), "{x} moves {way}")
        'a three moves up while a seven moves left'
    """
    return " while ".join(template.format(x=_named(motion), way=WAYS[motion.way]) for motion in meaning)


def describe_picture(meaning: Meaning) -> str:
    """The sentence for one frame: what there is, without where it goes.

    Example:
        >>> describe_picture((Motion(3, 2), Motion(7, 4)))
        'a three and a seven'
    """
    return " and ".join(with_article(NUMBERS[motion.digit]) for motion in meaning)


def quoted(sentence: str) -> str:
    """The names of the digits alone, for an encoder of letters.

    Example:
        >>> quoted("a three moves up while a seven moves left")
        '"three" "seven"'
    """
    return " ".join(f'"{word}"' for word in split_words(sentence) if word in NUMBERS)


def words_of(num_digits: int, paces: bool) -> tuple[str, ...]:
    """The vocabulary of all sentences, sorted."""
    return tuple(sorted({*" ".join(_some_sentences(num_digits, paces)).split()}))


def most_words(num_digits: int, paces: bool) -> int:
    """Words of the longest sentence."""
    return max(len(sentence.split()) for sentence in _some_sentences(num_digits, paces))


def _some_sentences(num_digits: int, paces: bool) -> list[str]:
    """Of all sentences those whose digits do the same: every word and every length is among them."""
    kinds = itertools.product(range(10), range(8), range(2) if paces else (None,))
    meanings = [(Motion(*each),) * num_digits for each in kinds]
    texts = [describe(meaning, template) for meaning in meanings for template in (*TEMPLATES, HELD_OUT_TEMPLATE)]
    return [*texts, *map(describe_picture, meanings)]


def _named(motion: Motion) -> str:
    name = NUMBERS[motion.digit]
    return with_article(name if motion.pace is None else f"{PACES[motion.pace]} {name}")


@dataclass(frozen=True)
class Stage:
    """How clips are drawn: digits on black, each going straight on at a constant speed, and back from a wall.

    Places are whole pixels. A clip begins where it can go on for `straight` frames before it meets a wall: all of them
    where the square is large enough.

    Attributes:
        size: height and width.
        digit: height and width of a digit, less than `size`.
        frames: of a clip.
        speeds: pixels from frame to frame, along each axis that moves; one, or those of `PACES`.
        num_digits: in a clip, 1 or 2.
        apart: pixels that two keep, along rows or columns, in every frame; 0 for a single one.

    Raises:
        ValueError: if two that go the same way as fast as they can do not keep apart, or a single one is to.
    """

    size: int
    digit: int
    frames: int
    speeds: tuple[float, ...] = (1.0,)
    num_digits: int = 1
    apart: int = 0

    def __post_init__(self) -> None:
        if self.num_digits == 1 and self.apart:
            raise ValueError(f"apart must be 0 for a single digit, got {self.apart}.")
        most = math.floor((self.size - self.digit - self.apart) / max(self.speeds)) + 1
        if self.num_digits == 2 and self.frames > most:
            raise ValueError(
                f"frames must be at most {most} for two digits to keep {self.apart} pixels apart, got {self.frames}."
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a clip: frames, height, width, channels."""
        return self.frames, self.size, self.size, 1

    @property
    def paces(self) -> bool:
        """Whether sentences say how fast."""
        return len(self.speeds) > 1

    @property
    def straight(self) -> int:
        """Frames before the first wall."""
        return min(self.frames, math.floor((self.size - self.digit) / max(self.speeds)) + 1)

    def draw_meanings(self, rng: np.random.Generator, num: int, *, held_out: bool | None = None) -> list[Meaning]:
        """Random meanings: of those with a digit that goes a held-out way, of those without, or of both."""
        found: list[Meaning] = []
        while len(found) < num:
            digits, ways, paces = (rng.integers(high, size=(num, self.num_digits)) for high in (10, 8, 2))
            for each in zip(digits.tolist(), ways.tolist(), paces.tolist(), strict=True):
                meaning = tuple(Motion(d, w, p if self.paces else None) for d, w, p in zip(*each, strict=True))
                if held_out is None or any(map(is_held_out, meaning)) == held_out:
                    found.append(meaning)
        return found[:num]

    def places(self, rng: np.random.Generator, meaning: Meaning) -> np.ndarray:
        """The upper left corners of the digits [frames, digits, 2], rows and columns, in whole pixels."""
        tries = 1 if len(meaning) == 1 else 64  # a way is found by chance
        for _ in range(1000):
            paths = np.stack([self._paths(rng, motion, tries) for motion in meaning], axis=2)
            distance = np.abs(paths[:, :, 0] - paths[:, :, -1]).max(axis=-1).min(axis=1)
            fits = np.flatnonzero(distance >= self.apart)
            if len(fits):
                return np.asarray(paths[fits[0]])
        raise ValueError(f"{meaning} find no way on which they keep {self.apart} pixels apart.")

    def draw(self, rng: np.random.Generator, meanings: Sequence[Meaning], digits: Sequence[np.ndarray]) -> np.ndarray:
        """Clips float32 [n, frames, size, size, 1] in [-1, 1].

        Args:
            rng: of the handwriting and the places.
            meanings: n of them.
            digits: for each of ten digits pictures [m, digit, digit] in [0, 1].
        """
        ink = np.zeros((len(meanings), *self.shape), np.float32)
        for clip, meaning in zip(ink, meanings, strict=True):
            places = self.places(rng, meaning)
            for i, motion in enumerate(meaning):
                pictures = digits[motion.digit]
                picture = pictures[rng.integers(len(pictures))]
                for frame, (y, x) in zip(clip[..., 0], places[:, i], strict=True):
                    part = frame[y : y + self.digit, x : x + self.digit]
                    np.maximum(part, picture, out=part)
        return 2 * ink - 1

    def _paths(self, rng: np.random.Generator, motion: Motion, num: int) -> np.ndarray:
        """Random places [num, frames, 2] of a digit."""
        room = self.size - self.digit
        velocity = STEPS[motion.way] * self.speeds[motion.pace or 0]
        way = velocity * (self.straight - 1)  # which is to fit
        low, high = np.ceil(np.maximum(0, -way)), np.floor(room - np.maximum(0, way))
        start = rng.integers(low.astype(int), high.astype(int) + 1, size=(num, 2))
        at = (start[:, None] + velocity * np.arange(self.frames)[:, None]) % (2 * room)
        return np.rint(np.minimum(at, 2 * room - at)).astype(int)


class ClipBatches(FreshBatches):
    """Fresh clips with their sentences, without end; every so often pictures in their place, as clips of one frame.

    A step is of clips, or of `frames` times as many pictures, which are as many patches: batches have two shapes.

    Args:
        stage: how they are drawn.
        digits: for each of ten digits pictures of it.
        tell: from sentences to what a network is told of them, a pytree of arrays [n, ...], as a tokenizer.
        seed: as in `FreshBatches`, like the rest.
        batch_size: clips in a batch of this process.
        picture_every: every so many steps is one of pictures; 0 for none.
        processes: which process this is, and how many there are.
    """

    def __init__(
        self,
        stage: Stage,
        digits: Sequence[np.ndarray],
        tell: Callable[[list[str]], Any],
        seed: int,
        batch_size: int,
        *,
        picture_every: int = 0,
        **processes: int | None,
    ):
        check_integer("picture_every", picture_every, least=0)
        of_pictures = dataclasses.replace(stage, frames=1)

        def draw(rng: np.random.Generator, step: int, num: int) -> dict[str, Any]:
            if picture_every > 0 and step % picture_every == 0:
                meanings = stage.draw_meanings(rng, num * stage.frames)
                texts = list(map(describe_picture, meanings))
                x1 = of_pictures.draw(rng, meanings, digits)
            else:
                meanings = stage.draw_meanings(rng, num, held_out=False)
                templates = rng.integers(len(TEMPLATES), size=num)
                texts = [describe(meaning, TEMPLATES[i]) for meaning, i in zip(meanings, templates, strict=True)]
                x1 = stage.draw(rng, meanings, digits)
            return {"x1": x1, "cond": tell(texts)}

        super().__init__(draw, seed, batch_size, **processes)
