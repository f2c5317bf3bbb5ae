"""What every network refuses, and that parameters are made wherever they are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import VARIANTS, T, make, normal, state, variant_id

from fm_jax.models import MLP, init_params
from fm_jax.models.branched import Branched
from fm_jax.models.branches import LocalBranch
from fm_jax.models.compute import once
from fm_jax.models.control import Controlled


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_an_event_with_nothing_in_it(variant):
    net, cond = make(*variant)
    x = state(variant[0])
    for axis in range(1, x.ndim):
        empty = jax.ShapeDtypeStruct(tuple(0 if i == axis else n for i, n in enumerate(x.shape)), x.dtype)
        with pytest.raises(ValueError, match=r"x must be \[batch, \.\.\.\] with an event that is not empty, got shape"):
            jax.eval_shape(net.init, jax.random.key(0), T, empty, cond)


@pytest.mark.parametrize("module", [Branched(MLP((8,)), {"local": LocalBranch(4)}), Controlled(MLP((8,)), 4)])
def test_what_is_local_on_points_without_a_grid(module):
    with pytest.raises(ValueError, match=r"local'\] is told on a grid, and x has none, as of an MLP: got x of shape"):
        jax.eval_shape(module.init, jax.random.key(0), T, normal(0, 2, 5), {"local": normal(1, 2, 4)})


def test_parameters_within_another_program():
    """A concrete key within a trace: options of the compiler belong to the outermost program alone."""
    module, key = MLP((8,), time_features=4), jax.random.key(0)
    wanted = init_params(module, key, (3,))
    within = jax.jit(lambda: init_params(module, key, (3,)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), within, wanted)
    gradient = jax.grad(lambda scale: once(lambda s: (s * jnp.arange(3.0)).sum())(scale))(2.0)
    assert gradient == 3.0
    many = jax.vmap(lambda key: init_params(module, key, (3,)))(jax.random.split(key, 2))
    assert jax.tree.leaves(many)[0].shape[0] == 2
