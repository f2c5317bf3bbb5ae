# %% [markdown]
# # 3. Probability paths
#
# What should lie between noise and data? For a single data point that is easy to write down: shrink the noise towards
# the point. Averaged over the data, these *conditional paths* make the *marginal path*, which starts as noise and ends
# as the data. We draw from both, hold the samples against the exact density, derive the velocity and the score of the
# Gaussian path, and look at every schedule of the library.
#
# Previous: [Diffusions](02_diffusions.ipynb). There, and in [Flows](01_flows.ipynb), a velocity came first and the
# particles' distribution followed from it. Here we choose the distribution, at every time; the
# [next notebook](04_continuity.ipynb) finds the velocity.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.integrate
import scipy.stats
from lab import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, RED, SKY, film

from fm_jax import oracles, paths, samplers, schedules
from fm_jax.shapes import expand_time

jax.config.update("jax_enable_x64", True)  # double precision, so that "equal" can mean equal to ten digits
log_prob = jax.jit(oracles.log_prob, static_argnums=1)  # compiled once for each schedule and shape
coefficients = jax.jit(schedules.coefficients, static_argnums=0)
draw_data = jax.jit(oracles.sample, static_argnums=2)

# %% [markdown]
# ## One point at a time
#
# Let $p_{\text{init}}$ be a distribution that is easy to draw from and $p_{\text{data}}$ the one that we want. A
# **conditional path** is a family of densities $p_t(x \mid x_1)$, $0 \le t \le 1$, one family for each data point
# $x_1$, that leads from $p_{\text{init}}$ to that point: at $t = 1$ all its mass sits in $x_1$ (a point mass
# $\delta_{x_1}$). The **marginal path** is its average over the data:
#
# <a id="eq-3-1"></a>
#
# $$
# p_0(\cdot \mid x_1) = p_{\text{init}}, \qquad p_1(\cdot \mid x_1) = \delta_{x_1}, \qquad
# p_t(x) = \int p_t(x \mid x_1)\, p_{\text{data}}(x_1)\, dx_1. \tag{3.1}
# $$
#
# Its ends are right whatever happens in between. At $t = 0$ the integrand is
# $p_{\text{init}}(x)\, p_{\text{data}}(x_1)$, which integrates to $p_{\text{init}}(x)$. At $t = 1$ it is
# $\delta_{x_1}(x)\, p_{\text{data}}(x_1)$, which leaves $p_{\text{data}}(x)$.
#
# It is also easy to draw from, even where its density is out of reach. Draw a data point $x_1$, then a point $x_t$ from
# $p_t(\cdot \mid x_1)$: the pair has the density $p_t(x \mid x_1)\, p_{\text{data}}(x_1)$, and to forget $x_1$ is to
# integrate over it. That is how every training step gets its inputs.
#
# ## The Gaussian path
#
# The conditional path that nearly everyone uses moves noise $x_0 \sim p_{\text{init}}$, drawn independently of the
# data, towards $x_1$:
#
# <a id="eq-3-2"></a>
#
# $$
# x_t = \alpha_t\, x_1 + \sigma_t\, x_0, \qquad \alpha_0 = \sigma_1 = 0, \quad \alpha_1 = \sigma_0 = 1, \tag{3.2}
# $$
#
# with smooth $\alpha_t$ and $\sigma_t$, positive in between, whose ratio $\alpha_t / \sigma_t$ increases. (The course
# notes write $z$, $\epsilon$ and $\beta_t$ for our $x_1$, $x_0$ and $\sigma_t$.) Given $x_1$, this is the noise scaled
# by $\sigma_t$ and shifted by $\alpha_t x_1$. A change of variables gives its density where $\sigma_t > 0$, in $d$
# dimensions; for standard normal noise it is a Gaussian:
#
# <a id="eq-3-3"></a>
#
# $$
# p_t(x \mid x_1) = \frac{1}{\sigma_t^d}\; p_{\text{init}}\Big(\frac{x - \alpha_t x_1}{\sigma_t}\Big),
# \quad\text{that is}\quad \mathcal N\big(x;\ \alpha_t x_1,\ \sigma_t^2 I\big)
# \ \text{ if }\ p_{\text{init}} = \mathcal N(0, I). \tag{3.3}
# $$
#
# A data set of five numbers shows what the average (3.1) does. It is a Gaussian mixture whose components have no width,
# so that `fm_jax.oracles.gaussian_mixture` holds it, and `fm_jax.oracles.log_prob` has its marginal along any path in
# closed form. Each band below is the conditional density of one data point, divided by five; stacked, they fill the
# marginal.

