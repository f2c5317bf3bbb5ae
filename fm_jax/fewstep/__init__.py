"""Flows that sample in one step or a few: transport maps, straightened flows, distilled ones."""

from fm_jax.fewstep.optimal_flow import (
    Inverse,
    inverse_transport,
    invert,
    optimal_flow_matching,
    straight_velocity,
    transport,
)
from fm_jax.fewstep.reflow import distillation, make_pairs, reflow

__all__ = [
    "Inverse",
    "distillation",
    "inverse_transport",
    "invert",
    "make_pairs",
    "optimal_flow_matching",
    "reflow",
    "straight_velocity",
    "transport",
]
