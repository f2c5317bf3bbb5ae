"""Training of any experiment: run folder, devices, checkpoints, loop."""

import contextlib
import dataclasses
import json
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.lab.data import MAY_CHANGE as DATA_MAY_CHANGE
from experiments.lab.data import Noted, write_facts
from experiments.lab.figures import save_loss_curve
from experiments.lab.options import SEED, STEPS, check_multiple, check_options, option
from experiments.lab.parallel import Parallel, make_parallel
from experiments.lab.processes import by_first, end_by_sigterm, is_first
from fm_jax.checks import shown
from fm_jax.train import TrainState, create_state, make_optimizer
from fm_jax.train.checkpoint import Checkpointer
from fm_jax.train.folder import check_places, write_text
from fm_jax.train.log import MetricsWriter, read_metrics
from fm_jax.train.loop import DataIterator, fit
from fm_jax.types import Key, LossFn, Params

CONFIG, RESULTS, METRICS, PROFILE = "config.json", "results.json", "metrics.jsonl", "profile"
_MAY_CHANGE: tuple[str, ...] = (*DATA_MAY_CHANGE, "sampling", "num_samples", "frames", "floor_repeats")
_MAY_CHANGE += tuple(f"training.{name}" for name in ("run_dir", "log_every", "save_every", "sample_every", "keep"))
_MAY_CHANGE += tuple(f"training.{name}" for name in ("parallel", "shards", "steps_per_call", "profile"))