# %%
five = np.array([-2.0, -1.1, 0.1, 0.6, 1.9])
dataset, schedule = oracles.gaussian_mixture(five[:, None], 0.0), schedules.Linear()
x = np.linspace(-3.4, 3.4, 681)
fig, axes = plt.subplots(1, 5, figsize=(7, 2.1), sharex=True)
for t, ax in zip([0.0, 0.3, 0.6, 0.8, 0.92], axes, strict=True):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    bands = scipy.stats.norm.pdf(x, alpha * five[:, None], sigma) / len(five)
    marginal = np.exp(log_prob(dataset, schedule, t, x[:, None]))
    assert np.abs(bands.sum(axis=0) - marginal).max() < 1e-12
    ax.stackplot(x, bands, colors=[BLUE, SKY, GREEN, ORANGE, PINK], edgecolor="white", linewidth=0.4)
    ax.plot(x, marginal, color=INK, linestyle="-", linewidth=1)
    ax.plot(five, 0 * five, "|", color=INK, markersize=7, clip_on=False)
    ax.set(title=f"t = {t}", yticks=[], xticks=[-2, 0, 2], xlabel="x")
axes[0].set_ylabel("density (each to its own scale)")
plt.show()

# %% [markdown]
# The ticks on the axis mark the data. At the left all five densities are the same standard normal; each then drifts to
# its own point and narrows, and at $t = 1$ five spikes are left. The asserted equality is (3.1), to rounding.
#
# ## The same in the plane, in motion
#
# First the conditional path to one point, the cross; then the marginal path to a spiral of 24 Gaussians. The shading is
# the exact density, in seven steps up to its maximum. The dots are samples $x_t$ made by (3.2): all with that one
# $x_1$, or with an $x_1$ for each. Every dot moves in a straight line at constant speed, because the schedule is
# `fm_jax.schedules.Linear`, $\alpha_t = t$ and $\sigma_t = 1 - t$.

# %%
angle = np.sqrt(np.linspace(0.6, 13, 24)) * np.pi  # about equally far from one another along the spiral
spiral = oracles.gaussian_mixture(0.2 * angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), 0.14)
one = oracles.gaussian_mixture(spiral.means[-1:], 0.0)
key_x0, key_x1 = jax.random.split(jax.random.key(0))
x0, x1 = jax.random.normal(key_x0, (900, 2)), draw_data(spiral, key_x1, 900)
move = jax.jit(paths.AffinePath(schedule).sample)
side = np.linspace(-2.9, 2.9, 80)
plane = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)


def draw(t, *axes):
    ends = jnp.broadcast_to(one.means, x1.shape), x1
    for ax, mixture, x1_of_each, num in zip(axes, (one, spiral), ends, (40, 130), strict=True):
        density = np.exp(log_prob(mixture, schedule, t, plane)).reshape(80, 80)
        ax.contourf(side, side, density / density.max(), levels=np.linspace(0.05, 1, 8), vmin=-0.2, vmax=1.5)
        ax.plot(*move(None, t, x0, x1_of_each).x_t[:num].T, ".", color=INK, markersize=1.8)
        ax.set(xticks=[], yticks=[], xlim=(-2.9, 2.9), ylim=(-2.9, 2.9))
    axes[0].plot(*one.means[0], "x", color=INK, markersize=8, markeredgewidth=2)
    axes[0].set_title("given one data point")
    axes[1].set_title("over all the data")


