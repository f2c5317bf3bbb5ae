# %% [markdown]
# # 10. The design space
#
# Two papers on diffusion seldom agree on the path, on what the network predicts, on the weight of the loss, on the
# times of training, and on the sampler. Which of these choices matter, and for what? Schedules are changes of
# variables; kind, weight and times are one function of the noise level; what is left to the sampler is discretisation.
# We derive each statement and check it on a mixture of two Gaussians on the line, where all is known in closed form.
#
# Before this: [images](09_images.ipynb). It builds on the Gaussian path [(3.2)](03_paths.ipynb#eq-3-2), on
# [conversion](05_losses.ipynb#eq-5-6) and, in one row of its last table, on [couplings](08_couplings.ipynb).

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.scipy.special import logit
from lab import BLUE, GREEN, ORANGE, PALE, PINK, RED, SMOKE
from scipy import stats

from fm_jax import losses, oracles, paths, samplers, times
from fm_jax.parameterization import convert, reschedule
from fm_jax.samplers import grids
from fm_jax.schedules import EDM, VP, Linear, coefficients, log_snr
from fm_jax.types import KINDS

jax.config.update("jax_enable_x64", True)  # the identities below hold to rounding, and rounding should be small

data = oracles.gaussian_mixture([[-1.2], [0.8]], [0.25, 0.4], [0.4, 0.6])  # of mean 0
draw = jax.jit(functools.partial(oracles.sample, data), static_argnums=1)
schedules = {"Linear": Linear(), "VP": VP(), "EDM": EDM()}
key = jax.random.key(10)
key_x, key_sample, key_batch, key_times, key_grad, key_sde = jax.random.split(key, 6)

# %% [markdown]
# ## A schedule is a change of variables
#
# Take two schedules, $x_t = \alpha(t)\, x_1 + \sigma(t)\, x_0$ and
# $\bar x_r = \bar\alpha(r)\, x_1 + \bar\sigma(r)\, x_0$, whose log-SNR $\lambda = \log(\alpha^2 / \sigma^2)$ increases
# with time. Let $t(r)$ be the time at which the first has the log-SNR that the second has at $r$ (it must be one that
# the first reaches). Two vectors $(\alpha, \sigma)$ with one ratio differ by a positive factor, $s(r)$, so
#
# <a id="eq-10-1"></a>
#
# $$
# \bar x_r = s(r)\, x_{t(r)}, \qquad
# s(r)^2 = \frac{\bar\alpha(r)^2 + \bar\sigma(r)^2}{\alpha(t(r))^2 + \sigma(t(r))^2} \tag{10.1}
# $$
#
# for every pair $(x_0, x_1)$. Differentiate in $r$, and take the mean given $\bar x_r = x$, which is the mean given
# $x_{t(r)} = x / s(r)$:
#
# <a id="eq-10-2"></a>
#
# $$
# \bar v_r(x) = \frac{s'(r)}{s(r)}\, x + s(r)\, t'(r)\; v_{t(r)}\big(x / s(r)\big) \tag{10.2}
# $$
#
# By the same chain rule, if $x(t)$ solves the ODE of $v$ then $s(r)\, x(t(r))$ solves the ODE of $\bar v$. A network
# trained on one schedule can be sampled on any other whose range of $\lambda$ it has seen, without training:
# `fm_jax.parameterization.reschedule` (Karras et al. 2022, arXiv:2206.00364; Kingma and Gao 2023, arXiv:2303.00848;
# Pokle et al. 2023, arXiv:2310.04432). Below, the velocity of `Linear` is changed by (10.2) and compared with the
# closed form on three schedules: straight lines, the variance-preserving diffusion and the variance-exploding one.


# %%
def norm(schedule, t):
    """The size of (alpha, sigma): what x_t is divided by to compare schedules."""
    return jnp.hypot(schedule.alpha(t), schedule.sigma(t))


@jax.jit(static_argnums=0)
def error_of_reschedule(schedule, r, unit):
    x = unit * norm(schedule, r)[:, None]
    exact = oracles.velocity(data, schedule)(r, x)
    return (abs(reschedule(v_linear, Linear(), schedule)(r, x) - exact) / (1 + abs(exact))).max()


