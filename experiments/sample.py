"""Draws samples from a finished or interrupted run on images, points of the plane, sentences, videos, text or levels.

Command: `python -m experiments.sample --run runs/digits --num 64 --class 3 --guidance 2 --solver heun --steps 20 \
--out samples.png`

Writes a picture (`.png`) or the arrays (`.npz`: samples, labels), and prints the number of network evaluations.
Guidance leads away from no class in particular; with `--avoid 5` away from class 5, with `--weak-run DIR` away from a
weaker network, such as that of a shorter run (autoguidance); with `--also 8` to class 8 as well.

A run on sentences takes `--prompt "a three left of a seven"`, and `--negative` to be led away from another sentence
than the empty one. Of a run on pixels, `--image picture.png --mask mask.png` draws anew what is white in the mask, and
`--image picture.png --strength 0.6` begins with the picture under so much of the noise; of a run on videos,
`--first-frame picture.png` goes on from a picture.

A run on text goes on from `--prompt "ROMEO:"`, and fills gaps of so many tokens, `--prompt "ROMEO: {20} the moon"`:
`--solver first_hitting --temperature 0.8`. It writes texts (`.txt`) or arrays (`.npz`).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from experiments.lab import command_line, figures
from experiments.lab.corpus import given_of, write_texts
from experiments.lab.experiment import Experiment, Restored, read_run, restore_run
from experiments.lab.latents import codec_of_run
from experiments.lab.levels import to_levels
from experiments.lab.options import SEED, as_typed, check_options, option
from experiments.lab.processes import by_first
from experiments.lab.samplers import SAMPLERS, load_solver, table
from experiments.lab.sampling import (
    OF_SOLVER,
    OF_THE_WHOLE_WAY,
    RANGES,
    Generate,
    Given,
    RuleName,
    Sampling,
    Weak,
    check_interval,
    generate_many,
    make_generate,
    nfe_text,
)
from experiments.lab.token_sampling import (
    SOLVERS,
    TOKEN_RANGES,
    TOKEN_SOLVER_HELP,
    GivenTokens,
    RemaskName,
    TokenSampling,
    make_token_generate,
)
from fm_jax.checks import check_member
from fm_jax.data.picture import PictureReader
from fm_jax.latents import PIXELS
from fm_jax.samplers import LearnedSolver
from fm_jax.samplers.first_hitting import Position
from fm_jax.train.folder import make_folder, replacing
from fm_jax.types import Cond

_TYPED = {r", or drop its last \d+ with truncate=True": ""}
"""What the library says of sentences that is not of this command line."""
_SOLVER_HELP = tyro.conf.arg(
    metavar="NAME", help=f"Sampler, one of\n\n{table()}\n\nand for runs on tokens\n\n{TOKEN_SOLVER_HELP}"
)
_AnyGrid = Literal["uniform", "cosine", "edm", "log_snr", "training_times", "linear_quadratic", "mask_cosine"]
"""`Grid` and `TokenGrid`."""
_POINTS, _TOKENS = ({field.name for field in dataclasses.fields(kind)} for kind in (Sampling, TokenSampling))
_OF_TOKENS = tuple(sorted(_TOKENS - _POINTS))
"""Options that runs on points do not take."""
_OF_POINTS = (*sorted(_POINTS - _TOKENS), "also", "avoid", "weak_run", "learned_solver", "negative", "image", "mask")
_OF_POINTS += ("strength", "first_frame")
"""Options that runs on tokens do not take."""
_SEEN = {".png": "pictures", ".gif": "videos", ".txt": "texts"}
_NEAR = 64
"""How far black and white of a mask may be off: JPEG changes them by less."""
_GREY = 16
"""How far the channels of a grey picture may be apart: of JPEG they are, a little."""


@dataclass(frozen=True)
class Drawing:
    """How to draw from a run. Options that are not given are those of the run."""

    run: Path
    """Folder of the run."""
    also: int | None = None
    """A second class, to be guided towards at the same time; the two scales add up."""
    avoid: int | None = None
    """Class to be guided away from: a negative condition."""
    weak_run: Path | None = None
    """Folder of a run with a weaker network of the same method, to be guided away from."""
    solver: Annotated[str | None, _SOLVER_HELP] = None
    learned_solver: Path | None = None
    """File of a solver trained by `python -m experiments.learned_solver`, in place of a sampler's name."""
    steps: int | None = None
    """Steps of a sampler with fixed steps."""
    grid: _AnyGrid | None = None
    """Their times."""
    tolerance: float | None = None
    """Tolerance of an adaptive sampler."""
    diffusion: float | None = None
    """Noise coefficient of an SDE."""
    eta: float | None = None
    """Share of fresh noise in ddim, 0 to 1."""
    churn: float | None = None
    """Fresh noise of the sampler churn."""
    guidance: float | None = None
    """Scale of guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Times between which to guide."""
    guidance_rule: RuleName | None = None
    """How the two branches are combined."""

    def __post_init__(self) -> None:
        # Some are a subclass's; 0.01 of the way is about one step of a picture of 8 bits.
        ranges = RANGES | TOKEN_RANGES
        check_options(self, label=0, also=0, avoid=0, seed=SEED, strength="[0.01, 1]", **ranges)
        if self.solver is not None:
            check_member("--solver", self.solver, (*SAMPLERS, *SOLVERS))
        ways = [name for name in ("also", "avoid", "negative", "weak_run") if getattr(self, name, None) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(map(option, ways))} are {len(ways)} ways to guide: give one.")
        if self.also is not None and self.guidance_rule not in (None, "extrapolate"):
            raise ValueError(f"--also goes with --guidance-rule extrapolate, got {self.guidance_rule}.")
        if self.learned_solver is not None and self.solver is not None:
            raise ValueError("--learned-solver takes the place of --solver: give one.")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect on samples of that run, and why."""
        of_run, experiment = read_run(self.run)
        for name in _OF_TOKENS if experiment.path is None else _OF_POINTS:
            if hasattr(self, name) and not (name in ("image", "mask") and experiment.levels is not None):
                yield name, "the run is on " + ("points" if experiment.path is None else "tokens")
        sampling = sampling_of(self, of_run)
        if experiment.null_cond is None and self.weak_run is None:
            would = "; with --weak-run it would" if experiment.path is None else ""
            for name in ("guidance", "guidance_interval", "guidance_rule"):
                yield name, f"the run has no classes{would}"
        if sampling.guidance == 1:
            for name in ("avoid", "weak_run"):
                yield name, "--guidance 1 is none; another scale would take it"
        if self.weak_run is not None and self.weak_run.resolve() == self.run.resolve():
            yield "weak_run", "it is the run itself, from which nothing leads away"
        if self.learned_solver is not None:
            for name in OF_SOLVER:
                yield name, "--learned-solver has its own steps"
        for name, why in sampling.unused(""):
            if name != "guidance_interval" or self.also is None:  # which two classes have at any scale
                yield name, why


@dataclass(frozen=True)
class Config(Drawing):
    """What to draw. Options that are not given are those of the run."""

    out: Path | None = None
    """Where to: a picture (.png), texts (.txt) or arrays (.npz); by default samples.png, or of a text samples.txt."""
    num: int = 64
    """How many samples."""
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all samples; by default every class in turn."""
    prompt: str | None = None
    """Sentence of all samples, for a run on sentences; how all begin, and with gaps {n} of n tokens go on, for one on
    text ({{n}} is {n} itself)."""
    negative: str | None = None
    """Sentence to be led away from; by default the empty one."""
    image: Path | None = None
    """Picture of which a part is kept, or to begin from; of the size of the samples."""
    mask: Path | None = None
    """Picture that is white where the samples are drawn anew, and black where --image is kept: without greys, which
    say neither, and opaque."""
    strength: float | None = None
    """Begin from --image: 1 forgets it, and with 0.01, the least, hardly anything changes."""
    first_frame: Path | None = None
    """Picture that the videos begin with."""
    autoencoder: Path | None = None
    """What decodes the samples of a run on latents, where it is no longer where it was."""
    position: Position | None = None
    """Of tokens, which mask first_hitting replaces next."""
    per_step: int | None = None
    """Tokens that first_hitting draws from one evaluation."""
    remask: RemaskName | None = None
    """Rule by which mixture_steps masks tokens again."""
    temperature: float | None = None
    """Of the probabilities of tokens: less than 1 favours likely ones."""
    top_p: float | None = None
    """Draw from the fewest tokens that have this probability together."""
    seed: int = 0
    """Seed of the noise."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect on samples of that run, and why."""
        yield from super().unused()
        of_run, _ = read_run(self.run)
        if sampling_of(self, of_run).guidance == 1:
            yield "negative", "--guidance 1 is none; another scale would take it"
        if getattr(getattr(of_run, "data", None), "encoded", None) is None:
            yield "autoencoder", "the run was not trained on latents of --encoded"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("also", "avoid"):
            if self.label is not None and getattr(self, name) == self.label:
                raise ValueError(f"{option(name)} must be another class than --class, got {self.label} for both.")
        if self.prompt is not None and self.negative == self.prompt:
            raise ValueError(f"--negative must be another sentence than --prompt, got {self.prompt!r} for both.")
        if self.prompt is not None and self.label is not None:
            raise ValueError("--prompt and --class are what two kinds of runs are told: give one.")
        if (self.image is None) != (self.mask is None and self.strength is None):
            raise ValueError(
                "--image goes with --mask, whose black part is kept, or with --strength, how much changes."
            )
        if self.mask is not None and self.strength is not None:
            raise ValueError("--mask keeps a part of --image, and --strength something of all of it: give one.")
        if self.strength is not None and self.strength < 1 and self.learned_solver is not None:
            raise ValueError(OF_THE_WHOLE_WAY.format(self.strength))
        if self.first_frame is not None and self.image is not None:
            raise ValueError("--first-frame begins a video, and --image is for pictures: give one.")
        if self.out is not None and self.out.suffix not in (".png", ".npz", ".gif", ".txt"):
            raise ValueError(
                f"--out must end in .png or .npz, for videos in .gif, or for texts in .txt, got {self.out}."
            )


