"""Rules of Wan's autoencoders of `fm_jax.models.wan_autoencoder`: the layout of diffusers' `AutoencoderKLWan`."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from fm_jax.checks import check_member, shown
from fm_jax.latents import PIXELS, LatentSpace, latent_space_of
from fm_jax.models.wan_autoencoder import WAN, WanAutoencoder
from fm_jax.weights.rules import Piece, Rules, conv, conv1x1, template_of

CLASS = "AutoencoderKLWan"
# Fields that the network here has one value for: others are other networks.
_FIXED: dict[str, Any] = {"_class_name": CLASS, "attn_scales": [], "dropout": 0.0}
_IDLE = ("scale_factor_temporal", "scale_factor_spatial")  # what the levels say already


def _deviations(space: LatentSpace) -> list[float]:
    """One over the scales, in as many digits as were published: the inverse of an inverse may differ in the last."""
    scales = space.scale if isinstance(space.scale, tuple) else (space.scale,)
    return [float(f"{1 / scale:.12g}") for scale in scales]


_READ: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": list(WAN.shift),  # type: ignore[arg-type]
    "latents_std": _deviations(WAN),
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
}


def wan_autoencoder_from_config(config: Mapping[str, Any]) -> WanAutoencoder:
    """The autoencoder of a `config.json` of diffusers; fields that it lacks have the class's defaults.

    Args:
        config: its contents.

    Raises:
        ValueError: if it is that of another network, or has a field or a value that is not known here; by name.

    Example:
        >>> wan_autoencoder_from_config({"_class_name": "AutoencoderKLWan"}).channels
        (96, 192, 384, 384)
    """
    for name, only in _FIXED.items():
        if name in config and config[name] != only:
            raise ValueError(f"{name} must be {only!r} in {CLASS}, got {shown(config[name])}.")
    known = {*_FIXED, *_READ, *_IDLE}
    if unknown := sorted(name for name in config if name not in known and not name.startswith("_")):
        raise ValueError(f"config must have fields of {CLASS}, got {', '.join(unknown)} too.")
    read = _READ | {name: value for name, value in config.items() if name in _READ}
    factors, base, patch_size = tuple(read["dim_mult"]), read["base_dim"], read["patch_size"] or 1
    if factors[0] != 1:
        raise ValueError(f"dim_mult must begin with 1, got {shown(read['dim_mult'])}.")
    image_channels, rest = divmod(read["in_channels"], patch_size**2)
    if rest or read["out_channels"] != read["in_channels"]:
        wanted = f"in_channels={read['in_channels']}, a multiple of {patch_size**2}"
        raise ValueError(f"out_channels must be {wanted}, got {read['out_channels']}.")
    space = latent_space_of({"_class_name": CLASS} | {name: read[name] for name in ("latents_mean", "latents_std")})
    if space == LatentSpace((0.0,) * read["z_dim"], (1.0,) * read["z_dim"]):
        space = PIXELS
    decoder_base = read["decoder_base_dim"] or base
    return WanAutoencoder(
        channels=tuple(base * factor for factor in factors),
        num_blocks=read["num_res_blocks"],
        latent_channels=read["z_dim"],
        image_channels=image_channels,
        halve_frames=tuple(read["temperal_downsample"]),
        decoder_channels=None if decoder_base == base else tuple(decoder_base * factor for factor in factors),
        residual=read["is_residual"],
        patch_size=patch_size,
        latents=space,
    )


def wan_autoencoder_config(module: WanAutoencoder) -> dict[str, Any]:
    """The `config.json` of an autoencoder: the inverse of `wan_autoencoder_from_config`.

    Raises:
        ValueError: if diffusers' class cannot be this network.
    """
    base = module.channels[0]
    factors = [width // base for width in module.channels]
    decoder_base = None if module.decoder_channels is None else module.decoder_channels[0]
    for widths, first in ((module.channels, base), (module.decoder_channels, decoder_base)):
        if widths is not None and first is not None and widths != tuple(first * factor for factor in factors):
            raise ValueError(
                f"Levels must be multiples of the first, the decoder's the same, in {CLASS}, got {widths}."
            )
    if module.time_factor > 4:
        raise ValueError(f"{CLASS} takes four frames at a time, got halve_frames={module.halve_frames}.")
    if module.latents.square != 1:
        raise ValueError(f"{CLASS} has no constants for squares of latents, got {shown(module.latents)}.")
    shift, deviations = module.latents.shift, _deviations(module.latents)
    shifts = list(shift) if isinstance(shift, tuple) else [shift]
    channels = module.image_channels * module.patch_size**2
    return _FIXED | {
        "base_dim": base,
        "decoder_base_dim": decoder_base,
        "z_dim": module.latent_channels,
        "dim_mult": factors,
        "num_res_blocks": module.num_blocks,
        "temperal_downsample": list(module.halve_frames),
        "latents_mean": shifts * (module.latent_channels // len(shifts)),
        "latents_std": deviations * (module.latent_channels // len(deviations)),
        "is_residual": module.residual,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": None if module.patch_size == 1 else module.patch_size,
        "scale_factor_temporal": module.time_factor,
        "scale_factor_spatial": module.factor,
    }


def wan_autoencoder_rules(module: WanAutoencoder, layout: str = "diffusers") -> Rules:
    """Rules of an autoencoder of videos.

    Args:
        module: a `WanAutoencoder`.
        layout: `"diffusers"`.
    """
    check_member("layout", layout, ("diffusers",))
    x = jnp.zeros((1, 1, module.factor, module.factor, module.image_channels))
    return Rules(template_of(module, x), tuple(_pieces(module)))


def _pieces(module: WanAutoencoder) -> Iterator[Piece]:
    yield from _encoder(module)
    yield from _decoder(module)
    yield from conv1x1("encoder_out", "quant_conv", axes="1 1 1")
    yield from conv1x1("decoder_in", "post_quant_conv", axes="1 1 1")


def _encoder(module: WanAutoencoder) -> Iterator[Piece]:
    last, before, number = len(module.channels) - 1, module.channels[0], 0
    for level, features in enumerate(module.channels):
        path, key = f"encoder/down_{level}", "encoder.down_blocks"
        for i in range(module.num_blocks):
            block = f"{key}.{level}.resnets.{i}" if module.residual else f"{key}.{number}"
            yield from _block(f"{path}_{i}", block, before != features)
            before, number = features, number + 1
        if level < last:
            block = f"{key}.{level}.downsampler" if module.residual else f"{key}.{number}"
            yield from _resample(path, block, module.halve_frames[level])
            number += 1
    yield from _ends("encoder", module.channels[-1])


def _decoder(module: WanAutoencoder) -> Iterator[Piece]:
    channels = module.decoder_channels or module.channels
    last, before = len(channels) - 1, channels[-1]
    for level in range(last, -1, -1):
        path, key = f"decoder/up_{level}", f"decoder.up_blocks.{last - level}"
        for i in range(module.num_blocks + 1):
            yield from _block(f"{path}_{i}", f"{key}.resnets.{i}", before != channels[level])
            before = channels[level]
        if level > 0:
            block = f"{key}.upsampler" if module.residual else f"{key}.upsamplers.0"
            yield from _resample(path, block, module.halve_frames[level - 1])
            before = before if module.residual else before // 2
    yield from _ends("decoder", channels[-1])


def _resample(path: str, key: str, frames: bool) -> Iterator[Piece]:
    yield from conv(f"{path}_resample", f"{key}.resample.1")
    if frames:
        yield from conv(f"{path}_time", f"{key}.time_conv", axes="t h w")


def _ends(half: str, width: int) -> Iterator[Piece]:
    yield from conv(f"{half}/stem", f"{half}.conv_in", axes="t h w")
    for i in range(2):
        yield from _block(f"{half}/middle_{i}", f"{half}.mid_block.resnets.{i}", False)
    path, key = f"{half}/middle_attention", f"{half}.mid_block.attentions.0"
    yield Piece(f"{path}/norm/scale", f"{key}.norm.gamma", "d 1 1 -> d")
    for i, name in enumerate(("query", "key", "value")):
        yield from conv1x1(f"{path}/{name}", f"{key}.to_qkv", rows=(i * width, (i + 1) * width))
    yield from conv1x1(f"{path}/out", f"{key}.proj")
    yield Piece(f"{half}/norm/scale", f"{half}.norm_out.gamma", "d 1 1 1 -> d")
    yield from conv(f"{half}/out", f"{half}.conv_out", axes="t h w")


def _block(path: str, key: str, skip: bool) -> Iterator[Piece]:
    for i, name in ((1, "in"), (2, "out")):
        yield Piece(f"{path}/norm_{name}/scale", f"{key}.norm{i}.gamma", "d 1 1 1 -> d")
        yield from conv(f"{path}/conv_{name}", f"{key}.conv{i}", axes="t h w")
    if skip:
        yield from conv1x1(f"{path}/skip", f"{key}.conv_shortcut", axes="1 1 1")
