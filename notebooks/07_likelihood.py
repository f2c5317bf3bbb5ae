# %% [markdown]
# # 7. Likelihood
#
# How probable does a flow think a given picture is? A velocity field that pulls points together makes density, one that
# drives them apart thins it, and the log-density of a moving point changes at the rate $-\nabla\cdot v$, no more and no
# less. We prove that twice, follow small areas through a flow, integrate the divergence into exact log-likelihoods,
# price its random estimate, and train a network by maximum likelihood next to one trained by flow matching.
#
# Before this: [guidance](06_guidance.ipynb), which used [(7.4)](#eq-7-4) on credit. We build on the continuity equation
# [(4.2)](04_continuity.ipynb#eq-4-2) and on the flow of an ODE, [(1.1)](01_flows.ipynb#eq-1-1).

# %%
import functools
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from lab import BLUE, GREY, INK, ORANGE, SMOKE, film
from matplotlib.collections import PolyCollection
from scipy import stats
from scipy.linalg import logm

from fm_jax import oracles, samplers
from fm_jax.likelihood import (
    Exact,
    Hutchinson,
    bits_per_dim,
    encode_and_log_prob,
    log_prob,
    sample_and_log_prob,
)
from fm_jax.losses import flow_matching
from fm_jax.models import PlainMLP, init_params, linen_apply
from fm_jax.paths import AffinePath
from fm_jax.samplers import Adaptive, RungeKutta
from fm_jax.schedules import Linear
from fm_jax.sources import Normal
from fm_jax.train import create_state, make_step

jax.config.update("jax_enable_x64", True)  # differences of nearby points need the digits
key_data, key_probes, key_pixels, key_bits, key_init, key_train = jax.random.split(jax.random.key(7), 6)

# %% [markdown]
# ## Flux and divergence
#
# Let $v$ be a velocity field in the plane. What flows out of a small square of side $h$, per unit of time, is its
# **flux**: the integral over the boundary of the component of $v$ that points outwards. The right side counts $+v_1$,
# the left side $-v_1$, and by the fundamental theorem of calculus their sum is $\iint \partial_1 v_1$ over the square;
# top and bottom give $\iint\partial_2 v_2$. So the flux is the integral of
# $f = \nabla\cdot v = \partial_1 v_1 + \partial_2 v_2$ over the square, $h^2$ times its mean. In the mean of the Taylor
# series of $f$ about the middle, odd powers of a coordinate drop out and its square is $h^2/12$, which leaves
# $f + \tfrac12\cdot\tfrac{h^2}{12}\,\Delta f$ and fourth powers. So, for smooth $v$,
#
# <a id="eq-7-1"></a>
#
# $$
# \frac{1}{h^2}\oint v\cdot n\,\mathrm dS = \nabla\cdot v + \frac{h^2}{24}\,\Delta(\nabla\cdot v) + O(h^4),
# \qquad \nabla\cdot v = \sum_i \frac{\partial v_i}{\partial x_i} = \operatorname{tr}\frac{\partial v}{\partial x}.
# \tag{7.1}
# $$
#
# **The divergence is the density of the flux.** In $d$ dimensions it is that of a cube, by the same argument.
# `fm_jax.likelihood.Exact` computes it with $d$ Jacobian-vector products. We compare it with the flux, by quadrature,
# at squares of shrinking size in the field that carries noise to a mixture of three Gaussians; halving $h$ has to
# divide the difference by four.

# %%
schedule = Linear()
covariances = [[[0.25, 0.15], [0.15, 0.2]], [[0.3, -0.1], [-0.1, 0.12]], [[0.45, 0.0], [0.0, 0.08]]]
mixture = oracles.gaussian_mixture([[-1.3, -0.6], [1.2, -0.8], [0.1, 1.2]], covariances)
v = jax.jit(oracles.velocity(mixture, schedule))
log_p = jax.jit(lambda t, x: oracles.log_prob(mixture, schedule, t, x))
sample = jax.jit(oracles.sample, static_argnames="num")
divergence = jax.jit(lambda t, x: Exact()(v, None, t, x)[1])

