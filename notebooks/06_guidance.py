# %% [markdown]
# # 6. Guidance
#
# How does one ask a flow for a particular kind of sample, and what does it return when one asks for it emphatically?
# Bayes' rule turns an unconditional velocity into a conditional one, exactly, at guidance scale 1; at larger scales the
# sampler follows the scores of tilted densities without ever sampling the tilted density. We confirm the first by
# comparing velocities, and measure the second: the missing term is derived, integrated along the way, and accounts for
# the difference to the last digit.
#
# Before this: [the losses](05_losses.ipynb), where velocity, data, noise and score became four words for one field. We
# build on the marginal velocity [(4.4)](04_continuity.ipynb#eq-4-4) and the conversion [(5.6)](05_losses.ipynb#eq-5-6).

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from lab import BLUE, GREY, ORANGE, RED, film
from scipy.integrate import cumulative_simpson, quad

from fm_jax import oracles
from fm_jax.guidance import Rescale, ZeroStar, classifier, classifier_free, classifier_free_batched
from fm_jax.likelihood import encode_and_log_prob
from fm_jax.nfe import Counted
from fm_jax.samplers import RungeKutta, grids, sample
from fm_jax.schedules import VP, Cosine, Linear

jax.config.update("jax_enable_x64", True)  # identities are checked to many digits
key_points, key_times, key_x0, key_picture = jax.random.split(jax.random.key(6), 4)

# %% [markdown]
# ## Asking for a class
#
# Data come with a label $y$: a class, a caption, a measurement. To generate *with guidance* is to draw from
# $p(x\mid y)$ instead of $p(x)$. Nothing new has to be invented: $p(x\mid y)$ is a distribution like any other, with
# its own path $p_t(x\mid y)$ and its own marginal velocity $v_t(x\mid y)$. One network serves all labels if $y$ is an
# input,
#
# $$
# L(\theta) = \mathbb{E}\,\big|v^\theta_t(x_t, y) - u_t\big|^2, \qquad
# (x_1, y)\sim p_\text{data},\quad t\sim U[0, 1],\quad x_0\sim\mathcal N(0, I),
# $$
#
# and one that hears "no label" ($y$ replaced by $\varnothing$ in some of the examples) learns the unconditional
# $v_t(x)$ beside it. Both follow from Theorem 3, [(5.3)](05_losses.ipynb#eq-5-3): the minimiser is the mean of $u_t$
# given what the network sees. The mean given $x_t$ alone is that of the means given $x_t$ and $y$,
# $v_t(x) = \sum_y p_t(y\mid x)\, v_t(x\mid y)$.
#
# Our world is a plane with two labels. The wanted class is two Gaussians; the other class is one, and overlaps with one
# of the two. All densities, scores and velocities have closed forms, from `fm_jax.oracles.gaussian_mixture`.

# %%
schedule = Linear()
wanted = oracles.gaussian_mixture([[-1.0, 0.8], [1.5, 0.5]], 0.5)
other = oracles.gaussian_mixture([[-0.8, -0.9]], 0.7)
everything = oracles.gaussian_mixture([[-1.0, 0.8], [1.5, 0.5], [-0.8, -0.9]], [0.5, 0.5, 0.7])  # p(wanted) = 2/3
fields = (jax.jit(oracles.velocity(mixture, schedule)) for mixture in (wanted, other, everything))
v_c, v_other, v_u = (Counted(field, 1) for field in fields)  # a call stands for one network evaluation
log_p = jax.jit(oracles.log_prob, static_argnames="schedule")


def log_p_y(t, x, schedule=schedule):
    """The exact classifier of noisy data: log p_t(wanted | x), in nats."""
    return np.log(2 / 3) + log_p(wanted, schedule, t, x) - log_p(everything, schedule, t, x)


