"""The training loop: everything around the step that touches the outside world."""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from fm_jax.checks import check_bool, check_function, check_has, check_integer, check_key, shown
from fm_jax.train.checkpoint import Checkpointer
from fm_jax.train.interrupts import deferred_signals
from fm_jax.train.log import MetricsWriter
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
    batch_to_device: Callable[[Any], Batch],
    images_per_batch: int,
    checkpointer: Checkpointer | None = None,
    writer: MetricsWriter | None = None,
    log_every: int = 50,
    save_every: int | None = None,
    callbacks: Sequence[tuple[int, Callable[[int, TrainState], None]]] = (),
    progress: bool | None = None,
) -> TrainState:
    """Trains from `state.step` to `num_steps`.

    The host waits for the device after the first step, and where something is logged, saved or called back; in
    between it only dispatches. What is logged are the metrics of that step alone, so that a resumed run logs the
    same. On SIGTERM, SIGHUP or Ctrl-C the running step is finished and saved, and the process left with status
    128 + signal, at the end of the run too; a second Ctrl-C leaves at once.

    Args:
        step_fn: from `pmap_step` or `shard_map_step`, or a jitted step.
        state: new or restored. It is donated: use the state returned.
        key: the key of the run, the same for every step.
        data: its position is saved with each checkpoint; put it where the state is before calling.
        num_steps: the step to end at, counted from the beginning of the run, not from `state.step`.
        batch_to_device: what makes `step_fn`'s batch of `data`'s, such as `lambda b: split_batch(b, 8)`.
        images_per_batch: examples in a global batch, for the throughput shown.
        checkpointer: saves every `save_every` steps, at the end, and before leaving on a signal.
        writer: receives the metrics and `images_per_second`, in which compilation, callbacks and saving do
            not count.
        log_every: steps between two log lines.
        save_every: steps between two checkpoints; `checkpointer.save_every` by default.
        callbacks: pairs (every, function); `function(step, state)` is called every so many steps, to draw samples,
            say. It must not keep the state, whose memory the next step reuses.
        progress: `None` for a bar on a terminal and lines elsewhere, `False` for neither.

    Returns:
        The state at `num_steps`.

    Raises:
        NonFiniteLossError: if a logged or saved step has a non-finite loss or norm. Such a state is never saved.
        RuntimeError: if the data end.
        SystemExit: after a signal.
        ValueError: if a number is less than 1, or an argument is not what its name says.
        CheckpointError: if a checkpoint cannot be written.
    """
    _check_arguments(step_fn, state, key, data, batch_to_device, checkpointer, writer, callbacks, progress)
    if save_every is None:
        save_every = num_steps if checkpointer is None else checkpointer.save_every
    counts = {"num_steps": num_steps, "log_every": log_every, "save_every": save_every}
    counts |= {"images_per_batch": images_per_batch}
    counts |= {f"callbacks[{i}]'s period": every for i, (every, _) in enumerate(callbacks)}
    for name, value in counts.items():
        check_integer(name, value)
    check_integer("num_steps", num_steps, most=2**31 - 1)  # which the step of the state can count to
    step = checked = int(state.step)
    if step >= num_steps:
        return state
    bar, clock = Progress(step, num_steps, progress), _Clock()
    try:
        with deferred_signals() as caught:
            while step < num_steps:
                state, metrics = _checked(step_fn(state, key, batch_to_device(_next(data, step))))
                step += 1
                last = step == num_steps
                log, save = last or step % log_every == 0, last or step % save_every == 0
                due = [function for every, function in callbacks if step % every == 0]
                if not (log or save or due or caught):
                    if not clock.running:
                        jax.block_until_ready(metrics)
                        clock.start(step)
                    continue
                metrics = jax.device_get(metrics)
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
                if checkpointer is not None and (save or caught):
                    checkpointer.save(state, key, data.get_state())
                if caught:
                    _leave(caught[0], step, checkpointer)
                clock.start(step)
            if checkpointer is not None:
                checkpointer.wait()
        if caught:  # during the last save
            _leave(caught[0], step, checkpointer)
    finally:
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


def _next(data: DataIterator, step: int) -> Any:
    try:
        return next(data)
    except StopIteration:
        raise RuntimeError(f"The data ended after step {step}: fit needs an iterator that repeats them.") from None


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
