"""Sampling of any experiment: one function from parameters and noise to samples, by the name of a sampler."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lab.experiment import Experiment
from experiments.lab.method import Method
from experiments.lab.options import Range, check_options
from experiments.lab.processes import everywhere, gathered, spread
from experiments.lab.samplers import SAMPLERS, make_sampler, options_of, table, takers_of
from fm_jax.checks import check_member
from fm_jax.guidance import (
    Extrapolate,
    Projected,
    Rescale,
    Rule,
    ZeroStar,
    classifier_free,
    classifier_free_batched,
    compose,
    keep_known,
)
from fm_jax.parameterization import bind, conversion_domain, velocity_domain, velocity_fn
from fm_jax.paths import start
from fm_jax.samplers import LearnedSolver, grids, sample
from fm_jax.types import ApplyFn, Array, ArrayTree, Cond, Key, Params, Sampler, Solution, VelocityFn

Generate = Callable[[Params, Key, Array, Cond], Solution]
SOLVER_HELP = tyro.conf.arg(metavar="NAME", help="Sampler, one of\n\n" + table())
Grid = Literal["uniform", "cosine", "edm", "log_snr", "training_times", "linear_quadratic"]
RuleName = Literal["extrapolate", "rescale", "zero_star", "projected"]
OF_SOLVER = ("steps", "grid", "tolerance", "diffusion", "eta", "churn")
"""The options of `Sampling` that some samplers take."""
RANGES: dict[str, Range] = {
    "tolerance": "[1e-7, inf)",  # float32 reaches no further
    "diffusion": "[0, inf)",
    "eta": "[0, 1]",
    "churn": "[0, inf)",
    "guidance_interval": "[0, 1]",
}
"""Of the options of `Sampling` that are real numbers; a scale of guidance may be any."""
OF_THE_WHOLE_WAY = "--learned-solver goes the whole way from noise, and --strength {:g} a part of it: give one."


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    solver: Annotated[str, SOLVER_HELP] = "ab2"
    steps: int = 20
    """Steps of a sampler with fixed steps."""
    grid: Grid = "uniform"
    """Their times: those of EDM with rho = 7, equal steps in log-SNR, quantiles of the training times, or Movie Gen's,
    half of which lie near the noise."""
    tolerance: float = 1e-3
    """Relative and absolute tolerance of an adaptive sampler."""
    diffusion: float | None = None
    """Noise coefficient of an SDE; by default noise is added as fast as the path sheds it."""
    eta: float = 0.0
    """Share of fresh noise in ddim, 0 to 1."""
    churn: float = 40.0
    """Fresh noise of the sampler churn."""
    guidance: float = 2.0
    """Scale of guidance; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which to guide."""
    guidance_rule: RuleName = "extrapolate"
    """How the two branches are combined: plain classifier-free guidance, with the spread of the conditional branch
    restored (rescale), CFG-Zero* (zero_star), or adaptive projected guidance (projected)."""
    sample_batch: int = 100
    """Samples drawn at once."""

    def __post_init__(self) -> None:
        check_member("--solver", self.solver, tuple(SAMPLERS))
        check_options(self, **RANGES)

    def unused(self, prefix: str = "sampling.") -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        taken = options_of(self.solver)
        for name in OF_SOLVER:
            if name not in taken:
                kind = "adaptive" if "tolerance" in taken else "fixed"
                has = f"has {kind} steps" if name in ("steps", "grid", "tolerance") else "does not take it"
                yield prefix + name, f"--solver {self.solver} {has}; {takers_of(name)} would take it"
        if self.guidance == 1:
            for name in ("guidance_interval", "guidance_rule"):
                yield prefix + name, "--guidance 1 is none; another scale would take it"


class Weak(NamedTuple):
    """A weaker network for autoguidance, which leads away from what it does."""

    apply_fn: ApplyFn
    params: Params


class Given(NamedTuple):
    """What is given of each sample: a part of it, or what to begin from."""

    x1: np.ndarray
    """Of one sample, [...]."""
    mask: np.ndarray | None = None
    """Where it is known, bool, broadcast to `x1`; `None` where it is what to begin from."""
    strength: float = 1.0
    """How much of the way from noise to data is gone; less than 1 keeps something of `x1` that is not known."""


def sampled_times(method: Method) -> tuple[float, float]:
    """Where sampling starts and ends: the velocity is finite there, and says what data and noise are."""
    domains = velocity_domain(method.prediction, method.schedule), conversion_domain(method.schedule)
    starts, ends = zip(*domains, strict=True)
    return max(starts), min(ends)


def frame_times(method: Method, num: int) -> np.ndarray:
    """Times [num] from the start to the end of what can be sampled, for the frames of an animation."""
    return np.linspace(*sampled_times(method), num)


def make_grid(sampling: Sampling, method: Method, strength: float = 1.0) -> Array:
    """The times [steps + 1] of a sampler with fixed steps, on the last `strength` of the way.

    Raises:
        ValueError: if float32 does not tell so many apart.
    """
    if strength == 1:
        return _grid(sampling, method, ends_of(method))
    with contextlib.suppress(ValueError):  # of some grids, whose times would not increase
        times = _grid(sampling, method, ends_of(method, strength))
        if (np.diff(times) > 0).all():
            return times
    raise ValueError(
        f"--strength {strength:g} leaves no room for --steps {sampling.steps} of --grid {sampling.grid}: take more "
        "strength, fewer steps, or --grid uniform."
    )


def _grid(sampling: Sampling, method: Method, ends: tuple[float, float]) -> Array:
    steps = sampling.steps
    if sampling.grid in ("edm", "log_snr"):
        return grids.edm(steps, method.schedule, *ends, rho=7.0 if sampling.grid == "edm" else np.inf)
    if sampling.grid == "training_times":
        return grids.quantiles(steps, method.time_sampler, *ends)
    if sampling.grid == "linear_quadratic":
        return ends[0] + (ends[1] - ends[0]) * grids.linear_quadratic(steps)
    return (grids.cosine if sampling.grid == "cosine" else grids.uniform)(steps, *ends)


def ends_of(method: Method, strength: float = 1.0) -> tuple[float, float]:
    """Where sampling starts and ends that goes the last `strength` of the way."""
    low, high = sampled_times(method)
    return high - strength * (high - low) if strength < 1 else low, high


def make_rule(sampling: Sampling, method: Method) -> Rule:
    """The rule of guidance."""
    rules: dict[str, Rule] = {
        "extrapolate": Extrapolate(),
        "rescale": Rescale(),
        "zero_star": ZeroStar(),
        "projected": Projected(method.schedule),
    }
    return rules[sampling.guidance_rule]


def named_sampler(sampling: Sampling, method: Method, name: str | None = None) -> Sampler:
    """The sampler of that name, by default the one to draw with, with the options of `sampling`."""
    return make_sampler(
        name or sampling.solver,
        method.schedule,
        tolerance=sampling.tolerance,
        diffusion=sampling.diffusion,
        eta=sampling.eta,
        churn=sampling.churn,
    )


def sampler_and_times(
    sampling: Sampling, method: Method, frames: np.ndarray | None = None, strength: float = 1.0
) -> tuple[Sampler, ArrayTree]:
    """What `fm_jax.samplers.sample` is called with. Of the times of an adaptive sampler the ends alone count.

    Args:
        sampling: how to draw.
        method: that the network was trained with.
        frames: if given, the trajectory is wanted at these times, from the start of the path to its end; they are the
            steps of a sampler with fixed steps, and adaptive random ones give way to tsit5.
        strength: how much of the way is gone.
    """
    sampler = named_sampler(sampling, method)
    if frames is None:
        return sampler, make_grid(sampling, method, strength)
    if sampler.nfe_per_step is None and sampler.stochastic:
        sampler = named_sampler(sampling, method, "tsit5")
    return sampler, frames


def check_interval(
    sampling: Sampling, method: Method, strength: float = 1.0, learned_solver: LearnedSolver | None = None
) -> None:
    """Refuses an interval of guidance in which the sampler never asks for the velocity.

    Args:
        sampling: how to draw.
        method: that the network was trained with.
        strength: how much of the way is gone.
        learned_solver: what goes it in place of the sampler.
    """
    low, high = sampling.guidance_interval
    if (low, high) == (0.0, 1.0):
        return
    begin, end = ends_of(method, strength)
    without = f"--guidance-interval {low:g} {high:g} would have no effect: "
    if np.float32(high) < np.float32(begin) or np.float32(low) > np.float32(end):
        of = f"with --strength {strength:g} " if strength < 1 else ""
        raise ValueError(f"{without}{of}sampling goes from {begin:g} to {end:g}. Take times among these.")
    sampler, times = (learned_solver, None) if learned_solver else sampler_and_times(sampling, method, None, strength)
    if sampler.nfe_per_step is None:  # it goes where it will
        return
    key = jax.random.key(0) if sampler.stochastic else None

    def solved(inside: float) -> np.ndarray:
        def v(t: Array, x: Array) -> Array:
            return jnp.where((low <= t) & (t <= high), inside, 0.0) * jnp.ones_like(x)

        return np.asarray(sample(v, jnp.ones((1, 1)), sampler, times=times, key=key).x)

    if np.array_equal(solved(0.0), solved(1.0), equal_nan=True):
        if learned_solver is not None:
            raise ValueError(f"{without}--learned-solver never asks for the velocity within it. Take a wider interval.")
        raise ValueError(
            f"{without}--solver {sampling.solver} with --steps {sampling.steps} never asks for the velocity within it. "
            "Take more steps, or a wider interval."
        )


def guided_velocity(
    sampling: Sampling,
    method: Method,
    apply_fn: ApplyFn,
    params: Params,
    labels: Cond,
    *,
    null_label: Cond,
    also: int | None = None,
    weak: Weak | None = None,
) -> VelocityFn:
    """The velocity function that is sampled: of the network, with its guidance.

    Args:
        sampling: the guidance.
        method: that the network was trained with.
        apply_fn: the network.
        params: its parameters.
        labels: [batch], or what a network is told of prompts, [batch, ...]; an unconditional network does not see it.
        null_label: what is to be led away from, of one example: the label which stands for none, or a class to avoid;
            the empty prompt, or a negative one; `None` for an unconditional network, which is guided by `weak` alone.
        also: a second label, to be guided towards with the same scale.
        weak: guides away from a weaker network in place of a label (autoguidance).
    """
    kind, schedule, rule = method.prediction, method.schedule, make_rule(sampling, method)
    scale, interval = sampling.guidance, sampling.guidance_interval
    cond = None if null_label is None else labels

    network = bind(apply_fn, params)
    if weak is not None:
        strong, weaker = (velocity_fn(each, kind, schedule, cond) for each in (network, bind(*weak)))
        return classifier_free(strong, weaker, scale, interval=interval, rule=rule)
    if null_label is None:
        return velocity_fn(network, kind, schedule)
    if also is not None:
        both = [labels, jnp.full_like(labels, also)]
        return compose(network, kind, schedule, both, null_label, [scale, scale], interval=interval)
    return classifier_free_batched(network, kind, schedule, cond, null_label, scale, interval=interval, rule=rule)


def make_generate(
    sampling: Sampling,
    method: Method,
    apply_fn: ApplyFn,
    *,
    null_label: Cond,
    also: int | None = None,
    weak: Weak | None = None,
    frames: np.ndarray | None = None,
    learned_solver: LearnedSolver | None = None,
    given: Given | None = None,
) -> Generate:
    """Builds `generate(params, key, x0, labels) -> Solution`, jitted.

    Args:
        sampling: sampler and guidance.
        method: that the network was trained with.
        apply_fn: the network.
        null_label: as in `guided_velocity`, like the next two.
        also: a second label.
        weak: a weaker network.
        frames: if given, the solution also has the trajectory at these times; see `sampler_and_times`.
        learned_solver: a solver trained for this velocity, in place of the sampler.
        given: a part of each sample that is known, or what it begins from.

    Raises:
        ValueError: if a part is known and the sampler is random, which would leave it; if `learned_solver` or `frames`,
            whose times are those of the whole way, are to go a part of it, or both are given; if a part is known and
            the strength is less than 1.

    Returns:
        A function of parameters, key (only random samplers use it), standard normal noise [batch, ...] and labels
        [batch], or what else the network is told, [batch, ...].
    """
    sampler: Sampler
    strength = 1.0 if given is None else given.strength
    if learned_solver is not None and strength < 1:
        raise ValueError(OF_THE_WHOLE_WAY.format(strength))
    if frames is not None and (learned_solver is not None or strength < 1):
        raise ValueError(
            "frames are times of the whole way by a sampler: give no learned solver, and no strength below 1."
        )
    if given is not None and given.mask is not None and strength < 1:
        raise ValueError(f"strength must be 1 where a part is known, which comes from noise, got {strength:g}.")
    if learned_solver is None:
        sampler, times = sampler_and_times(sampling, method, frames, strength)
    else:
        sampler, times = learned_solver, None
    t0, _ = ends_of(method, strength)
    if given is not None and given.mask is not None and sampler.stochastic:
        raise ValueError(f"--solver {sampling.solver} is random and would not keep what is known: heun would.")

    def generate(params: Params, key: Key, x0: Array, labels: Cond) -> Solution:
        v = guided_velocity(sampling, method, apply_fn, params, labels, null_label=null_label, also=also, weak=weak)
        noise, x0 = x0, start(method.schedule, t0).scale * x0
        if given is not None:
            x1, alpha = jnp.broadcast_to(given.x1, x0.shape), method.schedule.alpha(jnp.asarray(t0))
            if given.mask is None:
                x0 = x0 + alpha * x1
            else:
                x0 = jnp.where(given.mask, x0 + alpha * x1, x0)
                v = keep_known(v, method.schedule, noise, x1, jnp.asarray(given.mask))
        only_if_random = key if sampler.stochastic else None
        solution = sample(v, x0, sampler, times=times, key=only_if_random, trajectory=frames is not None)
        if given is None or given.mask is None:
            return solution
        # What the sampler has rounded away.
        return solution._replace(x=jnp.where(given.mask, given.x1, solution.x))

    return jax.jit(generate)


def generator_of(config: Any, experiment: Experiment, guidance: float | None = None, **options: Any) -> Generate:
    """`make_generate` for the network of a run, guided away from no condition; by another scale than its own if given.

    Args:
        config: with a `sampling` and a `method`.
        experiment: the network, and what stands for no condition.
        guidance: scale.
        options: of `make_generate`.
    """
    sampling = config.sampling if guidance is None else dataclasses.replace(config.sampling, guidance=guidance)
    return make_generate(sampling, config.method, experiment.apply_fn, null_label=experiment.null_cond, **options)


def check_dropout(name: str, rate: float, guidance: float, without: str) -> None:
    """Refuses guidance away from what a network that always has its condition has never seen.

    Args:
        name: of the option.
        rate: how often an example is trained without.
        guidance: scale; 1 is none.
        without: the condition, in words.
    """
    if rate == 0 and guidance != 1:
        raise ValueError(
            f"{name} must be above 0 for --guidance {guidance:g}, which leads away from what the network makes without "
            f"{without}; --guidance 1 goes without."
        )


def check_generate(generate: Generate, params: Params, key: Key, experiment: Experiment, told: Cond) -> None:
    """Traces the sampler, so that what cannot be sampled is not found after the training.

    Args:
        generate: from `make_generate`.
        params: network parameters.
        key: PRNG key.
        experiment: whose source x0 is drawn from.
        told: what the network is told, arrays or their shapes [num, ...].
    """
    x0 = jax.eval_shape(lambda: experiment.draw_x0(key, jax.tree.leaves(told)[0].shape[0]))
    jax.eval_shape(generate, params, key, x0, told)


def generate_many(
    generate: Generate, params: Params, key: Key, experiment: Experiment, labels: Cond, batch_size: int
) -> tuple[np.ndarray, float | None]:
    """Draws a sample for every label, in batches of one size so that all share one compilation.

    All devices of all processes share a batch; it is filled up where they do not divide it.

    Args:
        generate: from `make_generate`.
        params: network parameters.
        key: PRNG key.
        experiment: whose source x0 is drawn from.
        labels: [num], or what else the network is told, a pytree of [num, ...].
        batch_size: samples drawn at once.

    Returns:
        Samples [num, ...] in each process, and the mean number of network evaluations an example, `None` if a sampler
        does not say.
    """
    num, params = len(jax.tree.leaves(labels)[0]), everywhere(params)
    samples, nfe = [], []
    for i in range(-(-num // batch_size)):
        rows = np.arange(i * batch_size, (i + 1) * batch_size) % num
        part = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], labels)
        key_x0, key_sampler = jax.random.split(jax.random.fold_in(key, i))
        found = generate_together(generate, params, key_sampler, experiment.draw_x0(key_x0, batch_size), part)
        samples.append(found.x)
        nfe.append(found.nfe)
    mean_nfe = None if None in nfe else float(np.mean(np.asarray(nfe)))
    drawn = np.concatenate(samples)[:num]
    if experiment.path is not None:
        try:
            experiment.path.check_data(jnp.asarray(drawn))
        except ValueError as error:
            raise ValueError(
                f"The samples hold tokens that are none of the data's, as the network, or its guidance, gives NaN on "
                f"the way: {error} An earlier checkpoint may do better."
            ) from error
    if bad := int((~np.isfinite(drawn).reshape(num, -1).all(axis=1)).sum()):
        raise ValueError(
            f"{bad} of {num} samples are not finite: the network, or its guidance, gives NaN or infinity on the way. "
            "More steps or another solver do not help; an earlier checkpoint may."
        )
    return drawn, mean_nfe


def generate_together(generate: Generate, params: Params, key: Key, x0: Array, labels: Cond) -> Solution:
    """One call of `generate`, of which every device of every process has a share; the solution is on each host.

    The arguments are the same in all processes.
    """
    num, labels = len(x0), jax.tree.map(spread, labels)
    solution = jax.block_until_ready(generate(everywhere(params), key, spread(x0), labels))
    trajectory = None if solution.trajectory is None else gathered(solution.trajectory)[:, :num]
    nfe = None if solution.nfe is None else gathered(solution.nfe)
    return Solution(gathered(solution.x)[:num], None, nfe[:num] if nfe is not None and nfe.ndim else nfe, trajectory)


def nfe_text(nfe: float | None) -> str:
    """Network evaluations for a line of text."""
    return "unknown" if nfe is None else f"{nfe:.0f}"
