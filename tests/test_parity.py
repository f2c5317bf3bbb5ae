"""The same numbers as the PyTorch peers `flow_matching`, `torchcfm` and `diffusers`, on the same arrays.

Only their public functions are called. See "Parity with PyTorch peers" in CONTRIBUTING.md for the environment.
"""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import schedules
from fm_jax.couplings import minibatch_ot
from fm_jax.likelihood import encode_and_log_prob
from fm_jax.metrics import wasserstein
from fm_jax.models import make_unet
from fm_jax.parameterization import convert, reschedule
from fm_jax.paths import AffinePath, BrownianBridge, ConstantNoise, StochasticInterpolant
from fm_jax.samplers import Adaptive, RungeKutta, Tableau, sample
from fm_jax.schedules import coefficients, log_snr

pytestmark = pytest.mark.parity

DOUBLE = 1e-12
"""Relative tolerance in float64, where both sides use well-conditioned formulas."""
T = np.linspace(0.02, 0.98, 25)
SHAPE = (5, 4, 3, 2)

# Our schedule, and the name and arguments of the peer's.
SCHEDULERS = [
    (schedules.Linear(), "CondOTScheduler", {}),
    (schedules.Cosine(), "CosineScheduler", {}),
    (schedules.Polynomial(2.0), "PolynomialConvexScheduler", {"n": 2.0}),
    (schedules.Polynomial(0.5), "PolynomialConvexScheduler", {"n": 0.5}),
    (schedules.VP(), "VPScheduler", {}),
    (schedules.VP(beta_min=0.5, beta_max=12.0), "VPScheduler", {"beta_min": 0.5, "beta_max": 12.0}),
    (schedules.LinearVP(), "LinearVPScheduler", {}),
]
every_scheduler = pytest.mark.parametrize(("schedule", "name", "options"), SCHEDULERS, ids=lambda p: str(p))


def peer(name: str) -> ModuleType:
    """A module of a peer; skips only if the package is absent, so that a module that has moved is an error."""
    for package in ("torch", name.split(".")[0]):
        reason = f"{package} is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md"
        pytest.importorskip(package, reason=reason)
    return importlib.import_module(name)


def scheduler(name: str, options: dict[str, float]):
    return getattr(peer("flow_matching.path.scheduler"), name)(**options)


def tensor(x):
    return peer("torch").from_numpy(np.array(x))


def arrays(count: int, shape=SHAPE, dtype="float64") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype) for _ in range(count)]


def batch_times(dtype="float64") -> np.ndarray:
    return np.array([0.1, 0.35, 0.5, 0.77, 0.95], dtype=dtype)


def field(t, x):
    """A velocity of operators only, the same in both frameworks; not linear, not autonomous, and of bounded slope."""
    return (1 - 2 * t) * x / (1 + x**2) + t**2


def assert_close(ours, theirs, rtol=DOUBLE, atol=0.0, what=""):
    theirs = np.asarray(theirs)
    assert np.isfinite(theirs).all(), "a comparison with inf or nan proves nothing"
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=what)


# facebookresearch/flow_matching


@every_scheduler
def test_coefficients(schedule, name, options, x64):
    theirs, ours = scheduler(name, options)(tensor(T)), coefficients(schedule, jnp.asarray(T))
    for field_name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        value = getattr(theirs, f"{field_name}_t").numpy()
        # JAX differentiates expm1 as expm1 + 1: near t = 0, where exp(-T) is small, VP's d_sigma has twelve digits.
        assert_close(getattr(ours, field_name), value, rtol=5e-12, what=field_name)


@every_scheduler
def test_coefficients_at_the_ends_of_the_domain(schedule, name, options, x64):
    # The peer does not guard the infinite slope of sigma at t = 1 (VP, LinearVP) and of alpha at t = 0 (n < 1); here
    # the domain stops 1e-5 before. The peer's sqrt(1 - exp(-T)) loses up to six digits there, hence the tolerance.
    t = np.array(schedule.domain)
    theirs, ours = scheduler(name, options)(tensor(t)), coefficients(schedule, jnp.asarray(t))
    for field_name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        value = getattr(theirs, f"{field_name}_t").numpy()
        assert_close(getattr(ours, field_name), value, rtol=1e-9, atol=1e-15, what=field_name)


