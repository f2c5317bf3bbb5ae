"""The judge of moving digits: which digit goes which way, and whether it stays itself from frame to frame."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from experiments.lab.judge import Classify, fit_classifier, fit_network
from experiments.lab.moving import Meaning, Stage
from experiments.lab.scene_judge import FEW

LEAST_INK, MOST_OUTSIDE, LEAST_WAY = 0.25, 0.15, 0.5
"""Each frame has at least so much of the ink of the strongest one; of all ink at most so much lies outside of a digit's
square; and of the speed of the slowest real digit at least so much counts as movement."""


class Verdict(NamedTuple):
    """What is as it was said, bool [n, digits] for n clips; the digits of a clip are paired with the sentence's."""

    identity: np.ndarray
    """Whether it is that digit, whole and in every frame."""
    direction: np.ndarray
    pace: np.ndarray | None
    consistency: np.ndarray
    """Share of the frames [n, digits] in which the digit is what it is in most of them, whatever was said."""

    @property
    def both(self) -> np.ndarray:
        """Bool [n]: every digit is right, and goes the right way, at the right pace if one was said."""
        right = self.identity & self.direction
        return (right if self.pace is None else right & self.pace).all(axis=1)

    def shares(self) -> dict[str, float]:
        """Of all clips, how many have what right; and the mean of the consistency."""
        found = {"identity": self.identity.all(axis=1), "direction": self.direction.all(axis=1)}
        found |= {} if self.pace is None else {"pace": self.pace.all(axis=1)}
        found |= {"both": self.both, "consistency": self.consistency}
        return {name: float(np.mean(each)) for name, each in found.items()}


class Tracks(NamedTuple):
    """Where the digits of n clips are, and what they look like."""

    centres: np.ndarray
    """Of the ink, [n, frames, digits, 2]."""
    crops: np.ndarray
    """Ink around them [n, frames, digits, digit, digit]."""
    ink: np.ndarray
    """How much of it there is [n, frames, digits]."""


def track(stage: Stage, clips: np.ndarray) -> Tracks:
    """Follows the digits of clips [n, frames, size, size, 1] in [-1, 1].

    Of two digits the ink is divided by which of two centres is nearer, from frame to frame; they are found in the first
    frame at the two ends of its longer axis.
    """
    ink = (np.asarray(clips, np.float32)[..., 0].clip(-1, 1) + 1) / 2
    ink = np.where(ink > 0.15, ink, 0)  # what a network leaves of its noise is no ink
    n, frames, digits = *ink.shape[:2], stage.num_digits
    centres = np.zeros((n, frames, digits, 2))
    crops, mass = np.zeros((n, frames, digits, stage.digit, stage.digit), np.float32), np.zeros((n, frames, digits))
    grid = np.moveaxis(np.indices((stage.size, stage.size), float), 0, -1)
    for i in range(n):
        at = _two_ends(ink[i, 0], grid) if digits == 2 else None
        for k, frame in enumerate(ink[i]):
            parts = [frame]
            if at is not None:
                parts, at = _divided(frame, grid, at)
            for j, part in enumerate(parts):
                mass[i, k, j] = part.sum()
                centres[i, k, j] = np.tensordot(part, grid, 2) / max(part.sum(), 1e-6)
                crops[i, k, j] = _crop(part, centres[i, k, j], stage.digit)
    return Tracks(centres, crops, mass)


