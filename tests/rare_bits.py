"""Random numbers for what happens once in a million draws, so that few draws tell how often it does.

A rare token can only be drawn when its own number is at one end of the range. A typed key of `rare_key` draws the
number of the last token, and of an event that is rare itself, from these ends alone, 2^-17 of the range each: what it
draws counts 2^-16. All other numbers are as usual, so that with it 2^16 draws are worth 4e9.
"""

import jax
import jax.numpy as jnp
from jax.extend import random as extend

ENDS, RARE = 2**17, 1e-6
WEIGHT = 2 / ENDS


def _usual(key):
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def _at_an_end(bits, width):
    """Each number in one of the two ends: its last bit says which end it goes to."""
    near = (bits // jnp.asarray(ENDS, bits.dtype)).astype(bits.dtype)
    return jnp.where(bits & 1 == 1, near, ~near)


def _implementation(name, events):
    def random_bits(key, width, shape):
        bits = jax.random.bits(
            _usual(key), shape, {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[width]
        )
        if len(shape) == 3:  # [batch, event, K]
            return bits.at[..., -1].set(_at_an_end(bits[..., -1], width)) if not events else bits
        return _at_an_end(bits, width) if events and len(shape) == 2 else bits

    return extend.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jax.random.key_data(jax.random.key(seed.astype(jnp.uint32))),
        split=lambda key, shape: jax.random.key_data(jax.random.split(_usual(key), shape)),
        random_bits=random_bits,
        fold_in=lambda key, data: jax.random.key_data(jax.random.fold_in(_usual(key), data)),
        name=name,
        tag=name[:3],
    )


_TOKENS, _EVENTS = _implementation("rare tokens", False), _implementation("rare events", True)


def rare_key(seed, *, events=False):
    """A key whose rare tokens, or rare events, are of the ends of the range."""
    return jax.random.key(seed, impl=_EVENTS if events else _TOKENS)