x = 1.5 * np.asarray(jax.random.normal(key_points, (500, 2)))
t = jax.random.uniform(key_times, (500,), minval=0.05, maxval=0.95)
p_y = np.exp(log_p_y(t, x))[:, None]
gap = np.abs(p_y * v_c(t, x) + (1 - p_y) * v_other(t, x) - v_u(t, x)).max()
print(f"mean of the classes' velocities less the unconditional velocity: at most {gap:.0e}")
assert gap < 1e-10

# %% [markdown]
# ## Classifier guidance
#
# Suppose that there is an unconditional flow, and somebody else's classifier of *noisy* data, $p_t(y\mid x)$. Bayes'
# rule says $p_t(x\mid y) = p_t(x)\,p_t(y\mid x)/p(y)$. Take the logarithm and the gradient; $p(y)$ does not depend on
# $x$:
#
# <a id="eq-6-1"></a>
#
# $$
# \nabla\log p_t(x\mid y) = \nabla\log p_t(x) + \nabla\log p_t(y\mid x). \tag{6.1}
# $$
#
# What does this do to the velocity? On a Gaussian path $x_t = \alpha_t x_1 + \sigma_t x_0$, write $D$ and $N$ for the
# means of data and noise given $x_t = x$. Then $x = \alpha_t D + \sigma_t N$, $v_t = \dot\alpha_t D + \dot\sigma_t N$,
# and the score is $s_t = -N/\sigma_t$. Put $N = -\sigma_t s_t$ and $D = (x + \sigma_t^2 s_t)/\alpha_t$ into the second:
#
# <a id="eq-6-2"></a>
#
# $$
# v_t(x) = \frac{\dot\alpha_t}{\alpha_t}\,x + b_t\,\nabla\log p_t(x), \qquad
# b_t = \sigma_t^2\,\frac{\dot\alpha_t}{\alpha_t} - \sigma_t\dot\sigma_t, \qquad\text{hence}\qquad
# v_t(x\mid y) = v_t(x) + b_t\,\nabla\log p_t(y\mid x). \tag{6.2}
# $$
#
# (In the notes this is $a_t x + b_t\nabla\log p_t$, with $\beta_t$ for our $\sigma_t$.) The last equality is the
# difference of the first for $p_t(x\mid y)$ and for $p_t(x)$: the drift $\dot\alpha_t x/\alpha_t$ is the same for both.
# It needs $\alpha_t > 0$; and $b_t = \tfrac12\sigma_t^2\,\frac{\mathrm d}{\mathrm dt} \log(\alpha_t^2/\sigma_t^2)$ is
# positive whenever the signal-to-noise ratio grows. Where $\alpha_t\to 0$, $b_t$ grows like $1/\alpha_t$ while the
# gradient of the classifier shrinks like $\alpha_t$: pure noise has no class.
#
# So guidance at scale 1 is no heuristic. With the exact classifier, `fm_jax.guidance.classifier` has to return the
# conditional velocity itself, for any schedule.

# %%
for each in (Linear(), VP()):
    exact = oracles.velocity(wanted, each)
    led = classifier(oracles.velocity(everything, each), functools.partial(log_p_y, schedule=each), 1.0, each)
    gap = np.abs(jax.jit(led)(t, x) - jax.jit(exact)(t, x)).max()
    print(f"{each}: classifier guidance of scale 1 less the conditional velocity, at most {gap:.0e}")
    assert gap < 1e-9

# %% [markdown]
# In the picture the lines are levels of $p_t(y\mid x)$, the crosses are the means $\alpha_t m$ of the three Gaussians,
# and the arrows are $b_t\nabla\log p_t(y\mid x)$, all that guidance adds. Early on, every point is two thirds likely to
# become a wanted one, and the arrows say one thing everywhere: go from the mean of everything towards the mean of the
# wanted class. Later there is a border, and the arrows end beyond it: a point that is certainly of the wanted class
# needs no push.

