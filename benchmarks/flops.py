"""Floating-point operations of one evaluation on one example, counted by hand: 2 a multiply-accumulate.

Convolutions, matrix products and attention only; the padding of a convolution counts as if it were pixels, so that a
count is a few per cent above that of the lowered program (`fm_jax.models.forward_flops`) for small images, and what
normalisations and activations do is a few per cent below it for narrow networks.
"""

import itertools
import math
from collections.abc import Sequence

import flax.linen as nn

from fm_jax.models import MLP, DiT, PlainMLP, UNet


def by_hand(model: nn.Module, event_shape: Sequence[int]) -> float:
    """The count of a network of `fm_jax.models`.

    Raises:
        ValueError: for another network.
    """
    match model:
        case PlainMLP():
            return 2 * chain([math.prod(event_shape) + 1, *model.features, math.prod(event_shape)])
        case MLP():
            time = model.time_features
            states = chain([math.prod(event_shape), *model.features, math.prod(event_shape)])
            return 2 * (2 * time * time + states + time * sum(model.features))
        case DiT():
            return dit(model, event_shape)
        case UNet():
            return unet(model, event_shape)
    raise ValueError(f"model must be an MLP, a PlainMLP, a DiT or a UNet, got {type(model).__name__}.")


def chain(widths: Sequence[int]) -> int:
    """Multiply-accumulates of linear layers one after another."""
    return sum(a * b for a, b in itertools.pairwise(widths))


def attention(tokens: int, width: int) -> int:
    """Multiply-accumulates of self-attention with its four projections."""
    return tokens * 4 * width**2 + 2 * tokens**2 * width


def dit(model: DiT, event_shape: Sequence[int]) -> float:
    """Multiply-accumulates of a transformer."""
    height, width, channels = event_shape
    d, patch = model.hidden, model.patch_size**2 * channels
    tokens = height * width // model.patch_size**2
    block = attention(tokens, d) + tokens * 2 * d * int(model.mlp_ratio * d) + 6 * d**2
    ends = tokens * d * 2 * patch + 2 * d**2 + 256 * d + d**2
    return 2 * (model.num_layers * block + ends)


def unet(model: UNet, event_shape: Sequence[int]) -> float:
    """Multiply-accumulates of a U-Net."""
    height, width, channels = event_shape
    patch, emb = model.patch_size**2 * channels, 4 * model.channels
    sizes = [height * width // model.patch_size**2 // 4**level for level in range(len(model.channel_mults))]
    last = len(sizes) - 1

    def conv(pixels: int, n_in: int, n_out: int, area: int = 9) -> int:
        return pixels * area * n_in * n_out

    def block(level: int, n_in: int, n_out: int) -> int:
        pixels = sizes[level]
        skip = 0 if n_in == n_out else conv(pixels, n_in, n_out, 1)
        return conv(pixels, n_in, n_out) + conv(pixels, n_out, n_out) + skip + emb * n_out * (1 + model.film)

    def resample(level: int, n: int) -> int:
        """To `level` from its neighbour."""
        return {"conv": conv(sizes[level], n, n), "pool": 0, "resblock": block(level, n, n)}[model.resample]

    now = model.channels * model.channel_mults[0]
    total, skips = model.channels * emb + emb**2 + conv(sizes[0], patch, now), [now]
    for level, mult in enumerate(model.channel_mults):
        for _ in range(model.num_blocks):
            total += block(level, now, now := model.channels * mult)
            total += attention(sizes[level], now) if level in model.attention_levels else 0
            skips.append(now)
        if level < last:
            total += resample(level + 1, now)
            skips.append(now)
    total += 2 * block(last, now, now) + attention(sizes[last], now)
    for level, mult in reversed(list(enumerate(model.channel_mults))):
        for _ in range(model.num_blocks + 1):
            total += block(level, now + skips.pop(), now := model.channels * mult)
            total += attention(sizes[level], now) if level in model.attention_levels else 0
        total += resample(level - 1, now) if level else 0
    return 2 * (total + conv(sizes[0], now, patch))
