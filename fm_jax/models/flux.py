"""FLUX.1: a transformer in which image and text are two streams at first, then one."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, check_bool, check_integer, check_member, check_real, shown
from fm_jax.models.attention import (
    apply_rope,
    attend,
    from_heads,
    layer_norm,
    rms_norm,
    rope_angles,
    rotation,
    to_heads,
)
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import RECTIFIED, Conditions
from fm_jax.models.dense import Dense
from fm_jax.models.dit import modulate, patchify, unpatchify
from fm_jax.models.layers import TimeEmbedding, check_image, check_options, space_to_depth, zeros
from fm_jax.models.stack import run_blocks
from fm_jax.shapes import batch_time
from fm_jax.types import Array

PATCH, MLP_RATIO, MASK_SIDE = 2, 4, 8
"""Side of a patch in latents, hidden layers in units of the width, side of a latent in pixels of a mask."""
GUIDANCE_SCALE = 1000.0
"""What a guidance scale is multiplied by, as time is: 3.5 becomes 3500."""


def fill_local(latents: Array, mask: Array) -> Array:
    """The condition `local` of FLUX.1 Fill: the encoded image with a hole, and the mask with all its pixels.

    Args:
        latents: of the image times `1 - mask`, shifted and scaled as all latents are, [batch, h, w, c].
        mask: 1 where the image is painted anew, 0 where it is kept, [batch, 8 h, 8 w, 1].

    Returns:
        [batch, h, w, c + 64]: the latents, then the 8 x 8 pixels of the mask that lie under a latent, row by row.

    Raises:
        ValueError: if the mask has another shape.
    """
    check_image(latents, 1)
    check_real("mask", mask)
    batch_size, height, width, _ = latents.shape
    wanted = (batch_size, MASK_SIDE * height, MASK_SIDE * width, 1)
    if mask.shape != wanted:
        raise ValueError(f"mask must be [batch, {MASK_SIDE} h, {MASK_SIDE} w, 1] = {wanted}, got shape {mask.shape}.")
    return jnp.concatenate([latents, space_to_depth(mask.astype(latents.dtype), MASK_SIDE)], axis=-1)


def joint_ids(rows: int, columns: int, tokens: int) -> np.ndarray:
    """Positions of the tokens: (0, row, column) of each patch, row by row, then (0, 0, 0) for each token of text."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 2)
    image = np.concatenate([np.zeros((len(grid), 1)), grid], axis=1)
    return np.concatenate([image, np.zeros((tokens, 3))])


class Heads(nn.Module):
    """Queries and keys, each head of them normalised, and values."""

    num_heads: int
    head_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> tuple[Array, Array, Array]:
        """Maps tokens [batch, n, d] to three arrays [batch, n, heads, head_dim]."""
        q, k, v = (to_heads(self.num_heads, self.head_dim, self.dtype, name)(h) for name in ("query", "key", "value"))
        return rms_norm(self.dtype, "norm_query")(q), rms_norm(self.dtype, "norm_key")(k), v


def rotated_attention(q: Array, k: Array, v: Array, turn: Any, mask: Array | None, compute: Compute) -> Array:
    """Attention of all tokens to all that there are, queries and keys turned by their positions."""
    return attend(apply_rope(q, turn), apply_rope(k, turn), v, mask=mask, implementation=compute.attention)


