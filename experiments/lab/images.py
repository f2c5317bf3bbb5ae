"""Class-conditional flow matching on images: what the experiments on digits, MNIST and the like share."""

import dataclasses
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
from experiments.lab.experiment import Experiment
from experiments.lab.figures import save_animation, save_grid
from experiments.lab.judge import fit_classifier
from experiments.lab.method import Method, couple_ahead, make_loss
from experiments.lab.options import check_options
from experiments.lab.processes import from_first, mean_of_shares, own_folder
from experiments.lab.sampling import (
    Sampling,
    frame_times,
    generate_many,
    generate_together,
    make_generate,
    nfe_text,
)
from experiments.lab.smoke import smoke
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
from fm_jax.data.digits import load_digits
from fm_jax.data.images import ImageDataset, load_images, to_float
from fm_jax.data.pipeline import batches
from fm_jax.models import Compute, LabelEmbedding, init_params, linen_apply, make_dit, make_unet, num_params
from fm_jax.sources import Normal
from fm_jax.train import TrainState
from fm_jax.train.loop import DataIterator

NUM_CLASSES = 10
PICTURES = ("samples.png", "animation.gif", "loss.png")
_unet = partial(make_unet, embed=LabelEmbedding(NUM_CLASSES))
_dit = partial(make_dit, embed=LabelEmbedding(NUM_CLASSES, stddev=0.02))
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(_unet, name) for name in ("tiny", "mnist_fast", "mnist", "cifar10", "cifar10_edm")},
    **{f"dit_{name.lower()}": partial(_dit, name) for name in ("tiny", "S/2", "S/4", "B/2", "B/4", "XL/2")},
    "smoke_unet": partial(
        _unet,
        "tiny",
        channels=8,
        channel_mults=(1,),
        num_blocks=1,
        attention_levels=(),
        num_heads=1,
        head_channels=None,
        patch_size=4,
    ),
    "smoke_dit": partial(_dit, "tiny", hidden=16, num_layers=1, num_heads=1, patch_size=4),
}