t, points = 0.6, np.asarray(sample(mixture, key_data, num=1000))
nodes, weights = np.polynomial.legendre.leggauss(8)
errors = []
for h in (0.4, 0.2, 0.1):
    flux = 0.0
    for normal in np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]):  # of each side, whose direction is normal[::-1]
        side = points[:, None] + h / 2 * (normal + nodes[:, None] * normal[::-1])
        flux = flux + h / 2 * (v(t, side.reshape(-1, 2)) @ normal).reshape(-1, 8) @ weights
    errors.append(np.abs(flux / h**2 - divergence(t, points)).mean())
    print(f"h = {h}: flux / h^2 less the divergence, on average {errors[-1]:.5f} per unit of time")
assert all(3.5 < coarse / fine < 4.5 for coarse, fine in pairwise(errors))

# %% [markdown]
# The picture shows the field while three clusters are in the making. In the purple regions, where arrows run together,
# the divergence is negative. The orange ridges are watersheds: from there the flow parts, towards one cluster or
# another.

# %%
ticks = np.linspace(-3.5, 3.5, 41)
lattice = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
figure, ax = plt.subplots(figsize=(3.8, 2.9))
values, levels = np.reshape(divergence(t, lattice), (41, 41)), np.linspace(-4, 4, 9)
colours = ax.contourf(ticks, ticks, values, levels, cmap="PuOr_r", extend="both")
figure.colorbar(colours, ax=ax, label="divergence, per unit of time")
arrows = np.stack([lattice, v(t, lattice)]).reshape(2, 41, 41, 2)[:, 2::3, 2::3]
ax.quiver(*np.moveaxis(arrows, 3, 1).reshape(4, -1), color=INK, scale=45, width=0.006)
ax.set(title=f"velocity and divergence at t = {t}", aspect="equal", xlim=(-3, 3), ylim=(-2.5, 2.5))
plt.show()

# %% [markdown]
# ## At a point, or with the flow
#
# A thermometer on a mast and one on a drifting balloon read different changes. At a fixed point the density changes by
# $\partial_t p_t$. Along a trajectory $\dot x_t = v_t(x_t)$ it changes by the **material derivative**, the chain rule:
#
# <a id="eq-7-2"></a>
#
# $$
# \frac{\mathrm d}{\mathrm dt}\,p_t(x_t) = \partial_t p_t(x_t) + v_t(x_t)\cdot\nabla p_t(x_t). \tag{7.2}
# $$
#
# The first is partial, the second total. They answer different questions, and can have different signs. We compare the
# two sides, for $\log p$, which divides [(7.2)](#eq-7-2) by $p$: the left one by going with the flow for a moment, to
# $x\pm\varepsilon v$, and a central difference, whose error is of order $\varepsilon^2$; the right one by automatic
# differentiation of the closed form `fm_jax.oracles.log_prob` in the directions $(1, 0)$ and $(0, v)$ of time and
# space.

# %%
eps, velocity = 1e-4, np.asarray(v(t, points))
ahead, behind = log_p(t + eps, points + eps * velocity), log_p(t - eps, points - eps * velocity)
with_the_flow = np.subtract(ahead, behind) / (2 * eps)
_, at_the_point = jax.jvp(log_p, (t, points), (1.0, 0 * velocity))
_, by_moving = jax.jvp(log_p, (t, points), (0.0, velocity))
gap = np.abs(with_the_flow - at_the_point - by_moving).max()
print(f"d log p / dt at the first point: {at_the_point[0]:+.3f} on the spot, {with_the_flow[0]:+.3f} with the flow")
print(f"of different sign at {np.mean(with_the_flow * at_the_point < 0):.0%} of the points; (7.2) is off by {gap:.0e}")
assert gap < 1e-3

