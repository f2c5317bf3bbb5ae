import gzip
import json
import math
import os
import re
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax.train import loop
from fm_jax.train.checkpoint import Checkpointer
from fm_jax.train.interrupts import deferred_signals
from fm_jax.train.log import MetricsWriter, read_metrics
from fm_jax.train.loop import NonFiniteLossError, fit
from fm_jax.train.parallel import pmap_step
from fm_jax.train.profile import NUM
from fm_jax.train.progress import Progress
from fm_jax.train.state import create_state
from fm_jax.train.step import make_step, scan_steps

OPTIMIZER = optax.sgd(0.1)
KEY = jax.random.key(0)


class Counting:
    """Batch i is i everywhere; `at[i]` is called before batch i is handed out."""

    def __init__(self, at=None, length=10**9):
        self.position, self.at, self.length = 0, at or {}, length

    def __next__(self):
        if self.position == self.length:
            raise StopIteration
        self.at.get(self.position, lambda: None)()
        self.position += 1
        return {"x1": np.full((4, 2), self.position - 1, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def loss_fn(params, key, batch):
    """Reports the batch number; not a number from batch 7 on where `params["fails"]` is 1."""
    number = jnp.mean(batch["x1"])
    loss = jnp.sum(params["w"] ** 2) * jnp.where((number >= 7) & (params["fails"] > 0), jnp.nan, 1.0)
    return loss, {"batch": number}


@pytest.fixture(scope="module")
def step_fn():
    return jax.jit(make_step(loss_fn, OPTIMIZER, axis_name=None), donate_argnums=0)


def new_state(fails=0.0):
    return create_state({"w": jnp.ones(2), "fails": jnp.float32(fails)}, OPTIMIZER)


def run(step_fn, state=None, data=None, **options):
    options = {"num_steps": 10, "batch_to_device": lambda b: b, "images_per_batch": 4, "progress": False, **options}
    state = new_state() if state is None else state
    return fit(step_fn, state, KEY, Counting() if data is None else data, **options)


def test_steps_logs_saves_and_calls_back_where_it_should(step_fn, tmp_path):
    calls = []
    checkpointer, writer = Checkpointer(tmp_path, {}, keep=9, save_every=4), MetricsWriter(tmp_path, tensorboard=False)
    state = run(
        step_fn,
        checkpointer=checkpointer,
        writer=writer,
        log_every=3,
        callbacks=[
            (5, lambda step, state: calls.append((step, int(state.step)))),
            (2, lambda step, _: calls.append(step)),
        ],
    )
    writer.close()
    assert int(state.step) == 10
    # w <- w - 0.1 * 2 w
    np.testing.assert_allclose(state.params["w"], np.full(2, 0.8**10), rtol=1e-5)
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["batch"]) for row in rows] == [(3, 2.0), (6, 5.0), (9, 8.0), (10, 9.0)]
    np.testing.assert_allclose([row["loss"] for row in rows], [2 * 0.64**n for n in (2, 5, 8, 9)], rtol=1e-5)
    assert list(rows[0])[:2] == ["step", "loss"]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert calls == [2, 4, (5, 5), 6, 8, (10, 10), 10]
    assert sorted(os.listdir(tmp_path / "checkpoints"), key=int) == ["4", "8", "10"]
    # Finished: the same call does nothing.
    restored, _, data_state = checkpointer.restore(new_state())
    assert data_state == {"position": 10}
    assert run(step_fn, restored, checkpointer=checkpointer) is restored
    checkpointer.close()


class Taking(Counting):
    """Gives stacks by itself, and notes how long they were."""

    taken = None

    def take(self, num):
        self.taken = [*(self.taken or []), num]
        return jax.tree.map(lambda *xs: np.stack(xs), *(next(self) for _ in range(num)))


