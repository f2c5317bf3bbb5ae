"""Whole systems against diffusers' pipelines: the same folder, noise and prompts, the same latents at every step."""

import numpy as np
import pytest
from parity.harness import first_last, random_input

from fm_jax.pretrained import open_pretrained
from fm_jax.schedules import coefficients

pytestmark = pytest.mark.parity
SYSTEMS = ["sd3", "sd3_without_t5", "sd35", "flux_dev", "flux_schnell", "sd15", "sd2_v", "sdxl", "pixart", "dit"]
PROMPTS = ["a red boat", "boat"]
CLASSES = [7, 999]
STEPS = 5
TOLERANCE = 1e-4
"""Of a latent, in units of the largest one of its step if that is above 1."""


def of_diffusers(name, pipeline, noise, guidance, height, width):
    """States after every step [num, batch, h, w, c], and the pictures, of diffusers' pipeline."""
    import torch

    seen, step = [], pipeline.scheduler.step

    def keep(*args, **options):
        out = step(*args, **options)
        seen.append((out[0] if isinstance(out, tuple) else out.prev_sample)[: len(noise)].numpy().copy())
        return out

    pipeline.scheduler.step = keep
    latents = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "np"}
    if name == "dit":
        import diffusers.pipelines.dit.pipeline_dit as file

        file.randn_tensor = lambda *args, **options: latents
        images = pipeline(CLASSES, **options).images
        return np.stack([first_last(each) for each in seen]), images
    if name.startswith("flux"):
        b, c, h, w = latents.shape
        latents = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    if name == "flux_schnell":
        options["max_sequence_length"] = 256
    if name == "pixart":
        options |= {"use_resolution_binning": False, "clean_caption": False}
    images = pipeline(prompt=PROMPTS, latents=latents, height=height, width=width, **options).images
    if name.startswith("flux"):
        square = (b, h // 2, w // 2, c, 2, 2)
        seen = [np.transpose(each.reshape(square), (0, 3, 1, 4, 2, 5)).reshape(b, c, h, w) for each in seen]
    return np.stack([first_last(each) for each in seen]), images


@pytest.mark.parametrize("name", SYSTEMS)
def test_latents_of_every_step_are_those_of_diffusers(name, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md")
    from parity.folders import write

    pipeline = write(name, tmp_path)
    options = {"guided_channels": 4} if name == "dit" else {}
    system = open_pretrained(tmp_path, **options)
    height, width = (64, 64) if name == "dit" else (64, 96)
    noise = random_input("noise", system.state_shape(2, height, width))
    guidance = 1.0 if name == "flux_schnell" else 3.0
    theirs, images = of_diffusers(name, pipeline, noise, guidance, height, width)
    drawn = system.draw(
        CLASSES if name == "dit" else PROMPTS,
        noise=noise,
        num_steps=STEPS,
        guidance=guidance,
        height=height,
        width=width,
        trajectory=True,
    )
    ours = np.asarray(drawn.trajectory)[1:]
    if name == "sdxl":  # whose scheduler goes through x / alpha
        ours = ours / np.asarray(coefficients(system.steps.schedule, drawn.times[1:]).alpha).reshape(-1, 1, 1, 1, 1)
    assert ours.shape == theirs.shape
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(mine - other).max() <= TOLERANCE * max(1, np.abs(other).max()), i
    np.testing.assert_allclose(drawn.images, images, atol=2e-4)
