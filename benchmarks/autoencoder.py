"""What TAEF2, the tiny autoencoder of FLUX.2's latents, restores of the photographs of CIFAR-10, in decibels.

Command: `python -m benchmarks.autoencoder --encoder taef2_encoder.safetensors --decoder taef2_decoder.safetensors`

The files are those of https://github.com/madebyollin/taesd (MIT), each converted by `python -m fm_jax.weights.convert
taef2_encoder.pth taef2_encoder.safetensors`. Photographs of another size than 32 are enlarged by linear interpolation
first. PSNR is that of restored images, clipped to [-1, 1], as a mean over images, and that of the mean error.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lab import lines, record, write
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.data.images import load_images, to_float
from fm_jax.models.tiny_autoencoder import TinyAutoencoder, make_tiny_autoencoder
from fm_jax.types import Params
from fm_jax.weights.load import load
from fm_jax.weights.tiny_autoencoder import Half, tiny_autoencoder_rules


@dataclass(frozen=True)
class Config:
    """What to restore."""

    encoder: Path
    """File of the encoder."""
    decoder: Path
    """File of the decoder."""
    out: Path = Path("runs/benchmark_autoencoder")
    """Where the results go."""
    data_dir: Path | None = None
    """Where TFDS keeps its datasets; the environment variable TFDS_DATA_DIR by default."""
    sizes: tuple[int, ...] = (32, 64)
    """Sides of the images, divisible by 8."""
    num_images: int = 10_000
    """Of the test split, the first ones."""
    batch_size: int = 200
    """Images at a time."""

    def __post_init__(self) -> None:
        check_options(self, num_images=(1, 10_000))
        for size in self.sizes:
            if size % 8:
                raise ValueError(f"--sizes must be divisible by 8, got {size}.")


def measure(model: TinyAutoencoder, params: Params, images: np.ndarray, size: int, batch_size: int) -> dict[str, Any]:
    """PSNR in dB and statistics of the latents, of uint8 images [n, h, w, 3] enlarged to `size`."""

    @jax.jit
    def restore(x: jax.Array) -> tuple[jax.Array, ...]:
        if x.shape[1] != size:
            x = jnp.clip(jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "linear"), -1, 1)
        z = jnp.asarray(model.apply({"params": params}, x, method="encode"))
        decoded = jnp.clip(jnp.asarray(model.apply({"params": params}, z, method="decode")), -1, 1)
        return jnp.square((decoded - x) / 2).mean(axis=(1, 2, 3)), z.mean(axis=(1, 2, 3)), (z**2).mean(axis=(1, 2, 3))

    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    found = [jax.device_get(restore(to_float(batch))) for batch in batches]
    error, mean, square = (np.concatenate(each).astype(np.float64) for each in zip(*found, strict=True))
    return {
        "size": size,
        "images": len(images),
        "psnr": float(-10 * np.log10(error).mean()),
        "psnr_of_mean_error": float(-10 * np.log10(error.mean())),
        "latent_mean": float(mean.mean()),
        "latent_std": float(np.sqrt(square.mean() - mean.mean() ** 2)),
    }


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    model = make_tiny_autoencoder("taef2")
    encoder, decoder = (tiny_autoencoder_rules(model, "official", half) for half in get_args(Half))
    params = load(config.encoder, encoder, dtype=jnp.float32) | load(config.decoder, decoder, dtype=jnp.float32)
    images = np.asarray(load_images("cifar10", f"test[:{config.num_images}]", data_dir=config.data_dir).images)
    rows = [measure(model, params, images, size, config.batch_size) for size in config.sizes]
    results = {"record": record(None), "rows": rows}
    head = ("side", "images", "PSNR, dB", "of the mean error, dB", "latents: mean", "standard deviation")
    cells = [
        [
            row["size"],
            row["images"],
            *(f"{row[key]:.2f}" for key in ("psnr", "psnr_of_mean_error")),
            *list(row.values())[4:],
        ]
        for row in rows
    ]
    write(config.out, "autoencoder", results, [f"### TAEF2 on CIFAR-10, test\n\n{lines(head, cells)}"])
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