@every_scheduler
def test_snr_inverse(schedule, name, options, x64):
    ours_snr = log_snr(schedule, jnp.asarray(T))
    theirs = scheduler(name, options).snr_inverse(tensor(np.exp(ours_snr / 2)))
    assert_close(schedule.t_from_log_snr(ours_snr), theirs.numpy())
    assert_close(theirs.numpy(), T)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", DOUBLE), ("float32", 3e-6)])
@every_scheduler
def test_affine_path(schedule, name, options, dtype, rtol, x64):
    path = peer("flow_matching.path").AffineProbPath(scheduler(name, options))
    t, (x0, x1) = batch_times(dtype), arrays(2, dtype=dtype)
    theirs = path.sample(x_0=tensor(x0), x_1=tensor(x1), t=tensor(t))
    ours = AffinePath(schedule).sample(None, jnp.asarray(t), jnp.asarray(x0), jnp.asarray(x1))
    assert ours.x_t.dtype == ours.u_t.dtype == dtype
    assert_close(ours.x_t, theirs.x_t.numpy(), rtol=rtol, atol=rtol)
    assert_close(ours.u_t, theirs.dx_t.numpy(), rtol=rtol, atol=rtol)


@every_scheduler
def test_conversions(schedule, name, options, x64):
    path = peer("flow_matching.path").AffineProbPath(scheduler(name, options))
    t, (value, x_t) = batch_times(), arrays(2)
    # The peer multiplies t with the data as it comes, so it has to have their shape; [batch] would not do.
    t_full = tensor(np.broadcast_to(t[:, None, None, None], SHAPE))
    words = {"velocity": "velocity", "data": "target", "noise": "epsilon"}
    arguments = {"velocity": "velocity", "data": "x_1", "noise": "epsilon"}
    for kind in words:
        ours = convert(kind, jnp.asarray(value), jnp.asarray(t), jnp.asarray(x_t), schedule)
        for other in words.keys() - {kind}:
            converter = getattr(path, f"{words[kind]}_to_{words[other]}")
            theirs = converter(**{arguments[kind]: tensor(value)}, x_t=tensor(x_t), t=t_full)
            assert_close(getattr(ours, other), theirs.numpy(), atol=DOUBLE, what=f"{kind} to {other}")


@pytest.mark.parametrize(
    ("old", "new"), [(0, 1), (1, 0), (0, 2), (0, 4), (4, 0), (6, 1), (5, 6), (4, 5)], ids=lambda i: SCHEDULERS[i][1]
)
def test_reschedule(old, new, x64):
    transform = peer("flow_matching.path.scheduler").ScheduleTransformedModel(
        velocity_model=lambda x, t: field(t, x),
        original_scheduler=scheduler(*SCHEDULERS[old][1:]),
        new_scheduler=scheduler(*SCHEDULERS[new][1:]),
    )
    ours = jax.jit(reschedule(field, SCHEDULERS[old][0], SCHEDULERS[new][0]))
    (x,) = arrays(1)
    for r in (0.08, 0.4, 0.93):
        theirs = transform(x=tensor(x), t=tensor(r))
        assert_close(ours(jnp.asarray(r), jnp.asarray(x)), theirs.numpy(), atol=DOUBLE)


# torchdiffeq's "rk4" is the rule of the 3/8 (Kutta 1901), not the classical method of the same name here.
THREE_EIGHTHS = Tableau(
    order=4,
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    c=(0.0, 1 / 3, 2 / 3, 1.0),
)


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"), ("heun3", "heun3"), (THREE_EIGHTHS, "rk4")],
    ids=["euler", "midpoint", "heun", "heun3", "rk4 (3/8)"],
)
@pytest.mark.parametrize("grid", [np.linspace(0, 1, 9), [0.05, 0.1, 0.3, 0.55, 1.0], [1.0, 0.6, 0.5, 0.0]])
def test_fixed_step_solvers(method, theirs, grid, x64):
    solver = peer("flow_matching.solver.ode_solver").ODESolver(lambda x, t: field(t, x))
    (x0,), grid = arrays(1), np.asarray(grid)
    expected = solver.sample(
        x_init=tensor(x0), step_size=None, method=theirs, time_grid=tensor(grid), return_intermediates=True
    )
    solution = sample(field, jnp.asarray(x0), RungeKutta(method), times=grid, trajectory=True)
    assert_close(solution.trajectory, expected.numpy(), atol=DOUBLE)


