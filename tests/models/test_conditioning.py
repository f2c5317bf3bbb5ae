"""The border: what a published network answers in its own time and sign is our velocity, our noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.models import MLP, forward_flops, init_params
from fm_jax.models.conditioning import DDPM, OURS, RECTIFIED, REPA, SIT, Border, Conditions, check_border
from fm_jax.models.mmdit import make_mmdit
from fm_jax.parameterization import convert
from fm_jax.schedules import DDPM as Table
from fm_jax.schedules import Linear, coefficients

MEAN, DEVIATION = 0.7, 0.4
T = np.linspace(0.05, 0.95, 7)
X = np.linspace(-2, 2, 7)


def answers(sigma, x):
    """Expected noise and data of one Gaussian at x = (1 - sigma) data + sigma noise, in float64."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    centred = x - (1 - sigma) * MEAN
    return sigma * centred / variance, MEAN + (1 - sigma) * DEVIATION**2 * centred / variance


def minus_u(scale):
    """Stable Diffusion 3, FLUX, Wan, REPA: told scale sigma, it answers noise minus data."""

    def network(s, x):
        noise, data = answers(s / scale, x)
        return noise - data

    return network


def u(scale):
    """SiT, LightningDiT, Z-Image: told scale t, it answers data minus noise."""

    def network(s, x):
        noise, data = answers(1 - s / scale, x)
        return data - noise

    return network


@pytest.mark.slow
@pytest.mark.parametrize(
    ("border", "network"),
    [(RECTIFIED, minus_u(1000.0)), (SIT, u(1.0)), (REPA, minus_u(1.0)), (OURS, u(1000.0))],
    ids=["SD3, FLUX, Wan", "SiT", "REPA", "Z-Image"],
)
def test_a_flow_answers_our_velocity(border, network, x64):
    ours = border.output(network(border.time(jnp.asarray(T)), X))
    oracle = oracles.velocity(oracles.gaussian_mixture([[MEAN]], [DEVIATION], [1.0]), Linear())
    np.testing.assert_allclose(ours, oracle(jnp.asarray(T), jnp.asarray(X)[:, None])[:, 0], rtol=1e-6)


def test_a_diffusion_counts_its_steps_from_zero(x64):
    # n = 0, ..., 999 in the network, whose entry of the table is the n-th; our own count begins at 1.
    n = np.array([0, 1, 500, 999])
    t = 1 - (n + 1) / 1000
    np.testing.assert_allclose(DDPM.time(jnp.asarray(t)), n, atol=1e-9)
    level = coefficients(Table(), jnp.asarray(t))
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(level.alpha**2, np.cumprod(1 - betas)[n], rtol=1e-9)


@pytest.mark.slow
def test_a_diffusion_answers_our_noise(x64):
    n = np.array([10, 300, 700, 990])
    alpha2 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

    def network(step, x):
        a, s = np.sqrt(alpha2[np.round(step).astype(int)]), np.sqrt(1 - alpha2[np.round(step).astype(int)])
        return s * (x - a * MEAN) / (a**2 * DEVIATION**2 + s**2)

    t, x = jnp.asarray(1 - (n + 1) / 1000), jnp.asarray(X[:4])[:, None]
    noise = DDPM.output(network(np.asarray(DDPM.time(t)), np.asarray(x)[:, 0]))[:, None]
    oracle = oracles.velocity(oracles.gaussian_mixture([[MEAN]], [DEVIATION], [1.0]), Table())
    np.testing.assert_allclose(convert("noise", jnp.asarray(noise), t, x, Table()).velocity, oracle(t, x), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale": 0.0}, "scale must be"),
        ({"reverse": 1}, "reverse must be"),
        ({"offset": np.nan}, "offset must be"),
        ({"sign": 0.5}, "sign must be 1 or -1, got 0.5."),
    ],
)
def test_borders_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Border(**options)


def test_what_is_no_border():
    with pytest.raises(ValueError, match="border must be a Border, such as RECTIFIED, got 'SIT'"):
        check_border("SIT")


def test_time_is_float32_or_better_whatever_comes():
    assert RECTIFIED.time(jnp.bfloat16(0.25)).dtype == jnp.float32


@pytest.mark.slow
def test_parameters_and_operations_of_a_network_that_needs_a_condition():
    module = make_mmdit("tiny")
    cond = Conditions(vector=jnp.zeros((1, module.vector_dim)), tokens=jnp.zeros((1, 3, module.token_dim)))
    params = init_params(module, jax.random.key(0), (8, 8, module.channels), cond)
    shapes = jax.eval_shape(lambda: cond)
    one, two = (forward_flops(module, (side, 8, module.channels), shapes) for side in (8, 16))
    assert jax.tree.leaves(params)
    assert 0 < one < two
    plain = MLP(features=(8,))
    assert forward_flops(plain, (2,)) == forward_flops(plain, (2,), None)
