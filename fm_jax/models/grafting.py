"""From a trained network to one with branches or control, and back: what of the parameters is the network's own."""

from collections.abc import Mapping
from typing import Any

import jax

from fm_jax.checks import check_array, shown
from fm_jax.types import Params

PREFIX = "branch_"
"""Of the names of the parameters of branches."""
NETWORK = "network"
"""The name of the parameters of the network, in which there may be those of branches."""
OF_CONTROL = ("control", "first", "local", "taps")
"""The names of the parameters of control beside those."""


def base_of(params: Params) -> Params:
    """The parameters of the network alone, of those of a `Branched` or `Controlled` one.

    Args:
        params: a dict with the network's in `"network"`.

    Returns:
        Those, without what belongs to branches.

    Raises:
        ValueError: if there is no such subtree.

    Example:
        >>> base_of({"network": {"out": 1.0, "branch_depth": 2.0}, "branch_depth": 3.0})
        {'out': 1.0}
    """
    _check_params(params)
    network = params[NETWORK]
    return base_of(network) if _is_wrapped(network) else _without_branches(network)


def with_base(params: Params, base: Params) -> Params:
    """Puts trained parameters of the network in place of those it has, and in place of a trainable copy of them.

    Args:
        params: of a `Branched` or `Controlled` network, as `init_params` makes them.
        base: of the network alone, in the layout (`scan_layers`) that it has there.

    Returns:
        As `params`: what is the network's is that of `base`, and the rest as it was.

    Raises:
        ValueError: if `base` has not what the network has, name by name and shape by shape.

    Example:
        >>> import jax.numpy as jnp
        >>> new = {"network": {"out": jnp.zeros(2), "branch_depth": jnp.zeros(3)}}
        >>> with_base(new, {"out": jnp.ones(2)})["network"]["out"]
        Array([1., 1.], dtype=float32)
    """
    _check_params(params)
    if not isinstance(base, Mapping):
        raise ValueError(f"base must be a dict of the parameters of the network, got {shown(base)}.")
    merged = dict(params)
    # A copy lacks what it has no use for.
    for name, whole in ((NETWORK, True), ("control", False)):
        if name in params:
            merged[name] = _merged(params[name], base, whole, "")
    return merged


def trainable(params: Params) -> Params:
    """What is not the network's own: a tree of bools as `params`, true for branches, taps and a trainable copy.

    With it, an optimiser leaves the network as it is:

        labels = jax.tree.map(lambda new: "new" if new else "base", trainable(params))
        optimizer = optax.multi_transform({"new": optax.adamw(1e-4), "base": optax.set_to_zero()}, labels)

    Args:
        params: of a `Branched` or `Controlled` network.

    Raises:
        ValueError: if there is no `"network"` in them.

    Example:
        >>> trainable({"network": {"out": 1.0, "branch_depth": 2.0}, "branch_depth": 3.0})
        {'branch_depth': True, 'network': {'branch_depth': True, 'out': False}}
    """
    _check_params(params)

    def is_new(path: Any, leaf: Any) -> bool:
        names = [str(key.key) for key in path]
        return names[0] != NETWORK or any(name.startswith(PREFIX) for name in names)

    return jax.tree_util.tree_map_with_path(is_new, params)


def _is_wrapped(params: Any) -> bool:
    """Whether they are those of a `Branched` or `Controlled` network; one of text has a `"network"` of its own."""
    if not isinstance(params, Mapping) or NETWORK not in params:
        return False
    return all(name in (NETWORK, *OF_CONTROL) or str(name).startswith(PREFIX) for name in params)


def _check_params(params: Any) -> None:
    if not _is_wrapped(params):
        got = f"a dict of {sorted(map(str, params))}" if isinstance(params, Mapping) else shown(params)
        raise ValueError(f"params must be those of a Branched or Controlled network, with 'network', got {got}.")


def _without_branches(node: Any) -> Any:
    if not isinstance(node, Mapping):
        return node
    return {name: _without_branches(value) for name, value in node.items() if not str(name).startswith(PREFIX)}


def _merged(own: Any, base: Any, whole: bool, at: str) -> Any:
    """`base` where `own` has the same names, all of which are wanted if `whole`; branches stay as they are."""
    if not isinstance(own, Mapping):
        check_array(f"base{at}", base)
        if base.shape != own.shape:
            raise ValueError(f"base{at} must have shape {own.shape}, as the network's, got {base.shape}.")
        return base
    if not isinstance(base, Mapping):
        raise ValueError(f"base{at} must be a dict of {sorted(map(str, own))}, got {shown(base)}.")
    wanted = [name for name in own if name in base or not str(name).startswith(PREFIX)]
    missing, unknown = [n for n in wanted if n not in base], [n for n in base if n not in own]
    if missing or (whole and unknown):
        raise ValueError(
            f"base{at} must have {sorted(map(str, wanted))}, as the network has, got {sorted(map(str, base))}."
        )
    return {
        name: _merged(own[name], base[name], whole, f"{at}[{name!r}]") if name in base else own[name] for name in own
    }
