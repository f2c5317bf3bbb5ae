"""A published system in small, with random weights: a DiT, or a SiT, of ten classes in the layout of diffusers."""

import json
from pathlib import Path

import jax

from fm_jax.models import LabelEmbedding, init_params
from fm_jax.models.autoencoder import Autoencoder
from fm_jax.models.compute import once
from fm_jax.models.conditioning import DDPM, SIT
from fm_jax.models.dit import DiT
from fm_jax.weights.folder import save_model

SIZE = 8
CHANNELS = 4


def write_small_system(folder: Path, *, flow: bool = False) -> None:
    """Writes the folder, a tenth of a megabyte, of a DiT, or of a SiT for a `flow`."""
    embed = LabelEmbedding(10, stddev=0.02)
    dit = DiT(
        hidden=32,
        num_layers=2,
        num_heads=2,
        out_channels=2 * CHANNELS,
        embed=embed,
        border=SIT if flow else DDPM,
        frequency_shift=0.0 if flow else 1.0,
        scan_layers=True,
    )
    autoencoder = Autoencoder(channels=(8, 8), num_blocks=1, latent_channels=CHANNELS, num_groups=4)
    keys = jax.random.split(jax.random.key(0))
    save_model(
        folder / "transformer", dit, init_params(dit, keys[0], (SIZE, SIZE, CHANNELS)), size=SIZE, channels=CHANNELS
    )
    decoded = once(autoencoder.init)(keys[1], jax.numpy.zeros((1, 2 * SIZE, 2 * SIZE, 3)))["params"]
    save_model(folder / "vae", autoencoder, decoded)
    index = {
        "_class_name": "SiTPipeline" if flow else "DiTPipeline",
        "transformer": ["fm_jax", "SiT"] if flow else ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
