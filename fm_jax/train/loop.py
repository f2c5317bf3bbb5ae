"""The training loop: everything around the step that touches the outside world."""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from fm_jax.checks import check_bool, check_function, check_has, check_integer, check_key, shown
from fm_jax.train.checkpoint import Checkpointer
from fm_jax.train.interrupts import stop_requests
from fm_jax.train.log import MetricsWriter
from fm_jax.train.parallel import ParallelStep
from fm_jax.train.profile import Profile, named
from fm_jax.train.progress import Progress
from fm_jax.train.state import TrainState, check_train_state
from fm_jax.train.step import Step
from fm_jax.types import Batch, Key

_GUARDED = ("loss", "grad_norm", "update_norm", "param_norm")


class NonFiniteLossError(RuntimeError):
    """The loss, or a norm of the gradient, update or parameters, became infinite or not a number."""


class DataIterator(Protocol):
    """Batches without end, and a position in them that survives JSON."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any], /) -> None: ...


def fit(
    step_fn: Step,
    state: TrainState,
    key: Key,
    data: DataIterator,
    *,
    num_steps: int,
    images_per_batch: int,
    batch_to_device: Callable[[Any], Batch] | None = None,
    steps_per_call: int = 1,
    checkpointer: Checkpointer | None = None,
    writer: MetricsWriter | None = None,
    log_every: int = 50,
    save_every: int | None = None,
    callbacks: Sequence[tuple[int, Callable[[int, TrainState], None]]] = (),
    progress: bool | None = None,
    profile_dir: str | os.PathLike[str] | None = None,
) -> TrainState:
    """Trains from `state.step` to `num_steps`.

    The host waits for the device after the first step, and where something is logged, saved or called back; in
    between it only dispatches, so that the next batch is made and sent while the device computes. What is logged are
    the metrics of that step alone, so that a resumed run logs the same. On SIGTERM, SIGHUP or Ctrl-C the running step
    is finished and saved, and the process left with status 128 + signal, at the end of the run too; a second Ctrl-C
    leaves at once. Several processes stop together, at the same step, when any one of them is sent SIGTERM.

    Args:
        step_fn: from `pmap_step`, `shard_map_step` or `fsdp_step`, or a jitted step.
        state: new or restored. It is donated: use the state returned.
        key: the key of the run, the same for every step.
        data: its position is saved with each checkpoint; put it where the state is before calling.
        num_steps: the step to end at, counted from the beginning of the run, not from `state.step`.
        images_per_batch: examples in a global batch, for the throughput shown.
        batch_to_device: what makes `step_fn`'s batch of `data`'s; by default `step_fn.batch_to_device`, and for a plain
            jitted step nothing.
        steps_per_call: with more than 1 `step_fn` takes as many steps in one call, as from `pmap_step(stacked=True)` or
            `scan_steps`, on batches stacked along a new first axis; `data.take(num)`, if there is such a function,
            gives them stacked. Calls are shorter where something is to be logged, saved or called back, which happens
            at the same steps with any number. A signal waits for the end of the call.
        checkpointer: saves every `save_every` steps, at the end, and before leaving on a signal.
        writer: receives the metrics and `images_per_second`, in which compilation, callbacks and saving do
            not count.
        log_every: steps between two log lines.
        save_every: steps between two checkpoints; `checkpointer.save_every` by default.
        callbacks: pairs (every, function); `function(step, state)` is called every so many steps, to draw samples,
            say. It must not keep the state, whose memory the next step reuses.
        progress: `None` for a bar on a terminal and lines elsewhere, `False` for neither.
        profile_dir: if given, some calls after the first are traced to this folder; TensorBoard opens it, and Perfetto
            its `perfetto_trace.json.gz`.

    Returns:
        The state at `num_steps`.

    Raises:
        NonFiniteLossError: if a logged or saved step has a non-finite loss or norm. Such a state is never saved.
        RuntimeError: if the data end.
        SystemExit: after a signal.
        ValueError: if a number is less than 1, or an argument is not what its name says; if `step_fn` takes one step a
            call and `steps_per_call` asks for several, or the other way round.
        CheckpointError: if a checkpoint cannot be written.
    """
    to_device: Any = batch_to_device or getattr(step_fn, "batch_to_device", lambda batch: batch)
    _check_arguments(step_fn, state, key, data, to_device, checkpointer, writer, callbacks, progress)
    if save_every is None:
        save_every = num_steps if checkpointer is None else checkpointer.save_every
    counts = {"num_steps": num_steps, "log_every": log_every, "save_every": save_every}
    counts |= {"images_per_batch": images_per_batch, "steps_per_call": steps_per_call}
    counts |= {f"callbacks[{i}]'s period": every for i, (every, _) in enumerate(callbacks)}
    for name, value in counts.items():
        check_integer(name, value)
    check_integer("num_steps", num_steps, most=2**31 - 1)  # which the step of the state can count to
    if isinstance(step_fn, ParallelStep) and step_fn.stacked != (steps_per_call > 1):
        raise ValueError(
            f"step_fn must be made with stacked={steps_per_call > 1} for steps_per_call={steps_per_call}, got "
            f"stacked={step_fn.stacked}."
        )
    step = checked = int(state.step)
    if step >= num_steps:
        return state
    periods = [log_every, save_every, *(every for every, _ in callbacks)]
    bar, clock, profile = Progress(step, num_steps, progress), _Clock(), Profile(profile_dir)
    try:
        with stop_requests() as asked:
            while step < num_steps:
                num = min(steps_per_call, num_steps - step, *(every - step % every for every in periods))
                with named("data"):
                    batch = to_device(_next(data, step, num if steps_per_call > 1 else None))
                with named("step", step_num=step):
                    state, metrics = _checked(step_fn(state, key, batch))
                step += num
                last = step == num_steps
                log, save, stop = last or step % log_every == 0, last or step % save_every == 0, asked()
                due = [function for every, function in callbacks if step % every == 0]
                if not (log or save or due or stop):
                    if not clock.running:
                        _check_count(state, step)
                        clock.start(step)
                    profile.after_call(metrics)
                    continue
                with named("wait"):
                    _check_count(state, step)
                    metrics = jax.device_get(metrics)
                with named("log"):
                    values = {name: float(metrics[name]) for name in ["loss", *sorted(metrics.keys() - {"loss"})]}
                    clock.stop(step)
                    _check_finite(values, checked, step, checkpointer)
                    checked = step
                    if log:
                        rate = clock.steps_per_second()
                        images = None if rate is None else rate * images_per_batch
                        if writer is not None:
                            writer.write(step, values if images is None else {**values, "images_per_second": images})
                        bar.update(step, values["loss"], images, None if rate is None else (num_steps - step) / rate)
                # Before saving: a run killed in between repeats them rather than going without.
                for function in due:
                    function(step, state)
                if checkpointer is not None and (save or stop):
                    with named("save"):
                        checkpointer.save(state, key, data.get_state())
                if stop:
                    _leave(stop, step, checkpointer)
                clock.start(step)
                profile.after_call(metrics)
            if checkpointer is not None:
                checkpointer.wait()
            stop = None if jax.process_count() > 1 else asked()
        if stop:  # during the last save
            _leave(stop, step, checkpointer)
    finally:
        profile.close()
        bar.close()
    return state


def _check_arguments(
    step_fn: Any,
    state: Any,
    key: Any,
    data: Any,
    batch_to_device: Any,
    checkpointer: Any,
    writer: Any,
    callbacks: Any,
    progress: Any,
) -> None:
    check_function("step_fn", step_fn, "a step, as from pmap_step or shard_map_step", 3)
    check_train_state("state", state)
    check_key(key)
    # What is never saved needs no position.
    wanted = ("__next__",) if checkpointer is None else ("__next__", "get_state")
    check_has("data", data, wanted, "an iterator over batches with get_state, as from fm_jax.data.pipeline.batches")
    check_function("batch_to_device", batch_to_device, "a function of a batch, such as `lambda batch: batch`", 1)
    if checkpointer is not None:
        check_has("checkpointer", checkpointer, ("save", "wait", "save_every"), "a Checkpointer or None")
    if writer is not None:
        check_has("writer", writer, ("write",), "a MetricsWriter or None")
    for i, pair in enumerate(callbacks):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"callbacks[{i}] must be a pair (every, function), got {shown(pair)}.")
        check_function(f"callbacks[{i}]'s function", pair[1], "a function of the step and the state", 2)
    if progress is not None:
        check_bool("progress", progress)


def _checked(returned: Any) -> tuple[TrainState, Mapping[str, Any]]:
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        raise ValueError(f"step_fn must return (state, metrics), as make_step's does, got {shown(returned)}.")
    if "loss" not in returned[1]:
        raise ValueError(f"step_fn's metrics must hold 'loss', got {sorted(map(str, returned[1]))}.")
    return returned


class _Clock:
    """Speed of the steps since the last reading, without the pauses between `stop` and `start`."""

    def __init__(self) -> None:
        self.running = False
        self._steps, self._seconds = 0, 0.0

    def start(self, step: int) -> None:
        self.running, self._from_step, self._from_time = True, step, time.perf_counter()

    def stop(self, step: int) -> None:
        if self.running:
            self._steps += step - self._from_step
            self._seconds += time.perf_counter() - self._from_time

    def steps_per_second(self) -> float | None:
        rate = self._steps / self._seconds if self._steps else None
        self._steps, self._seconds = 0, 0.0
        return rate


def _next(data: DataIterator, step: int, num: int | None) -> Any:
    """A batch, or a stack of `num`."""
    each: list[Any] = []
    try:
        if num is None:
            return next(data)
        if take := getattr(data, "take", None):
            batch, whose = take(num), "data.take(num)"
        else:
            for _ in range(num):
                each.append(jax.tree.map(np.array, next(data)))  # a copy: an iterator may use its arrays again
            batch, whose = _stacked(each, step), "the stack of data's batches"
    except StopIteration:
        ended = step + len(each)
        raise RuntimeError(f"The data ended after step {ended}: fit needs an iterator that repeats them.") from None
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.shape(leaf)[:1] != (num,):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"{whose} must be [{num}, batch, ...] for {num} steps, got {name} of shape {np.shape(leaf)}."
            )
    return batch


def _stacked(batches: list[Any], step: int) -> Any:
    try:
        return jax.tree.map(lambda *xs: np.stack(xs), *batches)
    except ValueError as error:
        raise ValueError(
            f"the batches of steps {step + 1} to {step + len(batches)} must have the same entries and shapes to be "
            f"taken in one call: {' '.join(str(error).split())[:200]}"
        ) from None


def _check_count(state: TrainState, step: int) -> None:
    """Waits for the device, and refuses a state that is not where the loop is."""
    if (found := int(state.step)) != step:
        raise ValueError(
            f"step_fn must add the steps that it takes to state.step, which is {found} after {step}: for more than 1 "
            "of steps_per_call it is made by pmap_step(..., stacked=True) or scan_steps, for 1 it is not."
        )


def _check_finite(values: Mapping[str, float], checked: int, step: int, checkpointer: Checkpointer | None) -> None:
    bad = [f"{name}={values[name]}" for name in _GUARDED if name in values and not math.isfinite(values[name])]
    if not bad:
        return
    if checkpointer is not None:
        checkpointer.wait()
    if checkpointer is None or (latest := checkpointer.latest_step()) is None:
        advice = "There is no checkpoint yet: start again with a lower learning rate or clipping norm."
    else:
        advice = (
            f"The last good checkpoint is {checkpointer.path(latest)}. The same command resumes from it, and, being "
            "deterministic, meets the same numbers again: lower the learning rate or the clipping norm, and name the "
            "field in the Checkpointer's allow_change to have it accepted."
        )
    raise NonFiniteLossError(f"Not finite at step {step}: {', '.join(bad)} (steps {checked + 1} to {step}). {advice}")


def _leave(signum: int, step: int, checkpointer: Checkpointer | None) -> None:
    name = signal.Signals(signum).name
    if checkpointer is None:
        print(f"{name}: stopped after step {step}. Nothing was saved, for want of a checkpointer.", flush=True)
    else:
        checkpointer.wait()
        print(f"{name}: saved {checkpointer.path(step)}. Run the same command to continue.", flush=True)
    raise SystemExit(128 + signum)