film(
    draw,
    np.linspace(0, 0.96, 14),
    alt="A Gaussian cloud contracts onto one point; beside it the same cloud turns into a spiral, dots on the density.",
    panels=2,
    size=(2.2, 2.3),
)

# %% [markdown]
# Positions are interpolated here, not densities: $p_t$ is the data shrunk by $\alpha_t$ and blurred by noise of width
# $\sigma_t$, and not the cross-fade $(1 - t)\, p_{\text{init}} + t\, p_{\text{data}}$, in which nothing moves.
#
# ## The integral has a closed form for mixtures
#
# Take data that has a density, three Gaussians on a line. A component $x_1 \sim \mathcal N(m, c^2)$ and an independent
# $x_0 \sim \mathcal N(0, 1)$ make $x_t \sim \mathcal N(\alpha_t m,\ \alpha_t^2 c^2 + \sigma_t^2)$, so the marginal is
# again a mixture of three Gaussians: that is the oracle. We compare it with the integral (3.1) by the trapezoidal rule
# over $x_1$, whose error, for smooth functions that vanish with all their derivatives at both ends, falls faster than
# any power of the step.

# %%
line = oracles.gaussian_mixture([[-1.5], [0.2], [1.4]], [0.35, 0.2, 0.3], [0.4, 0.25, 0.35])
nodes, x = np.linspace(-4, 4, 2001), np.linspace(-3, 3, 61)
p_data = np.exp(log_prob(line, schedule, 1.0, nodes[:, None]))  # at t = 1 the marginal is the data's density
for t in (0.1, 0.5, 0.9):
    conditional = scipy.stats.norm.pdf(x[:, None], schedule.alpha(t) * nodes, schedule.sigma(t))
    integral = scipy.integrate.trapezoid(conditional * p_data, nodes)
    difference = np.abs(integral - np.exp(log_prob(line, schedule, t, x[:, None]))).max()
    print(f"t = {t}: integral (3.1) and closed form differ by at most {difference:.0e}")
    assert difference < 1e-11

# %% [markdown]
# ## The conditional velocity
#
# With $x_1$ fixed, (3.2) is a [flow](01_flows.ipynb#eq-1-1): each $x_0$ moves along
# $\phi_t(x_0) = \alpha_t x_1 + \sigma_t x_0$, with velocity $\alpha_t' x_1 + \sigma_t' x_0$. To write this as a field,
# a function of the place $x$, ask which $x_0$ is at $x$ now: where $\sigma_t > 0$ it is
# $x_0 = (x - \alpha_t x_1) / \sigma_t$. Inserted,
#
# <a id="eq-3-4"></a>
#
# $$
# u_t(x \mid x_1) = \alpha_t'\, x_1 + \sigma_t'\, \frac{x - \alpha_t x_1}{\sigma_t}
# = \Big(\alpha_t' - \frac{\sigma_t'}{\sigma_t}\, \alpha_t\Big) x_1 + \frac{\sigma_t'}{\sigma_t}\, x,
# \qquad u_t(x_t \mid x_1) = \alpha_t' x_1 + \sigma_t' x_0. \tag{3.4}
# $$
#
# The last form, along the path, is the regression target of flow matching, written $u_t$ for short. It does not divide
# by $\sigma_t$, and it holds for a source of any shape: we did not use that the noise is Gaussian.
# `fm_jax.paths.AffinePath` returns it, with $\alpha_t'$ and $\sigma_t'$ from `fm_jax.schedules.coefficients`, by
# automatic differentiation. We compare it, on every schedule, with the field at $x_t$, and with a central difference of
# $x_t$ in time, whose error is $O(h^2)$.