@dataclass(frozen=True)
class Config:
    """A run on images. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "images"

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"]
    """Which images; "digits" are embedded in scikit-learn, the others come from TFDS."""
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
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets."""
    num_images: int | None = None
    """Only the first so many real images of each split; by default all."""
    num_samples: int = 1000
    """Samples to judge at the end."""
    frames: int = 31
    """Pictures of the animation."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, dropout="[0, 1)", label_dropout="[0, 1)", frames=2)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield from self.training.unused()
        yield from self.method.unused()
        yield from self.sampling.unused()
        if "dit" not in self.model:
            yield "scan_layers", "only a transformer, such as --model dit_tiny, has equal blocks"
        if self.dataset == "digits":
            yield "data_dir", "the digits come inside scikit-learn; the other data sets are read from there"


def build(config: Config) -> Experiment:
    """The network and the shape of its images, without reading any data."""
    event_shape = {"digits": (8, 8, 1), "cifar10": (32, 32, 3)}.get(config.dataset, (28, 28, 1))
    scan_layers = {"scan_layers": True} if config.scan_layers else {}
    model = NETWORKS[config.model](dropout=config.dropout, compute=Compute(config.dtype, config.remat), **scan_layers)
    try:
        jax.eval_shape(lambda key: init_params(model, key, event_shape), jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"--model {config.model} does not fit the images of {config.dataset}: {error}") from error
    drop = DropCondition(config.label_dropout, null_cond=NUM_CLASSES)
    return Experiment(model, linen_apply(model), Normal(), event_shape, NUM_CLASSES, drop)


def load(config: Config, split: Literal["train", "test"]) -> ImageDataset:
    """The real images of a split, or the first of them."""
    num = config.num_images
    if config.dataset == "digits":
        digits = load_digits(split)
        return digits._replace(images=digits.images[:num], labels=digits.labels[:num])
    return load_images(config.dataset, split if num is None else f"{split}[:{num}]", data_dir=config.data_dir)


def in_unit_range(images: np.ndarray) -> np.ndarray:
    """Images as float32 in [-1, 1]."""
    return to_float(images) if images.dtype == np.uint8 else images


def run(config: Config) -> dict[str, Any]:
    """Trains, samples, judges, draws; returns the numbers it prints."""
    if config.label_dropout == 0 and config.sampling.guidance != 1:
        raise ValueError(
            f"--label-dropout must be above 0 for --guidance {config.sampling.guidance:g}, which leads away from what "
            "the network makes without a label; --guidance 1 goes without."
        )
    config = smoke(
        config,
        model="smoke_dit" if config.model.startswith("dit") else "smoke_unet",
        sampling={"solver": "euler", "steps": 2, "sample_batch": 20},
        num_images=512,
        num_samples=20,
        frames=3,
    )
    check_batch(config.training)
    if (config.training.steps_per_call or 1) > 1 and jax.default_backend() == "cpu" and "dit" not in config.model:
        raise ValueError(
            f"--steps-per-call must be 1 for --model {config.model} on CPU, where gradients of convolutions within a "
            f"loop are some 50 times slower, got {config.training.steps_per_call}."
        )
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    experiment, run_dir = build(config), config.training.run_dir
    check_run_dir(config, PICTURES, folders=["samples"])
    found = from_first(lambda: read_results(run_dir) if is_config_of_run(config) else None)
    if found is not None and (text := _report(config, found)):
        print(
            f"{run_dir} is finished: these are its results. Remove the folder, or give another --run-dir, to run anew."
        )
        print(text)
        return found
    dataset = load(config, "train")
    _check_data(config, dataset)
    keys = jax.random.split(jax.random.key(config.training.seed), 5)
    key_train, key_init, key_draw, key_judge, key_pairs = keys
    params = init_params(experiment.model, key_init, experiment.event_shape)
    print(
        f"{config.dataset}: {len(dataset.images):,} images, {config.model} with {num_params(params):,} parameters, "
        f"{jax.device_count()} {jax.default_backend()} device(s)"
    )

    def data_of(index: int, count: int) -> DataIterator:
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
    generate = _generator(config, experiment)
    # Traced now, so that what cannot be sampled is not found after the training.
    num = config.sampling.sample_batch
    x0, labels = jax.eval_shape(lambda: experiment.draw_x0(key_draw, num)), jax.ShapeDtypeStruct((num,), jnp.int32)
    jax.eval_shape(generate, params, key_draw, x0, labels)

    def draw(step: int, state: TrainState) -> None:
        labels = np.arange(config.sampling.sample_batch) % NUM_CLASSES
        params = sampling_params(state, config.training)
        images, _ = generate_many(generate, params, key_draw, experiment, labels, len(labels))
        _save_grid(run_dir / "samples" / f"step_{step:06d}.png", images, labels, dataset)

    state = train(config, key_train, params, loss_fn, data, draw)
    results = judge(config, experiment, sampling_params(state, config.training), key_judge, dataset, generate)
    results["training_images_per_second"] = median_rate(run_dir)
    draw_loss(run_dir)
    write_results(run_dir, results)
    print(_report(config, results))
    return results


def _check_data(config: Config, dataset: ImageDataset) -> None:
    num = len(dataset.images)
    if config.training.batch_size > num:
        raise ValueError(
            f"--batch-size must be at most {num}, the images to train on, got {config.training.batch_size}."
        )
    if _has_judge(config):
        imported("sklearn.svm", "the classifier that judges the samples", "'fm_jax[experiments]'")
    if _has_judge(config) and len(np.unique(dataset.labels)) < 2:
        raise ValueError(f"--num-images must reach images of two classes or more, got {config.num_images}.")


def _has_judge(config: Config) -> bool:
    return config.dataset != "cifar10"  # pixels alone do not tell objects apart


def _generator(config: Config, experiment: Experiment, **options):
    return make_generate(config.sampling, config.method, experiment.apply_fn, null_label=NUM_CLASSES, **options)


def judge(config: Config, experiment: Experiment, params, key, dataset: ImageDataset, generate) -> dict[str, Any]:
    """Draws `num_samples` with and without guidance, has the classifier name them, and saves the pictures."""
    run_dir, sampling = config.training.run_dir, config.sampling
    size = sampling.sample_batch
    classify, results = None, dict[str, Any]()
    if _has_judge(config):
        test = load(config, "test")
        classify = fit_classifier(in_unit_range(dataset.images), dataset.labels)
        results["classifier_accuracy_on_real"] = mean_of_shares(
            lambda x, y: classify(x) == y, in_unit_range(test.images), test.labels
        )
    unguided = dataclasses.replace(config, sampling=dataclasses.replace(sampling, guidance=1.0))
    labels = np.arange(config.num_samples) % NUM_CLASSES
    for name, function in (("guided", generate), ("unguided", _generator(unguided, experiment))):
        generate_many(function, params, key, experiment, labels[:size], size)  # compiles
        start = time.perf_counter()
        images, nfe = generate_many(function, params, key, experiment, labels, size)
        drawn = -(-config.num_samples // size) * size
        results[name] = {"seconds_per_image": (time.perf_counter() - start) / drawn, "nfe": nfe}
        if classify is not None:
            results[name]["agreement"] = mean_of_shares(lambda x, y: classify(x) == y, images, labels)
        if name == "guided":
            _save_grid(run_dir / "samples.png", images, labels, dataset)
    times = frame_times(config.method, config.frames)
    animate = _generator(config, experiment, frames=times)
    labels = np.repeat(np.arange(NUM_CLASSES), 5)
    x0 = experiment.draw_x0(jax.random.fold_in(key, 1), len(labels))
    frames = generate_together(animate, params, key, x0, labels).trajectory
    save_animation(run_dir / "animation.gif", np.asarray(frames), times=times, columns=10)
    return results


def _save_grid(path: Path, images: np.ndarray, labels: np.ndarray, dataset: ImageDataset) -> None:
    save_grid(
        path, images, labels, in_unit_range(dataset.images[:512]), dataset.labels[:512], class_names=dataset.class_names
    )


def _report(config: Config, results: dict[str, Any]) -> str | None:
    """The results in words; `None` for what are not the results of this experiment."""
    run_dir = config.training.run_dir
    lines = ["\n" + files_of(run_dir, *PICTURES, "metrics.jsonl", "config.json", "results.json", "checkpoints/")]
    try:
        guided, unguided, rate = results["guided"], results["unguided"], results["training_images_per_second"]
        if _has_judge(config):
            lines.append(
                f"classifier agrees with the label: {guided['agreement']:.1%} of {config.num_samples:,} samples at "
                f"guidance {config.sampling.guidance:g}, {unguided['agreement']:.1%} without "
                f"(on real held-out images it is right on {results['classifier_accuracy_on_real']:.1%})"
            )
        lines.append(
            f"time per image sampled: {1000 * guided['seconds_per_image']:.2f} ms guided "
            f"(NFE {nfe_text(guided['nfe'])}), {1000 * unguided['seconds_per_image']:.2f} ms unguided "
            f"(NFE {nfe_text(unguided['nfe'])})"
        )
        lines.append(f"training: {f'{rate:,.0f} images/s' if rate else 'already done'}")
    except (KeyError, TypeError, ValueError):
        return None
    return "\n".join(lines)


def main(default: Config, description: str | None) -> None:
    """The command line of an experiment: every field of the configuration is an option."""
    command_line.main(run, Config, default, description)