# %% [markdown]
# ## Change of variables
#
# Let $\varphi$ be smooth and invertible with a smooth inverse, and $x\sim p_X$. Where do the probabilities go? The set
# $A$ goes to $\varphi(A)$ with all that is in it. Substituting $y=\varphi(x)$,
# $\int_{\varphi(A)} p_Y(y)\,\mathrm dy = \int_A p_Y(\varphi(x))\,|\det D\varphi(x)|\,\mathrm dx$, and this has to be
# $\int_A p_X(x)\,\mathrm dx$ for every $A$:
#
# <a id="eq-7-3"></a>
#
# $$
# p_Y(\varphi(x))\,\big|\det D\varphi(x)\big| = p_X(x). \tag{7.3}
# $$
#
# Mass stays, volume changes, density is mass over volume. A **normalising flow** is a composition of maps whose
# determinants are cheap, and that restricts them badly. A flow of an ODE is a composition of very many maps that hardly
# do anything, $\varphi(x) = x + h\,v(x) + O(h^2)$, and their determinants are little more than traces: if
# $J = \partial v/\partial x$ has the eigenvalues $\lambda_i$, then, for small $h$,
#
# $$
# \log\det(I + hJ) = \sum_i\log(1+h\lambda_i) = h\sum_i\lambda_i - \frac{h^2}2\sum_i\lambda_i^2 + O(h^3)
# = h\,\operatorname{tr}J - \frac{h^2}2\operatorname{tr}J^2 + O(h^3).
# $$
#
# By [(7.3)](#eq-7-3), one step of length $h$ changes the log-density by minus this. Divide by $h$ and let $h\to0$:
#
# <a id="eq-7-4"></a>
#
# $$
# \frac{\mathrm d}{\mathrm dt}\log p_t(x_t) = -\operatorname{tr}\frac{\partial v_t}{\partial x}(x_t)
# = -\nabla\cdot v_t(x_t). \tag{7.4}
# $$
#
# This is the **instantaneous change of variables** (Chen et al. 2018, arXiv:1806.07366). It needs $v$ to be
# continuously differentiable in $x$, and a differentiable density $p_t > 0$. And here it is once more, from
# conservation: the continuity equation says
# $\partial_t p_t = -\nabla\cdot(p_t v_t) = -p_t\,\nabla\cdot v_t - v_t\cdot\nabla p_t$. Put it into [(7.2)](#eq-7-2);
# what the balloon sees for moving cancels, and division by $p_t$ leaves [(7.4)](#eq-7-4).

# %%
gap = np.abs(at_the_point + by_moving + divergence(t, points)).max()
print(f"(7.4) at {len(points)} points: off by at most {gap:.0e} per unit of time")
assert gap < 1e-10

J = np.asarray(jax.jit(jax.vmap(jax.jacfwd(lambda x: v(t, x[None])[0])))(points))
third = np.abs(np.linalg.eigvals(J)).max() ** 3  # the next term of the series is at most two thirds of h^2 times this
for h in (1e-2, 1e-3):
    error = np.linalg.slogdet(np.eye(2) + h * J)[1] / h - np.trace(J, axis1=1, axis2=2)
    predicted = -h / 2 * np.trace(J @ J, axis1=1, axis2=2)
    print(f"h = {h}: log det(I + h J) / h - tr J = {error[0]:+.5f} at one point, -h tr J^2 / 2 = {predicted[0]:+.5f}")
    assert np.abs(error - predicted).max() < h**2 * third

# %% [markdown]
# ## Small areas
#
# Over a finite time the steps multiply. The Jacobian $D_t = \partial x_t/\partial x_0$ of the flow obeys
# $\dot D_t = \frac{\partial v_t}{\partial x}(x_t)\,D_t$, so that in a time $h$ it is multiplied by $I + hJ$, and
#
# <a id="eq-7-5"></a>
#
# $$
# \frac{\mathrm d}{\mathrm dt}\log\det D_t = \nabla\cdot v_t(x_t), \qquad \log\det D_1 =
# \log\frac{\text{area at } 1}{\text{area at } 0} = \int_0^1\nabla\cdot v_t(x_t)\,\mathrm dt . \tag{7.5}
# $$
#
# A small area can be made of particles. The area of a quadrilateral is half the determinant of its diagonals; two
# particles at $x_0\pm\varepsilon e_1$ and two at $x_0\pm\varepsilon e_2$ are the ends of the diagonals of a small
# square, and we look what has become of them at $t=1$. The integral of the divergence is what
# `fm_jax.likelihood.sample_and_log_prob` takes from the log-density of the noise.

# %%
rk4 = {"sampler": RungeKutta("rk4"), "times": 48}
edges = np.linspace(-2.4, 2.4, 13)
corners = np.stack(np.meshgrid(edges, edges), axis=-1)  # of 12 x 12 cells
x0 = (corners[1:, 1:] + corners[:-1, :-1]).reshape(-1, 2) / 2  # their middles
log_p0 = np.asarray(Normal().log_prob(x0))
integral = log_p0 - jax.jit(lambda x0: sample_and_log_prob(v, x0, **rk4)[1])(x0)