# %%
BUILT_IN = (schedules.Linear(), schedules.Polynomial(2.0), schedules.Cosine(), schedules.LinearVP())
BUILT_IN += (schedules.VP(), schedules.DDPM(), schedules.VE(), schedules.EDM())
SCHEDULES = {type(schedule).__name__: schedule for schedule in BUILT_IN}
t, h = (jnp.arange(50, 950) + 0.5) / 1000, 1e-5  # between the entries of DDPM's table, where its slopes jump
samples = {}
print("largest difference of u_t, relative to its largest value")
for name, schedule in SCHEDULES.items():
    move = jax.jit(paths.AffinePath(schedule).sample)
    sample, later, earlier = (move(None, time, x0, x1) for time in (t, t + h, t - h))
    samples[name] = sample
    alpha, sigma, d_alpha, d_sigma = coefficients(schedule, expand_time(t, x1))
    field = (d_alpha - d_sigma / sigma * alpha) * x1 + d_sigma / sigma * sample.x_t
    errors = [jnp.abs(sample.u_t - u).max() for u in (field, (later.x_t - earlier.x_t) / (2 * h))]
    place, time = np.array(errors) / jnp.abs(sample.u_t).max()
    print(f"{name:>10}: from the field {place:.0e}, from differences in time {time:.0e}")
    assert place < 1e-11
    assert time < 1e-6

# %% [markdown]
# On the linear schedule the field is $(x_1 - x) / (1 - t)$, and the target is $x_1 - x_0$ at all times. So
# [Euler's method](01_flows.ipynb#eq-1-4) follows this conditional flow without error, whatever the step, while on a
# curved path it misses. The flow that we will sample from is the marginal one, which is not straight even here; how
# much of the advantage survives is the subject of [Couplings](08_couplings.ipynb).

# %%
for name, num_steps in (("Linear", 1), ("Linear", 8), ("Cosine", 8), ("Cosine", 64)):
    schedule = SCHEDULES[name]

    def u(t, x, schedule=schedule):
        alpha, sigma, d_alpha, d_sigma = coefficients(schedule, t)
        return d_alpha * x1 + d_sigma * (x - alpha * x1) / sigma

    end = samplers.sample(u, x0, samplers.RungeKutta("euler"), times=num_steps).x
    miss = jnp.linalg.norm(end - x1, axis=1).mean()
    print(f"{name}, {num_steps:2d} Euler steps along u_t(x | x1): {miss:.0e} from x1 on average")
    assert miss < 1e-12 if name == "Linear" else miss > 1e-6

# %% [markdown]
# ## The conditional score
#
# The score of a density is the gradient of its logarithm in $x$. By (3.3), for standard normal noise,
# $\log p_t(x \mid x_1)$ is $-\lVert x - \alpha_t x_1 \rVert^2 / (2 \sigma_t^2)$ plus a constant, hence
#
# <a id="eq-3-5"></a>
#
# $$
# \nabla_x \log p_t(x \mid x_1) = -\frac{x - \alpha_t x_1}{\sigma_t^2},
# \qquad\text{which is}\quad -\frac{x_0}{\sigma_t}\quad\text{at}\quad x = x_t. \tag{3.5}
# $$
#
# Up to a known factor the score *is* the noise, with its sign turned: to climb towards likelier places is to take noise
# away. Unlike the velocity this does need a Gaussian source. `AffinePath.targets` returns it; we hold it against the
# gradient of (3.3) by automatic differentiation.

# %%
gradient = jax.jit(jax.vmap(jax.grad(lambda x, mean, std: jax.scipy.stats.norm.logpdf(x, mean, std).sum())))
worst = 0.0
for name, sample in samples.items():
    schedule = SCHEDULES[name]
    score = np.array(paths.AffinePath(schedule).targets(sample)["score"])
    alpha, sigma, *_ = coefficients(schedule, expand_time(t, x1))
    by_autodiff = gradient(sample.x_t, alpha * x1, sigma)
    worst = max(worst, np.abs(score - by_autodiff).max() / np.abs(score).max())
print(f"score -x0 / sigma against the gradient of log p_t(x | x1), all schedules: relative difference {worst:.0e}")
assert worst < 1e-9