def sampling_of(config: Drawing, of_run: Any, solver: LearnedSolver | None = None) -> Any:
    """How to draw, a `Sampling` or `TokenSampling`: as the run, but for what is given; with the solver, once read."""
    given = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(of_run.sampling)}
    sampling = dataclasses.replace(of_run.sampling, **{k: v for k, v in given.items() if v is not None})
    of_run = dataclasses.replace(of_run, sampling=sampling)  # which refuses what the run cannot be drawn from by
    sampling = getattr(of_run, "drawn", sampling)
    for name, value in given.items():
        if value is not None and value != getattr(sampling, name):
            raise ValueError(f"{option(name)} must be left out with this run, got {value}: it is drawn from otherwise.")
    by_null_label = sampling.guidance != 1 and config.avoid is None and config.weak_run is None
    if getattr(of_run, "label_dropout", None) == 0 and config.also is not None:
        raise ValueError(
            "--also needs what the network makes without a label, which a run with --label-dropout 0 does not know, at "
            "any --guidance. Leave it out."
        )
    if by_null_label and getattr(of_run, "label_dropout", None) == 0:
        raise ValueError(
            f"--guidance must be 1 for a run with --label-dropout 0, which knows no samples without a label, got "
            f"{sampling.guidance:g}."
        )
    if isinstance(sampling, TokenSampling):
        return sampling
    if config.also is not None and sampling.guidance_rule != "extrapolate":  # the run's own rule
        raise ValueError(
            f"--also goes with --guidance-rule extrapolate, and the run has {sampling.guidance_rule}: give it as well."
        )
    told = any(getattr(of_run, name, None) is not None for name in ("label_dropout", "text_dropout"))
    guides = told or config.weak_run is not None
    guides = guides and (sampling.guidance != 1 or config.also is not None)
    if guides and (config.learned_solver is None or solver is not None):
        check_interval(sampling, of_run.method, getattr(config, "strength", None) or 1.0, solver)
    return sampling


