"""Conditions for networks that were built without them: branches, each of which starts as nothing.

A condition is classified by what it is aligned with, and that decides its branch:

| kind | shape | branch | joins |
|---|---|---|---|
| global | [batch, dim] | `VectorBranch` | the embedding of time, and so FiLM and adaLN of every block |
| local | [batch, *grid, channels] | `LocalBranch` | every block, by features on its grid (T2I-adapter) |
| local | [batch, *grid, channels] | `ChannelConcat` | the channels of the state |
| local | [batch, *grid, channels] | `fm_jax.models.control.Controlled` | blocks, by a trainable copy (ControlNet) |
| set or sequence | [batch, n, dim], with a mask | `CrossBranch` | every block, by cross-attention |
| set or sequence | [batch, n, dim], with a mask | `ImagePrompt` | the attention there is, decoupled (IP-adapter) |
| constraint | a mask, an operator | none: it is a matter of sampling | |

`Branched(network, branches)` is the network with them. Its parameters are those of the network, in `network`, and
subtrees `branch_{name}` beside and in them; `fm_jax.models.grafting` takes a trained network there.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from fm_jax.checks import check_integer, check_real, check_setting, shown
from fm_jax.models.branch_parts import CrossPart, LocalFeatures, PromptPart, PromptTokens, VectorPart
from fm_jax.models.conditioning import Conditions
from fm_jax.models.crossdit import check_fields
from fm_jax.models.dense import Dense
from fm_jax.models.layers import zeros
from fm_jax.models.places import Head, Seen, on_grid
from fm_jax.types import Array


def check_local(name: str, value: Any, x: Array, channels: int) -> None:
    """Raises `ValueError` unless `value` is [batch, *grid, channels] on the grid of `x`, a finer or a coarser one."""
    check_real(name, value)
    sides = x.shape[1:-1]
    if not sides:
        raise ValueError(f"{name} is told on a grid, and x has none, as of an MLP: got x of shape {x.shape}.")
    fits = value.ndim == x.ndim and value.shape[0] == x.shape[0] and value.shape[-1] == channels
    ratios = zip(value.shape[1:-1], sides, strict=True) if fits else ()
    if not fits or any(not a or (a % b and b % a) for a, b in ratios):
        wanted = ", ".join(map(str, (x.shape[0], *sides, channels)))
        raise ValueError(
            f"{name} must be [{wanted}], with the sides of x, multiples or divisors of them, got shape {value.shape}."
        )


def check_set(name: str, value: Any, x: Array, dim: int) -> tuple[Array, Array | None]:
    """Tokens and their mask, of tokens [batch, n, dim] or of `Conditions(tokens=..., mask=...)`, or `ValueError`."""
    given: Any = value
    if isinstance(value, Conditions):
        given = check_fields(value, ("tokens", "mask"), "tokens=..., mask=...")
    tokens, mask = (given.tokens, given.mask) if isinstance(value, Conditions) else (value, None)
    check_real(name, tokens)
    if tokens.ndim != 3 or tokens.shape[0] != x.shape[0] or tokens.shape[2] != dim:
        raise ValueError(f"{name} must be tokens [{x.shape[0]}, n, {dim}], got shape {tokens.shape}.")
    if mask is not None and (getattr(mask, "shape", None) != tokens.shape[:2] or mask.dtype != bool):
        raise ValueError(f"{name}.mask must be bool {list(tokens.shape[:2])}, true for a token, got {shown(mask)}.")
    tokens = tokens.astype(jnp.float32)
    if mask is not None:  # zero times what is not finite would be no zero
        mask = jnp.asarray(mask)
        tokens = jnp.where(mask[..., None], tokens, 0.0)
    return tokens, mask


def _check(branch: Any, *integers: str) -> None:
    for name in integers:
        check_integer(name, getattr(branch, name))
    check_setting(branch, "scale", "(-inf, inf)")


@dataclass(frozen=True)
class VectorBranch:
    """A vector for each example, [batch, dim], added to the embedding of time through a small MLP.

    Attributes:
        dim: number of coordinates.
        scale: factor on what is added.

    Raises:
        ValueError: for a `dim` below 1 or a `scale` that is not finite.
    """

    place: ClassVar[str] = "time"
    dim: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "dim")

    def told(self, name: str, field: str, value: Any, x: Array) -> Array:
        """The vector, checked."""
        check_real(field, value)
        if value.shape != (x.shape[0], self.dim):
            raise ValueError(f"{field} must be [batch, dim] = {(x.shape[0], self.dim)}, got shape {value.shape}.")
        return value

    def add(self, name: str, told: Array, emb: Array) -> Array:
        """What joins the embedding of time, [rows, d]: rows are examples, or their frames one behind another."""
        out = self.scale * VectorPart(emb.shape[-1], name=name)(told)
        return jnp.repeat(out, emb.shape[0] // out.shape[0], axis=0, total_repeat_length=emb.shape[0])


@dataclass(frozen=True)
class LocalBranch:
    """What is aligned with the state, [batch, *grid, channels]: its features, on the grid of each block, are added.

    Attributes:
        channels: of the condition. Its sides are those of the state, multiples or divisors of them.
        features: width of the features, which two convolutions make once.
        scale: factor on what is added.

    Raises:
        ValueError: for a `channels` or `features` below 1 or a `scale` that is not finite.

    References:
        Mou et al. 2023, "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image
        Diffusion Models" (arXiv:2302.08453).
    """

    place: ClassVar[str] = "blocks"
    channels: int
    features: int = 64
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "channels", "features")

    def told(self, name: str, field: str, value: Any, x: Array) -> Array:
        """Features of the condition, on its own grid."""
        check_local(field, value, x, self.channels)
        features: Array = LocalFeatures(self.features, name=name)(value)
        return features

    def add(self, name: str, told: Array, h: Array, grid: tuple[int, ...]) -> Array:
        """What joins the state of a block."""
        if h.ndim == 2:
            raise ValueError("A LocalBranch needs blocks with a grid, which an MLP has not.")
        part = Dense(h.shape[-1], kernel_init=zeros, dtype=h.dtype, name=name)
        out: Array = self.scale * part(on_grid(told, h, grid))
        return out


@dataclass(frozen=True)
class CrossBranch:
    """Tokens, [batch, n, dim] or `Conditions(tokens=..., mask=...)`: the state attends to them behind every block.

    A token that is masked has no influence, whatever it holds, and no order of them counts; where all are masked,
    nothing is added.

    Attributes:
        dim: width of the tokens.
        num_heads: attention heads; divides the width of every block.
        scale: factor on what is added.

    Raises:
        ValueError: for a `dim` or `num_heads` below 1 or a `scale` that is not finite.
    """

    place: ClassVar[str] = "blocks"
    dim: int
    num_heads: int = 4
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "dim", "num_heads")

    def told(self, name: str, field: str, value: Any, x: Array) -> tuple[Array, Array | None]:
        """Tokens and their mask, checked."""
        return check_set(field, value, x, self.dim)

    def add(self, name: str, told: tuple[Array, Array | None], h: Array, grid: tuple[int, ...]) -> Array:
        """What joins the state of a block."""
        out: Array = CrossPart(self.num_heads, name=name)(h.reshape(h.shape[0], -1, h.shape[-1]), *told)
        return self.scale * out.reshape(h.shape)


@dataclass(frozen=True)
class ImagePrompt:
    """Tokens of an image beside those of the text, in the attention there is: decoupled cross-attention.

    `attend(q, k_text, v_text) + scale attend(q, k_image, v_image)`, with the same queries, before the projection out.
    Without cross-attention it is the queries of joint attention, or of self-attention, that ask.

    Attributes:
        dim: width of the tokens, [batch, n, dim] or `Conditions(tokens=..., mask=...)`.
        num_tokens: with a number, the condition is a vector [batch, dim], of which so many tokens are made.
        scale: factor on the attention to the image.

    Raises:
        ValueError: for a `dim` or `num_tokens` below 1 or a `scale` that is not finite.

    References:
        Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models"
        (arXiv:2308.06721), section 3.2.
    """

    place: ClassVar[str] = "attention"
    dim: int
    num_tokens: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "dim", *(() if self.num_tokens is None else ("num_tokens",)))

    def told(self, name: str, field: str, value: Any, x: Array) -> tuple[Array, Array | None]:
        """Normalised tokens of the image, and their mask."""
        tokens, mask = value, None
        if self.num_tokens is None:
            tokens, mask = check_set(field, value, x, self.dim)
        else:
            VectorBranch(self.dim).told(name, field, value, x)
        return PromptTokens(self.num_tokens, name=name)(tokens), mask

    def see(self, name: str, told: tuple[Array, Array | None], head: Head) -> Seen:
        """What is seen in an attention."""
        return Seen(*PromptPart(head, name=name)(told[0]), told[1], self.scale)


@dataclass(frozen=True)
class ChannelConcat:
    """What is aligned with the state, [batch, *grid, channels] on its grid, joined to its channels.

    The network sees `channels` more than the state has, so it is built for that: `MMDiT`, `CrossDiT`, `VideoDiT` and
    those with an `in_channels` say how many; `UNet`, `DiT`, `LightningDiT` and `MLP` take what comes. (`UNetCondition`,
    `Flux` and `Wan` have a `local` of their own.) If it gives as many channels as it sees, those of the state are kept.
    Unlike other branches it cannot be left out: zeros may stand for "no condition".

    Attributes:
        channels: of the condition.

    Raises:
        ValueError: for a `channels` below 1.

    References:
        Saharia et al. 2021, "Image Super-Resolution via Iterative Refinement" (arXiv:2104.07636), section 2.
    """

    place: ClassVar[str] = "input"
    channels: int

    def __post_init__(self) -> None:
        check_integer("channels", self.channels)

    def told(self, name: str, field: str, value: Any, x: Array) -> Array:
        """The condition, checked."""
        check_real(field, value)
        if value.shape != (wanted := (*x.shape[:-1], self.channels)):
            raise ValueError(f"{field} must be {list(wanted)}, on the grid of x, got shape {value.shape}.")
        return value.astype(jnp.float32)


Branch = VectorBranch | LocalBranch | CrossBranch | ImagePrompt | ChannelConcat