@pytest.mark.slow_but_one
@pytest.mark.parametrize("kind", [Counting, Taking])
def test_several_steps_a_call_log_save_and_call_back_at_the_same_places(step_fn, tmp_path, kind):
    def trained(folder, step_fn, **options):
        calls, data = [], kind()
        checkpointer, writer = Checkpointer(folder, {}, keep=9), MetricsWriter(folder, tensorboard=False)
        callbacks = [(5, lambda step, _: calls.append(step))]
        options |= {"checkpointer": checkpointer, "writer": writer, "log_every": 6, "save_every": 8, "num_steps": 17}
        state = run(step_fn, data=data, callbacks=callbacks, **options)
        writer.close()
        checkpointer.close()
        rows = [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(folder)]
        saved = {each: json.loads((folder / "checkpoints" / each / "meta" / "metadata").read_text()) for each in "8"}
        return calls, rows, sorted(os.listdir(folder / "checkpoints")), jax.device_get(state), saved, data

    *wanted, _ = trained(tmp_path / "one", step_fn)
    steps = jax.jit(scan_steps(make_step(loss_fn, OPTIMIZER, axis_name=None)), donate_argnums=0)
    *found, data = trained(tmp_path / "four", steps, steps_per_call=4)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    if kind is Taking:
        assert data.taken == [4, 1, 1, 2, 2, 2, 3, 1, 1]


def test_a_signal_waits_for_the_end_of_the_call(tmp_path):
    steps = jax.jit(scan_steps(make_step(loss_fn, OPTIMIZER, axis_name=None)), donate_argnums=0)
    data = Counting(at={5: lambda: signal.raise_signal(signal.SIGTERM)})
    checkpointer = Checkpointer(tmp_path, {})
    with pytest.raises(SystemExit) as exit_info:
        run(steps, data=data, checkpointer=checkpointer, num_steps=100, log_every=50, steps_per_call=4)
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert checkpointer.latest_step() == 8
    checkpointer.close()


def test_a_step_that_takes_one_at_a_time_is_not_given_several():
    step = make_step(loss_fn, OPTIMIZER)
    for stacked, num in ((False, 2), (True, 1)):
        with pytest.raises(ValueError, match=f"step_fn must be made with stacked={num > 1} for steps_per_call={num}"):
            run(pmap_step(step, stacked=stacked), steps_per_call=num)


class OneBuffer(Counting):
    """Hands out the same array each time, with other numbers in it."""

    buffer = np.zeros((4, 2), np.float32)

    def __next__(self):
        self.buffer[:] = super().__next__()["x1"]
        return {"x1": self.buffer}


def test_a_stack_holds_the_batches_as_they_were_when_read():
    def follow(params, key, batch):
        return jnp.mean((batch["x1"] - params["w"][None]) ** 2), {}

    one = make_step(follow, OPTIMIZER, axis_name=None)
    copied = {"batch_to_device": lambda batch: jax.tree.map(jnp.array, batch)}
    wanted = run(jax.jit(one), data=OneBuffer(), **copied)
    found = run(jax.jit(scan_steps(one)), data=OneBuffer(), steps_per_call=4, **copied)
    np.testing.assert_array_equal(found.params["w"], wanted.params["w"])


@pytest.mark.parametrize("log_every", [1, 5, 50])
def test_a_step_must_take_as_many_steps_as_it_is_asked_for(step_fn, log_every):
    options = {"log_every": log_every, "num_steps": 10}
    many = jax.jit(scan_steps(make_step(loss_fn, OPTIMIZER, axis_name=None)))
    with pytest.raises(ValueError, match=r"must add the steps that it takes to state\.step, which is 4 after 1"):
        run(many, **options)
    if log_every > 1:
        with pytest.raises(ValueError, match=r"state\.step, which is 1 after [45]: .* of steps_per_call"):
            run(step_fn, steps_per_call=5 if log_every == 5 else 4, **options)


@pytest.mark.parametrize("extra", [-1, 1])
def test_take_must_give_as_many_batches_as_it_is_asked_for(extra):
    class Wrong(Taking):
        def take(self, num):
            return super().take(num + extra)

    many = jax.jit(scan_steps(make_step(loss_fn, OPTIMIZER, axis_name=None)))
    shape = rf"\({4 + extra}, 4, 2\)"
    with pytest.raises(ValueError, match=rf"data.take\(num\) must be \[4, batch, ...\] .* of shape {shape}"):
        run(many, data=Wrong(), steps_per_call=4)


