"""Sampling of experiments on tokens: one function from parameters and masks to samples, by the name of a sampler."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lab.experiment import Experiment
from experiments.lab.options import Range, check_options
from experiments.lab.sampling import Generate
from fm_jax.guidance import classifier_free_logits
from fm_jax.logits import top_p, with_temperature
from fm_jax.nfe import Counted, cost, returns_of
from fm_jax.parameterization import bind
from fm_jax.paths import MixturePath
from fm_jax.rates import forward_rates
from fm_jax.samplers import Cap, Confidence, FirstHitting, Loop, MixtureSteps, Rescale, TauLeaping, grids, sample
from fm_jax.samplers.first_hitting import Position
from fm_jax.samplers.remasking import Remask
from fm_jax.schedules import MaskCosine
from fm_jax.types import ApplyFn, Array, Cond, DenoiserFn, Key, Params, Sampler, Solution

Solver = Literal["first_hitting", "mixture_steps", "tau_leaping"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
RemaskName = Literal["none", "cap", "rescale", "loop", "confidence"]
TokenGrid = Literal["uniform", "mask_cosine"]
REMASK: dict[str, Remask | None] = {
    "none": None,
    "cap": Cap(),
    "rescale": Rescale(),
    "loop": Loop(),
    "confidence": Confidence(),
}
TOKEN_RANGES: dict[str, Range] = {"temperature": "(0, inf)", "top_p": "(0, 1]"}
"""Of the options that are real numbers; a scale of guidance may be any."""
_TAKEN: dict[str, tuple[str, ...]] = {
    "first_hitting": ("position", "per_step"),
    "mixture_steps": ("steps", "grid", "remask"),
    "tau_leaping": ("steps", "grid"),
}
"""By sampler, the options that it takes and others do not."""
TOKEN_SOLVER_HELP = """first_hitting: one mask after the other, exact, a NFE each
mixture_steps: a NFE a step, in which tokens do not see each other
tau_leaping: order 1, a NFE a step"""


@dataclass(frozen=True)
class TokenSampling:
    """How samples of tokens are drawn."""

    solver: Annotated[Solver, tyro.conf.arg(help=f"Sampler, one of\n\n{TOKEN_SOLVER_HELP}")] = "first_hitting"
    position: Position = "random"
    """Which mask is replaced next: any, which is right; the surest, by its likeliest token or by how far that is ahead,
    which looks better and is less varied; or from left to right."""
    per_step: int = 1
    """Tokens drawn from one evaluation of the network, which do not see each other."""
    steps: int = 64
    """Steps of a sampler with steps."""
    grid: TokenGrid = "uniform"
    """Their times; "mask_cosine" has its short steps where most is masked."""
    remask: RemaskName = "none"
    """Rule by which tokens are masked again and drawn anew, those of ReMDM."""
    temperature: float = 1.0
    """Of the probabilities: less than 1 favours likely tokens."""
    top_p: float = 1.0
    """Draw from the fewest tokens that have this probability together."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    sample_batch: int = 100
    """Samples drawn at once."""

    def __post_init__(self) -> None:
        check_options(self, **TOKEN_RANGES)

    def unused(self, prefix: str = "sampling.") -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        for name in ("position", "per_step", "steps", "grid", "remask"):
            if name not in _TAKEN[self.solver]:
                takers = [solver for solver, taken in _TAKEN.items() if name in taken]
                yield prefix + name, f"--solver {self.solver} does not take it; {', '.join(takers)} would take it"


class GivenTokens(NamedTuple):
    """The part of each sample that is known."""

    tokens: np.ndarray
    """Of one sample, [...]."""
    known: np.ndarray
    """Where they are, bool, of the same shape."""


def token_sampler(sampling: TokenSampling, path: MixturePath) -> Sampler:
    """The sampler of that name."""
    samplers: dict[str, Sampler] = {
        "first_hitting": FirstHitting(path, sampling.position, sampling.per_step),
        "mixture_steps": MixtureSteps(path, REMASK[sampling.remask]),
        "tau_leaping": TauLeaping(path.schedule),
    }
    return samplers[sampling.solver]


def token_times(sampling: TokenSampling) -> Array | None:
    """The times [steps + 1] of a sampler with steps; `None` for one without."""
    if sampling.solver == "first_hitting":
        return None
    times = grids.uniform(sampling.steps)
    return MaskCosine().alpha(times) if sampling.grid == "mask_cosine" else times


def guided_denoiser(
    sampling: TokenSampling, apply_fn: ApplyFn, params: Params, cond: Cond, null_cond: Cond
) -> DenoiserFn:
    """The denoiser that is sampled: of the network, with its guidance, its temperature and its cut.

    Args:
        sampling: all three.
        apply_fn: the network.
        params: its parameters.
        cond: labels [batch], or what else the network is told, [batch, ...]; one without conditions never sees it.
        null_cond: what stands for none, of one example; `None` for a network without conditions.
    """
    network = bind(apply_fn, params)

    def told(what: Cond) -> DenoiserFn:
        return Counted(lambda t, x: network(t, x, what), cost(network), returns=returns_of(network))

    if null_cond is None:
        denoiser = told(None)
    else:
        none = jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf, jnp.shape(like)), null_cond, cond)
        denoiser = classifier_free_logits(told(cond), told(none), sampling.guidance)
    if sampling.temperature != 1:
        denoiser = with_temperature(denoiser, sampling.temperature)
    return top_p(denoiser, sampling.top_p) if sampling.top_p < 1 else denoiser


def generator_of_tokens(config: Any, experiment: Experiment, guidance: float | None = None) -> Generate:
    """`make_token_generate` for the network of a run, guided by another scale than its own if given.

    Args:
        config: with a `sampling`, a `TokenSampling`.
        experiment: the network, on tokens.
        guidance: scale.
    """
    assert experiment.path is not None
    sampling = config.sampling if guidance is None else replace(config.sampling, guidance=guidance)
    return make_token_generate(sampling, experiment.path, experiment.apply_fn, null_cond=experiment.null_cond)


def make_token_generate(
    sampling: TokenSampling,
    path: MixturePath,
    apply_fn: ApplyFn,
    *,
    null_cond: Cond = None,
    given: GivenTokens | None = None,
) -> Generate:
    """Builds `generate(params, key, x0, cond) -> Solution`, jitted, as `experiments.lab.sampling.make_generate` does.

    Args:
        sampling: sampler and guidance.
        path: that the network was trained on.
        apply_fn: the network.
        null_cond: as in `guided_denoiser`.
        given: a part of each sample that is known, and kept to the bit.

    Returns:
        A function of parameters, key, masks [batch, ...] or what else the source of the path draws, and conditions.
    """
    sampler, times = token_sampler(sampling, path), token_times(sampling)
    known = None if given is None else jnp.asarray(given.known)

    def generate(params: Params, key: Key, x0: Array, cond: Cond) -> Solution:
        denoiser = guided_denoiser(sampling, apply_fn, params, cond, null_cond)
        v = forward_rates(denoiser, path) if sampling.solver == "tau_leaping" else denoiser
        if given is not None:
            x0 = jnp.where(given.known, given.tokens, x0).astype(x0.dtype)
        return sample(v, x0, sampler, times=times, key=key, keep=known)

    return jax.jit(generate)
