"""Two-dimensional data, drawn afresh for every batch."""

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer
from fm_jax.data.toy import make_toy
from fm_jax.types import Array, Key, Source

Toy = Literal["eight_gaussians", "moons", "checkerboard", "s_curve", "circles", "pinwheel"]


class Batches:
    """Fresh pairs without end, drawn on the device.

    A step is `batch_size * process_count` pairs, a function of the key and the number of the step; process p has the
    rows from `p * batch_size` of it. So neither the pairs of a step nor a position depends on the number of processes.

    Args:
        key: typed key of all pairs, the same on all processes.
        source: of x0.
        toy: of x1.
        batch_size: pairs in a batch of *this* process, the same on all of them.
        process_index: which process this is; by default `jax.process_index()`.
        process_count: how many there are; by default `jax.process_count()`.
    """

    def __init__(
        self,
        key: Key,
        source: Source,
        toy: Toy,
        batch_size: int,
        *,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        check_integer("batch_size", batch_size)
        check_integer("process_count", count)
        check_integer("process_index", index, least=0, most=count - 1)
        self._key = key
        self._position = 0

        def draw(key: Key, position: Array) -> dict[str, Array]:
            key_x0, key_x1 = jax.random.split(jax.random.fold_in(key, position))
            x1 = make_toy(toy)(key_x1, batch_size * count)
            return {"x0": source.draw(key_x0, x1), "x1": x1}

        def draw_many(key: Key, position: Array, num: int) -> dict[str, Array]:
            # Not lax.map, in which XLA rounds some products and sums as one, and which takes seven times as long.
            return jax.vmap(draw, in_axes=(None, 0))(key, position + jnp.arange(num, dtype=jnp.uint32))

        def share(pairs: dict[str, Array]) -> dict[str, Array]:
            return {name: x[..., index * batch_size : (index + 1) * batch_size, :] for name, x in pairs.items()}

        self._draw, self._draw_many = jax.jit(draw), jax.jit(draw_many, static_argnames="num")
        # A program of its own, or XLA rounds otherwise in the rows of several processes than in all.
        self._share = jax.jit(share) if count > 1 else lambda pairs: pairs

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self

    def __next__(self) -> dict[str, Array]:
        self._position += 1
        return self._share(self._draw(self._key, np.uint32(self._position)))

    def take(self, num: int) -> dict[str, Array]:
        """The next `num` batches, [num, batch, ...], with the bits of as many calls of `next`; each `num` compiles."""
        check_integer("num", num)
        first = np.uint32(self._position + 1)
        self._position += num
        return self._share(self._draw_many(self._key, first, num=num))

    def get_state(self) -> dict[str, Any]:
        """The number of batches taken as JSON values."""
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, on any number of processes."""
        self._position = state["position"]
