"""A fully connected vector field, for points, latents and other small data."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_event, check_function, check_integer, check_setting
from fm_jax.models.compute import Compute
from fm_jax.models.embed import add_condition
from fm_jax.models.layers import TimeEmbedding, check_options, check_widths, zeros
from fm_jax.shapes import batch_time
from fm_jax.types import Array, Cond


class MLP(nn.Module):
    """A multilayer perceptron that sees time and condition in every hidden layer; zero at initialisation.

    `h_i = silu(W_i h_{i-1} + b_i + U_i e(t, cond))`, `h_0 = flatten(x)`, output `W h_n + b`.

    Attributes:
        features: width of each hidden layer.
        time_features: number of sinusoidal time features and width of the embedding `e`.
        time_scale: factor on time before the features. Far below the image models' 1000: a field of a few dimensions
            is smooth in time, and fast features make a small network rough.
        dropout: dropout rate after each hidden layer.
        embed: module from a condition to a vector, see `fm_jax.models.embed`; `None` for an unconditional field.
        compute: dtype and rematerialisation.

    Example:
        >>> import jax
        >>> model = MLP(features=(64, 64))
        >>> variables = model.init(jax.random.key(0), 0.5, jnp.zeros((3, 2)))
        >>> model.apply(variables, 0.5, jnp.ones((3, 2))).shape
        (3, 2)
    """

    features: tuple[int, ...] = (256, 256, 256)
    time_features: int = 64
    time_scale: float = 10.0
    dropout: float = 0.0
    embed: nn.Module | None = None
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=self.embed, dropout=self.dropout, compute=self.compute)
        check_widths("features", self.features)
        check_integer("time_features", self.time_features)
        check_setting(self, "time_scale", "(0, inf)")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, scalar or [batch].
            x: state, [batch, ...].
            cond: what `embed` takes, or `None` for "no condition".
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            float32, in the shape of `x`.

        Raises:
            ValueError: if `cond` does not fit the model.
        """
        check_event(x)
        x = x.astype(jnp.float32)
        time = TimeEmbedding(self.time_features, self.time_features, self.time_scale, name="time")
        emb = add_condition(time(batch_time(t, x)), self.embed, cond)
        hidden = nn.remat(Hidden, static_argnums=(3,)) if self.compute.remat else Hidden
        h = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            h = hidden(width, self.dropout, self.compute, name=f"hidden_{i}")(h, emb, train)
        dim = math.prod(x.shape[1:])
        return nn.Dense(dim, kernel_init=zeros, name="out")(h.astype(jnp.float32)).reshape(x.shape)


class PlainMLP(nn.Module):
    """A multilayer perceptron on (x, t), concatenated: TorchCFM's network for points, for comparisons with it.

    `h_i = activation(W_i h_{i-1} + b_i)`, `h_0 = (flatten(x), t)`, output `W h_n + b`. Kernels start as PyTorch's do,
    uniform within 1 / sqrt(inputs); biases at 0.

    Attributes:
        features: width of each hidden layer.
        activation: elementwise function.

    Example:
        >>> import jax
        >>> variables = PlainMLP().init(jax.random.key(0), 0.5, jnp.zeros((3, 2)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
        8706
    """

    features: tuple[int, ...] = (64, 64, 64)
    activation: Callable[[Array], Array] = nn.selu

    def __post_init__(self) -> None:
        check_widths("features", self.features)
        check_function("activation", self.activation, "a function of an array", 1)
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: None = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, scalar or [batch].
            x: state, [batch, ...].
            cond: must be `None`: this network has no conditioning.
            train: not used.

        Returns:
            In the shape of `x`.

        Raises:
            ValueError: if there is a `cond`.
        """
        check_event(x)
        if cond is not None:
            raise ValueError("PlainMLP takes no cond; MLP(embed=...) does.")
        flat = x.reshape(x.shape[0], -1)
        h = jnp.concatenate([flat, batch_time(t, x)[:, None]], axis=1)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        for width in self.features:
            h = self.activation(nn.Dense(width, kernel_init=init)(h))
        return nn.Dense(flat.shape[1], kernel_init=init)(h).reshape(x.shape)


class Hidden(nn.Module):
    """One hidden layer, `silu(W h + b + U emb)`, with dropout."""

    features: int
    dropout: float
    compute: Compute

    @nn.compact
    def __call__(self, h: Array, emb: Array, train: bool) -> Array:
        h = nn.Dense(self.features, dtype=self.compute.dtype, name="state")(h)
        h = nn.silu(h + nn.Dense(self.features, use_bias=False, dtype=self.compute.dtype, name="embed")(emb))
        return nn.Dropout(self.dropout, deterministic=not train)(h)
