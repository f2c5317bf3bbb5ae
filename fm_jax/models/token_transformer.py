"""A transformer over tokens: what the data are, seen through noise."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_estimate, check_integer, check_member, check_tokens, shown
from fm_jax.models.attention import rms_norm, rope_angles
from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense, matrix_product
from fm_jax.models.dit import modulate, small_normal
from fm_jax.models.embed import add_condition, rows
from fm_jax.models.layers import TimeEmbedding, check_options, zeros
from fm_jax.models.lightning import LightningBlock
from fm_jax.models.stack import run_blocks
from fm_jax.shapes import batch_time
from fm_jax.types import Array, Cond


class TokenTransformer(nn.Module):
    """Logits of the token of the data at each place, given the tokens at t: the blocks of `LightningDiT` on a line.

    Time and condition scale and shift what the blocks see (adaLN-Zero), and positions are rotary. At initialisation
    all tokens but the mask are equally likely.

    With `causal` the same network is autoregressive: given the tokens one place late, `[start, x_0, ..., x_(n-2)]`, the
    logits at place i are those of x_i, `start` being the mask or another token that no data hold.

    Attributes:
        num_tokens: K, the mask included.
        mask: of the K, the one that data never hold: its logit is minus infinity. `None` where there is none.
        hidden: width of the tokens, divisible by `2 num_heads`.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp_hidden: width of the gated layer; two thirds of `4 hidden` by default.
        dropout: dropout rate at the end of both branches of a block.
        timed: whether the network is told the time; else it is told 0 at all times, and has the same parameters. What
            masked tokens were does not depend on the time.
        causal: whether a token sees itself and those before it alone.
        length: n, where each place has a learned vector of its own beside rotary positions, as it should where places
            differ: pixels, cells. By default it has none, and sequences may be of any length.
        embed: module from a condition to a vector, see `fm_jax.models.embed`.
        compute: dtype, attention and rematerialisation.
        scan_layers: whether the blocks are one stacked block in a loop, as in `DiT`.
        self_conditioned: whether it is also told an estimate of the data, see `fm_jax.self_conditioning`: the embedding
            that is expected by it goes through a linear layer, at first zero, and is added to that of the tokens.

    Example:
        >>> import jax
        >>> from fm_jax.models import init_params
        >>> module, x = TokenTransformer(num_tokens=5, mask=4, hidden=8, num_layers=1, num_heads=1), jnp.array([[0, 4]])
        >>> params = init_params(module, jax.random.key(0), (2,))
        >>> module.apply({"params": params}, 0.5, x)
        Array([[[  0.,   0.,   0.,   0., -inf],
                [  0.,   0.,   0.,   0., -inf]]], dtype=float32)

    References:
        Peebles & Xie 2022 (arXiv:2212.09748, section 3.2) for adaLN-Zero; Su et al. 2021, "RoFormer"; of tokens with a
        mask whose logit is minus infinity: Sahoo et al. 2024 (arXiv:2406.07524); of self-conditioning: Chen et al. 2022
        (arXiv:2208.04202).
    """

    tokens: ClassVar[bool] = True
    num_tokens: int
    mask: int | None = None
    hidden: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_hidden: int | None = None
    dropout: float = 0.0
    timed: bool = True
    causal: bool = False
    length: int | None = None
    embed: nn.Module | None = None
    compute: Compute = Compute()
    scan_layers: bool = True
    self_conditioned: bool = False

    def __post_init__(self) -> None:
        check_options(embed=self.embed, dropout=self.dropout, compute=self.compute)
        for name in ("timed", "causal", "scan_layers", "self_conditioned"):
            check_bool(name, getattr(self, name))
        check_integer("num_tokens", self.num_tokens, least=2)
        if self.mask is not None:
            check_integer("mask", self.mask, least=0, most=self.num_tokens - 1)
        for name in ("hidden", "num_layers", "num_heads"):
            check_integer(name, getattr(self, name))
        for name in ("mlp_hidden", "length"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        if self.hidden % (2 * self.num_heads):
            raise ValueError(
                f"hidden must be divisible by 2 num_heads = {2 * self.num_heads}, as channels turn in pairs, got "
                f"{self.hidden}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, t: Array, x: Array, cond: Cond = None, *, train: bool = False, estimate: Array | None = None
    ) -> Array:
        """Evaluates the denoiser.

        Args:
            t: time, scalar or [batch].
            x: tokens, integers [batch, n]. A traced token outside 0, ..., K - 1 gives NaN.
            cond: what `embed` takes; `None` for "no condition".
            train: whether dropout is on; it draws from the `"dropout"` key.
            estimate: probabilities of the data, [batch, n, K], with `self_conditioned`; `None` as zeros for none.

        Returns:
            Logits, float32 [batch, n, K].

        Raises:
            ValueError: if `x` is no tokens [batch, n], or `cond` or `estimate` do not fit the model.
        """
        check_tokens("x", x, self.num_tokens)
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"x must be tokens [batch, n], n at least 1, got shape {x.shape}.")
        if self.length not in (None, x.shape[1]):
            raise ValueError(f"x must be tokens [batch, {self.length}], as length={self.length}, got shape {x.shape}.")
        if estimate is not None:
            if not self.self_conditioned:
                raise ValueError(f"estimate must be None as self_conditioned=False, got {shown(estimate)}.")
            check_estimate(estimate, x, self.num_tokens)
        time = batch_time(t, x)
        time = time if self.timed else jnp.zeros_like(time)
        emb = TimeEmbedding(256, self.hidden, time_scale=1000.0, kernel_init=small_normal, name="time")(time)
        emb = add_condition(emb, self.embed, cond)
        table = self.param("table", small_normal, (self.num_tokens, self.hidden))
        h = rows(table, x)
        if self.self_conditioned and self.is_initializing():
            estimate = jnp.zeros((*x.shape, self.num_tokens))
        if estimate is not None:
            expected = matrix_product(estimate.astype(table.dtype), table, (((2,), (0,)), ((), ())))
            h = h + Dense(self.hidden, use_bias=False, kernel_init=zeros, name="estimate")(expected)
        if self.length is not None:
            h = h + self.param("places", small_normal, (self.length, self.hidden))[None]
        h = h.astype(self.compute.dtype)
        angles = rope_angles(np.arange(x.shape[1])[:, None], (self.hidden // self.num_heads,))

        options = {
            "num_heads": self.num_heads,
            "mlp_hidden": int(2 / 3 * 4 * self.hidden) if self.mlp_hidden is None else self.mlp_hidden,
            "dropout": self.dropout,
            "causal": self.causal,
            "compute": self.compute,
        }
        scan, remat = self.scan_layers, self.compute.remat
        args = (emb, jnp.asarray(angles, jnp.float32), None)
        h = run_blocks(LightningBlock, options, self.num_layers, h, *args, train=train, scan=scan, remat=remat)

        modulation = Dense(2 * self.hidden, kernel_init=zeros, name="modulation")(nn.silu(emb))[:, None, :]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h = modulate(rms_norm(jnp.float32, "norm")(h), shift, scale)
        logits = Dense(self.num_tokens, kernel_init=zeros, name="out")(h)
        return logits if self.mask is None else logits.at[..., self.mask].set(-jnp.inf)


TOKEN_CONFIGS: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 128, "num_layers": 4, "num_heads": 4},
    "small": {"hidden": 384, "num_layers": 6, "num_heads": 6},
    "base": {"hidden": 768, "num_layers": 12, "num_heads": 12},
}


def make_token_transformer(name: str, num_tokens: int, **overrides: Any) -> TokenTransformer:
    """Builds a token transformer by the name of its size.

    Args:
        name: `"tiny"`, `"small"`, or `"base"`, as wide and as deep as GPT-2 small.
        num_tokens: K, the mask included.
        **overrides: attributes of `TokenTransformer` to change, such as `mask`.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> make_token_transformer("base", 257, mask=256).num_layers
        12
    """
    check_member("name", name, tuple(TOKEN_CONFIGS))
    return TokenTransformer(num_tokens, **(TOKEN_CONFIGS[name] | overrides))
