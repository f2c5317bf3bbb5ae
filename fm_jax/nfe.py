"""Network function evaluations (NFE): what one call of a function costs, and gives, from a value that carries it.

A function of yours may hide any number of evaluations, so its cost is unknown, never guessed: also that of a `lambda`
or `functools.partial` around a guided velocity. A network bound to its parameters by `parameterization.bind` costs 1;
what functions of `fm_jax` make of those that carry a cost carries one too; `Counted(function, 1)` says it of any other.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from fm_jax.checks import check_function, check_integer, check_member
from fm_jax.types import RETURNS, Array, Returns


@dataclass(frozen=True)
class Counted:
    """A function with the network evaluations that one call of it costs, `None` where that is unknown.

    Attributes:
        function: any function.
        nfe: what a call of it costs.
        domain: the range of times that it may be called at, where that is narrower than what a sampler would take.
        reach: the range of times in which a sampler may end that does not call it at the last; `domain` by default.
            A velocity made of data predictions, say, is infinite at t = 1, and Euler's last step still leads there.
        returns: what a call gives, where rates, a denoiser and a causal one could be mistaken for each other: then what
            is of another kind than was asked for is refused. `None` where it is not known, which serves as any.

    Raises:
        ValueError: for what is no function, a cost that is no count, or another `returns`.

    Example:
        >>> v = Counted(lambda t, x: -x, 1)
        >>> v(0.5, 2.0), v.nfe
        (-2.0, 1)
    """

    function: Callable[..., Any]
    nfe: int | None
    domain: tuple[float, float] | None = None
    reach: tuple[float, float] | None = None
    returns: Returns | None = None

    def __post_init__(self) -> None:
        check_function("function", self.function, "a function")
        if self.returns is not None:
            check_member("returns", self.returns, RETURNS)
        if self.nfe is not None:
            check_integer("nfe", self.nfe, least=0)
        object.__setattr__(self, "__wrapped__", self.function)  # so that it has the signature of the function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def cost(function: Callable[..., Any]) -> int | None:
    """The network evaluations of one call of `function`; `None` unless it is `Counted`."""
    return function.nfe if isinstance(function, Counted) else None


def _carrier(function: Callable[..., Any]) -> Any:
    """What a function carries, through `jax.jit` and a `functools.partial` that leaves the time to be given."""
    while True:
        if isinstance(function, functools.partial) and not function.args:
            function = function.func
        elif hasattr(function, "lower") and hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function if isinstance(function, Counted) else None


def domain_of(*functions: Callable[..., Any]) -> tuple[float, float] | None:
    """The times at which all of the functions may be called; `None` where none of them says.

    It is known of a function under `jax.jit` or `functools.partial`, and not of a `lambda` around one.
    """
    return overlap(*(each.domain for each in map(_carrier, functions) if each is not None))


def reach_of(*functions: Callable[..., Any]) -> tuple[float, float] | None:
    """The times at which a sampler may end that calls none of the functions there; `None` where none of them says."""
    return overlap(*(each.reach or each.domain for each in map(_carrier, functions) if each is not None))


def returns_of(function: Callable[..., Any]) -> Returns | None:
    """What a call of it gives; `None` where it does not say."""
    carrier = _carrier(function)
    return None if carrier is None else carrier.returns


def logits_like(*denoisers: Callable[..., Any]) -> Returns:
    """What a denoiser made of these returns: of causal ones it is causal."""
    return "next_logits" if "next_logits" in map(returns_of, denoisers) else "logits"


_ARE: dict[Returns, str] = {
    "prediction": "what a network predicts, by bind; forward_rates(denoiser, path) makes rates of it, and "
    'Counted(network, 1, returns="rates") says that it has learned some',
    "logits": "a denoiser; forward_rates(denoiser, path) makes rates of it",
    "next_logits": "a causal denoiser, as by one_late, which knows the tokens before one alone: "
    'FirstHitting(path, "first") draws from it, and next_token_log_prob evaluates it',
    "rates": "rates, which a denoiser has become already",
}


def check_rates(name: str, rates: Any) -> None:
    """Refuses what is not, or is known not to be, rates of jumps."""
    _check(name, rates, "rates u(t, x), such as forward_rates(denoiser, path)", ("rates",))


def check_denoiser(name: str, denoiser: Any, *, causal: bool = False) -> None:
    """Refuses what is not, or is known not to be, a denoiser; a causal one too unless it may be `causal`."""
    allowed: tuple[Returns, ...] = ("prediction", "logits", "next_logits") if causal else ("prediction", "logits")
    _check(name, denoiser, "a denoiser f(t, x) -> logits [batch, ..., K]", allowed)


def _check(name: str, function: Any, wanted: str, allowed: tuple[Returns, ...]) -> None:
    check_function(name, function, wanted, 2)
    returns = returns_of(function)
    if returns is not None and returns not in allowed:
        raise ValueError(f"{name} must be {wanted}, got {_ARE[returns]}.")


def overlap(*ranges: tuple[float, float] | None) -> tuple[float, float] | None:
    """The times that are in all of the ranges, of which `None` is no limit."""
    limits = [each for each in ranges if each is not None]
    return (max(low for low, _ in limits), min(high for _, high in limits)) if limits else None


def total(*costs: int | None) -> int | None:
    """The sum of costs; unknown if one of them is."""
    return None if None in costs else sum(each for each in costs if each is not None)


def spent(times: int | Array, *functions: Callable[..., Any]) -> tuple[Array, Array | None]:
    """The calls, and their evaluations or `None`, of functions that are each called `times` times."""
    each = total(*map(cost, functions))
    return jnp.asarray(times * len(functions)), None if each is None else jnp.asarray(times * each)
