"""The method of an experiment: path, coupling, prediction, times and weight, each one option."""

from dataclasses import dataclass
from typing import Literal

from fm_jax import couplings, losses, schedules, times
from fm_jax.losses import flow_matching, target_domain
from fm_jax.paths import AffinePath
from fm_jax.types import ApplyFn, Coupling, Kind, LossFn, Schedule, TimeSampler

SCHEDULES: dict[str, Schedule] = {
    "linear": schedules.Linear(),
    "cosine": schedules.Cosine(),
    "polynomial": schedules.Polynomial(),
    "vp": schedules.VP(),
    "linear_vp": schedules.LinearVP(),
    "ddpm": schedules.DDPM(),
}
COUPLINGS: dict[str, Coupling] = {"independent": couplings.independent, "minibatch_ot": couplings.minibatch_ot}
WEIGHTS = {
    "none": None,
    "snr": losses.SNRWeight(),
    "min_snr": losses.MinSNRWeight(),
    "edm": losses.EDMWeight(),
}
TIMES: dict[str, TimeSampler] = {
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
    coupling: Literal["independent", "minibatch_ot"] = "independent"
    """Which noise goes with which data within a batch."""
    prediction: Kind = "velocity"
    """What the network predicts."""
    times: Literal["stratified", "uniform", "logit_normal", "mode", "beta", "edm"] = "stratified"
    """Distribution of training times."""
    weight: Literal["none", "snr", "min_snr", "edm"] = "none"
    """Weight of the loss over time; "none" counts every error of the prediction alike."""

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.path]

    @property
    def time_sampler(self) -> TimeSampler:
        low, high = target_domain(self.prediction, self.schedule)
        match self.times:
            case "uniform":
                return times.Uniform(low, high)
            case "stratified":
                return times.Stratified(low, high)
            case name:
                return times.Rescale(TIMES[name], low, high)


def make_loss(method: Method, apply_fn: ApplyFn) -> LossFn:
    """The loss of a method for a network."""
    return flow_matching(
        apply_fn,
        AffinePath(method.schedule),
        coupling=COUPLINGS[method.coupling],
        time_sampler=method.time_sampler,
        kind=method.prediction,
        weight=WEIGHTS[method.weight],
    )
