"""Stable Diffusion 3 and 3.5: three text encoders, an MM-DiT, latents of 16 channels."""

from typing import Any

import jax.numpy as jnp

from fm_jax.models.conditioning import Conditions
from fm_jax.pretrained.parts import Parts, check_texts, told_and_null
from fm_jax.pretrained.system import Request, System

T5_LENGTH = 256


def stable_diffusion_3(parts: Parts, *, solver: str | None = None, truncate: bool = False) -> System:
    """The system of a folder; see `open_pretrained`.

    The texts of both CLIP encoders, their states before the last block side by side and padded with zeros to the width
    of T5's, stand before those of T5. Without T5 zeros take its place.
    """
    networks = parts.networks("transformer")
    module = networks["module"]
    clips = [parts.encoder(suffix, truncate=truncate) for suffix in ("", "_2")]
    with_t5 = parts.has("text_encoder_3")
    t5 = parts.encoder("_3", length=T5_LENGTH, truncate=truncate) if with_t5 else None
    width = module.token_dim

    def tell(texts: list[str]) -> Conditions:
        features = [encode(texts)[0] for encode in clips]
        states = jnp.concatenate([each.hidden[-2] for each in features], axis=-1)
        states = jnp.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1])))
        long = jnp.zeros((len(texts), T5_LENGTH, width)) if t5 is None else t5(texts)[0].last
        pooled: Any = [each.projected for each in features]
        return Conditions(vector=jnp.concatenate(pooled, axis=-1), tokens=jnp.concatenate([states, long], axis=1))

    def conditions(request: Request) -> tuple[Any, Any]:
        return told_and_null(tell, check_texts(request.prompts, "Stable Diffusion 3"), request)

    return System(
        name="StableDiffusion3Pipeline",
        **networks,
        steps=parts.steps(solver),
        conditions=conditions,
        patch_size=module.patch_size,
        num_steps=28,
        guidance=7.0,
    )