eps = 1e-4
diamonds = [x0 + eps * np.array(e) for e in ([1, 0], [-1, 0], [0, 1], [0, -1])]
particles = np.concatenate([corners.reshape(-1, 2), *diamonds])
carry = jax.jit(lambda x: samplers.sample(v, x, **rk4, trajectory=True).trajectory)
path = np.asarray(carry(particles))  # [time, particle, axis]
right, left, top, bottom = path[-1, 13**2 :].reshape(4, -1, 2)
log_area = np.linalg.slogdet(np.stack([right - left, top - bottom], axis=1) / (2 * eps))[1]
gaps = [np.abs(log_area - other).max() for other in (integral, log_p0 - log_p(1.0, (right + left) / 2))]
print(f"log-areas of {len(x0)} small squares at t = 1 less the integrated divergence: at most {gaps[0]:.0e}")
print(f"the same less the change of the log-density in closed form, which is (7.3): at most {gaps[1]:.0e}")
assert max(gaps) < 1e-3  # eps^2, and the solver's h^4, times derivatives of the flow

# %% [markdown]
# The same seen with the eye: cells of a grid, drawn on the noise and carried by the flow. Each keeps the mass it had,
# and its colour is mass over area. Where the field converges cells shrink and darken; the dark ones become the data,
# and the vast pale ones the emptiness between.

# %%
vertices = path[:, : 13**2].reshape(-1, 13, 13, 2)
a, b, c, d = vertices[:, :-1, :-1], vertices[:, :-1, 1:], vertices[:, 1:, 1:], vertices[:, 1:, :-1]
areas = np.abs(np.linalg.det(np.stack([c - a, d - b], axis=-1))).reshape(-1, 144) / 2
quads = np.stack([a, b, c, d], axis=3).reshape(-1, 144, 4, 2)


def draw(t, ax):
    i = round(t * 48)
    cells = PolyCollection(quads[i], cmap="Blues", edgecolors=GREY, linewidths=0.4)
    cells.set(array=np.exp(log_p0) * areas[0] / areas[i], clim=(0, 0.35))
    ax.add_collection(cells)
    ax.set(xlim=(-2.9, 2.9), ylim=(-2.5, 2.6), aspect="equal", xticks=(), yticks=())


alt = "A square grid over the noise is carried to three clusters; cells in the clusters shrink and darken"
film(draw, np.linspace(0, 1, 17), alt=alt, size=(2.8, 2.6))

# %% [markdown]
# ## Likelihood
#
# Integrate [(7.4)](#eq-7-4) along the trajectory that ends in a given data point $x_1$:
#
# <a id="eq-7-6"></a>
#
# $$
# \log p_1(x_1) = \log p_0(x_0) - \int_0^1\nabla\cdot v_t(x_t)\,\mathrm dt . \tag{7.6}
# $$
#
# To evaluate it, start at $x_1$, solve the ODE backwards, and carry the integral along: one solve of $d+1$ equations.
# That is `fm_jax.likelihood.log_prob`, and its truth is known here, since the field is that of a mixture.

# %%
solution, log_q = jax.jit(lambda x1: encode_and_log_prob(v, x1))(points)
gap = np.abs(log_q - log_p(1.0, points))
print(f"log_prob of {len(points)} data points, {solution.calls} evaluations, less the closed form:", end=" ")
print(f"{gap.mean():.0e} nats on average, {gap.max():.0e} at most")
assert gap.mean() < 1e-3  # the tolerance, 1e-5 for each step, is one for the batch as a whole

