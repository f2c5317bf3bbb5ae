"""Flow matching on latents: images encoded once, a network trained on their latents, samples decoded.

Paper: Rombach et al. 2022 (arXiv:2112.10752) for latents, Lipman et al. 2022 (arXiv:2210.02747) for the method.
Command: `python -m experiments.encode --dataset cifar10 --autoencoder FOLDER --out latents/cifar10`, and then
`python -m experiments.latent --encoded latents/cifar10`. Each epoch draws the latents anew from their mean and
deviation; with `--flip` half are those of mirrored images, which `experiments.encode --flip` has written. Any other
data of `experiments.images` are trained on as they are, in pixels, with the same numbers as there.
Hardware: two CPU cores for latents of some hundred numbers and `--model dit_tiny`; an accelerator for more.
Expect: as `experiments.images`, of decoded samples; beside their numbers what the autoencoder alone makes of held-out
images: what is lost there no model of the latents brings back. `docs/howto/latents.md` goes through it.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import encode
from experiments.lab import command_line, images
from experiments.lab.data import SOURCES, Data
from experiments.lab.sampling import Sampling
from experiments.lab.small_codec import write_small_autoencoder
from experiments.lab.training import Training


@dataclass(frozen=True)
class Config(images.Config):
    """A run on latents. The command line has an option for every field."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        of_data = self
        if self.smoke and all(getattr(self.data, name) is None for name in SOURCES):  # which has its own
            of_data = _with(self, encoded=Path("."))
        yield from images.Config.unused(of_data)


CONFIG = Config(
    data=Data(),
    model="dit_tiny",
    training=Training(
        run_dir=Path("runs/latent"),
        total_steps=10_000,
        batch_size=64,
        warmup_steps=100,
        decay="cosine",
        ema_decays=(0.999,),
        sample_every=2000,
    ),
    sampling=Sampling(sample_batch=50),
    num_samples=200,
)


def run(config: Config) -> dict[str, Any]:
    """Trains, samples, decodes, judges, draws; returns the numbers it prints."""
    if config.smoke and all(getattr(config.data, name) is None for name in SOURCES):
        with tempfile.TemporaryDirectory() as folder:
            return images.run(_with(config, encoded=_small(Path(folder))))
    places = {name: getattr(config.data, name) for name in ("encoded", "decoder")}
    # As they are found from anywhere.
    return images.run(_with(config, **{name: path.absolute() for name, path in places.items() if path is not None}))


def _with(config: Config, **of_data: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **of_data))


def _small(folder: Path) -> Path:
    """Latents of some digits by a random autoencoder, for a smoke run."""
    write_small_autoencoder(folder / "autoencoder")
    of_digits = encode.Config(
        data=Data(dataset="digits", num_images=128),
        autoencoder=folder / "autoencoder",
        out=folder,
        flip=True,
        batch_size=32,
    )
    return encode.encode_images(of_digits, progress=False).folder


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
