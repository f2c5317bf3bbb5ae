"""Rules of `fm_jax.models.song_unet.SongUNet`: the layout of EDM's networks."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_member
from fm_jax.models.conditioning import Conditions
from fm_jax.models.song_unet import SongUNet
from fm_jax.weights.rules import Piece, Rules, conv, conv1x1, dense, norm, shifted, template_of

Layout = Literal["edm", "edm_preconditioned"]


def song_unet_rules(module: SongUNet, layout: Layout = "edm") -> Rules:
    """Rules of a `SongUNet`.

    Args:
        module: with `in_channels`.
        layout: `"edm"`, the network alone, or `"edm_preconditioned"`, whose keys stand behind `model.`.

    Raises:
        ValueError: for a network that does not know its `in_channels`.
    """
    check_member("layout", layout, get_args(Layout))
    if module.in_channels is None:
        raise ValueError("The rules of a SongUNet need its in_channels: module.clone(in_channels=3).")
    side = 2 ** (len(module.channel_mults) - 1)
    x = jax.ShapeDtypeStruct((1, side, side, module.in_channels), jnp.float32)
    template = template_of(module, jnp.zeros(1), x, Conditions())
    prefix = "model." if layout == "edm_preconditioned" else ""
    filters = {f"{prefix}{key}.resample_filter": lambda: resample_filter(module) for key in _resampled(module)}
    return Rules(template, shifted(_pieces(module, template), prefix), tables=filters)


def resample_filter(module: SongUNet) -> np.ndarray:
    """The filter over both axes, a constant of the files: [1, 1, n, n]."""
    line = np.asarray(module.resample_filter, np.float32)
    return (np.outer(line, line) / line.sum() ** 2)[None, None]


def blocks_of(module: SongUNet) -> Iterator[tuple[str, str]]:
    """The residual blocks of a network: their names here and their keys."""
    last = len(module.channel_mults) - 1
    sides = [f"{module.resolution >> level}x{module.resolution >> level}" for level in range(last + 1)]
    for level, side in enumerate(sides):
        if level > 0:
            yield f"down_{level - 1}_resample", f"enc.{side}_down"
        for i in range(module.num_blocks):
            yield f"down_{level}_{i}", f"enc.{side}_block{i}"
    yield "middle_0", f"dec.{sides[last]}_in0"
    yield "middle_1", f"dec.{sides[last]}_in1"
    for level, side in enumerate(sides):
        if level < last:
            yield f"up_{level + 1}_resample", f"dec.{side}_up"
        for i in range(module.num_blocks + 1):
            yield f"up_{level}_{i}", f"dec.{side}_block{i}"


def _resampled(module: SongUNet) -> Iterator[str]:
    """Keys of what holds the filter."""
    for path, key in blocks_of(module):
        if path.endswith("resample"):
            yield f"{key}.conv0"
            yield f"{key}.skip"
    for level in range(len(module.channel_mults)):
        side = f"{module.resolution >> level}x{module.resolution >> level}"
        if level > 0 and module.encoder != "standard":
            yield f"enc.{side}_aux_{'down' if module.encoder == 'skip' else 'residual'}"
        if level < len(module.channel_mults) - 1 and module.decoder == "skip":
            yield f"dec.{side}_aux_up"


_RESIDUAL = {
    "norm_in": (norm, "norm0"),
    "conv_in": (conv, "conv0"),
    "embed": (dense, "affine"),
    "norm_out": (norm, "norm1"),
    "conv_out": (conv, "conv1"),
    "skip": (conv, "skip"),
    "norm_attention": (norm, "norm2"),
}


def _pieces(module: SongUNet, template: Any) -> Iterator[Piece]:
    if module.time_features == "fourier":
        yield Piece("frequencies", "map_noise.freqs", "d -> d")
    if module.num_classes is not None:
        yield from dense("label", "map_label")
    if module.augment_dim > 0:
        yield from dense("augment", "map_augment", bias=False)
    yield from dense("time_in", "map_layer0")
    yield from dense("time_out", "map_layer1")
    yield from conv("stem", f"enc.{module.resolution}x{module.resolution}_conv")
    for path, key in blocks_of(module):
        for ours, (build, theirs) in _RESIDUAL.items():
            if ours in template[path]:
                yield from build(f"{path}/{ours}", f"{key}.{theirs}")
        if "attention" in template[path]:
            # Rows (d, 3) of the one head; ours are (3, d).
            qkv, sizes = f"{path}/attention/qkv", {"n": 3}
            yield Piece(f"{qkv}/kernel", f"{key}.qkv.weight", "(d n) i 1 1 -> i (n d)", sizes)
            yield Piece(f"{qkv}/bias", f"{key}.qkv.bias", "(d n) -> (n d)", sizes)
            yield from conv1x1(f"{path}/attention/out", f"{key}.proj")
    for level in range(len(module.channel_mults)):
        side = f"{module.resolution >> level}x{module.resolution >> level}"
        if f"image_{level}" in template:
            yield from conv(f"image_{level}", f"enc.{side}_aux_{module.encoder}")
        if f"norm_{level}" in template:
            yield from norm(f"norm_{level}", f"dec.{side}_aux_norm")
            yield from conv(f"out_{level}", f"dec.{side}_aux_conv")


def song_unet_from_config(config: Mapping[str, Any]) -> SongUNet:
    """The network of the keywords of EDM's `SongUNet`.

    Args:
        config: the keywords, those of a preconditioning (`img_channels` for both channels, `use_fp16`) among them.

    Raises:
        ValueError: for a keyword that is not known.
    """
    known = set(_KEYWORDS) | {"img_resolution", "attn_resolutions", "label_dim", "out_channels", "img_channels"}
    unseen = {"_class_name", "class_name", "model_type", "use_fp16", "label_dropout"}
    unknown = sorted(set(config) - known - unseen)
    if unknown or "img_resolution" not in config:
        raise ValueError(f"config must have the keywords of SongUNet, img_resolution among them, got {sorted(config)}.")
    for name in ("_class_name", "model_type"):
        check_member(name, config.get(name, "SongUNet"), ("SongUNet",))
    size, channels = config["img_resolution"], config.get("img_channels")
    given = {name: config[theirs] for theirs, name in _KEYWORDS.items() if theirs in config}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    defaults: dict[str, Any] = {"channel_mults": (1, 2, 2, 2), "dropout": 0.1, "in_channels": channels}
    options = defaults | given
    levels = range(len(options["channel_mults"]))
    return SongUNet(
        **options,
        attention_levels=tuple(level for level in levels if size >> level in config.get("attn_resolutions", [16])),
        num_classes=config.get("label_dim") or None,
        out_channels=config.get("out_channels", channels),
        resolution=size,
    )


_KEYWORDS = {
    "in_channels": "in_channels",
    "augment_dim": "augment_dim",
    "model_channels": "channels",
    "channel_mult": "channel_mults",
    "channel_mult_emb": "embedding_mult",
    "num_blocks": "num_blocks",
    "dropout": "dropout",
    "embedding_type": "time_features",
    "channel_mult_noise": "time_mult",
    "encoder_type": "encoder",
    "decoder_type": "decoder",
    "resample_filter": "resample_filter",
}


def song_unet_config(module: SongUNet) -> dict[str, Any]:
    """The keywords of EDM's `SongUNet` for a network; the inverse of `song_unet_from_config`.

    Raises:
        ValueError: for a network that does not know its `in_channels`.
    """
    if module.in_channels is None:
        raise ValueError("The keywords of a SongUNet need its in_channels: module.clone(in_channels=3).")
    values = {theirs: getattr(module, name) for theirs, name in _KEYWORDS.items()}
    return {theirs: list(value) if isinstance(value, tuple) else value for theirs, value in values.items()} | {
        "_class_name": "SongUNet",
        "img_resolution": module.resolution,
        "out_channels": module.in_channels if module.out_channels is None else module.out_channels,
        "label_dim": module.num_classes or 0,
        "attn_resolutions": [module.resolution >> level for level in module.attention_levels],
    }
