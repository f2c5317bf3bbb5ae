import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax.train.state import create_state
from fm_jax.train.step import make_step

X1 = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
PARAMS = {"w": np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)}


def quadratic(params, key, batch):
    """Deterministic; the mean over examples, so that micro-batches average to the whole."""
    error = batch["x1"] @ params["w"] - batch["x1"]
    return jnp.mean(error**2), {"mean_error": jnp.mean(error)}


def jitted(loss_fn, optimizer, **options):
    return jax.jit(make_step(loss_fn, optimizer, axis_name=None, **options), donate_argnums=0)


def test_one_sgd_step_closed_form():
    optimizer = optax.sgd(0.1)
    state, metrics = jitted(quadratic, optimizer)(
        create_state(PARAMS, optimizer, (0.99,)), jax.random.key(0), {"x1": X1}
    )
    error = X1 @ PARAMS["w"] - X1
    grad = 2 * X1.T @ error / error.size
    new = PARAMS["w"] - 0.1 * grad
    np.testing.assert_allclose(state.params["w"], new, rtol=1e-5)
    # The first decay of the warm-up is 1 / 10.
    np.testing.assert_allclose(state.ema["0.99"]["w"], 0.1 * PARAMS["w"] + 0.9 * new, rtol=1e-5)
    expected = {
        "loss": np.mean(error**2),
        "mean_error": np.mean(error),
        "grad_norm": np.linalg.norm(grad),
        "update_norm": 0.1 * np.linalg.norm(grad),
        "param_norm": np.linalg.norm(new),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert state.step.dtype == jnp.int32
    assert int(state.step) == 1


def test_grad_norm_is_measured_before_clipping():
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    _, metrics = jitted(quadratic, optimizer)(create_state(PARAMS, optimizer), jax.random.key(0), {"x1": X1})
    assert metrics["grad_norm"] > 0.1
    np.testing.assert_allclose(metrics["update_norm"], 1e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_accumulation_equals_the_whole_batch(backend, monkeypatch):
    # Off CPU the loop over micro-batches is rolled; either form runs here.
    optimizer = optax.sgd(0.1)
    whole = jitted(quadratic, optimizer)(create_state(PARAMS, optimizer), jax.random.key(0), {"x1": X1})
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    parts = jitted(quadratic, optimizer, accumulate=4)
    state = create_state(PARAMS, optimizer)
    text = parts.lower(state, jax.random.key(0), {"x1": X1}).as_text()
    assert ("stablehlo.while" in text) == (backend == "gpu")
    parts = parts(state, jax.random.key(0), {"x1": X1})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, parts)


def noise_only(params, key, batch):
    return jnp.sum(params * jax.random.normal(key, ())), {}


def test_keys_differ_between_steps_and_micro_batches_and_are_folded_from_the_step():
    optimizer, key = optax.sgd(0.0), jax.random.key(5)
    step = jitted(noise_only, optimizer)
    state = create_state(jnp.ones(()), optimizer)
    for i in range(3):
        state, metrics = step(state, key, {"x1": X1})
        expected = jax.random.normal(jax.random.fold_in(key, i), ())
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    _, metrics = jitted(noise_only, optimizer, accumulate=2)(create_state(jnp.ones(()), optimizer), key, {"x1": X1})
    micro = [jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 0), i), ()) for i in range(2)]
    np.testing.assert_allclose(metrics["loss"], np.mean(micro), rtol=1e-6)


def test_target_parameters_are_the_average():
    def distance(params, key, batch, *, target_params=None):
        return jnp.sum((params - target_params) ** 2), {}

    optimizer = optax.sgd(0.25)
    state = create_state(jnp.float32(3.0), optimizer, (0.9,))._replace(ema={"0.9": jnp.float32(1.0)})
    state, _ = jitted(distance, optimizer, target_ema=0.9)(state, jax.random.key(0), {"x1": X1})
    assert float(state.params) == 2.0  # 3 - 0.25 * 2 * (3 - 1)


def test_traced_once():
    traces = []

    def counted(params, key, batch):
        traces.append(1)
        return quadratic(params, key, batch)

    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 10))
    step = jitted(counted, optimizer)
    state = create_state(PARAMS, optimizer, (0.9,))
    for _ in range(4):
        state, _ = step(state, jax.random.key(0), {"x1": X1})
    assert len(traces) == 1


def test_bad_input():
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        make_step(quadratic, optimizer, accumulate=0)
    state, key = create_state(PARAMS, optimizer, (0.9,)), jax.random.key(0)
    with pytest.raises(ValueError, match=r"accumulate=3 must divide the batch axis of 'x1', .* shape \(8, 3\)"):
        make_step(quadratic, optimizer, accumulate=3, axis_name=None)(state, key, {"x1": X1})
    with pytest.raises(ValueError, match=r"target_ema=0.99 must be one of the state's averages, \['0.9'\]"):
        make_step(quadratic, optimizer, target_ema=0.99, axis_name=None)(state, key, {"x1": X1})


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (
            lambda params, key, batch: params["w"].sum(),
            r"^loss_fn must return \(loss, metrics\), a scalar and a dict, got",
        ),
        (lambda params, key, batch: None, r"^loss_fn must return \(loss, metrics\)"),
        (lambda params, key, batch: (params["w"].sum(), [1]), r"^loss_fn must return \(loss, metrics\)"),
        (lambda params, key, batch: (params["w"][0], {}), "^the loss must be a floating-point scalar, got "),
        (lambda params, key, batch: (1 + 0 * params["w"].sum().astype(int), {}), "^the loss must be a floating-point"),
        (lambda params, key, batch: (params["w"].sum() + 1j, {}), "^the loss must be a floating-point scalar"),
        (lambda params, key: (params["w"].sum(), {}), r"^loss_fn must be a function .* got one with the arguments"),
    ],
)
def test_what_is_no_loss(loss_fn, message):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        jitted(loss_fn, optimizer)(create_state(PARAMS, optimizer), jax.random.key(0), {"x1": X1})


@pytest.mark.parametrize(("made", "used"), [(optax.adam, optax.sgd), (optax.sgd, optax.adam)])
def test_a_state_of_another_optimizer(made, used):
    with pytest.raises(ValueError, match=r"^state must come from create_state with the optimizer of the step"):
        jitted(quadratic, used(0.1))(create_state(PARAMS, made(0.1)), jax.random.key(0), {"x1": X1})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (None, "^params must be a pytree of arrays, got None"),
        ({}, "^params must be a pytree of arrays, got {}"),
        ({"w": [1.0]}, r"^params\['w'\]\[0\] must be an array"),
        ({"w": np.ones(2, int)}, r"^params\['w'\] must be floating point, to have a gradient, got int64"),
        ({"w": np.ones(2, bool)}, r"^params\['w'\] must be floating point"),
    ],
)
def test_what_are_no_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        create_state(params, optax.sgd(0.1))
