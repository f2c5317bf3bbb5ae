import json
import math
import shutil
import struct
import sys
import time

import pytest

from fm_jax.train.folder import FolderRemovedError
from fm_jax.train.log import MetricsWriter, read_metrics


def test_lines_are_json_and_come_back(tmp_path):
    writer = MetricsWriter(tmp_path / "run", tensorboard=False)
    writer.write(1, {"loss": 0.1, "grad_norm": math.inf})
    writer.write(2, {"loss": math.nan, "grad_norm": -math.inf})
    # Each line is there as soon as it is written.
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    writer.close()
    assert (
        text
        == '{"step": 1, "loss": 0.1, "grad_norm": "Infinity"}\n{"step": 2, "loss": "NaN", "grad_norm": "-Infinity"}\n'
    )
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = read_metrics(tmp_path / "run")
    assert rows[0] == {"step": 1, "loss": 0.1, "grad_norm": math.inf}
    assert math.isnan(rows[1]["loss"])
    assert rows[1]["grad_norm"] == -math.inf


def test_resuming_drops_later_and_torn_lines(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": step / 3})
    writer.close()
    unbroken = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    writer = MetricsWriter(tmp_path, 2, tensorboard=False)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    for step in (3, 4):
        writer.write(step, {"loss": step / 3})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == unbroken
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    MetricsWriter(tmp_path, 0, tensorboard=False).close()
    assert read_metrics(tmp_path) == []


def events(folder):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while len(data) >= 12:
            # A TFRecord: length (8 bytes), its CRC (4), the event, its CRC (4).
            (length,) = struct.unpack("<Q", data[:8])
            if len(data) < 16 + length:
                break  # still being written
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_event_files_without_tensorflow(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(10, {"loss": 0.5})
    writer.write(20, {"loss": 0.25})
    # Readable before it is closed, since a killed run never closes it.
    deadline, found = time.monotonic() + 10, []
    while len(found) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        found = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    assert found == [(10, "loss", 0.5), (20, "loss", 0.25)]
    writer.close()
    assert "tensorflow" not in sys.modules


def test_resumed_event_file_purges_later_steps(tmp_path):
    writer = MetricsWriter(tmp_path, 10)
    writer.close()
    start = [event for event in events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in start] == [(11, 1)]  # 1 is START


def test_without_tensorboardx_says_so_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.warns(UserWarning, match="tensorboardX is not installed") as record:
        writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert len(record) == 1
    assert len(read_metrics(tmp_path)) == 2


OURS = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": "NaN"}\n{"step": 3, "loss": 7}\n'
FOREIGN = [
    b"not json",
    b"",
    b"[1, 2]",
    b"3",
    b"null",
    b'{"step": "a"}',
    b'{"step": NaN, "loss": 1.0}',
    b'{"step": true, "loss": 1.0}',
    b'{"step": 2.0, "loss": 1.0}',
    b'{"step": null}',
    b'{"loss": 1.0}',
    b'{"step": 2, "note": "lowered the rate"}',
    b'{"step": 99, "loss": [1]}',
    b'{"step": 99, "loss": NaN}',
    b'{"step": 99, "loss": null}',
    b"\xff\xfe\x80",
    b"\x00" * 50,
    b"[" * 100_000,
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 2, "loss": 1',
    '\u2028 {"step": 99}'.encode(),
]


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_lines_stop_nothing_and_stay_where_they_are(line, tmp_path):
    lines = OURS.splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines[0] + line + b"\n" + lines[1] + lines[2] + line + b"\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, 2, tensorboard=False)
    writer.write(3, {"loss": 7})
    writer.close()
    assert path.read_bytes() == lines[0] + line + b"\n" + lines[1] + line + b"\n" + b'{"step": 3, "loss": 7.0}\n'
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        (b'{"step": 3, "los', b""),
        (b"{", b""),
        (b'{"st', b""),
        (b'{"step": 2, "loss": 1.0}', b'{"step": 2, "loss": 1.0}\n'),
        (b'{"step": 4, "loss": 1.0}', b""),
        (b"a note", b"a note\n"),
        (b"\x00\x00", b"\x00\x00\n"),
    ],
)
def test_only_a_torn_line_of_ours_is_dropped(last, kept, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(OURS[:25] + last)
    MetricsWriter(tmp_path, 2, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == OURS[:25] + kept


def test_writing_to_a_file_that_was_removed_is_refused(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl was removed while the run was going on"):
            writer.write(2, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").write_text("another's")
    writer.close()


def test_a_folder_that_was_removed(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FolderRemovedError, match=r"run was removed .* Start the run again: it begins anew"):
        writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_places_that_others_have_taken(name, tmp_path):
    (tmp_path / name).mkdir() if name == "metrics.jsonl" else (tmp_path / name).touch()
    with pytest.raises(OSError, match=f"{name} is a .*, and must be a .*: move it away"):
        MetricsWriter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("step", [-1, 2.5, "3", None, float("nan"), True])
def test_a_start_that_is_no_step(step, tmp_path):
    with pytest.raises(ValueError, match="start_step must be"):
        MetricsWriter(tmp_path / "run", step)
    assert not (tmp_path / "run").exists()
