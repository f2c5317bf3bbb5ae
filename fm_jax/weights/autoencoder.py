"""Rules of `fm_jax.models.Autoencoder`: AutoencoderKL's files, of now and of old, and latent diffusion's own."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp

from fm_jax.checks import check_member, shown
from fm_jax.latents import PIXELS, LatentSpace, latent_space_of
from fm_jax.models.autoencoder import Autoencoder
from fm_jax.weights.rules import Piece, Rules, conv, conv1x1, dense, norm, template_of

Layout = Literal["diffusers", "diffusers_old", "ldm"]

_ATTENTION = {
    "diffusers": ("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    "diffusers_old": ("group_norm", "query", "key", "value", "proj_attn"),
    "ldm": ("norm", "q", "k", "v", "proj_out"),
}


def autoencoder_from_config(config: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder that a `config.json` of diffusers describes, of `AutoencoderKL` or `AutoencoderKLFlux2`.

    Args:
        config: fields that are absent have the class's defaults.

    Raises:
        ValueError: for another class, and a field with a value that is not supported.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a mapping, as config.json holds, got {shown(config)}.")
    name = config.get("_class_name", "AutoencoderKL")
    check_member("_class_name", name, ("AutoencoderKL", "AutoencoderKLFlux2"))
    flux2 = name == "AutoencoderKLFlux2"
    defaults = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 32}
    fields = dict[str, Any](defaults if flux2 else {"block_out_channels": (64,)}) | dict(config)
    channels = tuple(fields["block_out_channels"])
    quantize = fields.get("use_quant_conv", True)
    wanted = {
        "act_fn": "silu",
        "use_post_quant_conv": quantize,
        "out_channels": fields.get("in_channels", 3),
        "batch_norm_eps": 1e-4,
        "patch_size": (2, 2),
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }
    for field, only in wanted.items():
        value = fields.get(field, only)
        value = tuple(value) if isinstance(value, list) else value
        if value != only:
            raise ValueError(f"{field} must be {only!r} for this network, got {shown(value)}.")
    decoder_channels = fields.get("decoder_block_out_channels")
    return Autoencoder(
        channels=channels,
        num_blocks=fields.get("layers_per_block", 1),
        latent_channels=fields.get("latent_channels", 4),
        image_channels=fields.get("in_channels", 3),
        decoder_channels=None if decoder_channels is None else tuple(decoder_channels),
        num_groups=fields.get("norm_num_groups", 32),
        attention=fields.get("mid_block_add_attention", True),
        quantize=quantize,
        statistics=flux2,
        latents=PIXELS if flux2 else latent_space_of(config),
    )


def autoencoder_config(module: Autoencoder) -> dict[str, Any]:
    """The `config.json` of an autoencoder: the inverse of `autoencoder_from_config`.

    Raises:
        ValueError: for another module, or what diffusers' class of this network cannot have.
    """
    if not isinstance(module, Autoencoder):
        raise ValueError(f"module must be an Autoencoder, got {shown(module)}.")
    levels = len(module.channels)
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLFlux2" if module.statistics else "AutoencoderKL",
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(module.channels),
        "layers_per_block": module.num_blocks,
        "act_fn": "silu",
        "latent_channels": module.latent_channels,
        "norm_num_groups": module.num_groups,
        "use_quant_conv": module.quantize,
        "use_post_quant_conv": module.quantize,
        "mid_block_add_attention": module.attention,
    }
    if module.statistics:
        if module.decoder_channels is not None:
            config["decoder_block_out_channels"] = list(module.decoder_channels)
        return config | {"batch_norm_eps": 1e-4, "patch_size": [2, 2]}
    if module.decoder_channels is not None:
        raise ValueError(f"AutoencoderKL has no decoder_channels, got {module.decoder_channels}.")
    return config | _constants(module.latents)


def _constants(latents: LatentSpace) -> dict[str, Any]:
    """The fields of a config that say what `latents` says."""
    if latents.square != 1:
        raise ValueError(f"AutoencoderKL has no constants for squares of latents, got {shown(latents)}.")
    shift, scale = latents.shift, latents.scale
    if not isinstance(shift, tuple) and not isinstance(scale, tuple):
        return {"scaling_factor": scale, "shift_factor": shift or None}
    num = max(len(value) for value in (shift, scale) if isinstance(value, tuple))
    shifts, scales = (value if isinstance(value, tuple) else (value,) * num for value in (shift, scale))
    return {"scaling_factor": 1.0, "latents_mean": list(shifts), "latents_std": [1 / number for number in scales]}


def autoencoder_rules(module: Autoencoder, layout: Layout = "diffusers") -> Rules:
    """Rules of an autoencoder.

    Args:
        module: an `Autoencoder`.
        layout: `"diffusers"`; `"diffusers_old"`, whose attention says query, key, value and proj_attn; `"ldm"`, the
            layout of latent diffusion's own files and of those of SD3 and FLUX, with pointwise convolutions.

    Raises:
        ValueError: for another module or layout.
    """
    if not isinstance(module, Autoencoder):
        raise ValueError(f"module must be an Autoencoder, got {shown(module)}.")
    check_member("layout", layout, get_args(Layout))
    side = module.factor
    template = template_of(module, jnp.zeros((1, side, side, module.image_channels)))
    return Rules(template, tuple(_pieces(module, layout)), ignored=(r"bn\.num_batches_tracked",))


def _pieces(module: Autoencoder, layout: Layout) -> Iterator[Piece]:
    yield from _half("encoder", "down", module.channels, module.num_blocks, module.attention, layout)
    decoder_channels = module.decoder_channels or module.channels
    yield from _half("decoder", "up", decoder_channels, module.num_blocks + 1, module.attention, layout)
    if module.quantize:
        yield from conv1x1("encoder_out", "quant_conv")
        yield from conv1x1("decoder_in", "post_quant_conv")
    if module.statistics:
        yield Piece("latent_mean", "bn.running_mean", "d -> d")
        yield Piece("latent_variance", "bn.running_var", "d -> d")


def _half(
    half: str, way: str, channels: tuple[int, ...], num_blocks: int, attention: bool, layout: Layout
) -> Iterator[Piece]:
    ldm, last = layout == "ldm", len(channels) - 1
    yield from conv(f"{half}/stem", f"{half}.conv_in")
    before = channels[0 if way == "down" else last]
    for level in range(last + 1) if way == "down" else range(last, -1, -1):
        # Latent diffusion numbers levels by their resolution, as we do; diffusers numbers blocks as they are run.
        block = f"{half}.{way}.{level}" if ldm else f"{half}.{way}_blocks.{level if way == 'down' else last - level}"
        for i in range(num_blocks):
            key = f"{block}.block.{i}" if ldm else f"{block}.resnets.{i}"
            yield from _residual(f"{half}/{way}_{level}_{i}", key, before != channels[level], ldm)
            before = channels[level]
        if level < last if way == "down" else level > 0:
            key = f"{block}.{way}sample" if ldm else f"{block}.{way}samplers.0"
            yield from conv(f"{half}/{way}_{level}_resample", f"{key}.conv")
    middle = f"{half}.mid" if ldm else f"{half}.mid_block"
    for i in range(2):
        key = f"{middle}.block_{i + 1}" if ldm else f"{middle}.resnets.{i}"
        yield from _residual(f"{half}/middle_{i}", key, False, ldm)
    if attention:
        path, key = f"{half}/middle_attention", f"{middle}.attn_1" if ldm else f"{middle}.attentions.0"
        first, *names = _ATTENTION[layout]
        yield from norm(f"{path}/norm", f"{key}.{first}")
        for ours, theirs in zip(("query", "key", "value", "out"), names, strict=True):
            yield from (conv1x1 if ldm else dense)(f"{path}/{ours}", f"{key}.{theirs}")
    yield from norm(f"{half}/norm", f"{half}.norm_out" if ldm else f"{half}.conv_norm_out")
    yield from conv(f"{half}/out", f"{half}.conv_out")


def _residual(path: str, key: str, skip: bool, ldm: bool) -> Iterator[Piece]:
    yield from norm(f"{path}/norm_in", f"{key}.norm1")
    yield from conv(f"{path}/conv_in", f"{key}.conv1")
    yield from norm(f"{path}/norm_out", f"{key}.norm2")
    yield from conv(f"{path}/conv_out", f"{key}.conv2")
    if skip:
        yield from conv1x1(f"{path}/skip", f"{key}.nin_shortcut" if ldm else f"{key}.conv_shortcut")