v_linear = oracles.velocity(data, Linear())
for name, schedule in schedules.items():
    error = error_of_reschedule(schedule, jnp.linspace(0.02, 0.98, 400), 2 * jax.random.normal(key_x, (400, 1)))
    print(f"{name:6} largest relative error of the changed velocity: {error:.0e}")
    assert error < 1e-6

# %% [markdown]
# So the flows of all schedules are one flow, seen through different clocks and lenses. We solve each of the three ODEs
# between $\lambda = -8.5$ and $9$, which all of them reach, from the same normalised points, and divide $x$ by the norm
# of $(\alpha, \sigma)$. The difference that is left is the error of the solver.


# %%
@jax.jit(static_argnums=(0, 1))
def run(sampler, schedule, grid, start):
    """The rescaled trajectory from rescaled points."""
    v, x0 = oracles.velocity(data, schedule), start * norm(schedule, grid[0])
    solution = samplers.sample(v, x0, sampler, times=grid, trajectory=True)
    return solution.trajectory[..., 0] / norm(schedule, grid)[:, None]


lambdas, u = jnp.linspace(-8.5, 9, 241), (np.arange(256) + 0.5) / 256
start = jnp.asarray(stats.norm.ppf(u))[:, None]  # quantiles of the noise
grid_of = {name: schedule.t_from_log_snr(lambdas) for name, schedule in schedules.items()}
by_euler, by_rk4 = (samplers.RungeKutta(method) for method in ("euler", "rk4"))
scaled = {name: np.asarray(run(by_rk4, schedule, grid_of[name], start)) for name, schedule in schedules.items()}
apart = max(abs(way - scaled["Linear"]).max() for way in scaled.values())
print(f"largest distance between the rescaled trajectories of the three schedules: {apart:.0e}")
assert apart < 1e-4

figure, axes = plt.subplots(1, 4, figsize=(7, 2.2))
for ax, name, color, style in zip(axes, schedules, (BLUE, ORANGE, GREEN), ("-", "--", ":"), strict=False):
    x = scaled[name][:, 8::24] * norm(schedules[name], grid_of[name])[:, None]
    ax.plot(grid_of[name], x, color=color, linestyle=style, linewidth=1)
    ax.set(title=name, xlabel="t", ylabel="x" if name == "Linear" else None)
    axes[3].plot(lambdas, scaled[name][:, 8::24], color=color, linestyle=style, linewidth=1.2)
axes[3].set(title="all, rescaled", xlabel="log-SNR")
plt.show()

# %% [markdown]
# The same eleven trajectories on three schedules, and (right) all of them on top of each other over $\lambda$.
#
# ## What a schedule does change
#
# Write $d = \mathbb{E}[x_1 \mid x_t]$ and $n = \mathbb{E}[x_0 \mid x_t]$, so that $x = \alpha d + \sigma n$ and
# $v = \dot\alpha d + \dot\sigma n$, as in [(5.6)](05_losses.ipynb#eq-5-6). Divide by $\alpha$ and count time by
# $\rho = \sigma / \alpha = e^{-\lambda / 2}$: the ODE loses its schedule,
#
# <a id="eq-10-3"></a>
#
# $$
# y = \frac{x}{\alpha} = d + \rho\, n, \qquad
# \frac{dy}{dt} = \frac{\dot\alpha d + \dot\sigma n}{\alpha}
# - \frac{\dot\alpha}{\alpha^2}\, (\alpha d + \sigma n) = \dot\rho\, n
# \qquad\Longrightarrow\qquad \frac{dy}{d\rho} = n \tag{10.3}
# $$
#
# Euler's method in $\rho$ keeps $n$, and with it $d$, for a step: $x' = \alpha(t') d + \sigma(t') n$, which is DDIM
# (Song et al. 2020, arXiv:2010.02502). It takes the same steps on all schedules, for equal $\lambda$. Euler's method in
# $t$ follows the tangents of $\alpha$ and $\sigma$ in place of the curves. Where both are straight in $t$, on `Linear`
# and on `EDM`, it is DDIM; on `VP` it is another method.

