"""Places on the earth: reading them, splits for training and test, and kernel density estimates to compare with."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

EarthData = Literal["volcano", "earthquake", "flood", "fire"]
Splitting = Literal["published", "places"]
FILES: dict[EarthData, str] = {
    "volcano": "volerup.csv",
    "earthquake": "quakes_all.csv",
    "flood": "flood.csv",
    "fire": "fire.csv",
}
URL = "https://github.com/oxcsml/riemannian-score-sde/tree/main/data"
UNIFORM_NLL = math.log(4 * math.pi)
"""Of the uniform density, 2.531 nats."""
KAPPAS = 10 ** np.arange(0.5, 9.25, 0.5)
"""The 18 bandwidths, concentrations of von Mises-Fisher kernels: at 1 / sqrt(kappa) from 32 degrees to 0.2 km."""
_CHUNK = 256
_NOTHING = 50.0
"""What a term may be below the largest, in nats, before it is left out."""


@dataclass(frozen=True)
class EarthFacts:
    """What a run has to know of its places, written to its folder as `data.json`."""

    source: str
    """The name of the file."""
    checksum: str
    """SHA-256 of the file."""
    rows: int
    """How many places there are, repeated ones too."""
    distinct: int
    """How many differ."""

    def identity(self) -> dict[str, Any]:
        """What a run that continues must find again."""
        return {"checksum of the places": self.checksum}


class Parts(NamedTuple):
    """Unit vectors [n, 3] in double precision to train on, to choose by and to be judged by."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def read_places(folder: Path | None, data: EarthData) -> tuple[np.ndarray, EarthFacts]:
    """Latitudes and longitudes in degrees, [n, 2], from a file of them.

    A line is a latitude and a longitude with a comma between; lines from a `#` on, empty ones, and a first line of
    names are none.

    Raises:
        SystemExit: for a folder without the file, and for a file that is something else.
    """
    if folder is None:
        raise SystemExit(f"--folder must say where {FILES[data]} is. The four files are at {URL}.")
    path = folder / FILES[data]
    if not path.is_file():
        raise SystemExit(f"--folder {folder} has no {FILES[data]}. The four files are at {URL}.")
    content = path.read_bytes()
    rows: list[tuple[float, float]] = []
    named = False
    for number, line in enumerate(content.decode("utf-8-sig", errors="replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            latitude, longitude = map(float, text.split(","))
        except ValueError:
            if rows or named:
                raise SystemExit(
                    f"{path} must have a latitude and a longitude in each line, got {text[:80]!r} in line {number}."
                ) from None
            named = True
            continue
        if not (abs(latitude) <= 90 and abs(longitude) <= 360):
            raise SystemExit(
                f"{path} must have latitudes from -90 to 90 and longitudes from -360 to 360, got {text[:80]!r} in "
                f"line {number}."
            )
        rows.append((latitude, longitude))
    degrees = np.array(rows, np.float64).reshape(-1, 2)
    distinct = len(np.unique(to_sphere(degrees), axis=0))
    if distinct < 10:
        raise SystemExit(f"{path} must have at least 10 distinct places, got {distinct}.")
    return degrees, EarthFacts(path.name, hashlib.sha256(content).hexdigest(), len(rows), distinct)


def to_sphere(degrees: np.ndarray) -> np.ndarray:
    """Unit vectors [n, 3] of latitudes and longitudes [n, 2] in degrees; the north pole is (0, 0, 1)."""
    latitude, longitude = np.radians(np.asarray(degrees, np.float64)).T
    around = np.cos(latitude)
    return np.stack([around * np.cos(longitude), around * np.sin(longitude), np.sin(latitude)], axis=1)


def to_degrees(x: np.ndarray) -> np.ndarray:
    """Latitudes and longitudes [n, 2] in degrees of unit vectors [n, 3]."""
    x, y, z = np.asarray(x, np.float64).T
    return np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], axis=1))


