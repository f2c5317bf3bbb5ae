# %% [markdown]
# # 2. Diffusions
#
# A flow forgets nothing: it can be run back to where it came from ([notebook 1](01_flows.ipynb)). A diffusion forgets:
# each moment a little noise is added, and in the end only the noise is left. This notebook defines Brownian motion and
# stochastic differential equations (SDEs), solves the Ornstein-Uhlenbeck process, which is the noising process of
# diffusion models, in closed form, and measures the error of the Euler-Maruyama method against it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from lab import BLUE, GREY, INK, ORANGE, RED, film
from scipy import integrate, stats

from fm_jax import oracles
from fm_jax.nfe import Counted
from fm_jax.samplers import EulerMaruyama, RungeKutta, grids, sample, sde_step
from fm_jax.schedules import VP

jax.config.update("jax_enable_x64", True)  # small differences of random variables are measured below

# %% [markdown]
# ## Brownian motion
#
# What is the simplest motion at random? In each moment a push that does not depend on the past and that has the same
# distribution at all times. If the path is to be continuous and to have no preferred direction, then there is only one
# such motion, up to its unit of length: **Brownian motion** $W_t$ (or Wiener process), with $W_0 = 0$, continuous
# paths, and for all $s<t$
#
# <a id="eq-2-1"></a>
#
# $$
# W_t - W_s \sim \mathcal N\big(0, (t-s)\,I\big), \quad\text{independent of all } W_r \text{ with } r\le s. \tag{2.1}
# $$
#
# That the pushes are Gaussian is no choice: a push in a time $t$ is the sum of ever more independent pushes in ever
# shorter times, and the central limit theorem applies. (Without continuity jumps come in, and with them Lévy
# processes.) The variance is proportional to time because variances of independent pushes add up; so the typical
# distance is $\sqrt t$. From [(2.1)](#eq-2-1) for $s<t$ in one dimension,
# $\mathrm{Cov}(W_s, W_t) = \mathrm{Var}\,W_s + \mathrm{Cov}(W_s, W_t-W_s) = s$.
#
# On a grid of step $h$ Brownian motion is a cumulative sum of $\sqrt h\,\varepsilon$ with
# $\varepsilon\sim\mathcal N(0, 1)$, and that is exact, not an approximation.

