"""What every coupling keeps to."""

import jax
import numpy as np
import pytest
from contracts import COUPLINGS, OTT_COUPLINGS

ALL = COUPLINGS | OTT_COUPLINGS


@pytest.fixture(params=ALL)
def coupling(request):
    if request.param in OTT_COUPLINGS:
        pytest.importorskip("ott", reason="needs the extra fm_jax[ot]")
    return ALL[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True])
def test_a_permutation_that_leaves_data_in_place(coupling, labelled):
    """Both marginals are kept: nothing dropped, nothing repeated, and the indices say who went where."""
    key_x0, key_x1, key_cond, key = jax.random.split(jax.random.key(0), 4)
    x0, x1 = (jax.random.normal(k, (32, 3, 2)) for k in (key_x0, key_x1))
    cond = jax.random.randint(key_cond, (32,), 0, 3) if labelled else None
    pairing = jax.jit(coupling)(key, x0, x1, cond)
    np.testing.assert_array_equal(np.sort(pairing.index0), np.arange(32))
    np.testing.assert_array_equal(pairing.x0, x0[pairing.index0])
    np.testing.assert_array_equal(pairing.x1, x1)
    if labelled:
        np.testing.assert_array_equal(pairing.cond, cond)
    if pairing.weight is not None:
        assert pairing.weight.shape == (32,)
        assert np.isfinite(pairing.weight).all()
        assert (np.asarray(pairing.weight) >= 0).all()
