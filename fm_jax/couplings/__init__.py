"""Couplings: which source sample goes with which data sample.

A coupling is a function `(key, x0, x1, cond) -> Pairing` that permutes the source samples of a batch; data and
conditions stay in place, so no example is lost or repeated. Where the transport weighs examples, `Pairing.weight` has
the weights, with which the losses multiply.
"""

from fm_jax.couplings.conditional import ConditionalOT
from fm_jax.couplings.costs import Cost, euclidean, squared_euclidean
from fm_jax.couplings.entropic import EntropicOT, schrodinger_bridge_ot
from fm_jax.couplings.exact import ExactOT, anti_ot, minibatch_ot
from fm_jax.couplings.gathered import Gathered
from fm_jax.couplings.gromov import GromovWassersteinOT
from fm_jax.couplings.pairing import independent, paired
from fm_jax.couplings.partial import PartialOT
from fm_jax.couplings.permutations import sample_permutation
from fm_jax.couplings.semidiscrete import CellMasses, SemidiscreteOT, cell_masses, fit_semidiscrete
from fm_jax.couplings.unbalanced import UnbalancedOT

__all__ = [
    "CellMasses",
    "ConditionalOT",
    "Cost",
    "EntropicOT",
    "ExactOT",
    "Gathered",
    "GromovWassersteinOT",
    "PartialOT",
    "SemidiscreteOT",
    "UnbalancedOT",
    "anti_ot",
    "cell_masses",
    "euclidean",
    "fit_semidiscrete",
    "independent",
    "minibatch_ot",
    "paired",
    "sample_permutation",
    "schrodinger_bridge_ot",
    "squared_euclidean",
]
