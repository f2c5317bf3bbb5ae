"""Draws pictures from a published system in a local folder, in the layout of diffusers.

Command: `python -m experiments.sample_pretrained --weights stable-diffusion-3.5-medium --prompt "a red boat" \
--steps 28 --guidance 4.5 --out boat.png`

Stable Diffusion 1, 2, XL, 3 and 3.5, FLUX.1 dev and schnell, PixArt, DiT and SiT (`--class 207` in place of a prompt),
with the times, shifts, guidance and latent constants that belong to each. Nothing is downloaded: the folder is what
`save_pretrained` of diffusers writes, or a copy of the published repository with its safetensors. Writes a picture
(`.png`), or arrays (`.npz`: images in [0, 1], latents), and prints the number of network evaluations.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from experiments.lab import command_line, figures
from experiments.lab.options import SEED, as_typed, check_options
from experiments.lab.processes import by_first
from experiments.lab.sampling import nfe_text
from experiments.lab.small_system import write_small_system
from fm_jax.pretrained import Drawn, open_pretrained
from fm_jax.train.folder import make_folder, replacing

_TYPED = {
    "truncate=True": "--truncate",
    "prompts[0]": "--prompt or --class",
    "prompt 0 ": "--prompt ",
    "num_steps": "--steps",
    "guided_channels": "--guided-channels",
    r"^(negative|guidance|height|width|solver|truncate)\b": r"--\1",
}
"""What the library calls its arguments, and what they are here."""


@dataclass(frozen=True)
class Config:
    """What to draw. Options that are not given are those of the system."""

    weights: Path | None = None
    """Folder of the system, with model_index.json."""
    prompt: str | None = None
    """What to draw."""
    negative: str | None = None
    """What to lead away from, for systems that guide by a second evaluation."""
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """What to draw, for DiT and SiT: the number of a class."""
    num: int = 1
    """How many pictures."""
    steps: int | None = None
    """Steps of the sampler."""
    guidance: float | None = None
    """Scale of guidance; 1 is none."""
    height: int | None = None
    """Of the pictures, in pixels."""
    width: int | None = None
    """Of the pictures, in pixels."""
    solver: Literal["ddim", "dpm_solver++"] | None = None
    """In place of the solver that the folder names, for networks of noise."""
    guided_channels: int | None = None
    """How many channels of the latents are guided, for DiT and SiT: 3, as published; diffusers guides all 4."""
    truncate: bool = False
    """Cut a prompt that is too long, instead of refusing it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters; by default that of the files."""
    seed: int = 0
    """Seed of the noise."""
    out: Path = Path("samples.png")
    """Where to: a picture (.png) or arrays (.npz)."""
    smoke: bool = False
    """Draw from a small system with random weights, to see that everything runs."""

    def __post_init__(self) -> None:
        check_options(
            self, num=1, steps=1, height=1, width=1, label=0, guided_channels=1, guidance="[0, inf)", seed=SEED
        )
        if self.out.suffix not in (".png", ".npz"):
            raise ValueError(f"--out must end in .png or .npz, got {self.out}.")
        if self.smoke != (self.weights is None):
            raise ValueError("--weights must be given, the folder of the system; or --smoke, and not both.")
        for name, value in (("--prompt", self.prompt), ("--class", self.label), ("--negative", self.negative)):
            if self.smoke and value is not None:
                raise ValueError(f"{name} has no effect with --smoke, whose network is random. Leave it out.")
        if (self.prompt is None) == (self.label is None) and not self.smoke:
            raise ValueError("--prompt must be given, or --class for DiT and SiT, and not both.")
        if self.label is not None and self.negative is not None:
            raise ValueError("--negative goes with --prompt, and --class was given.")


def run(config: Config) -> None:
    """Opens the system, draws, writes."""
    make_folder(config.out.parent)
    if config.out.is_dir():
        raise SystemExit(f"--out {config.out} is a folder: give a file.")
    with _folder(config) as folder:
        try:
            system = open_pretrained(
                folder,
                dtype=config.dtype,
                solver=config.solver,
                truncate=config.truncate,
                guided_channels=config.guided_channels,
            )
            wanted = 0 if config.smoke else config.label if config.prompt is None else config.prompt
            drawn = system.draw(
                [wanted] * config.num,
                key=jax.random.key(config.seed),
                negative=config.negative,
                num_steps=2 if config.smoke and config.steps is None else config.steps,
                guidance=config.guidance,
                height=config.height,
                width=config.width,
            )
        except (ValueError, ImportError) as error:
            raise SystemExit(as_typed(str(error), _TYPED)) from error
    _write(config, drawn)
    size = f"{drawn.images.shape[1]}x{drawn.images.shape[2]}"
    pictures = "1 picture" if config.num == 1 else f"{config.num} pictures"
    steps = len(drawn.times) - 1
    print(f"{config.out}: {pictures} of {size} by {system.name}, {steps} steps, NFE {nfe_text(drawn.nfe)}")


@contextlib.contextmanager
def _folder(config: Config) -> Iterator[Path]:
    if config.weights is not None:
        yield config.weights
        return
    with tempfile.TemporaryDirectory() as folder:
        write_small_system(Path(folder))
        yield Path(folder)


@by_first
def _write(config: Config, drawn: Drawn) -> None:
    images = np.asarray(drawn.images)
    if config.out.suffix == ".npz":
        with replacing(config.out) as unfinished:
            np.savez(unfinished, images=images, latents=np.asarray(drawn.latents, np.float32))
    else:
        figures.save_sheet(config.out, 2 * images - 1)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
