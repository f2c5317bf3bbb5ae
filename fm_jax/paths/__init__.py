"""Conditional probability paths: what to regress."""

from fm_jax.paths.affine import AffinePath, source, targets

__all__ = ["AffinePath", "source", "targets"]
