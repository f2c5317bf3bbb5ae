"""Flow matching on images: what the experiments on digits, MNIST and the like, and on one's own pictures, share."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command_line
from experiments.lab.data import FACTS, PRESETS, Data, Facts, Loaded, load, read_facts
from experiments.lab.experiment import Experiment, begin_with
from experiments.lab.figures import save_animation, save_grid, save_neighbours
from experiments.lab.judge import Classify, fit_classifier, nearest
from experiments.lab.latents import Seen, floor, seen_of
from experiments.lab.method import Method, check_first_steps, couple_ahead, make_loss
from experiments.lab.options import check_options, of_smoke, refuse_unused
from experiments.lab.processes import from_first, mean_of_shares, own_folder
from experiments.lab.sampling import (
    Sampling,
    check_dropout,
    check_generate,
    check_interval,
    frame_times,
    generate_many,
    generate_together,
    generator_of,
    nfe_text,
)
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
from fm_jax.conditions import DropCondition
from fm_jax.data.arrays import to_unit_range
from fm_jax.data.images import ImageDataset
from fm_jax.data.latents import latent_batches
from fm_jax.data.pipeline import batches
from fm_jax.models import Compute, LabelEmbedding, init_params, linen_apply, make_dit, make_unet, num_params
from fm_jax.sources import Normal
from fm_jax.train import TrainState
from fm_jax.train.loop import DataIterator

PICTURES = ("samples.png", "neighbours.png", "animation.gif", "loss.png")
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(make_unet, name) for name in ("tiny", "mnist_fast", "mnist", "cifar10", "cifar10_edm")},
    **{f"dit_{name.lower()}": partial(make_dit, name) for name in ("tiny", "S/2", "S/4", "B/2", "B/4", "XL/2")},
    "smoke_unet": partial(
        make_unet,
        "tiny",
        channels=8,
        channel_mults=(1,),
        num_blocks=1,
        attention_levels=(),
        num_heads=1,
        head_channels=None,
        patch_size=4,
    ),
    "smoke_dit": partial(make_dit, "tiny", hidden=16, num_layers=1, num_heads=1, patch_size=4),
}
ROWS, COLUMNS, REAL = 10, 10, 3
"""Of the grid of samples, and the real images beside each row."""
MOST_VALUES = 1024
"""In an image that is judged by its pixels: of larger ones they alone say little, and take long."""
MOST_DECODED = 4096
"""In one that was decoded of latents, of which no other number says how much of it was lost."""


SMOKE = {"sampling": {"solver": "euler", "steps": 2, "sample_batch": 20}, "num_samples": 20, "frames": 3}
"""What a smoke run has of its own, besides its training and a small network of the kind of `model`."""


@dataclass(frozen=True)
class Config:
    """A run on images. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "images"

    data: Data
    training: Training
    method: Method = field(default_factory=Method)
    sampling: Sampling = field(default_factory=Sampling)
    model: Literal[
        "tiny",
        "mnist_fast",
        "mnist",
        "cifar10",
        "cifar10_edm",
        "dit_tiny",
        "dit_s/2",
        "dit_s/4",
        "dit_b/2",
        "dit_b/4",
        "dit_xl/2",
        "smoke_unet",
        "smoke_dit",
    ] = "tiny"
    """Network: a U-Net (tiny to cifar10_edm) or a DiT; those of a smoke run are too small to learn anything."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters are float32."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    scan_layers: bool = False
    """Compile one block of a transformer for all: a fraction of the time to compile; the parameters are stacked."""
    dropout: float = 0.0
    """Dropout rate."""
    label_dropout: float = 0.1
    """Probability that an example is trained without its label, for classifier-free guidance."""
    flip: bool = False
    """Mirror half of the training images."""
    dequantize: bool = False
    """Add uniform noise within a pixel level."""
    num_samples: int = 1000
    """Samples to judge at the end."""
    frames: int = 31
    """Pictures of the animation."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, dropout="[0, 1)", label_dropout="[0, 1)", frames=2)
        if self.dequantize and self.data.latents:
            raise ValueError("--dequantize must be left out with --latents, which have no levels.")
        if self.dequantize and self.data.encoded is not None:
            raise ValueError("--dequantize must be left out with --encoded: latents have no levels.")
        if self.flip and self.data.latents:
            raise ValueError("--flip must be left out with --latents: mirrored, they are not those of mirrored images.")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield from self.data.unused()
        yield from self.training.unused()
        yield from self.method.unused()
        yield from self.sampling.unused()
        if "dit" not in self.model:
            yield "scan_layers", "only a transformer, such as --model dit_tiny, has equal blocks"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        if self.data.labels == "none":
            yield "label_dropout", "--labels none trains without labels"