def split(degrees: np.ndarray, splitting: Splitting, seed: int) -> Parts:
    """80% to train on, 10% to choose by and 10% to be judged by, at random.

    Args:
        degrees: latitudes and longitudes [n, 2].
        splitting: "published", of all rows, so that places that are repeated are in several parts; "places", of the
            distinct ones, each once.
        seed: of the permutation.
    """
    points = to_sphere(degrees)
    if splitting == "places":
        points = np.unique(points, axis=0)
    points = points[np.random.default_rng(seed).permutation(len(points))]
    tenth = len(points) // 10
    return Parts(points[2 * tenth :], points[:tenth], points[tenth : 2 * tenth])


def share_seen(parts: Parts) -> float:
    """The share of test points that are also training points."""
    seen = set(map(tuple, parts.train.tolist()))
    return float(np.mean([tuple(each) in seen for each in parts.test.tolist()]))


def kernel_log_density(points: np.ndarray, x: np.ndarray, kappas: np.ndarray = KAPPAS) -> np.ndarray:
    """The log-density at `x` [n, 3] of von Mises-Fisher kernels on `points` [m, 3], [n, len(kappas)] in nats.

    `log mean_j kappa / (2 pi (1 - exp(-2 kappa))) exp(kappa (<x, y_j> - 1))`, where 1 - <x, y> is |x - y|^2 / 2:
    nothing cancels at a kappa of 1e9.
    """
    points, x, kappas = (np.asarray(each, np.float64) for each in (points, x, kappas))
    log_peak = np.log(kappas) - np.log(2 * np.pi) - np.log(-np.expm1(-2 * kappas))
    found = np.empty((len(x), len(kappas)))
    for start in range(0, len(x), _CHUNK):
        squares = np.sum([(x[start : start + _CHUNK, None, i] - points[None, :, i]) ** 2 for i in range(3)], axis=0)
        nearest = squares.min(axis=1, keepdims=True)
        # In relation to the nearest point, whose term is 1; those that are nothing at a kappa are so at larger ones.
        height = 0.5 * (squares - nearest).ravel()
        row = np.repeat(np.arange(len(squares)), len(points))
        for k in np.argsort(kappas):
            there = kappas[k] * height < _NOTHING
            height, row = height[there], row[there]
            total = np.bincount(row, np.exp(-kappas[k] * height), minlength=len(squares))
            found[start : start + _CHUNK, k] = np.log(total) - 0.5 * kappas[k] * nearest[:, 0]
    return found + log_peak - math.log(len(points))


def mixture_weights(log_density: np.ndarray, num_steps: int = 1000) -> np.ndarray:
    """Weights of the columns of log-densities [n, k] under which the mixture is likeliest, by the EM algorithm."""
    density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    weights = np.full(density.shape[1], 1 / density.shape[1])
    for _ in range(num_steps):
        shares = weights * density
        weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    return weights


def kernel_nll(parts: Parts) -> dict[str, float]:
    """The negative log-likelihood of the test part by kernel density estimates of the training part, in nats.

    Returns:
        `kde_1`: of kernels of one bandwidth over an even background, without which a single place that is far from all
        others decides; `kde_18`: of a mixture of all bandwidths. Bandwidth and weights are the likeliest on the
        validation part.
    """
    validation, test = (kernel_log_density(parts.train, x) for x in (parts.validation, parts.test))
    ones = []
    for k in range(len(KAPPAS)):
        ones.append(_mixed(*(np.stack([x[:, k], np.full(len(x), -UNIFORM_NLL)], axis=1) for x in (validation, test))))
    return {"kde_1": min(ones)[1], "kde_18": _mixed(validation, test)[1]}


def _mixed(validation: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """The negative log-likelihoods of both parts by the mixture of columns that is likeliest on the first."""
    with np.errstate(divide="ignore"):
        log_weights = np.log(mixture_weights(validation))
    return tuple(-float(_log_sum(x + log_weights).mean()) for x in (validation, test))  # type: ignore[return-value]


def _log_sum(x: np.ndarray) -> np.ndarray:
    most = x.max(axis=1, keepdims=True)
    return np.log(np.exp(x - most).sum(axis=1)) + most[:, 0]
