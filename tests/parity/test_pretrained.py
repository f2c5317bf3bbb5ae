"""Whole systems against diffusers' pipelines: the same folder, noise and prompts, the same latents at every step."""

import importlib
import json
import os

import numpy as np
import pytest
from parity.harness import RECORDS, first_last, random_input, tensors_of

from fm_jax.pretrained import open_pretrained
from fm_jax.schedules import coefficients
from fm_jax.weights.folder import FAMILIES
from fm_jax.weights.save import save

SYSTEMS = [
    "sd3",
    "sd3_without_t5",
    "sd35",
    "flux_dev",
    "flux_schnell",
    "sd15",
    "sd15_plms",
    "sd2_v",
    "sdxl",
    "sdxl_trailing",
    "pixart",
    "dit",
]
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
    if name == "sd15_plms":
        seen = seen[1:]  # the first step is done twice
    if name.startswith("flux"):
        square = (b, h // 2, w // 2, c, 2, 2)
        seen = [np.transpose(each.reshape(square), (0, 3, 1, 4, 2, 5)).reshape(b, c, h, w) for each in seen]
    return np.stack([first_last(each) for each in seen]), images


def request(name):
    """Size and guidance."""
    return ((64, 64) if name == "dit" else (64, 96)), 1.0 if name == "flux_schnell" else 3.0


def check(name, folder, theirs, images):
    """Our latents after every step, and our pictures, against those of diffusers."""
    (height, width), guidance = request(name)
    system = open_pretrained(folder, **({"guided_channels": 4} if name == "dit" else {}))
    drawn = system.draw(
        CLASSES if name == "dit" else PROMPTS,
        noise=random_input("noise", system.state_shape(2, height, width)),
        num_steps=STEPS,
        guidance=guidance,
        height=height,
        width=width,
        trajectory=True,
    )
    ours = np.asarray(drawn.trajectory)[1:]
    if name.startswith("sdxl"):  # whose scheduler goes through x / alpha
        ours = ours / np.asarray(coefficients(system.steps.schedule, drawn.times[1:]).alpha).reshape(-1, 1, 1, 1, 1)
    assert ours.shape == theirs.shape
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(mine - other).max() <= TOLERANCE * max(1, np.abs(other).max()), i
    np.testing.assert_allclose(np.asarray(drawn.images)[:, ::8, ::8], images, atol=2e-4)


@pytest.mark.parity
@pytest.mark.parametrize("name", SYSTEMS)
def test_latents_of_every_step_are_those_of_diffusers(name, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md")
    from parity.folders import write

    pipeline = write(name, tmp_path)
    (height, width), guidance = request(name)
    channels = pipeline.vae.config.latent_channels
    noise = random_input("noise", (2, height // 8, width // 8, channels))
    states, images = of_diffusers(name, pipeline, noise, guidance, height, width)
    images = images[:, ::8, ::8]
    if os.environ.get("FM_JAX_WRITE_RECORDS"):
        texts = {
            str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8")
            for path in sorted(tmp_path.rglob("*"))
            if path.suffix in (".json", ".txt")
        }
        np.savez_compressed(record(name), files=json.dumps(texts), states=states, images=images)
        assert record(name).stat().st_size < 64_000
    check(name, tmp_path, states, images)


def record(name):
    return RECORDS / f"pretrained_{name}.npz"


def write_weights(folder):
    """The safetensors of a part of a system, drawn by key and shape as those were that diffusers wrote."""
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("_class_name") or config["architectures"][0]
    file, prefix = FAMILIES[kind].split(":")
    family = importlib.import_module(f"fm_jax.weights.{file}")
    module = getattr(family, f"{prefix}_from_config")(config)
    options = {"layout": "bare"} if kind == "CLIPTextModel" else {}
    if kind == "DiTTransformer2DModel":
        options = {"size": config["sample_size"]}
    rules = getattr(family, f"{prefix}_rules")(module, **options)
    save(folder / "model.safetensors", rules.to_ours(tensors_of(rules)), rules)


QUICK = ("sd3_without_t5", "dit")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SYSTEMS]
)
def test_record(name, tmp_path):
    with np.load(record(name)) as file:
        texts, states, images = json.loads(str(file["files"])), file["states"], file["images"]
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    if any(path.endswith("tokenizer.json") and '"Unigram"' in text for path, text in texts.items()):
        pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'fm-jax[text]'")
    for path in texts:
        if path.endswith("/config.json"):
            write_weights((tmp_path / path).parent)
    check(name, tmp_path, states, images)
