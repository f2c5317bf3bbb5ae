"""DiT and SiT: pictures of a class, in latents of 4 channels."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fm_jax.guidance import FirstChannels
from fm_jax.pretrained.parts import Parts
from fm_jax.pretrained.steps import Steps
from fm_jax.pretrained.system import Request, System
from fm_jax.samplers import RungeKutta, grids
from fm_jax.schedules import Linear


def dit(parts: Parts, *, solver: str | None = None, guided_channels: int = 3) -> System:
    """The system of a folder of a DiT or SiT; see `open_pretrained`.

    Args:
        parts: the folder.
        solver: in place of the folder's scheduler.
        guided_channels: how many channels of the latents are guided: 3 of 4, as the papers' FIDs have it; 4 is what
            diffusers does.
    """
    networks = parts.networks("transformer")
    module = networks["module"]
    name = parts.index()["_class_name"]
    num_classes = module.embed.num_classes

    def conditions(request: Request) -> tuple[Any, Any]:
        if request.negative is not None:
            raise ValueError("negative must be left out for a network of classes.")
        for i, label in enumerate(request.prompts):
            if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < num_classes:
                raise ValueError(f"prompts[{i}] must be a class from 0 to {num_classes - 1} for {name}, got {label!r}.")
        labels = jnp.asarray(request.prompts, jnp.int32)
        return labels, None if request.guidance == 1 else jnp.full_like(labels, num_classes)

    return System(
        name=name,
        **networks,
        steps=_flow(solver) if name == "SiTPipeline" else parts.steps(solver),
        conditions=conditions,
        patch_size=module.patch_size,
        num_steps=250 if name == "SiTPipeline" else 50,
        guidance=4.0,
        rule=FirstChannels(guided_channels),
    )


def _flow(solver: str | None) -> Steps:
    """SiT's own: the flow by Heun's method on even times."""
    if solver is not None:
        raise ValueError(f"solver must be None for a flow, got {solver!r}.")
    return Steps("velocity", Linear(), RungeKutta("heun"), lambda num_steps, num_tokens: grids.uniform(num_steps))
