"""Text: masked diffusion of characters, or of any tokens, beside n-grams and the same network read from left to right.

Papers: Shi et al. 2024 (arXiv:2406.04329) and Sahoo et al. 2024 (arXiv:2406.07524) for masked diffusion, Zheng et al.
2024 (arXiv:2409.02908) for first hitting.
Command: `python -m experiments.text --corpus tinyshakespeare.txt`; the control of it is
`python -m experiments.text --corpus tinyshakespeare.txt --loss next_token --run-dir runs/text_control`.
Hardware: ten minutes on two CPU cores.
Expect: bits a character on the last tenth of the text between those of bigrams and those of trigrams. They are a bound,
an average over all orders in which the text could be written; from left to right, the easiest one, the same network
does better. Without --corpus it learns Python's help on itself, which is on every machine. A sample is printed while it
trains, and `experiments.sample --prompt "ROMEO: {20} the moon"` goes on from a text and fills its gaps.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command_line
from experiments.lab.corpus import (
    TOKENIZER,
    CorpusFacts,
    facts_of,
    read_corpus,
    read_corpus_facts,
    vocabulary_of,
    write_texts,
)
from experiments.lab.data import FACTS
from experiments.lab.experiment import Experiment
from experiments.lab.ngrams import ngram_bits
from experiments.lab.options import check_multiple, check_options, of_smoke
from experiments.lab.processes import by_first, everywhere, own_folder
from experiments.lab.sampling import generate_many
from experiments.lab.scenes import FreshBatches
from experiments.lab.smoke import TRAINING, smoke
from experiments.lab.token_bounds import total_nats
from experiments.lab.token_sampling import TokenSampling, make_token_generate
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
from fm_jax.likelihood import next_token_log_prob, token_bound
from fm_jax.models import TokenTransformer, linen_apply, num_params
from fm_jax.parameterization import bind
from fm_jax.paths import MixturePath
from fm_jax.schedules import Linear
from fm_jax.sources import Masked
from fm_jax.train import TrainState
from fm_jax.train.folder import make_folder, replacing
from fm_jax.types import ApplyFn, Array, Key, LossFn, Params

PICTURES = ("loss.png",)
SAMPLES = "samples.txt"
LOSSES: dict[str, Callable[[ApplyFn, MixturePath], LossFn]] = {
    "masked_elbo": losses.masked_elbo,
    "cross_entropy": losses.cross_entropy,
    "next_token": losses.next_token,
}
HEADS, NGRAMS = 4, 5
TEST_BATCH = 64
"""Windows of the held-out text that are judged at once."""


@dataclass(frozen=True)
class Config:
    """A run on a text. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "text"

    training: Training
    corpus: Path | None = None
    """File of text in UTF-8, of which the last tenth is held out; by default Python's help on itself."""
    tokenizer: Path | None = None
    """File of the package `tokenizers`, such as tokenizer.json, to read it by; by default each character is a token."""
    loss: Literal["masked_elbo", "cross_entropy", "next_token"] = "masked_elbo"
    """The bound on the likelihood, or the cross entropy of masked tokens, all times alike; or the control: the same
    network, causal, told the tokens before each alone."""
    sampling: TokenSampling = field(default_factory=lambda: TokenSampling(sample_batch=8))
    width: int = 128
    """Width of the network, a multiple of 8."""
    depth: int = 4
    """Blocks of the network."""
    length: int = 64
    """Tokens of a sample, and of a piece of the text that it learns from."""
    num_samples: int = 8
    """Texts drawn at the end."""
    num_times: int = 8
    """Evaluations for each piece of the held-out text, even: half as many strata of the times of the bound."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, length=2, num_times=2)
        check_multiple("--width", self.width, 2 * HEADS, f"twice its {HEADS} heads")
        check_multiple("--num-times", self.num_times, 2, "two draws in each stratum")
        usual = TokenSampling()
        for name in ("solver", "position", "per_step"):
            value = getattr(self.sampling, name)
            if self.loss == "next_token" and value not in (getattr(usual, name), getattr(self.drawn, name)):
                raise ValueError(
                    f"--{name.replace('_', '-')} must be left out with --loss next_token, which is drawn from left to "
                    f"right, a token at a time, got {value}."
                )

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield "training.init_from", "text begins with parameters of its own"
        yield "sampling.guidance", "a text has no classes; the experiments on images are guided"
        if self.loss == "next_token":
            yield "num_times", "--loss next_token has the likelihood itself"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        yield from self.training.unused()
        yield from self.sampling.unused()

    @property
    def drawn(self) -> TokenSampling:
        """How samples are drawn: of the control from left to right."""
        if self.loss != "next_token":
            return self.sampling
        return dataclasses.replace(self.sampling, solver="first_hitting", position="first", per_step=1)


SMOKE: dict[str, Any] = {
    "sampling": {"sample_batch": 2},
    "width": 8,
    "depth": 1,
    "length": 16,
    "num_samples": 2,
    "num_times": 2,
}
"""The sizes of a smoke run."""
SMOKE_CHARACTERS = 20_000
CONFIG = Config(
    training=Training(
        run_dir=Path("runs/text"),
        total_steps=700,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=50,
        decay="cosine",
        ema_decays=(0.98,),
        log_every=20,
        save_every=100,
        sample_every=100,
    ),
)


def build(config: Config, facts: CorpusFacts | None = None) -> Experiment:
    """The network for a text of which `facts` are known; by default those that lie in the folder of the run."""
    run_dir = config.training.run_dir
    tokenizer = run_dir / TOKENIZER if facts is None else config.tokenizer
    vocabulary = vocabulary_of(facts or read_corpus_facts(run_dir), tokenizer)
    mask, control = vocabulary.size, config.loss == "next_token"
    path = MixturePath(Linear(), Masked(mask + 1, mask))
    model = TokenTransformer(
        mask + 1,
        mask=mask,
        hidden=config.width,
        num_layers=config.depth,
        num_heads=HEADS,
        timed=False,
        causal=control,
        scan_layers=False,
    )
    network = linen_apply(model)
    apply_fn = losses.one_late(network, path) if control else network
    return Experiment(model, apply_fn, path.source, (config.length,), path=path, vocabulary=vocabulary, causal=control)


def run(config: Config) -> dict[str, Any]:
    """Trains, judges, writes; returns the numbers it prints."""
    config = smoke(config, **SMOKE)
    check_batch(config.training)
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    run_dir, length = config.training.run_dir, config.length
    check_run_dir(config, [*PICTURES, SAMPLES, FACTS, TOKENIZER], folders=["samples"])
    text, source = read_corpus(config.corpus)
    text = text[:SMOKE_CHARACTERS] if config.smoke else text
    facts = facts_of(text, source, config.tokenizer)
    experiment = build(config, facts)
    assert experiment.path is not None
    assert experiment.vocabulary is not None
    path, vocabulary = experiment.path, experiment.vocabulary
    cut = len(text) * 9 // 10
    tokens, held_out = vocabulary.encode(text[:cut]), vocabulary.encode(text[cut:])
    if len(held_out) < length:
        raise ValueError(
            f"--corpus must have at least {length} {vocabulary.what}s in its last tenth, one piece of --length, got "
            f"{len(held_out)} in {source}."
        )
    key_train, key_init, key_draw, key_bound = jax.random.split(jax.random.key(config.training.seed), 4)
    params = experiment.init_params(key_init)
    print(
        f"{source}: {len(text):,} characters, of which the last {len(text) - cut:,} are held out, read as "
        f"{vocabulary.size} {vocabulary.what}s; a transformer with {num_params(params):,} parameters, "
        f"{jax.device_count()} {jax.default_backend()} device(s)"
    )

    def pieces(rng: np.random.Generator, step: int, num: int) -> dict[str, Any]:
        begin = rng.integers(len(tokens) - length + 1, size=num)
        return {"x1": tokens[begin[:, None] + np.arange(length)]}

    data = FreshBatches(pieces, config.training.seed, config.training.batch_size // jax.process_count())
    generate = make_token_generate(config.drawn, path, experiment.apply_fn)

    def write(params: Params, num: int, file: Path) -> float | None:
        size = min(num, config.sampling.sample_batch)
        drawn, nfe = generate_many(generate, params, key_draw, experiment, np.zeros(num, np.int32), size)
        _write(file, experiment.written(drawn))
        return nfe

    def draw(step: int, state: TrainState) -> None:
        file = run_dir / "samples" / f"step_{step:06d}.txt"
        write(sampling_params(state, config.training), min(config.num_samples, config.sampling.sample_batch), file)

    def begin(params: Params) -> Params:
        if config.tokenizer is not None:  # not before it is known that no run was trained with another one
            _copy(config.tokenizer, run_dir / TOKENIZER)
        return params

    loss_fn = LOSSES[config.loss](experiment.apply_fn, path)
    state = train(config, key_train, params, loss_fn, data, draw, facts=facts, begin=begin)
    params = everywhere(sampling_params(state, config.training))
    nats, error, num = held_out_nats(config, experiment, params, key_bound, held_out)
    characters = num * (len(text) - cut) / len(held_out)
    symbols = np.unique(np.array(list(text)), return_inverse=True)[1]
    # Of a tokenizer that loses characters, as by lower case, the bits are those of another text.
    lossless = vocabulary.decode(held_out.tolist()).strip() == text[cut:].strip()
    results: dict[str, Any] = {
        "bits_per_character": nats / characters / math.log(2) if lossless else None,
        "standard_error": error / characters / math.log(2) if lossless else None,
        "bits_per_token": nats / num / math.log(2),
        "perplexity_per_token": math.exp(nats / num),
        "held_out_characters": round(characters),
        "ngram_bits_per_character": ngram_bits(symbols[:cut], symbols[cut:], symbols.max() + 1, NGRAMS).tolist(),
        "nfe": write(params, config.num_samples, run_dir / SAMPLES),
        "training_pieces_per_second": median_rate(run_dir),
    }
    draw_loss(run_dir)
    write_results(run_dir, results)
    print(_report(config, results))
    return results


def held_out_nats(
    config: Config, experiment: Experiment, params: Params, key: Key, held_out: np.ndarray
) -> tuple[float, float, int]:
    """Nats of held-out tokens, in pieces that know nothing of each other; their standard error; how many they are.

    Of masks a bound, whose error is that of its draws; of the control the likelihood itself.

    Args:
        config: of the run.
        experiment: its network.
        params: its parameters.
        key: of the bound.
        held_out: tokens; what is left of them behind the last whole piece is left out.
    """
    path, num = experiment.path, len(held_out) // config.length
    assert path is not None
    windows = held_out[: num * config.length].reshape(num, config.length)

    def judge(params: Params, key: Key, x1: Array) -> tuple[Array, Array]:
        denoiser = bind(experiment.apply_fn, params)
        if config.loss == "next_token":
            return -next_token_log_prob(denoiser, path, x1), jnp.zeros(len(x1))
        return token_bound(denoiser, path, key, x1, bound="mask", num_times=config.num_times)

    return *total_nats(judge, params, key, TEST_BATCH, windows), windows.size


@by_first
def _copy(tokenizer: Path, to: Path) -> None:
    with replacing(to) as unfinished:
        shutil.copyfile(tokenizer, unfinished)


@by_first
def _write(path: Path, texts: list[str]) -> None:
    """Writes the texts, and prints how the first one begins."""
    make_folder(path.parent)
    write_texts(path, texts)
    print(f"\n{path}:\n{texts[0][:400]}\n")


def _report(config: Config, results: dict[str, Any]) -> str:
    run_dir = config.training.run_dir
    files = (SAMPLES, *PICTURES, "samples/", "metrics.jsonl", "config.json", FACTS, "results.json", "checkpoints/")
    bits, error = results["bits_per_character"], results["standard_error"]
    if bits is None:
        of = f"none, as the tokenizer loses some ({results['bits_per_token']:.3f} bits a token)"
    else:
        of = f"at most {bits:.3f} +- {error:.3f}" if config.loss != "next_token" else f"{bits:.3f}"
    ngrams = ", ".join(f"{each:.3f}" for each in results["ngram_bits_per_character"])
    lines = [
        "\n" + files_of(run_dir, *files),
        f"bits a character on {results['held_out_characters']:,} held-out characters: {of}, in pieces of "
        f"{config.length} tokens; by counting n-grams, n = 1 to {NGRAMS}: {ngrams}",
        f"a sample takes {results['nfe']:.0f} NFE",
    ]
    if rate := results["training_pieces_per_second"]:
        lines.append(f"training: {rate * config.length:,.0f} tokens/s")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
