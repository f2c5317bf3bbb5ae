"""Couplings over the batches of all devices."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from fm_jax.checks import check_coupling, check_key, shown
from fm_jax.couplings.pairing import check_batch
from fm_jax.types import Array, Cond, Coupling, Examples, Key, Pairing


@dataclass(frozen=True)
class Gathered:
    """A coupling of the union of all devices' batches, of which every device gets its share back.

    The larger a batch, the nearer its pairing comes to transport between the distributions (Pooladian et al. 2023,
    arXiv:2304.14772), so a batch that is split over devices should be coupled whole. The devices exchange their batches
    and couple the union on the first of them; each keeps `x1` and `cond` in place, and its `x0` comes from anywhere.

    It runs where the axis has a name: in a step of `make_step` under `pmap_step` or `shard_map_step`, or anywhere
    under `jax.shard_map`.

    Attributes:
        coupling: of the union. Its weights have mean 1 over the union, not on each device.
        axis_name: of the devices' axis.

    Example:
        >>> from fm_jax.couplings import ExactOT
        >>> x0, x1 = jnp.array([[[0.0]], [[5.0]]]), jnp.array([[[4.0]], [[1.0]]])  # two "devices" with one example each
        >>> jax.vmap(lambda x0, x1: Gathered(ExactOT())(None, x0, x1).index0, axis_name="data")(x0, x1)
        Array([[1], [0]], dtype=int32)
    """

    coupling: Coupling
    axis_name: str = "data"

    def __post_init__(self) -> None:
        check_coupling(self.coupling)
        if not isinstance(self.axis_name, str):
            raise ValueError(f"axis_name must be a string, got {shown(self.axis_name)}.")

    def __call__(self, key: Key | None, x0: Examples, x1: Examples, cond: Cond = None) -> Pairing:
        """Pairs a device's batch with the source of all.

        Args:
            key: the first device's is used, by all.
            x0: source.
            x1: data.
            cond: conditioning [batch, ...] or `None`.

        Returns:
            `Pairing` of this batch, where `index0` counts through the devices' batches in their order.

        Raises:
            ValueError: if there is no such axis, or `coupling` refuses the union.
        """
        x0, x1 = check_batch(x0, x1)
        try:
            device = lax.axis_index(self.axis_name)
        except NameError:
            raise ValueError(
                f"Gathered needs a device axis named {self.axis_name!r}: run it under pmap_step, shard_map_step or "
                "jax.shard_map."
            ) from None
        gather = lambda tree: jax.tree.map(lambda x: lax.all_gather(x, self.axis_name, tiled=True), tree)  # noqa: E731
        all0, all1, all_cond = gather((x0, x1, cond))
        first_key = None
        if key is not None:
            check_key(key)
            data = lax.all_gather(jax.random.key_data(key), self.axis_name)[0]
            first_key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
        # To shard_map's types a value varies over devices or does not, and two branches must agree in that.
        varying = lambda tree: jax.tree.map(lambda x: x + (0 * device).astype(x.dtype), tree)  # noqa: E731

        def solve() -> tuple[Array, Array | None]:
            pairing = self.coupling(first_key, all0, all1, all_cond)
            return varying((pairing.index0, pairing.weight))

        def wait() -> tuple[Array, Array | None]:
            return varying(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(solve)))

        # Solved once, on the first device: a host has one processor for all of its devices.
        pairing = lax.psum(lax.cond(device == 0, solve, wait), self.axis_name)
        batch = len(x1)
        index0, weight = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, device * batch, batch), pairing)
        return Pairing(all0[index0], x1, cond, index0, weight)