def run(config: Config) -> None:
    """Restores the run, draws, writes."""
    restored = restore_run(config.run)
    experiment = restored.experiment
    suffix = _suffix(experiment)
    out = config.out or Path(f"samples{'.png' if suffix == '.gif' else suffix}")
    make_folder(out.parent)
    if out.is_dir():
        raise SystemExit(f"--out {out} is a folder: give a file.")
    if out.suffix not in (".npz", suffix):
        raise SystemExit(f"--out must end in {suffix}, as the run has {_SEEN[suffix]}, or in .npz, got {out}.")
    codec = codec_of_run(restored.config, "--autoencoder", config.autoencoder)
    try:
        labels, given = _labels(config, experiment), _given(config, experiment)
        sampling, generate = generator(config, restored, config.negative, given)
        size, key = min(config.num, sampling.sample_batch), jax.random.key(config.seed)
        samples, nfe = generate_many(generate, restored.params, key, experiment, labels, size)
    except ValueError as error:  # what a sampler or a rule of guidance refuses
        raise SystemExit(str(error)) from error
    latents = None if codec is None else experiment.to_data(samples)
    if codec is not None and latents is not None:
        samples = codec.decode(latents)
    _write(out, config.prompt, experiment, samples, labels, latents)
    solver = config.learned_solver or sampling.solver
    print(f"{out}: {config.num} samples from step {restored.step:,} with {solver}, NFE {nfe_text(nfe)}")