def test_batches_of_one_call_must_be_alike():
    class Ragged(Counting):
        def __next__(self):
            return {"x1": super().__next__()["x1"][: 4 if self.position < 3 else 2]}

    many = jax.jit(scan_steps(make_step(loss_fn, OPTIMIZER, axis_name=None)))
    with pytest.raises(ValueError, match="the batches of steps 1 to 4 must have the same entries and shapes"):
        run(many, data=Ragged(), steps_per_call=4)


def test_data_that_end_within_a_stack_are_named():
    many = jax.jit(scan_steps(make_step(loss_fn, OPTIMIZER, axis_name=None)))
    with pytest.raises(RuntimeError, match="The data ended after step 6: fit needs an iterator that repeats them"):
        run(many, data=Counting(length=6), steps_per_call=4)


def test_the_batch_is_the_parallel_steps_own_affair():
    step = pmap_step(make_step(loss_fn, OPTIMIZER), jax.devices()[:2])
    state = fit(step, new_state(), KEY, Counting(), num_steps=2, images_per_batch=4, progress=False)
    np.testing.assert_allclose(state.params["w"], np.full(2, 0.64), rtol=1e-5)


def test_profile_leaves_a_trace_of_named_steps(step_fn, tmp_path):
    run(step_fn, num_steps=20, log_every=3, profile_dir=tmp_path)
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("data") == NUM
    assert names.count("step") == NUM
    assert "log" in names
    assert [*tmp_path.rglob("*.xplane.pb")]  # TensorBoard's


def test_host_waits_only_where_something_is_due(step_fn, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(1) or device_get(x))
    run(step_fn, num_steps=40, log_every=20)
    assert len(fetched) == 3  # the first step's too


