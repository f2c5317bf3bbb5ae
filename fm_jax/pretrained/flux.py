"""FLUX.1 dev and schnell: pooled CLIP and T5, a network that is told its guidance, latents of 16 channels."""

from typing import Any

import jax.numpy as jnp

from fm_jax.models.conditioning import Conditions
from fm_jax.pretrained.parts import Parts, check_texts
from fm_jax.pretrained.system import Request, System


def flux(parts: Parts, *, solver: str | None = None, truncate: bool = False) -> System:
    """The system of a folder; see `open_pretrained`.

    Dev is told a guidance scale and evaluated once a step; schnell knows none, and four steps are enough for it.
    """
    networks = parts.networks("transformer")
    module = networks["module"]
    if module.local_channels:
        raise ValueError("The network wants an image beside the prompt (Fill, Canny, Depth): call it as a module.")
    dev = module.guidance
    clip = parts.encoder("", truncate=truncate)
    t5 = parts.encoder("_2", length=512 if dev else 256, truncate=truncate)

    def conditions(request: Request) -> tuple[Any, Any]:
        texts = check_texts(request.prompts, "FLUX")
        if request.negative is not None:
            raise ValueError("negative must be left out for FLUX: guidance is told to the network, not computed.")
        if not dev and request.guidance != 1:
            raise ValueError(f"guidance must be 1 for FLUX schnell, which knows no other, got {request.guidance:g}.")
        scale = jnp.full(len(texts), request.guidance, jnp.float32) if dev else None
        return Conditions(vector=clip(texts)[0].pooled, tokens=t5(texts)[0].last, guidance=scale), None

    return System(
        name="FluxPipeline",
        **networks | {"sizes": (128 * networks["factor"],) * 2},  # not what its configuration says
        steps=parts.steps(solver, even_first=True),
        conditions=conditions,
        patch_size=2,
        num_steps=28 if dev else 4,
        guidance=3.5 if dev else 1.0,
        told=dev,
    )
