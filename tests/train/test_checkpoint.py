import contextlib
import functools
import json
import logging
import os
import re
import shutil
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from fm_jax.train.checkpoint import Checkpointer, CheckpointError
from fm_jax.train.state import create_state

CONFIG = {"learning_rate": 1e-3, "widths": (8, 8), "model": {"depth": 2}, "total_steps": 10}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step=0, width=5, dtype=jnp.float32, ema=(0.9,), optimizer=OPTIMIZER):
    params = {"w": jax.random.normal(jax.random.key(1), (3, width)).astype(dtype), "b": jnp.zeros(width, jnp.bfloat16)}
    return create_state(params, optimizer, ema)._replace(step=jnp.int32(step))


def snapshot(folder):
    """Every file below `folder` with its bytes and time of change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpointer = Checkpointer(folder, CONFIG)
    for step in (3, 6):
        checkpointer.save(make_state(step), jax.random.key(9, impl="rbg"), {"position": step, "epoch": [0, 1]})
    checkpointer.close()
    return folder


@pytest.fixture
def copy(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "copy")


def refusal(folder, template=None, config=CONFIG, **options):
    """The message with which restoring is refused, having checked that nothing in the folder changed."""
    before = snapshot(folder)
    checkpointer = Checkpointer(folder, config, **options)
    with pytest.raises(CheckpointError) as caught:
        checkpointer.restore(make_state() if template is None else template)
    # Having been refused, the run may not write here either.
    with pytest.raises(CheckpointError, match="was not restored from"):
        checkpointer.save(make_state(99), jax.random.key(0), {})
    checkpointer.close()
    assert snapshot(folder) == before
    assert "Nothing was overwritten" in str(caught.value)
    return str(caught.value)


def test_round_trip_is_exact(run_dir):
    checkpointer = Checkpointer(run_dir, CONFIG)
    assert checkpointer.latest_step() == 6
    assert checkpointer.path(6) == run_dir / "checkpoints" / "6"
    state, key, data_state = checkpointer.restore(make_state())
    expected = make_state(6)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert not a.weak_type
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert key.dtype == jax.random.key(9, impl="rbg").dtype
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(9, impl="rbg")))
    assert data_state == {"position": 6, "epoch": [0, 1]}
    # The restored state can be donated, and saving its step again changes nothing.
    before = snapshot(run_dir)
    checkpointer.save(state, key, data_state)
    checkpointer.close()
    assert snapshot(run_dir) == before
    jax.jit(lambda s: s, donate_argnums=0)(state)


def test_saving_copies_before_the_state_is_donated(tmp_path):
    checkpointer = Checkpointer(tmp_path, CONFIG)
    assert checkpointer.restore(make_state()) is None
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = make_state(1)
    expected = np.array(state.params["w"])
    checkpointer.save(state, jax.random.key(0), {})
    overwrite(state)
    state, _, _ = checkpointer.restore(make_state())
    checkpointer.close()
    np.testing.assert_array_equal(state.params["w"], expected)


def test_keeps_the_latest_and_allows_listed_changes(tmp_path, capfd):
    checkpointer = Checkpointer(tmp_path, CONFIG, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(make_state(step), jax.random.key(0), {})
    checkpointer.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]
    checkpointer = Checkpointer(
        tmp_path, {**CONFIG, "total_steps": 20, "model": {"depth": 3}}, allow_change={"model", "total_steps"}
    )
    assert int(checkpointer.restore(make_state())[0].step) == 3
    checkpointer.close()
    assert capfd.readouterr().err == ""


def test_state_of_a_template_that_is_committed_goes_where_it_was(run_dir):
    device = jax.devices()[-1]
    checkpointer = Checkpointer(run_dir, CONFIG)
    state, _, _ = checkpointer.restore(jax.device_put(make_state(), device))
    checkpointer.close()
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning_rate": 0.01}, "with learning_rate=0.001, and this run has learning_rate=0.01"),
        ({"widths": (8, 16)}, r"with widths=[8, 8], and this run has widths=[8, 16]"),
        ({"model": {"depth": 3}}, "with model.depth=2, and this run has model.depth=3"),
        ({"dropout": 0.1}, "with dropout=absent, and this run has dropout=0.1"),
    ],
)
def test_changed_config_is_refused(run_dir, config, message):
    found = refusal(run_dir, config={**CONFIG, **config})
    assert message in found
    assert "Restore the old value, or start anew with another --run-dir" in found


def test_a_field_that_there_was_not_counts_as_what_it_was_then(run_dir):
    config = CONFIG | {"model": CONFIG["model"] | {"norm": "rms"}}
    assert "with model.norm=absent" in refusal(run_dir, config=config)
    assert "with model.norm=layer" in refusal(run_dir, config=config, new_fields={"model": {"norm": "layer"}})
    checkpointer = Checkpointer(run_dir, config, new_fields={"model": {"norm": "rms"}})
    assert checkpointer.restore(make_state()) is not None
    checkpointer.close()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"width": 6}, "params/b is bfloat16[5] there and bfloat16[6] in this run"),
        ({"dtype": jnp.float16}, "params/w is float32[3, 5] there and float16[3, 5] in this run"),
        ({"ema": (0.99,)}, "it lacks ema/0.99/b, ema/0.99/w; it holds ema/0.9/b, ema/0.9/w, which this run has not"),
        ({"optimizer": optax.sgd(0.1)}, "it holds opt_state/"),
    ],
)
def test_other_arrays_are_refused(run_dir, template, message):
    found = refusal(run_dir, make_state(**template))
    assert message in found
    assert str(run_dir / "checkpoints" / "6") in found


def files_of(folder):
    return sorted(path for path in (folder / "checkpoints" / "6").rglob("*") if path.is_file())


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "zeroed":
        path.write_bytes(bytes(len(data)))
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def same(state, other):
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# Orbax's readers of the other arrays outlive the event loop of the one that failed.
@pytest.mark.slow_but_one
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["missing", "truncated", "zeroed", "one bit"])
def test_any_damaged_file_is_refused_or_harmless(copy, run_dir, how):
    refusals = []
    for path in files_of(copy):
        original = path.read_bytes()
        damage(path, how)
        checkpointer = Checkpointer(copy, CONFIG)
        before = snapshot(copy)
        try:
            state, _, data_state = checkpointer.restore(make_state())
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            # Orbax also keeps files, and words in its description of the tree, that reading does not need.
            assert same(state, make_state(6))
            assert data_state["position"] == 6
            assert (
                path.name in {"_CHECKPOINT_METADATA", "_METADATA", "commit_success.txt"}
                or "ocdbt.process_0" in path.parts
            )
        assert snapshot(copy) == before
        checkpointer.close()
        path.write_bytes(original)
    needed = 3 if how == "one bit" else 4
    assert len(refusals) >= needed, "the description, the manifest, the arrays and mostly the arrays' metadata"
    for refusal in refusals:
        assert f"{copy / 'checkpoints' / '6'} is damaged" in refusal
        assert "Move that folder away to continue from the checkpoint before it" in refusal


def test_one_bit_of_a_large_array_is_noticed(tmp_path):
    # Orbax's own checks cover its index, not the values of an array too large to be kept in it.
    checkpointer = Checkpointer(tmp_path, CONFIG)
    checkpointer.save(make_state(6, width=20_000), jax.random.key(0), {})
    checkpointer.close()
    path = max(files_of(tmp_path), key=lambda path: path.stat().st_size)
    damage(path, "one bit")
    found = refusal(tmp_path, make_state(width=20_000))
    assert re.search("is damaged: the checksum of [a-z0-9_/.]+ does not match", found)


def test_moving_a_damaged_checkpoint_away_continues_from_the_one_before(copy):
    (copy / "checkpoints" / "6" / "meta" / "metadata").write_text("{")
    assert "is damaged: its description cannot be read" in refusal(copy)
    shutil.move(copy / "checkpoints" / "6", copy / "broken")
    checkpointer = Checkpointer(copy, CONFIG)
    assert int(checkpointer.restore(make_state())[0].step) == 3
    checkpointer.close()


def test_changed_description_is_refused(copy):
    path = copy / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["body"]["data_state"]["position"] = 7
    path.write_text(json.dumps(meta))
    assert "the checksum of its description does not match" in refusal(copy)
    path.write_text(json.dumps({**meta, "format": "fm_jax 99"}))
    assert "has format 'fm_jax 99', and this version reads 'fm_jax 1' and 'fm_jax 2'" in refusal(copy)


def test_foreign_folders_are_refused(tmp_path):
    manager = ocp.CheckpointManager(tmp_path / "orbax" / "checkpoints")
    manager.save(4, args=ocp.args.StandardSave({"w": np.ones(3)}))
    manager.close()
    assert "checkpoints/4 is not a checkpoint of fm_jax" in refusal(tmp_path / "orbax")

    (tmp_path / "junk" / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "junk" / "checkpoints" / "12" / "weights.bin").write_bytes(b"abc")
    assert "checkpoints/12 is not a checkpoint of fm_jax" in refusal(tmp_path / "junk")

    (tmp_path / "emptied" / "checkpoints" / "12").mkdir(parents=True)
    found = refusal(tmp_path / "emptied")
    assert "12 is damaged: there is no checkpoint in it" in found
    assert "Move that folder away to begin anew" in found

    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match="checkpoints is a file, not a folder"):
        Checkpointer(tmp_path / "file", CONFIG)
    assert (tmp_path / "file" / "checkpoints").read_text() == "mine"


@pytest.mark.parametrize("step", [1, 4, 99])
def test_a_numbered_folder_of_someone_else_is_not_pruned(step, copy):
    (copy / "checkpoints" / str(step)).mkdir()
    (copy / "checkpoints" / str(step) / "thesis.tex").write_text("mine")
    assert f"checkpoints/{step} is not a checkpoint of fm_jax" in refusal(copy, keep=2)


def test_what_someone_put_into_a_checkpoint_is_not_pruned(copy):
    (copy / "checkpoints" / "3" / "notes.txt").write_text("mine")
    assert "checkpoints/3 holds notes.txt, which fm_jax did not write" in refusal(copy, keep=1)


def test_a_folder_that_appears_while_the_run_goes_on_is_left_alone(copy):
    checkpointer = Checkpointer(copy, CONFIG, keep=1)
    state, key, data_state = checkpointer.restore(make_state())
    for step in ("2", "9"):
        (copy / "checkpoints" / step).mkdir()
        (copy / "checkpoints" / step / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="checkpoints/9 is there, and not of this run: move it away"):
        checkpointer.save(state._replace(step=jnp.int32(9)), key, data_state)
    checkpointer.save(state._replace(step=jnp.int32(8)), key, data_state)
    checkpointer.close()
    assert sorted(os.listdir(copy / "checkpoints")) == ["2", "8", "9"]
    for step in ("2", "9"):
        assert (copy / "checkpoints" / step / "thesis.tex").read_text() == "mine"


def test_an_emptied_checkpoint_is_a_damaged_one(copy):
    shutil.rmtree(copy / "checkpoints" / "6")
    (copy / "checkpoints" / "6").mkdir()
    found = refusal(copy)
    assert "checkpoints/6 is damaged: there is no checkpoint in it" in found
    assert "Move that folder away to continue from the checkpoint before it" in found


@pytest.mark.parametrize("left", [(), ("state",), ("_CHECKPOINT_METADATA",)])
def test_an_older_checkpoint_that_a_killed_process_had_begun_to_remove_is_no_obstacle(left, copy):
    old = copy / "checkpoints" / "3"
    for path in old.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (old / "state" / "_METADATA").unlink(missing_ok=True)
    checkpointer = Checkpointer(copy, CONFIG, keep=2)
    state, key, data_state = checkpointer.restore(make_state())
    for step in (8, 9):
        checkpointer.save(state._replace(step=jnp.int32(step)), key, data_state)
    checkpointer.close()
    assert sorted(os.listdir(copy / "checkpoints")) == ["8", "9"]


def test_half_written_checkpoint_is_ignored_and_replaced(copy, capfd):
    shutil.copytree(copy / "checkpoints" / "6", copy / "checkpoints" / "9.orbax-checkpoint-tmp")
    (copy / "checkpoints" / "9.orbax-checkpoint-tmp" / "meta" / "metadata").unlink()
    checkpointer = Checkpointer(copy, CONFIG)
    state, key, data_state = checkpointer.restore(make_state())
    assert int(state.step) == 6
    checkpointer.save(make_state(9), key, data_state)
    checkpointer.close()
    assert sorted(os.listdir(copy / "checkpoints")) == ["3", "6", "9"]
    assert capfd.readouterr().err == ""


def test_bad_input(tmp_path):
    for options, message in [
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"save_every": 0}, "save_every must be"),
        ({"keep": 2.5}, "keep must be an integer, got 2.5"),
        ({"keep": float("nan")}, "keep must be an integer, got nan"),
        ({"save_every": "3"}, "save_every must be an integer, got '3'"),
        ({"allow_change": "total_steps"}, "allow_change must be several names, such as {'total_steps'}"),
    ]:
        with pytest.raises(ValueError, match=message):
            Checkpointer(tmp_path, CONFIG, **options)
    with pytest.raises(ValueError, match="run_dir must be a path, got None"):
        Checkpointer(None, CONFIG)
    with pytest.raises(ValueError, match=r"config must be a dict, .*, got None"):
        Checkpointer(tmp_path, None)
    with pytest.raises(ValueError, match="config must be JSON"):
        Checkpointer(tmp_path, {"schedule": object()})
    checkpointer = Checkpointer(tmp_path, CONFIG)
    for data_state, message in [
        ({"x": (1, 2)}, "data_state must survive JSON"),
        ({"x": b"1"}, "data_state must be JSON"),
    ]:
        with pytest.raises(ValueError, match=message):
            checkpointer.save(make_state(1), jax.random.key(0), data_state)
    for args, message in [
        ((None, jax.random.key(0), {}), "state must be a TrainState, as create_state makes, got None"),
        ((make_state(1), 0, {}), "key must be one typed key"),
        ((make_state(1), jax.random.key(0), 3), r"data_state must be a dict, as from data.get_state\(\), got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            checkpointer.save(*args)
    with pytest.raises(ValueError, match="template must be a TrainState"):
        checkpointer.restore({})
    checkpointer.close()
    assert committed(tmp_path) == []


def committed(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_removed_is_not_written_to(again, tmp_path):
    """Another run may have begun there."""
    checkpointer = Checkpointer(tmp_path / "run", CONFIG)
    checkpointer.save(make_state(1), jax.random.key(0), {})
    checkpointer.wait()
    shutil.rmtree(tmp_path / "run")
    if again:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="checkpoints was removed while the run was going on"):
        checkpointer.save(make_state(2), jax.random.key(0), {})
    checkpointer.close()
    assert (tmp_path / "run").exists() == again
    assert not again or committed(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="elsewhere a save that has begun makes the folder anew")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_has_begun_does_not_bring_a_removed_folder_back(tmp_path):
    """Whenever it is removed: by the name of the folder, half of these saves made it anew."""
    for delay in np.linspace(0, 0.04, 9):
        checkpointer = Checkpointer(tmp_path / "run", CONFIG)
        checkpointer.save(make_state(1, width=100_000), jax.random.key(0), {})
        time.sleep(delay)
        (tmp_path / "run").rename(tmp_path / "gone")
        assert not (tmp_path / "run").exists()
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        with contextlib.suppress(CheckpointError):
            checkpointer.wait()
        with pytest.raises(CheckpointError, match="checkpoints was removed while the run was going on"):
            checkpointer.save(make_state(2), jax.random.key(0), {})
        with contextlib.suppress(CheckpointError):
            checkpointer.close()
        assert not (tmp_path / "run").exists()
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)


def test_what_a_full_disk_leaves_in_the_log_of_asyncio_is_silenced(caplog, tmp_path):
    Checkpointer(tmp_path, CONFIG).close()
    log, message = logging.getLogger("asyncio"), "Future exception was never retrieved"
    theirs = ValueError("OUT_OF_RANGE: Error writing local file [os_error_code='28']")
    for error in (theirs, ValueError("RESOURCE_EXHAUSTED: No space left"), ValueError("mine")):
        log.error(message, exc_info=(type(error), error, None))
    assert [record.exc_info[1].args for record in caplog.records] == [("mine",)]


def test_fields_are_named_as_the_caller_names_them(run_dir):
    found = refusal(run_dir, config={**CONFIG, "model": {"depth": 3}}, name_of=lambda path: f"<{path}>")
    assert "with <model.depth>=2, and this run has <model.depth>=3" in found
    with pytest.raises(ValueError, match="name_of must be a function of a field's path"):
        Checkpointer(run_dir, CONFIG, name_of="model")


@pytest.mark.parametrize("when", ["save", "wait_until_finished"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("OUT_OF_RANGE: Failed to write 107 bytes [tensorstore_spec='{}'] [os_error_code='28']"),
    ],
    ids=["Python", "TensorStore"],
)
def test_what_cannot_be_written_is_told_in_a_sentence(when, error, copy, monkeypatch):
    checkpointer = Checkpointer(copy, CONFIG)
    state, key, data_state = checkpointer.restore(make_state())

    def fails(*_, **__):
        raise error

    save, left = functools.partial(checkpointer.save, state._replace(step=jnp.int32(9)), key, data_state), 6
    if when != "save":
        save()
        save, left = checkpointer.wait, 9
    monkeypatch.setattr(checkpointer._manager, when, fails)
    message = f"could not be written to {copy / 'checkpoints'}: No space left on device. The last good step is"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save()
    monkeypatch.undo()
    checkpointer.close()
    checkpointer = Checkpointer(copy, CONFIG)
    assert int(checkpointer.restore(make_state())[0].step) == left
    checkpointer.close()


def test_a_first_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, CONFIG)

    def fails(*_, **__):
        raise ValueError("NOT_FOUND: Error reading [tensorstore_spec='{}']")

    monkeypatch.setattr(checkpointer._manager, "save", fails)
    message = "checkpoints: what was written of it is gone. There is no good step: once this is mended, .* begins anew"
    with pytest.raises(CheckpointError, match=message):
        checkpointer.save(make_state(1), jax.random.key(0), {})
    checkpointer.close()


@pytest.mark.parametrize("name", ["notes.txt", "12", "best", "7.orbax-checkpoint-tmp", ".DS_Store"])
def test_foreign_files_among_the_checkpoints_stop_nothing(name, copy):
    (copy / "checkpoints" / name).write_text("mine")
    checkpointer = Checkpointer(copy, CONFIG)
    state, key, data_state = checkpointer.restore(make_state())
    assert same(state, make_state(6))
    checkpointer.save(make_state(9), key, data_state)
    checkpointer.close()
    assert {"6", "9"} <= set(os.listdir(copy / "checkpoints"))


DATA = {"num_images": 200, "classes": ["cat", "dog"], "shape": [8, 8, 1], "checksum": "9f3a"}


def saved_on(folder, data, step=1, **options):
    checkpointer = Checkpointer(folder, CONFIG, data=data, **options)
    checkpointer.restore(make_state())
    checkpointer.save(make_state(step), jax.random.key(0), {})
    checkpointer.close()


def described(folder, step=1):
    return json.loads((folder / "checkpoints" / str(step) / "meta" / "metadata").read_text())["body"].get("data")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_images": 201, "checksum": "77b1"}, "200 images there and 201 here; checksum 9f3a there and 77b1 here. "),
        ({"checksum": "77b1"}, "checksum 9f3a there and 77b1 here, and all else that is known of them is the same"),
        ({"classes": ["cat", "fox"], "checksum": "7"}, "classes dog only there and fox only here; checksum 9f3a"),
        ({"classes": ["cat", "dog", "fox"]}, "classes fox only here. "),
        ({"classes": ["cat"]}, "classes dog only there. "),
        ({"classes": ["dog", "cat"]}, "classes in another order. "),
        ({"classes": ["cat", "dog", "dog"]}, "classes a different number of times. "),
        ({"classes": None}, "classes ['cat', 'dog'] there and None here. "),
        ({"shape": [9, 8, 1]}, "shape [8, 8, 1] there and [9, 8, 1] here. "),
        ({"files": {"train": 3}}, "files.train absent there and 3 here. "),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(change, told, tmp_path):
    saved_on(tmp_path, DATA)
    found = refusal(tmp_path, data={**DATA, **change})
    assert f"{tmp_path / 'checkpoints' / '1'} comes from a run on other data: {told}" in found
    for way in ("Restore the data", "--run-dir", "--init-from", "data=None"):
        assert way in found


def test_the_same_data_are_the_same_after_a_way_through_json(tmp_path):
    saved_on(tmp_path, {"num_images": 3, "classes": ("a", "b"), "mean": float("nan")})
    saved_on(tmp_path, {"mean": float("nan"), "classes": ["a", "b"], "num_images": 3}, step=2)
    assert committed(tmp_path) == ["1", "2"]


def test_without_a_description_of_the_data_there_is_nothing_to_compare(copy):
    """Of an earlier version, in which nothing was said of them; from then on they are."""
    path = copy / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["body"]["data"]
    path.write_text(json.dumps({**meta, "crc32": zlib.crc32(json.dumps(meta["body"], sort_keys=True).encode())}))
    saved_on(copy, DATA, step=7)
    assert described(copy, 7) == DATA
    saved_on(copy, None, step=8)  # read, and not forgotten
    assert described(copy, 8) == DATA
    assert "200 images there and 1 here" in refusal(copy, data={**DATA, "num_images": 1})


def test_descriptions_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"data must be a dict that describes the data, or None, got 3"):
        Checkpointer(tmp_path, CONFIG, data=3)
    with pytest.raises(ValueError, match="data must be JSON"):
        Checkpointer(tmp_path, CONFIG, data={"images": np.zeros(3)})


def test_read_only_restores_and_does_not_save(tmp_path):
    whole = Checkpointer(tmp_path, {"a": 1})
    whole.save(make_state(3), jax.random.key(0), {"position": 2})
    whole.wait()
    whole.close()
    before = sorted(tmp_path.rglob("*"))
    only = Checkpointer(tmp_path, {"a": 1}, read_only=True)
    state, _, position = only.restore(make_state(0))
    assert (int(state.step), position) == (3, {"position": 2})
    with pytest.raises(CheckpointError, match="was opened with read_only=True, and nothing is saved to it"):
        only.save(make_state(4), jax.random.key(0), {})
    only.close()
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(CheckpointError, match="is not there: give the folder of a run"):
        Checkpointer(tmp_path / "none", {}, read_only=True)
    assert not (tmp_path / "none").exists()
