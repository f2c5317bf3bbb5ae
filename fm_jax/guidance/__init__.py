"""Guidance: velocity functions made of other velocity functions, and rates of jumps made of other rates."""

from fm_jax.guidance.classifier import classifier
from fm_jax.guidance.classifier_free import classifier_free, classifier_free_batched, compose, nested
from fm_jax.guidance.known import keep_known
from fm_jax.guidance.rates import classifier_free_logits, classifier_free_rates, predictor, predictor_taylor
from fm_jax.guidance.rules import Extrapolate, FirstChannels, Projected, Rescale, Rule, ZeroStar

__all__ = [
    "Extrapolate",
    "FirstChannels",
    "Projected",
    "Rescale",
    "Rule",
    "ZeroStar",
    "classifier",
    "classifier_free",
    "classifier_free_batched",
    "classifier_free_logits",
    "classifier_free_rates",
    "compose",
    "keep_known",
    "nested",
    "predictor",
    "predictor_taylor",
]
