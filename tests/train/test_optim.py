import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax.models import stack_layers
from fm_jax.train.optim import make_optimizer, make_schedule


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_closed_form(decay, warmup):
    schedule = make_schedule(0.2, total_steps=50, warmup_steps=warmup, decay=decay)
    for step in [0, 1, 9, 10, 11, 30, 49, 50, 60]:
        s = min(max((step - warmup) / (50 - warmup), 0.0), 1.0)
        after = {"constant": 1.0, "cosine": (1 + np.cos(np.pi * s)) / 2, "linear": 1 - s}[decay]
        expected = 0.2 * (step / warmup if step < warmup else after)
        np.testing.assert_allclose(float(schedule(step)), expected, atol=1e-7, err_msg=f"step {step}")


def adam(grads, params, rate, b1, b2, weight_decay):
    """Loshchilov and Hutter, Algorithm 2, with decay only on rank 2."""
    m = v = np.zeros_like(params)
    for i, g in enumerate(grads):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1 ** (i + 1)), v / (1 - b2 ** (i + 1))
        decay = weight_decay if params.ndim > 1 else 0.0
        params = params - rate(i) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * params)
    return params


def apply(optimizer, grads, params):
    @jax.jit
    def update(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for g in grads:
        params, state = update(params, state, g)
    return params


def test_adamw_closed_form_with_schedule_and_decay_of_matrices_only():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(2, 3)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(5)]
    optimizer = make_optimizer(
        0.1, total_steps=5, warmup_steps=2, decay="linear", clip_norm=None, weight_decay=0.3, b1=0.8, b2=0.95
    )
    found = apply(optimizer, grads, jax.tree.map(jnp.asarray, params))
    rate = [0.0, 0.05, 0.1, 0.1 * 2 / 3, 0.1 / 3].__getitem__
    for name in params:
        expected = adam([g[name] for g in grads], params[name], rate, 0.8, 0.95, 0.3)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)


def test_clipping_scales_by_the_global_norm():
    # One Adam step does not see the scale of its gradient, two of different scale do.
    params = {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}
    small, large = (
        {"a": np.array([0.3, 0.0]), "b": np.array([0.4])},
        {"a": np.array([30.0, 0.0]), "b": np.array([40.0])},
    )
    small, large = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g) for g in (small, large))
    optimizer = make_optimizer(0.1, total_steps=5, clip_norm=1.0)
    found = apply(optimizer, [small, large], params)
    for name in params:
        grads = [np.asarray(small[name]), np.asarray(large[name]) / 50.0]
        np.testing.assert_allclose(found[name], adam(grads, params[name], lambda i: 0.1, 0.9, 0.999, 0.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"decay": "step"}, "decay must be one of 'constant', 'cosine', 'linear', got 'step'"),
        ({"warmup_steps": 10}, "warmup_steps must be less than total_steps=10, got 10"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive and finite, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative, got -1.0"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**{"learning_rate": 0.1, "total_steps": 10, **options})


@pytest.mark.slow
def test_stacked_blocks_are_decayed_as_single_ones_are():
    """Biases are not decayed, nor are stacked ones, which have two axes."""
    blocks = {f"block_{i}": {"kernel": jnp.full((2, 3), 1.0 + i), "bias": jnp.full(3, 2.0 + i)} for i in range(2)}
    params = {**blocks, "out": {"bias": jnp.ones(2)}}
    optimizer = make_optimizer(0.1, total_steps=5, weight_decay=0.5, clip_norm=None)

    def stepped(params):
        grads = jax.tree.map(lambda x: 0.1 * x, params)
        return optax.apply_updates(params, optimizer.update(grads, optimizer.init(params), params)[0])

    found, wanted = stepped(stack_layers(params)), stack_layers(stepped(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
