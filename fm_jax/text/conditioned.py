"""A network of text, and the encoder that reads the text for it, as one module that takes token ids."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.checks import check_bool
from fm_jax.models.adapters import check_kind
from fm_jax.models.conditioning import Conditions
from fm_jax.text.tokens import Tokens
from fm_jax.types import Array


class TextConditioned(nn.Module):
    """A network that is told encoded text, behind the encoder: called with `Tokens`, as a tokenizer makes them.

    `cond` is `Tokens(ids, mask)`, or, for a network that takes several encoders by name, as `VideoDiT` does, a dict of
    them. "No text" is a value of it, the tokens of the empty text.

    Attributes:
        network: called as `network(t, x, Conditions(...), train=train)`.
        encoder: called as `encoder(ids, mask)`, which gives `TextFeatures`; or a dict of encoders by name.
        pooled: whether the network takes the pooled text too, as `cond.vector`.
        frozen: whether the encoders are left as they are: no gradient reaches their parameters.

    Raises:
        ValueError: for what are no modules; when called, for what are not the tokens of each encoder.

    Example:
        >>> import jax.numpy as jnp
        >>> from fm_jax.models import init_params, make_mmdit
        >>> from fm_jax.text import WordEncoder, WordTokenizer
        >>> tokens = WordTokenizer(("a", "red", "three"))("a red three")
        >>> encoder = WordEncoder(vocabulary=5, max_tokens=8, hidden=128)
        >>> params = init_params(TextConditioned(make_mmdit("tiny"), encoder), jax.random.key(0), (8, 8, 3), tokens)
        >>> sorted(params)
        ['encoder', 'network']
    """

    network: nn.Module
    encoder: Any
    pooled: bool = True
    frozen: bool = False

    def __post_init__(self) -> None:
        check_kind("network", self.network, nn.Module, "flax.linen.Module")
        for name, each in self._encoders().items():
            check_kind("encoder" if name is None else f"encoder[{name!r}]", each, nn.Module, "flax.linen.Module")
        check_bool("pooled", self.pooled)
        check_bool("frozen", self.frozen)
        super().__post_init__()

    def _encoders(self) -> Mapping[Any, Any]:
        return self.encoder if isinstance(self.encoder, Mapping) else {None: self.encoder}

    def __call__(self, t: Array, x: Array, cond: Any = None, *, train: bool = False) -> Array:
        """Evaluates the network.

        Args:
            t: time, scalar or [batch].
            x: what the network takes, [batch, ...].
            cond: `Tokens` [batch, n], or a dict of them for a dict of encoders.
            train: handed on to the network.

        Returns:
            What the network gives.
        """
        features = self.encode(cond)
        tokens: Any
        mask: Any
        if not isinstance(self.encoder, Mapping):
            tokens, mask, vector = features
            told = Conditions(tokens=tokens, mask=mask, vector=vector if self.pooled else None)
        else:
            each = {name: features[name] for name in self.encoder}
            tokens, mask = ({name: each[name][i] for name in each} for i in (0, 1))
            told = Conditions(tokens=tokens, mask=mask)
        return self.network(t, x, told, train=train)

    def encode(self, cond: Any) -> Any:
        """What the network sees of the text: tokens [batch, n, d], mask [batch, n] and pooled text [batch, d].

        Of a dict of encoders, a dict of them.
        """
        several = isinstance(self.encoder, Mapping)
        given = cond if several else {None: cond}
        if not isinstance(given, Mapping) or set(given) != set(self._encoders()):
            names = ", ".join(map(repr, self._encoders()))
            raise ValueError(f"cond must be a dict of Tokens, one for each of {names}, got {_got(given)}.")
        found = {}
        for name, encoder in self._encoders().items():
            tokens = given[name]
            if not isinstance(tokens, Tokens):
                which = "cond" if name is None else f"cond[{name!r}]"
                raise ValueError(f"{which} must be Tokens(ids, mask), as a tokenizer makes them, got {_got(tokens)}.")
            features = encoder(tokens.ids, tokens.mask)
            mask = None if tokens.mask is None else jnp.asarray(tokens.mask)
            found[name] = features.last, mask, features.pooled
        if self.frozen:
            found = jax.lax.stop_gradient(found)
        return found if several else found[None]


def _got(value: Any) -> str:
    return f"a dict of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else type(value).__name__
