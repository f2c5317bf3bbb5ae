"""Batches that are paired ahead of time: a coupling's host work runs in threads while the device trains."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import (
    check_condition,
    check_coupling,
    check_data,
    check_has,
    check_holds,
    check_integer,
    check_key,
    check_per_example,
    check_source,
    shown,
)
from fm_jax.losses.matching import check_pairing
from fm_jax.types import Batch, Coupling, Key, Source


class CoupledBatches:
    """Batches of `data` with `x0` paired to their `x1`, computed a few blocks ahead in a thread, or several.

    `group` successive batches are coupled as one: transport over more examples than a device trains on at once, or over
    the shares of all devices. With `reuse` above 1, the pairs of as many groups form a block, which is handed out that
    many times, after the first time cut into batches in another order; the loss draws other times for them. So solving
    costs `reuse` times less, and neighbouring steps still see different pairs. The n-th batch is a function of `key`,
    the data and n alone, however fast the threads are.

    Train on them with `coupling=paired`: the pairs are final. Weights of pairs travel as `weight`.

    Args:
        data: iterator over dicts with `x1` [batch, ...], optionally `x0`, `cond` and `weight`, as NumPy arrays for
            speed; with `get_state` and `set_state`, as a `fm_jax.train.loop.DataIterator`, if these are to be used
            here. Where they end, so do these batches, the last blocks smaller.
        coupling: any coupling; `ExactOT` runs in NumPy alone and leaves the interpreter free while it solves.
        key: typed key of x0, the coupling and the order of reused pairs.
        source: of x0, in the shape of `x1`; by default the standard normal, drawn by NumPy. Not asked where the data
            bring their own `x0`.
        group: batches coupled at once.
        reuse: how often each pair is trained on. 1 gives every step new pairs; more where solving takes longer than a
            step.
        ahead: blocks prepared in advance.
        workers: threads that couple, each a block of its own; of use up to `ahead + 1` and the cores that are free. The
            data are read by one thread, in their order.

    Raises:
        ValueError: if `group`, `reuse`, `ahead` or `workers` is less than 1, or for what is no iterator, coupling, key
            or source. What goes wrong in the threads, as with batches that lack `x1`, is raised by `next`.

    Example:
        >>> from fm_jax.couplings import minibatch_ot
        >>> from fm_jax.sources import Sampled
        >>> data = iter([{"x1": np.array([[4.0], [1.0]], dtype=np.float32)}] * 2)
        >>> source = Sampled(lambda key, num: np.eye(num)[:, :1])
        >>> batches = CoupledBatches(data, minibatch_ot, jax.random.key(0), source=source)
        >>> next(batches)["x0"].tolist()
        [[1.0], [0.0]]
    """

    def __init__(
        self,
        data: Any,
        coupling: Coupling,
        key: Key,
        *,
        source: Source | None = None,
        group: int = 1,
        reuse: int = 1,
        ahead: int = 2,
        workers: int = 1,
    ):
        for name, value in (("group", group), ("reuse", reuse), ("ahead", ahead), ("workers", workers)):
            check_integer(name, value)
        check_has("data", data, ("__next__",), "an iterator of batches, such as iter(...)")
        check_coupling(coupling)
        check_key(key)
        if source is not None:
            check_source(source)
        self._data, self._coupling, self._key, self._source = data, coupling, key, source
        self._group, self._reuse, self._num_ahead = group, reuse, ahead
        self._seed = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading")
        self._workers = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="coupling")
        self._ahead: deque[Future] = deque()
        self._next_block = 0
        self._block: tuple[dict[str, Any], deque[Batch]] = ({}, deque())

    def __iter__(self) -> "CoupledBatches":
        return self

    def __next__(self) -> Batch:
        if not self._block[1]:
            self._advance()
        if not self._block[1]:
            raise StopIteration
        return self._block[1].popleft()

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values: where the data were at the start of the block, and batches taken of it."""
        if not self._block[1]:
            self._advance()
        state, batches = self._block
        return state | {"taken": state["size"] - len(batches)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave."""
        check_has("data", self._data, ("get_state", "set_state"), "an iterator whose position can be set")
        if not isinstance(state, Mapping) or not {"block", "data", "taken"} <= state.keys():
            raise ValueError(f"state must be a position, as get_state gives, got {shown(state)}.")
        for future in self._ahead:
            future.cancel()
        self._reader.submit(lambda: None).result()  # the data are read until then
        self._ahead.clear()
        self._data.set_state(state["data"])
        self._next_block = state["block"]
        self._advance()
        for _ in range(state["taken"]):
            self._block[1].popleft()

    def _advance(self) -> None:
        while len(self._ahead) < self._num_ahead + 1:
            read = self._reader.submit(self._read, self._next_block)
            self._ahead.append(self._workers.submit(self._make, self._next_block, read))
            self._next_block += 1
        self._block = self._ahead.popleft().result()

    def _read(self, number: int) -> tuple[dict[str, Any], list[Batch]]:
        state: dict[str, Any] = {"block": number}
        if hasattr(self._data, "get_state"):
            state["data"] = self._data.get_state()
        return state, self._parts()

    def _make(self, number: int, read: Future) -> tuple[dict[str, Any], deque[Batch]]:
        state, parts = read.result()
        if not parts:
            return state | {"size": 0}, deque()
        rng = np.random.default_rng([*self._seed, number])
        groups = [parts[i : i + self._group] for i in range(0, len(parts), self._group)]
        keys = _keys(self._key, np.uint32(number), len(groups))
        pairs = _joined([self._couple(_joined(g), each, rng) for g, each in zip(groups, keys, strict=True)])
        ends = np.cumsum([len(part["x1"]) for part in parts])
        batches: deque[Batch] = deque()
        for used in range(self._reuse):
            shuffled = _rows(pairs, rng.permutation(ends[-1])) if used else pairs
            batches += [_rows(shuffled, slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
        return state | {"size": len(batches)}, batches

    def _parts(self) -> list[Batch]:
        """The batches of a block, fewer where the data end, and none where they have ended."""
        parts: list[Batch] = []
        for _ in range(self._group * self._reuse):
            try:
                batch = next(self._data)
            except StopIteration:
                break
            check_holds(batch, "x1")
            check_data("x1", batch["x1"])
            if batch.get("x0") is not None:
                check_data("x0", batch["x0"])
            check_condition(batch["x1"], batch.get("cond"))
            check_per_example(batch["x1"], weight=batch.get("weight"))
            _check_alike(batch, parts[0] if parts else batch)
            parts.append(batch)
        return parts

    def _couple(self, batch: Batch, keys: tuple[Key, Key], rng: np.random.Generator) -> Batch:
        key_x0, key_coupling = keys
        x1 = batch["x1"]
        if batch.get("x0") is not None:
            x0 = batch["x0"]
        elif self._source is None:
            x0 = rng.standard_normal(x1.shape, dtype=np.float32)
        else:
            x0 = np.asarray(self._source.draw(key_x0, x1))
        pairing = self._coupling(key_coupling, x0, x1, batch.get("cond"))
        check_pairing(pairing, x1)
        batch = {**batch, "x0": np.asarray(pairing.x0)}
        if pairing.weight is not None:
            own = batch.get("weight")
            batch["weight"] = np.asarray(pairing.weight) * (1 if own is None else own)
        return batch


@partial(jax.jit, static_argnames="num")
def _keys(key: Key, number: Any, num: int) -> list[tuple[Key, Key]]:
    """Keys of the x0 and of the coupling of the groups of a block, in one dispatch: on small batches each counts."""
    block = jax.random.fold_in(key, number)
    pairs = jax.lax.map(lambda i: jax.random.split(jax.random.fold_in(block, i)), jnp.arange(num))
    return [(pairs[i, 0], pairs[i, 1]) for i in range(num)]


def _check_alike(batch: Batch, first: Batch) -> None:
    """Raises `ValueError` unless two batches can be joined: the same entries, [batch, ...] of the same events."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.shape(leaf)[:1] != batch["x1"].shape[:1]:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{name!r} of a batch must be [batch, ...], as 'x1', got {shown(leaf)}.")
    events, wanted = (jax.tree.map(lambda leaf: np.shape(leaf)[1:], each) for each in (batch, first))
    if events != wanted:
        raise ValueError(f"batches must hold the same entries of the same events, got {events} after {wanted}.")


def _joined(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *batches)


def _rows(batch: Batch, rows: Any) -> Batch:
    return jax.tree.map(lambda leaf: leaf[rows], batch)
