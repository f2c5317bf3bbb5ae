"""From a condition to a vector: Linen modules called `embed(cond, features, batch_size) -> float32 [batch, features]`.

A network adds what its `embed` returns to its time embedding. `cond=None` means "no condition" for the whole batch;
what says so for one example, the `null_cond` of `fm_jax.conditions` and of guidance, is part of each module's contract:

| `embed` | `cond` | `null_cond` |
|---|---|---|
| `LabelEmbedding(num_classes)` | labels [batch] | `num_classes` |
| `VectorEmbedding(dim)` | vectors [batch, dim] | `0.0` |
| `TokenEmbedding(num_tokens)` | `{"tokens": [batch, n], "mask": [batch, n]}` | `{"tokens": 0, "mask": False}` |

Any Linen module that is called like these is one. Of `Conditions` an `embed` gets the fields that it `reads`: the value
of one, or a dict of several; the label where it does not say.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, check_integer, check_setting, is_traced
from fm_jax.models.conditioning import Conditions
from fm_jax.models.dense import Dense
from fm_jax.models.layers import zeros
from fm_jax.types import Array, Cond


class LabelEmbedding(nn.Module):
    """A learned vector for each class, and one more, the last row, for "no class".

    Notebooks: (9.3).

    Attributes:
        num_classes: number of classes; the label `num_classes` is "no class".
        stddev: standard deviation of the initial table. The paper's diffusion transformer has 0.02.

    Raises:
        ValueError: if `num_classes` is less than 1.

    Example:
        >>> import jax
        >>> variables = LabelEmbedding(10).init(jax.random.key(0), jnp.array([3, 10]), 4, 2)
        >>> variables["params"]["table"].shape
        (11, 4)

    References:
        Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1; Peebles & Xie 2022, "Scalable Diffusion
        Models with Transformers", section 3.2.
    """

    num_classes: int
    stddev: float = 1.0

    def __post_init__(self) -> None:
        check_integer("num_classes", self.num_classes)
        check_setting(self, "stddev", "[0, inf)")
        super().__post_init__()

    @nn.compact
    def __call__(self, cond: Array | None, features: int, batch_size: int) -> Array:
        """Looks labels up.

        Args:
            cond: integers [batch], or `None` for "no class". A traced label outside 0, ..., `num_classes` gives NaN.
            features: width of the vectors.
            batch_size: number of examples.

        Returns:
            float32 [batch, features].

        Raises:
            ValueError: if `cond` is not [batch], does not hold integers, or one that is known to be no class.
        """
        table = self.param("table", nn.initializers.normal(self.stddev), (self.num_classes + 1, features))
        return look_up(table, jnp.full((batch_size,), self.num_classes) if cond is None else cond, batch_size)


class VectorEmbedding(nn.Module):
    """Two layers on a vector of real numbers, `W2 silu(W1 cond + b1) + b2`; the zero vector is "no condition".

    "No condition" has to be a value of `cond`, so that single examples can be without one, and zero is what embeddings
    of text and images never are. It gets a learned vector of its own, in place of what the layers say: so they may
    think what they like of conditions near zero. If zero is a condition of yours, append a coordinate that is always 1.
    Scale coordinates to be of size one, as any network's input.

    Attributes:
        dim: number of coordinates.

    Raises:
        ValueError: if `dim` is less than 1.

    Example:
        >>> import jax
        >>> embed, cond = VectorEmbedding(3), jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
        >>> variables = embed.init(jax.random.key(0), cond, 4, 2)
        >>> bool((embed.apply(variables, cond, 4, 2)[1] == embed.apply(variables, None, 4, 1)[0]).all())
        True
    """

    reads: ClassVar[tuple[str, ...]] = ("vector",)
    dim: int

    def __post_init__(self) -> None:
        check_integer("dim", self.dim)
        super().__post_init__()

    @nn.compact
    def __call__(self, cond: Array | None, features: int, batch_size: int) -> Array:
        """Embeds vectors.

        Args:
            cond: numbers [batch, dim], or `None` for "no condition".
            features: width of the result.
            batch_size: number of examples.

        Returns:
            float32 [batch, features].

        Raises:
            ValueError: if `cond` is not [batch, dim] or does not hold real numbers.
        """
        null = self.param("null", zeros, (features,))
        if cond is not None:
            check_array("cond", cond)
        vectors = jnp.zeros((batch_size, self.dim)) if cond is None else jnp.asarray(cond)
        if vectors.shape != (batch_size, self.dim):
            raise ValueError(f"cond must be [batch, dim] = ({batch_size}, {self.dim}), got shape {vectors.shape}.")
        if not jnp.issubdtype(vectors.dtype, jnp.floating):
            raise ValueError(f"cond must hold real numbers, got dtype {vectors.dtype.name}.")
        vectors = vectors.astype(jnp.float32)
        h = Dense(features, name="out")(nn.silu(Dense(features, name="in")(vectors)))
        return jnp.where((vectors == 0).all(axis=1, keepdims=True), null[None, :], h)


class TokenEmbedding(nn.Module):
    """The mean of learned vectors over a set of tokens, such as tags or the classes in a picture.

    The set with nothing in it is "no condition", and has a learned vector too, the last row. Order and number of the
    tokens do not count; sets of different sizes are padded, and the mask says what is padding.

    Attributes:
        num_tokens: number of different tokens.
        stddev: standard deviation of the initial table.

    Raises:
        ValueError: if `num_tokens` is less than 1.

    Example:
        >>> import jax
        >>> cond = {"tokens": jnp.array([[4, 2], [4, 9]]), "mask": jnp.array([[True, True], [True, False]])}
        >>> embed = TokenEmbedding(5)
        >>> variables = embed.init(jax.random.key(0), cond, 8, 2)
        >>> table, out = variables["params"]["table"], embed.apply(variables, cond, 8, 2)
        >>> bool(jnp.allclose(out, jnp.stack([(table[4] + table[2]) / 2, table[4]])))
        True

    References:
        Zaheer et al. 2017 (arXiv:1703.06114, theorem 2), with the mean for the sum and the identity for rho.
    """

    reads: ClassVar[tuple[str, ...]] = ("tokens", "mask")
    num_tokens: int
    stddev: float = 1.0

    def __post_init__(self) -> None:
        check_integer("num_tokens", self.num_tokens)
        check_setting(self, "stddev", "[0, inf)")
        super().__post_init__()

    @nn.compact
    def __call__(self, cond: Any, features: int, batch_size: int) -> Array:
        """Averages over the tokens of each set.

        Args:
            cond: `{"tokens": integers [batch, n], "mask": bool [batch, n]}`, true where there is a token, or `None` for
                "no condition". A token outside 0, ..., `num_tokens - 1` that is traced gives NaN, unless it is masked.
            features: width of the result.
            batch_size: number of examples.

        Returns:
            float32 [batch, features].

        Raises:
            ValueError: if `cond` is no such dict.
        """
        table = self.param("table", nn.initializers.normal(self.stddev), (self.num_tokens + 1, features))
        if cond is None:
            return jnp.broadcast_to(table[-1:], (batch_size, features))
        if not isinstance(cond, Mapping) or cond.keys() != {"tokens", "mask"}:
            got = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise ValueError(f"cond must be a dict of 'tokens' and 'mask', got {got}.")
        check_array("cond['tokens']", cond["tokens"])
        check_array("cond['mask']", cond["mask"])
        tokens, mask = jnp.asarray(cond["tokens"]), jnp.asarray(cond["mask"])
        check_integers("cond['tokens']", "tokens", tokens)
        if mask.dtype != jnp.bool_:
            raise ValueError(f"cond['mask'] must be bool, got dtype {mask.dtype.name}.")
        if tokens.ndim != 2 or tokens.shape[0] != batch_size or mask.shape != tokens.shape:
            raise ValueError(
                f"tokens and mask must both be [batch, n] = ({batch_size}, n), got shapes {tokens.shape}, {mask.shape}."
            )
        if not is_traced(mask) and not is_traced(tokens):
            check_below("cond['tokens']", np.where(np.asarray(mask), np.asarray(tokens), 0), self.num_tokens)
        # The last row is no token: as one it would make "no condition" a member of sets.
        vectors = rows(table[:-1], tokens)
        total = jnp.where(mask[:, :, None], vectors, 0.0).sum(axis=1)
        count = mask.sum(axis=1, keepdims=True)
        return jnp.where(count == 0, table[-1:], total / jnp.maximum(count, 1))


def check_integers(name: str, what: str, values: Array) -> None:
    """Raises `ValueError` unless `values` have an integer dtype."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integer {what}, got dtype {values.dtype.name}.")


