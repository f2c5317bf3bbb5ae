"""Rules of Movie Gen's video transformers of `fm_jax.models.videodit`, which have no published file.

The layout `"torch"` is what a plain PyTorch module of the architecture holds: linear layers [out, in], one
`nn.Conv3d` for the patches, `nn.Embedding` for the positions, so that networks trained here can be taken elsewhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_member, shown
from fm_jax.models.conditioning import Conditions
from fm_jax.models.stack import place_of_block
from fm_jax.models.videodit import VideoDiT
from fm_jax.weights.rules import Piece, Rules, dense, from_heads, norm, template_of, to_heads

CLASS = "VideoDiT"
_FIELDS = ("hidden", "num_layers", "num_heads", "mlp_hidden", "channels", "epsilon")


def videodit_from_config(config: Mapping[str, Any]) -> VideoDiT:
    """The network of a `config.json`, as `videodit_config` writes it.

    Args:
        config: its contents; all fields.

    Raises:
        ValueError: if it is that of another network, a field is missing, or one is not known; by name.
    """
    if config.get("_class_name") != CLASS:
        raise ValueError(f"_class_name must be {CLASS!r}, got {shown(config.get('_class_name'))}.")
    fields = {*_FIELDS, "patch_size", "positions", "encoders"}
    given = {name for name in config if not name.startswith("_")}
    if given != fields:
        missing, unknown = sorted(fields - given), sorted(given - fields)
        raise ValueError(f"config must have the fields of {CLASS}, got none of {missing} and {unknown} too.")
    if not isinstance(config["encoders"], Mapping):
        raise ValueError(f"encoders must be a dict of names and widths, got {shown(config['encoders'])}.")
    triples: dict[str, Any] = {name: tuple(config[name]) for name in ("patch_size", "positions")}
    return VideoDiT(**{name: config[name] for name in _FIELDS}, **triples, encoders=tuple(config["encoders"].items()))


def videodit_config(module: VideoDiT) -> dict[str, Any]:
    """The `config.json` of a network: the inverse of `videodit_from_config`."""
    triples = {name: list(getattr(module, name)) for name in ("patch_size", "positions")}
    encoders = dict(module.encoders)
    return {"_class_name": CLASS} | {name: getattr(module, name) for name in _FIELDS} | triples | {"encoders": encoders}


def videodit_rules(module: VideoDiT, layout: str = "torch") -> Rules:
    """Rules of a video transformer.

    Args:
        module: the network.
        layout: `"torch"`.
    """
    check_member("layout", layout, ("torch",))
    shape: Any = jax.ShapeDtypeStruct
    x = shape((1, *module.patch_size, module.channels), jnp.float32)
    tokens: Any = {name: shape((1, 1, features), jnp.float32) for name, features in module.encoders}
    template = template_of(module, shape((1,), jnp.float32), x, Conditions(tokens=tokens))
    return Rules(template, tuple(_pieces(module)))


def _pieces(module: VideoDiT) -> Iterator[Piece]:
    sizes = dict(zip("spq", module.patch_size, strict=True))
    yield Piece("patches/kernel", "patches.weight", "o c s p q -> (s p q c) o", sizes)
    yield from dense("time/in", "time.0", bias=False)
    yield from dense("time/out", "time.2", bias=False)
    yield from dense("modulation", "modulation", bias=False)
    for name, _ in module.encoders:
        yield from dense(f"text_{name}/linear", f"text.{name}.linear", bias=False)
        yield from norm(f"text_{name}/norm", f"text.{name}.norm")
    for axis in ("frames", "rows", "columns"):
        yield Piece(f"positions/{axis}", f"positions.{axis}.weight", "n d -> n d")
    for i in range(module.num_layers):
        path, layer = place_of_block(i, scan=module.scan_layers)
        yield from _block(path, f"blocks.{i}", module.num_heads, layer)
    yield from norm("norm", "norm", bias=False)
    yield Piece("table", "table", "k d -> k d")
    yield from dense("out", "out", bias=False)


def _block(path: str, key: str, heads: int, layer: int | None) -> Iterator[Piece]:
    where: dict[str, Any] = {"bias": False, "layer": layer}
    yield Piece(f"{path}/table", f"{key}.table", "k d -> k d", layer=layer)
    for name in ("attention", "cross"):
        for part in ("query", "key", "value"):
            yield from to_heads(f"{path}/{name}/{part}", f"{key}.{name}.{part}", heads, **where)
        yield from from_heads(f"{path}/{name}/out", f"{key}.{name}.out", heads, **where)
    for name in ("norm_attention", "norm_mlp"):
        yield from norm(f"{path}/{name}", f"{key}.{name}", **where)
    for name in ("mlp_gate", "mlp_in", "mlp_out"):
        yield from dense(f"{path}/{name}", f"{key}.{name}", **where)
