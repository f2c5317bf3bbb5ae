"""Published systems, opened from a local folder in the layout of diffusers and sampled as they were published."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fm_jax.checks import check_bool, shown
from fm_jax.pretrained.dit import dit
from fm_jax.pretrained.flux import flux
from fm_jax.pretrained.parts import INDEX, Parts
from fm_jax.pretrained.pixart import pixart
from fm_jax.pretrained.stable_diffusion import stable_diffusion, stable_diffusion_xl
from fm_jax.pretrained.stable_diffusion_3 import stable_diffusion_3
from fm_jax.pretrained.steps import Steps, steps_of
from fm_jax.pretrained.system import Drawn, Request, System
from fm_jax.weights.formats import WeightsError

__all__ = ["PIPELINES", "Drawn", "Request", "Steps", "System", "open_pretrained", "steps_of"]

PIPELINES: dict[str, Callable[..., System]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPipeline": pixart,
    "DiTPipeline": dit,
    "SiTPipeline": dit,
}
"""By the class that `model_index.json` names."""


def open_pretrained(
    folder: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Any = None,
    solver: str | None = None,
    truncate: bool = False,
    guided_channels: int | None = None,
) -> System:
    """Opens a published system: its networks, tokenizers, latent space and time grid.

    Args:
        folder: with `model_index.json`, as `save_pretrained` of a pipeline of diffusers writes it.
        dtype: of the parameters; by default that of the files.
        sharding: where the parameters go, see `fm_jax.weights.load`.
        solver: `"ddim"` or `"dpm_solver++"` in place of the scheduler that the folder names, for networks of noise.
        truncate: whether a prompt that is too long loses its end; otherwise it is refused.
        guided_channels: how many channels of the latents of a DiT or SiT are guided, 3 by default.

    Raises:
        WeightsError: names the file and the fault.
        ValueError: for an option without effect, or a scheduler that is not sampled here.

    Example:
        >>> system = open_pretrained("stable-diffusion-3.5-medium")  # doctest: +SKIP
        >>> drawn = system.draw("a red boat", key=jax.random.key(0))  # doctest: +SKIP
    """
    check_bool("truncate", truncate)
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"folder must be a path, got {shown(folder)}.")
    parts = Parts(Path(folder), dtype, sharding)
    name = parts.index().get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise WeightsError(
            f"{parts.folder / INDEX} must name one of {', '.join(PIPELINES)} as _class_name, got {shown(name)}."
        )
    options: dict[str, Any] = {"solver": solver}
    if PIPELINES[name] is dit:
        if truncate:
            raise ValueError(f"truncate must be False for a {name}, which takes no texts, got True.")
        if guided_channels is not None:
            options["guided_channels"] = guided_channels
    elif guided_channels is not None:
        raise ValueError(f"guided_channels must be None for a {name}: all channels are guided, got {guided_channels}.")
    else:
        options["truncate"] = truncate
    return PIPELINES[name](parts, **options)
