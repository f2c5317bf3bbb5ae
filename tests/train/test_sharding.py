import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fm_jax.train.sharding import fsdp_mesh, fsdp_sharding

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four (simulated) devices")


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((4, 64), P(None, "fsdp")),
        ((64, 4), P("fsdp")),
        ((16, 16), P("fsdp")),  # the first of the longest
        ((3, 3, 5, 8), P(None, None, None, "fsdp")),
        ((66, 8), P(None, "fsdp")),  # 66 is not divided by 4
        ((7, 9), P()),
        ((2, 2), P()),  # fewer than 8 elements
        ((), P()),
        ((0, 8), P()),
    ],
)
def test_the_longest_axis_that_divides_is_cut(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    found = fsdp_sharding({"a": [leaf]}, fsdp_mesh(4), min_size=8)["a"][0]
    assert found.spec == spec
    assert fsdp_sharding(leaf, fsdp_mesh(1), min_size=8).spec == P()


def test_bad_input():
    with pytest.raises(ValueError, match=r"an axis 'fsdp', as from fsdp_mesh, got \('data',\)"):
        fsdp_sharding({}, jax.sharding.Mesh(np.array(jax.devices()), ("data",)))
    with pytest.raises(ValueError, match="min_size must be at least 0"):
        fsdp_sharding({}, fsdp_mesh(), min_size=-1)
    with pytest.raises(ValueError, match="mesh must be a mesh"):
        fsdp_sharding({}, None)
    for shards in (0, 2.5, "2"):
        with pytest.raises(ValueError, match="shards must be"):
            fsdp_mesh(shards)