def _suffix(experiment: Experiment) -> str:
    """What the name of a file of samples that people look at ends in."""
    if experiment.vocabulary is not None:
        return ".txt"
    return ".gif" if len(experiment.event_shape) == 4 else ".png"


def generator(
    config: Drawing, restored: Restored, negative: str | None = None, given: Given | GivenTokens | None = None
) -> tuple[Any, Generate]:
    """How to draw from a run, and the function that does.

    Args:
        config: how to draw.
        restored: the run.
        negative: the sentence to be led away from, for a run on sentences; by default the empty one.
        given: as in `make_generate`.

    Raises:
        SystemExit: for options that do not fit the run.
        ValueError: for what a sampler refuses.
    """
    experiment, num_classes = restored.experiment, restored.experiment.num_classes
    null_label, weak = experiment.null_cond, None
    if experiment.path is not None:
        sampling = sampling_of(config, restored.config)
        assert not isinstance(given, Given)
        network = experiment.apply_fn
        return sampling, make_token_generate(sampling, experiment.path, network, null_cond=null_label, given=given)
    if negative is not None:
        null_label = _told("--negative", negative, experiment)
    if config.avoid is not None:
        null_label = _label("--avoid", config.avoid, num_classes)
    if config.weak_run is not None:
        weaker = restore_run(config.weak_run, "--weak-run")
        if getattr(weaker.config, "method", None) != restored.config.method:
            raise SystemExit(f"--weak-run {config.weak_run} was trained by another method than {config.run}.")
        if weaker.experiment.event_shape != experiment.event_shape or weaker.experiment.num_classes != num_classes:
            raise SystemExit(f"--weak-run {config.weak_run} was trained on other data than {config.run}.")
        weak = Weak(weaker.experiment.apply_fn, weaker.params)
    solver = None if config.learned_solver is None else load_solver(config.learned_solver, restored.params)
    sampling = sampling_of(config, restored.config, solver)
    assert not isinstance(given, GivenTokens)
    generate = make_generate(
        sampling,
        restored.config.method,
        experiment.apply_fn,
        null_label=null_label,
        also=None if config.also is None else _label("--also", config.also, num_classes),
        weak=weak,
        learned_solver=solver,
        given=given,
    )
    return sampling, generate


def _label(name: str, label: int, num_classes: int | None) -> int:
    if num_classes is None:
        raise SystemExit(f"{name} needs a run with classes, and this one has none, got {label}.")
    if not 0 <= label < num_classes:
        raise SystemExit(f"{name} must be one of the run's {num_classes} classes, from 0, got {label}.")
    return label


def _labels(config: Config, experiment: Experiment) -> Cond:
    """What the network is told of each sample."""
    if experiment.tell is not None:
        if config.label is not None:
            raise SystemExit(
                f"--class is for runs with classes, and this one has sentences: give --prompt, got {config.label}."
            )
        if config.prompt is None:
            raise SystemExit("--prompt must be given: the run was trained on sentences.")
        return jax.tree.map(
            lambda leaf: np.repeat(leaf, config.num, axis=0), _told("--prompt", config.prompt, experiment)
        )
    prompt = None if experiment.vocabulary is not None else config.prompt
    for name, value in (("--prompt", prompt), ("--negative", config.negative)):
        if value is not None:
            raise SystemExit(f"{name} is for runs on sentences, and this one was not trained on any, got {value!r}.")
    num_classes = experiment.num_classes
    if config.label is None:
        return np.arange(config.num) % (num_classes or 1)
    return np.full(config.num, _label("--class", config.label, num_classes))


def _told(name: str, prompt: str, experiment: Experiment) -> Cond:
    """What the network is told of a sentence, [1, ...]; what it cannot be told is refused in the option's name."""
    try:
        return experiment.told([prompt])
    except ValueError as error:
        raise SystemExit(as_typed(str(error), _TYPED | {r"\bprompt(s\[0\]| 0\b)": name})) from error


