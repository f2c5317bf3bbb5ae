"""fm_jax: flow matching and diffusion in JAX, as pure functions.

Time runs from 0 (source, noise) to 1 (data). The core, imported here, needs jax alone:

* `sources`, `schedules`, `paths`, `couplings`, `times`: what to regress, and where;
* `rates`: how often tokens jump, for chains what a velocity is for flows;
* `losses`: `flow_matching` and its relatives, for any network library;
* `parameterization`: velocity, data, noise and score, and the way between them;
* `conditions`: what the network is told beside time and state, and how to drop it;
* `guidance`, `samplers`, `likelihood`: velocity in; velocity, samples or log-density out;
* `nfe`: what a call of a function costs in network evaluations;
* `fewstep`: straight flows and flows of one step: reflow, distillation, Optimal Flow Matching;
* `oracles`: the closed forms that all of it is checked against.

`fm_jax.models`, `fm_jax.train`, `fm_jax.data` and `fm_jax.metrics` are imported by name; so are, for published systems,
`fm_jax.text`, `fm_jax.latents`, `fm_jax.weights` and `fm_jax.pretrained`.
"""

from fm_jax import (
    conditions,
    couplings,
    guidance,
    likelihood,
    losses,
    nfe,
    oracles,
    parameterization,
    paths,
    rates,
    samplers,
    schedules,
    sources,
    times,
)
from fm_jax._version import __version__

__all__ = [
    "__version__",
    "conditions",
    "couplings",
    "guidance",
    "likelihood",
    "losses",
    "nfe",
    "oracles",
    "parameterization",
    "paths",
    "rates",
    "samplers",
    "schedules",
    "sources",
    "times",
]
