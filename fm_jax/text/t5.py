"""The encoders of the T5 family: T5 v1.0 and v1.1, UL2, ByT5, mT5, UMT5."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_integer, check_member, check_setting
from fm_jax.models.attention import rms_norm
from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense
from fm_jax.models.layers import check_options
from fm_jax.models.stack import run_blocks
from fm_jax.text.encoder import SelfAttention, TextFeatures, TokenEmbed, check_ids, check_kept
from fm_jax.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gated-gelu": lambda h: nn.gelu(h, approximate=True),
    "gated-silu": nn.silu,
}


def distance_buckets(distances: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of a distance `j - i` from the token that looks to the token that is seen.

    Half of the buckets are for what lies behind (`j > i`). In each half the first half counts single tokens, the rest
    divides the distances up to `max_distance` logarithmically; the last one takes all that is further.

    Args:
        distances: integers of any shape.
        buckets: number of buckets, divisible by 4.
        max_distance: the distance from which on one bucket takes all.

    Returns:
        Integers from 0 to `buckets - 1`, in the shape of `distances`.

    Raises:
        ValueError: if `buckets` is not divisible by 4, or `max_distance` not above `buckets / 4`.

    References:
        Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.1.

    Example:
        >>> distance_buckets(np.array([-200, -9, -1, 0, 1, 9, 200]), 32, 128)
        array([15,  8,  1,  0, 17, 24, 31])
    """
    check_integer("buckets", buckets, least=4)
    check_integer("max_distance", max_distance)
    if buckets % 4 or max_distance <= buckets // 4:
        raise ValueError(
            f"buckets must be divisible by 4 and buckets / 4 below max_distance, got {buckets} and {max_distance}."
        )
    half, exact = buckets // 2, buckets // 4
    far = np.maximum(np.abs(distances), 1)
    # float32, as the published encoders were trained with.
    steps = np.log(far.astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    logarithmic = np.minimum(exact + (steps * np.float32(half - exact)).astype(np.int64), half - 1)
    return np.where(np.abs(distances) < exact, np.abs(distances), logarithmic) + half * (distances > 0)


class DistanceBias(nn.Module):
    """A learned number for each head and bucket of distances, added to the scores of attention.

    Attributes: see `T5Encoder`.
    """

    num_heads: int
    buckets: int
    max_distance: int

    @nn.compact
    def __call__(self, n: int) -> Array:
        """The bias of `n` tokens among themselves, float32 [1, heads, n, n]."""
        init = nn.initializers.normal(0.1)
        table = jnp.asarray(self.param("table", init, (self.buckets, self.num_heads)), jnp.float32)
        by_distance = table[distance_buckets(np.arange(1 - n, n), self.buckets, self.max_distance)]
        i = jnp.arange(n)
        return by_distance[i[None, :] - i[:, None] + n - 1].transpose(2, 0, 1)[None]


class T5Block(nn.Module):
    """A transformer block with RMS normalisation in front of both branches, without biases.

    Attributes: see `T5Encoder`.
    """

    num_heads: int
    head_dim: int
    mlp: int
    activation: str
    shared_bias: bool
    buckets: int
    max_distance: int
    epsilon: float
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, state: Any, bias: Array | None, mask: Array | None, train: bool) -> Any:
        """Maps tokens [batch, n, d], and puts those that came in behind the inputs of earlier blocks that are kept."""
        del train
        h, kept = state
        kept = (*kept, h)[1:]
        dtype = self.compute.dtype
        if not self.shared_bias:
            bias = DistanceBias(self.num_heads, self.buckets, self.max_distance, name="distance")(h.shape[1])
        attention = SelfAttention(
            self.num_heads, self.head_dim, False, scale=1.0, compute=self.compute, name="attention"
        )
        h = h + attention(rms_norm(dtype, "norm_attention", epsilon=self.epsilon)(h), mask, bias)

        m = rms_norm(dtype, "norm_mlp", epsilon=self.epsilon)(h)
        hidden = ACTIVATIONS[self.activation](Dense(self.mlp, use_bias=False, dtype=dtype, name="mlp_in")(m))
        if self.activation.startswith("gated"):
            hidden = hidden * Dense(self.mlp, use_bias=False, dtype=dtype, name="mlp_value")(m)
        # The last product is float32: what it gives is large.
        return h + Dense(h.shape[-1], use_bias=False, dtype=jnp.float32, name="mlp_out")(hidden), kept


