"""Two-dimensional data, drawn afresh for every batch."""

from collections.abc import Iterator
from typing import Any, Literal

import jax

from fm_jax.data.toy import make_toy
from fm_jax.types import Array, Key, Source

Toy = Literal["eight_gaussians", "moons", "checkerboard", "s_curve", "circles", "pinwheel"]


class Batches:
    """Fresh pairs without end: the n-th batch is a function of the key and n."""

    def __init__(self, key: Key, source: Source, toy: Toy, batch_size: int):
        self._key = key
        self._position = 0

        def draw(key: Key) -> dict[str, Array]:
            key_x0, key_x1 = jax.random.split(key)
            x1 = make_toy(toy)(key_x1, batch_size)
            return {"x0": source.draw(key_x0, x1), "x1": x1}

        self._draw = jax.jit(draw)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self

    def __next__(self) -> dict[str, Array]:
        self._position += 1
        return self._draw(jax.random.fold_in(self._key, self._position))

    def get_state(self) -> dict[str, Any]:
        """The position as JSON values."""
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave."""
        self._position = state["position"]
