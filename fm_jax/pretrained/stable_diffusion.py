"""Stable Diffusion 1, 2 and XL: a conditional U-Net that predicts noise in latents of 4 channels."""

from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.models.conditioning import Conditions
from fm_jax.pretrained.parts import Parts, check_texts, told_and_null
from fm_jax.pretrained.system import Request, System


def stable_diffusion(parts: Parts, *, solver: str | None = None, truncate: bool = False) -> System:
    """The system of a folder of Stable Diffusion 1 or 2; see `open_pretrained`."""
    clip = parts.encoder("", truncate=truncate)

    def conditions(request: Request) -> tuple[Any, Any]:
        texts = check_texts(request.prompts, "Stable Diffusion")
        return told_and_null(lambda texts: Conditions(tokens=clip(texts)[0].last), texts, request)

    return _system("StableDiffusionPipeline", parts, solver, conditions, 7.5)


def stable_diffusion_xl(parts: Parts, *, solver: str | None = None, truncate: bool = False) -> System:
    """The system of a folder of Stable Diffusion XL; see `open_pretrained`.

    The network is told that nothing has been cropped and that the original size is the one asked for.
    """
    clips = [parts.encoder(suffix, truncate=truncate) for suffix in ("", "_2")]
    zeros = parts.index().get("force_zeros_for_empty_prompt", True)

    def tell(texts: list[str], sizes: list[int]) -> Conditions:
        features = [encode(texts)[0] for encode in clips]
        tokens = jnp.concatenate([each.hidden[-2] for each in features], axis=-1)
        pooled: Any = features[-1].projected
        return Conditions(vector=_with_sizes(pooled, sizes), tokens=tokens)

    def conditions(request: Request) -> tuple[Any, Any]:
        texts = check_texts(request.prompts, "Stable Diffusion XL")
        sizes = [request.height, request.width, 0, 0, request.height, request.width]
        if request.guidance == 1 or request.negative is not None or not zeros:
            return told_and_null(lambda texts: tell(texts, sizes), texts, request)
        told: Any = tell(texts, sizes)
        pooled = jnp.zeros((len(texts), told.vector.shape[1] - len(sizes)))
        return told, Conditions(vector=_with_sizes(pooled, sizes), tokens=jnp.zeros_like(told.tokens))

    return _system("StableDiffusionXLPipeline", parts, solver, conditions, 5.0)


def _with_sizes(pooled: jax.Array, sizes: list[int]) -> jax.Array:
    numbers = jnp.broadcast_to(jnp.asarray(sizes, jnp.float32), (len(pooled), len(sizes)))
    return jnp.concatenate([pooled.astype(jnp.float32), numbers], axis=1)


def _system(name: str, parts: Parts, solver: str | None, conditions: Any, guidance: float) -> System:
    networks = parts.networks("unet")
    return System(
        name=name,
        **networks,
        steps=parts.steps(solver),
        conditions=conditions,
        patch_size=2 ** (len(networks["module"].widths) - 1),
        num_steps=50,
        guidance=guidance,
    )