# %%
ticks = np.linspace(-3, 3.5, 53)
grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
sparse = (slice(2, None, 6), slice(2, None, 6))
figure, axes = plt.subplots(1, 3, figsize=(7, 2.6), sharey=True)
for time, ax in zip((0.1, 0.5, 0.9), axes, strict=True):
    odds = np.exp(log_p_y(time, grid)).reshape(53, 53)
    lines = ax.contour(
        ticks, ticks, odds, levels=(0.1, 0.5, 0.9), colors=GREY, linestyles=("dotted", "solid", "dashed")
    )
    ax.clabel(lines, fmt="%.1f", fontsize=7)
    arrows = np.subtract(v_c(time, grid), v_u(time, grid)).reshape(53, 53, 2)[sparse]
    ax.quiver(ticks[sparse[0]], ticks[sparse[0]], *np.moveaxis(arrows, 2, 0), color=BLUE, scale=22, width=0.007)
    ax.plot(*(schedule.alpha(time) * everything.means).T, "+", color=RED, markersize=7)
    ax.set(title=f"t = {time}", aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
axes[0].set_ylabel("lines: p(wanted | x) at time t\narrows: what guidance adds")
plt.show()

# %% [markdown]
# ## Scale, and guidance without a classifier
#
# Dhariwal and Nichol (2021, arXiv:2105.05233) found that pictures improve when the classifier is listened to more than
# Bayes would, by a **guidance scale** $w > 1$:
#
# <a id="eq-6-3"></a>
#
# $$
# v^w_t(x) = v_t(x) + w\,b_t\,\nabla\log p_t(y\mid x). \tag{6.3}
# $$
#
# Ho and Salimans (2022, arXiv:2207.12598) got rid of the classifier. By [(6.2)](#eq-6-2), $b_t\nabla\log p_t(y\mid x)$
# *is* the difference $v_t(x\mid y) - v_t(x)$ of two velocities that one network already has:
#
# <a id="eq-6-4"></a>
#
# $$
# v^w_t(x) = v_t(x) + w\,\big(v_t(x\mid y) - v_t(x)\big) = (1-w)\,v_t(x) + w\,v_t(x\mid y). \tag{6.4}
# $$
#
# This is **classifier-free guidance** (CFG), `fm_jax.guidance.classifier_free`. Scale $w = 0$ ignores the label,
# $w = 1$ is conditional sampling, $w > 1$ exaggerates the difference. (Their $w$ is our $w - 1$.) For exact fields the
# two kinds of guidance are the same; for trained ones they differ by their errors, and CFG does not divide by
# $\alpha_t$, which would amplify them.
#
# The price is two velocities a step instead of one, twice the network evaluations (NFE). The library counts them. In
# `fm_jax.guidance.classifier_free_batched` both come from one call of twice the batch.

# %%
w = 4.0
cfg = classifier_free(v_c, v_u, w)
led = classifier(v_u, log_p_y, w, schedule)
gap = np.abs(jax.jit(led)(t, x) - cfg(t, x)).max()
print(f"w = {w:.0f}: classifier-free less classifier guidance, at most {gap:.0e}")
assert gap < 1e-9


def one_network(t, x, cond):
    """Stands for a network with a label: both fields, chosen by cond (1 wanted, 0 no label)."""
    return jnp.where(cond[:, None] == 1, v_c(t, x), v_u(t, x))


batched = classifier_free_batched(Counted(one_network, 1), "velocity", schedule, np.ones(len(x), int), 0, w)
assert np.abs(jax.jit(batched)(t, x) - cfg(t, x)).max() < 1e-12
for name, v in {"conditional": v_c, "classifier-free": cfg, "classifier-free, batched": batched}.items():
    print(f"{name}: NFE {v.nfe} for each call")
assert cfg.nfe == batched.nfe == 2

# %% [markdown]
# Move the slider: $w$ from 1 to 8. The dots are samples of CFG, all from the same noise; the lines are the density
# $p(x)\,p(y\mid x)^w$, normalised, that CFG is commonly said to sample. The two agree at $w=1$ and part company at
# once.

# %%
x0 = jax.random.normal(key_x0, (300, 2))
guided_samples = jax.jit(lambda w, x0: sample(classifier_free(v_c, v_u, w), x0, times=40).x)
log_c, log_u = (np.asarray(log_p(mixture, schedule, 1.0, grid)) for mixture in (wanted, everything))


def draw(w, ax):
    tilted = np.exp(w * log_c + (1 - w) * log_u).reshape(53, 53)
    ax.contour(ticks, ticks, np.exp(log_u).reshape(53, 53), levels=4, colors="#d0d0d0", linewidths=0.8)
    ax.plot(*guided_samples(w, x0).T, ".", color=BLUE, markersize=2.5)
    ax.contour(ticks, ticks, tilted / tilted.max(), levels=(0.05, 0.3, 0.8), colors=ORANGE)
    ax.set(xlim=(-3, 3.5), ylim=(-2.2, 3), aspect="equal", xticks=(), yticks=())


film(
    draw,
    np.arange(1, 9),
    alt="As w grows, dots of guided samples leave the contours of the tilted density, away from the other class",
    size=(3.0, 2.4),
    stills=4,
    caption="w = {:.0f}",
)

# %% [markdown]
# ## What does CFG sample?
#
# Scores are linear in velocities, so the score that CFG follows at time $t$ is
#
# <a id="eq-6-5"></a>
#
# $$
# (1-w)\,\nabla\log p_t(x) + w\,\nabla\log p_t(x\mid y) = \nabla\log\pi_t(x), \qquad
# \pi_t(x) \propto p_t(x)\,p_t(y\mid x)^w. \tag{6.5}
# $$
#
# At $t = 1$ that is the tilted density $\pi_1\propto p(x)\,p(y\mid x)^w$, and it is tempting to conclude that CFG
# samples it. It would, if the $\pi_t$ were the marginals of a diffusion of $\pi_1$: *tilt, then add noise*. But $\pi_t$
# is made in the other order, *add noise, then tilt*, and the two do not commute. One Gaussian shows it. Let the data be
# $x\sim\mathcal N(0, 1)$ and the label a noisy measurement of it, $y = x + \mathcal N(0, 1)$. Conditioning gives
# $p(x\mid y) = \mathcal N(y/2, 1/2)$ and tilting $\pi_1 = \mathcal N\big(\tfrac{w}{1+w}y, \tfrac1{1+w}\big)$, so that
#
# $$
# \text{tilt, then noise:}\quad \frac{\alpha_t^2}{1+w} + \sigma_t^2, \qquad\qquad
# \text{noise, then tilt:}\quad \Big(\frac{w}{\alpha_t^2/2+\sigma_t^2} + \frac{1-w}{\alpha_t^2+\sigma_t^2}\Big)^{-1},
# $$
#
# are the variances at time $t$. Cross-multiplied they differ by $\tfrac12 w(w-1)\,\alpha_t^2\sigma_t^2$: equal at both
# ends and for $w\in\{0, 1\}$, and nowhere else.
#
# Where does CFG end, then? With $C_t^2 = \alpha_t^2/2+\sigma_t^2$ and $U_t^2 = \alpha_t^2+\sigma_t^2$ the two
# velocities are affine: that of $\mathcal N(\alpha_t m, S_t^2)$ is $\dot\alpha_t m + (\dot S_t/S_t)(x-\alpha_t m)$. A
# law $\mathcal N(m_t, s_t^2)$ carried by [(6.4)](#eq-6-4) therefore stays Gaussian, and
#
# $$
# \frac{\dot s_t}{s_t} = w\frac{\dot C_t}{C_t} + (1-w)\frac{\dot U_t}{U_t}, \qquad
# \dot m_t = \frac{\dot s_t}{s_t}\,m_t + w\,\frac y2\Big(\dot\alpha_t - \alpha_t\frac{\dot C_t}{C_t}\Big).
# $$
#
# The first says $s_t = C_t^w\,U_t^{1-w}$. In the second the bracket is $C_t\,\dot\rho_t$ with $\rho_t = \alpha_t/C_t$,
# and variation of constants gives $m_1 = s_1 w\frac y2\int (C_t/s_t)\,\dot\rho_t\,\mathrm dt$ with $C/s = (U/C)^{w-1}$
# and $U^2/C^2 = 1+\rho^2/2$. Substituting $\rho = \sqrt2\,z$:
#
# <a id="eq-6-6"></a>
#
# $$
# \text{CFG: } \mathcal N(m_1, s_1^2),\quad s_1 = 2^{-w/2},\quad
# m_1 = \frac y2\; w\,2^{(1-w)/2}\!\int_0^1 (1+z^2)^{(w-1)/2}\,\mathrm dz; \qquad
# \text{tilted: } \mathcal N\Big(\frac{w}{1+w}\,y,\ \frac1{1+w}\Big). \tag{6.6}
# $$
#
# CFG's deviation falls exponentially in $w$, that of the tilted density like $w^{-1/2}$. No schedule is left in the
# formula; all that lead from pure noise to pure data reach the same law. Since the flow is affine,
# $x_1 = m_1 + s_1 x_0$, two particles, from 0 and from 1, tell both moments without any sampling error.

# %%
y, scales = 2.0, np.array([1, 2, 3, 5, 8])
line_c, line_u = oracles.gaussian_mixture([[y / 2]], np.sqrt(1 / 2)), oracles.gaussian_mixture([[0.0]], 1.0)
reached = {}
for each in (Linear(), Cosine()):  # all scales at once: each example may have its own
    v = classifier_free(*(oracles.velocity(line, each) for line in (line_c, line_u)), np.repeat(scales, 2))
    ends = sample(v, np.tile([[0.0], [1.0]], (len(scales), 1)), RungeKutta("rk4"), times=100).x
    means, shifted = np.asarray(ends).reshape(-1, 2).T
    reached[each] = np.stack([means, shifted - means], axis=1)
for i, scale in enumerate(scales):
    tilted = np.array([scale / (1 + scale) * y, (1 + scale) ** -0.5])
    integral = quad(lambda z, w=scale: (1 + z**2) ** ((w - 1) / 2), 0, 1)[0]
    closed = np.array([y / 2 * scale * 2 ** ((1 - scale) / 2) * integral, 2 ** (-scale / 2)])
    for moments in reached.values():
        assert np.abs(closed - moments[i]).max() < 1e-5  # the solver's error, of order h^4
    assert (np.abs(closed - tilted).max() < 1e-12) == (scale == 1)
    laws = {"tilted": tilted, "CFG": closed, "its ODE": reached[Linear()][i]}
    print(f"w = {scale}: mean, deviation", *(f"| {name} {mean:.4f}, {s:.4f}" for name, (mean, s) in laws.items()))

# %% [markdown]
# At $w = 3$ the mean is $y$ itself, twice that of $p(x\mid y)$, where tilting asks for one and a half times; and the
# spread is a third less than it should be. Too far out and too alike: this is the over-saturated look of strongly
# guided pictures, in one dimension.
#
# ## The missing term
#
# How far is CFG from the tilted density in general? Let $\ell_t = (1-w)\log p_t(x) + w\log p_t(x\mid y)$, the logarithm
# of $\pi_t$ up to a constant, and $\delta = \nabla\log p_t(x\mid y) - \nabla\log p_t(x)$. Each of the two densities
# obeys the continuity equation [(4.2)](04_continuity.ipynb#eq-4-2), divided by itself, with its velocity
# $v = a_t x + b_t\nabla\log p$, $a_t = \dot\alpha_t/\alpha_t$:
#
# $$
# \partial_t\log p = -\nabla\cdot v - v\cdot\nabla\log p
# = -a_t d - b_t\Delta\log p - a_t\,x\cdot\nabla\log p - b_t\,|\nabla\log p|^2 .
# $$
#
# Weigh the two with $1-w$ and $w$ and add. Everything is linear in $\log p$ except the square. CFG's own density would
# have $b_t|\nabla\ell_t|^2$ in that place, with $\nabla\ell_t = s + w\delta$ if $s = \nabla\log p_t(x)$; the difference
# is $b_t$ times $|s+w\delta|^2 - (1-w)|s|^2 - w|s+\delta|^2 = w(w-1)|\delta|^2$. Hence
#
# <a id="eq-6-7"></a>
#
# $$
# \partial_t\ell_t + v^w_t\cdot\nabla\ell_t = -\nabla\cdot v^w_t + w(w-1)\,b_t\,|\delta|^2 . \tag{6.7}
# $$
#
# The left side is $\frac{\mathrm d}{\mathrm dt}\ell_t(x_t)$ along CFG's trajectories. The density $q_t$ that CFG really
# has obeys $\frac{\mathrm d}{\mathrm dt}\log q_t(x_t) = -\nabla\cdot v^w_t$, which is
# [(7.4)](07_likelihood.ipynb#eq-7-4) of the next notebook. Both start from pure noise, $\ell_0 = \log q_0$. Subtract
# and integrate:
#
# <a id="eq-6-8"></a>
#
# $$
# \log\big[p(x_1)^{1-w}\,p(x_1\mid y)^w\big] = \log q_1(x_1) + W, \qquad
# W = w(w-1)\int_0^1 b_t\,\big|\nabla\log p_t(y\mid x_t)\big|^2\,\mathrm dt . \tag{6.8}
# $$
#
# To sample the tilted density, a particle that has passed where the classifier's verdict changes would have to be
# multiplied by $e^W$, and CFG multiplies nobody; resampling by such weights is the Feynman-Kac correction of Skreta et
# al. (2025, arXiv:2503.02819). CFG is exact where $W$ is the same for all: at $w\in\{0,1\}$, and for two Gaussians of
# one covariance, whose $\delta$ does not depend on $x$.
#
# The identity is pointwise, so it can be checked point by point. `fm_jax.likelihood.encode_and_log_prob` carries a
# lattice of points $x_1$ back to the noise and says what $\log q_1$ is there; along its trajectories we integrate the
# rate, in the form $b_t|\delta|^2 = (v_t(x\mid y)-v_t(x))\cdot\delta$ that is finite at $t=0$ too, by Simpson's rule.

# %%
times, rk4 = np.linspace(0, 1, 65), RungeKutta("rk4")
log_q = np.asarray(jax.jit(lambda x1: encode_and_log_prob(cfg, x1, sampler=rk4, times=64)[1])(grid))
backward = jax.jit(lambda x1: sample(cfg, x1, rk4, times=grids.uniform(64, 1.0, 0.0), trajectory=True).trajectory)(grid)
trajectory = np.asarray(backward)[::-1]  # [time, point, axis], from noise to data


@jax.jit
@jax.vmap
def rate(t, x):
    """What goes missing in a unit of time, w (w - 1) b |delta|^2, at every point."""
    c, u = (oracles.prediction(mixture, schedule, t, x) for mixture in (wanted, everything))
    return w * (w - 1) * ((c.velocity - u.velocity) * (c.score - u.score)).sum(axis=1)


missing = cumulative_simpson(rate(times, trajectory), x=times, axis=0, initial=0)
log_tilted = (1 - w) * log_u + w * log_c  # not normalised
there = log_q > -15  # wherever CFG puts any mass
without, gap = (np.abs(log_q + term - log_tilted)[there].max() for term in (0, missing[-1]))
print(f"(6.8) without its last term is off by up to {without:.2f} nats, with it by up to {gap:.0e} nats")
assert gap < 1e-3  # the errors of the solver and of Simpson's rule are of order h^4

# %%
area = (ticks[1] - ticks[0]) ** 2
density, shape = np.exp(log_q), (53, 53)
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=(1.25, 1))
levels = (0, 0.25, 0.5, 1, 2, 4, 8)
filled = left.contourf(ticks, ticks, missing[-1].reshape(shape), levels, cmap="Blues", norm="asinh", extend="max")
figure.colorbar(filled, ax=left, label="W: what CFG lacks (nats)", ticks=levels)
lines = density.max() * np.array([0.03, 0.2, 0.7])
left.contour(ticks, ticks, density.reshape(shape), lines, colors=ORANGE, linewidths=1)
left.set(title="CFG's density (lines), w = 4", aspect="equal", xlim=(-3, 3.5), ylim=(-2.2, 3), xticks=(), yticks=())
right.plot(times, (density * missing).sum(axis=1) * area, color=BLUE)
right.set(title="mean over CFG's samples", xlabel="time t", ylabel="W up to time t (nats)", ylim=(0, None))
plt.show()

