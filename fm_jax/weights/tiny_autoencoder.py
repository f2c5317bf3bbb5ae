"""Rules of `fm_jax.models.TinyAutoencoder`: diffusers' AutoencoderTiny, and TAESD's own files."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp

from fm_jax.checks import check_member, shown
from fm_jax.latents import latent_space_of
from fm_jax.models.tiny_autoencoder import TinyAutoencoder
from fm_jax.weights.rules import Piece, Rules, conv, conv1x1, norm, template_of

Layout = Literal["diffusers", "official"]
Half = Literal["encoder", "decoder"]


def tiny_autoencoder_from_config(config: Mapping[str, Any]) -> TinyAutoencoder:
    """The autoencoder that a `config.json` describes: diffusers' `AutoencoderTiny`, or `TAESD`.

    diffusers has no class for TAEF2. `{"_class_name": "TAESD", "latent_channels": 32, "pooled": true}` is what stands
    for it here, with the other fields of `AutoencoderTiny`.

    Args:
        config: fields that are absent have the class's defaults.

    Raises:
        ValueError: for another class, and a field with a value that is not supported.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a mapping, as config.json holds, got {shown(config)}.")
    check_member("_class_name", config.get("_class_name", "AutoencoderTiny"), ("AutoencoderTiny", "TAESD"))
    blocks = {half: tuple(config.get(f"num_{half}_blocks", default)) for half, default in _BLOCKS.items()}
    widths = {half: tuple(config.get(f"{half}_block_out_channels", (64,) * len(blocks[half]))) for half in _BLOCKS}
    channels = widths["encoder"][0]
    wanted = {
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
        "out_channels": config.get("in_channels", 3),
        "encoder_block_out_channels": (channels,) * len(blocks["encoder"]),
        "decoder_block_out_channels": (channels,) * len(blocks["decoder"]),
    }
    for field, only in wanted.items():
        value = widths.get(field.removesuffix("_block_out_channels"), config.get(field, only))
        if value != only:
            raise ValueError(f"{field} must be {only!r} for this network, got {shown(value)}.")
    return TinyAutoencoder(
        channels=channels,
        encoder_blocks=blocks["encoder"],
        decoder_blocks=blocks["decoder"],
        latent_channels=config.get("latent_channels", 4),
        image_channels=config.get("in_channels", 3),
        pooled=config.get("pooled", False),
        latents=latent_space_of({"_class_name": "AutoencoderTiny", **_constants(config)}),
    )


_BLOCKS = {"encoder": (1, 3, 3, 3), "decoder": (3, 3, 3, 1)}


def _constants(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("scaling_factor", "shift_factor") if name in config}


def tiny_autoencoder_config(module: TinyAutoencoder) -> dict[str, Any]:
    """The `config.json` of a tiny autoencoder: the inverse of `tiny_autoencoder_from_config`.

    Raises:
        ValueError: for another module, and a latent space with a number for each channel, which the class cannot have.
    """
    if not isinstance(module, TinyAutoencoder):
        raise ValueError(f"module must be a TinyAutoencoder, got {shown(module)}.")
    shift, scale = module.latents.shift, module.latents.scale
    if isinstance(shift, tuple) or isinstance(scale, tuple):
        raise ValueError(f"AutoencoderTiny has one shift and one scale, got {shown(module.latents)}.")
    config: dict[str, Any] = {
        "_class_name": "TAESD" if module.pooled else "AutoencoderTiny",
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "encoder_block_out_channels": [module.channels] * len(module.encoder_blocks),
        "decoder_block_out_channels": [module.channels] * len(module.decoder_blocks),
        "num_encoder_blocks": list(module.encoder_blocks),
        "num_decoder_blocks": list(module.decoder_blocks),
        "act_fn": "relu",
        "latent_channels": module.latent_channels,
        "upsampling_scaling_factor": 2,
        "upsample_fn": "nearest",
        "scaling_factor": scale,
        "shift_factor": shift,
    }
    return config | ({"pooled": True} if module.pooled else {})


def tiny_autoencoder_rules(module: TinyAutoencoder, layout: Layout = "diffusers", half: Half | None = None) -> Rules:
    """Rules of a tiny autoencoder.

    Args:
        module: a `TinyAutoencoder`.
        layout: `"diffusers"`, layers by number behind `encoder.layers.` and `decoder.layers.`; `"official"`, behind
            `encoder.` and `decoder.`, where the squashing of the latents counts as a layer.
        half: of a file that holds one half alone, whose keys begin with the number. `{"encoder": ..., "decoder": ...}`
            are the parameters; those of two files are joined by `|`.

    Raises:
        ValueError: for another module, layout or half.
    """
    if not isinstance(module, TinyAutoencoder):
        raise ValueError(f"module must be a TinyAutoencoder, got {shown(module)}.")
    check_member("layout", layout, get_args(Layout))
    if half is not None:
        check_member("half", half, get_args(Half))
    side = module.factor
    template = template_of(module, jnp.zeros((1, side, side, module.image_channels)))
    prefix = "layers." if layout == "diffusers" else ""
    pieces: list[Piece] = []
    for name, make in (("encoder", _encoder), ("decoder", _decoder)):
        start = f"{name}.{prefix}" if half is None else prefix
        if half in (None, name):
            pieces += make(module, start, layout)
    return Rules(template if half is None else {half: template[half]}, tuple(pieces))


def _encoder(module: TinyAutoencoder, start: str, layout: Layout) -> Iterator[Piece]:
    yield from conv("encoder/stem", f"{start}0")
    layer, last = 1, len(module.encoder_blocks) - 1
    for level, num in enumerate(module.encoder_blocks):
        if level > 0:
            yield from conv(f"encoder/down_{level}_resample", f"{start}{layer}", bias=False)
            layer += 1
        for i in range(num):
            yield from _block(f"encoder/down_{level}_{i}", f"{start}{layer}", module.pooled and level == last)
            layer += 1
    yield from conv("encoder/out", f"{start}{layer}")


def _decoder(module: TinyAutoencoder, start: str, layout: Layout) -> Iterator[Piece]:
    layer, last = 0 if layout == "diffusers" else 1, len(module.decoder_blocks) - 1
    yield from conv("decoder/stem", f"{start}{layer}")
    layer += 2  # the activation is a layer of its own
    for i, num in enumerate(module.decoder_blocks):
        level = last - i
        for j in range(num):
            yield from _block(f"decoder/up_{level}_{j}", f"{start}{layer}", module.pooled and level == last)
            layer += 1
        if level > 0:  # the enlargement too
            yield from conv(f"decoder/up_{level}_resample", f"{start}{layer + 1}", bias=False)
            layer += 2
    yield from conv("decoder/out", f"{start}{layer}")


def _block(path: str, key: str, pooled: bool) -> Iterator[Piece]:
    for i in range(3):
        yield from conv(f"{path}/conv_{i}", f"{key}.conv.{2 * i}")
    if pooled:
        yield from conv1x1(f"{path}/pool_in", f"{key}.pool.0", bias=False)
        yield from norm(f"{path}/pool_norm", f"{key}.pool.1")
        yield from conv1x1(f"{path}/pool_out", f"{key}.pool.3", bias=False)
