"""A small KL autoencoder of your own images: the latents that latent diffusion is trained on.

Paper: Rombach et al. 2022 (arXiv:2112.10752), section 3.1, without the discriminator; Kingma & Welling 2014
(arXiv:1312.6114).
Command: `python -m experiments.autoencoder --dataset mnist`; any data of `experiments.images` in its place.
Hardware: two CPU cores for MNIST; an accelerator for more.
Expect: rows of held-out images, each above a row of what is decoded of their latents; PSNR, KL, the statistics of the
latents, and how often a classifier names the decoded images rightly. `RUN/autoencoder` is a folder in diffusers'
layout, with the shift and scale that bring the latents to unit variance; `fm_jax.weights.open_model` opens it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from experiments.lab import command_line
from experiments.lab.data import FACTS, PRESETS, Data, Facts, Loaded, load, read_facts
from experiments.lab.options import check_options, of_smoke
from experiments.lab.perceptual import fit_features
from experiments.lab.processes import by_first, everywhere, from_first, own_folder
from experiments.lab.reconstruction import COLUMNS, is_judged, judge, restore, save_rows, some_images
from experiments.lab.smoke import TRAINING, smoke
from experiments.lab.training import (
    Training,
    check_batch,
    check_run_dir,
    draw_loss,
    files_of,
    is_config_of_run,
    median_rate,
    read_results,
    sampling_params,
    train,
    write_results,
)
from fm_jax.checks import imported
from fm_jax.data.pipeline import batches
from fm_jax.latents import LatentSpace
from fm_jax.losses.autoencoder import kl_autoencoder
from fm_jax.models import Compute, num_params
from fm_jax.models.autoencoder import Autoencoder
from fm_jax.models.compute import once
from fm_jax.train import TrainState
from fm_jax.train.loop import DataIterator
from fm_jax.types import Key, Params
from fm_jax.weights import open_model, save_model

PICTURE, FOLDER = "reconstructions.png", "autoencoder"
ROWS = 5
"""Of images in a picture."""
SMALL = 16
"""Sides below it are halved once by default, others twice."""
SMOKE: dict[str, Any] = {"base_channels": 8, "num_samples": 64, "classifier_steps": 2}
"""The sizes of a smoke run."""
TOLD = {"judged_images", "held_out", "psnr", "absolute_error", "kl", "latent_mean", "latent_std", "latent_noise"}
"""What the results of any run hold."""


@dataclass(frozen=True)
class Config:
    """A run of an autoencoder. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "autoencoder"

    data: Data
    training: Training
    base_channels: int = 32
    """Channels at the resolution of the image; the second level has twice as many, the others four times."""
    levels: int | None = None
    """Levels of resolution; each but the first halves the sides, so that 3 make latents 4 times smaller. By default 3,
    and 2 for sides of less than 16 pixels."""
    num_blocks: int = 1
    """Residual blocks of a level of the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    error: Literal["l1", "l2"] = "l1"
    """Of a pixel: the absolute difference or the squared one."""
    beta: float = 1e-6
    """Weight of the KL of an image in nats, where errors are summed over the image."""
    perceptual: float = 0.0
    """Weight of the differences of maps within a small classifier, which is fitted to the labels first; 0 is none."""
    classifier_steps: int = 500
    """Steps that it is fitted in."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters are float32."""
    flip: bool = False
    """Mirror half of the training images."""
    num_samples: int = 2000
    """Images to judge by: held-out ones for the errors, training images for the statistics of the latents."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, levels=(1, 8), beta="[0, inf)", perceptual="[0, inf)", classifier_steps=1)
        if self.data.latents or self.data.encoded is not None:
            name = "--latents" if self.data.latents else "--encoded"
            raise ValueError(f"{name} must be left out: an autoencoder takes images, which lie in [-1, 1].")
        if self.perceptual and self.data.labels == "none":
            raise ValueError("--perceptual fits a classifier to the labels, and --labels none takes none: give one.")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield from self.data.unused()
        yield from self.training.unused()
        if not self.perceptual:
            yield "classifier_steps", "a classifier is fitted only with --perceptual"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})


CONFIG = Config(
    data=Data(),
    training=Training(
        run_dir=Path("runs/autoencoder"),
        total_steps=2000,
        batch_size=64,
        warmup_steps=50,
        decay="cosine",
        ema_decays=(0.99,),
    ),
)


def build(config: Config, facts: Facts | None = None) -> Autoencoder:
    """The autoencoder for data of which `facts` are known; by default those that lie in the folder of the run."""
    facts = facts or read_facts(config.training.run_dir, config.data)
    levels = config.levels or (2 if min(facts.shape[:2]) < SMALL else 3)
    factor = 2 ** (levels - 1)
    if any(side % factor for side in facts.shape[:2]):
        size = "x".join(map(str, facts.shape))
        raise ValueError(
            f"--levels {levels} halves the sides {levels - 1} times: they must be divisible by {factor}, got the "
            f"images of {facts.source}, {size}."
        )
    return Autoencoder(
        channels=tuple(config.base_channels * min(2**level, 4) for level in range(levels)),
        num_blocks=config.num_blocks,
        latent_channels=config.latent_channels,
        image_channels=facts.shape[-1],
        num_groups=math.gcd(32, config.base_channels),
        compute=Compute(config.dtype),
    )


def run(config: Config) -> dict[str, Any]:
    """Trains, judges, draws, saves the autoencoder; returns the numbers it prints."""
    config = smoke(config, **SMOKE, levels=config.levels or 2, data={"num_images": config.data.num_images or 512})
    folder, run_dir = config.data.folder, config.training.run_dir
    if folder is not None and run_dir.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--run-dir must lie outside of --folder {folder}, whose pictures are data, got {run_dir}.")
    check_batch(config.training)
    if (config.training.steps_per_call or 1) > 1 and jax.default_backend() == "cpu":
        raise ValueError(
            "--steps-per-call must be 1 on CPU, where gradients of convolutions within a loop are some 50 times "
            f"slower, got {config.training.steps_per_call}."
        )
    with own_folder(run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    run_dir = config.training.run_dir
    check_run_dir(config, [PICTURE, "loss.png", FACTS], folders=["samples", FOLDER])
    if config.data.dataset is not None:  # of which enough is known to refuse a network before they are read
        build(config, PRESETS[config.data.dataset])
    loaded = load(config.data)
    model, facts = build(config, loaded.facts), loaded.facts
    found = from_first(lambda: _finished(config, facts))
    if found is not None:
        print(
            f"{run_dir} is finished: these are its results. Remove the folder, or give another --run-dir, to run anew."
        )
        print(_report(config, found))
        return found
    _check_data(config, loaded)
    key_train, key_init, key_classifier = jax.random.split(jax.random.key(config.training.seed), 3)
    params = _init(model, key_init, facts.shape)
    latent_shape = (*(side // model.factor for side in facts.shape[:2]), model.latent_channels)
    print(
        f"{facts.source}: {facts.num_images:,} images {'x'.join(map(str, facts.shape))}, {facts.num_test:,} held out; "
        f"latents {'x'.join(map(str, latent_shape))}, {num_params(params):,} parameters, "
        f"{jax.device_count()} {jax.default_backend()} device(s)"
    )
    seed, steps = config.training.seed, config.classifier_steps
    fitted = fit_features(key_classifier, loaded.train, num_steps=steps, seed=seed) if config.perceptual else None
    loss_fn = kl_autoencoder(
        lambda params, x: model.apply({"params": params}, x, method="encode"),  # type: ignore[arg-type, return-value]
        lambda params, z: model.apply({"params": params}, z, method="decode"),
        beta=config.beta,
        error=config.error,
        features=None if fitted is None else fitted.features,
        feature_weight=config.perceptual,
    )
    share = config.training.batch_size // jax.process_count()
    data: DataIterator = batches(loaded.train, batch_size=share, seed=seed, flip=config.flip)
    shown = some_images(loaded.test or loaded.train, ROWS * COLUMNS)[0]

    def draw(step: int, state: TrainState) -> None:
        params = everywhere(sampling_params(state, config.training))
        save_rows(run_dir / "samples" / f"step_{step:06d}.png", shown, restore(model, params, shown).images)

    state = train(config, key_train, params, loss_fn, data, draw, facts=facts, begin=partial(_begin, config))
    params = jax.device_get(everywhere(sampling_params(state, config.training)))
    save_rows(run_dir / PICTURE, shown, restore(model, params, shown).images)
    results = judge(model, params, loaded, config.num_samples, fitted)
    results["training_images_per_second"] = median_rate(run_dir)
    _save(run_dir / FOLDER, model.clone(latents=_space(results)), params)
    draw_loss(run_dir)
    write_results(run_dir, results)
    print(_report(config, results))
    return results


def _check_data(config: Config, loaded: Loaded) -> None:
    num, size = len(loaded.train.images), config.training.batch_size
    if size > num:
        raise ValueError(f"--batch-size must be at most {num}, the images to train on, got {size}.")
    if config.perceptual and loaded.train.num_classes < 2:
        raise ValueError(f"--perceptual needs images of two classes or more, got those of {loaded.facts.source}.")
    if is_judged(loaded):
        imported("sklearn.svm", "the classifier that judges the reconstructions", "'fm_jax[experiments]'")


def _init(model: Autoencoder, key: Key, shape: tuple[int, ...]) -> Params:
    def init(key: Key) -> Params:
        return model.init(key, jnp.zeros((1, *shape)))["params"]

    return once(init)(key)


def _begin(config: Config, params: Params) -> Params:
    """The parameters that a new run begins with: those that the run of `--init-from` saved, where that is given."""
    run_dir = config.training.init_from
    if run_dir is None:
        return params
    if not (run_dir / FOLDER).is_dir():
        raise ValueError(f"--init-from must be a finished run of this experiment, got {run_dir} without {FOLDER}/.")
    _, theirs = open_model(run_dir / FOLDER)
    if jax.tree.map(jnp.shape, theirs) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"--init-from {run_dir} has another network: give its --base-channels, --levels and --latent-channels."
        )
    print(f"Begins with the parameters of {run_dir / FOLDER}.")
    return jax.tree.map(jnp.asarray, theirs)


def _space(results: dict[str, Any]) -> LatentSpace:
    """The shift and scale of each channel. A file has 1 / scale, of which the reciprocal is to be the scale again."""
    return LatentSpace(tuple(results["latent_mean"]), tuple(1 / (1 / (1 / std)) for std in results["latent_std"]))


@by_first
def _save(folder: Path, model: Autoencoder, params: Params) -> None:
    save_model(folder, model, params)


def _finished(config: Config, facts: Facts) -> dict[str, Any] | None:
    """The results of this very configuration on these very data, if there are any."""
    run_dir = config.training.run_dir
    if not is_config_of_run(config) or not (run_dir / FACTS).is_file() or not (run_dir / FOLDER).is_dir():
        return None
    results = read_results(run_dir)
    return results if results and read_facts(run_dir, config.data) == facts and results.keys() >= TOLD else None


def _report(config: Config, results: dict[str, Any]) -> str:
    run_dir = config.training.run_dir
    files = (PICTURE, "loss.png", f"{FOLDER}/", "metrics.jsonl", "config.json", FACTS, "results.json", "checkpoints/")
    whose = "held-out" if results["held_out"] else "training"
    lines = [
        "\n" + files_of(run_dir, *files),
        f"{results['judged_images']:,} {whose} images: PSNR {results['psnr']:.2f} dB, mean absolute error "
        f"{results['absolute_error']:.4f} of the range 2, KL {results['kl']:,.1f} nats an image",
    ]
    for name, what in (("latent_mean", "mean"), ("latent_std", "deviation"), ("latent_noise", "of which noise")):
        lines.append(f"latents, {what} by channel: {' '.join(f'{each:.3g}' for each in results[name])}")
    if "classifier_accuracy" in results:
        lines.append(
            f"a classifier of real images names {results['classifier_accuracy']:.1%} of the decoded ones rightly "
            f"({results['classifier_accuracy_on_real']:.1%} of the real ones)"
        )
    if "features_accuracy_on_real" in results:
        lines.append(f"the classifier of --perceptual is right on {results['features_accuracy_on_real']:.1%} of them")
    rate = results.get("training_images_per_second")
    lines.append(f"training: {f'{rate:,.0f} images/s' if rate else 'already done'}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
