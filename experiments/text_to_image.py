"""Composed digits: pictures of two digits from a sentence, such as "a red three to the left of a blue seven".

Paper: Rombach et al. 2021 (arXiv:2112.10752) for attention to words in a U-Net, Esser et al. 2024 (arXiv:2403.03206)
for the transformer of two streams.
Command: `python -m experiments.text_to_image`; with colours `python -m experiments.coloured_mnist`.
Hardware: two CPU cores; the README has the times.
Expect: nothing that looks like agreement before a thousand steps, then nearly every picture as it was said. The first
steps lean towards noise, where words alone say what is where. Held out are ten pairs of digits, in their order, so that
no set of words alone does.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import numpy as np

from experiments.lab import command_line, prompts
from experiments.lab.data import FACTS
from experiments.lab.experiment import Experiment
from experiments.lab.figures import save_captioned
from experiments.lab.method import Method, check_first_steps
from experiments.lab.options import check_options, of_smoke
from experiments.lab.processes import own_folder
from experiments.lab.sampling import Generate, Sampling, check_dropout, generate_many, generator_of, nfe_text
from experiments.lab.scene_judge import Judge, fit_judge
from experiments.lab.scenes import (
    HELD_OUT_TEMPLATE,
    TEMPLATES,
    Canvas,
    Meaning,
    SceneBatches,
    Sentences,
    describe,
    load_digits_of,
)
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
from fm_jax.models import VectorEmbedding, linen_apply, make_mmdit, make_unet, num_params
from fm_jax.sources import Normal
from fm_jax.train.folder import write_text
from fm_jax.train.loop import DataIterator

PICTURES = ("samples.png", "loss.png")
CANVASES = {"digits": Canvas(16, 8, colours=False, templates=TEMPLATES[:2]), "mnist": Canvas(32, 14, colours=True)}
WIDTH, LONGEST = 96, 16
"""Width of the encoded words; words of the longest sentence, its end included."""
_UNET: dict[str, Any] = {
    "channels": 32,
    "num_blocks": 1,
    "num_heads": 4,
    "positions": True,
    "patch_size": 2,
}
_LEVELS: dict[str, dict[str, Any]] = {
    "digits": {"channels": 24, "channel_mults": (2, 3), "attention_levels": (0, 1)},
    "mnist": {"channel_mults": (1, 2, 3), "attention_levels": (1, 2)},
}
_SMALL_UNET: dict[str, Any] = {"channels": 8, "channel_mults": (1,), "attention_levels": (), "patch_size": 4}
_MMDIT: dict[str, Any] = {
    "hidden": 96,
    "num_layers": 4,
    "num_heads": 4,
    "patch_size": 4,
    "qk_norm": True,
    "scan_layers": False,
}
_SMALL_MMDIT: dict[str, Any] = {"hidden": 16, "num_layers": 2}


@dataclass(frozen=True)
class Config:
    """A run on composed digits. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "text_to_image"

    training: Training
    dataset: Literal["digits", "mnist"] = "digits"
    """Two grey digits of scikit-learn on 16x16, or two coloured ones of MNIST on 32x32."""
    data_dir: Path | None = None
    """Where TFDS keeps MNIST; by default TFDS_DATA_DIR or ~/tensorflow_datasets."""
    model: Literal["unet", "mmdit"] = "unet"
    """A U-Net whose pixels attend to the words, or the transformer of two streams, pixels and words."""
    text: Literal["joint", "frozen"] = "joint"
    """Train the encoder of the words with the network, or leave it as it was drawn."""
    clip_tokens: Path | None = None
    """CLIP's tokenizer, its folder or its file of merges, in place of whole words."""
    encoded_text: Path | None = None
    """Folder of sentences that `python -m experiments.encode --text` encoded, in place of an encoder of our own."""
    write_captions: Path | None = None
    """Write all sentences to this file, a line each, for `experiments.encode --captions`, and end."""
    method: Method = field(default_factory=lambda: Method(times="logit_normal", time_shift=2.0, first_steps=400))
    sampling: Sampling = field(default_factory=lambda: Sampling(guidance=2.5))
    text_dropout: float = 0.1
    """Probability that an example is trained without its sentence, for classifier-free guidance."""
    num_samples: int = 200
    """Pictures to judge of each kind of sentence."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, text_dropout="[0, 1)")
        check_dropout("--text-dropout", self.text_dropout, self.sampling.guidance, "a sentence")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        if self.encoded_text is not None:
            for name in ("text", "clip_tokens"):
                yield name, "--encoded-text is read already"
        if self.dataset == "digits":
            yield "data_dir", "--dataset digits is embedded in scikit-learn"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        yield from self.training.unused()
        yield from self.method.unused()
        yield from self.sampling.unused()

    @property
    def text_files(self) -> Path | None:
        """What files sentences are read by, if any."""
        return self.encoded_text or self.clip_tokens

    @property
    def canvas(self) -> Canvas:
        """How scenes are drawn."""
        return CANVASES[self.dataset]


SMOKE: dict[str, Any] = {"sampling": {"solver": "euler", "steps": 2, "sample_batch": 8}, "num_samples": 8}
CONFIG = Config(
    training=Training(
        run_dir=Path("runs/text_to_image"),
        total_steps=2600,
        batch_size=64,
        learning_rate=2e-3,
        decay="cosine",
        ema_decays=(0.998,),
    ),
)


def build(config: Config, reader: prompts.Reader | None = None) -> Experiment:
    """The network, and what reads sentences for it; by default what the run in the folder was trained with."""
    canvas, reader = config.canvas, reader or _reader_of_run(config)
    network: nn.Module
    if config.model == "unet":
        sizes = _UNET | _LEVELS[config.dataset] | (_SMALL_UNET if config.smoke else {})
        network = make_unet("tiny", **sizes, embed=VectorEmbedding(reader.vector_width), token_dim=reader.width)
    else:
        sizes = _MMDIT | (_SMALL_MMDIT if config.smoke else {}) | {"channels": canvas.shape[2]}
        network = make_mmdit("tiny", **sizes, token_dim=reader.width, vector_dim=reader.vector_width)
    model = reader.wrap(network)
    drop = DropCondition(config.text_dropout, reader.tell([""]))
    return Experiment(model, linen_apply(model), Normal(), canvas.shape, drop=drop, tell=reader.tell)


def _reader(config: Config, path: Path | None) -> prompts.Reader:
    """What reads sentences, from the files at `path` where the configuration has such."""
    canvas, frozen = config.canvas, config.text == "frozen"
    if path is None:
        return prompts.of_words(canvas.words, LONGEST, WIDTH, frozen=frozen)
    sentences = canvas.all_sentences(held_out=True)
    if config.encoded_text is not None:
        return prompts.of_features(path, sentences)
    return prompts.of_clip_tokens(path, sentences, WIDTH, frozen=frozen)


def _reader_of_run(config: Config) -> prompts.Reader:
    """What read sentences for the run in the folder.

    Raises:
        ValueError: if the files that it was trained with have changed since.
    """
    run_dir, path = config.training.run_dir, config.text_files
    facts = None if path is None else prompts.read_text_facts(run_dir)
    if facts is None:
        return _reader(config, path)
    path = Path(facts.path) if Path(facts.path).exists() else path
    reader = _reader(config, path)
    if reader.checksum != facts.checksum:
        raise ValueError(
            f"{path} has changed since {run_dir} was trained with it: its sentences are now read as something else "
            f"(SHA-256 {str(reader.checksum)[:16]}, and it was {facts.checksum[:16]}). Encode anew as before, or train "
            "another run."
        )
    return reader


def run(config: Config) -> dict[str, Any]:
    """Trains, samples, judges, draws; returns the numbers it prints."""
    if config.write_captions is not None:
        captions = config.canvas.all_sentences(held_out=True)
        write_text(config.write_captions, "\n".join(captions) + "\n")
        print(f"{config.write_captions}: {len(captions):,} sentences")
        return {}
    config = smoke(config, **SMOKE)
    check_batch(config.training)
    check_first_steps(config.method, config.training)
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    canvas, run_dir, path = config.canvas, config.training.run_dir, config.text_files
    reader = _reader(config, path)
    facts = None if path is None else prompts.TextFacts(str(path.absolute()), str(reader.checksum))
    experiment = build(config, reader)
    check_run_dir(config, [*PICTURES, FACTS], folders=["samples"])
    keys = jax.random.split(jax.random.key(config.training.seed), 5)
    key_train, key_init, key_draw, key_judge, key_pairs = keys
    digits = load_digits_of(config.dataset, "train", canvas.digit, config.data_dir, smoke=config.smoke)
    sentences = Sentences(experiment.told, canvas)
    params = experiment.init_params(key_init)
    print(
        f"composed digits of {config.dataset}, {'x'.join(map(str, canvas.shape))}, {config.model} with "
        f"{num_params(params):,} parameters, {jax.device_count()} {jax.default_backend()} device(s)"
    )

    def data_of(index: int, count: int) -> DataIterator:
        size, seed = config.training.batch_size // count, config.training.seed
        return SceneBatches(canvas, digits, sentences, seed, size, process_index=index, process_count=count)

    shown = canvas.draw_meanings(np.random.default_rng(0), 24, held_out=False)
    generate = generator_of(config, experiment)
    params = prompts.learn(
        config,
        experiment,
        params,
        generate,
        (key_train, key_draw, key_pairs),
        data_of,
        [describe(meaning, TEMPLATES[0]) for meaning in shown],
        lambda name, images, texts: save_captioned(run_dir / "samples" / f"{name}.png", images, texts),
        facts,
    )
    scenes = fit_judge(canvas, digits, num_steps=4 if config.smoke else 1500)
    results = judge(config, experiment, params, key_judge, scenes, generate)
    results["training_images_per_second"] = median_rate(run_dir)
    draw_loss(run_dir)
    write_results(run_dir, results)
    print(_report(config, results))
    return results


def asked(canvas: Canvas, num: int) -> dict[str, tuple[list[Meaning], list[str]]]:
    """The meanings and sentences of each kind that a network is judged on, `num` of each."""
    rng = np.random.default_rng(1)
    seen = canvas.draw_meanings(rng, num, held_out=False)
    held_out = canvas.draw_meanings(rng, num, held_out=True)
    templates = [canvas.templates[i % len(canvas.templates)] for i in range(num)]

    def told(meanings: Sequence[Meaning]) -> tuple[list[Meaning], list[str]]:
        return list(meanings), [describe(*each) for each in zip(meanings, templates, strict=True)]

    return {
        "seen": told(seen),
        "held_out_pairs": told(held_out),
        "swapped": told([meaning.swapped for meaning in seen]),
        "held_out_template": (seen, [describe(meaning, HELD_OUT_TEMPLATE) for meaning in seen]),
    }


def judge(
    config: Config, experiment: Experiment, params: Any, key: Any, scenes: Judge, generate: Generate
) -> dict[str, Any]:
    """Has pictures for each kind of sentence judged beside real scenes, drawn by `generate` and without guidance."""
    canvas, num, size = config.canvas, config.num_samples, config.sampling.sample_batch
    kinds = asked(canvas, num)
    rng = np.random.default_rng(2)
    meanings = canvas.draw_meanings(rng, 1000)
    digits = load_digits_of(config.dataset, "test", canvas.digit, config.data_dir, smoke=config.smoke)
    results: dict[str, Any] = {"real": scenes(canvas.draw(rng, meanings, digits), meanings).shares()}
    generators = {"guided": generate, "unguided": generator_of(config, experiment, 1.0)}
    for name, generate in generators.items():
        found, nfe = {}, None
        start = time.perf_counter()
        for kind, (meanings, texts) in kinds.items():
            # The same noise for every kind: a pair and the swapped one differ in what was said alone.
            images, nfe = generate_many(generate, params, key, experiment, experiment.told(texts), size)
            verdict = found[kind] = scenes(images, meanings)
            if (name, kind) == ("guided", "seen"):
                right = ["" if right else "*" for right in verdict.all_correct[:24]]
                save_captioned(
                    config.training.run_dir / "samples.png",
                    images[:24],
                    [text + mark for text, mark in zip(texts, right, strict=False)],
                )
        shares = {kind: verdict.shares() for kind, verdict in found.items()}
        both = found["seen"].all_correct & found["swapped"].all_correct
        shares["both_orders"] = {"all": float(both.mean())}
        drawn = len(kinds) * -(-num // size) * size
        results[name] = shares | {"nfe": nfe, "seconds_per_image": (time.perf_counter() - start) / drawn}
    return results


def _report(config: Config, results: dict[str, Any]) -> str:
    run_dir = config.training.run_dir
    lines = ["\n" + files_of(run_dir, *PICTURES, "metrics.jsonl", "config.json", "results.json", "checkpoints/")]
    words = {
        "seen": "seen pairs",
        "held_out_pairs": "held-out pairs",
        "swapped": "seen pairs, swapped",
        "both_orders": "both orders from one noise",
        "held_out_template": "a held-out kind of sentence",
    }
    guided, unguided = results["guided"], results["unguided"]
    lines.append(f"all as it was said, of {config.num_samples} pictures of each kind:")
    for kind, name in words.items():
        lines.append(
            f"  {name}: {guided[kind]['all']:.1%} at guidance {config.sampling.guidance:g}, "
            f"{unguided[kind]['all']:.1%} without"
        )
    slots = ", ".join(f"{name} {share:.1%}" for name, share in guided["seen"].items() if name != "all")
    lines.append(f"of seen pairs: {slots}; the judge finds {results['real']['all']:.1%} of real scenes as they are")
    lines.append(f"{1000 * guided['seconds_per_image']:.2f} ms an image (NFE {nfe_text(guided['nfe'])})")
    if rate := results["training_images_per_second"]:
        lines.append(f"training: {rate:,.0f} images/s")
    return "\n".join(lines)


def main(config: Config = CONFIG, description: str | None = __doc__) -> None:
    """The command line of a configuration."""
    command_line.main(run, Config, config, description)


if __name__ == "__main__":
    main()
