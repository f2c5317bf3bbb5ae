"""The text encoder of CLIP: Stable Diffusion 1, 2, XL and 3, FLUX."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_integer, check_member, check_setting, is_traced
from fm_jax.models.attention import layer_norm
from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense
from fm_jax.models.layers import check_options
from fm_jax.models.stack import run_blocks
from fm_jax.text.encoder import SelfAttention, TextFeatures, TokenEmbed, check_ids, check_kept
from fm_jax.types import Array

END = 49407
"""Id of the token that ends a text in CLIP's vocabulary; 49406 starts it."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda h: h * jax.nn.sigmoid(1.702 * h),
    "gelu": lambda h: nn.gelu(h, approximate=False),
}


class ClipBlock(nn.Module):
    """A transformer block with affine layer normalisation in front of both branches.

    Attributes: see `ClipText`.
    """

    num_heads: int
    mlp: int
    activation: str
    epsilon: float
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, state: tuple[Array, tuple[Array, ...]], mask: Array | None, train: bool) -> Any:
        """Maps tokens [batch, n, d], and puts those that came in behind the inputs of earlier blocks that are kept."""
        del train
        h, kept = state
        kept = (*kept, h)[1:]
        width, dtype = h.shape[-1], self.compute.dtype
        norm = partial(layer_norm, dtype, affine=True, epsilon=self.epsilon)
        attention = SelfAttention(
            self.num_heads, width // self.num_heads, True, causal=True, compute=self.compute, name="attention"
        )
        h = h + attention(norm("norm_attention")(h), mask, None)
        m = Dense(self.mlp, dtype=dtype, name="mlp_in")(norm("norm_mlp")(h))
        return h + Dense(width, dtype=dtype, name="mlp_out")(ACTIVATIONS[self.activation](m)), kept


class ClipText(nn.Module):
    """The text encoder of CLIP: a causal transformer, read out at the token that ends the text.

    Padding follows the end of the text, so that what causal attention sees of it is other padding alone: the published
    systems encode without a mask.

    Attributes:
        vocabulary: number of tokens.
        max_tokens: longest text, start and end included: rows of the learned table of positions.
        hidden: width, divisible by `num_heads`.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp: width of the blocks' hidden layer.
        activation: `"quick_gelu"`, `h sigmoid(1.702 h)` (CLIP-L), or `"gelu"`, the exact one (H, bigG).
        projection: width of the projected output; `None` for none.
        end: id of the token whose first place is read out; `None` reads at the largest id of a row, which is what
            configurations with `eos_token_id: 2` mean.
        keep_hidden: how many of the last states to give, see `TextFeatures`: 2 for Stable Diffusion 2, XL and 3.
        epsilon: of the layer normalisation.
        compute: dtype, attention and rematerialisation.
        scan_layers: trace and compile one block and loop over it; see `DiT`.

    References:
        Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4.
    """

    vocabulary: int = 49408
    max_tokens: int = 77
    hidden: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp: int = 3072
    activation: str = "quick_gelu"
    projection: int | None = None
    end: int | None = END
    keep_hidden: int = 2
    epsilon: float = 1e-5
    compute: Compute = Compute()
    scan_layers: bool = True

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        check_bool("scan_layers", self.scan_layers)
        for name in ("vocabulary", "max_tokens", "hidden", "num_layers", "num_heads", "mlp"):
            check_integer(name, getattr(self, name))
        check_member("activation", self.activation, tuple(ACTIVATIONS))
        if self.projection is not None:
            check_integer("projection", self.projection)
        if self.end is not None:
            check_integer("end", self.end, least=0, most=self.vocabulary - 1)
        check_kept(self.keep_hidden, self.num_layers)
        check_setting(self, "epsilon", "(0, inf)")
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads must divide hidden={self.hidden}, got {self.num_heads}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> TextFeatures:
        """Encodes prompts.

        Args:
            ids: token ids, integers [batch, n].
            mask: which tokens are seen, bool [batch, n], padding on the right; `None` for all, as the published
                systems have it.

        Returns:
            All of `TextFeatures`; `projected` if there is a projection.

        Raises:
            ValueError: if `ids` are longer than the table of positions, not of the vocabulary, or a row has no end;
                the latter two where values are not traced.
        """
        self._check(ids, mask)
        dtype = self.compute.dtype
        small = nn.initializers.normal(0.02)
        # Cast behind the look-up: a table of bfloat16 is not made float32, nor the other way round.
        h = TokenEmbed(self.vocabulary, self.hidden, small, name="tokens")(ids).astype(dtype)
        places = self.param("positions", small, (self.max_tokens, self.hidden))
        h = h + jnp.asarray(places[None, : ids.shape[1]], dtype)

        options = {
            "num_heads": self.num_heads,
            "mlp": self.mlp,
            "activation": self.activation,
            "epsilon": self.epsilon,
            "compute": self.compute,
        }
        state = (h, (h,) * max(self.keep_hidden - 1, 0))
        scan, remat = self.scan_layers, self.compute.remat
        h, kept = run_blocks(ClipBlock, options, self.num_layers, state, mask, train=False, scan=scan, remat=remat)
        hidden = tuple(each.astype(jnp.float32) for each in (*kept, h)[-self.keep_hidden :]) if self.keep_hidden else ()

        last = layer_norm(jnp.float32, "norm", affine=True, epsilon=self.epsilon)(h)
        place = jnp.argmax(ids if self.end is None else ids == self.end, axis=-1)
        pooled = jnp.take_along_axis(last, place[:, None, None], axis=1)[:, 0]
        if self.projection is None:
            return TextFeatures(last, hidden, pooled)
        return TextFeatures(last, hidden, pooled, Dense(self.projection, use_bias=False, name="projection")(pooled))

    def _check(self, ids: Array, mask: Array | None) -> None:
        check_ids(ids, mask, self.vocabulary)
        if ids.shape[1] > self.max_tokens:
            raise ValueError(f"ids must be at most {self.max_tokens} tokens, the table of positions, got {ids.shape}.")
        if self.end is not None and not is_traced(ids):
            without = np.flatnonzero(~(np.asarray(ids) == self.end).any(axis=1))
            if without.size:
                raise ValueError(f"each row of ids must hold the end of the text, {self.end}, got none in {without}.")


# SD1.5, SDXL, SD3 and FLUX have L, SD2 has H without its last block, SDXL and SD3 have bigG.
CLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"vocabulary": 1000, "hidden": 64, "num_layers": 2, "num_heads": 2, "mlp": 256, "end": 999},
    "L": {},
    "H": {"hidden": 1024, "num_layers": 23, "num_heads": 16, "mlp": 4096, "activation": "gelu"},
    "bigG": {
        "hidden": 1280,
        "num_layers": 32,
        "num_heads": 20,
        "mlp": 5120,
        "activation": "gelu",
        "projection": 1280,
    },
}


def make_clip_text(name: str, **overrides: Any) -> ClipText:
    """Builds a text encoder of CLIP by its name.

    Args:
        name: `"tiny"`, `"L"` (Stable Diffusion 1, XL, FLUX; with `projection=768` Stable Diffusion 3), `"H"` (Stable
            Diffusion 2) or `"bigG"` (Stable Diffusion XL, 3).
        **overrides: attributes of `ClipText` to change.

    Raises:
        ValueError: if there is no such encoder.

    Example:
        >>> make_clip_text("bigG").projection
        1280
    """
    check_member("name", name, tuple(CLIP_CONFIGS))
    return ClipText(**(CLIP_CONFIGS[name] | overrides))
