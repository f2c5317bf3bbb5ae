"""The training loop: everything around the step that touches the outside world."""

import contextlib
import copy
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_function, check_has, check_integer, check_key, shown
from fm_jax.train.checkpoint import Checkpointer, through_json
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
        data: its position is saved with each checkpoint, and asked for once before the first step; put it where the
            state is before calling.
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
        NonFiniteLossError: if the first, a logged or a saved step has a non-finite loss or norm. Such a state is never
            saved. The batches since the last look are then read once more: it says which of them is not finite, if one
            is.
        RuntimeError: if the data end.
        SystemExit: after a signal.
        ValueError: if a number is less than 1, or an argument is not what its name says; if `step_fn` takes one step a
            call and `steps_per_call` asks for several, or the other way round; if there is a checkpointer, and
            `data.get_state()` is no dict that survives JSON.
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
    step = int(state.step)
    if step >= num_steps:
        return state
    if checkpointer is not None:
        _check_position(data)
    watch = _Watch(data, step, checkpointer)
    periods = [log_every, save_every, *(every for every, _ in callbacks)]
    bar, clock, profile = Progress(step, num_steps, progress), _Clock(), Profile(profile_dir)
    try:
        with stop_requests() as asked:
            while step < num_steps:
                num = min(steps_per_call, num_steps - step, *(every - step % every for every in periods))
                with named("data"):
                    several = steps_per_call > 1
                    batch = to_device(watch.seen(_next(data, step, num if several else None), several))
                with named("step", step_num=step):
                    state, metrics = _checked(step_fn(state, key, batch))
                step += num
                last = step == num_steps
                log, save, stop = last or step % log_every == 0, last or step % save_every == 0, asked()
                due = [function for every, function in callbacks if step % every == 0]
                if not (log or save or due or stop):
                    if not clock.running:
                        _check_count(state, step)
                        watch.look(_guarded(jax.device_get(metrics)), step)
                        clock.start(step)
                    profile.after_call(metrics)
                    continue
                with named("wait"):
                    _check_count(state, step)
                    metrics = jax.device_get(metrics)
                with named("log"):
                    values = {name: float(metrics[name]) for name in ["loss", *sorted(metrics.keys() - {"loss"})]}
                    clock.stop(step)
                    watch.look(values, step)
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


def _check_position(data: DataIterator) -> None:
    """Refuses data whose position cannot be saved: at once, and not at the first checkpoint."""
    wanted = "data.get_state() must return the position of the data, a dict that survives JSON, for checkpoints"
    try:
        position = data.get_state()
    except Exception as error:
        raise ValueError(f"{wanted}; it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(position, Mapping):
        raise ValueError(f"{wanted}, got {shown(position)}.")
    through_json("data.get_state()", dict(position), exact=True)


def _guarded(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(metrics[name]) for name in _GUARDED if name in metrics}


class _Watch:
    """Stops at what is not finite, and says where the reason lies: the batches since the last look are read again.

    Until then it costs a `get_state` a look. Of data that cannot be set back, the last batch alone is kept.
    """

    def __init__(self, data: DataIterator, step: int, checkpointer: Checkpointer | None) -> None:
        self._data, self._checkpointer = data, checkpointer
        self._began = self._checked = step
        self._position = self._position_now()
        self._kept: list[Any] = []

    def seen(self, read: Any, stacked: bool) -> Any:
        """Each batch, or stack of batches, goes through here."""
        if self._position is None:
            self._kept = [read, stacked]
        return read

    def look(self, values: Mapping[str, float], step: int) -> None:
        """Raises `NonFiniteLossError` if a loss or norm is not finite."""
        bad = [f"{name}={value}" for name, value in _guarded(values).items() if not math.isfinite(value)]
        if not bad:
            self._checked, self._position = step, self._position_now()
            return
        if self._checkpointer is not None:
            self._checkpointer.wait()
        before_any_update = step == self._began + 1 and not bad[0].startswith(("update_norm", "param_norm"))
        if found := self._bad_data(step):
            reason = f"The data are not finite, and no learning rate changes that: {found}."
        elif before_any_update:
            reason = (
                "No update was made before it, so that it is not the learning rate: the parameters that it began with "
                "are not finite, or the network or the loss is not. JAX_DEBUG_NANS=True stops where a NaN arises first."
            )
        else:
            reason = self._advice()
        steps = f"steps {self._checked + 1} to {step}"
        raise NonFiniteLossError(f"Not finite at step {step}: {', '.join(bad)} ({steps}). {reason}")

    def _advice(self) -> str:
        latest = None if self._checkpointer is None else self._checkpointer.latest_step()
        if self._checkpointer is None or latest is None:
            return "There is no checkpoint yet: start again with a lower learning rate or clipping norm."
        return (
            f"The last good checkpoint is {self._checkpointer.path(latest)}. The same command resumes from it, and, "
            "being deterministic, meets the same numbers again. Begin a new run from it, with a lower learning rate or "
            "clipping norm: restore it, and save to a new Checkpointer in another folder; or go on in this folder with "
            "the name of the changed field in the Checkpointer's allow_change."
        )

    def _position_now(self) -> Any:
        """Where the data are, if they can be set back there."""
        if not (hasattr(self._data, "get_state") and hasattr(self._data, "set_state")):
            return None
        try:
            return copy.deepcopy(self._data.get_state())
        except Exception:  # without a checkpointer nobody needs a position
            return None

    def _bad_data(self, step: int) -> str | None:
        """What is not finite in the batches since the last look; the data stay where they are."""
        if self._position is None:
            read, stacked = self._kept
            if not stacked:
                return _where_not_finite(read, step)
            num = len(jax.tree.leaves(read)[0])
            batches = (jax.tree.map(lambda x, i=i: x[i], read) for i in range(num))
            return _first_not_finite(batches, step - num)
        now = self._position_now()
        with contextlib.suppress(Exception):  # whatever hinders the search for the reason
            self._data.set_state(self._position)
            try:
                return _first_not_finite((next(self._data) for _ in range(step - self._checked)), self._checked)
            finally:
                self._data.set_state(now)
        return None


def _first_not_finite(batches: Iterator[Any], step: int) -> str | None:
    """Of the batches of the steps after `step`."""
    return next(filter(None, (_where_not_finite(batch, step + 1 + i) for i, batch in enumerate(batches))), None)


def _where_not_finite(batch: Any, step: int) -> str | None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating):
            continue
        values = np.atleast_1d(np.asarray(leaf))
        bad = ~np.isfinite(values)
        if bad.any():
            example = int(np.argmax(bad.reshape(len(values), -1).any(axis=1)))
            what = "NaN" if np.isnan(values[example]).any() else "infinity"
            where = f" in example {example}" if np.ndim(leaf) else ""
            return f"batch{jax.tree_util.keystr(path)} of step {step} holds {what}{where}"
    return None


def _leave(signum: int, step: int, checkpointer: Checkpointer | None) -> None:
    name = signal.Signals(signum).name
    if checkpointer is None:
        print(f"{name}: stopped after step {step}. Nothing was saved, for want of a checkpointer.", flush=True)
    else:
        checkpointer.wait()
        print(f"{name}: saved {checkpointer.path(step)}. Run the same command to continue.", flush=True)
    raise SystemExit(128 + signum)