# %%
names = ("W", "x0", "sde", "limit", "ou", "data", "noising", "noise", "naive", "back", "paths")
keys = dict(zip(names, jax.random.split(jax.random.key(0), len(names)), strict=True))
num, fine = 4000, 1024
dW = jnp.sqrt(1 / fine) * jax.random.normal(keys["W"], (num, fine))
W = np.pad(np.cumsum(dW, axis=1), ((0, 0), (1, 0)))  # [path, time]: W_0 = 0 and the 1024 times after it
quarter, half, last = W[:, fine // 4], W[:, fine // 2], W[:, fine]
rows = (
    ("Var W_1/4", quarter.var(), 1 / 4),
    ("Var W_1", last.var(), 1.0),
    ("Cov(W_1/4, W_1)", (quarter * last).mean(), 1 / 4),
    ("Cov(W_1/2, W_1 - W_1/2)", (half * (last - half)).mean(), 0.0),
)
for name, value, exact in rows:
    print(f"{name:24} {value:7.4f}, exactly {exact:5.2f}; within {1.5 / np.sqrt(num):.3f} is usual")
    assert abs(value - exact) < 7 / np.sqrt(num)  # the standard errors are at most sqrt(2 / num)

# %% [markdown]
# ## Stochastic differential equations
#
# A velocity field with noise: let the drift $f_t(x)$ move the point and a Brownian motion, $g_t$ times as strong,
# shake it. One writes
#
# <a id="eq-2-2"></a>
#
# $$
# \mathrm dX_t = f_t(X_t)\,\mathrm dt + g_t\,\mathrm dW_t, \qquad\text{which means}\qquad
# X_t = X_0 + \int_0^t f_s(X_s)\,\mathrm ds + \int_0^t g_s\,\mathrm dW_s, \tag{2.2}
# $$
#
# because $W$ has no derivative ([below](#eq-2-4)). The notes on which this series is built call the drift $u_t$ and
# the noise coefficient $\sigma_t$; here $\sigma_t$ is kept for the amount of noise *in* $x_t$, and the noise that is
# *being added* is $g_t$, as in most papers. With $g = 0$ the SDE is the ODE [(1.1)](01_flows.ipynb#eq-1-1) again: flow
# models are diffusion models without diffusion.
#
# The last integral is no mystery. For a differentiable function $g$ of time alone (in diffusion models it never
# depends on $x$) one integrates by parts,
# $N_t = \int_0^t g_s\,\mathrm dW_s = g_tW_t - \int_0^t \dot g_s W_s\,\mathrm ds$, for each path by itself. And then,
# if $f$ is continuous and Lipschitz in $x$, **a solution exists and is unique**: $Z_t = X_t - N_t$ has to solve
# $\dot Z_t = f_t(Z_t+N_t)$, an ordinary differential equation with the same bound on the slope, to which the [theorem
# for flows](01_flows.ipynb#eq-1-3) applies, for one noise path at a time.
#
# As the limit of sums $\sum_i g_{t_i}(W_{t_{i+1}}-W_{t_i})$ of independent normals, such an integral is normal too,
# its mean is 0 and its variance is the limit of $\sum_i g_{t_i}^2\,h$:
# $\int_0^t g_s\,\mathrm dW_s \sim \mathcal N\big(0, \int_0^t g_s^2\,\mathrm ds\big)$ (*Itô's isometry*).

# %% [markdown]
# ## The Euler-Maruyama method
#
# Hold $f$ and $g$ fixed for a short time $h$, and draw what Brownian motion does in it:
#
# <a id="eq-2-3"></a>
#
# $$
# X_{t+h} = X_t + h\,f_t(X_t) + g_t\sqrt h\,\varepsilon_t, \qquad \varepsilon_t\sim\mathcal N(0, I). \tag{2.3}
# $$
#
# Drift counts as $h$, noise as $\sqrt h$: over a short time noise wins, over a long time drift does.
#
# In the library it is `fm_jax.samplers.EulerMaruyama`. It speaks of a velocity and a score, since it solves
# $\mathrm dX = \big(v + \tfrac12 g^2 s\big)\,\mathrm dt + g\,\mathrm dW$; what that is for is [Theorem
# 2](04_continuity.ipynb#eq-4-7). Any drift $f$ goes in as a velocity whose score is 0. Step $i$ draws its noise from
# `jax.random.fold_in(key, i)`, so that three lines by hand give the same numbers; and with $g = 0$ the result is
# Euler's method for the flow.

# %%
theta, g = 2.0, 1.5


def drift(t, x):
    return -theta * x


def no_score(t, x):
    return jnp.zeros_like(x)


x0 = jax.random.normal(keys["x0"], (500, 1))
x, h = x0, 1 / 50
for i in range(50):
    x = x + h * drift(i * h, x) + g * jnp.sqrt(h) * jax.random.normal(jax.random.fold_in(keys["sde"], i), x.shape)

library = sample(drift, x0, EulerMaruyama(diffusion=g, score=no_score), times=50, key=keys["sde"]).x
without = sample(drift, x0, EulerMaruyama(diffusion=0.0, score=no_score), times=50, key=keys["sde"]).x
flow = sample(drift, x0, RungeKutta("euler"), times=50).x
print(f"by hand and by the library: equal up to {jnp.abs(x - library).max():.0e}")
print(f"g = 0 and Euler's method:   equal up to {jnp.abs(without - flow).max():.0e}")
assert max(jnp.abs(x - library).max(), jnp.abs(without - flow).max()) < 1e-12

# %% [markdown]
# ## The square of noise is time
#
# Add up the squares of all increments of a path, $Q_h = \sum_i (W_{t_{i+1}}-W_{t_i})^2$. For a smooth path that tends
# to 0 with $h$, since each of the $t/h$ squares is of order $h^2$. For Brownian motion $E\,Q_h = (t/h)\,h = t$, and
# since the square of a $\mathcal N(0,h)$ variable has variance $2h^2$,
#
# <a id="eq-2-4"></a>
#
# $$
# E\,Q_h = t, \qquad \mathrm{Var}\,Q_h = 2ht \;\to\; 0: \qquad \textstyle\sum (\Delta W)^2 \to t,
# \quad\text{for short } (\mathrm dW)^2 = \mathrm dt. \tag{2.4}
# $$
#
# So the sum is not random in the limit. The difference quotient $(W_{t+h}-W_t)/h$, on the other hand, has standard
# deviation $h^{-1/2}$ and no limit: Brownian motion has no derivative, and the sum of $|\Delta W|$, the length of the
# path, has the mean $(t/h)\sqrt{2h/\pi}$ and grows beyond all bounds. And calculus gets a second-order term. From
# $W_{i+1}^2 - W_i^2 = 2W_i\,\Delta W + (\Delta W)^2$, summed over a path,
#
# <a id="eq-2-5"></a>
#
# $$
# W_t^2 = 2\int_0^t W_s\,\mathrm dW_s + t, \tag{2.5}
# $$
#
# where a smooth path would lack the $t$. (The integral is the limit of $\sum W_i\,\Delta W$, with $W$ at the *left*
# end of each step, as in the Euler-Maruyama method. That choice is Itô's.)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.9))
times = np.linspace(0, 1, fine + 1)
left.plot(times[::4], W[:12, ::4].T, color=BLUE, lw=0.5, ls="-")
left.plot(times, np.outer(np.sqrt(times), (-2, 2)), color=INK, ls="--")
left.text(0.03, 1.75, r"$\pm 2\sqrt{t}$", color=INK)
left.set(title="Brownian motion: 12 paths", xlabel="t", ylabel=r"$W_t$", ylim=(-2.6, 2.6))
for every, color, dash in ((64, ORANGE, "--"), (8, RED, "-."), (1, BLUE, "-")):
    increments = np.diff(W[:, ::every], axis=1)
    squares, lengths = (increments**2).sum(axis=1), np.abs(increments).sum(axis=1)
    step = every / fine
    print(f"h = {step:.5f}: sum of squares {squares.mean():.3f} +- {squares.std():.3f}", end=" ")
    print(f"(1 +- {np.sqrt(2 * step):.3f}), length {lengths.mean():5.2f} ({np.sqrt(2 / np.pi / step):5.2f})")
    assert abs(squares.mean() - 1) < 6 * np.sqrt(2 * step / num)
    right.step(times[::every], np.append(0, np.cumsum(increments[0] ** 2)), color=color, ls=dash, where="post")
    right.text(1.02, squares[0], f"h = 1/{fine // every}", color=color, va="center")
right.plot((0, 1), (0, 1), color=GREY, lw=1, ls="-")
right.set(title="Sum of squares along one path", xlabel="t", ylabel=r"$\sum (\Delta W)^2$", xlim=(0, 1.3))
right.set_xticks((0, 0.5, 1))
plt.show()

# %% [markdown]
# ## The Ornstein-Uhlenbeck process
#
# Pull every point back to 0, the harder the farther it is, and shake:
#
# $$
# \mathrm dX_t = -\theta X_t\,\mathrm dt + g\,\mathrm dW_t, \qquad \theta > 0.
# $$
#
# Multiply by $e^{\theta t}$. This is a smooth function of time, so that the product rule holds as it always does:
# $\mathrm d(e^{\theta t}X_t) = e^{\theta t}(\theta X_t\,\mathrm dt + \mathrm dX_t) = e^{\theta t}g\,\mathrm dW_t$. The
# drift is gone; integrate and divide:
#
# <a id="eq-2-6"></a>
#
# $$
# X_t = e^{-\theta t}X_0 + g\int_0^t e^{-\theta(t-s)}\,\mathrm dW_s. \tag{2.6}
# $$
#
# Given $X_0$ that is normal, with mean $e^{-\theta t}X_0$, and by Itô's isometry with variance
# $g^2\int_0^t e^{-2\theta(t-s)}\,\mathrm ds$:
#
# <a id="eq-2-7"></a>
#
# $$
# X_t \mid X_0 \;\sim\; \mathcal N\Big(e^{-\theta t}X_0,\ \frac{g^2}{2\theta}\big(1-e^{-2\theta t}\big)\Big)
# \;\longrightarrow\; \mathcal N\Big(0, \frac{g^2}{2\theta}\Big) \qquad (t\to\infty). \tag{2.7}
# $$
#
# The limit does not depend on $X_0$, and to have started in it is to stay in it: it is the *stationary* distribution.
# (One reads at times that the limit is $\mathcal N(0,\sigma^2)$ with $\sigma = g$. That is so for $\theta = \tfrac12$
# only, which happens to be the value that diffusion models use.) **This is what noise is for.** The same drift without
# noise also brings everything to 0, but the flow remembers: multiply by $e^{\theta t}$ and the data are back. The
# diffusion ends in a distribution that we know and can draw from, whatever the data were.
#
# What does the Euler-Maruyama method make of it? $X_{n+1} = (1-\theta h)X_n + g\sqrt h\,\varepsilon_n$ is linear in
# Gaussians, so its law is known exactly as well:
#
# <a id="eq-2-8"></a>
#
# $$
# m_{n+1} = (1-\theta h)\,m_n, \qquad V_{n+1} = (1-\theta h)^2\,V_n + g^2h \;\longrightarrow\;
# \frac{g^2}{2\theta-\theta^2h} \qquad \text{if } \theta h<2. \tag{2.8}
# $$
#
# (For $\theta h\ge2$ the steps overshoot and $V_n$ grows without bound.) The stationary variance is too large by a
# factor $1/(1-\theta h/2)$, an error of order $h$. The cell runs an ensemble for each of three $\theta$ until it has
# forgotten its start.

# %%
thetas, num, h = np.repeat([0.5, 1.0, 2.0], 4000)[:, None], 4000, 1 / 16
sde, times = EulerMaruyama(diffusion=1.0, score=no_score), grids.uniform(16 * 16, 0.0, 16.0)
long = Counted(lambda t, x: -thetas * x, None, domain=(0.0, 16.0))
limit = sample(long, jnp.full((3 * num, 1), 5.0), sde, times=times, key=keys["limit"]).x
for theta_k, ensemble in zip((0.5, 1.0, 2.0), np.split(np.asarray(limit), 3), strict=True):
    process, scheme = 1 / (2 * theta_k), 1 / (2 * theta_k - theta_k**2 * h)
    print(f"theta = {theta_k}, g = 1: variance {ensemble.var():.3f}; g^2 / (2 theta) = {process:.3f},", end=" ")
    print(f"that of the scheme {scheme:.3f}, usual error {scheme * np.sqrt(2 / num):.3f}")
    assert abs(ensemble.var() / scheme - 1) < 6 * np.sqrt(2 / num)

# %% [markdown]
# Forgetting, to watch. One half of the points starts at $-2$, the other at $1.5$. Bands show the exact mean $\pm$ two
# standard deviations of [(2.7)](#eq-2-7), and on the right are the histograms of the two halves beside their exact
# densities. When the two curves lie on the stationary one (dotted), nobody can tell from a point where it came from.

# %%
starts, span, num_steps = np.array([-2.0, 1.5]), 1.5, 96
sde, times = EulerMaruyama(diffusion=g, score=no_score), np.asarray(grids.uniform(num_steps, 0.0, span))
to_span = Counted(drift, None, domain=(0.0, span))
ensemble = sample(to_span, jnp.repeat(starts, 2000)[:, None], sde, times=times, key=keys["ou"], trajectory=True)
halves = np.asarray(ensemble.trajectory).reshape(num_steps + 1, 2, 2000)
mean = np.exp(-theta * times)[:, None] * starts
std = np.sqrt(g**2 / (2 * theta) * (1 - np.exp(-2 * theta * times)))
scheme_mean = (1 - theta * span / num_steps) ** np.arange(num_steps + 1)[:, None] * starts
off = np.abs((halves.mean(axis=2) - scheme_mean)[1:] / (std[1:, None] / np.sqrt(2000))).max()
print(f"means at {num_steps} times for two starts: within {off:.1f} standard errors of those of (2.8)")
assert off < 6


def draw(t, left, right):
    now, level = round(t / span * num_steps), np.linspace(-3.2, 3.2, 161)
    for k, color, dash in ((0, BLUE, "-"), (1, ORANGE, "--")):
        left.fill_between(times, mean[:, k] - 2 * std, mean[:, k] + 2 * std, color=color, alpha=0.15, lw=0)
        left.plot(times[: now + 1 : 2], halves[: now + 1 : 2, k, :5], color=color, lw=0.6, ls=dash)
        heights, edges = np.histogram(halves[now, k], bins=40, range=(-3.2, 3.2), density=True)
        right.stairs(heights, edges, orientation="horizontal", fill=True, alpha=0.4, color=color)
        if now:
            right.plot(stats.norm.pdf(level, mean[now, k], std[now]), level, color=color, ls=dash)
    right.plot(stats.norm.pdf(level, 0, g / np.sqrt(2 * theta)), level, color=INK, lw=1, ls=":")
    left.set(xlim=(0, span), ylim=(-3.2, 3.2), xticks=(0, span), yticks=(-2, 0, 1.5))
    right.set(xlim=(0, 1.4), ylim=(-3.2, 3.2), xticks=(), yticks=())


film(
    draw,
    span * np.linspace(0, 1, 13),
    panels=2,
    size=(2.3, 2.1),
    alt="Left: paths from -2 and from 1.5 wander towards 0 inside exact bands, until the bands coincide. Right: two"
    " narrow histograms become one broad one, the stationary normal distribution.",
)

# %% [markdown]
# ## The noising of diffusion models
#
# Diffusion models run such a process from the data to noise, with a strength $\beta$ that grows on the way (Song et
# al. 2021, arXiv:2011.13456). In the time of those papers, $s = 1-t$ from data ($s=0$) to noise ($s=1$),
#
# $$
# \mathrm dX_s = -\tfrac12\beta_s X_s\,\mathrm ds + \sqrt{\beta_s}\,\mathrm dW_s.
# $$
#
# Look at it by another clock, $T_s = \int_0^s\beta_r\,\mathrm dr$. The noise $\int\sqrt\beta\,\mathrm dW$ has
# independent normal increments whose variances are the differences of $T$: by that clock it *is* a Brownian motion,
# and the equation reads $\mathrm dX = -\tfrac12X\,\mathrm dT + \mathrm dW_T$. That is the Ornstein-Uhlenbeck process
# with $\theta=\tfrac12$ and $g=1$. With $x_1$ the data and $x_0$ an independent standard normal variable,
# [(2.7)](#eq-2-7) says that the process at any one time has the distribution of
#
# <a id="eq-2-9"></a>
#
# $$
# x_t = \alpha_t x_1 + \sigma_t x_0, \qquad \alpha_t = e^{-T_{1-t}/2}, \quad \sigma_t^2 = 1-e^{-T_{1-t}}, \quad
# \alpha_t^2+\sigma_t^2 = 1. \tag{2.9}
# $$
#
# It is called *variance-preserving*: data of variance 1 keep it. This is `fm_jax.schedules.VP`, and
# [paths](03_paths.ipynb#eq-3-2) of this form, noise and data mixed in proportions that change with time, carry all
# that follows. The cell checks the schedule against the clock, by numerical integration, and then runs the SDE:
# `EulerMaruyama` from $t=1$ to $t=0$, where the drift is minus the velocity, since time runs backward. At four times it
# compares the ensemble with the exact distribution function, `fm_jax.oracles.cdf`: the largest difference (the
# Kolmogorov-Smirnov statistic) should be about $0.9/\sqrt n$ for $n$ points, and is above $1.6/\sqrt n$ once in a
# hundred times.

# %%
vp = VP()


def beta(t):
    return vp.beta_min + (1 - t) * (vp.beta_max - vp.beta_min)


def g_vp(t):
    return jnp.sqrt(beta(t))


at = np.array([0.0, 0.3, 0.6, 0.9])
clock = np.array([integrate.quad(beta, t, 1.0)[0] for t in at])
off = np.abs(np.stack([vp.alpha(at) - np.exp(-clock / 2), vp.sigma(at) - np.sqrt(1 - np.exp(-clock))])).max()
print(f"alpha and sigma of VP against the clock: equal up to {off:.0e}")
assert off < 1e-9

data, num = oracles.gaussian_mixture([[-1.2], [0.9]], [0.2, 0.3], [0.4, 0.6]), 4000


def distance(t, x):
    return stats.kstest(np.ravel(x), lambda y: oracles.cdf(data, vp, t, y[:, None])).statistic


x1 = oracles.sample(data, keys["data"], num)
sde, backward = EulerMaruyama(diffusion=g_vp, score=no_score), grids.uniform(500, 1.0, 0.0)
noising = sample(lambda t, x: beta(t) / 2 * x, x1, sde, times=backward, key=keys["noising"], trajectory=True).trajectory
for i in (0, 50, 150, 500):
    statistic = distance(1 - i / 500, noising[i])
    print(f"t = {1 - i / 500:.1f}: largest difference {statistic:.4f}, where 0.9 / sqrt(n) = {0.9 / num**0.5:.4f}")
    assert statistic < 2.5 / np.sqrt(num)

# %% [markdown]
# And back? To run the SDE backwards is not to flip the sign of its drift. From noise of variance 1, the drift
# $+\tfrac12\beta X$ with the same $g$ gives a variance with $\dot V = \beta V+\beta$, so that $V+1$ grows by the
# factor $e^T$: to $2e^{T}-1$, an explosion. Noise spreads in either direction of time; to undo the spreading, the
# drift has to know where the data are. What knows it is the score $s_t = \nabla\log p_t$, by [Theorem
# 2](04_continuity.ipynb#eq-4-7). With the exact velocity of the mixture, from which the library takes the score by way
# of the schedule, `EulerMaruyama` arrives at the data. (It stops a little before $t=1$, where the score by the
# schedule, $-E[x_0\mid x_t]/\sigma_t$, is a division by zero.)

# %%
noise = jax.random.normal(keys["noise"], (num, 1))
naive = sample(lambda t, x: beta(t) / 2 * x, noise, sde, times=500, key=keys["naive"]).x
print(f"without the score, t = 1: variance {naive.var():.0f}; 2 exp(T) - 1 = {2 * np.exp(clock[0]) - 1:.0f}")
assert abs(naive.var() / (2 * np.exp(clock[0]) - 1) - 1) < 0.25  # steps of 1/500 cost 7 per cent

v = oracles.velocity(data, vp)
forward = grids.uniform(500, 0.0, 0.998)
back = sample(v, noise, EulerMaruyama(vp, g_vp), times=forward, key=keys["back"], trajectory=True).trajectory
statistic = distance(0.998, back[-1])
print(f"with the score, t = 0.998: largest difference {statistic:.4f}, where 0.9 / sqrt(n) = {0.9 / num**0.5:.4f}")
assert statistic < 3 / np.sqrt(num)

axis, grid = np.linspace(-3, 3, 120)[:, None], np.linspace(0, 1, 101)
log_density = jax.vmap(oracles.log_prob, (None, None, 0, None))(data, vp, grid, axis)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.9), sharey=True)
titles = "Noising: from data, without the score", "Generation: from noise, with the score"
for ax, ends, paths, title in zip(axes, ((1, 0), (0, 0.998)), (noising, back), titles, strict=True):
    ax.contourf(grid, axis[:, 0], np.exp(log_density).T, levels=np.linspace(0, 0.8, 17), extend="max")
    ax.plot(np.linspace(*ends, 126), np.asarray(paths)[::4, :6, 0], color=INK, lw=0.5, ls="-")
    ax.set(title=title, xlabel="t", xlim=np.round(ends), ylim=(-3, 3))