def test_throughput_leaves_out_compilation_callbacks_and_saving(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def slow(state, key, batch):
        now[0] += 100.0 if int(state.step) == 0 else 0.5
        return state._replace(step=state.step + 1), {"loss": jnp.float32(1.0)}

    def draw(step, state):
        now[0] += 50.0

    writer = MetricsWriter(tmp_path, tensorboard=False)
    run(slow, writer=writer, log_every=4, callbacks=[(2, draw)], images_per_batch=64)
    writer.close()
    assert [row["images_per_second"] for row in read_metrics(tmp_path)] == [128.0, 128.0, 128.0]


def test_plain_lines(step_fn, capsys):
    run(step_fn, log_every=5, progress=None)
    lines = capsys.readouterr().out.splitlines()
    pattern = r"step (\d+)/10  loss \d\.\d{4}  [\d,]+ examples/s  0:00:00 left"
    assert [re.fullmatch(pattern, line).group(1) for line in lines] == ["5", "10"]
    Progress(0, 1000).update(200, 0.43210001, 1234.4, 70.2)
    assert capsys.readouterr().out == "step 200/1000  loss 0.4321  1,234 examples/s  0:01:10 left\n"


def test_bar_on_a_terminal(step_fn, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run(step_fn, log_every=5, progress=None)
    out = capsys.readouterr().out
    assert "10/10" in out
    assert "examples/s" in out
    assert "loss 0.0360" in out


def test_non_finite_loss_stops_and_is_never_saved(step_fn, tmp_path):
    checkpointer = Checkpointer(tmp_path, {}, save_every=3)
    with pytest.raises(NonFiniteLossError) as caught:
        run(step_fn, new_state(1.0), checkpointer=checkpointer, log_every=100, num_steps=100)
    message = str(caught.value)
    assert message.startswith("Not finite at step 9: loss=nan, grad_norm=nan")
    assert "(steps 7 to 9)" in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoints' / '6'}. The same command resumes" in message
    assert "Begin a new run from it" in message
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "6"]
    checkpointer.close()

    with pytest.raises(NonFiniteLossError, match=r"at step 8: .*\(steps 5 to 8\)\. There is no checkpoint yet"):
        run(step_fn, new_state(1.0), log_every=4)


def test_what_is_not_finite_from_the_start_is_not_the_learning_rates_doing(step_fn):
    """Told after the first step, of 100 till the next look."""
    for value, log_every in ((jnp.nan, 100), (jnp.inf, 1)):
        state = create_state({"w": jnp.array([1.0, value]), "fails": jnp.float32(0)}, OPTIMIZER)
        data = Counting()
        with pytest.raises(NonFiniteLossError, match=r"^Not finite at step 1: loss=.* No update was made") as caught:
            run(step_fn, state, data, log_every=log_every, num_steps=100)
        assert "lower" not in str(caught.value)
        assert data.position == 1


def test_an_infinite_first_update_is_the_learning_rates_doing():
    step_fn = jax.jit(make_step(loss_fn, optax.sgd(math.inf), axis_name=None))
    with pytest.raises(NonFiniteLossError, match=r"^Not finite at step 1: update_norm=.* a lower learning rate"):
        run(step_fn, log_every=100, num_steps=100)


class Damaged(Counting):
    """With a number that is none in example 3 of batch 16, that of step 17."""

    value = np.nan

    def __next__(self):
        batch = super().__next__() | {"label": np.arange(4), "more": [np.zeros((4, 1), np.float16)]}
        if self.position == 17:
            batch["x1"][3, 1] = self.value
        return batch


class DamagedWithin(Damaged):
    value = 0.0

    def __next__(self):
        batch = super().__next__()
        if self.position == 17:
            batch["more"][0][2] = -np.inf
        return batch


class WithoutWayBack:
    """Batches alone."""

    def __init__(self, data):
        self.data = data

    def __next__(self):
        return next(self.data)


def mean_of_everything(params, key, batch):
    return params["w"].sum() * (jnp.mean(batch["x1"]) + jnp.mean(batch["more"][0])), {}


@pytest.mark.parametrize(
    ("data", "steps", "log_every", "said"),
    [
        (Damaged(), 1, 10, r"batch\['x1'\] of step 17 holds NaN in example 3\.$"),
        (Damaged(), 4, 10, r"batch\['x1'\] of step 17 holds NaN in example 3\.$"),
        (DamagedWithin(), 1, 100, r"batch\['more'\]\[0\] of step 17 holds infinity in example 2\.$"),
        (Counting({17: lambda: None}), 1, 10, None),
    ],
)
def test_data_that_are_not_finite_are_found(data, steps, log_every, said):
    make = make_step(mean_of_everything if said else loss_fn, optax.sgd(1e-6), axis_name=None)
    step_fn = jax.jit(make if steps == 1 else scan_steps(make))
    if said is None:
        with pytest.raises(NonFiniteLossError, match="There is no checkpoint yet"):
            run(step_fn, new_state(1.0), data, num_steps=50, log_every=log_every)
        assert data.position == 10
        return
    with pytest.raises(NonFiniteLossError, match=rf"The data are not finite.*: {said}"):
        run(step_fn, data=data, num_steps=50, log_every=log_every, steps_per_call=steps)
    assert data.position == (20 if log_every == 10 else 50)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (-np.inf, "infinity")])
