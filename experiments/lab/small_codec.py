"""A small autoencoder and a small text encoder with random weights, in folders as published ones come."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from fm_jax.models.autoencoder import Autoencoder
from fm_jax.models.compute import once
from fm_jax.text import make_t5
from fm_jax.weights import save_model


def write_small_autoencoder(folder: Path, *, image_channels: int = 1, seed: int = 0) -> None:
    """Writes an autoencoder that halves its images, with four channels of latents."""
    module = Autoencoder(
        channels=(8, 8), num_blocks=1, latent_channels=4, image_channels=image_channels, num_groups=4, attention=False
    )
    image = jnp.zeros((1, 4, 4, image_channels))
    save_model(folder, module, once(module.init)(jax.random.key(seed), image)["params"])


def write_small_text_encoder(folder: Path) -> None:
    """Writes a T5 of bytes, with its tokenizer."""
    module = make_t5("tiny", hidden=16, num_layers=2, head_dim=8, mlp=16)
    save_model(folder, module, once(module.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