axes[0].set_ylabel("x")
plt.show()

# %% [markdown]
# ## How wrong is the Euler-Maruyama method?
#
# There are two questions. *Weak* error: how wrong is the distribution, say a variance? *Strong* error: how far is the
# computed path from the true path that has the same noise? Generation needs only the first; the second explains both.
#
# Integrate [(2.2)](#eq-2-2) over one step, subtract [(2.3)](#eq-2-3), and expand about $X_t$, with
# $X_s-X_t\approx g\,(W_s-W_t)$. If $g$ may depend on $x$ as well (in one dimension; $f$ and $g$ smooth, with bounded
# derivatives), the step is off by
#
# <a id="eq-2-10"></a>
#
# $$
# f'g\int_t^{t+h}(W_s-W_t)\,\mathrm ds \;+\; g'g\int_t^{t+h}(W_s-W_t)\,\mathrm dW_s + \dots, \qquad
# \int_t^{t+h}(W_s-W_t)\,\mathrm dW_s = \frac{(\Delta W)^2-h}{2}, \tag{2.10}
# $$
#
# the latter by [(2.5)](#eq-2-5); the dots are terms of mean 0 no larger than the first one, and terms of order $h^2$.
# The first term has mean 0 and size $h^{3/2}$, since $W_s-W_t$ is of size $\sqrt h$ for a time $h$; the second has
# mean 0 and size $h$. As for the flow, errors are carried on with a bounded factor. But those of mean 0 in different
# steps are uncorrelated: their *squares* add up, and $1/h$ of them come to $h^{-1/2}$ times one.
#
# * **Strong order $\tfrac12$** where $g$ depends on $x$: $h^{-1/2}\cdot h = h^{1/2}$.
# * **Strong order 1** where it does not, as in all diffusion models: then $g' = 0$, and $h^{-1/2}\cdot h^{3/2} = h$.
# * **Weak order 1** in both cases. In a mean of $\varphi(X)$, terms of mean 0 count only through their products with
#   each other and with the noise, and those are of order $h^2$ a step ($E[\Delta W\int(W_s-W_t)\,\mathrm ds] = h^2/2$,
#   $E[\Delta W\,((\Delta W)^2-h)] = 0$). There are $1/h$ steps.

