"""The same samples as the schedulers of `diffusers`, on the same closed-form denoiser, grid and noise.

Only their public functions are called. Their tables are float32, which leaves the comparisons five to six digits. See
"Parity with PyTorch peers" in CONTRIBUTING.md for the environment.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.samplers import DDIM, DPMSolverPlusPlus, RungeKutta, UniPC, ddim, dpm_solver, sample
from fm_jax.samplers.levels import phi
from fm_jax.schedules import DDPM, EDM, Linear

pytestmark = pytest.mark.parity

SINGLE = 2e-5
"""Absolute tolerance for states of order 1, where the peer's tables and states are float32."""


def peer(name):
    """A module of a peer; skips only if the package is absent, so that a module that has moved is an error."""
    for package in ("torch", name.split(".")[0]):
        reason = f"{package} is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md"
        pytest.importorskip(package, reason=reason)
    return importlib.import_module(name)


def tensor(x):
    return peer("torch").from_numpy(np.array(x))


def mixture():
    return oracles.gaussian_mixture([[-1.0, 0.0], [1.0, 0.5]], [0.6, 0.8], [0.3, 0.7])


def start(scale=1.0):
    return scale * np.random.default_rng(0).normal(size=(6, 2))


def noises(count):
    return np.random.default_rng(1).normal(size=(count, 6, 2))


def ddpm_time(step):
    """Our time of entry `step`, from 0, of the peer's table."""
    return 1 - (np.asarray(step, dtype=float) + 1) / 1000


def table_grid(theirs):
    """Our times of the peer's entries of its table, and at last the data."""
    return np.append(ddpm_time(theirs.timesteps.numpy()), 1.0)


def sigma_grid(theirs):
    """Our times of the peer's sigma / alpha, which near the data has three digits of the table's."""
    sigmas = theirs.sigmas.numpy().astype(float)
    grid = DDPM().t_from_log_snr(-2 * jnp.log(jnp.asarray(sigmas)))
    return np.where(sigmas == 0, 1.0, grid)


def roll_out(theirs, schedule, kind, x, times, **options):
    """All states of the peer, which is told what a perfect network of that kind says at our times; float64 states."""
    predict = jax.jit(lambda t, x: getattr(oracles.prediction(mixture(), schedule, t, x), kind))
    states = [x]
    for i, (step, t) in enumerate(zip(theirs.timesteps, times, strict=False)):
        output = tensor(predict(jnp.asarray(t), jnp.asarray(states[-1])))
        extra = {name: value(i) for name, value in options.items()}
        states.append(theirs.step(output, step, tensor(states[-1]), **extra).prev_sample.numpy())
    return np.stack(states)


def assert_same_states(ours, theirs, atol=SINGLE):
    assert np.isfinite(theirs).all(), "a comparison with inf or nan proves nothing"
    assert np.abs(theirs[-1] - theirs[0]).max() > 0.3, "a comparison of states that stay proves nothing"
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def ours(sampler, x, grid):
    v, key = oracles.velocity(mixture(), sampler.schedule), jax.random.key(0) if sampler.stochastic else None
    return sample(v, jnp.asarray(x), sampler, times=grid, key=key, trajectory=True).trajectory


def share_noise(monkeypatch, module, draws):
    """Our sampler takes the noise of step i from an array, as the peer does."""
    monkeypatch.setattr(module, "step_noise", lambda key, i, x: jnp.asarray(draws)[i])


@pytest.mark.parametrize(("eta", "num_steps"), [(0.0, 20), (0.5, 20), (1.0, 20), (1.0, 200)])
def test_ddim(eta, num_steps, x64, monkeypatch):
    theirs, draws = peer("diffusers").DDIMScheduler(clip_sample=False), noises(num_steps)
    theirs.set_timesteps(num_steps)
    share_noise(monkeypatch, ddim, draws)
    # Its last step ends at the first entry of the table itself, or at the data: here at the data.
    grid = table_grid(theirs)
    expected = roll_out(
        theirs, DDPM(), "noise", start(), grid, eta=lambda i: eta, variance_noise=lambda i: tensor(draws[i])
    )
    assert_same_states(ours(DDIM(DDPM(), eta), start(), grid), expected)


