"""Files of safetensors: what is read is what was written, by whomever; what is malformed is refused by name."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from fm_jax.weights import files
from fm_jax.weights.formats import WeightsError
from fm_jax.weights.safetensors import DTYPES, open_tensors
from fm_jax.weights.write import Lazy, write_tensors

NUMBERS = {
    name: np.arange(6).astype(dtype).reshape(2, 3) if name != "BOOL" else np.array([[True, False]])
    for name, dtype in DTYPES.items()
}


def raw(header, data=b"", *, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name: str = "model.safetensors") -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


class TestRead:
    @pytest.mark.parametrize("name", DTYPES)
    def test_every_dtype(self, tmp_path, name):
        write_tensors(tmp_path / "a.safetensors", {"x": NUMBERS[name], "odd": np.zeros(3, np.uint8)})
        found = open_tensors(tmp_path / "a.safetensors")["x"]
        assert found.dtype == NUMBERS[name].dtype
        assert (found == NUMBERS[name]).all()
        assert not found.flags.writeable

    def test_scalars_nothing_and_parts_of_arrays(self, tmp_path):
        x = np.arange(24, dtype=np.float32).reshape(4, 6)
        tensors = {"scalar": np.float32(3) * np.ones(()), "none": np.zeros((0, 5)), "view": x.T[::2]}
        write_tensors(tmp_path / "a.safetensors", tensors)
        found = open_tensors(tmp_path / "a.safetensors")
        assert found.keys() == tensors.keys()
        for key, value in tensors.items():
            np.testing.assert_array_equal(found[key], value)
            assert found[key].shape == value.shape

    def test_the_library_reads_ours_and_we_its(self, tmp_path):
        library = pytest.importorskip("safetensors.numpy")
        tensors = {key: NUMBERS[key] for key in ("F64", "F32", "F16", "I64", "U8", "BOOL")}
        write_tensors(tmp_path / "ours.safetensors", tensors, metadata={"format": "pt"})
        theirs = library.load_file(tmp_path / "ours.safetensors")
        library.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"a": "b"})
        ours = open_tensors(tmp_path / "theirs.safetensors")
        assert ours.metadata == {"a": "b"}
        for key, value in tensors.items():
            np.testing.assert_array_equal(theirs[key], value)
            np.testing.assert_array_equal(ours[key], value)

    @pytest.mark.parametrize("length", [123, 19280, 0x7B7B, 0x0280])
    def test_a_length_that_looks_like_another_format(self, write, length):
        """Like `{`, like a zip archive, like a pickle."""
        text = json.dumps({"a": entry(0, 4)})
        path = write(raw((text + " " * (length - len(text))).encode(), b"abcd"))
        assert open_tensors(path)["a"].tobytes() == b"abcd"

    def test_unaligned(self, write):
        data = np.float32([1, 2]).tobytes()
        path = write(raw({"a": entry(0, 1), "b": entry(1, 9, [2], "F32")}, b"\1" + data))
        assert open_tensors(path)["b"].tolist() == [1, 2]

    def test_a_list_of_files_and_a_folder(self, tmp_path):
        write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(2)})
        write_tensors(tmp_path / "b.safetensors", {"b": np.ones(2)})
        found = open_tensors([tmp_path / "a.safetensors", str(tmp_path / "b.safetensors")])
        assert (sorted(found), found.file_of("b").name) == (["a", "b"], "b.safetensors")
        with pytest.raises(WeightsError, match=r"holds a\.safetensors, b\.safetensors: give one"):
            open_tensors(tmp_path)
        write_tensors(tmp_path / "model.safetensors", {"c": np.ones(2)})
        with pytest.warns(UserWarning, match=r"model\.safetensors is taken"):
            assert list(open_tensors(tmp_path)) == ["c"]

    def test_a_variant_is_said(self, tmp_path):
        write_tensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors", {"c": np.ones(2)})
        with pytest.warns(UserWarning, match=r"variant alone, diffusion_pytorch_model\.fp16\.safetensors"):
            open_tensors(tmp_path)

    def test_shards(self, tmp_path):
        tensors = {f"{i}": np.full(4, i, np.float32) for i in range(5)}
        written = write_tensors(tmp_path / "model.safetensors", tensors, max_shard_bytes=32)
        assert [path.name for path in written] == [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
        assert json.loads(written[-1].read_text())["metadata"]["total_size"] == 80
        for path in (tmp_path, written[-1], written[:3]):
            found = open_tensors(path)
            assert all((found[key] == value).all() for key, value in tensors.items())
        written[-1].unlink()
        with pytest.raises(WeightsError, match="without their index"):
            open_tensors(tmp_path)

    def test_an_open_file_stays_as_it_was(self, tmp_path):
        path = tmp_path / "a.safetensors"
        write_tensors(path, {"x": np.zeros(100_000, np.float32)})
        old = open_tensors(path)
        write_tensors(path, {"x": np.ones(3, np.float32)})
        assert not old["x"].any()
        assert open_tensors(path)["x"].shape == (3,)


GOOD = {"a": entry(0, 4), "b": entry(4, 8)}
MALFORMED = {
    "cut off in its length": (b"\x10\0\0", "not begin with the length"),
    "cut off in its header": (raw(GOOD)[:40], "cut off: its header has"),
    "cut off in its data": (raw(GOOD, bytes(7)), "cut off: its tensors end at byte"),
    "something behind": (raw(GOOD, bytes(9)), "1 bytes behind its last tensor"),
    "overlap": (raw({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "'a' and 'b' overlap"),
    "gap": (raw({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)), "2 bytes before 'b'"),
    "gap at the beginning": (raw({"a": entry(2, 4)}, bytes(4)), "2 bytes before 'a'"),
    "oversized header": (raw(GOOD, bytes(8), length=100_000_001), "100000001 bytes; more than 100000000"),
    "header larger than the file": (raw(GOOD, bytes(8), length=10_000), "cut off: its header has 10000 bytes"),
    "shape and size differ": (raw({"a": entry(0, 4, [3])}, bytes(4)), r"'a' has 4 bytes, and 3 in the shape \[3\]"),
    "negative shape": (raw({"a": entry(0, 4, [-2, -2])}, bytes(4)), r"has the shape \[-2, -2\]"),
    "shape of floats": (raw({"a": entry(0, 4, [4.0])}, bytes(4)), r"has the shape \[4.0\]"),
    "shape of bools": (raw({"a": entry(0, 1, [True])}, bytes(1)), r"has the shape \[True\]"),
    "huge shape": (raw({"a": entry(0, 4, [2**62, 2**62])}, bytes(4)), "which is too large"),
    "huge and empty": (raw({"a": entry(0, 0, [0, 2**70])}), "which is too large"),
    "a header of 2^63 bytes": (raw(GOOD, bytes(8), length=2**63), "not begin with the length of a header"),
    "too many axes": (raw({"a": entry(0, 1, [1] * 65)}, bytes(1)), "65 axes"),
    "backwards": (raw({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}), "must be a beginning and an end"),
    "negative offset": (raw({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}), "has the data_offsets"),
    "no offsets": (raw({"a": {"dtype": "U8", "shape": [4]}}), "'a' must have dtype, shape and data_offsets"),
    "unknown dtype": (raw({"a": entry(0, 4, dtype="F4")}, bytes(4)), "'a' of .* is 'F4'; what is read is F64, F32"),
    "no dtype": (raw({"a": entry(0, 4, dtype=None)}, bytes(4)), "is None; what is read"),
    "a list": (raw(b'[{"a": 1}]'), "not begin with the length of a header and a JSON object"),
    "no JSON": (raw(b'{"a": '), "it is not JSON"),
    "NaN of a header": (raw(b'{"a": NaN}'), "must have dtype, shape"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "nested": (raw(b'{"a":' * 100_000), "nested too deeply|not JSON"),
    "a key twice": (raw(b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": 1}'), "'a' is in it twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "'__metadata__' must be strings"),
    "metadata is a string": (raw({"__metadata__": "a"}), "'__metadata__' must be strings"),
}


class TestMalformed:
    @pytest.mark.parametrize("fault", MALFORMED)
    def test_the_file_and_the_fault_are_named(self, write, fault):
        content, message = MALFORMED[fault]
        path = write(content)
        with pytest.raises(WeightsError, match=message) as caught:
            open_tensors(path)
        assert str(path) in str(caught.value)

    def test_every_cut_of_a_file(self, tmp_path):
        whole = tmp_path / "whole.safetensors"
        write_tensors(whole, {"a": np.zeros(3), "b": np.zeros((2, 2), np.float16)}, metadata={"format": "pt"})
        content = whole.read_bytes()
        for length in range(len(content)):
            (tmp_path / "cut.safetensors").write_bytes(content[:length])
            with pytest.raises(WeightsError, match=r"cut\.safetensors"):
                open_tensors(tmp_path / "cut.safetensors")

    def test_bytes_that_are_changed_are_read_or_refused(self, tmp_path):
        whole, changed = tmp_path / "whole.safetensors", tmp_path / "changed.safetensors"
        write_tensors(whole, {"a": np.zeros(3), "b": np.zeros((2, 2), np.float16)})
        content, rng = whole.read_bytes(), np.random.default_rng(0)
        for _ in range(200):
            damaged = bytearray(content)
            damaged[rng.integers(len(content) - 32)] = rng.integers(256)
            changed.write_bytes(damaged)
            with contextlib.suppress(WeightsError):
                dict(open_tensors(changed))

    def test_no_file(self, tmp_path):
        with pytest.raises(WeightsError, match=r"absent\.safetensors is not there"):
            open_tensors(tmp_path / "absent.safetensors")
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(WeightsError, match="not a file"):
            open_tensors(tmp_path / "pipe.safetensors")
        with pytest.raises(WeightsError, match="an empty list"):
            open_tensors([])
        (tmp_path / "folder").mkdir()
        with pytest.raises(WeightsError, match="holds no safetensors: it has nothing in it"):
            open_tensors(tmp_path / "folder")

    def test_a_key_in_two_files(self, tmp_path):
        for name in ("a", "b"):
            write_tensors(tmp_path / f"{name}.safetensors", {"x": np.zeros(2)})
        with pytest.raises(WeightsError, match=r"'x' is in two files, .*a\.safetensors and .*b\.safetensors"):
            open_tensors([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


class TestIndex:
    @pytest.fixture
    def index(self, tmp_path):
        (tmp_path / "model").mkdir()
        write_tensors(tmp_path / "outside.safetensors", {"b": np.zeros(2)})
        write_tensors(tmp_path / "model" / "one.safetensors", {"a": np.zeros(2)})

        def index(places) -> Path:
            path = tmp_path / "model" / "model.safetensors.index.json"
            content = places if isinstance(places, str) else json.dumps({"weight_map": places})
            path.write_text(content)
            return path

        return index

    @pytest.mark.parametrize(
        ("places", "message"),
        [
            ({"a": "one.safetensors", "b": "two.safetensors"}, "shards that are not there: two.safetensors"),
            ({"a": "one.safetensors", "b": "../outside.safetensors"}, "outside of its folder, '../outside"),
            ({"a": "one.safetensors", "b": "x/../../outside.safetensors"}, "outside of its folder"),
            ({"a": "one.safetensors", "b": "/etc/passwd"}, "outside of its folder, '/etc/passwd'"),
            ({"a": "one.safetensors", "b": "..\\outside.safetensors"}, "outside of its folder"),
            ({"a": "one.safetensors", "b": ""}, "outside of its folder"),
            ({"a": "one.safetensors", "c": "one.safetensors"}, r"one\.safetensors lacks .*: c\."),
            ({}, "has no 'weight_map'"),
            ({"a": 1}, "has no 'weight_map'"),
            ('{"metadata": {}}', "has no 'weight_map'"),
            ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "'a' is in it twice"),
            ("[1]", "must be a JSON object"),
            ("version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
            ("{", "it is not JSON"),
        ],
    )
    def test_refusals(self, index, places, message):
        path = index(places)
        with pytest.raises(WeightsError, match=message):
            open_tensors(path)

    def test_a_link_that_leads_outside(self, index, tmp_path):
        path = index({"a": "one.safetensors", "b": "two.safetensors"})
        (tmp_path / "model" / "two.safetensors").symlink_to(tmp_path / "outside.safetensors")
        with pytest.raises(WeightsError, match=r"two\.safetensors is a link to .*outside\.safetensors"):
            open_tensors(path)

    def test_the_cache_of_the_hub_is_links(self, tmp_path):
        snapshot = tmp_path / "models--a" / "snapshots" / "123" / "vae"
        blobs = tmp_path / "models--a" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        *written, _ = write_tensors(blobs / "x.safetensors", {"a": np.zeros(2), "b": np.ones(2)}, max_shard_bytes=16)
        for path in written:
            (snapshot / f"model{path.name[1:]}").symlink_to(path)
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        assert open_tensors(snapshot)["b"].all()

    def test_nothing_is_read_before_all_are_there(self, index, tmp_path):
        (tmp_path / "model" / "one.safetensors").write_bytes(b"garbage")
        with pytest.raises(WeightsError, match="not there: two"):
            open_tensors(index({"a": "one.safetensors", "b": "two.safetensors"}))


def script(code: str, *arguments) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


class TestWrite:
    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"a": [1.0]}, "'a' must be an array of F64"),
            ({"a": np.zeros(2, complex)}, "'a' must be an array of F64"),
            ({"a": np.zeros(2, "U3")}, "'a' must be an array"),
            ({3: np.zeros(2)}, "A key must be a string"),
            ({"__metadata__": np.zeros(2)}, "other than '__metadata__'"),
        ],
    )
    def test_what_cannot_be_written(self, tmp_path, tensors, message):
        with pytest.raises(WeightsError, match=message):
            write_tensors(tmp_path / "a.safetensors", tensors)
        assert not list(tmp_path.iterdir())

    def test_arguments(self, tmp_path):
        with pytest.raises(WeightsError, match="must end with"):
            write_tensors(tmp_path / "a.bin", {"a": np.zeros(2)})
        with pytest.raises(WeightsError, match="metadata must be strings"):
            write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(2)}, metadata={"step": 3})
        with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
            write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(2)}, max_shard_bytes=0)
        with pytest.raises(WeightsError, match="'a' was to be"):
            write_tensors(tmp_path / "a.safetensors", {"a": Lazy((3,), np.float32, lambda: np.zeros(2, np.float32))})
        for tensors, options, message in (
            ([np.zeros(2)], {}, "tensors must be arrays by key"),
            ({"a": np.zeros(2)}, {"metadata": "pt"}, "metadata must be strings"),
        ):
            with pytest.raises(ValueError, match=message):
                write_tensors(tmp_path / "a.safetensors", tensors, **options)
        for path in (None, 3, "", b"a.safetensors"):
            with pytest.raises(ValueError, match="path must be a"):
                write_tensors(path, {"a": np.zeros(2)})
            with pytest.raises(ValueError, match="path must be a file, a folder or a list"):
                open_tensors(path)
            with pytest.raises(ValueError, match="Each of several paths must be a path"):
                open_tensors([path])
        assert not list(tmp_path.iterdir())
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="file is a file"):
            write_tensors(tmp_path / "file" / "a.safetensors", {"a": np.zeros(2)})

    def test_an_error_on_the_way_leaves_the_old_one(self, tmp_path):
        path = tmp_path / "new" / "a.safetensors"
        fails = {"a": np.ones(2), "b": Lazy((2,), np.float64, lambda: 1 / 0)}
        with pytest.raises(ZeroDivisionError):
            write_tensors(path, fails)
        assert not path.parent.exists()
        write_tensors(path, {"a": np.zeros(2)})
        with pytest.raises(ZeroDivisionError):
            write_tensors(path, fails, max_shard_bytes=16)
        assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]
        assert not open_tensors(path)["a"].any()

    @pytest.mark.slow
    def test_a_full_disk_leaves_nothing(self, tmp_path):
        code = """
        import resource, signal, sys, numpy as np
        from fm_jax.weights.write import write_tensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_tensors(sys.argv[1], {str(i): np.zeros(10_000, np.float32) for i in range(4)})
        except OSError as error:
            print(error)
        """
        done = subprocess.run(script(code, tmp_path / "new" / "a.safetensors"), capture_output=True, text=True)
        assert "a.safetensors" in done.stdout, done.stderr
        assert not list(tmp_path.iterdir())

    def test_one_form_replaces_the_other(self, tmp_path):
        path, tensors = tmp_path / "model.safetensors", {"a": np.zeros(2), "b": np.ones(2)}
        (tmp_path / "other-00001-of-00002.safetensors").touch()
        for most, count in ((16, 3), (None, 1), (16, 3), (None, 1)):
            write_tensors(path, tensors, max_shard_bytes=most)
            assert len(list(tmp_path.glob("model*"))) == count
            assert open_tensors(tmp_path)["b"].all()
        assert len(list(tmp_path.iterdir())) == 2

    def test_between_old_and_new_nothing_is_mixed(self, tmp_path, monkeypatch):
        """Whichever renaming fails, what can be read is all old or all new."""
        path = tmp_path / "model.safetensors"
        old, new = ({key: np.full(2, value) for key in "abc"} for value in (0.0, 1.0))
        seen = set()
        for before in (16, None):
            for after in (16, None):
                for survived in range(9):
                    write_tensors(path, old, max_shard_bytes=before)
                    left = [survived]

                    def fail(function, left=left):
                        def call(*arguments, **options):
                            if not left[0]:
                                raise KeyboardInterrupt
                            left[0] -= 1
                            return function(*arguments, **options)

                        return call

                    with monkeypatch.context() as patch:
                        patch.setattr(files.os, "replace", fail(os.replace))
                        with contextlib.suppress(KeyboardInterrupt):
                            write_tensors(path, new, max_shard_bytes=after)
                    try:
                        found = {float(each.sum()) for each in open_tensors(tmp_path).values()}
                    except WeightsError:
                        found = {"refused"}
                    assert len(found) == 1
                    seen |= found
                    for each in tmp_path.iterdir():
                        each.unlink()
        assert seen == {0.0, 2.0, "refused"}

    @pytest.mark.slow
    def test_a_kill_leaves_the_old_file_whole(self, tmp_path):
        path = tmp_path / "a.safetensors"
        write_tensors(path, {"a": np.zeros(2)})
        code = """
        import sys, time, numpy as np
        from fm_jax.weights.write import Lazy, write_tensors
        def slowly():
            print("writing", flush=True)
            time.sleep(60)
        write_tensors(sys.argv[1], {"a": np.ones(2), "b": Lazy((2,), np.float64, slowly)})
        """
        with subprocess.Popen(script(code, path), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "writing\n"
            process.send_signal(signal.SIGKILL)
        assert not open_tensors(path)["a"].any()
        (left,) = (each for each in tmp_path.iterdir() if each != path)
        assert not open_tensors(tmp_path)["a"].any()
        os.utime(left, (0, 0))  # long ago
        write_tensors(path, {"a": np.ones(2)})
        assert list(tmp_path.iterdir()) == [path]

    def test_what_another_writes_is_not_removed(self, tmp_path):
        path = tmp_path / "a.safetensors"

        def another():
            write_tensors(path, {"a": np.ones(2)})
            return np.zeros(2)

        def and_old():
            for each in tmp_path.glob(".unfinished*"):
                os.utime(each, (0, 0))
            return another()

        write_tensors(path, {"a": Lazy((2,), np.float64, and_old)})
        assert not open_tensors(path)["a"].any()
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.slow
    def test_two_processes_write_the_same_file(self, tmp_path):
        code = """
        import sys, numpy as np
        from fm_jax.weights.write import write_tensors
        for _ in range(8):
            write_tensors(sys.argv[1], {key: np.full(100, float(sys.argv[2])) for key in "abc"}, max_shard_bytes=800)
        """
        path = tmp_path / "model.safetensors"
        writers = [subprocess.Popen(script(code, path, value)) for value in (1, 2)]
        end = time.monotonic() + 60
        while any(each.poll() is None for each in writers) and time.monotonic() < end:
            try:
                found = {float(each[0]) for each in open_tensors(tmp_path).values()}
            except WeightsError:
                continue
            assert len(found) == 1
        assert [each.wait() for each in writers] == [0, 0]
        assert len({float(each[0]) for each in open_tensors(tmp_path).values()}) == 1
        assert len(list(tmp_path.iterdir())) == 4
