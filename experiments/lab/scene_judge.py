"""The judge of composed digits: which digit, of which colour, is in which half of a picture."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.lab.judge import Classify, fit_classifier, fit_network
from experiments.lab.scenes import RGB, Canvas, Meaning

FEW = 2000
"""Pictures of digits up to which a support vector machine is the better judge."""
MOST_OUTSIDE, LEAST_INK = 0.15, 0.15
"""Of a half's ink, at most so much lies outside of a digit's square; and of all ink, at least so much is in a half."""


class Verdict(NamedTuple):
    """What is as it was said, for each of n pictures: bool [n], or [n, 2] for the two places."""

    digits: np.ndarray
    colours: np.ndarray | None
    relation: np.ndarray
    """Whether there is one digit in each of the two halves that were meant, left and right, or above and below."""

    @property
    def all_correct(self) -> np.ndarray:
        """Bool [n]: everything."""
        right = self.relation & self.digits.all(axis=1)
        return right if self.colours is None else right & self.colours.all(axis=1)

    def shares(self) -> dict[str, float]:
        """Of all pictures, how many have what right."""
        found = {"digits": self.digits, "colours": self.colours, "relation": self.relation, "all": self.all_correct}
        return {name: float(np.mean(each)) for name, each in found.items() if each is not None}


class Halves(NamedTuple):
    """The two halves of n pictures, along the axis that was meant, each with what stands in it."""

    crops: np.ndarray
    """Ink around its middle, [n, 2, digit, digit], the largest 1."""
    inside: np.ndarray
    """Of the ink of the half, how much is in the crop [n, 2]."""
    share: np.ndarray
    """Of the ink of the picture, how much is in the half [n, 2]."""
    colour: np.ndarray
    """The mean of the ink [n, 2, c]."""


def halves(canvas: Canvas, images: np.ndarray, vertical: Sequence[bool]) -> Halves:
    """Cuts pictures [n, size, size, c] in [-1, 1] in two, left and right, or above and below where `vertical`."""
    ink = (np.asarray(images, np.float32).clip(-1, 1) + 1) / 2
    upright = np.asarray(vertical)[:, None, None, None]
    ink = np.where(upright, ink.swapaxes(1, 2), ink)  # from here on, left and right
    middle, digit = canvas.size // 2, canvas.digit
    places = np.arange(canvas.size)
    crops = np.zeros((len(ink), 2, digit, digit), np.float32)
    inside, share, colour = (np.zeros((len(ink), 2, *more), np.float32) for more in ((), (), ink.shape[3:]))
    for i, picture in enumerate(ink):
        total = picture.max(axis=-1).sum() + 1e-6
        for place in range(2):
            columns = slice(place * middle, (place + 1) * middle)
            half = np.zeros_like(picture)
            half[:, columns] = picture[:, columns]
            grey = half.max(axis=-1)
            grey = np.where(grey > 0.15, grey, 0)  # what a network leaves of its noise is no ink
            mass = grey.sum() + 1e-6
            y, x = (grey.sum(axis=1) @ places / mass, grey.sum(axis=0) @ places / mass)
            top, left = (int(np.clip(round(at - (digit - 1) / 2), 0, canvas.size - digit)) for at in (y, x))
            left = int(np.clip(left, place * middle, (place + 1) * middle - digit))
            crop = grey[top : top + digit, left : left + digit]
            inside[i, place], share[i, place] = crop.sum() / mass, mass / total
            colour[i, place] = (half * (grey > 0.5)[..., None]).sum(axis=(0, 1)) / ((grey > 0.5).sum() + 1e-6)
            crop = crop.T if upright[i, 0, 0, 0] else crop
            crops[i, place] = crop / (crop.max() + 1e-6)
    return Halves(crops, inside, share, colour)


Judge = Callable[[np.ndarray, Sequence[Meaning]], Verdict]


def fit_judge(canvas: Canvas, digits: Sequence[np.ndarray], seed: int = 0, num_steps: int = 1500) -> Judge:
    """Trains a classifier on what stands in the halves of real scenes, and judges with it.

    Of few pictures, such as scikit-learn's digits, a support vector machine learns more; of many, a network.

    Args:
        canvas: how scenes are drawn.
        digits: for each of ten digits pictures [m, digit, digit] in [0, 1], to learn from.
        seed: of the scenes and of the network.
        num_steps: of its training.
    """

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        meanings = canvas.draw_meanings(rng, 64)
        found = halves(canvas, canvas.draw(rng, meanings, digits), [each.vertical for each in meanings])
        labels = [[digit for digit, _ in each.places()] for each in meanings]
        return 2 * found.crops.reshape(-1, canvas.digit, canvas.digit, 1) - 1, np.reshape(labels, -1)

    if sum(map(len, digits)) > FEW:
        return judge_of(canvas, fit_network(draw, num_classes=10, seed=seed, num_steps=num_steps))
    rng = np.random.default_rng(seed)
    crops, labels = (np.concatenate(each) for each in zip(*(draw(rng) for _ in range(min(num_steps, 50))), strict=True))
    return judge_of(canvas, fit_classifier(crops, labels, gamma=0.05))


def judge_of(canvas: Canvas, classify: Classify) -> Judge:
    """The judge, by a classifier of crops [m, digit, digit, 1] in [-1, 1]."""

    def judge(images: np.ndarray, meanings: Sequence[Meaning]) -> Verdict:
        found = halves(canvas, images, [each.vertical for each in meanings])
        said = np.array([[digit for digit, _ in each.places()] for each in meanings])
        crops = 2 * found.crops.reshape(-1, canvas.digit, canvas.digit, 1) - 1
        digits = classify(crops).reshape(-1, 2) == said
        placed = (found.inside >= 1 - MOST_OUTSIDE) & (found.share >= LEAST_INK)
        relation = np.asarray(placed.all(axis=1))
        if not canvas.colours:
            return Verdict(digits, None, relation)
        unit = RGB / np.linalg.norm(RGB, axis=1, keepdims=True)
        nearest = np.argmax(found.colour @ unit.T, axis=-1)
        return Verdict(digits, nearest == np.array([[c for _, c in each.places()] for each in meanings]), relation)

    return judge