# %% [markdown]
# Most of it goes missing in the first half of time, while the classes still overlap. And $W$ is large where the border
# is: CFG's samples should have been more numerous there. Guidance empties the edge of a class and crowds the part of it
# that is farthest from everything else, as Chidambaram et al. (2024, arXiv:2409.13074) prove in two families of
# mixtures. (All of this is about the ODE. With noise in the sampler CFG reaches yet another law, again not the tilted
# one; Bradley and Nakkiran 2024, arXiv:2408.09000, read it as a conditional predictor with a corrector for a tilted
# density.)
#
# ## Remedies
#
# With exact fields nothing beats $w = 1$ at sampling $p(x\mid y)$. One guides to get something else, samples that are
# more typical of their class, and because a trained network spreads some mass between the classes. The remedies keep
# that and undo part of the excess. Guidance in an **interval** of times (Kynkäänniemi et al. 2024, arXiv:2404.07724)
# leaves the conditional velocity alone outside. `fm_jax.guidance.Rescale` (Lin et al. 2023, arXiv:2305.08891) shrinks
# the guided velocity towards the standard deviation, over the pixels, of the conditional one, by a share $\phi$ of the
# way. `fm_jax.guidance.ZeroStar` (CFG-Zero*, Fan et al. 2025, arXiv:2503.18886) starts from the multiple of the
# unconditional velocity that is nearest to the conditional one, and stands still for $t < 0.04$.
#
# "Over the pixels" needs pixels: take the line from above 16 times, a picture $y$ with
# $p(x\mid y) = \mathcal N(y/2, I/2)$. We call contrast the projection of the mean sample on $y/2$: by [(6.6)](#eq-6-6)
# it is 1 for $p(x\mid y)$, at $w=3$ 1.5 for the tilted law, and 2 for CFG. The distance is Wasserstein's, a pixel, from
# the Gaussian with the samples' means and deviations to either law (`fm_jax.oracles.bures_distance`, over $\sqrt{16}$);
# 400 samples leave it uncertain by a few hundredths.

