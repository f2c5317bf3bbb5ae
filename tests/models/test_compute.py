import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import Compute, layers


def test_one_dtype_is_one_value_however_it_is_spelt():
    values = [Compute(dtype) for dtype in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), np.dtype(jnp.bfloat16))]
    assert len(set(values)) == 1
    assert values[0] != Compute()
    assert Compute() == Compute(jnp.float32, False, None)
    assert repr(Compute()) == "Compute(dtype=dtype('float32'), remat=False, attention=None)"


@pytest.mark.parametrize("attention", [None, "xla", "cudnn"])
def test_attention_reaches_jax(attention, monkeypatch):
    """And so does the dtype."""
    seen = []

    def attend(query, key, value, *, implementation):
        seen.append((query.dtype, implementation))
        return value

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    module, x = layers.SelfAttention(2, compute=Compute("bfloat16", attention=attention)), jnp.ones((1, 3, 4))
    jax.eval_shape(module.init, jax.random.key(0), x)
    assert seen == [(jnp.bfloat16, attention)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": jnp.float16}, "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"dtype": "float42"}, "dtype must be one of 'float32', 'bfloat16', got 'float42'"),
        ({"dtype": None}, "dtype must be one of 'float32', 'bfloat16', got 'float64'"),
        ({"remat": "cudnn"}, "remat must be True or False, got 'cudnn'"),
        ({"attention": "flash"}, "attention must be one of 'xla', 'cudnn', got 'flash'"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Compute(**options)
