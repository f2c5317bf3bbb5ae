"""An input-convex network: a scalar potential, convex in its input, whose gradient is a transport map."""

import math
from collections.abc import Callable
from typing import TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.checks import check_event, check_integer, check_setting
from fm_jax.models.adapters import check_kind
from fm_jax.models.layers import check_widths
from fm_jax.types import Array, Key, Params

Potential: TypeAlias = Callable[[Params, Array], Array]
"""`potential_fn(params, x [batch, ...]) -> [batch]`."""

_NETWORK_AT_INIT = 0.03
"""Weight of the layers beside the quadratic form at initialisation: enough to learn from, little to disturb."""


class ICNN(nn.Module):
    """A potential Psi, convex in x and smooth, with `grad Psi(x)` near x at initialisation.

    `Psi(x) = strong_convexity |x|^2 / 2 + |A x|^2 / 2 + b x + w h_n`, with hidden layers
    `h_1 = s(Q_1(x))`, `h_k = s(W_k h_{k-1} + Q_k(x))`, convex quadratic forms of the input,
    `Q(x)_j = mean_r (a_jr x)^2 + b_j x + c_j`, and `s(y) = softplus(sharpness y) / sharpness`. W and w are positive,
    being softplus of what is learned, and s is convex, increasing and smooth; so each h_k is convex, and the Hessian is
    at least `strong_convexity`. The transport between Gaussians, affine and symmetric, is in the family exactly.

    Attributes:
        features: width of each hidden layer.
        rank: squares in the quadratic form of each hidden unit; 0 leaves affine ones.
        strong_convexity: least eigenvalue of the Hessian, in [0, 1). Above 0 the map can be inverted.
        sharpness: of the bends between flat pieces, which are `1 / sharpness` wide for weights of size one. Maps to
            data of several modes, or on thin curves, have sharp bends, and are learned sooner with some 5.

    Example:
        >>> model = ICNN(features=(32, 32))
        >>> x = jnp.ones((3, 2))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> linen_potential(model)(params, x).shape
        (3,)

    References:
        Amos et al. 2017 (arXiv:1609.07152, eq. 2); Korotin et al. 2019 (arXiv:1909.13082), whose weights are clamped
        after each step where these are reparameterised.
    """

    features: tuple[int, ...] = (64, 64)
    rank: int = 1
    strong_convexity: float = 1e-3
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        check_widths("features", self.features)
        check_integer("rank", self.rank, least=0)
        check_setting(self, "strong_convexity", "[0, 1)")
        check_setting(self, "sharpness", "(0, inf)")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Evaluates the potential.

        Args:
            x: points, [batch, ...].

        Returns:
            [batch], in the dtype of `x`, at least float32.
        """
        check_event(x)
        x = x.reshape(x.shape[0], math.prod(x.shape[1:])).astype(jnp.promote_types(x.dtype, jnp.float32))
        dim = x.shape[1]
        h = self._bend(ConvexQuadratic(self.features[0], self.rank, name="input_0")(x))
        for k, width in enumerate(self.features[1:], start=1):
            skip = ConvexQuadratic(width, self.rank, name=f"input_{k}")(x)
            h = self._bend(PositiveDense(width, name=f"hidden_{k}")(h) + skip)
        network = PositiveDense(1, scale=_NETWORK_AT_INIT, name="out")(h)[:, 0]

        root = math.sqrt(1 - self.strong_convexity)
        square = nn.Dense(dim, use_bias=False, kernel_init=_scaled_identity(root), name="square")(x)
        linear = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros_init(), name="linear")(x)[:, 0]
        return (self.strong_convexity * (x**2).sum(axis=1) + (square**2).sum(axis=1)) / 2 + linear + network

    def _bend(self, y: Array) -> Array:
        return nn.softplus(self.sharpness * y) / self.sharpness


class ConvexQuadratic(nn.Module):
    """`Q(x)_j = mean_r (a_jr x)^2 + b_j x + c_j`: [batch, dim] -> [batch, features]."""

    features: int
    rank: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        affine = nn.Dense(self.features, name="affine")(x)
        if self.rank == 0:
            return affine
        roots = nn.Dense(self.features * self.rank, use_bias=False, name="square")(x)
        return affine + (roots.reshape(-1, self.features, self.rank) ** 2).mean(axis=2)


class PositiveDense(nn.Module):
    """`softplus(V) h`, without a bias; at initialisation a weighted mean of h, times `scale`."""

    features: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, h: Array) -> Array:
        def init(key: Key, shape: tuple[int, int]) -> Array:
            weights = self.scale / shape[0] * jax.random.uniform(key, shape, minval=0.5, maxval=1.5)
            return weights + jnp.log(-jnp.expm1(-weights))  # the inverse of softplus

        return h @ nn.softplus(self.param("kernel", init, (h.shape[1], self.features)))


def _scaled_identity(scale: float) -> Callable[..., Array]:
    return lambda key, shape, dtype=jnp.float32: scale * jnp.eye(shape[0], shape[1], dtype=dtype)


def linen_potential(module: nn.Module) -> Potential:
    """Makes the function that Optimal Flow Matching sees of a Linen module.

    Args:
        module: called as `module(x)`, with no state but its parameters.

    Returns:
        `potential_fn(params, x [batch, ...]) -> [batch]`.
    """
    check_kind("module", module, nn.Module, "flax.linen.Module")
    return lambda params, x: cast(Array, module.apply({"params": params}, x))