# %%
w_picture, picture = 3.0, 2 * np.sin(2 * np.pi * np.arange(16) / 8)
cond = oracles.velocity(oracles.gaussian_mixture(picture[None] / 2, np.sqrt(1 / 2)), schedule)
uncond = oracles.velocity(oracles.gaussian_mixture(np.zeros((1, 16)), 1.0), schedule)
options = {
    "CFG": {},
    "CFG for t > 0.5": {"interval": (0.5, 1.0)},
    "Rescale": {"rule": Rescale(0.7)},
    "CFG-Zero*": {"rule": ZeroStar()},
}
noise = jax.random.normal(key_picture, (400, 16))
laws = {"p(x | y)": (picture / 2, 1 / 2), "tilted": (w_picture / (1 + w_picture) * picture, 1 / (1 + w_picture))}
distances, contrasts = {}, {}
for name, option in options.items():
    v = classifier_free(cond, uncond, w_picture, **option)
    ends = sample(v, noise, RungeKutta("heun"), times=50).x  # 0.5 and 0.04, where the velocity jumps, are grid times
    mean, variance = np.mean(ends, axis=0), np.var(ends, axis=0)
    for law, (m, s2) in laws.items():
        pair = oracles.gaussian_pair(mean, np.diag(variance), m, s2 * np.eye(16))
        distances[name, law] = oracles.bures_distance(pair) / 4
    contrasts[name] = 2 * mean @ picture / (picture @ picture)
    print(
        f"{name:15} contrast {contrasts[name]:.2f}, deviation {np.sqrt(variance.mean()):.2f}; "
        f"distance to {', to '.join(f'{law} {distances[name, law]:.2f}' for law in laws)}"
    )