def build(config: Config, facts: Facts | None = None) -> Experiment:
    """The network for data of which `facts` are known; by default those that lie in the folder of the run."""
    facts = facts or read_facts(config.training.run_dir, config.data)
    options: dict[str, Any] = {"scan_layers": True} if config.scan_layers else {}
    num_classes, drop = len(facts.class_names) or None, None
    if num_classes is not None:
        dit = "dit" in config.model
        options["embed"] = LabelEmbedding(num_classes, stddev=0.02) if dit else LabelEmbedding(num_classes)
        drop = DropCondition(config.label_dropout, null_cond=num_classes)
    model = NETWORKS[config.model](dropout=config.dropout, compute=Compute(config.dtype, config.remat), **options)
    check_fits(model, config.model, facts)
    return Experiment(model, linen_apply(model), Normal(), facts.shape, num_classes, drop, facts.latent_space)


def check_fits(model: nn.Module, name: str, facts: Facts) -> None:
    """Raises `ValueError` for a network that does not take images of that size, before they are read."""
    try:
        jax.eval_shape(lambda: init_params(model, jax.random.key(0), facts.shape))
    except ValueError as error:
        size = "x".join(map(str, facts.shape))
        raise ValueError(f"--model {name} does not fit the images of {facts.source}, {size}: {error}") from error


def fit_to(config: Config, facts: Facts) -> Config:
    """The configuration as the data allow.

    Raises:
        ValueError: for guidance that the run would not be trained for, and for options that have no effect on images
            without labels.
    """
    if facts.class_names:
        check_dropout("--label-dropout", config.label_dropout, config.sampling.guidance, "a label")
        check_interval(config.sampling, config.method)
        return config
    usual = dataclasses.replace(config, sampling=Sampling(), label_dropout=Config.label_dropout)
    without = "the images have no labels"
    for path, value, default in (
        ("guidance", config.sampling.guidance, (1.0, Sampling.guidance)),
        ("label_dropout", config.label_dropout, (Config.label_dropout,)),
    ):
        if value not in default:
            raise ValueError(f"--{path.replace('_', '-')} {value:g} would have no effect: {without}. Leave it out.")
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, guidance=1.0))
    refuse_unused(config, usual)
    print(f"{without.capitalize()}: the network is trained and sampled without.")
    return config


