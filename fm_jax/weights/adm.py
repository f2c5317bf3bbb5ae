"""ADM's and TorchCFM's keywords of a `fm_jax.models.UNet`; its rules are `unet_rules(module, layout="adm")`."""

from collections.abc import Mapping
from typing import Any

from fm_jax.models.conditioning import DDPM, SIT, Border
from fm_jax.models.unet import Resample, UNet
from fm_jax.models.unet_blocks import ClassEmbedding
from fm_jax.weights.unet import table_rows, width_options

_ADM: dict[str, Any] = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "learn_sigma": True,
    "num_res_blocks": 2,
    "num_channels": 256,
    "num_head_channels": 64,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
ADM_FLAGS: dict[str, dict[str, Any]] = {
    "64": _ADM
    | {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "dropout": 0.1, "use_new_attention_order": True},
    "128": _ADM | {"image_size": 128, "num_heads": 4, "num_head_channels": -1},
    "256": _ADM | {"image_size": 256},
    "256-unconditional": _ADM | {"image_size": 256, "class_cond": False},
    "512": _ADM | {"image_size": 512},
}
"""Flags of the networks of Dhariwal & Nichol 2021 on ImageNet, as guided diffusion's README has them.

The file of `"64"` has the layout `"adm_new"`.
"""

_MULTS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    28: (1, 2, 2),
}
"""Of images of this side, where nothing else is said; the last two are TorchCFM's."""
_UNSEEN = frozenset(
    {"_class_name", "use_checkpoint", "use_fp16", "use_new_attention_order", "diffusion_steps", "noise_schedule"}
    | {"timestep_respacing", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas"}
)
"""What changes no parameter and no output, or how parameters lie in a file alone."""
_SEEN = frozenset(
    {
        "dim",
        "image_size",
        "in_channels",
        "out_channels",
        "learn_sigma",
        "model_channels",
        "num_channels",
        "channel_mult",
    }
    | {"num_res_blocks", "attention_resolutions", "dropout", "conv_resample", "dims", "num_classes", "class_cond"}
    | {"num_heads", "num_head_channels", "num_heads_upsample", "use_scale_shift_norm", "resblock_updown"}
)


def adm_from_config(config: Mapping[str, Any], *, border: Border | None = None) -> UNet:
    """The network of the keywords of guided diffusion's or TorchCFM's U-Net.

    These are those of `UNetModel` (`model_channels`, `attention_resolutions` as rates), the flags of guided diffusion's
    programs (`num_channels`, resolutions as `"32,16,8"`, `class_cond`), or those of TorchCFM's `UNetModelWrapper`
    (`dim = (channels, height, width)`). What is left out has the defaults of `UNetModel` and `create_model`.

    Args:
        config: the keywords. `use_new_attention_order` only says how the file lies: `layout="adm_new"` of `unet_rules`.
        border: `SIT` for a `dim`, as TorchCFM's time and velocity are ours, and `DDPM` otherwise.

    Raises:
        ValueError: for a keyword that is not known, or asks for what this network does not have.
    """
    unknown = sorted(set(config) - _SEEN - _UNSEEN)
    if unknown:
        raise ValueError(f"The keywords of a U-Net of guided diffusion or TorchCFM have no {unknown}.")
    keywords = "model_channels" in config
    missing = sorted({"model_channels" if keywords else "num_channels", "num_res_blocks"} - set(config))
    if missing or not ("dim" in config or "image_size" in config):
        raise ValueError(f"config must have image_size or dim, and {missing or 'what it has'}, got {sorted(config)}.")
    heads, upsampling = config.get("num_heads", 1), config.get("num_heads_upsample", -1)
    if upsampling not in (-1, heads):
        raise ValueError(f"num_heads_upsample must be num_heads = {heads} for a UNet, got {upsampling!r}.")
    if config.get("dims", 2) != 2:
        raise ValueError(f"dims must be 2 for a UNet, got {config['dims']!r}.")

    channels, *sides = config.get("dim", (config.get("in_channels", 3), config.get("image_size")))
    size, base = sides[-1], config["model_channels" if keywords else "num_channels"]
    mults = config.get("channel_mult") or (_MULTS.get(size) if not keywords else (1, 2, 4, 8))
    if mults is None:
        raise ValueError(f"channel_mult must be given for images of side {size}.")
    mults = [float(mult) for mult in (mults.split(",") if isinstance(mults, str) else mults)]
    resolutions = config.get("attention_resolutions", "16")
    given = resolutions.split(",") if isinstance(resolutions, str) else resolutions
    rates = [int(each) if keywords and not isinstance(resolutions, str) else size // int(each) for each in given]
    classes = config.get("num_classes") if keywords else config.get("num_classes", 1000)
    if not keywords and not config.get("class_cond", False):
        classes = None
    head_channels = config.get("num_head_channels", -1)
    resample: Resample = "conv" if config.get("conv_resample", True) else "pool"
    if border is None:
        border = SIT if "dim" in config else DDPM
    return UNet(
        **width_options([round(base * mult) for mult in mults], base, 32),
        num_blocks=config["num_res_blocks"],
        attention_levels=tuple(level for level in range(len(mults)) if 2**level in rates),
        num_heads=heads,
        head_channels=None if head_channels == -1 else head_channels,
        film=config.get("use_scale_shift_norm", False),
        resample="resblock" if config.get("resblock_updown", False) else resample,
        out_channels=config.get("out_channels", 2 * channels if config.get("learn_sigma", False) else channels),
        dropout=float(config.get("dropout", 0.0)),
        embed=None if classes is None else ClassEmbedding(classes),
        in_channels=channels,
        border=border,
    )


def adm_config(module: UNet, *, size: int) -> dict[str, Any]:
    """The keywords of guided diffusion's and TorchCFM's `UNetModel` for a network; the inverse of `adm_from_config`.

    Args:
        module: the network.
        size: side of the images.

    Raises:
        ValueError: for a network that `UNetModel` cannot be.
    """
    widths = [module.channels * mult for mult in module.channel_mults]
    base = module.time_channels or module.channels
    theirs = UNet(in_channels=module.in_channels)  # what UNetModel has no keywords for
    fixed = ("patch_size", "num_groups", "norm_epsilon", "down_padding", "frequency_shift", "sine_first")
    for name in fixed:
        if getattr(module, name) != getattr(theirs, name):
            raise ValueError(f"{name} must be {getattr(theirs, name)} for UNetModel, got {getattr(module, name)}.")
    if any(width % 32 for width in widths) or module.in_channels is None:
        raise ValueError(f"UNetModel has in_channels, and widths that 32 divides, got {widths}.")
    return {
        "_class_name": "UNetModel",
        "image_size": size,
        "in_channels": module.in_channels,
        "model_channels": base,
        "out_channels": module.in_channels if module.out_channels is None else module.out_channels,
        "num_res_blocks": module.num_blocks,
        "attention_resolutions": [2**level for level in module.attention_levels],
        "dropout": module.dropout,
        "channel_mult": [width // base if width % base == 0 else width / base for width in widths],
        "conv_resample": module.resample != "pool",
        "num_classes": table_rows(module),
        "num_heads": module.num_heads,
        "num_head_channels": -1 if module.head_channels is None else module.head_channels,
        "use_scale_shift_norm": module.film,
        "resblock_updown": module.resample == "resblock",
    }
