"""An image network of pixels that are tokens: grey levels, or black and white."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_tokens
from fm_jax.models.dit import small_normal
from fm_jax.models.embed import rows
from fm_jax.types import Array, Cond


class PixelTokens(nn.Module):
    """Logits of the level of each pixel, by any network of images: levels are embedded, and K channels come out.

    The network sees, for each pixel, the sum of a learned vector of the level of each of its channels. One that begins
    at zero, as U-Nets and transformers of ours do, finds all levels but the mask equally likely at first.

    Attributes:
        network: of images, `network(t, h, cond, train=) -> [batch, height, width, channels K]`, such as
            `make_unet("tiny", out_channels=K)` for grey pictures.
        num_tokens: K, the mask included.
        mask: of the K, the one that data never hold: its logit is minus infinity. `None` where there is none.
        width: channels that the network sees.

    Raises:
        ValueError: for a mask that is none of the K; when called, for what are no tokens [batch, height, width,
            channels], or a network that returns another number of channels.

    Example:
        >>> import jax
        >>> from fm_jax.models import init_params, make_unet
        >>> sizes = {"channels": 8, "channel_mults": (1,), "attention_levels": (), "num_blocks": 1}
        >>> module = PixelTokens(make_unet("tiny", out_channels=3, **sizes), 3, mask=2)
        >>> x = jnp.array([[[[0], [2]], [[1], [2]]]])
        >>> params = init_params(module, jax.random.key(0), (2, 2, 1))
        >>> module.apply({"params": params}, 0.5, x)[0, 0, 0, 0]
        Array([  0.,   0., -inf], dtype=float32)
    """

    network: nn.Module
    num_tokens: int
    mask: int | None = None
    width: int = 16
    tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("num_tokens", self.num_tokens, least=2)
        check_integer("width", self.width)
        if self.mask is not None:
            check_integer("mask", self.mask, least=0, most=self.num_tokens - 1)
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Evaluates the denoiser.

        Args:
            t: time, scalar or [batch].
            x: tokens, integers [batch, height, width, channels]. A traced token outside 0, ..., K - 1 gives NaN.
            cond: what the network takes.
            train: whether dropout is on.

        Returns:
            Logits, float32 [batch, height, width, channels, K].
        """
        check_tokens("x", x, self.num_tokens)
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"x must be tokens [batch, height, width, channels], got shape {x.shape}.")
        channels = x.shape[-1]
        table = self.param("table", small_normal, (channels, self.num_tokens, self.width))
        h = sum(rows(table[i], x[..., i]) for i in range(channels))
        logits = self.network(t, h, cond, train=train)
        if logits.shape != (*x.shape[:3], channels * self.num_tokens):
            raise ValueError(
                f"network must return {channels} x {self.num_tokens} channels, as by out_channels, got shape "
                f"{logits.shape}."
            )
        logits = logits.reshape(*x.shape, self.num_tokens)
        return logits if self.mask is None else logits.at[..., self.mask].set(-jnp.inf)
