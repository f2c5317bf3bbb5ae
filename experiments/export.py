"""Writes a run as files for programs without this library: parameters, a sampler, a model card.

Command: `python -m experiments.export --run runs/digits --out model.safetensors --solver heun --steps 20`

Writes `model.safetensors`, the parameters by name with the configuration; `model.jax_export`, a sampler that needs JAX
alone, for any batch: `jax.export.deserialize(bytearray(...)).call(seeds, labels)`; and `model.md`, a card to be
completed. How samples are drawn is fixed in the sampler, by the options of `python -m experiments.sample`; its solver
must have fixed steps.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.lab import command_line
from experiments.lab.experiment import Restored, read_run, refuse_sentences, restore_run
from experiments.lab.export import (
    FORMAT,
    LARGEST,
    MARK,
    Card,
    check_exportable,
    export_draw,
    flat,
    make_draw,
    portable,
    read_data,
    size_of,
    write_card,
)
from experiments.lab.options import check_some
from experiments.lab.processes import by_first
from experiments.lab.samplers import options_of
from experiments.lab.sampling import OF_SOLVER, named_sampler
from experiments.lab.training import read_results, restore
from experiments.sample import Drawing, generator, sampling_of
from fm_jax import __version__
from fm_jax.checks import imported
from fm_jax.models import num_params
from fm_jax.train.folder import check_places, make_folder, replacing
from fm_jax.types import Params

INSTALL = "'fm_jax[experiments]'"
ENDING, SAMPLER, CARD = ".safetensors", ".jax_export", ".md"


@dataclass(frozen=True)
class Config(Drawing):
    """What to write. How samples are drawn is as in the run, where it is not given."""

    out: Path = Path("model.safetensors")
    """Where the parameters go (.safetensors); sampler (.jax_export) and card (.md) are put beside them."""
    average: str | None = None
    """Which average of the parameters, by its decay, one of --ema-decays of the run; or none, the parameters as they
    were last. By default the first, as in sampling."""
    platforms: tuple[Literal["cpu", "cuda", "tpu", "rocm"], ...] = ("cpu", "cuda", "tpu")
    """Where the sampler can run."""
    weights: Literal["inside", "beside"] = "inside"
    """Whether the parameters are a part of the sampler, or it is called with those of the .safetensors."""
    license: str | None = None
    """Of the model, such as apache-2.0, for the card."""
    data_license: str | None = None
    """Of the data, for the card."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_some("--platforms", self.platforms)
        if self.out.suffix != ENDING:
            raise ValueError(f"--out must end in {ENDING}, got {self.out}.")
        for name, value in (("--license", self.license), ("--data-license", self.data_license)):
            if value is not None and not (value.isprintable() and value.strip()):
                raise ValueError(f"{name} must be one line of text, got {value!r}.")
        if self.average is not None:
            _decay(self.average)


def run(config: Config) -> None:
    """Restores the run, exports, writes."""
    safetensors = imported("safetensors.numpy", "experiments.export", INSTALL)
    imported("flatbuffers", "experiments.export", INSTALL)
    of_run, experiment = read_run(config.run)
    refuse_sentences(config.run, experiment, "experiments.export")
    sampling, decays = sampling_of(config, of_run), of_run.training.ema_decays
    if config.learned_solver is None:
        check_exportable(named_sampler(sampling, of_run.method), sampling.solver)
    _check_average(config.average, decays)
    make_folder(config.out.parent)
    places = {ending: config.out.with_suffix(ending) for ending in (ENDING, SAMPLER, CARD)}
    check_places(config.out.parent, [path.name for path in places.values()])
    _check_card(places[CARD])

    restored, average = _restored(config, decays)
    experiment, inside = restored.experiment, config.weights == "inside"
    if inside and size_of(restored.params) > LARGEST:
        raise ValueError(
            f"--weights must be beside for {size_of(restored.params) / 1e9:.1f} GB of parameters: a sampler holds at "
            f"most {LARGEST / 1e9:g} GB."
        )
    sampling, generate = generator(config, restored)
    exported = export_draw(
        make_draw(generate, experiment),
        restored.params,
        labelled=experiment.num_classes is not None,
        platforms=config.platforms,
        inside=inside,
    )
    sampler = _sampler_facts(config, sampling, experiment.num_classes, exported)
    facts = read_data(config.run, restored.config)
    record = {"experiment": restored.config.EXPERIMENT} | portable(restored.config)
    card = Card(
        name=config.out.stem,
        facts=facts,
        config=record,
        results=read_results(config.run) or {},
        sampler=sampler,
        step=restored.step,
        average=average,
        shape=tuple(experiment.event_shape),
        num_classes=experiment.num_classes,
        num_params=num_params(restored.params),
        inside=inside,
        license=config.license,
        data_license=config.data_license,
    )
    told = {
        "format": "flax",  # what readers of other libraries look for
        "format_version": FORMAT,
        "fm_jax": __version__,
        "step": str(restored.step),
        "average": average,
        "config": json.dumps(record),
        "data": json.dumps(facts),
        "sampler": json.dumps(sampler),
    }
    if config.license is not None:
        told["license"] = config.license
    _write(places, restored.params, told, exported.serialize(), write_card(card), safetensors)
    print(
        f"{config.out}: {card.num_params:,} parameters of step {restored.step:,}, average {average}\n"
        f"{places[SAMPLER]}: {sampler['solver']} for {', '.join(config.platforms)}, any batch\n"
        f"{places[CARD]}: a card, to be completed"
    )