def test_the_step_size_of_the_solver_is_one_over_num_steps(x64):
    solver = peer("flow_matching.solver.ode_solver").ODESolver(lambda x, t: field(t, x))
    (x0,) = arrays(1)
    expected = solver.sample(x_init=tensor(x0), step_size=0.1, method="heun2", time_grid=tensor([0.0, 1.0]))
    assert_close(sample(field, jnp.asarray(x0), RungeKutta("heun"), times=10).x, expected.numpy())


def test_adaptive_solver(x64):
    """Two implementations of dopri5 choose different steps: they agree as far as their tolerance goes."""
    (x0,) = arrays(1)
    x, times = tensor(x0), tensor([0.0, 1.0])
    expected = peer("torchdiffeq").odeint(lambda t, x: field(t, x), x, times, rtol=1e-9, atol=1e-9, method="dopri5")[-1]
    ours = jax.jit(lambda x: sample(field, x, Adaptive("dopri5", 1e-9, 1e-9)).x)(x0)
    assert_close(ours, expected.numpy(), atol=1e-7)


def test_likelihood(x64):
    """Exact divergence, midpoint steps, back from the data; theirs takes a loop over the dimensions of [batch, d]."""
    torch = peer("torch")
    solver = peer("flow_matching.solver.ode_solver").ODESolver(lambda x, t: field(t, x))
    (x1,) = arrays(1, shape=(5, 3))
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3).double(), 1.0), 1)
    source, expected = solver.compute_likelihood(
        x_1=tensor(x1),
        log_p0=normal.log_prob,
        step_size=0.1,
        method="midpoint",
        time_grid=tensor([1.0, 0.0]),
        exact_divergence=True,
    )
    options = {"sampler": RungeKutta("midpoint"), "times": 10}
    solution, log_prob = jax.jit(lambda x: encode_and_log_prob(field, x, **options))(x1)
    assert_close(solution.x, source.numpy(), atol=DOUBLE)
    assert_close(log_prob, expected.numpy(), atol=1e-10)


# torchcfm


@pytest.mark.parametrize(
    ("schedule", "name", "sigma"),
    [
        (schedules.Linear(), "ConditionalFlowMatcher", 0.0),
        (schedules.Linear(), "TargetConditionalFlowMatcher", 0.0),
        (schedules.Linear(sigma_min=1e-2), "TargetConditionalFlowMatcher", 1e-2),
        (schedules.Linear(sigma_min=0.5), "TargetConditionalFlowMatcher", 0.5),
        (schedules.Cosine(), "VariancePreservingConditionalFlowMatcher", 0.0),
    ],
    ids=lambda p: str(p),
)
def test_flow_matchers(schedule, name, sigma, x64):
    matcher = getattr(peer("torchcfm.conditional_flow_matching"), name)(sigma=sigma)
    t, (x0, x1) = batch_times(), arrays(2)
    peer("torch").manual_seed(0)
    t_out, x_t, u_t, noise = matcher.sample_location_and_conditional_flow(
        tensor(x0), tensor(x1), t=tensor(t), return_noise=True
    )
    np.testing.assert_array_equal(t_out.numpy(), t)
    # The target flow matcher ignores x0 without a word; its source is the noise that it draws.
    source = noise.numpy() if name.startswith("Target") else x0
    ours = AffinePath(schedule).sample(None, jnp.asarray(t), jnp.asarray(source), jnp.asarray(x1))
    assert_close(ours.x_t, x_t.numpy(), atol=DOUBLE)
    assert_close(ours.u_t, u_t.numpy(), atol=DOUBLE)


@pytest.mark.parametrize(
    ("path", "name", "sigma"),
    [
        (StochasticInterpolant(schedules.Linear(), ConstantNoise(0.3)), "ConditionalFlowMatcher", 0.3),
        (
            StochasticInterpolant(schedules.Cosine(), ConstantNoise(0.3)),
            "VariancePreservingConditionalFlowMatcher",
            0.3,
        ),
        (BrownianBridge(1.0), "SchrodingerBridgeConditionalFlowMatcher", 1.0),
        (BrownianBridge(0.3), "SchrodingerBridgeConditionalFlowMatcher", 0.3),
    ],
    ids=lambda p: str(p),
)
def test_paths_with_latent_noise(path, name, sigma, x64, monkeypatch):
    """The same x_t and u_t for the same noise. The peer's bridges have 1e-8 in a denominator, hence 1e-6 for them."""
    matchers = peer("torchcfm.conditional_flow_matching")
    matcher, t, (x0, x1) = getattr(matchers, name)(sigma=sigma), batch_times(), arrays(2)
    if name.startswith("Schrodinger"):  # it couples first; here it is given pairs
        monkeypatch.setattr(matcher.ot_sampler, "sample_plan", lambda x0, x1: (x0, x1))
    _, x_t, u_t, noise = matcher.sample_location_and_conditional_flow(
        tensor(x0), tensor(x1), t=tensor(t), return_noise=True
    )
    ours = path.at(jnp.asarray(t), jnp.asarray(x0), jnp.asarray(x1), jnp.asarray(noise.numpy()))
    assert_close(ours.x_t, x_t.numpy(), atol=DOUBLE)
    assert_close(ours.u_t, u_t.numpy(), atol=1e-6 if name.startswith("Schrodinger") else DOUBLE)


