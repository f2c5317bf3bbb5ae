"""Network function evaluations (NFE): what one call of a function costs, recorded on the function."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def nfe_per_call(v: Callable[..., Any]) -> int:
    """How many network evaluations one call of `v` costs: its attribute `nfe_per_call`, or 1 where it has none."""
    return getattr(v, "nfe_per_call", 1)


def with_nfe_per_call(v: F, nfe: int) -> F:
    """Records on the function `v` that one call costs `nfe` network evaluations; returns `v`."""
    v.nfe_per_call = nfe  # type: ignore[attr-defined]
    return v