# %%
reference = run(samplers.DDIM(Linear()), Linear(), grid_of["Linear"][::30], start)[-1]
for name, schedule in schedules.items():
    ends = [run(sampler, schedule, grid_of[name][::30], start)[-1] for sampler in (samplers.DDIM(schedule), by_euler)]
    ddim, euler = (float(abs(end - reference).max()) for end in ends)
    print(f"{name:6} after 8 steps, distance to DDIM's points on Linear: DDIM {ddim:.0e}, Euler {euler:.0e}")
    assert ddim < 1e-8
    assert (euler < 1e-8) == (name != "VP")

# %% [markdown]
# ## Kind, weight and times are one function
#
# At a given $x_t$ any of velocity, data, noise and score is an affine function of any other
# ([conversion](05_losses.ipynb#eq-5-6)). So the errors of one network, read as each kind, are proportional, by factors
# known from the schedule (`fm_jax.losses.error_scale`): $|f - \text{target}| = c_{\text{kind}}(t)\, |\hat n - x_0|$,
# with $c_{\text{noise}} = 1$. And by (10.1) what a network sees at one $\lambda$ is the same on every schedule, up to
# the factor $s$. Let times have the density $p_\lambda(\lambda) = p(t)\, dt / d\lambda$ in $\lambda$. Then, for a path
# with a standard normal source and a network whose $\hat n$ is a function of $\lambda$ and of $x_t$ over its norm,
#
# <a id="eq-10-4"></a>
#
# $$
# \mathbb{E}_{t \sim p}\, w(t)\, \mathbb{E} |f - \text{target}|^2
# = \int W(\lambda)\; \mathbb{E}\, |\hat n_\lambda - x_0|^2\; d\lambda, \qquad
# W(\lambda) = p_\lambda(\lambda)\; w(t)\; c_{\text{kind}}(t)^2 \tag{10.4}
# $$
#
# The loss depends on schedule, kind, weight and times through $W$ alone. For instance, four kinds on three schedules
# with Min-SNR weights (`fm_jax.losses.MinSNRWeight`, which states its weight for data prediction and divides by the
# square of `error_scale`), at the same log-SNRs and for the same made-up network, are one number:

# %%
key_lambda, key_x0, key_x1, key_perfect = jax.random.split(key_sample, 4)
lam = jax.random.uniform(key_lambda, (512,), minval=-6, maxval=6)
x0, x1 = jax.random.normal(key_x0, (512, 1)), draw(key_x1, 512)


def loss_of(schedule, kind):
    def apply_fn(params, t, x, cond, **_):
        noise = jnp.tanh(x / norm(schedule, t)[:, None] + log_snr(schedule, t)[:, None] / 10)
        return getattr(convert("noise", noise, t, x, schedule), kind)

    loss_fn = losses.flow_matching(apply_fn, paths.AffinePath(schedule), kind=kind, weight=losses.MinSNRWeight())
    return loss_fn(None, None, {"x0": x0, "x1": x1, "t": schedule.t_from_log_snr(lam)})[0]


values = jax.jit(lambda: jnp.array([loss_of(schedule, kind) for schedule in schedules.values() for kind in KINDS]))()
print(f"twelve losses between {values.min():.6f} and {values.max():.6f}, apart by {np.ptp(values):.0e}")
assert np.ptp(values) < 1e-9

# %% [markdown]
# What is $W$ for plain flow matching: `Linear`, velocity, no weight, uniform $t$? From
# $\lambda = 2 \log \frac{t}{1 - t}$ we have $d\lambda / dt = \frac{2}{t (1 - t)}$; from $v = (x_t - x_0) / t$ we have
# $c_{\text{velocity}} = 1 / t$. Hence (Kingma and Gao 2023, table 1)
#
# <a id="eq-10-5"></a>
#
# $$
# W(\lambda) = \frac{t (1 - t)}{2} \cdot \frac{1}{t^2} = \frac{1 - t}{2 t} = \tfrac12\, e^{-\lambda / 2} \tag{10.5}
# $$
#
# The loss of a perfect network, the constant of [Theorem 3](05_losses.ipynb#eq-5-3), is $\int W e\, d\lambda$ with the
# *irreducible error* $e(\lambda) = \mathbb{E}|x_0 - n|^2 = \mathbb{E}|x_0|^2 - \mathbb{E}|n|^2$, a function of the data
# alone. On the line it is a one-dimensional integral, which we compare with `fm_jax.losses.flow_matching`
# itself.