def run(config: Config) -> dict[str, Any]:
    """Trains, samples, judges, draws; returns the numbers it prints."""
    own: dict[str, Any] = {"model": "smoke_dit" if config.model.startswith("dit") else "smoke_unet"}
    own |= {"data": {"num_images": config.data.num_images or 512}}
    config = smoke(config, **SMOKE, **own)
    folder, run_dir = config.data.folder, config.training.run_dir
    if folder is not None and run_dir.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--run-dir must lie outside of --folder {folder}, whose pictures are data, got {run_dir}.")
    check_batch(config.training)
    check_first_steps(config.method, config.training)
    if (config.training.steps_per_call or 1) > 1 and jax.default_backend() == "cpu" and "dit" not in config.model:
        raise ValueError(
            f"--steps-per-call must be 1 for --model {config.model} on CPU, where gradients of convolutions within a "
            f"loop are some 50 times slower, got {config.training.steps_per_call}."
        )
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    run_dir = config.training.run_dir
    check_run_dir(config, [*PICTURES, FACTS], folders=["samples"])
    # Of these enough is known to refuse a network that does not fit, before they are read.
    experiment = None if config.data.dataset is None else build(config, PRESETS[config.data.dataset])
    loaded = load(config.data)
    dataset, facts = loaded.train, loaded.facts
    config = fit_to(config, facts)
    experiment = experiment or build(config, facts)
    found = from_first(lambda: _finished(config, facts))
    if found is not None and (text := _report(config, found)):
        print(
            f"{run_dir} is finished: these are its results. Remove the folder, or give another --run-dir, to run anew."
        )
        print(text)
        return found
    seen = seen_of(config.data, experiment, loaded)
    _check_data(config, loaded, seen)
    keys = jax.random.split(jax.random.key(config.training.seed), 5)
    key_train, key_init, key_draw, key_judge, key_pairs = keys
    params = experiment.init_params(key_init)
    if facts.shape[-1] not in (1, 3) and seen.codec is None:
        print(f"Pictures show {experiment.visible(np.zeros(facts.shape)).shape[-1]} of {facts.shape[-1]} channels.")
    print(
        f"{_described(facts)}, {config.model} with {num_params(params):,} parameters, "
        f"{jax.device_count()} {jax.default_backend()} device(s)"
    )

    def data_of(index: int, count: int) -> DataIterator:
        if loaded.latents is not None:
            return latent_batches(
                loaded.latents.splits["train"],
                space=facts.latent_space,
                batch_size=config.training.batch_size // count,
                seed=config.training.seed,
                flip=config.flip,
                process_index=index,
                process_count=count,
            )
        return batches(
            dataset,
            batch_size=config.training.batch_size // count,
            seed=config.training.seed,
            flip=config.flip,
            dequantize=config.dequantize,
            process_index=index,
            process_count=count,
        )

    data = couple_ahead(config.method, data_of, key_pairs, experiment.source)
    loss_fn = make_loss(config.method, experiment)
    generate = generator_of(config, experiment)
    labels = jax.ShapeDtypeStruct((config.sampling.sample_batch,), jnp.int32)
    check_generate(generate, params, key_draw, experiment, labels)

    def draw(step: int, state: TrainState) -> None:
        labels = _classes_in_turn(experiment, config.sampling.sample_batch)
        params = sampling_params(state, config.training)
        images, _ = generate_many(generate, params, key_draw, experiment, labels, len(labels))
        _save_grid(run_dir / "samples" / f"step_{step:06d}.png", seen.pictures(images), labels, seen)

    state = train(
        config,
        key_train,
        params,
        loss_fn,
        data,
        draw,
        facts=facts,
        begin=partial(begin_with, config, facts.class_names),
    )
    results = judge(config, experiment, sampling_params(state, config.training), key_judge, loaded, seen, generate)
    results["training_images_per_second"] = median_rate(run_dir)
    draw_loss(run_dir)
    write_results(run_dir, results)
    print(_report(config, results))
    return results


def _finished(config: Config, facts: Facts) -> dict[str, Any] | None:
    """The results of this very configuration on these very data, if there are any."""
    run_dir = config.training.run_dir
    if not is_config_of_run(config) or not (run_dir / FACTS).is_file():
        return None
    return read_results(run_dir) if read_facts(run_dir, config.data) == facts else None


def _described(facts: Facts) -> str:
    size = "x".join(map(str, facts.shape))
    classes = f"{len(facts.class_names)} classes" if facts.class_names else "no labels"
    return f"{facts.source}: {facts.num_images:,} images {size}, {classes}, {facts.num_test:,} held out"