# %% [markdown]
# ## A random estimate of the trace
#
# The exact trace costs $d$ Jacobian-vector products, too many for pictures. Take a random vector $e$ of independent
# signs $\pm1$ instead (Hutchinson 1990; for flows Grathwohl et al. 2018, arXiv:1810.01367). Since $e_i^2 = 1$,
#
# <a id="eq-7-7"></a>
#
# $$
# \begin{aligned}
# e^\top J e &= \operatorname{tr}J + \sum_{i<j} 2 S_{ij}\,e_ie_j, & S &= \tfrac12(J + J^\top), \\
# \mathbb E\big[e^\top Je\big] &= \operatorname{tr}J, & \operatorname{Var}\big[e^\top Je\big] &= 4\sum_{i<j}S_{ij}^2,
# \end{aligned} \tag{7.7}
# $$
#
# because the products $e_ie_j$, $i<j$, have mean 0 and variance 1 and are uncorrelated. One product, whatever $d$, and
# an error from the off-diagonal part alone: `fm_jax.likelihood.Hutchinson`.
#
# In a solve, $e$ is drawn **once** and kept. The trajectory does not depend on $e$, so the log-density is then off by
# $\sum_{i<j} 2e_ie_j\int S_{ij}\,\mathrm dt$: right on average, with the variance of [(7.7)](#eq-7-7) for the
# integrated $S$. With a new $e$ at every call the right side of the ODE would be noise, and an adaptive solver, whose
# step sizes are made for smooth functions, would shorten its steps until the noise is small.
#
# For one Gaussian $\mathcal N(m, C)$ even the integral has a closed form. Its flow is $x_1 = m + C^{1/2}x_0$
# (`fm_jax.oracles.flow_map`), and its Jacobians at all times are functions of $C$ and commute, so that
# $C^{1/2} = \exp\int_0^1 J_t\,\mathrm dt$ and $\int_0^1 S_t\,\mathrm dt = \tfrac12\log C$, a matrix logarithm. We
# compare the mean and the deviation of 500 estimates in eight dimensions, and count what fresh probes would cost.

# %%
factor = np.random.default_rng(7).normal(size=(8, 8))
C, m, point = factor @ factor.T / 8 + np.eye(8) / 4, np.ones(8), np.array([[1.5, 0.5] * 4])
eight = oracles.gaussian_mixture(m[None], C[None])
v8, exact = oracles.velocity(eight, schedule), stats.multivariate_normal(m, C).logpdf(point)
midpoint = RungeKutta("midpoint")
options = {"divergence": Hutchinson(), "sampler": midpoint, "times": 100}
estimate = jax.jit(lambda x1, key: log_prob(v8, x1, key=key, **options))
estimates = np.asarray(estimate(np.repeat(point, 500, axis=0), key_probes))
bias, deviation = estimates.mean() - exact, estimates.std()
predicted = 2 * np.sqrt((np.triu(logm(C) / 2, k=1) ** 2).sum())
print(f"one probe: deviation {deviation:.3f} nats, by (7.7) {predicted:.3f}; mean off by {bias:+.3f} nats")
assert abs(bias) < 4 * predicted / np.sqrt(500)
assert abs(deviation / predicted - 1) < 0.2


@dataclass(frozen=True)
class Redrawn(Hutchinson):
    """What not to do: new probes in the middle of a solve, so many times in a unit of time."""

    rate: float = 0.0

    def draw(self, key, x):
        return key

    def __call__(self, v, key, t, x):
        key = jax.random.fold_in(key, (self.rate * t).astype(jnp.uint32))
        return super().__call__(v, super().draw(key, x), t, x)


loose = {"sampler": Adaptive(rtol=1e-3, atol=1e-3), "key": key_probes}
encode = jax.jit(lambda rate: encode_and_log_prob(v8, point, divergence=Redrawn(rate=rate), **loose)[0])
once, always = encode(0.0).calls, encode(1e9).calls
print(f"probes drawn once: {once} evaluations; drawn for each evaluation: {always}")
assert always > 5 * once

# %% [markdown]
# ## Bits per dimension
#
# A log-density has units: nats, and per unit of volume. For pictures with pixels $k\in\{0,\dots,K-1\}$ the habit is to
# state a code length. Scale to $[-1, 1]$: a picture is a bin of volume $(2/K)^d$, and its probability is that volume
# times the mean of the density over the bin. The logarithm of a mean is at least the mean of the logarithm (Jensen), so
# with $x$ uniform in the bin the code length $-\log_2$ of the probability, for each of $d$ dimensions, is at most
#
# <a id="eq-7-8"></a>
#
# $$
# \text{bits per dimension} = -\frac{\mathbb E\,\log p_1(x)}{d\,\log 2} + \log_2\frac K2 , \tag{7.8}
# $$
#
# and for densities that hardly change over a bin the bound is tight. One nat a dimension is $1/\log 2\approx1.44$ bits,
# and $K = 256$ levels of pure noise cost 8. `fm_jax.likelihood.bits_per_dim` dequantises, solves twice to know its own
# error, and refuses to answer if that is too large. For independent Gaussian pixels of deviation $s$ the answer is
# known: the velocity is $x\,\dot S_t/S_t$ with $S_t^2 = s^2t^2+(1-t)^2$, and the entropy $\tfrac12\log_2(2\pi e s^2)$
# plus 7.