# %%
def weight_function(lam, schedule, kind, weight, density):
    """W of (10.4) for a density of times in log-SNR; `None` is uniform in t."""
    t = schedule.t_from_log_snr(lam)
    c = coefficients(schedule, t)
    p = 0.5 / (c.d_alpha / c.alpha - c.d_sigma / c.sigma) if density is None else density(lam)
    scale = losses.error_scale(kind, t, schedule) / losses.error_scale("noise", t, schedule)
    return np.asarray(p * (1 if weight is None else weight(t, kind, schedule)) * scale**2)


@jax.jit
@jax.vmap
def irreducible(lam):
    t, x = Linear().t_from_log_snr(lam), jnp.linspace(-8, 8, 801)[:, None]
    noise = oracles.prediction(data, Linear(), t, x).noise[:, 0]
    return 1 - 0.02 * (jnp.exp(oracles.log_prob(data, Linear(), t, x)) * noise**2).sum()


wide = np.linspace(-24, 24, 481)
e, plain = np.asarray(irreducible(wide)), weight_function(wide, Linear(), "velocity", None, None)
perfect = losses.flow_matching(lambda _, t, x, *rest, **options: v_linear(t, x), paths.AffinePath())
key_x1, key_loss = jax.random.split(key_perfect)
by_draws = jax.jit(perfect)(None, key_loss, {"x1": draw(key_x1, 100_000)})[0]
by_quadrature = np.trapezoid(plain * e, wide)
print(f"largest relative error of (10.5): {abs(plain * 2 * np.exp(wide / 2) - 1).max():.0e}")
print(f"loss of a perfect network: {by_quadrature:.3f} by quadrature, {by_draws:.3f} from 100,000 draws")
assert np.allclose(plain, np.exp(-wide / 2) / 2, rtol=1e-6)
assert abs(by_quadrature - by_draws) < 0.05

# %% [markdown]
# Five published recipes, as far as the loss can tell them apart: flow matching (Lipman et al. 2022, arXiv:2210.02747),
# Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206), DDPM in continuous time (Ho et al. 2020, arXiv:2006.11239),
# Min-SNR (Hang et al. 2023, arXiv:2303.09556) and EDM (Karras et al. 2022). A constant factor of $W$ only changes the
# learning rate. On the left is $W$; on the right $W e$, which says where the loss of a perfect network comes from.

# %%
recipes = {
    "flow matching": (Linear(), "velocity", None, None),
    "SD3": (Linear(), "velocity", None, stats.norm(0, 2).pdf),
    "DDPM": (VP(), "noise", None, None),
    "Min-SNR": (VP(), "noise", losses.MinSNRWeight(), None),
    "EDM": (EDM(), "data", losses.EDMWeight(), stats.norm(2.4, 2.4).pdf),
}
frame = np.linspace(-8.5, 9, 201)
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6))
for (name, recipe), color in zip(recipes.items(), (BLUE, ORANGE, GREEN, RED, PINK), strict=True):
    w = weight_function(frame, *recipe)
    loss = w * np.interp(frame, wide, e)
    axes[0].plot(frame, w / np.interp(0, frame, w), color=color)
    axes[1].plot(frame, loss / np.trapezoid(loss, frame), color=color, label=name)
