"""Distances by eigenfunctions of the Laplacian, for manifolds whose geodesics are not known or are not smooth."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_finite, check_function, check_known, check_number, shown
from fm_jax.manifolds.points import norm
from fm_jax.types import AnyArray, Array


@dataclass(frozen=True)
class SpectralPremetric:
    """`d(x, y) = sqrt(sum_i w_i (phi_i(x) - phi_i(y))^2)`, of eigenfunctions phi_i of the Laplacian.

    Chen & Lipman 2023 (arXiv:2302.03660): smooth, and cheap wherever the eigenfunctions are. It is a distance
    where these tell all points apart, which a few do. Take all eigenfunctions of an eigenvalue or none, else it depends
    on which of its basis these are. For a `paths.PremetricPath`.

    Attributes:
        features: the eigenfunctions, `features(x)` [..., k] of points [..., *shape]; without the constant one.
        weights: w_i, k numbers, not negative and not all 0; see `biharmonic`, `diffusion` and `commute_time`.

    Raises:
        ValueError: for what is no function of points, or no such weights; when called, if there are not k features.

    Example:
        >>> premetric = SpectralPremetric(lambda x: x, biharmonic([2.0, 2.0, 2.0]))  # of the sphere S^2
        >>> premetric(jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.0, 0.0, -1.0]]))
        Array([1.], dtype=float32)
    """

    features: Callable[[Any], Any]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        check_function("features", self.features, "a function of points, such as TriangleMesh(...).eigenfunctions", 1)
        weights = _numbers("weights", self.weights)
        if (weights < 0).any() or not weights.any():
            raise ValueError(f"weights must not be negative, nor all 0, got from {weights.min()} to {weights.max()}.")
        object.__setattr__(self, "weights", tuple(weights.tolist()))

    def __call__(self, x: AnyArray, y: AnyArray) -> Array:
        """The distance [...]; its derivative at coincidence is 0."""
        difference = self.features(x) - self.features(y)
        k = len(self.weights)
        if difference.shape[-1:] != (k,):
            raise ValueError(f"features(x) must be [..., {k}], as many as weights, got shape {difference.shape}.")
        scale = jnp.asarray(np.sqrt(self.weights), difference.dtype).reshape((1,) * (difference.ndim - 1) + (k,))
        return norm(scale * difference)[..., 0]


def biharmonic(eigenvalues: Any) -> tuple[float, ...]:
    """The weights `l^-2` of the biharmonic distance (Lipman, Rustamov & Funkhouser 2010).

    Args:
        eigenvalues: l [k] of the Laplacian, positive: the 0 of the constant function is left out.

    Raises:
        ValueError: for any others.

    Example:
        >>> biharmonic([2.0, 4.0])
        (0.25, 0.0625)
    """
    return tuple((_positive(eigenvalues) ** -2).tolist())


def commute_time(eigenvalues: Any) -> tuple[float, ...]:
    """The weights `1 / l` of the commute time distance; arguments as `biharmonic`.

    Example:
        >>> commute_time([2.0, 4.0])
        (0.5, 0.25)
    """
    return tuple((_positive(eigenvalues) ** -1).tolist())


def diffusion(eigenvalues: Any, tau: float) -> tuple[float, ...]:
    """The weights `exp(-2 tau l)` of the diffusion distance (Coifman & Lafon 2006): of heat, after a time tau.

    Args:
        eigenvalues: as of `biharmonic`.
        tau: positive, in units of 1 / l.

    Raises:
        ValueError: for any others, and a tau after which no heat is left of any.

    Example:
        >>> diffusion([2.0, 4.0], 0.5)
        (0.1353352832366127, 0.01831563888873418)
    """
    check_known("tau", tau)
    check_number("tau", tau, "(0, inf)")
    weights = tuple(math.exp(-2 * float(tau) * each) for each in _positive(eigenvalues).tolist())
    if not any(weights):
        raise ValueError(f"tau must leave some weight exp(-2 tau l) above 0, got {tau}, with which all are 0.")
    return weights


def _numbers(name: str, values: Any) -> np.ndarray:
    """In float64; refuses what is not a list of finite numbers that are known."""
    check_known(name, values)
    check_finite(name, values)
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"{name} must be [k], at least one number, got {shown(np.asarray(values))}.")
    return found


def _positive(eigenvalues: Any) -> np.ndarray:
    found = _numbers("eigenvalues", eigenvalues)
    if not (found > 0).all():
        raise ValueError(
            f"eigenvalues must be positive, the 0 of the constant function left out, got {found.min():.4g} among them."
        )
    return found
