"""Wan: a transformer over the patches of a video with adaLN-single, rotary positions and cross-attention to text."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_event, check_integer, check_member, check_real, check_setting, shown
from fm_jax.models.attention import (
    layer_norm,
    rotation,
)
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import RECTIFIED, Conditions
from fm_jax.models.crossdit import TextProjection, check_fields, check_tokens, modulations
from fm_jax.models.dense import Dense
from fm_jax.models.dit import modulate, small_normal, xavier
from fm_jax.models.layers import TimeEmbedding, check_options, zeros
from fm_jax.models.stack import run_blocks
from fm_jax.models.videodit import Triple, patchify_video, unpatchify_video
from fm_jax.models.wan_blocks import ImageProjection, WanBlock, grid_angles, spread
from fm_jax.shapes import batch_time, time_dtype
from fm_jax.types import Array


class Wan(nn.Module):
    """Wan's transformer over the latents of a video, or of an image as one frame; zero at initialisation.

    It gives the velocity. `cond` is `Conditions(tokens=...)`: the last hidden states of UMT5-XXL [batch, n, 4096]. The
    published networks were trained on 512 of them with zeros in place of padding, which they see, so give them just
    that: `jnp.where(mask[..., None], features, 0)`. `cond.mask` [batch, n] hides padding in networks of your own.

    Wan 2.1's networks from an image have `image_features`, and blocks that attend to the features of CLIP of the given
    frame too: `cond.tokens` is `{"text": ..., "image": [batch, 257, 1280]}`, the hidden states before the last layer.

    Time may be one for each frame of patches, [batch, frames], where some frames are given: Wan 2.2's 5B has the first
    frame at `t = 1` where it continues an image.

    Attributes:
        patch_size: of a patch in latents: frames, rows, columns.
        hidden: width of the tokens, divisible by `num_heads`.
        num_layers: number of blocks.
        num_heads: attention heads, of an even number of channels, at least 6; see `rope_axes`.
        mlp_hidden: width of the hidden layer of a block's MLP.
        text_features: width of `cond.tokens`.
        time_features: number of sines and cosines of time.
        channels: of the latents, in and out.
        local_channels: channels of `cond.local` [batch, frames, height, width, local_channels], which are joined to
            those of `x`: 0 for none, 20 in a 14B from an image (4 of a mask, 16 of the latents of the given frames).
        image_features: width of the features of an image, 0 for none.
        epsilon: of all norms.
        compute: dtype, attention and rematerialisation.
        scan_layers: see `DiT`.

    References:
        Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models" (arXiv:2503.20314), section 4.2.
    """

    patch_size: Triple = (1, 2, 2)
    hidden: int = 5120
    num_layers: int = 40
    num_heads: int = 40
    mlp_hidden: int = 13824
    text_features: int = 4096
    time_features: int = 256
    channels: int = 16
    local_channels: int = 0
    image_features: int = 0
    epsilon: float = 1e-6
    compute: Compute = Compute()
    scan_layers: bool = True

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("hidden", "num_layers", "num_heads", "mlp_hidden", "text_features", "time_features", "channels"):
            check_integer(name, getattr(self, name))
        for name in ("local_channels", "image_features"):
            check_integer(name, getattr(self, name), least=0)
        if not isinstance(self.patch_size, tuple | list) or len(self.patch_size) != 3:
            raise ValueError(f"patch_size must be (frames, rows, columns), got {shown(self.patch_size)}.")
        for i, number in enumerate(self.patch_size):
            check_integer(f"patch_size[{i}]", number)
        check_setting(self, "epsilon", "(0, inf)")
        check_bool("scan_layers", self.scan_layers)
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads must divide hidden={self.hidden}, got {self.num_heads}.")
        head_dim = self.hidden // self.num_heads
        if head_dim % 2 or head_dim < 6:
            raise ValueError(f"hidden / num_heads must be even and at least 6, got {self.hidden} / {self.num_heads}.")
        if self.time_features % 2:
            raise ValueError(f"time_features must be even, got {self.time_features}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Conditions | None = None, *, train: bool = False) -> Array:
        """Evaluates the velocity.

        Args:
            t: time, 0 for noise and 1 for data, scalar, [batch], or [batch, frames of patches].
            x: latents, [batch, frames, height, width, channels]; an image has one frame.
            cond: text, and `local` where the network has it; see the class.
            train: changes nothing: there is no dropout.

        Returns:
            float32, of the shape of `x`.

        Raises:
            ValueError: if `x` is no video, patches do not tile it, or `t` or `cond` does not fit the model.
        """
        grid = self._grid(x)
        tokens, features, mask, local = self._conditions(x, cond)
        t = self._times(t, x, grid[0])
        x = x.astype(jnp.float32)
        x = x if local is None else jnp.concatenate([x, local.astype(jnp.float32)], axis=-1)
        dtype = self.compute.dtype
        embedding = TimeEmbedding(self.time_features, self.hidden, 1.0, kernel_init=small_normal, name="time")
        emb = embedding(RECTIFIED.time(t))
        modulation = Dense(6 * self.hidden, kernel_init=small_normal, name="modulation")(nn.silu(emb))
        text = TextProjection(self.hidden, self.compute, name="text")(tokens)
        image = None if features is None else ImageProjection(self.hidden, self.compute, name="image")(features)
        h = Dense(self.hidden, kernel_init=xavier, dtype=dtype, name="patches")(patchify_video(x, self.patch_size))

        options = {name: getattr(self, name) for name in ("num_heads", "mlp_hidden", "epsilon", "compute")}
        positions = rotation(grid_angles(grid, self.hidden // self.num_heads))
        args = (positions, modulation.reshape(-1, 6, self.hidden), text, mask, image)
        scan, remat = self.scan_layers, self.compute.remat
        h = run_blocks(WanBlock, options, self.num_layers, h, *args, train=train, scan=scan, remat=remat)

        table = self.param("table", nn.initializers.normal(self.hidden**-0.5), (2, self.hidden))
        shift, scale = (spread(part, h) for part in modulations(table, emb[:, None]))  # of emb itself, without silu
        h = modulate(layer_norm(jnp.float32, "norm", epsilon=self.epsilon)(h), shift, scale)
        h = Dense(math.prod(self.patch_size) * self.channels, kernel_init=zeros, name="out")(h)
        return RECTIFIED.output(unpatchify_video(h, self.patch_size, grid))

    def _grid(self, x: Array) -> Triple:
        """The number of patches on each axis, of what is a video."""
        check_event(x)
        if x.ndim != 5 or x.shape[-1] != self.channels:
            raise ValueError(f"x must be [batch, frames, height, width, {self.channels}], got shape {x.shape}.")
        if any(n % p for n, p in zip(x.shape[1:4], self.patch_size, strict=True)):
            sides = " x ".join(map(str, self.patch_size))
            raise ValueError(f"frames, height and width must be tiled by patches of {sides}, got shape {x.shape}.")
        frames, rows, columns = (n // p for n, p in zip(x.shape[1:4], self.patch_size, strict=True))
        return frames, rows, columns

    def _times(self, t: Any, x: Array, frames: int) -> Array:
        """Times [batch times], where an example has one or as many as frames."""
        if getattr(t, "ndim", 0) != 2:
            return batch_time(t, x)
        check_real("t", t)
        if t.shape != (x.shape[0], frames):
            raise ValueError(
                f"t must be a scalar, [batch] or [batch, frames] = {(x.shape[0], frames)}, got {shown(t)}."
            )
        return t.astype(time_dtype(x)).reshape(-1)

    def _conditions(self, x: Array, cond: Any) -> tuple[Array, Array | None, Array | None, Array | None]:
        """Text, features of an image, the mask of the text, and what is joined to the latents, checked."""
        local, image = self.local_channels, self.image_features
        wanted = 'tokens={"text": ..., "image": ...}' if image else "tokens=text"
        wanted += ", local=..." if local else ""
        cond = check_fields(cond, ("tokens", "mask", "local") if local else ("tokens", "mask"), wanted)
        tokens, features = cond.tokens, None
        if image:
            if not isinstance(tokens, Mapping) or tokens.keys() != {"text", "image"}:
                got = sorted(map(str, tokens)) if isinstance(tokens, Mapping) else shown(tokens)
                raise ValueError(f'cond.tokens must be a dict of "text" and "image", got {got}.')
            tokens, features = tokens["text"], tokens["image"]
            check_tokens(features, None, x.shape[0], image, '["image"]')
        check_tokens(tokens, cond.mask, x.shape[0], self.text_features, '["text"]' if image else "")
        if local:
            check_real("cond.local", cond.local)
            if cond.local.shape != (shape := (*x.shape[:-1], local)):
                raise ValueError(f"cond.local must be {list(shape)}, got shape {cond.local.shape}.")
        return tokens, features, cond.mask, cond.local


WAN_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 96, "num_layers": 4, "num_heads": 4, "mlp_hidden": 256, "text_features": 64, "channels": 4},
    "1.3B": {"hidden": 1536, "num_layers": 30, "num_heads": 12, "mlp_hidden": 8960},
    "14B": {"hidden": 5120, "num_layers": 40, "num_heads": 40, "mlp_hidden": 13824},
    "2.2-5B": {"hidden": 3072, "num_layers": 30, "num_heads": 24, "mlp_hidden": 14336, "channels": 48},
}


def make_wan(name: str, **overrides: Any) -> Wan:
    """Builds a video transformer of Wan by the name of its size.

    Args:
        name: `"tiny"` (a CPU), `"1.3B"` and `"14B"` of Wan 2.1, `"2.2-5B"`. Each of the two networks of Wan 2.2's A14B
            is a `"14B"`, from an image with `local_channels=20`, and Wan 2.1's from one has `image_features=1280` too.
        **overrides: attributes of `Wan` to change.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> make_wan("1.3B").num_layers
        30
    """
    check_member("name", name, tuple(WAN_CONFIGS))
    return Wan(**(WAN_CONFIGS[name] | overrides))