@dataclass(frozen=True)
class Training:
    """How a network is trained, and where the run is kept."""

    run_dir: Path
    """Folder of the run. The same command continues a run that was interrupted, bit for bit."""
    init_from: Path | None = None
    """Folder of a run whose parameters, as it is sampled with, this one begins with: for another learning rate, a
    longer decay or other data. The optimiser, the averages and the steps begin anew."""
    total_steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 128
    """Examples a step, over all devices of all processes."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; None does not clip."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    accumulate: int = 1
    """Micro-batches a step."""
    ema_decays: tuple[float, ...] = (0.999,)
    """One average of the parameters is kept for each; samples are drawn with the first, or, without any, with the
    parameters themselves."""
    seed: int = 0
    """Seed of everything that is random."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    save_every: int = 500
    """Steps between two checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    sample_every: int = 500
    """Steps between two pictures of samples drawn during training."""
    parallel: Parallel | None = None
    """How devices share a step: each computes its share of the batch, under pmap in one process or shard_map in any
    number, the same bits; or the compiler divides the whole batch and the state is cut over devices (fsdp), with the
    same noise on any number of them. By default pmap, or shard_map in several processes."""
    shards: int | None = None
    """Devices that one copy of the state is cut over under fsdp; by default all."""
    steps_per_call: int | None = None
    """Steps in one call of the devices; by default what was the quickest for the network."""
    profile: bool = False
    """Trace some of the first steps to the folder profile of the run, for TensorBoard and Perfetto."""

    def __post_init__(self) -> None:
        check_options(
            self,
            learning_rate="(0, inf)",
            warmup_steps=(0, STEPS[1]),
            **dict.fromkeys(("total_steps", "log_every", "save_every", "sample_every"), STEPS),
            clip_norm="(0, inf)",
            weight_decay="[0, inf)",
            ema_decays="(0, 1)",
            seed=SEED,
        )
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"--warmup-steps must be less than --total-steps, got {self.warmup_steps} and {self.total_steps}."
            )
        if self.init_from is not None and self.init_from.absolute() == self.run_dir.absolute():
            raise ValueError(f"--init-from must be another run than --run-dir, got {self.init_from} for both.")

    def unused(self, prefix: str = "training.") -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        if self.parallel != "fsdp":
            yield prefix + "shards", "only --parallel fsdp cuts the state"


def check_batch(training: Training) -> None:
    """Refuses a batch that the devices of all processes, or the micro-batches of each, do not share evenly."""
    devices, processes = jax.device_count(), jax.process_count()
    check_multiple("--batch-size", training.batch_size, devices, "the devices of " + _all_of(processes))
    share = training.batch_size // (1 if training.parallel == "fsdp" else devices)
    if share % training.accumulate:
        whose = "of the batch" if training.parallel == "fsdp" else "that a step has for each device"
        raise ValueError(f"--accumulate must divide the {share} examples {whose}, got {training.accumulate}.")
    micro = training.batch_size // training.accumulate
    if training.parallel == "fsdp":
        check_multiple("--batch-size over --accumulate", micro, devices, "the devices of " + _all_of(processes))
    if training.parallel == "pmap" and processes > 1:
        raise ValueError(
            f"--parallel pmap joins the devices of one process, got {processes} processes: --parallel shard_map gives "
            "the same bits."
        )
    if training.shards is not None and devices % training.shards:
        raise ValueError(f"--shards must divide the {devices} devices, got {training.shards}.")


def _all_of(processes: int) -> str:
    return "this process" if processes == 1 else f"the {processes} processes"


@by_first
def check_run_dir(config: Any, files: Sequence[str], folders: Sequence[str] = ()) -> None:
    """Refuses a run folder that holds the run of another experiment, or in which names are taken.

    Args:
        config: as in `train`.
        files: what the experiment writes besides the files of every training.
        folders: the folders that it makes, likewise.

    Raises:
        ValueError: if `config.json` is not of this experiment.
        OSError: if a folder has the name of a file, or the other way round.
    """
    run_dir = config.training.run_dir
    check_places(run_dir, [CONFIG, RESULTS, METRICS, *files], ["checkpoints", "tensorboard", PROFILE, *folders])
    check_experiment(run_dir, config.EXPERIMENT)


def check_experiment(run_dir: Path, name: str | None) -> None:
    """Refuses a folder whose `config.json` is whole, and of another experiment; `None` for one without a name."""
    try:
        record = json.loads((run_dir / CONFIG).read_bytes())
    except (FileNotFoundError, ValueError):  # one that is damaged is written anew
        return
    found = record.get("experiment") if isinstance(record, dict) else None
    if found != name:
        what = f"a {CONFIG} that is of no such run" if found is None else f"a run of {found}"
        raise ValueError(f"{run_dir} holds {what}: give another --run-dir. Nothing was overwritten.")


def train(
    config: Any,
    key: Key,
    params: Params,
    loss_fn: LossFn,
    data: DataIterator,
    draw: Callable[[int, TrainState], None] | None = None,
    steps_per_call: int = 1,
    *,
    facts: Noted | None = None,
    begin: Callable[[Params], Params] | None = None,
) -> TrainState:
    """Trains to the end, from wherever the run folder is, on all devices of all processes.

    Args:
        config: dataclass with a `training: Training` and the name of its module, `EXPERIMENT`.
        key: what the loss draws with.
        params: initial parameters, the same in all processes.
        loss_fn: from `fm_jax.losses`.
        data: this process's share of the batches, with a position that can be saved.
        draw: called every `sample_every` steps with the step and the state.
        steps_per_call: that are the quickest, where the configuration does not say.
        facts: of the data, which a run that continues must find again.
        begin: makes of `params` those that a new run begins with; not called by one that continues.

    Returns:
        The state at `total_steps`.
    """
    training, several = config.training, jax.process_count() > 1
    optimizer, steps_per_call = _optimizer(training), training.steps_per_call or steps_per_call
    step_fn = make_parallel(
        training.parallel or ("shard_map" if several else "pmap"),
        loss_fn,
        optimizer,
        accumulate=training.accumulate,
        shards=training.shards,
        stacked=steps_per_call > 1,
    )

    def create(params: Params) -> TrainState:
        return create_state(params, optimizer, training.ema_decays)

    shapes = jax.eval_shape(create, params)
    shardings = step_fn.shardings(shapes)
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(contextlib.closing(_checkpointer(config, facts)))
        template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        if (restored := checkpointer.restore(template)) is not None:
            state, key, position = restored
            data.set_state(position)
            print(f"Continuing {training.run_dir} from step {int(state.step):,}.{_other_noise(training, checkpointer)}")
        else:
            params = params if begin is None else begin(params)
            if several or training.parallel == "fsdp":  # no device holds a whole state
                state = jax.jit(create, out_shardings=shardings)(jax.device_get(params))
            else:
                state = jax.jit(create)(params)
        step, writer = int(state.step), None
        if is_first():
            writer = stack.enter_context(contextlib.closing(MetricsWriter(training.run_dir, start_step=step)))
            if missing := _missing_lines(training, step):
                print(f"{training.run_dir / METRICS} has no lines of steps {missing}: loss.png goes without them.")
            # Accepted: from here on the results are those of another configuration.
            (training.run_dir / RESULTS).unlink(missing_ok=True)
            write_config(config)
            if facts is not None:
                write_facts(training.run_dir, facts)
        state = fit(
            step_fn,
            state,
            key,
            data,
            num_steps=training.total_steps,
            images_per_batch=training.batch_size,
            steps_per_call=steps_per_call,
            checkpointer=checkpointer,
            writer=writer,
            log_every=training.log_every,
            callbacks=[] if draw is None else [(training.sample_every, draw)],
            progress=None if is_first() else False,
            profile_dir=training.run_dir / PROFILE if training.profile and is_first() else None,
        )
    end_by_sigterm()  # all is saved
    return state


def _other_noise(training: Training, checkpointer: Checkpointer) -> str:
    """What there is to say of a run that continues with noise that is drawn otherwise."""
    try:
        saved = json.loads((training.run_dir / CONFIG).read_bytes())["training"]["parallel"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: it is written anew
        saved = training.parallel
    before, now = checkpointer.restored_devices, jax.device_count()
    if (saved == "fsdp") != (training.parallel == "fsdp"):
        how = "for the whole batch, and is drawn by each device"
        if training.parallel == "fsdp":
            how = "by each device, and is drawn for the whole batch"
        return f" Its noise was drawn {how} from here on, so that the numbers are other ones (--parallel)."
    if before in (None, now) or training.parallel == "fsdp":
        return ""
    return (
        f" It was saved on {before} device(s) and continues on {now}: each draws noise of its own, so that the numbers "
        "are other ones from here on. --parallel fsdp draws the same on any number."
    )


def restore(config: Any, params: Params) -> TrainState:
    """The latest checkpoint of a run; `params` may be shapes, as from `jax.eval_shape`."""
    optimizer, training = _optimizer(config.training), config.training
    template = jax.eval_shape(lambda p: create_state(p, optimizer, training.ema_decays), params)
    if not (training.run_dir / "checkpoints").is_dir():
        raise FileNotFoundError(f"{training.run_dir} holds no checkpoints: give the folder of a run.")
    checkpointer = _checkpointer(config, read_only=True)
    try:
        restored = checkpointer.restore(template)
    finally:
        checkpointer.close()
    if restored is None:
        raise FileNotFoundError(f"{training.run_dir} has no finished checkpoint yet.")
    return restored[0]


def sampling_params(state: TrainState, training: Training) -> Params:
    """What to sample with: the first average, or the parameters where there is none."""
    return state.ema[str(float(training.ema_decays[0]))] if training.ema_decays else state.params


def _optimizer(training: Training):
    return make_optimizer(
        training.learning_rate,
        total_steps=training.total_steps,
        warmup_steps=training.warmup_steps,
        decay=training.decay,
        clip_norm=training.clip_norm,
        weight_decay=training.weight_decay,
    )


def _checkpointer(config: Any, facts: Noted | None = None, *, read_only: bool = False) -> Checkpointer:
    training = config.training
    # A longer run is the same run, unless the learning rate depends on where it ends.
    may_change = _MAY_CHANGE + (("training.total_steps",) if training.decay == "constant" else ())
    return Checkpointer(
        training.run_dir,
        config_to_json(config),
        keep=training.keep,
        save_every=training.save_every,
        allow_change=may_change,
        name_of=option,
        data=None if facts is None else facts.identity(),
        new_fields=_defaults(config),
        read_only=read_only,
    )


def _defaults(config: Any) -> dict[str, Any]:
    """The defaults of all fields that have one, which a run of before there was the field was made with."""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            found[each.name] = _defaults(value)
        elif each.default is not dataclasses.MISSING:
            found[each.name] = each.default
    return json.loads(json.dumps(found, default=str))


def config_to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


@by_first
def write_config(config: Any) -> None:
    """Writes `config.json`, with the module that can read it back."""
    write_text(config.training.run_dir / CONFIG, _config_text(config))


def is_config_of_run(config: Any) -> bool:
    """Whether the run folder was last used with this very configuration."""
    path = config.training.run_dir / CONFIG
    return path.is_file() and path.read_bytes() == _config_text(config).encode()


@by_first
def write_results(run_dir: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`."""
    write_text(run_dir / RESULTS, json.dumps(results, indent=2) + "\n")


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """What `results.json` holds; `None` if it is not there, or not whole."""
    try:
        results = json.loads((run_dir / RESULTS).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return results if isinstance(results, dict) else None


@by_first
def draw_loss(run_dir: Path) -> None:
    """Draws the losses of `metrics.jsonl` as `loss.png`, or says that there are none."""
    if rows := [row for row in _metrics(run_dir) if "loss" in row]:
        save_loss_curve(run_dir / "loss.png", [row["step"] for row in rows], [row["loss"] for row in rows])
    else:
        print(f"{run_dir / METRICS} has no losses: loss.png is left out.")


def median_rate(run_dir: Path) -> float | None:
    """The median of the images a second in `metrics.jsonl`, if there are any."""
    rates = [row["images_per_second"] for row in _metrics(run_dir) if "images_per_second" in row]
    return float(np.median(rates)) if rates else None


def files_of(run_dir: Path, *names: str) -> str:
    """Which of these a run folder holds, in words."""
    return f"{run_dir}: {', '.join(name for name in names if (run_dir / name).exists())}"


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run_dir)
    except FileNotFoundError:
        return []


