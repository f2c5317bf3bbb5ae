"""The multimodal diffusion transformer of Stable Diffusion 3: two streams, text and image, in one attention."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, check_bool, check_integer, check_member, check_real, shown
from fm_jax.models.attention import attend, from_heads, layer_norm, rms_norm, to_heads
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import RECTIFIED, Conditions
from fm_jax.models.dense import Dense
from fm_jax.models.dit import modulate, patchify, small_normal, unpatchify, xavier
from fm_jax.models.layers import TimeEmbedding, check_image, check_options, zeros
from fm_jax.models.stack import run_blocks
from fm_jax.shapes import batch_time
from fm_jax.types import Array


def position_table(rows: int, columns: int, size: int, base: int, dim: int, numpy: Any = np) -> Any:
    """The middle of a square table of sines and cosines of the column and of the row of each patch.

    Its places are 0, ..., `size - 1` times `base / size`; the features are those of `position_features`.

    Args:
        rows: height of the grid of patches.
        columns: width of the grid of patches.
        size: side of the table.
        base: what its places span.
        dim: width of the features, divisible by 4.
        numpy: with `jax.numpy`, a program holds the features of a row and a column alone.

    Returns:
        float32 [rows * columns, dim], in row-major order.

    Raises:
        ValueError: if the grid is larger than the table, or `dim` is not divisible by 4.
    """
    for name, value in {"rows": rows, "columns": columns, "size": size, "base": base, "dim": dim}.items():
        check_integer(name, value)
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4, got {dim}.")
    if max(rows, columns) > size:
        raise ValueError(f"An image must have at most {size}x{size} patches, as the positions, got {rows}x{columns}.")
    places = np.arange(size, dtype=np.float32) / np.float32(size / base)
    angles = np.outer(places.astype(np.float64), 10_000.0 ** (-np.arange(dim // 4) / (dim // 4)))
    features = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
    row, column = (features[(size - length) // 2 :][:length] for length in (rows, columns))
    shape = (rows, columns, dim // 2)
    table = [numpy.broadcast_to(column[None, :, :], shape), numpy.broadcast_to(row[:, None, :], shape)]
    return numpy.concatenate(table, axis=-1).reshape(rows * columns, dim)


class JointAttention(nn.Module):
    """Attention over image and context together, with projections of their own; without a context, self-attention.

    Attributes:
        num_heads: number of heads; divides the width of the tokens.
        qk_norm: whether queries and keys are normalised by their root mean square, head by head.
        pre_only: whether the context is only looked at: what would come of it is left out.
        compute: dtype and implementation.
    """

    num_heads: int
    qk_norm: bool = False
    pre_only: bool = False
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, mask: Array | None = None) -> tuple[Array, Array | None]:
        """Maps tokens [batch, n, d] and the context [batch, m, d], seen where `mask` [batch, m] is, to the same."""
        (batch_size, num_tokens, width), dtype = x.shape, self.compute.dtype

        def project(h: Array, prefix: str) -> tuple[Array, Array, Array]:
            q, k, v = (
                to_heads(self.num_heads, width // self.num_heads, dtype, prefix + name)(h)
                for name in ("query", "key", "value")
            )
            if self.qk_norm:
                q = rms_norm(dtype, f"norm_{prefix}query")(q)
                k = rms_norm(dtype, f"norm_{prefix}key")(k)
            return q, k, v

        q, k, v = project(x, "")
        if context is not None:
            # The text stands last, so that its padding ends the sequence.
            context_q, context_k, context_v = project(context, "context_")
            q = q if self.pre_only else jnp.concatenate([q, context_q], axis=1)
            k, v = jnp.concatenate([k, context_k], axis=1), jnp.concatenate([v, context_v], axis=1)
            if mask is not None:
                mask = jnp.concatenate([jnp.ones((batch_size, num_tokens), bool), mask], axis=1)
        h = attend(q, k, v, mask=mask, implementation=self.compute.attention)
        out = from_heads(width, dtype, "out")(h[:, :num_tokens])
        if context is None or self.pre_only:
            return out, None
        return out, from_heads(width, dtype, "context_out")(h[:, num_tokens:])


class JointBlock(nn.Module):
    """A block of two streams, image and context, which meet in attention; both shifted, scaled and gated.

    The identity at initialisation, because the gates start at zero.

    Attributes:
        num_heads, qk_norm, compute: see `MMDiT`.
        dual: whether the image attends to itself too, after it attended to all.
        last: whether this is the last block, after which nothing asks for the context.
        skipped: indices in a run of blocks of those that hand on what they get.
    """

    num_heads: int
    qk_norm: bool
    dual: bool = False
    last: bool = False
    skipped: tuple[int, ...] = ()
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, h: tuple[Array, ...], emb: Array, mask: Array | None, train: bool) -> tuple[Array, ...]:
        """Maps tokens [batch, n, d], context [batch, m, d], and the index if any is skipped, to the same."""
        x, c, *index = h
        width, dtype = x.shape[-1], self.compute.dtype

        def modulation(num: int, name: str) -> list[Array]:
            out = Dense(num * width, kernel_init=zeros, name=name)(emb).astype(dtype)
            return jnp.split(out[:, None, :], num, axis=-1)

        def mlp(h: Array, prefix: str) -> Array:
            h = Dense(4 * width, kernel_init=xavier, dtype=dtype, name=f"{prefix}mlp_in")(h)
            h = nn.gelu(h, approximate=True)
            return Dense(width, kernel_init=xavier, dtype=dtype, name=f"{prefix}mlp_out")(h)

        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, *second = modulation(9 if self.dual else 6, "modulation")
        shift_c, scale_c, *rest = modulation(2 if self.last else 6, "context_modulation")
        normed, context = layer_norm(dtype, "norm")(x), layer_norm(dtype, "context_norm")(c)
        joint = JointAttention(self.num_heads, self.qk_norm, self.last, self.compute, name="attention")
        a, context_a = joint(modulate(normed, shift_a, scale_a), modulate(context, shift_c, scale_c), mask)
        new = x + gate_a * a
        if self.dual:
            shift, scale, gate = second
            alone = JointAttention(self.num_heads, self.qk_norm, compute=self.compute, name="self_attention")
            new = new + gate * alone(modulate(normed, shift, scale))[0]
        new = new + gate_m * mlp(modulate(layer_norm(dtype, "norm_mlp")(new), shift_m, scale_m), "")
        if self.last:
            return new, c
        gate_ca, shift_cm, scale_cm, gate_cm = rest
        new_c = c + gate_ca * context_a
        h_c = modulate(layer_norm(dtype, "context_norm_mlp")(new_c), shift_cm, scale_cm)
        new_c = new_c + gate_cm * mlp(h_c, "context_")
        if not self.skipped:
            return new, new_c
        skip = (index[0] == jnp.array(self.skipped)).any()
        return jnp.where(skip, x, new), jnp.where(skip, c, new_c), index[0] + 1


class MMDiT(nn.Module):
    """The transformer of Stable Diffusion 3 and 3.5: a velocity of latents, given tokens and one vector of text.

    Attributes:
        patch_size: side of a patch in pixels of the latents.
        channels: of the latents.
        out_channels: channels of the output; those of the input by default.
        hidden: width of the tokens of both streams, divisible by 4 and by `num_heads`.
        num_layers: number of blocks; the last one does not change the context.
        num_heads: attention heads.
        num_dual: number of blocks, the first ones, in which the image attends to itself too.
        qk_norm: whether queries and keys are normalised by their root mean square.
        token_dim: channels of `cond.tokens`.
        vector_dim: length of `cond.vector`.
        table_size: side of the table of positions, in patches: the largest image.
        table_base: what the places of that table span: they are `table_base / table_size` apart.
        skip_layers: indices of blocks to leave out: the network that skip-layer guidance compares with.
            `module.clone(skip_layers=(7, 8, 9))` has the same parameters.
        compute: dtype, attention and rematerialisation.
        scan_layers: trace and compile one block of each kind and loop over it, its parameters stacked.

    References:
        Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 4
        and figure 2.
    """

    patch_size: int = 2
    channels: int = 16
    out_channels: int | None = None
    hidden: int = 1536
    num_layers: int = 24
    num_heads: int = 24
    num_dual: int = 0
    qk_norm: bool = False
    token_dim: int = 4096
    vector_dim: int = 2048
    table_size: int = 192
    table_base: int = 64
    skip_layers: tuple[int, ...] = ()
    compute: Compute = Compute()
    scan_layers: bool = True

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        check_bool("scan_layers", self.scan_layers)
        check_bool("qk_norm", self.qk_norm)
        names = ("patch_size", "channels", "hidden", "num_layers", "num_heads", "token_dim", "vector_dim")
        for name in (*names, "table_size", "table_base"):
            check_integer(name, getattr(self, name))
        if self.out_channels is not None:
            check_integer("out_channels", self.out_channels)
        check_integer("num_dual", self.num_dual, least=0, most=self.num_layers)
        if self.hidden % 4 or self.hidden % self.num_heads:
            raise ValueError(f"hidden must be divisible by 4 and by num_heads={self.num_heads}, got {self.hidden}.")
        if not isinstance(self.skip_layers, tuple | list):
            raise ValueError(f"skip_layers must be a tuple of integers, got {shown(self.skip_layers)}.")
        for i, index in enumerate(self.skip_layers):
            check_integer(f"skip_layers[{i}]", index, least=0, most=self.num_layers - 1)
        super().__post_init__()

    @property
    def runs(self) -> tuple[tuple[str, int, int], ...]:
        """Name of a single block, first index and number of the blocks that are alike, all but the last one."""
        last = self.num_layers - 1
        num_dual = min(self.num_dual, last)
        runs = (("dual_block", 0, num_dual), ("block", num_dual, last - num_dual))
        return tuple(run for run in runs if run[2])

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Conditions | None = None, *, train: bool = False) -> Array:
        """Evaluates the velocity.

        Args:
            t: time, 0 for noise and 1 for data, scalar or [batch].
            x: latents, [batch, height, width, channels].
            cond: `Conditions` of the text: `vector` [batch, vector_dim], `tokens` [batch, n, token_dim], and `mask`
                [batch, n] if some of the tokens are padding; the published networks were trained without one.
            train: makes no difference.

        Returns:
            float32, [batch, height, width, out_channels].

        Raises:
            ValueError: if `x` is no image of these channels, patches do not tile it, there are more of them than
                positions, or `cond` does not fit the model.
        """
        check_image(x, self.patch_size)
        if x.shape[-1] != self.channels:
            raise ValueError(f"x must have channels={self.channels}, got shape {x.shape}.")
        given = self._checked(x, cond)
        x = x.astype(jnp.float32)
        _, height, width, _ = x.shape
        dtype = self.compute.dtype

        time = TimeEmbedding(256, self.hidden, time_scale=1.0, kernel_init=small_normal, name="time")
        h = Dense(self.hidden, kernel_init=small_normal, name="vector_in")(given.vector.astype(jnp.float32))
        text = Dense(self.hidden, kernel_init=small_normal, name="vector_out")(nn.silu(h))
        emb = nn.silu(time(RECTIFIED.time(batch_time(t, x))) + text)

        h = Dense(self.hidden, kernel_init=xavier, dtype=dtype, name="patches")(patchify(x, self.patch_size))
        grid = height // self.patch_size, width // self.patch_size
        position = position_table(*grid, self.table_size, self.table_base, self.hidden, numpy=jnp)
        h = h + position.astype(dtype)[None]
        c = Dense(self.hidden, kernel_init=xavier, dtype=dtype, name="context")(given.tokens)

        options: dict[str, Any] = {"num_heads": self.num_heads, "qk_norm": self.qk_norm, "compute": self.compute}
        loop = {"scan": self.scan_layers, "remat": self.compute.remat}
        for name, start, length in self.runs:
            skipped = tuple(i - start for i in self.skip_layers if start <= i < start + length)
            kind = options | {"dual": name == "dual_block", "skipped": skipped}
            streams = (h, c, jnp.zeros((), jnp.int32)) if skipped else (h, c)
            h, c, *_ = run_blocks(JointBlock, kind, length, streams, emb, given.mask, train=train, name=name, **loop)
        if self.is_initializing() or self.num_layers - 1 not in self.skip_layers:
            dual = self.num_dual == self.num_layers
            block = nn.remat(JointBlock, static_argnums=(4,)) if self.compute.remat else JointBlock
            h, _ = block(**options, dual=dual, last=True, name="last_block")((h, c), emb, given.mask, train)

        modulation = Dense(2 * self.hidden, kernel_init=zeros, name="modulation")(emb)[:, None, :]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h = modulate(layer_norm(jnp.float32, "norm")(h), shift, scale)
        h = Dense(self.patch_size**2 * (self.out_channels or self.channels), kernel_init=zeros, name="out")(h)
        return RECTIFIED.output(unpatchify(h, self.patch_size, height, width))

    def _checked(self, x: Array, cond: Any) -> Any:
        if not isinstance(cond, Conditions):
            raise ValueError(f"cond must be Conditions(vector=..., tokens=...), got {shown(cond)}.")
        given: Any = cond._asdict()
        tokens = given["tokens"]
        num_tokens = tokens.shape[1] if len(getattr(tokens, "shape", ())) == 3 and tokens.shape[1] else "n"
        shapes = {"vector": (x.shape[0], self.vector_dim), "tokens": (x.shape[0], num_tokens, self.token_dim)}
        for name, shape in shapes.items():
            words = str(shape).replace("'", "")
            check_array(f"cond.{name}", given[name], f"an array of shape {words}")
            check_real(f"cond.{name}", given[name])
            if given[name].shape != shape:
                raise ValueError(f"cond.{name} must have shape {words}, got shape {given[name].shape}.")
        for name in ("label", "local", "guidance"):
            if given[name] is not None:
                raise ValueError(f"cond.{name} must be None: this network has no use for it, got {shown(given[name])}.")
        if (mask := given["mask"]) is not None:
            check_array("cond.mask", mask)
            if mask.dtype != bool or mask.shape != tokens.shape[:2]:
                raise ValueError(f"cond.mask must be bool of shape {tokens.shape[:2]}, got {shown(mask)}.")
        return cond


# Sizes of Esser et al. 2024 and of Stability AI's files; the tiny one takes small pictures and small encoders.
_TINY = {"channels": 3, "token_dim": 128, "vector_dim": 128, "table_size": 32, "table_base": 32}
_MEDIUM = {"hidden": 1536, "num_layers": 24, "num_heads": 24}
MMDIT_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 128, "num_layers": 4, "num_heads": 4} | _TINY,
    "medium": _MEDIUM,
    "3.5-medium": _MEDIUM | {"num_dual": 13, "qk_norm": True, "table_size": 384},
    "3.5-large": {"hidden": 2432, "num_layers": 38, "num_heads": 38, "qk_norm": True},
}


def make_mmdit(name: str, **overrides: Any) -> MMDiT:
    """Builds a multimodal diffusion transformer by the name of its size.

    Args:
        name: `"tiny"` (small pictures on a CPU), or Stable Diffusion 3's `"medium"`, `"3.5-medium"`, `"3.5-large"`.
        **overrides: attributes of `MMDiT` to change.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> make_mmdit("3.5-large").hidden
        2432
    """
    check_member("name", name, tuple(MMDIT_CONFIGS))
    return MMDiT(**(MMDIT_CONFIGS[name] | overrides))