class DoubleBlock(nn.Module):
    """A block of two streams with weights of their own, which meet in the attention. Attributes: see `Flux`."""

    num_heads: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], emb: Array, turn: Any, mask: Array | None, train: bool
    ) -> tuple[Array, Array]:
        """Maps image [batch, n, d] and text [batch, m, d], with silu of the embedding [batch, d], to the same."""
        width, dtype = streams[0].shape[-1], self.compute.dtype
        parts, heads = {}, []
        for name, h in zip(("image", "text"), streams, strict=True):
            modulation = Dense(6 * width, kernel_init=zeros, dtype=jnp.float32, name=f"{name}_modulation")(emb)
            parts[name] = jnp.split(modulation.astype(dtype)[:, None, :], 6, axis=-1)
            shift, scale = parts[name][:2]
            h = modulate(layer_norm(dtype, f"{name}_norm_attention")(h), shift, scale)
            heads.append(Heads(self.num_heads, width // self.num_heads, dtype, name=f"{name}_attention")(h))
        q, k, v = (jnp.concatenate(both, axis=1) for both in zip(*heads, strict=True))
        joint = rotated_attention(q, k, v, turn, mask, self.compute)

        out = []
        attended = jnp.split(joint, [streams[0].shape[1]], axis=1)
        for name, h, a in zip(("image", "text"), streams, attended, strict=True):
            _, _, gate_a, shift, scale, gate_m = parts[name]
            h = h + gate_a * from_heads(width, dtype, f"{name}_out")(a)
            m = modulate(layer_norm(dtype, f"{name}_norm_mlp")(h), shift, scale)
            m = nn.gelu(Dense(MLP_RATIO * width, dtype=dtype, name=f"{name}_mlp_in")(m), approximate=True)
            out.append(h + gate_m * Dense(width, dtype=dtype, name=f"{name}_mlp_out")(m))
        return out[0], out[1]


class SingleBlock(nn.Module):
    """A block of one stream whose attention and MLP stand side by side, with one projection out of both.

    The hidden units of the MLP are dealt out to the heads, so that one axis of every kernel can be cut over devices.

    Attributes: see `Flux`.
    """

    num_heads: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, h: Array, emb: Array, turn: Any, mask: Array | None, train: bool) -> Array:
        """Maps tokens [batch, n, d], with silu of the embedding [batch, d], to the same shape."""
        width, dtype = h.shape[-1], self.compute.dtype
        head_dim = width // self.num_heads
        modulation = Dense(3 * width, kernel_init=zeros, dtype=jnp.float32, name="modulation")(emb)
        shift, scale, gate = jnp.split(modulation.astype(dtype)[:, None, :], 3, axis=-1)
        x = modulate(layer_norm(dtype, "norm")(h), shift, scale)
        a = rotated_attention(*Heads(self.num_heads, head_dim, dtype, name="attention")(x), turn, mask, self.compute)
        m = nn.gelu(to_heads(self.num_heads, MLP_RATIO * head_dim, dtype, "mlp_in")(x), approximate=True)
        return h + gate * from_heads(width, dtype, "out")(jnp.concatenate([a, m], axis=-1))


class Flux(nn.Module):
    """FLUX.1: a transformer over patches of latents and tokens of text, zero at initialisation.

    Time, a vector (pooled text) and, in distilled networks, the guidance scale modulate every block; text joins the
    attention as tokens. What is aligned with the state, an image to fill or to follow, is joined to its channels.

    Attributes:
        channels: of the state.
        local_channels: channels of `cond.local`: 0 for none, 80 for Fill (see `fill_local`), 16 for Canny and Depth.
        hidden: width of the tokens, `num_heads` times the sum of `axes`.
        num_heads: attention heads.
        axes: channels of a head that turn with each of the three coordinates of a position, even.
        num_double: number of blocks of two streams.
        num_single: number of blocks of one stream.
        token_dim: channels of `cond.tokens`.
        vector_dim: channels of `cond.vector`.
        guidance: whether the network is told a guidance scale, `cond.guidance`.
        compute: dtype, attention and rematerialisation.
        scan_layers: trace and compile one block of either kind and loop over it; parameters are stacked in `doubles`
            and `singles`. Otherwise they are in `double_0`, ..., `single_0`, ...

    References:
        Black Forest Labs 2024, FLUX.1; Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution
        Image Synthesis" (arXiv:2403.03206), section 4, from which it descends.
    """

    channels: int = 16
    local_channels: int = 0
    hidden: int = 3072
    num_heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)
    num_double: int = 19
    num_single: int = 38
    token_dim: int = 4096
    vector_dim: int = 768
    guidance: bool = True
    compute: Compute = Compute()
    scan_layers: bool = True

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        check_bool("guidance", self.guidance)
        check_bool("scan_layers", self.scan_layers)
        for name in ("channels", "hidden", "num_heads", "num_double", "num_single", "token_dim", "vector_dim"):
            check_integer(name, getattr(self, name))
        check_integer("local_channels", self.local_channels, least=0)
        if not isinstance(self.axes, tuple | list) or len(self.axes) != 3:
            raise ValueError(f"axes must be three even integers, got {shown(self.axes)}.")
        rope_angles(np.zeros((1, 3)), self.axes)  # refuses what is odd
        if self.hidden != self.num_heads * sum(self.axes):
            product = f"{self.num_heads} x {sum(self.axes)}"
            raise ValueError(f"hidden must be num_heads times the sum of axes, {product}, got {self.hidden}.")
        self.axes = tuple(self.axes)
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Conditions | None = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, scalar or [batch].
            x: latents, [batch, height, width, channels], with even sides.
            cond: with `tokens` [batch, n, token_dim] and `vector` [batch, vector_dim]; with `local` [batch, height,
                width, local_channels] and `guidance` [batch] in networks that have them, and only there. `mask`
                [batch, n] hides tokens of text; the published networks were trained without.
            train: has no effect, as there is no dropout.

        Returns:
            float32, [batch, height, width, channels].

        Raises:
            ValueError: if `x` does not fit, or `cond` has not what the network was built for.
        """
        check_image(x, PATCH)
        given = self._checked(x, cond)
        dtype, texts, (height, width) = self.compute.dtype, given.tokens.shape[1], x.shape[1:3]

        embed = partial(TimeEmbedding, 256, self.hidden, time_scale=1.0)
        emb = embed(name="time")(RECTIFIED.time(batch_time(t, x)))
        if self.guidance:
            emb = emb + embed(name="guidance")(GUIDANCE_SCALE * given.guidance.astype(jnp.float32))
        vector = Dense(self.hidden, name="vector_in")(given.vector.astype(jnp.float32))
        emb = nn.silu(emb + Dense(self.hidden, name="vector_out")(nn.silu(vector)))

        x = jnp.concatenate([part.astype(jnp.float32) for part in (x, given.local) if part is not None], axis=-1)
        image = Dense(self.hidden, dtype=dtype, name="patches")(patchify(x, PATCH))
        text = Dense(self.hidden, dtype=dtype, name="tokens")(given.tokens)

        turn = rotation(rope_angles(joint_ids(height // PATCH, width // PATCH, texts), self.axes))
        mask = None
        if given.mask is not None:
            mask = jnp.concatenate([jnp.ones(image.shape[:2], bool), given.mask], axis=1)

        options = {"num_heads": self.num_heads, "compute": self.compute}
        loop = {"train": train, "scan": self.scan_layers, "remat": self.compute.remat}
        h = run_blocks(DoubleBlock, options, self.num_double, (image, text), emb, turn, mask, name="double", **loop)
        h = jnp.concatenate(h, axis=1)
        h = run_blocks(SingleBlock, options, self.num_single, h, emb, turn, mask, name="single", **loop)

        modulation = Dense(2 * self.hidden, kernel_init=zeros, name="modulation")(emb)
        shift, scale = jnp.split(modulation[:, None, :], 2, axis=-1)
        h = modulate(layer_norm(jnp.float32, "norm")(h[:, : image.shape[1]]), shift, scale)
        h = Dense(PATCH**2 * self.channels, kernel_init=zeros, name="out")(h)
        return RECTIFIED.output(unpatchify(h, PATCH, height, width))

    def _checked(self, x: Array, given: Any) -> Any:
        """The condition, if it and the state fit the network."""
        if x.shape[-1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels, got shape {x.shape}.")
        if not isinstance(given, Conditions):
            raise ValueError(f"cond must be Conditions(vector=..., tokens=...), got {shown(given)}.")
        cond: Any = given
        length = cond.tokens.shape[1] if len(getattr(cond.tokens, "shape", ())) == 3 else "n"
        wanted: dict[str, tuple[Any, ...] | None] = {
            "vector": (x.shape[0], self.vector_dim),
            "tokens": (x.shape[0], length, self.token_dim),
            "local": (*x.shape[:3], self.local_channels) if self.local_channels else None,
            "guidance": x.shape[:1] if self.guidance else None,
            "label": None,
        }
        for name, shape in wanted.items():
            value, words = getattr(cond, name), str(shape).replace("'", "")
            if shape is not None:
                check_array(f"cond.{name}", value, f"an array of shape {words}")
                check_real(f"cond.{name}", value)
                if value.shape != shape:
                    raise ValueError(f"cond.{name} must have shape {words}, got shape {value.shape}.")
            elif value is not None:
                raise ValueError(f"cond.{name} must be None: this network has no use for it, got {shown(value)}.")
        seen = cond.tokens.shape[:2]
        if cond.mask is not None and (getattr(cond.mask, "dtype", None) != np.bool_ or cond.mask.shape != seen):
            raise ValueError(f"cond.mask must be bool of shape {seen}, got {shown(cond.mask)}.")
        return cond


TINY = {"hidden": 128, "num_heads": 4, "axes": (8, 12, 12), "num_double": 2, "num_single": 4}
FLUX_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": TINY | {"channels": 4, "token_dim": 64, "vector_dim": 32, "guidance": False},
    "dev": {},
    "schnell": {"guidance": False},
    "fill": {"local_channels": 80},
    "canny": {"local_channels": 16},
}


def make_flux(name: str, **overrides: Any) -> Flux:
    """Builds a FLUX.1 by its name.

    Args:
        name: `"tiny"` (small images on a CPU), `"dev"`, `"schnell"`, `"fill"`, or `"canny"`, which is Depth too.
        **overrides: attributes of `Flux` to change, such as `compute`.

    Raises:
        ValueError: if there is no such network.

    Example:
        >>> make_flux("schnell").guidance
        False
    """
    check_member("name", name, tuple(FLUX_CONFIGS))
    return Flux(**(FLUX_CONFIGS[name] | overrides))
