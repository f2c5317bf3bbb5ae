"""How a network computes what it computes: dtype, rematerialisation, attention. Results differ by rounding alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_member, is_traced

Dtype = Any
Attention = Literal["xla", "cudnn"]


@dataclass(frozen=True)
class Compute:
    """What a network's convolutions, products and attention run on; parameters and outputs are float32 whatever it is.

    `attention="cudnn"` is fast on NVIDIA GPUs and rules out forward-mode derivatives: `jax.jvp`, and with it losses and
    samplers that differentiate the network along a path, cannot pass through a network that has it.

    Attributes:
        dtype: of convolutions and matrix products, float32 or bfloat16; normalisation statistics, time and condition
            embeddings and the last layer stay float32.
        remat: recompute the blocks in the backward pass instead of storing their insides: less memory, about a third
            more time.
        attention: `implementation` of `jax.nn.dot_product_attention`, `"xla"` or `"cudnn"`; `None` lets JAX choose. A
            network without attention has no use for it.

    Raises:
        ValueError: for another dtype or attention, or if `remat` is no bool.

    Example:
        >>> Compute("bfloat16", remat=True)
        Compute(dtype=dtype(bfloat16), remat=True, attention=None)
    """

    dtype: Dtype = jnp.float32
    remat: bool = False
    attention: Attention | None = None

    def __post_init__(self) -> None:
        try:
            dtype = jnp.dtype(self.dtype)
        except TypeError:
            dtype = None
        check_member("dtype", str(self.dtype) if dtype is None else dtype.name, ("float32", "bfloat16"))
        check_bool("remat", self.remat)
        if self.attention is not None:
            check_member("attention", self.attention, get_args(Attention))
        # One dtype has many spellings; as np.dtype, equal values are equal and hash alike.
        object.__setattr__(self, "dtype", dtype)


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for what runs once, such as random initialisers, which XLA's CPU compiler takes long to optimise.

    11 s become 3 s for a small U-Net. Within another program, which has options of its own, it is `jax.jit`.
    """

    def call(*args: Any) -> Any:
        outermost = not any(map(is_traced, jax.tree.leaves((args, jnp.zeros(())))))
        quick = outermost and jax.default_backend() == "cpu"
        return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0} if quick else None)(*args)

    return call
