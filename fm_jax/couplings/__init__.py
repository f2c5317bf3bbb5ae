"""Couplings: which source sample goes with which data sample.

A coupling is a function `(key, x0, x1, cond) -> Pairing` that permutes the source samples of a batch; data and
conditions stay in place, so no example is lost or repeated. Where the transport weighs examples, `Pairing.weight` has
the weights, with which the losses multiply.
"""

from fm_jax.couplings.costs import Cost, euclidean, squared_euclidean
from fm_jax.couplings.exact import ExactOT, anti_ot, minibatch_ot
from fm_jax.couplings.pairing import independent, paired

__all__ = ["Cost", "ExactOT", "anti_ot", "euclidean", "independent", "minibatch_ot", "paired", "squared_euclidean"]
