"""Moving digits: clips from a sentence, such as "a three moves up while a seven moves left".

Paper: Polyak et al. 2024, "Movie Gen" (arXiv:2410.13720), in small: one transformer for clips and for pictures, which
are clips of one frame; learned positions of frame, row and column in every block; one modulation by time for all
blocks; attention to two or three encoders of the text, one of them of letters; its path and its grid of times.
Command: `python -m experiments.text_to_video`, one digit on 16x16, or on a GPU two digits, slow or fast, on 32x32
`python -m experiments.text_to_video --dataset mnist --total-steps 20000 --batch-size 256 --learning-rate 1e-3 \
--dtype bfloat16 --run-dir runs/text_to_video_mnist`
Hardware: two CPU cores; the README has the times.
Expect: first grey clouds, then digits, then digits that go where they were told. Held out are one way of eight for each
digit, and one kind of sentence.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from experiments.lab import command_line
from experiments.lab.experiment import Experiment
from experiments.lab.figures import save_clips, save_sheet
from experiments.lab.method import Method, check_first_steps
from experiments.lab.moving import (
    HELD_OUT_TEMPLATE,
    TEMPLATES,
    ClipBatches,
    Meaning,
    Stage,
    describe,
    describe_picture,
    most_words,
    quoted,
    words_of,
)
from experiments.lab.moving_judge import Judge, fit_judge
from experiments.lab.options import check_options, of_smoke
from experiments.lab.processes import own_folder
from experiments.lab.prompts import learn
from experiments.lab.sampling import Generate, Sampling, check_dropout, generate_many, generator_of, nfe_text
from experiments.lab.scenes import load_digits_of
from experiments.lab.smoke import TRAINING, smoke
from experiments.lab.training import (
    Training,
    check_batch,
    check_run_dir,
    draw_loss,
    files_of,
    median_rate,
    write_results,
)
from fm_jax.conditions import DropCondition
from fm_jax.models import Compute, linen_apply, make_videodit, num_params
from fm_jax.schedules import Linear
from fm_jax.sources import Normal
from fm_jax.text import ByteTokenizer, TextConditioned, Tokens, WordEncoder, WordTokenizer
from fm_jax.train.loop import DataIterator
from fm_jax.types import Schedule

PICTURES = ("samples.gif", "samples.png", "loss.png")
STAGES = {"digits": Stage(16, 8, 8), "mnist": Stage(32, 14, 8, speeds=(0.5, 1.0), num_digits=2, apart=10)}
LETTERS = 259
"""Number of ids of bytes, padding and end included."""
_SIZES: dict[str, dict[str, Any]] = {
    "digits": {"hidden": 96, "num_layers": 4, "num_heads": 4, "mlp_hidden": 256, "scan_layers": False},
    "mnist": {"hidden": 256, "num_layers": 6, "num_heads": 4, "mlp_hidden": 704},
    "smoke": {"hidden": 16, "num_layers": 1, "num_heads": 2, "mlp_hidden": 32, "scan_layers": False},
}
_PATCH, _LONGEST, _POSITION_STD = 4, 16, 0.15
"""Rows and columns of a patch; frames that the network has positions for; how large these are at the start."""


@dataclass(frozen=True)
class MovieGenMethod(Method):
    """What is regressed, and where on the path. The path "linear" keeps 1e-5 of its noise, as Movie Gen's does."""

    @property
    def schedule(self) -> Schedule:
        return Linear(1e-5) if self.path == "linear" else super().schedule


