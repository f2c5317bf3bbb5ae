"""The method of an experiment: path, coupling, prediction, times and weight, each one option."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from experiments.lab.experiment import Experiment
from experiments.lab.options import STEPS, check_options
from experiments.lab.processes import Share, own_rows
from experiments.lab.training import Training
from fm_jax import couplings, losses, schedules, times
from fm_jax.data.coupled import CoupledBatches
from fm_jax.losses import flow_matching
from fm_jax.paths import AffinePath
from fm_jax.train.loop import DataIterator
from fm_jax.types import Batch, Coupling, Key, Kind, LossFn, Schedule, Source, TimeSampler

SCHEDULES: dict[str, Schedule] = {
    "linear": schedules.Linear(),
    "cosine": schedules.Cosine(),
    "polynomial": schedules.Polynomial(),
    "vp": schedules.VP(),
    "linear_vp": schedules.LinearVP(),
    "ddpm": schedules.DDPM(),
}
COUPLINGS: dict[str, Coupling] = {
    "independent": couplings.independent,
    "minibatch_ot": couplings.minibatch_ot,
    "entropic_ot": couplings.EntropicOT(0.05, relative=True),
    "partial_ot": couplings.PartialOT(0.9),
    "anti_ot": couplings.anti_ot,
}
WEIGHTS = {
    "none": None,
    "snr": losses.SNRWeight(),
    "min_snr": losses.MinSNRWeight(),
    "edm": losses.EDMWeight(),
}
TIMES: dict[str, TimeSampler] = {
    "stratified": times.Stratified(),
    "uniform": times.Uniform(),
    "logit_normal": times.LogitNormal(),
    "mode": times.Mode(),
    "beta": times.Beta(2.0, 2.0),
    "edm": times.EDMLogNormal(),
}


@dataclass(frozen=True)
class Method:
    """What is regressed, and where on the path."""

    path: Literal["linear", "cosine", "polynomial", "vp", "linear_vp", "ddpm"] = "linear"
    """Schedule of the affine path from noise to data; "linear" is conditional OT, also called rectified flow."""
    coupling: Literal["independent", "minibatch_ot", "entropic_ot", "partial_ot", "anti_ot"] = "independent"
    """Which noise goes with which data within a batch: as they come; by optimal transport, exact, entropic (at a
    twentieth of the mean cost), of nine tenths of the batch; or by the worst transport, for study."""
    coupled_batches: int = 1
    """Batches that are coupled at once."""
    reuse_pairs: int = 1
    """Times that a pair is trained on; more than 1 where transport takes longer than a step."""
    prediction: Kind = "velocity"
    """What the network predicts."""
    times: Literal["stratified", "uniform", "logit_normal", "mode", "beta", "edm"] = "stratified"
    """Distribution of training times."""
    time_shift: float = 1.0
    """Shift of the training times towards noise, for what noise hides little of, as large pictures or clips: 3 at 1024
    pixels in Stable Diffusion 3; 1 is none."""
    first_steps: int = 0
    """Steps at the start with `first_shift` in place of `time_shift`: to learn first what a condition alone can say,
    as which of two things is where, of which there is nothing to see in noise."""
    first_shift: float = 8.0
    """Shift of the training times towards noise in the first steps."""
    weight: Literal["none", "snr", "min_snr", "edm"] = "none"
    """Weight of the loss over time; "none" counts every error of the prediction alike."""

    def __post_init__(self) -> None:
        check_options(self, time_shift="(0, inf)", first_shift="(0, inf)", first_steps=(0, STEPS[1]))

    def unused(self, prefix: str = "method.") -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        if self.coupling == "independent":
            for name in ("coupled_batches", "reuse_pairs"):
                yield prefix + name, "--coupling independent couples nothing; --coupling minibatch_ot, say, does"
        if not self.first_steps:
            yield prefix + "first_shift", "--first-steps 0 are none; --first-steps 1000, say, are some"

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.path]

    @property
    def time_sampler(self) -> TimeSampler:
        return self._times(self.time_shift)

    @property
    def first_time_sampler(self) -> TimeSampler:
        """That of the first steps."""
        return self._times(self.first_shift)

    def _times(self, shift: float) -> TimeSampler:
        low, high = AffinePath(self.schedule).target_domain(self.prediction, weight=WEIGHTS[self.weight])
        sampler = TIMES[self.times] if shift == 1 else times.Shifted(TIMES[self.times], shift)
        return times.Rescale(sampler, low, high)


def check_first_steps(method: Method, training: Training) -> None:
    """Raises `ValueError` for first steps that are all steps of a run; at a constant rate it can be made longer."""
    if method.first_steps >= training.total_steps and training.decay != "constant":
        raise ValueError(
            f"--first-steps must be below --total-steps {training.total_steps}, got {method.first_steps}: the steps "
            "after them have --time-shift."
        )


def couple_ahead(method: Method, data_of: Callable[[int, int], DataIterator], key: Key, source: Source) -> DataIterator:
    """This process's share of the data, with their `x0` paired in a thread ahead of the training if need be.

    A batch is paired as a whole, by every process alike, so that the pairs do not depend on how many there are. Where
    the first steps have times of their own, batches bring the times of all steps.

    Args:
        method: whose coupling it is.
        data_of: `data_of(index, count)`, the share of one of so many processes.
        key: of the coupling, and of the times.
        source: of x0.
    """
    index, count = jax.process_index(), jax.process_count()
    data: DataIterator
    if method.coupling == "independent":
        data = data_of(index, count)
    else:
        whole = CoupledBatches(
            data_of(0, 1),
            COUPLINGS[method.coupling],
            key,
            source=source,
            group=method.coupled_batches,
            reuse=method.reuse_pairs,
        )
        data = Share(whole) if count > 1 else whole
    return TimedBatches(data, method, key) if method.first_steps else data


class TimedBatches:
    """Batches of this process with the times `t` [batch] of their step.

    The times are drawn for the whole batch, as a function of the key and of the step alone, on the host's processor.
    """

    def __init__(self, data: DataIterator, method: Method, key: Key):
        self._data, self._step = data, 0
        key = jax.random.fold_in(key, STEPS[1])  # another one than those of all blocks of pairs
        self._first_steps, self._key = method.first_steps, jax.device_put(key, jax.local_devices(backend="cpu")[0])
        samplers = method.first_time_sampler, method.time_sampler
        self._draw_first, self._draw = (jax.jit(sampler, static_argnums=1) for sampler in samplers)

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> Batch:
        batch, step = next(self._data), self._step
        self._step += 1
        draw = self._draw_first if step < self._first_steps else self._draw
        t = draw(jax.random.fold_in(self._key, step), len(batch["x1"]) * jax.process_count())
        return batch | {"t": own_rows(np.asarray(t))}

    def get_state(self) -> dict[str, Any]:
        """The number of batches taken and the position of the data, as JSON values."""
        return {"step": self._step, "data": self._data.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, on any number of processes."""
        self._step = state["step"]
        self._data.set_state(state["data"])


def make_loss(method: Method, experiment: Experiment) -> LossFn:
    """The loss of a method for the network of an experiment, on batches from `couple_ahead`."""
    return flow_matching(
        experiment.apply_fn,
        AffinePath(method.schedule, experiment.source),
        time_sampler=method.time_sampler,
        kind=method.prediction,
        weight=WEIGHTS[method.weight],
        drop=experiment.drop,
    )