class T5Encoder(nn.Module):
    """The encoder of the T5 family: no positions but a bias by distance, no `1 / sqrt(d)`, no biases in its layers.

    With `compute.dtype` bfloat16 the sum of the branches and the last product of each block stay float32. cuDNN's
    attention takes no bias: with it `attend` falls back to XLA's.

    Attributes:
        vocabulary: number of tokens.
        hidden: width.
        num_layers: number of blocks.
        num_heads: attention heads.
        head_dim: width of a head; heads times width need not be `hidden`.
        mlp: width of the blocks' hidden layer.
        activation: `"gated-gelu"`, `gelu(W0 x) W1 x` with the tanh approximation (v1.1, ByT5, mT5, UMT5),
            `"gated-silu"` (UL2) or `"relu"` without a gate (v1.0).
        shared_bias: one table of distances for all blocks; `False` for one in each, as UMT5 has it.
        buckets: rows of a table of distances, see `distance_buckets`.
        max_distance: distance from which on one bucket takes all.
        keep_hidden: how many of the last states to give, see `TextFeatures`.
        epsilon: of the RMS normalisation.
        compute: dtype, attention and rematerialisation.
        scan_layers: trace and compile one block and loop over it; see `DiT`.

    References:
        Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        section 2.1. Shazeer 2020, "GLU Variants Improve Transformer". Chung et al. 2023, "UniMax" (UMT5).
    """

    vocabulary: int = 32128
    hidden: int = 512
    num_layers: int = 8
    num_heads: int = 6
    head_dim: int = 64
    mlp: int = 1024
    activation: str = "gated-gelu"
    shared_bias: bool = True
    buckets: int = 32
    max_distance: int = 128
    keep_hidden: int = 0
    epsilon: float = 1e-6
    compute: Compute = Compute()
    scan_layers: bool = True

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("scan_layers", "shared_bias"):
            check_bool(name, getattr(self, name))
        for name in ("vocabulary", "hidden", "num_layers", "num_heads", "head_dim", "mlp"):
            check_integer(name, getattr(self, name))
        check_member("activation", self.activation, tuple(ACTIVATIONS))
        check_kept(self.keep_hidden, self.num_layers)
        check_setting(self, "epsilon", "(0, inf)")
        distance_buckets(np.zeros(1, int), self.buckets, self.max_distance)
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> TextFeatures:
        """Encodes prompts.

        Args:
            ids: token ids, integers [batch, n].
            mask: which tokens are seen, bool [batch, n]; `None` for all: Stable Diffusion 3 and FLUX see their padding,
                PixArt and Wan do not.

        Returns:
            `last` and `hidden` of `TextFeatures`.

        Raises:
            ValueError: if `ids` are no ids of the vocabulary (where they are not traced), or `mask` does not fit.
        """
        check_ids(ids, mask, self.vocabulary)
        init = nn.initializers.normal(1.0)
        h = TokenEmbed(self.vocabulary, self.hidden, init, name="tokens")(ids).astype(jnp.float32)
        bias = None
        if self.shared_bias:
            bias = DistanceBias(self.num_heads, self.buckets, self.max_distance, name="distance")(ids.shape[1])
        options = {
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp,
            "activation": self.activation,
            "shared_bias": self.shared_bias,
            "buckets": self.buckets,
            "max_distance": self.max_distance,
            "epsilon": self.epsilon,
            "compute": self.compute,
        }
        state = (h, (h,) * max(self.keep_hidden - 1, 0))
        scan, remat = self.scan_layers, self.compute.remat
        h, kept = run_blocks(T5Block, options, self.num_layers, state, bias, mask, train=False, scan=scan, remat=remat)
        hidden = (*kept, h)[-self.keep_hidden :] if self.keep_hidden else ()
        return TextFeatures(rms_norm(jnp.float32, "norm", epsilon=self.epsilon)(h), hidden)


# Movie Gen has UL2 and ByT5, Stable Diffusion 3, FLUX and PixArt v1.1-xxl, Wan umt5-xxl.
T5_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"vocabulary": 1000, "hidden": 64, "num_layers": 2, "num_heads": 2, "head_dim": 32, "mlp": 128},
    "v1.1-small": {},
    "v1.1-base": {"hidden": 768, "num_layers": 12, "num_heads": 12, "mlp": 2048},
    "v1.1-large": {"hidden": 1024, "num_layers": 24, "num_heads": 16, "mlp": 2816},
    "v1.1-xl": {"hidden": 2048, "num_layers": 24, "num_heads": 32, "mlp": 5120},
    "v1.1-xxl": {"hidden": 4096, "num_layers": 24, "num_heads": 64, "mlp": 10240},
    "ul2": {
        "hidden": 4096,
        "num_layers": 32,
        "num_heads": 16,
        "head_dim": 256,
        "mlp": 16384,
        "activation": "gated-silu",
    },
    "byt5-small": {"vocabulary": 384, "hidden": 1472, "num_layers": 12, "num_heads": 6, "mlp": 3584},
    "byt5-large": {"vocabulary": 384, "hidden": 1536, "num_layers": 36, "num_heads": 16, "mlp": 3840},
    "umt5-xxl": {
        "vocabulary": 256384,
        "hidden": 4096,
        "num_layers": 24,
        "num_heads": 64,
        "mlp": 10240,
        "shared_bias": False,
    },
}


def make_t5(name: str, **overrides: Any) -> T5Encoder:
    """Builds an encoder of the T5 family by its name.

    Args:
        name: `"tiny"`, `"v1.1-small"`, `"v1.1-base"`, `"v1.1-large"`, `"v1.1-xl"`, `"v1.1-xxl"`, `"ul2"`,
            `"byt5-small"`, `"byt5-large"` or `"umt5-xxl"`.
        **overrides: attributes of `T5Encoder` to change.

    Raises:
        ValueError: if there is no such encoder.

    Example:
        >>> make_t5("v1.1-xxl").hidden
        4096
    """
    check_member("name", name, tuple(T5_CONFIGS))
    return T5Encoder(**(T5_CONFIGS[name] | overrides))
