"""A trainable copy of a network that follows what is aligned with the state: ControlNet, for every network of ours."""

import functools
import math
import operator
import re
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fm_jax.checks import check_event, check_integer, check_setting, shown
from fm_jax.models.adapters import check_kind
from fm_jax.models.branch_parts import LocalFeatures
from fm_jax.models.branches import check_local
from fm_jax.models.dense import Dense
from fm_jax.models.grafting import NETWORK, PREFIX
from fm_jax.models.layers import zeros
from fm_jax.models.places import TOKEN_BLOCKS, Interceptor, innermost, on_grid, state_of, token_grid, with_state
from fm_jax.types import Array, Cond, Params

CONTROL, FEATURE = "control", "feature"
"""The collection of what the copy finds and what the network gets, a subtree a block, and the name of it there."""
Path = tuple[str, ...]
FIRST = ("stem", "patches")
"""The first layer of U-Nets and of transformers."""
_DOWN = re.compile(r"down_(\d+)_(\d+)(_attention|_transformer)?|down_(\d+)_resample|stem")
_UNUSED = re.compile(r"up_.*|norm.*|out.*")


class Controlled(nn.Module):
    """A network, and a copy of it that is told what is aligned with the state, and tells the network's blocks.

    The features of the condition join the first layer of the copy, through a projection that starts at zero; what each
    of the copy's blocks gives joins the same block of the network, or, in a U-Net, the skip connection behind it and
    the middle, through a tap that starts at zero. So the output is at first the network's own, to the bit. The network
    is not trained: no gradient reaches its parameters. What the copy has no use for, the way up of a U-Net and the last
    layer, is not copied.

    `fm_jax.models.grafting.with_base` puts a trained network there and into the copy. The network may be a `Branched`
    one; its branches are copied with it.

    Attributes:
        network: any network of `fm_jax.models` but an `MLP` and a `SequenceUNet`, which has a local condition itself;
            or one that reads text.
        channels: of the condition.
        features: width of its features, which two convolutions make.
        scale: factor on what the taps give.

    Raises:
        ValueError: for what is no network, widths below 1, or a scale that is not finite.

    Example:
        >>> from fm_jax.models import init_params, make_dit
        >>> module = Controlled(make_dit("tiny"), channels=1)
        >>> params = init_params(module, jax.random.key(0), (8, 8, 3), {"local": jnp.zeros((1, 8, 8, 1))})
        >>> sorted(params)
        ['control', 'first', 'local', 'network', 'taps']

    References:
        Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv:2302.05543), section 3.
    """

    network: nn.Module
    channels: int
    features: int = 64
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_kind("network", self.network, nn.Module, "flax.linen.Module")
        if isinstance(self.network, Controlled):
            raise ValueError("network must have no control yet, got a Controlled one.")
        check_integer("channels", self.channels)
        check_integer("features", self.features)
        check_setting(self, "scale", "(-inf, inf)")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, as the network takes it.
            x: state, [batch, *grid, channels].
            cond: a dict of `"local"`, [batch, *grid, channels], whose sides are those of `x`, multiples or divisors of
                them, and `"network"`, what the network takes, if anything. `None` for `"local"` leaves the network
                alone.
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            What the network gives.

        Raises:
            ValueError: if a condition is missing, unknown or does not fit, or the network has no blocks to tell.
        """
        check_event(x)
        local, told = self._checked(x, cond)
        module = self.network.clone(parent=None, name=None)
        tokens = token_grid(module, x)
        if self.is_initializing():
            self.network(t, x, told)
        base: Any = jax.lax.stop_gradient(self.get_variable("params", NETWORK))

        def run(params: Params, interceptor: Interceptor, **collections: Any) -> Any:
            rngs = {"dropout": self.make_rng("dropout")} if train and self.has_rng("dropout") else None
            variables = {"params": params} | collections
            with nn.intercept_methods(interceptor):
                return module.apply(variables, t, x, told, train=train, rngs=rngs, mutable=[CONTROL])

        if local is None:
            return run(base, _nothing)[0]
        copy = self.param(CONTROL, lambda key: used(base))
        features = LocalFeatures(self.features, name="local")(local)

        hinted = []

        def hint(h: Array) -> Array:
            hinted.append(h.shape)
            part = Dense(h.shape[-1], kernel_init=zeros, dtype=h.dtype, parent=self, name="first")
            out: Array = part(on_grid(features, h, tokens))
            return out

        _, found = run(completed(copy, base), _gives(tokens, hint))
        given = {path[:-1]: h for path, h in flatten_dict(found.get(CONTROL, {})).items()}
        if not given or not hinted:
            what = "first layer" if given else "blocks"
            raise ValueError(f"{type(innermost(module)).__name__} has no {what} that control could join.")
        to = routes(given)
        taps = self.param("taps", lambda key: unflatten_dict({path: untrained(given[path]) for path in to}))
        taken = {(*to[path], FEATURE): self._tapped(given[path], _at(taps, path)) for path in to}
        return run(base, _takes(tokens), control=unflatten_dict(taken))[0]

    def _tapped(self, h: Array, tap: Any) -> Array:
        """What joins the network, of what a block of the copy gives, [batch, n, d] or stacked."""
        kernel, bias = (tap[name].astype(h.dtype) for name in ("kernel", "bias"))
        return self.scale * (jnp.einsum("...nd,...de->...ne", h, kernel[..., None, :, :]) + bias[..., None, None, :])

    def _checked(self, x: Array, cond: Any) -> tuple[Array | None, Any]:
        """What is aligned with the state, and what the network is told."""
        if not isinstance(cond, dict) or "local" not in cond or set(cond) - {"local", NETWORK}:
            got = f"a dict of {sorted(map(str, cond))}" if isinstance(cond, dict) else shown(cond)
            raise ValueError(f"cond must be a dict of 'local' and, if the network takes one, 'network', got {got}.")
        local = cond["local"]
        if local is not None:
            check_local("cond['local']", local, x, self.channels)
        elif self.is_initializing():
            raise ValueError("cond['local'] must be there where parameters are made, got None.")
        return local, cond.get(NETWORK)


def untrained(h: Array) -> Any:
    """A tap of what a block gives, [batch, n, d], or blocks in a stack do: a linear map that is zero."""
    stack, width = h.shape[:-3], h.shape[-1]
    return {"kernel": jnp.zeros((*stack, width, width)), "bias": jnp.zeros((*stack, width))}


def used(params: Params) -> Params:
    """What a copy has a use for, of the parameters of a network: all but the way up of a U-Net and the last layer.

    An encoder of text is read as it is.
    """
    if NETWORK in params:
        own = {name: value for name, value in params.items() if name.startswith(PREFIX)}
        return own | {NETWORK: used(params[NETWORK])}
    return {name: value for name, value in params.items() if not _UNUSED.fullmatch(name)}


def completed(copy: Params, base: Params) -> Params:
    """A copy with what `used` left out: an encoder of text, and zeros, on which nothing that is computed depends."""
    if NETWORK in base:
        return dict(base) | dict(copy) | {NETWORK: completed(copy[NETWORK], base[NETWORK])}
    return {name: copy[name] if name in copy else jax.tree.map(jnp.zeros_like, value) for name, value in base.items()}


def routes(paths: Iterable[Path]) -> dict[Path, Path]:
    """Where in the network what blocks of the copy give goes to, by the paths of both.

    To the block itself; in a U-Net, to the block of the way up that takes the skip connection from there.
    """
    blocks: dict[tuple[int, int], Path] = {}  # of a U-Net, by level and number
    rest: dict[Path, str] = {}
    for path in sorted(paths):  # attention behind a block comes after it, and replaces it
        match = _DOWN.fullmatch(path[-1])
        if match and match[2] is not None:
            blocks[int(match[1]), int(match[2])] = path
        else:
            rest[path] = path[-1]
    num = 1 + max((i for _, i in blocks), default=-1)
    skips = {path: f"up_{level}_{num - 1 - i}" for (level, i), path in blocks.items()}
    for path, name in rest.items():
        match = _DOWN.fullmatch(name)
        level = 0 if name == "stem" else int(match[4]) + 1 if match else None
        skips[path] = name if level is None else f"up_{level}_{num}"
    return {path: (*path[:-1], name) for path, name in skips.items()}


def _at(tree: Any, path: Path) -> Any:
    return functools.reduce(operator.getitem, path, tree)


def _nothing(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    return next_fun(*args, **kwargs)


def _gives(grid: tuple[int, ...], hint: Any) -> Interceptor:
    """In the copy: adds the hint to the first layer, and keeps what every block gives, as [batch, n, d]."""
    tokens = math.prod(grid)

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out, module = next_fun(*args, **kwargs), context.module
        if context.method_name != "__call__":
            return out
        name = module.name or ""
        if name in FIRST:
            out = out + hint(out)
        if isinstance(module, TOKEN_BLOCKS) or _DOWN.fullmatch(name) or name == "middle_1":
            h = state_of(out, tokens)
            kept = h.reshape(h.shape[0], -1, h.shape[-1])
            module.sow(CONTROL, FEATURE, kept, init_fn=lambda: None, reduce_fn=lambda old, new: new)
        return out

    return interceptor


def _takes(grid: tuple[int, ...]) -> Interceptor:
    """In the network: adds what is there for a block to what it gives, or to the skip connection that it takes."""
    tokens = math.prod(grid)

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        there = context.method_name == "__call__" and module.has_variable(CONTROL, FEATURE)
        if not there:
            return next_fun(*args, **kwargs)
        more = module.get_variable(CONTROL, FEATURE)
        if (module.name or "").startswith("up_"):
            h = args[0]
            skip = h[..., -more.shape[-1] :]
            skip = skip + more.reshape(skip.shape).astype(h.dtype)
            return next_fun(jnp.concatenate([h[..., : -more.shape[-1]], skip], axis=-1), *args[1:], **kwargs)
        out = next_fun(*args, **kwargs)
        h = state_of(out, tokens)
        return with_state(out, h + more.reshape(h.shape).astype(h.dtype))

    return interceptor
