"""PixArt-alpha and PixArt-Sigma: masked T5, a transformer with cross-attention that predicts noise and its variance."""

from typing import Any

import jax.numpy as jnp

from fm_jax.models.conditioning import Conditions
from fm_jax.pretrained.parts import Parts, check_texts, told_and_null
from fm_jax.pretrained.system import Request, System


def pixart(parts: Parts, *, solver: str | None = None, truncate: bool = False) -> System:
    """The system of a folder; see `open_pretrained`.

    Prompts lose their capitals and the white space around them, as the network has learned.
    """
    networks = parts.networks("transformer")
    module = networks["module"]
    sigma = parts.index()["_class_name"] == "PixArtSigmaPipeline"
    t5 = parts.encoder("", length=300 if sigma else 120, truncate=truncate, masked=True)

    def tell(texts: list[str], height: int, width: int) -> Conditions:
        features, mask = t5([text.lower().strip() for text in texts])
        sizes = jnp.asarray([height, width, height / width], jnp.float32)
        vector = jnp.broadcast_to(sizes, (len(texts), 3)) if module.size_conditions else None
        return Conditions(vector=vector, tokens=features.last, mask=mask)

    def conditions(request: Request) -> tuple[Any, Any]:
        texts = check_texts(request.prompts, "PixArt")
        return told_and_null(lambda texts: tell(texts, request.height, request.width), texts, request)

    return System(
        name="PixArtSigmaPipeline" if sigma else "PixArtAlphaPipeline",
        **networks,
        steps=parts.steps(solver),
        conditions=conditions,
        patch_size=module.patch_size,
        num_steps=20,
        guidance=4.5,
    )