def _two_ends(frame: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Two points [2, 2], a standard deviation to either side of the middle, along the longer axis of the ink."""
    weight = frame / max(frame.sum(), 1e-6)
    middle = np.tensordot(weight, grid, 2)
    offsets = grid - middle
    values, axes = np.linalg.eigh(np.einsum("yx,yxa,yxb->ab", weight, offsets, offsets))
    way = axes[:, -1] * np.sqrt(values[-1])
    return np.stack([middle + way, middle - way])


def _divided(frame: np.ndarray, grid: np.ndarray, at: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The ink nearer to each of two centres, which move to its middle until they stay, and those middles."""
    for _ in range(10):
        nearer = np.argmin(((grid[None] - at[:, None, None]) ** 2).sum(axis=-1), axis=0)
        parts = [np.where(nearer == j, frame, 0) for j in range(2)]
        new = np.stack([np.tensordot(p, grid, 2) / p.sum() if p.sum() > 0 else at[j] for j, p in enumerate(parts)])
        if np.allclose(new, at):
            break
        at = new
    return parts, at


def _crop(frame: np.ndarray, centre: np.ndarray, side: int) -> np.ndarray:
    """A square of the frame around a point, black where it reaches beyond."""
    padded = np.pad(frame, side)
    top, left = (round(at - (side - 1) / 2) + side for at in centre)
    return padded[top : top + side, left : left + side]


Judge = Callable[[np.ndarray, Sequence[Meaning]], Verdict]


def fit_judge(stage: Stage, digits: Sequence[np.ndarray], seed: int = 0, num_steps: int = 1000) -> Judge:
    """Trains a classifier on the digits of real clips, and judges with it: of few digits as in `scene_judge`.

    Args:
        stage: how clips are drawn.
        digits: for each of ten digits pictures [m, digit, digit] in [0, 1], to learn from.
        seed: of the clips and of the network.
        num_steps: of its training.
    """
    alone = dataclasses.replace(stage, num_digits=1, apart=0)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        meanings = alone.draw_meanings(rng, 64)
        found = track(alone, dataclasses.replace(alone, frames=1).draw(rng, meanings, digits))
        return _normalised(found.crops, stage.digit), np.array([each[0].digit for each in meanings])

    if sum(map(len, digits)) > FEW:
        return judge_of(stage, fit_network(draw, num_classes=10, seed=seed, num_steps=num_steps))
    rng = np.random.default_rng(seed)
    crops, labels = (np.concatenate(each) for each in zip(*(draw(rng) for _ in range(min(num_steps, 50))), strict=True))
    return judge_of(stage, fit_classifier(crops, labels, gamma=0.05))


def judge_of(stage: Stage, classify: Classify) -> Judge:
    """The judge, by a classifier of crops [m, digit, digit, 1] in [-1, 1]."""

    def judge(clips: np.ndarray, meanings: Sequence[Meaning]) -> Verdict:
        found = track(stage, clips)
        n, frames, digits = found.ink.shape
        # Of all frames together it is one digit; in each of them it may look like another.
        named = classify(_normalised(found.crops.mean(axis=1), stage.digit)).reshape(n, digits)
        each = classify(_normalised(found.crops, stage.digit)).reshape(n, frames, digits)
        counts = (each[..., None] == np.arange(10)).sum(axis=1)
        there = found.ink >= np.maximum(LEAST_INK * found.ink.max(axis=1, keepdims=True), 1e-6)
        whole = there.all(axis=1) & (found.crops.sum(axis=(1, 3, 4)) >= (1 - MOST_OUTSIDE) * found.ink.sum(axis=1))
        velocity = velocities(found.centres[:, : stage.straight])
        way, speed = ways(velocity), np.abs(velocity).max(axis=-1)
        pace = np.abs(np.log(np.maximum(speed, 1e-6)[..., None] / np.array(stage.speeds))).argmin(axis=-1)
        moves = speed >= LEAST_WAY * min(stage.speeds)

        said = np.array([[(motion.digit, motion.way, motion.pace or 0) for motion in each] for each in meanings])
        right = np.zeros((n, digits, 3), bool)
        for order in map(list, permutations(range(digits))):  # which of them is meant by which name
            now = np.stack([named[:, order], way[:, order], pace[:, order]], axis=-1) == said
            now &= np.stack([whole[:, order], moves[:, order], moves[:, order]], axis=-1)
            better = now.sum(axis=(1, 2)) > right.sum(axis=(1, 2))
            right[better] = now[better]
        consistency = counts.max(axis=-1) / frames
        return Verdict(right[..., 0], right[..., 1], right[..., 2] if stage.paces else None, consistency)

    return judge


def velocities(centres: np.ndarray) -> np.ndarray:
    """Pixels a frame [n, digits, 2], by least squares over centres [n, frames, digits, 2]; of one frame 0."""
    k = np.arange(centres.shape[1]) - (centres.shape[1] - 1) / 2
    return np.einsum("k,nkda->nda", k, centres) / max((k**2).sum(), 1.0)


def ways(velocity: np.ndarray) -> np.ndarray:
    """Which of the eight directions is nearest to velocities [..., 2] in rows, downwards, and columns."""
    return np.rint(np.arctan2(-velocity[..., 0], velocity[..., 1]) / (np.pi / 4)).astype(int) % 8


def _normalised(crops: np.ndarray, side: int) -> np.ndarray:
    """Crops [..., side, side] as pictures [m, side, side, 1] from -1 to at most 1, where the largest number is."""
    most = np.maximum(crops.max(axis=(-2, -1), keepdims=True), 1e-6)
    return (2 * crops / most - 1).reshape(-1, side, side, 1).astype(np.float32)