# %% [markdown]
# For two processes all of that is known in closed form, since the mean square of a difference is
# $E|X^{(h)}-X|^2 = E|X^{(h)}|^2+E|X|^2-2E[X^{(h)}X]$. *Ornstein-Uhlenbeck from $X_0=0$ to $t=1$:* the solution
# [(2.6)](#eq-2-6) and the method both integrate the same noise, the one with the kernel $e^{-\theta(1-s)}$, the other
# with $(1-\theta h)^m$ in a step that $m$ others follow. By Itô's isometry the three means are integrals of products
# of kernels, geometric sums. *Noise that depends on $x$:* for $\mathrm dX = \gamma X\,\mathrm dW$ from $X_0=1$, the
# solution is $e^{\gamma W_1-\gamma^2/2}$, and a step of the method multiplies by $1+\gamma\,\Delta W$. Per step, the
# three means grow by factors $1+\gamma^2h$, $e^{\gamma^2h}$ and $1+\gamma^2h$, so
#
# <a id="eq-2-11"></a>
#
# $$
# E\,\big|X^{(h)}_1-X_1\big|^2 = e^{\gamma^2} - (1+\gamma^2h)^{1/h}
# \;\approx\; \tfrac12\gamma^4e^{\gamma^2}\,h. \tag{2.11}
# $$
#
# To measure, we need solution and method on the *same* path: in each of 128 fine steps $\Delta W$ together with
# $I=\int e^{-\theta(t+h-s)}\,\mathrm dW_s$, two normal variables with variances $h$ and $(1-e^{-2\theta h})/2\theta$
# and covariance $(1-e^{-\theta h})/\theta$. Coarse steps get the sums of the fine increments, through
# `fm_jax.samplers.sde_step`, which takes its noise as an argument. Its other method, "heun", looks twice a step and
# has the weak order two. (Strong order 1.5, for noise as here, is to be had from
# `fm_jax.samplers.DiffraxSDE`.) In the figure dots are measured and lines are the closed forms.