# %%
s = 0.2
pixels = s * np.asarray(jax.random.normal(key_pixels, (500, 2, 2, 1)))
images = np.clip(np.floor((pixels + 1) / 2 * 256), 0, 255).astype(int)
v_images = lambda t, x: x * (s**2 * t - (1 - t)) / (s**2 * t**2 + (1 - t) ** 2)  # noqa: E731
bits = bits_per_dim(v_images, key_bits, images, sampler=midpoint, times=200).mean()
entropy = 0.5 * np.log2(2 * np.pi * np.e * s**2) + 7
error = 1 / np.log(2) / np.sqrt(2 * pixels.size)  # of the mean: (x / s)^2 / 2 has variance 1 / 2
print(f"{bits:.3f} bits per dimension, where the entropy is {entropy:.3f} (standard error {error:.3f})")
assert abs(bits - entropy) < 4 * error

# %% [markdown]
# ## Training by maximum likelihood
#
# A network $v^\theta$ with its likelihood [(7.6)](#eq-7-6) is a **continuous normalising flow** (CNF), and can be
# trained by maximum likelihood:
#
# <a id="eq-7-9"></a>
#
# $$
# -\mathbb E_{p_\text{data}}\big[\log p^\theta_1(x_1)\big]
# = \underbrace{-\mathbb E_{p_\text{data}}\big[\log p_\text{data}(x_1)\big]}_{\text{entropy of the data}}
# + \underbrace{\mathbb E_{p_\text{data}}\big[\log p_\text{data}(x_1) - \log p^\theta_1(x_1)\big]}_{
# \mathrm{KL}(p_\text{data}\,\|\,p^\theta_1)\;\ge\;0} . \tag{7.9}
# $$
#
# This is how flows of ODEs were trained before flow matching. Every step simulates: it solves from the data back to the
# noise and differentiates through the solver, which `log_prob` allows. That the gradient is right can be seen on a
# field with one parameter, $v = \theta x$: then $x_0 = e^{-\theta}x_1$, $\nabla\cdot v = d\,\theta$, and
# $\partial_\theta\log p_1(x_1) = e^{-2\theta}|x_1|^2 - d$.

# %%
twelve, theta = {"sampler": midpoint, "times": 12}, 0.5
slope = jax.jit(jax.jacrev(lambda theta: log_prob(lambda t, x: theta * x, points, **twelve)))(theta)
gap = np.abs(slope - (np.exp(-2 * theta) * (points**2).sum(axis=1) - 2)).max()
print(f"gradient through 12 midpoint steps: at most {gap:.0e} off the closed form")
assert gap < 2e-2  # of order h^2

# %% [markdown]
# Flow matching (`fm_jax.losses.flow_matching`) fits the same network without any simulation: one evaluation for each
# example and step. We give both the same number of **network evaluations** (NFE) for each example. Maximum likelihood
# takes 24 of them a step, by 12 midpoint steps, and so makes 24 times fewer steps. (That flatters it: its evaluations
# come with two Jacobian products each, and the backward pass has to remember all 24 of them or compute them again.) The
# judge is the KL divergence of [(7.9)](#eq-7-9), on points that no training saw, by a finer solver than that of
# training, with the closed form of $p_\text{data}$.

# %%
model = PlainMLP(features=(64, 64), activation=jnp.tanh)
apply_fn, untrained = linen_apply(model), init_params(model, key_init, (2,))
fine = {"sampler": RungeKutta("rk4"), "times": 20}
places = np.concatenate([points, lattice])  # where to judge, and where to draw
truth = np.asarray(log_p(1.0, places))


def bind(params):
    return lambda t, x: apply_fn(params, t, x, None, train=False, rngs=None)