axes[0].set(yscale="log", ylim=(1e-3, 1e2), xlabel="log-SNR", title="weight W, relative to log-SNR 0")
axes[1].set(xlabel="log-SNR", title="W e, as a share of its integral")
axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## Where training spends its time
#
# Of the distributions in `fm_jax.times` two are closer than they look. On `Linear`, EDM's normal in
# $\log(\sigma / \alpha) = -\operatorname{logit}(t)$ with mean $-1.2$ and deviation $1.2$ is `LogitNormal(1.2, 1.2)`. In
# Stable Diffusion 3 it is rf/lognorm(-1.2, 1.2): there time runs from data to noise, and the mean has the other sign.
# Each histogram below is of 100,000 draws beside the derivative of the closed-form distribution function. The largest
# distance between the two distribution functions (Kolmogorov and Smirnov) exceeds $1.95 / \sqrt{100000} = 0.0062$ for
# one key in a thousand.

# %%
mode_u, t = np.linspace(0, 1, 2001), np.linspace(0, 1, 2001)[1:-1]
e_v = np.interp(2 * logit(t), wide, e) / t**2
mode_t = mode_u + 1.29 * (np.cos(np.pi / 2 * mode_u) ** 2 - 1 + mode_u)
distributions = {
    "LogitNormal()": (times.LogitNormal(), lambda t: stats.norm.cdf(logit(t))),
    "EDMLogNormal()": (times.EDMLogNormal(), lambda t: stats.norm.cdf(logit(t), 1.2, 1.2)),
    "Mode()": (times.Mode(), lambda t: np.interp(t, mode_t, mode_u)),
    "Beta(2, 1)": (times.Beta(2.0, 1.0), stats.beta(2, 1).cdf),
}
num, draws = 100_000, {}
figure, axes = plt.subplots(1, 4, figsize=(7, 2), sharey=True)
for i, (name, (sampler, cdf)) in enumerate(distributions.items()):
    draws[name] = np.asarray(jax.jit(sampler, static_argnums=1)(jax.random.fold_in(key_times, i), num))
    distance = stats.kstest(draws[name], cdf).statistic
    print(f"{name:14} largest distance of distribution functions: {distance:.4f}")
    assert distance < 0.008
    axes[i].hist(draws[name], 40, range=(0, 1), density=True, color=PALE, histtype="stepfilled")
    axes[i].plot(t, np.gradient(cdf(t), t), color=BLUE)
    axes[i].plot(t, e_v, color=ORANGE, linestyle="--")
    axes[i].set(title=name, xlabel="t")
axes[0].annotate("irreducible error\nof the velocity", (0.02, 2.1), color=ORANGE)
plt.show()

# %% [markdown]
# The dashed line is the irreducible error of the velocity, $e_v(t) = c_{\text{velocity}}^2\, e = e / t^2$, the noise in
# the targets. It is $\operatorname{Var}(x_1)$ at $t = 0$, where $u = x_1 - x_0$ and $x_0$ is known, 1 at $t = 1$, where
# $x_1$ is known, and largest in between, where neither is.
#
# ## The same loss with less noise
#
# Times and weight enter the loss through their product $q = p\, w$. Does it matter how $q$ is split? Add one parameter
# $\theta$ to the perfect velocity $v$. The gradient of an example is $2 w\, (v + \theta - u)$, of mean
# $2 \theta \int q\, dt$ for every split; but its second moment is
#
# <a id="eq-10-6"></a>
#
# $$
# 4 \int p\, w^2\, (e_v + \theta^2)\, dt = 4 \int \frac{q^2}{p}\, (e_v + \theta^2)\, dt
# \;\ge\; 4\, \Big( \int q\, \sqrt{e_v + \theta^2}\, dt \Big)^2 \tag{10.6}
# $$
#
# by Cauchy and Schwarz, with $q \sqrt{m} = \sqrt{p} \cdot q \sqrt{m / p}$ for $m = e_v + \theta^2$ and
# $\int p\, dt = 1$. Equality holds for $p \propto q \sqrt{m}$: draw the times where the weight and the noise of the
# target are. (For a whole network, $m$ is the mean squared length of its gradient at $t$.) We take the $q$ of Stable
# Diffusion 3, of integral 1, split it in three ways, and measure by `jax.grad` of the library's loss, one example at a
# time, at $\theta = 1/2$. The mean should be 1, and the variance (10.6) less its square.