# %% [markdown]
# ## Every schedule
#
# A schedule is the pair $\alpha_t, \sigma_t$. These are the library's, with $s = 1 - t$, diffusion's direction of time:
#
# | `fm_jax.schedules` | $\alpha_t$ | $\sigma_t$ | $\alpha_t^2 + \sigma_t^2 = 1$ | departs from (3.2) by |
# |:--|:--|:--|:-:|:--|
# | `Linear` | $t$ | $1 - t$ | | |
# | `Polynomial` | $t^n$ | $1 - t^n$ | | |
# | `Cosine` | $\sin(\pi t / 2)$ | $\cos(\pi t / 2)$ | yes | |
# | `LinearVP` | $t$ | $\sqrt{1 - t^2}$ | yes | |
# | `VP` | $e^{-T_s/2}$ | $\sqrt{1 - e^{-T_s}}$ | yes | a little signal at $t = 0$ |
# | `DDPM` | $\sqrt{\bar\alpha_n}$ | $\sqrt{1 - \bar\alpha_n}$ | yes | a little signal at $t = 0$ |
# | `VE` | $1$ | $\sigma_{\max}^{\,s}\, \sigma_{\min}^{\,t}$ | | all the signal at $t = 0$, some noise at $t = 1$ |
# | `EDM` | $1$ | $\sigma_{\max}\, s$ | | all the signal at $t = 0$ |
#
# * In `VP` (Song et al. 2021, arXiv:2011.13456), $T_s = \beta_{\min} s + (\beta_{\max} - \beta_{\min}) s^2 / 2$; `VE`
#   is theirs too. `EDM` is that of Karras et al. (2022, arXiv:2206.00364).
# * In `DDPM` (Ho et al. 2020, arXiv:2006.11239), $\bar\alpha_n = \prod_{i \le n} (1 - \beta_i)$ at $s = n / N$, with
#   $\log \alpha_t$ linear in between.
# * `Linear(sigma_min=...)` (Lipman et al. 2022, arXiv:2210.02747) has $\sigma_t = 1 - (1 - \sigma_{\min})\, t$ and ends
#   in a Gaussian around each point instead of the point itself.
#
# A schedule also states its `domain`, the times at which $\alpha_t$, $\sigma_t$ and their slopes are finite: `LinearVP`
# and `VP` leave out $t = 1$, where $\sigma_t$ falls infinitely fast, and `DDPM` stops at the first entry of its table.
#
# More telling than the coefficients is their **signal-to-noise ratio**, $\alpha_t^2 / \sigma_t^2$ (Kingma et al. 2021,
# arXiv:2107.00630). Since $\alpha_t^2 / (\alpha_t^2 + \sigma_t^2) = 1 / (1 + e^{-\lambda_t})$ with its logarithm
# $\lambda_t$, and likewise for $\sigma_t$ with the other sign,
#
# <a id="eq-3-6"></a>
#
# $$
# \lambda_t = \log \frac{\alpha_t^2}{\sigma_t^2}, \qquad
# \frac{x_t}{\sqrt{\alpha_t^2 + \sigma_t^2}} = \frac{x_1}{\sqrt{1 + e^{-\lambda_t}}}
# + \frac{x_0}{\sqrt{1 + e^{\lambda_t}}}. \tag{3.6}
# $$
#
# The right-hand side knows the schedule only through $\lambda_t$. So all schedules pass through the same densities up
# to a change of scale; they differ in where they start, where they stop and how fast they go. We check the table, the
# ends, and (3.6): each schedule's density at $\lambda_t = -4, 0, 4$, rescaled, is that of `Linear`.

# %%
times = np.linspace(0, 1, 1001)  # DDPM's table has an entry at each
s = 1 - times
T = 0.1 * s + 19.9 * s**2 / 2
bar = np.append(np.cumprod(1 - np.array(schedules.linear_betas()))[::-1], 1)
table = {"Linear": (times, s), "Polynomial": (times**2, 1 - times**2)}
table |= {"Cosine": (np.sin(np.pi * times / 2), np.cos(np.pi * times / 2)), "LinearVP": (times, np.sqrt(1 - times**2))}
table |= {"VP": (np.exp(-T / 2), np.sqrt(1 - np.exp(-T))), "DDPM": (np.sqrt(bar), np.sqrt(1 - bar))}
table |= {"VE": (np.ones_like(s), 50**s * 0.01**times), "EDM": (np.ones_like(s), 80 * s)}
y, density_of_linear = np.linspace(-4, 4, 401), {}


