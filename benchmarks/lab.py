"""What comparisons with peers share: timings in turns, a peer in an interpreter of its own, records, tables."""

import datetime
import json
import math
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

Run = Callable[[], dict[str, Any]]
"""Does a thing once and says the `seconds` and the `cpu_seconds` that it took, and what else is worth knowing of it."""


def clocked(function: Callable[[], Any]) -> Run:
    """Times a call of ours until its arrays are there."""

    def run() -> dict[str, Any]:
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}

    return run


def in_turns(runs: Mapping[str, Run], repeats: int) -> list[dict[str, Any]]:
    """Runs everything once unmeasured, which compiles, then `repeats` rounds in which each takes its turn.

    Returns:
        A row for each name: least and median seconds and least processor time, the same as multiples of the first
        name's (above 1 is slower than it), what the last run says of itself, and the first and the last `loss` where
        there is one. One that fails has `error` instead.

    Raises:
        RuntimeError: if a loss is not finite.
    """
    first, failed = dict[str, dict[str, Any]](), dict[str, str]()
    for name, run in runs.items():
        try:
            first[name] = run()
        except PeerError as error:
            failed[name] = str(error)
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in first}
    for _ in range(repeats):
        for name in first:
            taken[name].append(runs[name]())
    rows: list[dict[str, Any]] = []
    for name, each in taken.items():
        last = each[-1]
        seconds, cpu = [found["seconds"] for found in each], [found["cpu_seconds"] for found in each]
        row = {"min": min(seconds), "median": statistics.median(seconds), "cpu_min": min(cpu)}
        base = rows[0] if rows else row
        row |= {f"{key}_over_first": row[key] / base[key] for key in list(row)}
        row |= {"name": name, "runs": repeats}
        row |= {key: value for key, value in last.items() if key not in ("seconds", "cpu_seconds", "loss")}
        if "loss" in last:
            losses = [first[name]["loss"], last["loss"]]
            if not all(map(math.isfinite, losses)):
                raise RuntimeError(f"losses must be finite, got {losses} of {name}.")
            row["losses"] = losses
        rows.append(row)
    return rows + [{"name": name, "error": why} for name, why in failed.items()]


class PeerError(RuntimeError):
    """A peer could not do what it was asked for."""


class Peer:
    """`benchmarks/peers.py` in an interpreter that has PyTorch, which does one thing when asked and waits.

    The seconds are measured there: what passes through the pipe does not count. Between two questions it sleeps.
    """

    def __init__(self, python: Path):
        script = str(Path(__file__).with_name("peers.py"))
        # Its threads must not go on spinning in the turns of others.
        env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([str(python), script], stdin=pipe, stdout=pipe, text=True, env=env)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()

    def ask(self, **question: Any) -> dict[str, Any]:
        """One answer to one question.

        Raises:
            PeerError: with the peer's own error.
        """
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        pipe_in.write(json.dumps(question) + "\n")
        pipe_in.flush()
        answer = pipe_out.readline()
        if not answer:
            raise PeerError(f"the peer has ended with status {self._process.wait()}.")
        found = json.loads(answer)
        if "error" in found:
            raise PeerError(found["error"])
        return found

    def run(self, do: str, **options: Any) -> Run:
        """A run of `peers.py`'s function `do`, made at the first call."""
        name = f"{do} {json.dumps(options)}"
        made: list[bool] = []

        def once() -> dict[str, Any]:
            if not made:
                self.ask(do=do, name=name, **options)
                made.append(True)
            return self.ask(do="run", name=name)

        return once


def in_torch(
    peer: Peer | None, do: str, *, threads: tuple[int, ...], compiled: bool, label: str = "PyTorch", **options: Any
) -> dict[str, Run]:
    """The peer's runs of a thing: eager at each number of threads, and under `torch.compile` at the largest."""
    if peer is None:
        return {}
    found = {f"{label}, eager, {n} threads": peer.run(do, threads=n, **options) for n in threads}
    if compiled:
        most = max(threads)
        found[f"{label}, torch.compile, {most} threads"] = peer.run(do, threads=most, compiled=True, **options)
    return found


@contextmanager
def asking(python: Path | None) -> Iterator[Peer | None]:
    """The peer of an interpreter for as long as it is wanted; `None` without one."""
    if python is None:
        yield None
        return
    with Peer(python) as peer:
        yield peer


def commit() -> str:
    """The commit that this is, and whether the library was changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found, changed = (
        subprocess.run([*git, *args], capture_output=True, text=True).stdout.strip()
        for args in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "../fm_jax"])
    )
    return (found or "unknown") + ("+changes" if changed else "")


def record(peer: Peer | None) -> dict[str, Any]:
    """When, from what and on what this was measured."""
    cpu = [line.split(":")[1].strip() for line in _lines_of("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "processor": cpu[0] if cpu else None,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "peer": None if peer is None else peer.ask(do="record"),
    }


def peak_bytes() -> int:
    """The most bytes that this process has had in memory; on Linux not those of the process that started it."""
    for line in _lines_of("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _lines_of(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """The rows of `in_turns` as a Markdown table."""
    extra = [k for k in ("nfe", "ms_per_nfe") if any(k in row for row in rows)]
    extra += ["losses"] if any("losses" in row for row in rows) else []
    numbers = [f"{key}{over}" for over in ("", "_over_first") for key in ("min", "median", "cpu_min")]
    head = ["", "least, s", "median, s", "processor, s", "over the first: least", "median", "processor", *extra]
    body: list[list[Any]] = []
    for row in rows:
        if "error" in row:
            body.append([row["name"], f"not available: {row['error'][:120]}", *[""] * (len(head) - 2)])
            continue
        body.append([row["name"], *(row[key] for key in numbers), *(row.get(key, "") for key in extra)])
    return f"### {title}\n\n{lines(head, body)}"


def lines(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers that are no integers have three digits."""
    cells = [list(head), ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_both(out: Path, name: str, results: dict[str, Any], text: str) -> None:
    """Writes `name.json`, and the text as `name.md`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"{name}.md").write_text(text)


def write(out: Path, name: str, results: dict[str, Any], tables: list[str]) -> None:
    """Writes `name.json` and `name.md`, and prints the last table."""
    at = results["record"]
    where = ", ".join(f"{k} {v}" for k, v in at.items() if not isinstance(v, dict) and v is not None)
    if at["peer"]:
        where += "; " + ", ".join(f"{k} {v}" for k, v in at["peer"].items())
    write_both(out, name, results, "\n\n".join([f"Measured: {where}.", *tables]) + "\n")
    print(tables[-1] + "\n", flush=True)


def compared(
    out: Path, name: str, peer: Peer | None, parts: Iterable[tuple[str, str, int, Mapping[str, Run]]], repeats: int
) -> dict[str, Any]:
    """Runs parts one after the other, and writes after each; milliseconds an evaluation where a run says its `nfe`.

    Args:
        out: where to.
        name: of the benchmark.
        peer: for the record.
        parts: name, title, batch size and runs of each, made when it is its turn.
        repeats: as in `in_turns`.
    """
    results: dict[str, Any] = {"record": record(peer)}
    tables = []
    for part, title, num, runs in parts:
        rows = in_turns(runs, repeats)
        for row in rows:
            if row.get("nfe"):
                row["ms_per_nfe"] = 1e3 * row["min"] / row["nfe"]
        results[part] = {"batch_size": num, "rows": rows}
        tables.append(table(f"{title}, batch {num}", rows))
        write(out, name, results, tables)
    return results