# %%
num, fine, gamma = 20_000, 128, 0.5
cross, own = (1 - np.exp(-theta / fine)) / theta, (1 - np.exp(-2 * theta / fine)) / (2 * theta)
factor = np.linalg.cholesky([[1 / fine, cross], [cross, own]])
dW, pulled = (factor @ jax.random.normal(keys["paths"], (2, fine * num))).reshape(2, fine, num, 1)
exact_ou = g * jnp.tensordot(np.exp(-theta * (1 - np.arange(1, fine + 1) / fine)), pulled, axes=1)
exact_geometric = jnp.exp(gamma * dW.sum(axis=0) - gamma**2 / 2)


@jax.jit
def solve(increments):
    n = len(increments)

    def step(states, inputs):
        (euler, heun), (i, noise) = states, inputs
        euler = sde_step(drift, no_score, g, i / n, (i + 1) / n, euler, noise)
        return (euler, sde_step(drift, no_score, g, i / n, (i + 1) / n, heun, noise, method="heun")), None

    x = jnp.zeros_like(exact_ou)
    return jax.lax.scan(step, (x, x), (jnp.arange(n), increments * np.sqrt(n)))[0]


steps, measured = 2 ** np.arange(2, 8), []
for n in steps:
    increments = dW.reshape(n, fine // n, num, 1).sum(axis=1)
    euler, heun = solve(increments)
    geometric = jnp.prod(1 + gamma * increments, axis=0)
    strong = jnp.sqrt(jnp.stack([(euler - exact_ou) ** 2, (geometric - exact_geometric) ** 2]).mean(axis=(1, 2)))
    weak = jnp.stack([euler**2 - exact_ou**2, exact_ou**2 - heun**2]).mean(axis=(1, 2))
    measured.append(np.concatenate([strong, weak]))
measured = np.array(measured).T  # [strong, strong where g depends on x, weak, weak of Heun's method] by step size

# %% [markdown]
# The same four from the closed forms. A step of Heun's method multiplies by $1-\theta h+\theta^2h^2/2$ and adds
# $(1-\theta h/2)\,g\,\Delta W$.

# %%
h = 1 / steps
a, b, shared = 1 - theta * h, 1 - theta * h + (theta * h) ** 2 / 2, (1 - theta * h) * np.exp(-theta * h)
process = g**2 * (1 - np.exp(-2 * theta)) / (2 * theta)
scheme = g**2 * h * (1 - a ** (2 * steps)) / (1 - a**2)
heuns = g**2 * h * (1 - theta * h / 2) ** 2 * (1 - b ** (2 * steps)) / (1 - b**2)
both = g**2 * (1 - np.exp(-theta * h)) / theta * (1 - shared**steps) / (1 - shared)
geometric = np.exp(gamma**2) - (1 + gamma**2 * h) ** steps
exact = np.array([np.sqrt(scheme + process - 2 * both), np.sqrt(geometric), scheme - process, process - heuns])
names = "strong, g constant", "strong, g = 0.5 x", "weak, Euler-Maruyama", "weak, Heun"
ratio = measured / exact
for name, row, shown in zip(names, ratio, (6, 6, 6, 3), strict=True):  # then Heun's error drowns in its standard error
    print(f"{name:20} measured / exact at h = 1/4, 1/8, ...:", *(f"{each:.3f}" for each in row[:shown]))
assert np.abs(ratio[:3] - 1).max() < 0.1  # of 20,000 paths: standard errors are at most 1.5%
assert np.abs(ratio[3, :3] - 1).max() < 0.5

# %% [markdown]
# Both errors against the step: lines are the closed forms, markers what the paths gave. The slopes are the orders.

# %%
slopes = np.polyfit(np.log(h[2:]), np.log(exact[:, 2:]).T, 1)[0]
looks = (0, BLUE, "o", "-", 6), (0, ORANGE, "^", "--", 6), (1, BLUE, "o", "-", 6), (1, RED, "s", "-.", 3)
labels = "$g$ constant", "$g = 0.5\\,x$", "Euler-Maruyama", "Heun"
fig, axes = plt.subplots(1, 2, figsize=(7, 3.1))
for row, (side, color, marker, dash, shown) in enumerate(looks):
    ax, label = axes[side], f"{labels[row]}\nslope {slopes[row]:.2f}"
    ax.loglog(h, exact[row], color=color, ls=dash)
    ax.loglog(h[:shown], measured[row, :shown], marker, color=color, ls="")
    ax.annotate(label, (h[0], exact[row, 0]), (6, 0), textcoords="offset points", color=color, va="center")
    ax.set(xlabel="step h", xlim=(1 / 180, 1.6))
axes[0].set(title="Strong error: along the path", ylabel="root mean square, at t = 1", ylim=(3e-3, 0.4))
axes[1].set(title="Weak error: in the variance", ylabel="absolute difference, at t = 1", ylim=(2e-5, 0.6))
plt.show()
order = np.polyfit(np.log(h[2:]), np.log(measured[:3, 2:]).T, 1)[0]
print(
    f"order of Euler-Maruyama along the path {order[0]:.2f} (1), or {order[1]:.2f} (1/2) where the noise depends on x"
)
assert np.abs(order - (1, 0.5, 1)).max() < 0.1

# %% [markdown]
# A diffusion is a flow with noise, and the noise makes it forget. The Ornstein-Uhlenbeck process forgets everything
# but a normal distribution that we know, exponentially fast, and by another clock it is the noising process of
# diffusion models. Euler's method, with noise added, follows it with an error of order $h$ in law and, as long as the
# noise does not depend on $x$, in path too. What the noising makes of the data at each time is a family of
# distributions that can be written down without any process at all.
#
# Next: [Paths](03_paths.ipynb)
