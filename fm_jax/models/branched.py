"""A network with branches: conditions that it was not built for."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_event, shown
from fm_jax.models.adapters import check_kind
from fm_jax.models.branches import Branch, ChannelConcat
from fm_jax.models.control import Controlled
from fm_jax.models.grafting import PREFIX
from fm_jax.models.places import Head, Seen, at_attention, at_blocks, at_time, innermost, path_of, token_grid
from fm_jax.types import Array, Cond

WORDS = {"time": "embedding of time", "blocks": "blocks", "attention": "attention"}
"""What a place is called in a refusal."""


class Branched(nn.Module):
    """A network with branches: conditions that it was not built for, each of which starts as nothing.

    Attributes:
        network: any network of `fm_jax.models`.
        branches: by name, which is that of their conditions too.

    Raises:
        ValueError: for what is no network, or no branches by name.

    Example:
        >>> import jax
        >>> from fm_jax.models import LocalBranch, init_params, make_dit
        >>> module = Branched(make_dit("tiny"), {"depth": LocalBranch(1)})
        >>> cond = {"depth": jnp.zeros((1, 8, 8, 1))}
        >>> params = init_params(module, jax.random.key(0), (8, 8, 3), cond)
        >>> sorted(params)
        ['branch_depth', 'network']
    """

    network: nn.Module
    branches: Mapping[str, Branch]

    def __post_init__(self) -> None:
        check_kind("network", self.network, nn.Module, "flax.linen.Module")
        if isinstance(self.network, Branched | Controlled):
            raise ValueError("network must have no branches or control yet: put all branches into one Branched.")
        if not isinstance(self.branches, Mapping) or not self.branches:
            raise ValueError(f'branches must be a dict, such as {{"depth": LocalBranch(1)}}, got {self.branches!r}.')
        for name, branch in self.branches.items():
            if not isinstance(name, str) or not name.isidentifier() or name == "network":
                raise ValueError(f"branches must have names that are identifiers, not 'network', got {shown(name)}.")
            if not isinstance(branch, Branch):
                raise ValueError(f"branches[{name!r}] must be a branch, such as LocalBranch(1), got {shown(branch)}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, as the network takes it.
            x: state, [batch, ...].
            cond: a dict with the condition of every branch by its name, and of the network, if it takes one, as
                `"network"`. `None` for a branch leaves it out: the output is that of the network without it. Of a
                `ChannelConcat` there is no such network, and `None` is refused.
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            What the network gives.

        Raises:
            ValueError: if a condition is missing, unknown or does not fit, or the network has no place for a branch.
        """
        check_event(x)
        given = self._checked(x, cond)
        told = {
            name: branch.told(PREFIX + name, f"cond[{name!r}]", given[name], x)
            for name, branch in self.branches.items()
            if given[name] is not None
        }
        joined: set[str] = set()

        def at(place: str) -> list[tuple[str, Any, Any]]:
            return [(PREFIX + name, self.branches[name], each) for name, each in told.items() if self._is(name, place)]

        def total(place: str, h: Array, *args: Any) -> Array:
            joined.add(place)
            out = jnp.zeros((), h.dtype)
            for name, branch, each in at(place):
                out = out + branch.add(name, each, h, *args).astype(h.dtype)
            return out

        def see(module: nn.Module, head: Head) -> list[Seen]:
            joined.add("attention")
            return [branch.see(name, each, head) for name, branch, each in at("attention")]

        root, grid = path_of(self.network), token_grid(self.network, x)
        tokens = math.prod(grid)
        interceptors = {
            "time": at_time(root, lambda module, emb: total("time", emb)),
            "blocks": at_blocks(root, tokens, lambda module, h: total("blocks", h, grid)),
            "attention": at_attention(root, tokens, see),
        }
        needed = [place for place in interceptors if at(place)]
        seen = jnp.concatenate([x, *(each for _, _, each in at("input"))], axis=-1) if at("input") else x
        with ExitStack() as stack:
            for place in needed:
                stack.enter_context(nn.intercept_methods(interceptors[place]))
            out: Array = self.network(t, seen, given["network"], train=train)
        if missing := [place for place in needed if place not in joined]:
            names = ", ".join(name for name in told if self._is(name, missing[0]))
            kind = type(innermost(self.network)).__name__
            raise ValueError(f"{kind} has no {WORDS[missing[0]]} that {names} could join.")
        return out[..., : x.shape[-1]] if seen is not x and out.shape == seen.shape else out

    def _is(self, name: str, place: str) -> bool:
        return self.branches[name].place == place

    def _checked(self, x: Array, cond: Any) -> dict[str, Any]:
        """The condition of every branch, and of the network."""
        names = ["network", *self.branches]
        if not isinstance(cond, Mapping):
            raise ValueError(f"cond must be a dict of {', '.join(map(repr, names))}, got {shown(cond)}.")
        unknown, missing = (
            [name for name in cond if name not in names],
            [name for name in names[1:] if name not in cond],
        )
        if unknown or missing:
            got = ", ".join(map(repr, cond)) or "nothing"
            raise ValueError(f"cond must be a dict of {', '.join(map(repr, names))}, got one of {got}.")
        given = {"network": None} | dict(cond)
        for name, branch in self.branches.items():
            if given[name] is None and isinstance(branch, ChannelConcat):
                raise ValueError(f"cond[{name!r}] must be there, for the network was made for its channels, got None.")
        if self.is_initializing() and (absent := [name for name in self.branches if given[name] is None]):
            raise ValueError(f"cond must have {', '.join(map(repr, absent))} where parameters are made, got None.")
        return given