def check_below(name: str, values: Any, num: int) -> None:
    """Raises `ValueError` for values that are known to be outside of 0, ..., num - 1."""
    if is_traced(values) or not values.size:
        return
    known = np.asarray(values)  # as jax.numpy would compute it, it would be traced
    least, most = int(known.min()), int(known.max())
    if least < 0 or most >= num:
        raise ValueError(f"{name} must be from 0 to {num - 1}, got {least} to {most}.")


def look_up(table: Array, cond: Any, batch_size: int) -> Array:
    """The rows [batch, features] of labels [batch]; `ValueError` for what are none, or are known to have no row."""
    check_array("cond", cond)
    labels = jnp.asarray(cond)
    check_integers("cond", "labels", labels)
    if labels.shape != (batch_size,):
        raise ValueError(f"cond must be [batch] = ({batch_size},), got shape {labels.shape}.")
    check_below("cond", labels, len(table))
    return rows(table, labels)


def rows(table: Array, indices: Array) -> Array:
    """The rows of a table [n, features]: indices [...] -> [..., features].

    An index outside the table gives NaN, never another row: a traced value cannot raise.
    """
    return jnp.asarray(table).at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def add_condition(emb: Array, embed: nn.Module | None, cond: Cond, taken: tuple[str, ...] = ()) -> Array:
    """The time embedding plus what `embed` says of the condition: all that a network's blocks get to know.

    Notebooks: (9.3).

    Args:
        emb: time embedding, float32 [batch, features].
        embed: module as those of this file; `None` where the network is unconditional.
        cond: what `embed` takes, `Conditions` that hold it, or `None`.
        taken: fields of `Conditions` that the network itself reads.

    Returns:
        float32 [batch, features].

    Raises:
        ValueError: if there is a `cond` and no `embed`, a field of `Conditions` that nobody reads, or `embed` returns
            another shape.
    """
    if isinstance(cond, Conditions):
        cond = _read(embed, cond, taken)
    if embed is None:
        if cond is not None:
            raise ValueError("cond must be None: the model is unconditional (embed=None).")
        return emb
    batch_size, features = emb.shape
    vector: Any = embed(cond, features, batch_size)
    check_array("what embed returns", vector)
    if vector.shape != emb.shape:
        raise ValueError(f"embed must return [batch, features] = {emb.shape}, got shape {vector.shape}.")
    return emb + vector.astype(jnp.float32)


def _read(embed: nn.Module | None, cond: Conditions, taken: tuple[str, ...]) -> Cond:
    """What `embed` reads of the conditions, `None` where that is not there."""
    reads: tuple[str, ...] = () if embed is None else getattr(embed, "reads", ("label",))
    there = {name: value for name, value in zip(cond._fields, cond, strict=True) if value is not None}
    if unread := [name for name in there if name not in (*reads, *taken)]:
        who = "the model is unconditional (embed=None)" if embed is None else f"embed reads {' and '.join(reads)}"
        raise ValueError(f"cond must have no {', no '.join(unread)}: {who}.")
    found = {name: there[name] for name in reads if name in there}
    return found.get(reads[0]) if len(reads) == 1 else found or None