def _given(config: Config, experiment: Experiment) -> Given | GivenTokens | None:
    """The part of the samples that is known, or what they begin from."""
    if experiment.vocabulary is not None and config.prompt is not None:
        try:
            return given_of(config.prompt, experiment.vocabulary, *experiment.event_shape, gaps=not experiment.causal)
        except ValueError as error:
            raise SystemExit(f"--prompt {error}") from error
    path = config.image or config.first_frame
    if path is None:
        return None
    name, shape = ("--image" if config.first_frame is None else "--first-frame"), experiment.event_shape
    if len(shape) != (3 if config.first_frame is None else 4):
        raise SystemExit(
            f"{name} is for runs on {'pictures' if config.first_frame is None else 'videos'}, and this is none."
        )
    if experiment.space != PIXELS or shape[-1] not in (1, 3):
        raise SystemExit(f"{name} is for runs on pixels, and this one makes latents of {shape[-1]} channels.")
    image = _read(name, path, shape[-3:]).astype(np.float32) / 127.5 - 1
    if config.first_frame is not None:
        mask = np.zeros((shape[0], 1, 1, 1), bool)
        mask[0] = True
        return Given(np.broadcast_to(image, shape), mask)
    if config.strength is not None:
        return Given(image, strength=config.strength)
    assert config.mask is not None
    known = ~_drawn(config.mask, shape[:2])
    if experiment.levels is not None:
        return GivenTokens(to_levels(image, experiment.levels), np.broadcast_to(known, shape))
    return Given(image, known)


def _drawn(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """Where a mask has the samples drawn anew, bool [h, w, 1]."""
    pixels = _read("--mask", path, (*size, 1))
    drawn = pixels > 255 - _NEAR
    if num := int((~drawn & (pixels >= _NEAR)).sum()):
        raise SystemExit(
            f"--mask {path} must be black and white alone, got {num} of {pixels.size} pixels between: cut it at a "
            "threshold, or draw it without soft edges."
        )
    if not drawn.any():
        raise SystemExit(f"--mask {path} is black everywhere: nothing would be drawn. White is drawn anew.")
    if drawn.all():
        raise SystemExit(f"--mask {path} is white everywhere: nothing of --image would be kept. Black is kept.")
    return drawn


def _read(name: str, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A picture uint8 [h, w, c] of the size that samples have; one that would be kept as another one is refused."""
    if not path.is_file():
        raise SystemExit(f"{name} {path} does not exist: give a picture.")
    colours, notes = PictureReader(colour="rgb")(path)
    if colours.shape[:2] != shape[:2]:
        sizes = ["x".join(map(str, each[:2])) for each in (shape, colours.shape)]
        raise SystemExit(f"{name} {path} must be {sizes[0]}, as the samples of the run, got {sizes[1]}.")
    for note in notes:
        if note.startswith("transparent"):
            raise SystemExit(f"{name} {path} is transparent in part, and must be opaque: lay it on a background.")
        if note.startswith("of several frames"):
            raise SystemExit(f"{name} {path} must be one picture, got one {note.split(', ')[0]}: save one of them.")
    if shape[-1] == 3:
        return colours
    if np.ptp(colours.astype(int), axis=2).max() > _GREY:
        raise SystemExit(f"{name} {path} must be grey, and has colours: make it grey before.")
    return PictureReader(colour="grey")(path).pixels


@by_first
def _write(
    out: Path,
    prompt: str | None,
    experiment: Experiment,
    samples: np.ndarray,
    labels: Cond,
    latents: np.ndarray | None = None,
) -> None:
    if out.suffix == ".npz":
        of_classes: dict[str, Any] = {} if experiment.num_classes is None else {"labels": labels}
        if prompt is not None:
            of_classes = {"prompt": prompt}
        if experiment.vocabulary is not None:
            of_classes |= {"texts": np.array(experiment.written(samples))}
        with replacing(out) as unfinished:
            if latents is None:
                np.savez(unfinished, samples=experiment.to_data(samples), **of_classes)
            else:
                np.savez(unfinished, samples=samples, latents=latents, **of_classes)
    elif experiment.vocabulary is not None:
        texts = experiment.written(samples)
        write_texts(out, texts)
        print(texts[0])
    elif samples.ndim == 5:
        figures.save_clips(out, samples, [prompt or ""] * len(samples))
    elif samples.ndim == 4:
        figures.save_sheet(out, samples if latents is not None else experiment.visible(samples))
    else:
        figures.save_points(out, samples)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