def _check_data(config: Config, loaded: Loaded, seen: Seen) -> None:
    num = len(loaded.train.images)
    if config.flip and loaded.latents is not None and not loaded.latents.splits["train"].flipped:
        raise ValueError(
            f"--flip needs the latents of mirrored images, which {config.data.encoded} has not: encode with --flip."
        )
    if config.training.batch_size > num:
        raise ValueError(
            f"--batch-size must be at most {num}, the images to train on, got {config.training.batch_size}."
        )
    if _is_judged(seen):
        imported("sklearn.svm", "the classifier that judges the samples", "'fm_jax[experiments]'")
        if len(np.unique(loaded.train.labels)) < 2:
            raise ValueError(f"--num-images must reach images of two classes or more, got {config.data.num_images}.")


def _is_judged(seen: Seen) -> bool:
    """Whether a classifier of pixels is to name the samples: of small images with classes and some held out."""
    facts, most = seen.loaded.facts, MOST_VALUES if seen.codec is None else MOST_DECODED
    return len(facts.class_names) > 1 and facts.num_test > 0 and math.prod(facts.shape) <= most


def _classes_in_turn(experiment: Experiment, num: int) -> np.ndarray:
    return np.arange(num) % (experiment.num_classes or 1)


def _classes_shown(experiment: Experiment) -> np.ndarray:
    """As many classes as there are rows, evenly among all."""
    num = experiment.num_classes or 1
    return np.unique(np.linspace(0, num - 1, ROWS).astype(int))