@partial(jax.jit, static_argnums=0)
def normalised_density(schedule, log_snr):
    t = schedule.t_from_log_snr(log_snr)
    scale = jnp.hypot(schedule.alpha(t), schedule.sigma(t))
    return scale * jnp.exp(oracles.log_prob(line, schedule, t, scale * y[:, None]))


print("            alpha(0)  sigma(1)  alpha² + sigma² = 1   log-SNR in its domain   densities as Linear's")
for name, schedule in SCHEDULES.items():
    alpha, sigma, *_ = map(np.array, coefficients(schedule, times))
    assert np.abs(alpha - table[name][0]).max() < 1e-9
    assert np.abs(sigma - table[name][1]).max() < 1e-7  # near 0, the table's square roots lose half the digits
    preserves = bool(np.abs(alpha**2 + sigma**2 - 1).max() < 1e-12)
    assert preserves == (name in ("Cosine", "LinearVP", "VP", "DDPM"))
    assert (abs(alpha[0]) < 1e-12) == (name in ("Linear", "Polynomial", "Cosine", "LinearVP"))
    assert (abs(sigma[-1]) < 1e-12) == (name != "VE")
    difference = 0.0
    for snr in (-4.0, 0.0, 4.0):
        density = np.array(normalised_density(schedule, snr))
        difference = max(difference, np.abs(density - density_of_linear.setdefault(snr, density)).max())
    assert difference < 1e-9
    first, last = (float(schedules.log_snr(schedule, end)) for end in schedule.domain)
    row = f"{alpha[0]:8.4f}  {sigma[-1]:8.2f}  {'yes' if preserves else 'no':^19}  {first:9.1f} to {last:5.1f}"
    print(f"{name:>10}  {row}          to {difference:.0e}")