@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_distance(p):
    module = peer("torchcfm.optimal_transport")
    x, y = arrays(2, (60, 3))
    assert_close(wasserstein(x, y, p=p), module.wasserstein(tensor(x), tensor(y), power=p), rtol=1e-10)


@pytest.mark.parametrize("shape", [(40, 2), (24, 4, 4, 3)], ids=["points", "images"])
def test_optimal_transport_plan(shape, x64):
    sampler = peer("torchcfm.optimal_transport").OTPlanSampler(method="exact")
    x0, x1 = arrays(2, shape)
    plan = sampler.get_map(tensor(x0), tensor(x1))  # [source, data], each row and column sums to 1 / batch
    pairing = minibatch_ot(None, jnp.asarray(x0), jnp.asarray(x1))
    assert_close(plan[pairing.index0, np.arange(len(x1))] * len(x1), 1.0)
    cost = ((x0[:, None] - x1[None]) ** 2).reshape(len(x0), len(x1), -1).sum(-1)
    ours = np.mean(np.sum((np.asarray(pairing.x0) - x1).reshape(len(x1), -1) ** 2, axis=1))
    assert_close(ours, (plan * cost).sum())


def test_unet_has_the_parameters_of_the_cifar10_unet():
    torch, unet = peer("torch"), peer("torchcfm.models.unet.unet")
    with torch.device("meta"):  # shapes only
        theirs = unet.UNetModelWrapper(
            dim=(3, 32, 32),
            num_channels=128,
            num_res_blocks=2,
            channel_mult=[1, 2, 2, 2],
            num_heads=4,
            num_head_channels=64,
            attention_resolutions="16",
            dropout=0.1,
        )
    t, x = jnp.zeros(1), jnp.zeros((1, 32, 32, 3))
    ours = jax.eval_shape(make_unet("cifar10").init, jax.random.key(0), t, x)
    sizes = sorted(p.size for p in jax.tree.leaves(ours))
    assert sum(sizes) == 35_746_307
    assert sizes == sorted(p.numel() for p in theirs.parameters())  # array by array


# diffusers


def ddpm_scheduler(beta_schedule: str):
    theirs = peer("diffusers").DDPMScheduler(beta_schedule=beta_schedule)
    # The default of fm_jax is the linear table; any other is given as numbers.
    return theirs, schedules.DDPM() if beta_schedule == "linear" else schedules.DDPM(tuple(theirs.betas.tolist()))


ddpm_schedules = pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])


@ddpm_schedules
def test_ddpm_table(beta_schedule, x64):
    # Entry n - 1 of the peer's table, of n = 1..N, is at t = 1 - n / N. The peer multiplies a thousand numbers in
    # float32, which leaves it six digits.
    theirs, schedule = ddpm_scheduler(beta_schedule)
    t = 1 - np.arange(1, 1001) / 1000
    assert_close(schedule.alpha(jnp.asarray(t)) ** 2, theirs.alphas_cumprod.numpy(), rtol=5e-6)


@ddpm_schedules
def test_ddpm_add_noise(beta_schedule, x64):
    theirs, schedule = ddpm_scheduler(beta_schedule)
    x0, x1 = arrays(2)
    steps = np.array([0, 10, 250, 600, 999])
    noised = theirs.add_noise(tensor(x1), tensor(x0), tensor(steps))
    t = jnp.asarray(1 - (steps + 1) / 1000)
    ours = AffinePath(schedule).sample(None, t, jnp.asarray(x0), jnp.asarray(x1)).x_t
    assert_close(ours, noised.numpy(), rtol=1e-5, atol=1e-5)