def _missing_lines(training: Training, step: int) -> str | None:
    """Which steps before `step` have no lines in `metrics.jsonl` although they should; `None` if none lacks."""
    steps = [row["step"] for row in _metrics(training.run_dir) if row["step"] <= step]
    # Lines may have been further apart than they are now.
    period = max([training.log_every, *np.diff(steps).tolist()])
    if not steps:
        return f"before {step + 1:,}" if period <= step else None
    if steps[0] > period:
        return f"before {steps[0]:,}"
    return f"from {steps[-1] + 1:,} to {step:,}" if steps[-1] + period <= step else None


def _config_text(config: Any) -> str:
    return json.dumps({"experiment": config.EXPERIMENT} | config_to_json(config), indent=2) + "\n"


def from_json(kind: type, record: dict[str, Any]) -> Any:
    """The dataclass `kind` from what `config_to_json` made of it.

    Raises:
        ValueError: for a field that it has not, one that is missing, and a value that it refuses.
    """
    if not isinstance(record, dict):
        raise ValueError(f"config.json has {shown(record)} for {kind.__name__}: it is damaged.")
    hints = typing.get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - record.keys()):
        raise ValueError(f"config.json lacks {missing}, which {kind.__name__} needs: it is damaged.")
    if unknown := sorted(record.keys() - hints.keys()):
        raise ValueError(f"config.json has {unknown}, which {kind.__name__} has not: was it another version?")
    return kind(**{name: _from_json(hints[name], value) for name, value in record.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_json(hint, value)
    if isinstance(value, list):
        return tuple(value)
    options: Sequence[Any] = typing.get_args(hint) or (hint,)
    return Path(value) if Path in options and isinstance(value, str) else value