assert abs(contrasts["CFG"] - 2) < 0.05
assert distances["CFG for t > 0.5", "tilted"] < distances["CFG", "tilted"] / 2
assert distances["Rescale", "tilted"] < distances["CFG", "tilted"] / 2

# %% [markdown]
# CFG keeps its promise of [(6.6)](#eq-6-6). Guidance in the second half of time, and rescaling, come near the tilted
# law here, which is what the asserts check; CFG-Zero* takes off contrast but not the lack of spread. None of them is
# *the* tilted law, and which interval or $\phi$ is best depends on $w$ and on the data. An interval does not save
# evaluations in the library, where both velocities are computed at all times.
#
# ## Three densities
#
# Everything in one picture: what plain conditioning gives, what the exponent $w$ asks for, and what CFG delivers. All
# three are exact, CFG's by solving for its likelihood on the lattice. Their distance is a divergence that can be had in
# two ways: as an integral over the plane, and from [(6.8)](#eq-6-8), by which
# $\mathrm{KL}(q_1\,\|\,\pi_1) = \log Z - \mathbb E_{q_1}[W]$ with $Z = \int p^{1-w}\,p(\cdot\mid y)^w$.

# %%
log_z = np.log(np.exp(log_tilted).sum() * area)
kl = (density * (log_q - log_tilted + log_z)).sum() * area
assert abs(density.sum() * area - 1) < 1e-3
assert abs(log_z - (density * missing[-1]).sum() * area - kl) < 1e-3
panels = {
    "conditional: p(x | y)": np.exp(log_c),
    "tilted: p(x) p(y | x)$^4$": np.exp(log_tilted - log_z),
    "CFG, w = 4": density,
}
figure, axes = plt.subplots(1, 3, figsize=(7, 2.3), sharey=True)
shut_out = np.exp(log_p(other, schedule, 1.0, grid)).reshape(shape)
for (title, values), ax in zip(panels.items(), axes, strict=True):
    values = values.reshape(shape)
    ax.contourf(ticks, ticks, values, np.linspace(0.01, 0.5, 8), cmap="Blues", extend="max")
    ax.contour(ticks, ticks, shut_out, levels=(0.05, 0.2), colors=GREY, linestyles="dashed", linewidths=0.8)
    ax.plot(*everything.means[:2].T, "+", color=RED, markersize=7)
    ax.set(title=title, aspect="equal", xlim=(-3, 3.5), ylim=(-2.2, 3), xticks=(), yticks=())
plt.show()
print(f"KL divergence of what CFG samples at w = 4 from the tilted density: {kl:.3f} nats")

# %% [markdown]
# With exact fields, guidance of scale 1 is conditional sampling, by a classifier or without one. Beyond that, CFG
# follows the scores of $p_t(x)\,p_t(y\mid x)^w$ and samples something else; what it lacks is the term
# $w(w-1)\,b_t|\delta|^2$, and with it the books balance at every point. We have used the log-density along a trajectory
# as if it were known; where it comes from is the subject of the next notebook.
#
# Next: [likelihood](07_likelihood.ipynb).