# %%
def normal(t, mean, std):
    """The density of `LogitNormal(mean, std)`."""
    return jax.scipy.stats.norm.pdf(logit(t), mean, std) / (t * (1 - t))


@jax.jit
@jax.vmap
def gradient(key, x1, t, weight):
    loss_fn = losses.flow_matching(lambda theta, t, x, *rest, **_: v_linear(t, x) + theta, paths.AffinePath())
    batch = {"x1": x1[None], "t": t[None], "weight": weight[None]}
    return jax.grad(loss_fn, has_aux=True)(0.5, key, batch)[0]


splits = {
    "LogitNormal()": (draws["LogitNormal()"], normal(t, 0, 1)),
    "EDMLogNormal()": (draws["EDMLogNormal()"], normal(t, 1.2, 1.2)),
    "Uniform()": (times.Uniform()(jax.random.fold_in(key_times, 4), num), np.ones_like(t)),
}
q, spread = normal(t, 0, 1), e_v + 0.5**2
keys, x1 = jax.random.split(key_grad, num), draw(key_batch, num)
print(f"least variance of an example's gradient: {4 * np.trapezoid(q * np.sqrt(spread), t) ** 2 - 1:.2f}")
for name, (drawn, p) in splits.items():
    found = gradient(keys, x1, drawn, np.interp(drawn, t, q / p))
    variance, predicted = found.var(), 4 * np.trapezoid(q**2 / p * spread, t) - 1
    print(f"{name:14} mean {found.mean():.3f} (should be 1), variance {variance:.2f} (should be {predicted:.2f})")
    assert abs(found.mean() - 1) < 0.06
    assert abs(variance / predicted - 1) < 0.1

# %% [markdown]
# One loss, one expected gradient, and a factor of more than two in its variance. The velocity's $e_v$ is nearly flat,
# between 1 and 2 for these data, which is why plain flow matching, with $w = 1$, is close to the bound for whatever
# times it is given.
#
# ## Noise on the way
#
# The [SDE extension](04_continuity.ipynb#eq-4-7) allows any $g_t$ in sampling, from the same network. It keeps the
# marginals and gives up the map: from one noise come many data points. From 4,096 quantiles of the noise we go to the
# data with `fm_jax.samplers.falling_noise`, $g_t^2 = -d\sigma^2 / dt$, times 0, 1 and 2, along one Brownian path. We
# compare the ends with the distribution function $F$ of the data (Kolmogorov and Smirnov again, 0.030 for one key in a
# thousand), and correlate $F(x_{\text{end}})$ with $\Phi(x_0)$. On the line trajectories of an ODE cannot cross, so
# that they preserve quantiles, and the correlation is 1.


# %%
def distribution_function(x):
    return 0.4 * stats.norm.cdf(x, -1.2, 0.25) + 0.6 * stats.norm.cdf(x, 0.8, 0.4)


@jax.jit(static_argnums=2)
def noisy(factor, x0, num_steps):
    sde = samplers.EulerMaruyama(Linear(), lambda t: factor * samplers.falling_noise(Linear())(t))
    return samplers.sample(v_linear, x0, sde, times=num_steps, key=key_sde).x


noises = jnp.asarray(stats.norm.ppf((np.arange(4096) + 0.5) / 4096))[:, None]
for factor in (0.0, 1.0, 2.0):
    few, many = (distribution_function(np.asarray(noisy(factor, noises, steps)))[:, 0] for steps in (8, 200))
    distance, rough = (stats.kstest(reached, stats.uniform.cdf).statistic for reached in (many, few))
    correlation = np.corrcoef(many, stats.norm.cdf(noises[:, 0]))[0, 1]
    print(f"noise times {factor:.0f}: correlation {correlation:.2f}, distance {distance:.3f}; with 8 steps {rough:.3f}")
    assert distance < 0.04
    assert (correlation > 0.99) == (factor == 0)