# %%
fig, axes = plt.subplots(4, 4, figsize=(7, 6.4), sharex=True, gridspec_kw={"height_ratios": [1, 0.75] * 2})
for i, (name, schedule) in enumerate(SCHEDULES.items()):
    above, below = axes[2 * (i // 4) : 2 * (i // 4) + 2, i % 4]
    t = samplers.grids.cosine(1000, *schedule.domain)  # dense at both ends
    alpha, sigma, *_ = coefficients(schedule, t)
    unit = max(1.0, float(sigma[0]))
    above.plot(t, alpha, color=BLUE, linestyle="-")
    above.plot(t, np.array(sigma) / unit, color=ORANGE, linestyle="--")
    above.set(title=name, ylim=(-0.05, 1.12), yticks=[0, 0.5, 1], xlim=(0, 1))
    below.axhline(0, color=GREY, linewidth=0.6)
    below.plot(t[1:-1], schedules.log_snr(schedule, t[1:-1]), color=GREEN, linestyle="-.")
    below.set(ylim=(-13, 13), yticks=[-10, 0, 10])
    below.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    for ax, label in ((above, "coefficient"), (below, "log-SNR")):
        ax.set_ylabel("" if i % 4 else label)
        ax.tick_params(labelleft=not i % 4)
    if i in (0, 6, 7):
        above.text(0.3, 0.75 if i == 0 else 0.2, "σ" if i == 0 else f"σ / {unit:.0f}", color=ORANGE)
        above.text(0.6, 0.75 if i == 0 else 0.85, "α", color=BLUE)
fig.supxlabel("t (0 is noise, 1 is data)", fontsize=9)
plt.show()

# %% [markdown]
# Solid blue is the signal $\alpha_t$, dashed orange the noise $\sigma_t$; below them stands $\lambda_t$. `Linear` and
# `Polynomial` draw one curve $(\alpha_t, \sigma_t)$ at two speeds, and the four variance-preserving schedules another
# one, the quarter circle, at four. `VE` and `EDM` never let go of the data: noise alone is a good start for them
# because $\sigma_{\max}$ is large, and `fm_jax.paths.start` scales the noise to it.
#
# ## Does sampling give the exact marginal?
#
# For each schedule, at five times of its domain, we draw pairs $(x_0, x_1)$, move them to $x_t$ by (3.2), and measure
# the Kolmogorov-Smirnov distance to the oracle's `fm_jax.oracles.cdf`: the largest gap between the distribution
# function of the sample and the exact one. For $n$ correct samples it is $0.87 / \sqrt n$ on average, and above
# $1.63 / \sqrt n$ once in a hundred times. The largest of forty such distances deserves a line of its own, with a
# hundredth shared among the forty tests (which is safe although all use the same pairs).

# %%
num, distance = 20_000, np.zeros((len(SCHEDULES), 5))
single, largest = (scipy.stats.kstwobign.isf(p) / np.sqrt(num) for p in (0.01, 0.01 / distance.size))
key_x0, key_x1 = jax.random.split(jax.random.key(1))
x0, x1 = jax.random.normal(key_x0, (num, 1)), draw_data(line, key_x1, num)


@partial(jax.jit, static_argnums=0)
def sample_and_cdf(schedule, t, x0, x1):
    x_t = paths.AffinePath(schedule).sample(None, t, x0, x1).x_t
    return x_t, oracles.cdf(line, schedule, t, x_t)


fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), gridspec_kw={"width_ratios": [1, 1.3]})
for row, (name, schedule) in enumerate(SCHEDULES.items()):
    for column, t in enumerate(np.linspace(*schedule.domain, 5)):
        x_t, u = sample_and_cdf(schedule, t, x0, x1)
        distance[row, column] = scipy.stats.kstest(u, "uniform", method="asymp").statistic
        if name == "Cosine":
            counts, edges = np.histogram(x_t, 80, (-4, 4))
            left.stairs(column + 1.1 * counts / num * 10, edges, baseline=column, color=PALE, fill=True)
            left.plot(y, column + 1.1 * np.exp(log_prob(line, schedule, t, y[:, None])), color=BLUE, linestyle="-")
left.set(title="Cosine: 20,000 samples, exact density", xlabel="x", xlim=(-3.4, 3.4))
left.set_yticks(range(5), ["t = 0", "¼", "½", "¾", "1"])
for column, marker in enumerate("ov^sD"):
    right.plot(distance[:, column], np.arange(8) + 0.12 * (column - 2), marker, color=BLUE)
for value, text, color, dash in ((single, "1% of one ", ORANGE, "--"), (largest, " of 40", RED, ":")):
    right.axvline(value, color=color, linestyle=dash)
    right.text(value, -0.8, text, color=color, ha="left" if text[0] == " " else "right", va="center")
right.set(title="From sampled to exact marginal", xlim=(0, 0.0185), ylim=(7.6, -1.3), xticks=[0, 0.005, 0.01, 0.015])
right.set_xlabel("Kolmogorov-Smirnov distance\n(● ▼ ▲ ■ ◆ from the first to the last time)")
right.set_yticks(range(8), SCHEDULES)
plt.show()
print(f"largest of 40 Kolmogorov-Smirnov distances: {distance.max():.4f} (1% critical value: {largest:.4f})")
assert distance.max() < scipy.stats.kstwobign.isf(1e-4 / distance.size) / np.sqrt(num)

# %% [markdown]
# A path for one point, averaged over the data, is a path from noise to data, and samples made by drawing $x_1$ and
# mixing in noise have exactly the marginal density, on every schedule. Velocity and score are known in closed form
# *given* $x_1$. What is still missing is a velocity that need not be told where each particle is going.
#
# Next: [The continuity equation](04_continuity.ipynb).