def test_of_data_without_a_way_back_the_last_batches_are_known(value, word):
    damaged = Damaged()
    damaged.value = value
    step = make_step(mean_of_everything, optax.sgd(1e-6), axis_name=None)
    message = rf"batch\['x1'\] of step 17 holds {word} in example 3\.$"
    with pytest.raises(NonFiniteLossError, match=message):
        run(jax.jit(step), data=WithoutWayBack(damaged), num_steps=17, log_every=10)
    damaged.position = 0
    with pytest.raises(NonFiniteLossError, match=message):
        run(jax.jit(scan_steps(step)), data=WithoutWayBack(damaged), num_steps=50, log_every=10, steps_per_call=5)
    damaged.position = 0
    with pytest.raises(NonFiniteLossError, match="There is no checkpoint yet"):
        run(jax.jit(step), data=WithoutWayBack(damaged), num_steps=50, log_every=10)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_the_running_step_and_leaves(step_fn, tmp_path, capsys, signum):
    before = signal.getsignal(signum)
    data = Counting({4: lambda: os.kill(os.getpid(), signum)})
    checkpointer, writer = Checkpointer(tmp_path, {}), MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(SystemExit) as caught:
        run(step_fn, data=data, checkpointer=checkpointer, writer=writer, log_every=3)
    assert caught.value.code == 128 + signum
    assert signal.getsignal(signum) is before
    assert checkpointer.latest_step() == 5
    name = signal.Signals(signum).name
    assert (
        f"{name}: saved {tmp_path / 'checkpoints' / '5'}. Run the same command to continue." in capsys.readouterr().out
    )
    # The interrupted step is not logged: the unbroken run does not log it either.
    assert [row["step"] for row in read_metrics(tmp_path)] == [3]
    writer.close()

    state, _, data_state = checkpointer.restore(new_state())
    data.set_state(data_state)
    assert data.position == 5
    assert int(run(step_fn, state, data, checkpointer=checkpointer).step) == 10
    checkpointer.close()


def test_signal_never_saves_a_bad_state(step_fn, tmp_path):
    checkpointer = Checkpointer(tmp_path, {})
    data = Counting({8: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(NonFiniteLossError, match="There is no checkpoint yet"):
        run(step_fn, new_state(1.0), data, checkpointer=checkpointer, log_every=100)
    checkpointer.close()


def test_second_interrupt_leaves_at_once():
    before = signal.getsignal(signal.SIGINT)
    with deferred_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_without_a_checkpointer_says_that_nothing_was_saved(step_fn, capsys):
    with pytest.raises(SystemExit):
        run(step_fn, data=Counting({2: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    assert "SIGTERM: stopped after step 3. Nothing was saved" in capsys.readouterr().out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("during", ["save", "wait"])
def test_signal_during_the_last_save(step_fn, tmp_path, capsys, monkeypatch, signum, during):
    """It is not swallowed: the run is whole, and leaves as it does on any other signal."""
    checkpointer = Checkpointer(tmp_path, {})
    old = getattr(checkpointer, during)

    def interrupted(*args):
        if not interrupted.done:
            interrupted.done = True
            os.kill(os.getpid(), signum)
        return old(*args)

    interrupted.done = False
    monkeypatch.setattr(checkpointer, during, interrupted)
    with pytest.raises(SystemExit) as caught:
        run(step_fn, checkpointer=checkpointer)
    assert caught.value.code == 128 + signum
    assert f"{signal.Signals(signum).name}: saved {tmp_path / 'checkpoints' / '10'}" in capsys.readouterr().out
    assert checkpointer.latest_step() == 10
    checkpointer.close()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_that_is_no_ctrl_c_changes_nothing(step_fn, tmp_path, signum):
    def twice():
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signal.SIGTERM)

    checkpointer = Checkpointer(tmp_path, {})
    with pytest.raises(SystemExit) as caught:
        run(step_fn, data=Counting({4: twice}), checkpointer=checkpointer)
    assert caught.value.code == 128 + signum
    assert checkpointer.latest_step() == 5
    checkpointer.close()


def test_a_signal_that_was_ignored_stays_so(step_fn):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        state = run(step_fn, data=Counting({4: lambda: os.kill(os.getpid(), signal.SIGHUP)}))
        assert int(state.step) == 10
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_runs_outside_the_main_thread(step_fn):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(step_fn)))
    thread.start()
    thread.join()
    assert int(found[0].step) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 2**31}, "num_steps must be from 1 to 2147483647, got 2147483648"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"save_every": -1}, "save_every must be at least 1, got -1"),
        ({"images_per_batch": 0}, "images_per_batch must be at least 1, got 0"),
        ({"callbacks": [(0, print)]}, r"callbacks\[0\]'s period must be at least 1, got 0"),
        *(
            ({name: value}, f"{name} must be an integer")
            for name in ("num_steps", "log_every", "images_per_batch")
            for value in (2.5, float("nan"), float("inf"), "3", True)
        ),
        ({"save_every": 2.5}, "save_every must be an integer, got 2.5"),
        ({"callbacks": [print]}, r"callbacks\[0\] must be a pair \(every, function\), got <built-in"),
        (
            {"callbacks": [(1, None)]},
            r"callbacks\[0\]'s function must be a function of the step and the state, got None",
        ),
        ({"state": {"w": 1}}, r"state must be a TrainState, as create_state makes, got \{'w': 1\}"),
        ({"data": [1, 2]}, r"data must be an iterator .*, got \[1, 2\], which has no '__next__'"),
        ({"data": 3}, "data must be an iterator .*, got 3, which has no '__next__'"),
        ({"batch_to_device": 3}, "batch_to_device must be a function of a batch, such as .*, got 3"),
        ({"checkpointer": "runs/a"}, "checkpointer must be a Checkpointer or None, got 'runs/a'"),
        ({"writer": "runs/a"}, "writer must be a MetricsWriter or None, got 'runs/a'"),
        ({"progress": "yes"}, "progress must be True or False, got 'yes'"),
    ],
)
def test_bad_input(step_fn, options, message):
    with pytest.raises(ValueError, match=message):
        run(step_fn, **options)


