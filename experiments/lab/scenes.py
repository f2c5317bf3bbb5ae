"""Composed digits: scenes of two digits, the sentences that describe them, and pictures without end of both."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fm_jax.checks import check_integer
from fm_jax.data.digits import load_digits
from fm_jax.data.images import load_images

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
"""Sixty degrees of hue from one to the next."""
RGB = np.array([(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1)], np.float32)
RELATIONS = ("left of", "right of", "above", "below")
_SAME = ("to the left of", "to the right of", "over", "under")
_INVERSE = ("to its left", "to its right", "above it", "below it")
TEMPLATES = ("{x} {relation} {y}", "{x} is {same} {y}", "{y} with {x} {inverse}")
HELD_OUT_TEMPLATE = "{x} is {relation} {y}"
"""A sentence of words that are all known, in an order that training has not seen."""


class Meaning(NamedTuple):
    """What a sentence says: a first digit, its relation to a second one, and their colours if there are any."""

    first: int
    second: int
    relation: int
    """An index of `RELATIONS`: where the first one is, seen from the second."""
    first_colour: int | None = None
    second_colour: int | None = None

    @property
    def vertical(self) -> bool:
        """Whether they stand one above the other."""
        return self.relation >= 2

    @property
    def swapped(self) -> "Meaning":
        """The same two digits, each in the place of the other."""
        return Meaning(self.second, self.first, self.relation, self.second_colour, self.first_colour)

    def places(self) -> tuple[tuple[int, int | None], tuple[int, int | None]]:
        """Digit and colour of what is left, or above, and of the other one."""
        both = (self.first, self.first_colour), (self.second, self.second_colour)
        return both if self.relation % 2 == 0 else (both[1], both[0])


def is_held_out(meaning: Meaning) -> bool:
    """Whether a pair of digits is never trained on: ten of a hundred, in either order no two equal ones.

    Which digit is where cannot be had from the set of words alone.
    """
    first, second = (digit for digit, _ in meaning.places())
    return (7 * first + 3 * second) % 10 == 9


def describe(meaning: Meaning, template: str) -> str:
    """The sentence.

    Example:
        >>> describe(Meaning(3, 7, 0, 0, 4), "{x} is {same} {y}")
        'a red three is to the left of a blue seven'
    """
    names = []
    for digit, colour in ((meaning.first, meaning.first_colour), (meaning.second, meaning.second_colour)):
        names.append(with_article(NUMBERS[digit] if colour is None else f"{COLOURS[colour]} {NUMBERS[digit]}"))
    relation = meaning.relation
    words = {"relation": RELATIONS[relation], "same": _SAME[relation], "inverse": _INVERSE[relation]}
    return template.format(x=names[0], y=names[1], **words)


def with_article(name: str) -> str:
    """The name behind "a", or "an" as in "an eight"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Canvas:
    """How scenes are drawn: each digit in its half of a black square, anywhere in it.

    Attributes:
        size: height and width; even.
        digit: height and width of a digit, at most half of `size`.
        colours: whether the digits have one of six colours each.
        templates: of the sentences that describe them.
    """

    size: int
    digit: int
    colours: bool
    templates: tuple[str, ...] = TEMPLATES

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a scene."""
        return self.size, self.size, 3 if self.colours else 1

    @property
    def kinds(self) -> tuple[int, ...]:
        """How many values each field of a `Meaning` has."""
        return (10, 10, 4, 6, 6) if self.colours else (10, 10, 4)

    def all_sentences(self, *, held_out: bool = False) -> list[str]:
        """Every sentence of the templates, in the order of `Sentences`; and of the one that is held out."""
        meanings = [Meaning(*each) for each in itertools.product(*map(range, self.kinds))]
        templates = (*self.templates, HELD_OUT_TEMPLATE) if held_out else self.templates
        return [describe(meaning, template) for template in templates for meaning in meanings]

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary of its sentences, sorted."""
        templates = (*self.templates, HELD_OUT_TEMPLATE)
        colours = (0, 0) if self.colours else (None, None)
        meanings = [Meaning(0, 8, relation, *colours) for relation in range(4)]  # "a zero left of an eight"
        texts = [describe(meaning, template) for meaning in meanings for template in templates]
        return tuple(sorted({*" ".join(texts).split(), *NUMBERS, *(COLOURS if self.colours else ())}))

    def draw_meanings(self, rng: np.random.Generator, num: int, *, held_out: bool | None = None) -> list[Meaning]:
        """Random meanings, of those that are held out, of those that are not, or of both."""
        found: list[Meaning] = []
        while len(found) < num:
            a, b, relation, ca, cb = (rng.integers(high, size=num) for high in (10, 10, 4, 6, 6))
            for each in zip(a.tolist(), b.tolist(), relation.tolist(), ca.tolist(), cb.tolist(), strict=True):
                meaning = Meaning(*each) if self.colours else Meaning(*each[:3])
                if held_out is None or is_held_out(meaning) == held_out:
                    found.append(meaning)
        return found[:num]

    def draw(self, rng: np.random.Generator, meanings: Sequence[Meaning], digits: Sequence[np.ndarray]) -> np.ndarray:
        """Scenes float32 [n, size, size, c] in [-1, 1].

        Args:
            rng: of the handwriting and the places.
            meanings: n of them.
            digits: for each of ten digits pictures [m, digit, digit] in [0, 1].
        """
        half, room = self.size // 2 - self.digit, self.size - self.digit
        ink = np.zeros((len(meanings), self.size, self.size, self.shape[2]), np.float32)
        which = rng.integers(2**31, size=(len(meanings), 2))
        across, along = rng.integers(half + 1, size=(len(meanings), 2)), rng.integers(room + 1, size=which.shape)
        for i, meaning in enumerate(meanings):
            for place, (digit, colour) in enumerate(meaning.places()):
                y, x = int(along[i, place]), int(across[i, place]) + place * (self.size // 2)
                y, x = (x, y) if meaning.vertical else (y, x)
                picture = digits[digit][which[i, place] % len(digits[digit])][..., None]
                ink[i, y : y + self.digit, x : x + self.digit] += picture if colour is None else picture * RGB[colour]
        return 2 * ink - 1


def by_digit(images: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Pictures [n, h, w] of ten digits, for each digit those of it."""
    return [images[labels == digit] for digit in range(10)]


def load_digits_of(
    dataset: Literal["digits", "mnist"],
    split: Literal["train", "test"],
    side: int,
    data_dir: Path | None = None,
    *,
    smoke: bool = False,
) -> list[np.ndarray]:
    """For each of ten digits pictures [m, side, side] in [0, 1]: scikit-learn's, or MNIST's at half their size.

    Of MNIST a smoke run takes the first 2,500, for they take long to decode: so many that the judge is a network still.
    """
    if dataset == "digits":
        found = load_digits(split)
        return by_digit((np.asarray(found.images)[..., 0] + 1) / 2, found.labels)
    found = load_images("mnist", f"{split}[:2500]" if smoke else split, data_dir=data_dir)
    images = np.asarray(found.images[:], np.float32).reshape(-1, side, 2, side, 2).mean(axis=(2, 4)) / 255
    return by_digit(images, np.asarray(found.labels))


class FreshBatches:
    """Batches without end, each drawn afresh.

    A step is a function of the seed and its number, of which process p has its share. So neither the examples of a step
    nor a position depends on the number of processes.

    Args:
        draw: `draw(rng, step, num)`, the whole batch of a step, of `num` examples or a multiple of that.
        seed: of all of them.
        batch_size: examples in a batch of *this* process, the same on all of them.
        process_index: which process this is; by default `jax.process_index()`.
        process_count: how many there are; by default `jax.process_count()`.
    """

    def __init__(
        self,
        draw: Callable[[np.random.Generator, int, int], dict[str, Any]],
        seed: int,
        batch_size: int,
        *,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        self._index = jax.process_index() if process_index is None else process_index
        self._count = jax.process_count() if process_count is None else process_count
        check_integer("batch_size", batch_size)
        self._draw, self._seed, self._num = draw, seed, batch_size * self._count
        self._position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        self._position += 1
        rng = np.random.default_rng((self._seed, self._position))
        batch = self._draw(rng, self._position, self._num)
        num = len(batch["x1"]) // self._count
        return jax.tree.map(lambda leaf: leaf[self._index * num : (self._index + 1) * num], batch)

    def get_state(self) -> dict[str, Any]:
        """The number of batches taken as JSON values."""
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, on any number of processes."""
        self._position = state["position"]


class SceneBatches(FreshBatches):
    """Fresh scenes with their sentences, without end.

    Args:
        canvas: how they are drawn.
        digits: for each of ten digits pictures of it.
        sentences: what a network is told of them.
        seed: as in `FreshBatches`, like the rest.
        batch_size: scenes in a batch of this process.
        processes: which process this is, and how many there are.
    """

    def __init__(
        self,
        canvas: Canvas,
        digits: Sequence[np.ndarray],
        sentences: "Sentences",
        seed: int,
        batch_size: int,
        **processes: int | None,
    ):
        def draw(rng: np.random.Generator, step: int, num: int) -> dict[str, Any]:
            meanings = canvas.draw_meanings(rng, num, held_out=False)
            templates = rng.integers(len(canvas.templates), size=num)
            return {"x1": canvas.draw(rng, meanings, digits), "cond": sentences.of(meanings, templates)}

        super().__init__(draw, seed, batch_size, **processes)


class Sentences:
    """All sentences of training as what a network is told of them, made once and looked up.

    Args:
        tell: from sentences to a pytree of arrays [n, ...], as a tokenizer.
        canvas: whose sentences they are.
    """

    def __init__(self, tell: Any, canvas: Canvas):
        self._kinds = canvas.kinds
        self._table = tell(canvas.all_sentences())

    def of(self, meanings: Sequence[Meaning], templates: np.ndarray) -> Any:
        """What a network is told of each meaning, in the words of a template."""
        values = np.array([each[: len(self._kinds)] for each in meanings])
        rows = templates * math.prod(self._kinds) + np.ravel_multi_index(tuple(values.T), self._kinds)
        return jax.tree.map(lambda leaf: leaf[rows], self._table)