@dataclass(frozen=True)
class Config:
    """A run on moving digits. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "text_to_video"

    training: Training
    dataset: Literal["digits", "mnist"] = "digits"
    """One of scikit-learn's digits on 16x16, or two of MNIST, each slow or fast, on 32x32."""
    data_dir: Path | None = None
    """Where TFDS keeps MNIST; by default TFDS_DATA_DIR or ~/tensorflow_datasets."""
    num_frames: int | None = None
    """Frames of a clip, 8 by default."""
    encoders: int = 2
    """Encoders of the text: of its words and of the letters of the digits' names; with 3 a second one of words."""
    picture_every: int = 8
    """Every so many steps is one of pictures, as clips of one frame; 0 for none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters are float32."""
    method: MovieGenMethod = field(
        # Noise hides little of many frames: which digit goes where is settled between t = 0.03 and t = 0.15, where four
        # in ten of these times lie, and one in ten of even ones.
        default_factory=lambda: MovieGenMethod(times="logit_normal", time_shift=5.0)
    )
    sampling: Sampling = field(
        default_factory=lambda: Sampling(solver="heun", steps=16, grid="linear_quadratic", guidance=2.5)
    )
    text_dropout: float = 0.1
    """Probability that an example is trained without its sentence, for classifier-free guidance."""
    num_samples: int = 200
    """Clips to judge of each kind of sentence."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, text_dropout="[0, 1)", num_frames=2, encoders=(2, 3), picture_every=0)
        check_dropout("--text-dropout", self.text_dropout, self.sampling.guidance, "a sentence")
        if (self.num_frames or 2) > _LONGEST:
            raise ValueError(
                f"--num-frames must be at most {_LONGEST}, for which the network has positions, got {self.num_frames}."
            )
        try:
            self.stage  # noqa: B018
        except ValueError as error:
            raise ValueError(f"--num-frames does not fit --dataset {self.dataset}: {error}") from error

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        if self.dataset == "digits":
            yield "data_dir", "--dataset digits is embedded in scikit-learn"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        yield from self.training.unused()
        yield from self.method.unused()
        yield from self.sampling.unused()

    @property
    def stage(self) -> Stage:
        """How clips are drawn."""
        stage = STAGES[self.dataset]
        return dataclasses.replace(stage, frames=self.num_frames or stage.frames)


SMOKE: dict[str, Any] = {
    "sampling": {"solver": "euler", "steps": 2, "sample_batch": 4},
    "num_samples": 4,
    "num_frames": 3,
    "picture_every": 2,
}
CONFIG = Config(
    training=Training(
        run_dir=Path("runs/text_to_video"),
        total_steps=3000,
        batch_size=32,
        learning_rate=3e-3,
        warmup_steps=100,
        decay="cosine",
        ema_decays=(0.998,),
        save_every=250,
    ),
)


def build(config: Config) -> Experiment:
    """The network, and what reads sentences for it."""
    stage, sizes = config.stage, _SIZES["smoke" if config.smoke else config.dataset]
    num, width = stage.num_digits, min(64, sizes["hidden"])
    words, letters = WordTokenizer(words_of(num, stage.paces), most_words(num, stage.paces) + 1), ByteTokenizer(8 * num)
    encoders = {
        "words": WordEncoder(words.vocabulary, most_words(num, stage.paces) + 1, width),
        "letters": WordEncoder(LETTERS, 8 * num, width),
    }
    if config.encoders == 3:
        encoders["more_words"] = WordEncoder(words.vocabulary, most_words(num, stage.paces) + 1, width)

    def tell(prompts: list[str]) -> dict[str, Tokens]:
        told = words(prompts)
        found = {"words": told, "letters": letters([quoted(prompt) for prompt in prompts])}
        return found | ({"more_words": told} if config.encoders == 3 else {})

    side = stage.size // _PATCH
    network = make_videodit(
        "tiny",
        **sizes,
        patch_size=(1, _PATCH, _PATCH),
        positions=(_LONGEST, side, side),
        position_std=_POSITION_STD,
        encoders=tuple((name, width) for name in encoders),
        channels=1,
        compute=Compute(config.dtype),
    )
    model = TextConditioned(network, encoders)
    drop = DropCondition(config.text_dropout, tell([""]))
    return Experiment(model, linen_apply(model), Normal(), stage.shape, drop=drop, tell=tell)


def run(config: Config) -> dict[str, Any]:
    """Trains, samples, judges, draws; returns the numbers it prints."""
    config = smoke(config, **SMOKE)
    check_batch(config.training)
    check_first_steps(config.method, config.training)
    if (config.training.steps_per_call or 1) > 1 and config.picture_every:
        raise ValueError(
            f"--steps-per-call must be 1 where clips and pictures alternate, got {config.training.steps_per_call}: "
            "--picture-every 0 goes without pictures."
        )
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    experiment, stage, run_dir = build(config), config.stage, config.training.run_dir
    check_run_dir(config, PICTURES, folders=["samples"])
    keys = jax.random.split(jax.random.key(config.training.seed), 5)
    key_train, key_init, key_draw, key_judge, key_pairs = keys
    digits = load_digits_of(config.dataset, "train", stage.digit, config.data_dir, smoke=config.smoke)
    params = experiment.init_params(key_init)
    print(
        f"moving digits of {config.dataset}, {'x'.join(map(str, stage.shape))}, {config.encoders} encoders, "
        f"{num_params(params):,} parameters, {jax.device_count()} {jax.default_backend()} device(s)"
    )

    def data_of(index: int, count: int) -> DataIterator:
        size, seed, every = config.training.batch_size // count, config.training.seed, config.picture_every
        return ClipBatches(
            stage, digits, experiment.told, seed, size, picture_every=every, process_index=index, process_count=count
        )

    shown = stage.draw_meanings(np.random.default_rng(0), 8, held_out=False)
    generate = generator_of(config, experiment)
    params = learn(
        config,
        experiment,
        params,
        generate,
        (key_train, key_draw, key_pairs),
        data_of,
        [describe(meaning, TEMPLATES[0]) for meaning in shown],
        lambda name, clips, texts: save_clips(run_dir / "samples" / f"{name}.gif", clips, texts),
    )
    judge_of_clips = fit_judge(stage, digits, num_steps=4 if config.smoke else 1500)
    results = judge(config, experiment, params, key_judge, judge_of_clips, generate)
    results["training_clips_per_second"] = median_rate(run_dir)
    draw_loss(run_dir)
    write_results(run_dir, results)
    print(_report(config, results))
    return results


def asked(stage: Stage, num: int) -> dict[str, tuple[list[Meaning], list[str]]]:
    """The meanings and sentences of each kind that a network is judged on, `num` of each."""
    rng = np.random.default_rng(1)
    seen, held_out = (stage.draw_meanings(rng, num, held_out=each) for each in (False, True))
    templates = [TEMPLATES[i % len(TEMPLATES)] for i in range(num)]
    return {
        "seen": (seen, [describe(*each) for each in zip(seen, templates, strict=True)]),
        "held_out_pairs": (held_out, [describe(*each) for each in zip(held_out, templates, strict=True)]),
        "held_out_template": (seen, [describe(meaning, HELD_OUT_TEMPLATE) for meaning in seen]),
    }


def judge(
    config: Config, experiment: Experiment, params: Any, key: Any, verdict_of: Judge, generate: Generate
) -> dict[str, Any]:
    """Has clips for each kind of sentence judged beside real ones, drawn by `generate` and without guidance."""
    stage, num, size, run_dir = config.stage, config.num_samples, config.sampling.sample_batch, config.training.run_dir
    meanings = stage.draw_meanings(np.random.default_rng(2), 500)
    digits = load_digits_of(config.dataset, "test", stage.digit, config.data_dir, smoke=config.smoke)
    real = stage.draw(np.random.default_rng(3), meanings, digits)
    # What clips of other sentences get right: the level of chance.
    results: dict[str, Any] = {
        "real": verdict_of(real, meanings).shares(),
        "chance": verdict_of(real, [*meanings[1:], meanings[0]]).shares(),
    }
    of_pictures = experiment._replace(event_shape=(1, *stage.shape[1:]))
    generators = {"guided": generate, "unguided": generator_of(config, experiment, 1.0)}
    for name, generate in generators.items():
        found, nfe = {}, None
        start = time.perf_counter()
        kinds = asked(stage, num)
        for kind, (meanings, texts) in kinds.items():
            clips, nfe = generate_many(generate, params, key, experiment, experiment.told(texts), size)
            verdict = verdict_of(clips, meanings)
            found[kind] = verdict.shares()
            if (name, kind) == ("guided", "seen"):
                marked = [text + ("" if right else " *") for text, right in zip(texts, verdict.both, strict=True)]
                save_clips(run_dir / "samples.gif", clips[:12], marked[:12])
                save_sheet(run_dir / "samples.png", clips[:12].reshape(-1, *stage.shape[1:]), columns=stage.frames)
        seconds = (time.perf_counter() - start) / (len(kinds) * -(-num // size) * size)
        if config.picture_every:
            meanings = kinds["seen"][0]
            told = experiment.told([describe_picture(meaning) for meaning in meanings])
            pictures, _ = generate_many(generate, params, key, of_pictures, told, size)
            found["pictures"] = {"identity": verdict_of(pictures, meanings).shares()["identity"]}
        results[name] = found | {"nfe": nfe, "seconds_per_clip": seconds}
    return results


def _report(config: Config, results: dict[str, Any]) -> str:
    run_dir, num = config.training.run_dir, config.num_samples
    lines = ["\n" + files_of(run_dir, *PICTURES, "metrics.jsonl", "config.json", "results.json", "checkpoints/")]
    words = {
        "seen": "seen digits and directions",
        "held_out_pairs": "a digit in a direction that it never went",
        "held_out_template": "a held-out kind of sentence",
    }
    guided, unguided = results["guided"], results["unguided"]
    lines.append(f"digit and direction as it was said, of {num} clips of each kind:")
    for kind, name in words.items():
        lines.append(
            f"  {name}: {guided[kind]['both']:.1%} at guidance {config.sampling.guidance:g}, "
            f"{unguided[kind]['both']:.1%} without"
        )
    lines.extend(
        f"{of}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        for of, shares in (
            ("seen, guided", guided["seen"]),
            ("real clips", results["real"]),
            ("chance", results["chance"]),
        )
    )
    if "pictures" in guided:
        lines.append(f"pictures: the right digit in {guided['pictures']['identity']:.1%}")
    lines.append(f"{1000 * guided['seconds_per_clip']:.2f} ms a clip (NFE {nfe_text(guided['nfe'])})")
    if rate := results["training_clips_per_second"]:
        lines.append(f"training: {rate:,.0f} clips/s")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