def test_a_step_that_is_none(step_fn):
    with pytest.raises(ValueError, match="step_fn must be a step, as from pmap_step or shard_map_step, got None"):
        run(None)
    with pytest.raises(ValueError, match="key must be one typed key"):
        fit(step_fn, new_state(), 0, Counting(), num_steps=1, batch_to_device=id, images_per_batch=1)
    for returned, message in [
        (None, r"step_fn must return \(state, metrics\), as make_step's does, got None"),
        ((new_state(), {"error": 1.0}), r"step_fn's metrics must hold 'loss', got \['error'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(lambda *_, returned=returned: returned)


def test_data_without_a_position_are_refused_where_it_is_to_be_saved(step_fn, tmp_path):
    batches = iter([{"x1": np.zeros((4, 2), np.float32)}] * 3)
    checkpointer = Checkpointer(tmp_path, {})
    with pytest.raises(ValueError, match=r"data must be an iterator .*, which has no 'get_state'"):
        run(step_fn, data=batches, checkpointer=checkpointer)
    checkpointer.close()
    assert int(run(step_fn, data=batches, num_steps=3).step) == 3


class Unknown(Counting):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_state(self):
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (NotImplementedError("no position"), "for checkpoints; it raised NotImplementedError: no position"),
        (None, "for checkpoints, got None"),
        (7, "for checkpoints, got 7"),
        ({"position": (1, 2)}, r"survive JSON \(lists for tuples, string keys\)"),
        ({1: 2}, "survive JSON"),
        ({"position": np.arange(3)}, "be JSON"),
        ({"position": b"1"}, "be JSON"),
    ],
    ids=str,
)
def test_a_position_that_cannot_be_saved_is_told_before_the_first_step(step_fn, tmp_path, state, said):
    """And not at the first checkpoint, after as many steps as are between two."""
    data, checkpointer = Unknown(state), Checkpointer(tmp_path, {})
    with pytest.raises(ValueError, match=rf"^data\.get_state\(\) must .*{said}"):
        run(step_fn, data=data, checkpointer=checkpointer)
    assert data.position == 0
    checkpointer.close()
    assert int(run(step_fn, data=data, num_steps=3).step) == 3


def test_data_that_end(step_fn):
    with pytest.raises(RuntimeError, match="The data ended after step 3"):
        run(step_fn, data=Counting(length=3))


def test_however_long_it_takes_the_time_left_can_be_said(capsys):
    progress = Progress(0, 10**20)
    for seconds in (59.6, 86400 * 999, 86400 * 1e30, math.inf, math.nan):
        progress.update(1, 0.5, 100.0, seconds)
    said = [line.split("examples/s  ")[1] for line in capsys.readouterr().out.splitlines()]
    days = f"{1e30:,.0f} days left"
    assert said == ["0:01:00 left", "999 days, 0:00:00 left", days, "inf days left", "nan days left"]