def negative_log_likelihood(params, key, batch, *, target_params=None):
    solution, log_q = encode_and_log_prob(bind(params), batch["x1"], **twelve)
    return -log_q.mean(), {"calls": solution.calls}


losses = {"flow matching": flow_matching(apply_fn, AffinePath(schedule)), "maximum likelihood": negative_log_likelihood}
rounds, budget = (1, 48) if SMOKE else (5, 2400)  # of network evaluations, for each example, in a round
data = np.asarray(sample(mixture, key_train, num=rounds * budget * 128), dtype=np.float32)
log_model = jax.jit(lambda params: log_prob(bind(params), places.astype(np.float32), **fine))
figure, ax = plt.subplots(figsize=(4.5, 2.6))
kl, log_q = {}, {}
for (name, loss_fn), nfe, colour, marker in zip(losses.items(), (1, 24), (BLUE, ORANGE), "os", strict=True):
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, rounds * budget // nfe))
    state, step = create_state(untrained, optimizer), make_step(loss_fn, optimizer, axis_name=None)
    one = lambda state, x1, step=step: step(state, key_train, {"x1": x1})  # noqa: E731
    train = jax.jit(functools.partial(jax.lax.scan, one))
    history = [log_model(state.params)]
    for batches in data.reshape(rounds, budget, 128, 2):
        state, metrics = train(state, batches[: budget // nfe])
        history.append(log_model(state.params))
    assert metrics.get("calls", np.ones(1))[0] == nfe
    log_q[name], differences = np.asarray(history[-1]), (truth - np.array(history))[:, :1000]
    kl[name], error = differences[-1].mean(), differences[-1].std() / np.sqrt(1000)
    print(f"{name}: {rounds * budget // nfe} steps of NFE {nfe}, KL = {kl[name]:.3f} nats (+- {error:.3f})")
    assert SMOKE or kl[name] < 0.1
    ax.plot(np.arange(rounds + 1) * budget, differences.mean(axis=1), color=colour, marker=marker, label=name)
ax.set(title="two ways to one likelihood", xlabel="network evaluations for each example of a batch", yscale="log")
ax.set_ylabel("KL divergence from the data (nats)")
ax.legend()
plt.show()

# %% [markdown]
# Both arrive, at a similar price in evaluations on this toy; which is ahead depends on the budget and on the data. What
# scales differently is a step: one evaluation, one backward pass and no Jacobian product, whatever the dimension,
# against a whole solve. In the limit of a perfect fit the two agree: the marginal velocity has the likelihood of the
# data. Short of it they need not, since the one minimises an error of velocities and the other the divergence itself.
#
# A density has to integrate to 1. No loss asks for it: it holds for every field, trained or not, since the flow moves
# mass and makes none. The last cell adds up $e^{\log p}$ over the lattice.

# %%
area = (ticks[1] - ticks[0]) ** 2
figure, axes = plt.subplots(1, 3, figsize=(7, 2.5), sharey=True)
for (name, log_density), ax in zip({"data": truth, **log_q}.items(), axes, strict=True):
    density, levels = np.exp(log_density[1000:]).reshape(41, 41), np.linspace(0.01, 0.45, 9)
    assert abs(density.sum() * area - 1) < 0.02
    ax.contourf(ticks, ticks, density, levels, cmap="Blues", extend="max")
    ax.contour(ticks, ticks, np.exp(truth[1000:]).reshape(41, 41), (0.02, 0.2), colors=ORANGE, linewidths=0.9)
    ax.set(title=f"{name}\nmass {density.sum() * area:.3f}", aspect="equal", xlim=(-3, 3), ylim=(-2.5, 2.5))
    ax.set(xticks=(), yticks=())
plt.show()
print(f"KL divergence of the flow-matching model from the data: {kl['flow matching']:.3f} nats")

# %% [markdown]
# The divergence is the density of the flux; along a trajectory it is the rate at which log-volume grows and log-density
# falls; its integral is the likelihood of any data point, exactly for $d$ Jacobian products and without bias for one.
# Training by that likelihood simulates at every step. Flow matching does not, and its likelihood is there when asked
# for.
#
# The trajectories have been as crooked as they liked. Straight ones would need fewer evaluations, and that depends on
# who is paired with whom.
#
# Next: [couplings](08_couplings.ipynb).
