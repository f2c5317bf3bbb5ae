"""Images as tokens: masked diffusion of grey levels, or of black and white, with classes and their guidance.

Papers: Shi et al. 2024 (arXiv:2406.04329) for masked diffusion of pixels, Nisonoff et al. 2024 (arXiv:2406.01572) and
Ho & Salimans 2022 (arXiv:2207.12598) for the guidance.
Command: `python -m experiments.token_images --dataset digits`; of MNIST in 256 levels or in black and white
`python -m experiments.token_images --dataset mnist --levels 256`, `--levels 2`; any data of `experiments.images`.
Hardware: minutes on two CPU cores for the digits of scikit-learn; see `experiments/README.md`.
Expect: samples whose class a support vector machine names as it was asked for, more often with guidance than without,
and bits a pixel that are a bound on the likelihood of held-out images given their class.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from experiments.lab import command_line
from experiments.lab.data import FACTS, Data, Facts, load, read_facts
from experiments.lab.experiment import Experiment
from experiments.lab.figures import save_grid
from experiments.lab.images import NETWORKS, check_fits, in_unit_range
from experiments.lab.judge import fit_classifier
from experiments.lab.levels import to_levels, to_pixels
from experiments.lab.options import check_options, of_smoke
from experiments.lab.processes import everywhere, mean_of_shares, own_folder
from experiments.lab.sampling import Generate, check_dropout, generate_many
from experiments.lab.scenes import FreshBatches
from experiments.lab.smoke import TRAINING, smoke
from experiments.lab.token_bounds import total_nats
from experiments.lab.token_sampling import TokenSampling, generator_of_tokens
from experiments.lab.training import (
    Training,
    check_batch,
    check_run_dir,
    draw_loss,
    files_of,
    median_rate,
    sampling_params,
    train,
    write_results,
)
from fm_jax import losses
from fm_jax.conditions import DropCondition
from fm_jax.data.images import ImageDataset
from fm_jax.likelihood import token_bound
from fm_jax.models import LabelEmbedding, PixelTokens, linen_apply, num_params
from fm_jax.parameterization import bind
from fm_jax.paths import MixturePath
from fm_jax.schedules import Linear
from fm_jax.sources import Masked
from fm_jax.train import TrainState
from fm_jax.types import Array, Key, Params

PICTURES = ("samples.png", "loss.png")
LOSSES = {"masked_elbo": losses.masked_elbo, "cross_entropy": losses.cross_entropy}
ROWS, COLUMNS, REAL = 10, 10, 3
"""Of the grid of samples, and the real images beside each row."""


@dataclass(frozen=True)
class Config:
    """A run on images as tokens. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "token_images"

    data: Data
    training: Training
    levels: int = 17
    """Grey levels, each a token: 2 is black and white, cut at one half; 17 those of the digits, 256 those of a byte."""
    loss: Literal["masked_elbo", "cross_entropy"] = "masked_elbo"
    """The bound on the likelihood, or the cross entropy of the masked pixels, all times alike."""
    model: Literal["tiny", "mnist_fast", "mnist", "dit_tiny", "smoke_unet"] = "tiny"
    """Network behind the embedding of the levels: a U-Net, or a DiT; that of a smoke run is too small to learn."""
    sampling: TokenSampling = field(default_factory=lambda: TokenSampling(solver="mixture_steps", guidance=2.0))
    label_dropout: float = 0.1
    """Probability that an example is trained without its label, for classifier-free guidance."""
    num_samples: int = 1000
    """Samples to judge at the end, and held-out images whose likelihood is bounded."""
    num_times: int = 32
    """Evaluations for the bound of each image, even: half as many strata of times."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, levels=(2, 256), label_dropout="[0, 1)", num_times=2)
        check_dropout("--label-dropout", self.label_dropout, self.sampling.guidance, "a label")
        if self.num_times % 2:
            raise ValueError(f"--num-times must be even, two draws in each stratum, got {self.num_times}.")
        if self.data.encoded is not None or self.data.latents:
            raise ValueError("--encoded and --latents must be left out: latents are no grey levels.")
        if self.data.labels == "none":
            raise ValueError("--labels must be given: samples are judged by their classes, got none.")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield "training.init_from", "token_images begins with parameters of its own"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        yield from self.data.unused()
        yield from self.training.unused()
        yield from self.sampling.unused()


SMOKE: dict[str, Any] = {
    "model": "smoke_unet",
    "sampling": {"solver": "mixture_steps", "steps": 2, "sample_batch": 20},
    "num_samples": 20,
    "num_times": 2,
}
"""The sizes of a smoke run."""
CONFIG = Config(
    data=Data(),
    training=Training(
        run_dir=Path("runs/token_images"),
        total_steps=600,
        batch_size=128,
        learning_rate=2e-3,
        warmup_steps=50,
        decay="cosine",
        ema_decays=(0.99,),
        log_every=20,
        save_every=250,
        sample_every=500,
    ),
)


def build(config: Config, facts: Facts | None = None) -> Experiment:
    """The network for data of which `facts` are known; by default those that lie in the folder of the run."""
    facts = facts or read_facts(config.training.run_dir, config.data)
    num_classes, mask = len(facts.class_names), config.levels
    if not num_classes:
        raise ValueError(
            f"The images of {facts.source} must have classes, by which samples are judged: they have none."
        )
    path = MixturePath(Linear(), Masked(mask + 1, mask))
    embed = LabelEmbedding(num_classes)
    network = NETWORKS[config.model](embed=embed, out_channels=facts.shape[-1] * (mask + 1))
    model = PixelTokens(network, mask + 1, mask=mask)
    check_fits(model, config.model, facts)
    drop = DropCondition(config.label_dropout, null_cond=num_classes)
    apply_fn = linen_apply(model)
    return Experiment(model, apply_fn, path.source, facts.shape, num_classes, drop, path=path, levels=config.levels)


def run(config: Config) -> dict[str, Any]:
    """Trains, samples, judges, draws; returns the numbers it prints."""
    config = smoke(config, **SMOKE, data={"num_images": config.data.num_images or 512})
    check_batch(config.training)
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    run_dir, levels = config.training.run_dir, config.levels
    check_run_dir(config, [*PICTURES, FACTS], folders=["samples"])
    loaded = load(config.data)
    facts = loaded.facts
    experiment = build(config, facts)
    assert experiment.path is not None
    real, labels = to_levels(in_unit_range(loaded.train), levels).astype(np.uint8), np.asarray(loaded.train.labels)
    key_train, key_init, key_draw, key_bound = jax.random.split(jax.random.key(config.training.seed), 4)
    params = experiment.init_params(key_init)
    print(
        f"{facts.source}: {facts.num_images:,} images {'x'.join(map(str, facts.shape))} in {levels} levels, "
        f"{len(facts.class_names)} classes, {facts.num_test:,} held out, {config.model} with {num_params(params):,} "
        f"parameters, {jax.device_count()} {jax.default_backend()} device(s)"
    )

    def some(rng: np.random.Generator, step: int, num: int) -> dict[str, Any]:
        which = rng.integers(len(real), size=num)
        return {"x1": real[which].astype(np.int32), "cond": labels[which].astype(np.int32)}

    data = FreshBatches(some, config.training.seed, config.training.batch_size // jax.process_count())
    loss_fn = LOSSES[config.loss](experiment.apply_fn, experiment.path, drop=experiment.drop)
    generate = generator_of_tokens(config, experiment)

    def draw(step: int, state: TrainState) -> None:
        asked = np.arange(min(config.sampling.sample_batch, ROWS * COLUMNS)) % len(facts.class_names)
        params = sampling_params(state, config.training)
        found, _ = generate_many(generate, params, key_draw, experiment, asked, len(asked))
        _save(run_dir / "samples" / f"step_{step:06d}.png", experiment, found, asked, loaded.train)

    state = train(config, key_train, params, loss_fn, data, draw, facts=facts)
    params = everywhere(sampling_params(state, config.training))
    results = judge(config, experiment, params, key_draw, loaded.train, loaded.test, generate)
    results |= bound(config, experiment, params, key_bound, loaded.train if loaded.test is None else loaded.test)
    results["held_out"] = loaded.test is not None
    results["training_images_per_second"] = median_rate(run_dir)
    draw_loss(run_dir)
    write_results(run_dir, results)
    print(_report(config, results))
    return results


def judge(
    config: Config,
    experiment: Experiment,
    params: Params,
    key: Key,
    train_images: ImageDataset,
    test: ImageDataset | None,
    generate: Generate,
) -> dict[str, Any]:
    """How often a classifier of images in so many levels agrees with the class that was asked for, guided and not."""
    assert experiment.num_classes is not None
    seen = lambda images: to_pixels(to_levels(in_unit_range(images), config.levels), config.levels)  # noqa: E731
    first = train_images.subset(slice(10_000))
    classify = fit_classifier(seen(first), first.labels)
    asked, size = np.arange(config.num_samples) % experiment.num_classes, config.sampling.sample_batch
    results: dict[str, Any] = {}
    if test is not None:
        results["classifier_accuracy_on_real"] = mean_of_shares(
            lambda x, y: classify(x) == y, seen(test), np.asarray(test.labels)
        )
    for name, each in {"guided": generate, "unguided": generator_of_tokens(config, experiment, 1.0)}.items():
        generate_many(each, params, key, experiment, asked[:size], size)  # compiles
        start = time.perf_counter()
        found, nfe = generate_many(each, params, key, experiment, asked, size)
        seconds = (time.perf_counter() - start) / (-(-config.num_samples // size) * size)
        agreement = mean_of_shares(lambda x, y: classify(x) == y, experiment.visible(found), asked)
        results[name] = {"agreement": agreement, "nfe": nfe, "seconds_per_image": seconds}
        if name == "guided":
            _save(config.training.run_dir / "samples.png", experiment, found, asked, train_images)
    return results


def bound(config: Config, experiment: Experiment, params: Params, key: Key, images: ImageDataset) -> dict[str, float]:
    """The bound on the likelihood of images given their class: bits a pixel, with their standard error, and nats."""
    path, some = experiment.path, images.subset(slice(config.num_samples))
    assert path is not None
    x1, labels = to_levels(in_unit_range(some), config.levels), np.asarray(some.labels)

    def of(params: Params, key: Key, x1: Array, labels: Array) -> tuple[Array, Array]:
        network = bind(experiment.apply_fn, params)
        denoiser = lambda t, x: network(t, x, labels)  # noqa: E731
        return token_bound(denoiser, path, key, x1, bound="mask", num_times=config.num_times)

    nats, error = total_nats(of, params, key, min(len(x1), config.sampling.sample_batch), x1, labels)
    bits = len(x1) * math.prod(experiment.event_shape) * math.log(2)
    return {
        "nats_per_image": nats / len(x1),
        "bits_per_pixel": nats / bits,
        "bits_standard_error": error / bits,
        "bounded_images": len(x1),
    }


def _save(path: Path, experiment: Experiment, tokens: np.ndarray, asked: np.ndarray, real: ImageDataset) -> None:
    """Draws samples, a row for each of up to ten classes, beside real images in as many levels."""
    assert experiment.num_classes is not None
    assert experiment.levels is not None
    rows = np.unique(np.linspace(0, experiment.num_classes - 1, min(ROWS, experiment.num_classes)).astype(int))
    beside = real.subset(np.concatenate([np.flatnonzero(real.labels == label)[:REAL] for label in rows]))
    pixels = experiment.visible(to_levels(in_unit_range(beside), experiment.levels))
    shown = np.isin(asked, rows)
    names = real.class_names
    save_grid(path, experiment.visible(tokens[shown]), asked[shown], pixels, beside.labels, class_names=names)


def _report(config: Config, results: dict[str, Any]) -> str:
    run_dir, guided, unguided = config.training.run_dir, results["guided"], results["unguided"]
    files = (*PICTURES, "samples/", "metrics.jsonl", "config.json", FACTS, "results.json", "checkpoints/")
    right = results.get("classifier_accuracy_on_real")
    beside = "" if right is None else f" (on real held-out images it is right on {right:.1%})"
    lines = [
        "\n" + files_of(run_dir, *files),
        f"classifier agrees with the label: {guided['agreement']:.1%} of {config.num_samples:,} samples at guidance "
        f"{config.sampling.guidance:g}, {unguided['agreement']:.1%} without{beside}",
        f"{results['bounded_images']:,} {'held-out' if results['held_out'] else 'training'} images, given their class: "
        f"at most {results['bits_per_pixel']:.3f} +- {results['bits_standard_error']:.3f} bits a pixel, "
        f"{results['nats_per_image']:.1f} nats an image",
        f"time per image sampled: {1000 * guided['seconds_per_image']:.2f} ms guided (NFE {guided['nfe']:.0f}), "
        f"{1000 * unguided['seconds_per_image']:.2f} ms unguided (NFE {unguided['nfe']:.0f})",
    ]
    if rate := results["training_images_per_second"]:
        lines.append(f"training: {rate:,.0f} images/s")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