# %% [markdown]
# ## Solvers and grids
#
# The optimum is learned, the map is fixed: solver and grid decide how close to it a few evaluations come. On the line
# the exact end of a path is the quantile of the data with the rank of the noise, so that errors need no reference
# solution. A method of order $k$ with four times as many steps is $4^k$ times as accurate, in the limit; we check it
# for Euler's method and for that of Adams and Bashforth, which costs one evaluation a step as well.

# %%
fine = np.linspace(-4, 4, 200_001)
exact = np.interp(u, distribution_function(fine), fine)


def even(num_steps, schedule, t0, t1):
    return grids.uniform(num_steps, t0, t1)


def error(sampler, schedule, make_grid, nfe):
    grid = make_grid(nfe // sampler.nfe_per_step, schedule, *schedule.domain)
    return float(np.sqrt(((run(sampler, schedule, grid, start)[-1] - exact) ** 2).mean()))


for name, sampler in {"euler": by_euler, "ab2": samplers.AdamsBashforth(2)}.items():
    (few, many), should = (error(sampler, Linear(), even, nfe) for nfe in (32, 128)), 4**sampler.order
    print(f"{name:5} error of 32 evaluations {few:.1e}, of 128 {many:.1e}: ratio {few / many:.1f}, theory {should}")
    assert 0.7 < few / many / should < 1.4

# %% [markdown]
# With eight evaluations we are far from that limit. Below is the error of five samplers on two schedules, which one
# network serves by (10.2), with times uniform in $t$ and those of EDM (`fm_jax.samplers.grids.edm`, dense near the
# data). Two of the samplers work in log-SNR and are made of the schedule.

# %%
names = ("euler", "ddim", "midpoint", "ab2", "dpm_solver++_2m")[: 2 if SMOKE else 5]


def choices(schedule):
    ddim, multistep, midpoint = samplers.DDIM(schedule), samplers.DPMSolverPlusPlus(schedule), samplers.RungeKutta()
    return (by_euler, ddim, midpoint, samplers.AdamsBashforth(2), multistep)[: len(names)]


columns = [(schedule, make_grid) for schedule in (Linear(), VP()) for make_grid in (even, grids.edm)]
errors = np.array([[error(sampler, *column, 8) for sampler in choices(column[0])] for column in columns]).T
figure, ax = plt.subplots(figsize=(6, 2.8))
ax.imshow(np.log(errors), cmap="Blues", aspect="auto")
for (row, column), value in np.ndenumerate(errors):
    ax.annotate(f"{value:.3f}", (column, row), ha="center", va="center", color="white" if value > 0.15 else "black")
ax.set_xticks(range(4), ["Linear\nuniform times", "Linear\nEDM times", "VP\nuniform times", "VP\nEDM times"])
ax.set_yticks(range(len(names)), names)
ax.set_title("Error after eight evaluations of one network (root mean square)")
plt.show()
print(f"largest error over smallest, one network and eight evaluations: {errors.max() / errors.min():.0f}")

# %% [markdown]
# ## What each choice changes
#
# | choice | the optimum | noise to data | variance of the gradient | error of few steps |
# |---|---|---|---|---|
# | schedule | up to (10.2) no | no (10.1) | through $p_\lambda$ (10.4) | yes; for DDIM no (10.3) |
# | kind | up to conversion no | no | through $c_{\text{kind}}$ (10.4) | no |
# | weight | no | no | yes (10.6) | no |
# | times of training | no | no | yes (10.6) | no |
# | coupling ([notebook 8](08_couplings.ipynb#eq-8-2)) | yes | yes | yes | yes |
# | solver, grid | no | no | no | yes |
# | noise in sampling | no | no map; same marginals | no | yes |
#
# "The optimum" is what a network learns that can represent it, under a weight that is positive wherever samplers go. A
# real network compromises, and $W$ says where: that is the reason to choose it, as a function of $\lambda$. Schedule
# and kind can be exchanged after training, by (10.2) and by conversion; a coupling cannot.
#
# A schedule is a change of variables; kind, weight and times are one function $W(\lambda)$ and a variance; solver and
# grid are an error, which one network can make large or small. Each of these was a closed form, and a number beside it.
#
# Next: [bring your own](11_bring_your_own.ipynb).