def test_ddpm(x64, monkeypatch):
    torch = peer("torch")
    theirs = peer("diffusers").DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    theirs.set_timesteps(50)
    draws = np.stack(
        [torch.randn(6, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64).numpy() for i in range(50)]
    )
    share_noise(monkeypatch, ddim, draws)
    grid = table_grid(theirs)
    expected = roll_out(theirs, DDPM(), "noise", start(), grid, generator=lambda i: torch.Generator().manual_seed(i))
    assert_same_states(ours(DDIM(DDPM(), eta=1.0), start(), grid), expected)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("order", "num_steps"), [(2, 8), (2, 20), (3, 20)])
def test_dpm_solver_multistep(order, num_steps, final, x64, monkeypatch):
    # Theirs has phi_3 where order 3 takes 2 phi_3, and so order 2: see tests/samplers/test_dpm_solver.py.
    monkeypatch.setattr(dpm_solver, "phi", lambda k, z: phi(k, z) / (2 if k == 3 else 1))
    theirs = peer("diffusers").DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type=final,
        lower_order_final=False,
    )
    theirs.set_timesteps(num_steps)
    grid = sigma_grid(theirs)
    expected = roll_out(theirs, DDPM(), "noise", start(), grid)
    assert_same_states(ours(DPMSolverPlusPlus(DDPM(), order), start(), grid), expected)


def test_dpm_solver_multistep_sde(x64, monkeypatch):
    theirs = peer("diffusers").DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="sde-dpmsolver++", solver_type="midpoint"
    )
    theirs.set_timesteps(20)
    draws = noises(20).astype("float32")
    share_noise(monkeypatch, dpm_solver, draws)
    grid = sigma_grid(theirs)
    expected = roll_out(theirs, DDPM(), "noise", start(), grid, variance_noise=lambda i: tensor(draws[i]))
    assert_same_states(ours(DPMSolverPlusPlus(DDPM(), sde=True), start(), grid), expected)


@pytest.mark.parametrize(("final", "lower"), [("zero", True), ("sigma_min", False)])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant, final, lower, x64):
    theirs = peer("diffusers").UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, final_sigmas_type=final, lower_order_final=lower
    )
    theirs.set_timesteps(12)
    grid = sigma_grid(theirs)
    expected = roll_out(theirs, DDPM(), "noise", start(), grid)
    states = ours(UniPC(DDPM(), order, variant), start(), grid)
    if lower and order == 3:  # they take the last step but one with order 2
        states, expected = states[:-2], expected[:-2]
    elif lower and variant == "bh1":  # to sigma = 0 they have B(h) = inf times nothing, and end with nan
        states, expected = states[:-1], expected[:-1]
    assert_same_states(states, expected)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_euler_and_heun_in_sigma(name, x64):
    theirs = getattr(peer("diffusers"), name)()
    theirs.set_timesteps(15)
    sigmas = theirs.sigmas.numpy().astype(float)
    evaluated = sigmas[:-1]
    schedule = EDM(sigma_max=200.0)  # Euler's begins at 157
    # Its network sees a scaled input; the noise that it predicts is that of the unscaled one at this sigma.
    expected = roll_out(theirs, schedule, "noise", start(sigmas[0]), 1 - evaluated / 200)
    method = "euler"
    if name.startswith("Heun"):  # two calls a step, and the last one, to sigma = 0, by Euler's method
        method, expected, sigmas = "heun", expected[:-1:2], sigmas[:-1][[0, *range(1, len(sigmas) - 1, 2)]]
    grid = 1 - sigmas / 200
    v = oracles.velocity(mixture(), schedule)
    states = sample(v, jnp.asarray(start(sigmas[0])), RungeKutta(method), times=grid, trajectory=True).trajectory
    assert len(states) == len(expected)
    assert_same_states(states, expected, atol=SINGLE * sigmas[0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift, x64):
    theirs = peer("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(15)
    # Its time is sigma and runs from noise to data: its velocity has the other sign.
    sigmas = theirs.sigmas.numpy().astype(float)
    v = oracles.velocity(mixture(), Linear())
    x, expected = start(), [start()]
    for step, sigma in zip(theirs.timesteps, sigmas, strict=False):
        x = theirs.step(tensor(-v(jnp.asarray(1 - sigma), jnp.asarray(x))), step, tensor(x)).prev_sample.numpy()
        expected.append(x)
    for states in (
        sample(v, jnp.asarray(start()), RungeKutta("euler"), times=1 - sigmas, trajectory=True).trajectory,
        ours(DDIM(Linear()), start(), 1 - sigmas),
    ):
        assert_same_states(states, np.stack(expected))