def _restored(config: Config, decays: tuple[float, ...]) -> tuple[Restored, str]:
    """The run with the parameters asked for, and which these are."""
    restored = restore_run(config.run)
    first = str(float(decays[0])) if decays else "none"
    if config.average is None:
        return restored, first
    wanted = _decay(config.average)
    state = restore(restored.config, restored.params)  # perhaps of a later step, if the run goes on
    params: Params = state.params if wanted is None else state.ema[str(wanted)]
    return restored._replace(step=int(state.step), params=params), "none" if wanted is None else str(wanted)


def _decay(average: str) -> float | None:
    if average == "none":
        return None
    try:
        return float(average)
    except ValueError:
        raise ValueError(f"--average must be a decay, such as 0.999, or none, got {average}.") from None


def _check_average(average: str | None, decays: tuple[float, ...]) -> None:
    if average is not None and (wanted := _decay(average)) is not None and wanted not in map(float, decays):
        there = ", ".join([f"{decay:g}" for decay in decays] + ["none"])
        raise ValueError(f"--average must be one that the run has, of {there}, got {average}.")


def _check_card(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if MARK not in path.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{path} is no model card of an export, and would be replaced: give another --out.")


def _sampler_facts(config: Config, sampling: Any, num_classes: int | None, exported: Any) -> dict[str, Any]:
    """What is fixed in the sampler, in the words of the options."""
    if config.learned_solver is not None:
        solver: dict[str, Any] = {"solver": config.learned_solver.name}
    else:
        own = options_of(sampling.solver)
        solver = {"solver": sampling.solver} | {name: getattr(sampling, name) for name in OF_SOLVER if name in own}
    if (num_classes is not None or config.weak_run is not None) and sampling.guidance != 1:
        names = ("guidance", "guidance_interval", "guidance_rule")
        solver |= {name: getattr(sampling, name) for name in names}
        solver |= {"also": config.also, "avoid": config.avoid}
        solver["weak_run"] = None if config.weak_run is None else config.weak_run.name
    solver |= {"weights": config.weights, "platforms": list(config.platforms), "jax": jax.__version__}
    solver["calling_convention_version"] = exported.calling_convention_version
    return {name: value for name, value in solver.items() if value is not None}


@by_first
def _write(
    places: dict[str, Path], params: Params, told: dict[str, str], sampler: bytearray, card: str, safetensors: Any
) -> None:
    with contextlib.ExitStack() as stack:  # all three, or none
        unfinished = {ending: stack.enter_context(replacing(path)) for ending, path in places.items()}
        unfinished[ENDING].write_bytes(safetensors.save(flat(params), told))  # its save_file is for the user alone
        unfinished[SAMPLER].write_bytes(sampler)
        unfinished[CARD].write_text(card, encoding="utf-8")


def main() -> None:
    """The command line."""
    command_line.main(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