def judge(config: Config, experiment: Experiment, params, key, loaded: Loaded, seen: Seen, generate) -> dict[str, Any]:
    """Draws `num_samples`, with and without guidance where there are classes, judges them, and saves the pictures."""
    run_dir, sampling, real = config.training.run_dir, config.sampling, seen.loaded
    size = sampling.sample_batch
    classify: Classify | None = None
    results = dict[str, Any]()
    if _is_judged(seen) and real.test is not None:
        first = real.train.subset(slice(10_000))
        classify = fit_classifier(in_unit_range(first), first.labels)
        results["classifier_accuracy_on_real"] = mean_of_shares(
            lambda x, y: classify(x) == y, in_unit_range(real.test), real.test.labels
        )
    if seen.codec is not None:
        results["floor"] = floor(seen, loaded, config.num_samples, classify)
    labels = _classes_in_turn(experiment, config.num_samples)
    if experiment.num_classes is None:
        drawn = {"unguided": generate}
    else:
        drawn = {"guided": generate, "unguided": generator_of(config, experiment, 1.0)}
    for name, function in drawn.items():
        generate_many(function, params, key, experiment, labels[:size], size)  # compiles
        start = time.perf_counter()
        images, nfe = generate_many(function, params, key, experiment, labels, size)
        num_drawn = -(-config.num_samples // size) * size
        results[name] = {"seconds_per_image": (time.perf_counter() - start) / num_drawn, "nfe": nfe}
        images = seen.pictures(images)
        if classify is not None:
            results[name]["agreement"] = mean_of_shares(lambda x, y: classify(x) == y, images, labels)
        if name == next(iter(drawn)):
            _save_grid(run_dir / "samples.png", images, labels, seen)
            results["nearest"] = _save_neighbours(run_dir / "neighbours.png", images, seen)
    times = frame_times(config.method, config.frames)
    animate = generator_of(config, experiment, frames=times)
    shown = _classes_shown(experiment)
    labels = np.repeat(shown, 5 if len(shown) > 1 else 50)
    x0 = experiment.draw_x0(jax.random.fold_in(key, 1), len(labels))
    frames = generate_together(animate, params, key, x0, labels).trajectory
    pictures = seen.visible(seen.pictures(np.asarray(frames)))
    save_animation(run_dir / "animation.gif", pictures, times=times, columns=10)
    return results


def in_unit_range(dataset: ImageDataset) -> np.ndarray:
    """The images of a dataset as they are trained on, float32 in [-1, 1]."""
    return to_unit_range(dataset.images[:], dataset.value_range)


def _save_grid(path: Path, images: np.ndarray, labels: np.ndarray, seen: Seen) -> None:
    """Samples, a row for each class, or rows of no class, beside real images."""
    dataset, experiment = seen.loaded.train, seen.experiment
    if experiment.num_classes is None:
        some = np.random.default_rng(0).permutation(len(dataset.images))[: ROWS * REAL]
    else:
        some = np.concatenate([np.flatnonzero(dataset.labels == label)[:REAL] for label in _classes_shown(experiment)])
    real = dataset.subset(some)
    if experiment.num_classes is None:
        num = min(len(images), ROWS * COLUMNS)
        labels, names, real_labels = np.arange(num) // COLUMNS, ("",) * ROWS, np.arange(len(some)) // REAL
        images = images[:num]
    else:
        shown = np.isin(labels, _classes_shown(experiment))
        images, labels, names, real_labels = images[shown], labels[shown], dataset.class_names, real.labels
    save_grid(
        path,
        seen.visible(images),
        labels,
        seen.visible(in_unit_range(real)),
        real_labels,
        class_names=names,
    )


def _save_neighbours(path: Path, images: np.ndarray, seen: Seen) -> dict[str, float]:
    """Draws samples beside the training images that are nearest to them; root mean squared distances to the nearest."""
    loaded = seen.loaded
    found = nearest(images[:100], loaded.train, num=5)
    beside = in_unit_range(loaded.train.subset(found.indices[:ROWS].reshape(-1)))
    beside = beside.reshape(*found.indices[:ROWS].shape, *beside.shape[1:])
    save_neighbours(path, seen.visible(images[:ROWS]), seen.visible(beside))
    distances = {"samples": float(np.median(found.distances[:, 0]))}
    if loaded.test is not None:
        held_out = in_unit_range(loaded.test.subset(slice(100)))
        distances["held_out"] = float(np.median(nearest(held_out, loaded.train).distances[:, 0]))
    return distances


def _report(config: Config, results: dict[str, Any]) -> str | None:
    """The results in words; `None` for what are not the results of this experiment."""
    run_dir = config.training.run_dir
    files = (*PICTURES, "metrics.jsonl", "config.json", FACTS, "results.json", "checkpoints/")
    lines = ["\n" + files_of(run_dir, *files)]
    try:
        guided, unguided, rate = results.get("guided"), results["unguided"], results["training_images_per_second"]
        if "classifier_accuracy_on_real" in results:
            lines.append(
                f"classifier agrees with the label: {guided['agreement']:.1%} of {config.num_samples:,} samples at "
                f"guidance {config.sampling.guidance:g}, {unguided['agreement']:.1%} without "
                f"(on real held-out images it is right on {results['classifier_accuracy_on_real']:.1%})"
            )
        if "floor" in results:
            lines.append(_of_floor(results["floor"]))
        distances = results["nearest"]
        beside = f", {distances['held_out']:.3f} from held-out images" if "held_out" in distances else ""
        lines.append(
            f"nearest training image, median of the root mean squared difference: {distances['samples']:.3f} from "
            f"samples{beside} (copies would be much nearer than held-out images are)"
        )
        costs = [] if guided is None else [(guided, "guided")]
        told = [
            f"{1000 * each['seconds_per_image']:.2f} ms {name} (NFE {nfe_text(each['nfe'])})"
            for each, name in [*costs, (unguided, "unguided")]
        ]
        lines.append(f"time per image sampled: {', '.join(told)}")
        lines.append(f"training: {f'{rate:,.0f} images/s' if rate else 'already done'}")
    except (KeyError, TypeError, ValueError):
        return None
    return "\n".join(lines)


def _of_floor(found: dict[str, Any]) -> str:
    """What the autoencoder alone makes of real images, in words."""
    which = f"{found['images']:,} {'held-out' if found['held_out'] else 'training'} images"
    agrees = f", the classifier is right on {found['agreement']:.1%} of them" if "agreement" in found else ""
    return (
        f"the autoencoder alone: PSNR {found['psnr']:.1f} dB on {which}{agrees}; to decode takes "
        f"{1000 * found['decode_seconds_per_image']:.2f} ms an image"
    )


def main(default: Config, description: str | None) -> None:
    """The command line of an experiment: every field of the configuration is an option."""
    command_line.main(run, Config, default, description)
