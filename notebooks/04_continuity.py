# %% [markdown]
# # 4. The continuity equation
#
# Which velocity carries particles along the marginal path? Any that obeys the *continuity equation*: probability is
# neither made nor lost. The average of the conditional velocities, over where a particle may be going, obeys it
# (Theorem 1). Noise may be added too, if the score takes back what it spreads (Theorem 2). We derive both, check them
# against closed forms, and simulate a family of processes that share their marginals and little else.
#
# Previous: [Probability paths](03_paths.ipynb), whose Gaussian path [(3.2)](03_paths.ipynb#eq-3-2) and conditional
# velocity [(3.4)](03_paths.ipynb#eq-3-4) we use; flows and SDEs are from [1](01_flows.ipynb) and
# [2](02_diffusions.ipynb).

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from lab import BLUE, GREY, INK, ORANGE, RED, film

from fm_jax import likelihood, nfe, oracles, samplers, schedules

jax.config.update("jax_enable_x64", True)  # differences of densities need the digits
prediction, log_prob, cdf = (jax.jit(f, static_argnums=1) for f in (oracles.prediction, oracles.log_prob, oracles.cdf))

schedule = schedules.Linear()
mixture = oracles.gaussian_mixture([[-1.3, -0.6], [1.2, -0.9], [0.2, 1.2]], [0.45, 0.35, 0.4], [0.3, 0.3, 0.4])


def density(t, x):
    return jnp.exp(log_prob(mixture, schedule, t, x))


def v(t, x):
    return prediction(mixture, schedule, t, x).velocity


def score(t, x):
    return prediction(mixture, schedule, t, x).score


def zero(t, x):
    return jnp.zeros_like(x)


# %% [markdown]
# ## Probability is conserved
#
# Let particles with density $p_t$ move with velocity $v_t$, and watch a box $B$. Nothing is made or lost, so its
# content changes only by what crosses its surface. Through a piece of surface of area $dS$ with outward normal $n$
# pass, in a short time $dt$, the particles that fill a slanted prism of volume $v_t \cdot n\; dt\, dS$ behind it. So
#
# <a id="eq-4-1"></a>
#
# $$
# \frac{d}{dt} \int_B p_t(x)\, dx = -\oint_{\partial B} p_t(x)\, v_t(x) \cdot n\; dS
# = -\int_B \nabla\cdot\big(p_t(x)\, v_t(x)\big)\, dx, \tag{4.1}
# $$
#
# the last step by the divergence theorem, for $p_t$ and $v_t$ that are continuously differentiable (in $t$ and $x$).
# The left side is $\int_B \partial_t p_t\, dx$. Two continuous functions whose integrals agree on every box are equal,
# which is the **continuity equation**:
#
# <a id="eq-4-2"></a>
#
# $$
# \partial_t p_t(x) + \nabla\cdot\big(p_t(x)\, v_t(x)\big) = 0 \tag{4.2}
# $$
#
# Here is (4.1) for one box in the plane. Path and velocity are the oracle's, of a mixture of three Gaussians
# (`fm_jax.oracles.prediction`; Theorem 1 below says why it is what it is). The integrals are Gauss-Legendre sums, exact
# to rounding for functions as smooth as these.

# %%
nodes, weights = np.polynomial.legendre.leggauss(24)
low, high, t = np.array([-1.2, -0.1]), np.array([0.5, 1.3]), 0.7
x, y = low[:, None] + (high - low)[:, None] * (nodes + 1) / 2
w_x, w_y = (high - low)[:, None] * weights / 2
inside = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2)
change = jax.jit(jax.grad(lambda t: w_x @ density(t, inside).reshape(24, 24) @ w_y))(t)
faces = [(np.stack([edge + 0 * y, y], 1), (sign, 0), w_y) for edge, sign in ((low[0], -1.0), (high[0], 1.0))]
faces += [(np.stack([x, edge + 0 * x], 1), (0, sign), w_x) for edge, sign in ((low[1], -1.0), (high[1], 1.0))]
outflow = [float(w @ (density(t, at) * (v(t, at) @ np.array(normal)))) for at, normal, w in faces]
print(f"rate of change of the box's content: {change:+.6f} per unit of time")
print(f"minus the flow out of its four sides: {-sum(outflow):+.6f}, difference {abs(change + sum(outflow)):.0e}")
assert abs(change + sum(outflow)) < 1e-9

side = np.linspace(-2.5, 2.5, 101)
plane = np.stack(np.meshgrid(side, side), axis=-1)
coarse = plane[4::8, 4::8].reshape(-1, 2)
fig, ax = plt.subplots(figsize=(4.4, 4.3))
ax.imshow(density(t, plane.reshape(-1, 2)).reshape(101, 101), extent=(-2.5, 2.5) * 2, origin="lower", vmax=0.5)
ax.quiver(*coarse.T, *(density(t, coarse)[:, None] * v(t, coarse)).T, color=GREY, scale=2.2, width=0.005)
ax.add_patch(plt.Rectangle(low, *(high - low), fill=False, edgecolor=INK, linewidth=1.5))
for (at, normal, _), flow in zip(faces, outflow, strict=True):
    x_label, y_label = at.mean(axis=0) + (0.42, 0.2) * np.array(normal)
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
    ax.text(x_label, y_label, f"{flow:+.3f}", ha="center", va="center", color=RED, bbox=box)
ax.text(*(low + high) / 2, f"{change:+.3f}", ha="center", va="center", color=INK, weight="bold")
ax.set_title("Density, flux p v, outflow through each side\nand rate of change within, at t = 0.7")
ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## The equation decides where the particles go
#
# We derived (4.2) from moving particles. It also works backwards: a density that solves it *is* that of the particles.
# Let $\phi_t$ be the [flow](01_flows.ipynb#eq-1-1) of $v_t$ and $J_t(x_0)$ the determinant of its Jacobian, for which
# Jacobi's formula says $\frac{d}{dt} J_t = (\nabla \cdot v_t)(\phi_t)\, J_t$. Then along a trajectory
#
# <a id="eq-4-3"></a>
#
# $$
# \frac{d}{dt} \Big[ p_t(\phi_t)\, J_t \Big]
# = \big( \partial_t p_t + v_t \cdot \nabla p_t + p_t\, \nabla \cdot v_t \big)\, J_t
# = \big( \partial_t p_t + \nabla \cdot (p_t v_t) \big)\, J_t = 0, \tag{4.3}
# $$
#
# so $p_t(\phi_t(x_0))\, J_t(x_0) = p_0(x_0)$, which is the change of variables: $\phi_t(X_0)$ has the density $p_t$ if
# $X_0$ has $p_0$. All it takes is a continuously differentiable $v_t$ whose trajectories do not run off to infinity. To
# check that a field generates a path is to check one equation, place by place.
#
# ## Checked by differences
#
# Central differences in time and space turn (4.2) into arithmetic. What is left over shrinks like $h^2$.

# %%
key_x0, key_x1 = jax.random.split(jax.random.key(0))
data = jax.jit(oracles.sample, static_argnums=2)(mixture, key_x1, 6600)
points = 0.5 * np.array(jax.random.normal(key_x0, (200, 2))) + 0.5 * np.array(data[6400:])  # x_t at t = 1/2
left_over = []
for h in (0.08, 0.04, 0.02, 0.01):
    in_time = (density(0.5 + h, points) - density(0.5 - h, points)) / (2 * h)
    in_space = 0.0
    for i, e in enumerate(h * np.eye(2)):
        ahead, behind = (np.array(density(0.5, x)) * np.array(v(0.5, x))[:, i] for x in (points + e, points - e))
        in_space += (ahead - behind) / (2 * h)
    left_over.append(np.abs(in_time + in_space).max())
    print(f"h = {h}: largest residual of the continuity equation {left_over[-1]:.1e}")
print(f"the last halving of h divided it by {left_over[-2] / left_over[-1]:.2f} (4 for order 2)")
assert abs(left_over[-2] / left_over[-1] - 4) < 0.2

# %% [markdown]
# Automatic differentiation has no step at all. `fm_jax.likelihood.Exact` takes the divergence of any field; applied to
# the flux it completes the equation. (The argument `g` is 0 until noise comes in.)


# %%
@partial(jax.jit, static_argnums=(0, 1))
def residual(density, drift, t, x, g=0.0):
    """d/dt p + div(p drift - g^2 / 2 grad p), which is 0 if the process with this drift and noise has density p."""

    def flux(t, x):
        return density(t, x)[:, None] * drift(t, x) - g**2 / 2 * jax.grad(lambda x: density(t, x).sum())(x)

    change = jax.jvp(lambda t: density(t, x), (t,), (jnp.ones_like(t),))[1]
    return change + likelihood.Exact()(flux, None, t, x)[1]


exact = np.abs(residual(density, v, 0.5, points)).max()
print(f"largest residual by automatic differentiation: {exact:.0e}")
assert exact < 1e-12

# %% [markdown]
# ## Theorem 1: the marginalisation trick
#
# Each conditional path has a velocity $u_t(x \mid x_1)$, so by (4.2)
# $\partial_t p_t(x \mid x_1) = -\nabla\cdot\big(p_t(x \mid x_1)\, u_t(x \mid x_1)\big)$. **Theorem 1** (Lipman et al.
# 2022, arXiv:2210.02747): the marginal path has the velocity
#
# <a id="eq-4-4"></a>
#
# $$
# v_t(x) = \int u_t(x \mid x_1)\, \frac{p_t(x \mid x_1)\, p_{\text{data}}(x_1)}{p_t(x)}\, dx_1
# = \mathbb E\big[u_t \,\big|\, x_t = x\big] \tag{4.4}
# $$
#
# wherever $p_t(x) > 0$. The fraction is Bayes' rule: the density of $x_1$ for a particle that is seen at $x$. The proof
# averages the conditional equations over the data:
#
# <a id="eq-4-5"></a>
#
# $$
# \begin{aligned}
# \partial_t p_t(x) &= \int \partial_t p_t(x \mid x_1)\, p_{\text{data}}(x_1)\, dx_1
# = -\int \nabla\cdot\big(p_t(x \mid x_1)\, u_t(x \mid x_1)\big)\, p_{\text{data}}(x_1)\, dx_1 \\
# &= -\nabla\cdot \int p_t(x \mid x_1)\, u_t(x \mid x_1)\, p_{\text{data}}(x_1)\, dx_1
# = -\nabla\cdot\big(p_t(x)\, v_t(x)\big).
# \end{aligned} \tag{4.5}
# $$
#
# Derivative and integral may be exchanged because, while $\sigma_t > 0$, the integrands on the right grow at most
# linearly in $x_1$, uniformly for $(t, x)$ near a point (a Gaussian outruns all powers), and we take
# $\mathbb E\lVert x_1 \rVert$ to be finite.
#
# For a data set of $n$ points the integral is a sum, and (4.4) a softmax: every data point votes for its own velocity,
# with the probability that the particle is on its way there. Three lines of code do it, beside the oracle of a mixture
# whose components have no width.

# %%
x, x1, t = points[:, None], np.array(data[:40]), 0.5
votes = jax.nn.softmax(scipy.stats.norm.logpdf(x, schedule.alpha(t) * x1, schedule.sigma(t)).sum(axis=-1), axis=1)
by_hand = np.einsum("ik,ikd->id", votes, (x1 - x) / (1 - t))  # u_t(x | x1) = (x1 - x) / (1 - t) on this schedule
data_set = oracles.gaussian_mixture(x1, 0.0)
difference = np.abs(by_hand - prediction(data_set, schedule, t, points).velocity).max()
print(f"velocity of 40 data points, softmax against oracle: largest difference {difference:.0e}")
assert difference < 1e-9

# %% [markdown]
# Below, one particle follows that field; each data point is drawn as large as its vote. On this schedule (4.4) reads
# $v_t(x) = (\mathbb E[x_1 \mid x_t = x] - x) / (1 - t)$: the arrow ends at the weighted average of the data. At first
# all points count much the same, and the particle heads for their mean; the nearer it comes, the fewer remain that it
# may be on its way to. In the end it is one of them: the exact field of a data set generates that data set and nothing
# else.

# %%
start, to_data_set = np.array([[0.2, -2.0]]), oracles.velocity(data_set, schedule)
way = np.array(samplers.sample(to_data_set, start, times=np.linspace(0, 0.95, 191), trajectory=True).trajectory[:, 0])


def draw(t, ax):
    now = way[round(t * 200)]
    vote = jax.nn.softmax(scipy.stats.norm.logpdf(now, t * x1, 1 - t).sum(axis=-1))
    ax.plot(*way[: round(t * 200) + 1].T, color=ORANGE, linestyle="--", linewidth=1)
    ax.scatter(*x1.T, s=6 + 220 * vote, color=BLUE, alpha=0.6, linewidth=0)
    ax.annotate("", vote @ x1, now, arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0})
    ax.plot(*now, "o", color=RED, markersize=6)
    ax.set(xlim=(-2.6, 2.6), ylim=(-2.4, 2.4), xticks=[], yticks=[])


film(
    draw,
    np.linspace(0, 0.95, 20),
    alt="A particle moves towards the average of data points, each drawn as large as its posterior probability.",
    size=(3.0, 2.8),
)

# %% [markdown]
# With more data points the sum approaches the integral, and the field of the data set that of the distribution. It is a
# Monte Carlo average, whose error falls like $1 / \sqrt n$.

# %%
truth = v(0.5, points)
for n in (100, 400, 1600, 6400):
    error = np.std(prediction(oracles.gaussian_mixture(data[:n], 0.0), schedule, 0.5, points).velocity - truth)
    print(f"{n:5d} data points: standard deviation of the error {error:.3f}, times sqrt(n) {error * n**0.5:.2f}")
assert error < 0.06

# %% [markdown]
# ## A check that can fail
#
# A test is worth what it refuses. We put three fields into (4.2): the right one; the average of $u_t(x \mid x_1)$ over
# all data points *without* Bayes' weights, here $(\mathbb E[x_1] - x) / (1 - t)$; and the right one plus a rotation,
# $R\, \nabla \log p_t$ with an antisymmetric matrix $R$. The rotation passes, and must:
# $\nabla \cdot (p_t R\, \nabla \log p_t) = \nabla \cdot (R\, \nabla p_t)$, and
# $\sum_{ij} R_{ij}\, \partial_i \partial_j p_t = 0$.

# %%
mean = mixture.weights @ mixture.means
rotation = np.array([[0.0, -1.0], [1.0, 0.0]])
fields = {
    "v = E[u | x]": v,
    "unweighted average of u": lambda t, x: (mean[None] - x) / (1 - t),
    "v + rotated score": lambda t, x: v(t, x) + score(t, x) @ rotation.T,
}
scale = np.abs(residual(density, zero, 0.5, points)).max()  # d/dt p alone
for name, field in fields.items():
    relative = np.abs(residual(density, field, 0.5, points)).max() / scale
    energy = jnp.sum(field(0.5, points) ** 2, axis=1).mean()
    print(f"{name:>23}: largest residual / largest |d/dt p| = {relative:.0e}, mean |field|^2 = {energy:.2f}")
    assert relative > 0.1 if "unweighted" in name else relative < 1e-10

# %% [markdown]
# So the marginals do not determine the velocity. What singles out $v_t$ is that it is the gradient of some function
# $f$, being a combination of $x$ and the score by [(4.10)](#eq-4-10) below. Take any $w$ with
# $\nabla \cdot (p_t w) = 0$. By parts, given decay at infinity,
# $\mathbb E[v_t \cdot w] = \int p_t\, w \cdot \nabla f\, dx = -\int f\, \nabla \cdot (p_t w)\, dx = 0$, hence
# $\mathbb E \lVert v_t + w \rVert^2 = \mathbb E \lVert v_t \rVert^2 + \mathbb E \lVert w \rVert^2$. Of all fields with
# these marginals, $v_t$ moves with the least energy.
#
# ## With noise: the Fokker-Planck equation
#
# Now let particles obey an [SDE](02_diffusions.ipynb#eq-2-2), $dX_t = f_t(X_t)\, dt + g_t\, dW_t$, with a smooth
# density $p_t$. (The course notes write $\sigma_t$ for our $g_t$.) Take a smooth test function $\varphi$ that vanishes
# outside a bounded set. Over a short time $h$, $X_{t+h} = X_t + h f_t + \sqrt h\, g_t z$ with $z \sim \mathcal N(0, I)$
# independent of $X_t$, up to terms that change the mean of $\varphi$ by less than order $h$. Expand $\varphi$ to second
# order. Since $\mathbb E[z] = 0$ and $\mathbb E[z z^\top] = I$, what remains in the mean is that of Ito's formula,
#
# $$
# \frac{d}{dt}\, \mathbb E[\varphi(X_t)]
# = \mathbb E\Big[ f_t \cdot \nabla \varphi + \frac{g_t^2}{2}\, \Delta \varphi \Big]
# = \int \varphi\, \Big( -\nabla\cdot(p_t f_t) + \frac{g_t^2}{2}\, \Delta p_t \Big)\, dx,
# $$
#
# the second step by parts, once for $\nabla$ and twice for $\Delta = \nabla\cdot\nabla$; there are no boundary terms as
# $\varphi$ is zero out there. The left side is $\int \varphi\, \partial_t p_t\, dx$. As this holds for every $\varphi$,
# we get the **Fokker-Planck equation**
#
# <a id="eq-4-6"></a>
#
# $$
# \partial_t p_t = -\nabla\cdot(p_t f_t) + \frac{g_t^2}{2}\, \Delta p_t
# = -\nabla\cdot\Big( p_t f_t - \frac{g_t^2}{2}\, \nabla p_t \Big). \tag{4.6}
# $$
#
# The second form is a continuity equation: noise adds a flux down the slope of the density. For $g_t = 0$ it is (4.2).
# The Ornstein-Uhlenbeck process $dX = -\theta X\, dt + g\, dW$ of [notebook 2](02_diffusions.ipynb), whose Gaussian law
# is known exactly, confirms it, factor $\frac12$ included.

# %%
theta, g, places = 1.5, 0.8, np.linspace(-2.0, 3.0, 101)[:, None]


def ornstein_uhlenbeck(t, x):
    decay, limit = jnp.exp(-theta * t), g**2 / (2 * theta)  # started from N(2, 1/2)
    return jax.scipy.stats.norm.pdf(x[:, 0], 2 * decay, jnp.sqrt(limit + (0.5 - limit) * decay**2))


for name, factor in (("g^2 / 2", 1.0), ("g^2", 2.0)):
    left = residual(ornstein_uhlenbeck, lambda t, x: -theta * x, 0.4, places, factor**0.5 * g)
    print(f"Ornstein-Uhlenbeck density, noise term with {name:>7}: largest residual {np.abs(left).max():.0e}")
    assert (np.abs(left).max() < 1e-12) == (factor == 1)

# %% [markdown]
# ## Theorem 2: any amount of noise
#
# Write $s_t = \nabla \log p_t$ for the score of the marginals, which are positive everywhere while $\sigma_t > 0$.
# **Theorem 2:** for every $g_t \ge 0$ the SDE
#
# <a id="eq-4-7"></a>
#
# $$
# dX_t = \Big[ v_t(X_t) + \frac{g_t^2}{2}\, s_t(X_t) \Big]\, dt + g_t\, dW_t, \qquad X_0 \sim p_0, \tag{4.7}
# $$
#
# has the marginals $p_t$ of the flow. The proof is one line: as $p_t s_t = \nabla p_t$, the flux in (4.6) is
#
# $$
# p_t \Big( v_t + \frac{g_t^2}{2}\, s_t \Big) - \frac{g_t^2}{2}\, \nabla p_t = p_t\, v_t.
# $$
#
# What the noise spreads, the score pulls back, at every place and time, and (4.6) is the continuity equation that $p_t$
# solves already. That the equation has no *other* solution from $p_0$ is the one fact that we quote: it holds for a
# drift that is locally Lipschitz in $x$ and grows at most linearly, and a bounded $g_t$ (Bogachev, Krylov, Röckner and
# Shaposhnikov 2015, Fokker-Planck-Kolmogorov Equations). On the Gaussian path that is so up to any $t < 1$, for data in
# a bounded region or a Gaussian mixture.
#
# Nor does the score need a new idea. Divide $\nabla p_t(x) = \int \nabla p_t(x \mid x_1)\, p_{\text{data}}(x_1)\, dx_1$
# by $p_t(x)$: the marginal score is the same posterior average, of the conditional score
# [(3.5)](03_paths.ipynb#eq-3-5):
#
# <a id="eq-4-8"></a>
#
# $$
# s_t(x) = \mathbb E\big[\nabla \log p_t(x \mid x_1) \,\big|\, x_t = x\big]
# = \mathbb E\Big[ -\frac{x_0}{\sigma_t} \,\Big|\, x_t = x \Big]. \tag{4.8}
# $$

# %%
t = 0.5
by_hand = np.einsum("ik,ikd->id", votes, -(x - schedule.alpha(t) * x1) / schedule.sigma(t) ** 2)
difference = np.abs(by_hand - prediction(data_set, schedule, t, points).score).max()
print(f"score of 40 data points, softmax against oracle: largest difference {difference:.0e}")
assert difference < 1e-9
with_score = jax.jit(lambda g: residual(density, lambda t, x: v(t, x) + g**2 / 2 * score(t, x), 0.5, points, g))
for g in (0.0, 0.5, 2.0):
    kept, dropped = (np.abs(each).max() / scale for each in (with_score(g), residual(density, v, 0.5, points, g)))
    print(f"g = {g}: largest residual / largest |d/dt p| = {kept:.0e}; without the score {dropped:.0e}")
    assert kept < 1e-10
    assert (dropped > 0.05) == (g > 0)

# %% [markdown]
# ## One family, simulated
#
# On a line, with data from three Gaussians, `fm_jax.samplers.sample` runs (4.7) for four choices of $g_t$: none,
# which is the flow; a constant; a bump; and a large constant. Velocity and score are the oracle's. (With one network
# for both, the sampler derives the score from the velocity, see [(4.10)](#eq-4-10).) We ask three things of each.
#
# * Has it the right marginals, at $t = \frac14, \frac12, \frac34, 1$? The Kolmogorov-Smirnov distance to the oracle's
#   `fm_jax.oracles.cdf` says, as in [notebook 3](03_paths.ipynb). Heun's method with 200 steps keeps the solver's own
#   error far below the statistical one.
# * How rough are its paths? Their quadratic variation, the sum of squared steps, should be $\int_0^1 g_t^2\, dt$ as the
#   steps shrink.
# * How much does the end remember of the start? A flow on a line keeps the order of the particles, so that the rank
#   correlation of $X_0$ and $X_1$ is 1. Noise forgets.

# %%
target = oracles.gaussian_mixture([[-1.6], [0.1], [1.5]], [0.3, 0.25, 0.35], [0.35, 0.25, 0.4])
num, num_steps = 6_000, 200
critical = scipy.stats.kstwobign.isf(0.01 / 16) / np.sqrt(num)  # of the largest of 16 distances, at 1%
key_x0, key_wide, key_gauss, key_langevin, *keys = jax.random.split(jax.random.key(1), 8)
x0 = jax.random.normal(key_x0, (num, 1))
options = {"times": num_steps, "trajectory": True}


def distance(t, x):
    return scipy.stats.kstest(cdf(target, schedule, t, x[:, None]), "uniform", method="asymp").statistic


@jax.jit
def simulate(key, a, b):
    exact = partial(oracles.prediction, target, schedule)
    v, s, g = lambda t, x: exact(t, x).velocity, lambda t, x: exact(t, x).score, lambda t: a + b * jnp.sin(jnp.pi * t)
    return samplers.sample(v, x0, samplers.StochasticHeun(diffusion=g, score=s), key=key, **options).trajectory[..., 0]


runs, distances = {}, []
for (a, b), key in zip(((0.0, 0.0), (0.7, 0.0), (0.0, 2.0), (2.5, 0.0)), keys, strict=True):
    x = runs[a, b] = np.array(simulate(key, a, b))
    distances.append([distance(t, x[round(t * num_steps)]) for t in (0.25, 0.5, 0.75, 1.0)])
    variation, expected = (np.diff(x, axis=0) ** 2).sum(axis=0).mean(), a**2 + b**2 / 2  # the integral of g^2
    print(f"g = {a} + {b} sin(pi t): KS distance at most {max(distances[-1]):.4f}, ", end="")
    print(f"quadratic variation {variation:.2f} (expected {expected:.2f}), ", end="")
    print(f"rank correlation {scipy.stats.spearmanr(x[0], x[-1]).statistic:.2f}")
    assert abs(variation - expected) < 0.06 * expected + 0.03
print(f"1% critical value of the largest of 16 KS distances: {critical:.4f}")

# %% [markdown]
# ## Noise without the score
#
# Keep $v_t$ and add noise, but leave the score out: the result is too wide. How much too wide is exact for Gaussian
# data $x_1 \sim \mathcal N(0, c^2)$ on the linear schedule. There $p_t = \mathcal N(0, S_t)$ with
# $S_t = c^2 t^2 + (1 - t)^2$, and $v_t(x) = \frac{S_t'}{2 S_t}\, x$, the linear field that stretches everything in step
# with $\sqrt{S_t}$. Let $V_t$ be the variance of $dX = v_t(X)\, dt + g\, dW$. Then $V_t' = \frac{S_t'}{S_t} V_t + g^2$,
# so $(V_t / S_t)' = g^2 / S_t$, with $V_0 = S_0 = 1$ and
#
# <a id="eq-4-9"></a>
#
# $$
# V_1 = S_1 \Big( 1 + \int_0^1 \frac{g^2}{S_t}\, dt \Big) = c^2 + \frac{\pi}{2}\, c\, g^2, \tag{4.9}
# $$
#
# as $\int_0^1 dt / S_t = \int_0^\infty dr / (1 + c^2 r^2) = \pi / (2c)$ by the substitution $r = t / (1 - t)$.

# %%
c, g = 0.5, 0.7
v_gauss, v_target = (oracles.velocity(m, schedule) for m in (oracles.gaussian_mixture([[0.0]], c), target))
no_score = samplers.StochasticHeun(diffusion=g, score=zero)
variance = samplers.sample(v_gauss, x0, no_score, key=key_gauss, **options).x.var()
expected, error = c**2 + np.pi / 2 * c * g**2, np.sqrt(2 / num)
print(f"variance at t = 1: {variance:.3f}, by (4.9) {expected:.3f} +- {expected * error:.3f}; of the data {c**2:.3f}")
assert abs(variance / expected - 1) < 6 * error
runs["no score"] = samplers.sample(v_target, x0, no_score, key=key_wide, **options).trajectory[..., 0]
print(f"the three Gaussians without the score: KS distance {distance(1.0, runs['no score'][-1]):.3f}")
assert distance(1.0, runs["no score"][-1]) > 1.5 * critical

# %% [markdown]
# ## Two special cases
#
# **Langevin dynamics.** If the path stands still, $p_t = p$ and $v_t = 0$, then (4.7) is
# $dX = \frac{g^2}{2} \nabla \log p\, dt + g\, dW$. It leaves $p$ as it is, and for densities like ours brings any other
# start to $p$ in the end. But it has to wait for chance to carry particles over the valleys between modes, where our
# path brings everything together first, as noise. Here it starts in the left mode alone, with $g = 2.5$. With this $g$,
# (4.7) took one unit of time from noise to the data, of which 65% lie to the right of $-0.7$.


# %%
def score_of_data(t, x):
    return prediction(target, schedule, 1.0, x).score


options["times"], left_mode = samplers.grids.uniform(1200, 0.0, 6.0), -1.6 + 0.3 * x0[:2000]
langevin = samplers.StochasticHeun(diffusion=2.5, score=score_of_data)
still = samplers.sample(nfe.Counted(zero, None, domain=(0.0, 6.0)), left_mode, langevin, key=key_langevin, **options)
for t in (0, 1, 2, 6):
    x = np.array(still.trajectory[200 * t, :, 0])
    print(f"Langevin, t = {t}: share right of -0.7 {np.mean(x > -0.7):.2f}, KS distance {distance(1.0, x):.3f}")
assert distance(1.0, x) < 0.4

# %% [markdown]
# **Diffusion models.** In the other direction of time, $\tau = 1 - t$, the path has the velocity $-v_t$, so that
# Theorem 2 gives a process from data to noise, with drift $-v_t + \frac{g_t^2}{2} s_t$. One $g_t$ makes it simple. By
# (4.8) the mean noise at $x$ is $\mathbb E[x_0 \mid x_t = x] = -\sigma_t s_t$; as $x = \alpha_t x_1 + \sigma_t x_0$
# there, the mean data is $(x + \sigma_t^2 s_t) / \alpha_t$, where $\alpha_t > 0$. Put into (4.4) with
# $u_t = \alpha_t' x_1 + \sigma_t' x_0$:
#
# <a id="eq-4-10"></a>
#
# $$
# v_t = \frac{\alpha_t'}{\alpha_t}\, x + \Big( \frac{\alpha_t'}{\alpha_t} \sigma_t^2 - \sigma_t \sigma_t' \Big)\, s_t
# = \frac{\alpha_t'}{\alpha_t}\, x + \frac{\sigma_t^2 \lambda_t'}{2}\, s_t, \qquad
# -v_t + \frac{g_t^2}{2} s_t = -\frac{\alpha_t'}{\alpha_t}\, x \ \text{ if }\ g_t^2 = \sigma_t^2 \lambda_t', \tag{4.10}
# $$
#
# with the log-SNR $\lambda_t$ of [(3.6)](03_paths.ipynb#eq-3-6). (The first equation turns velocity into score and
# back; [(5.6)](05_losses.ipynb#eq-5-6) has all such conversions.) The noising process then needs no score. It is an
# Ornstein-Uhlenbeck process whose rate depends on time (Brownian motion where $\alpha_t$ is constant), and can be run
# on data before anything is learnt: that is how diffusion models begin, and on their schedule `fm_jax.schedules.VP` it
# is $g_t^2 = \beta(1 - t)$. Back from noise to data (4.7) with the same $g_t$ is Anderson's (1982) reversal of time,
# but any other will do (Song et al. 2021, arXiv:2011.13456; Albergo et al. 2023, arXiv:2303.08797).

# %%
vp, t = schedules.VP(), 0.6
alpha, sigma, d_alpha, _ = jax.jit(schedules.coefficients, static_argnums=0)(vp, t)
g2 = sigma**2 * jax.jit(jax.grad(lambda t: schedules.log_snr(vp, t)))(t)
at = prediction(mixture, vp, t, points)
difference = jnp.abs(at.velocity - g2 / 2 * at.score - d_alpha / alpha * points).max()
print(f"VP: g^2 = {g2:.4f}, beta = {0.1 + 19.9 * (1 - t):.4f}; noising drift against the linear one: {difference:.0e}")
assert abs(g2 - (0.1 + 19.9 * (1 - t))) < 1e-9
assert difference < 1e-9

# %% [markdown]
# ## The picture
#
# Time runs to the right; the shading is the exact marginal density $p_t(x)$, the same in all four; on top are eight
# paths. Below stand the 6,000 end points (bars) and the exact density of the data (line). From the flow to strong noise
# the paths change beyond recognition and the marginals not at all, until the score is left out.

# %%
times, places = np.linspace(0, 1, 101), np.linspace(-3.5, 3.5, 141)
shade = np.array([np.exp(log_prob(target, schedule, t, places[:, None])) for t in times]).T
fig, axes = plt.subplots(2, 4, figsize=(7, 4.2), sharey="row", gridspec_kw={"height_ratios": [1.5, 1]})
panels = {"g = 0, the flow": (0.0, 0.0), "g = 0.7": (0.7, 0.0), "g = 2.5": (2.5, 0.0), "g = 0.7, no score": "no score"}
for (title, name), (above, below) in zip(panels.items(), axes.T, strict=True):
    above.imshow(shade, extent=(0, 1, -3.5, 3.5), origin="lower", aspect="auto", vmax=0.8)
    above.plot(np.linspace(0, 1, num_steps + 1), runs[name][:, :8], color=INK, linestyle="-", linewidth=0.6)
    above.plot([1] * 8, runs[name][-1, :8], "o", color=RED, markersize=3, clip_on=False)
    above.set(title=title, xlabel="t", xticks=[0, 1], ylim=(-3.5, 3.5))
    color = ORANGE if name == "no score" else GREY
    below.hist(runs[name][-1], 60, range=(-3.5, 3.5), density=True, color=color, alpha=0.6)
    below.plot(places, shade[:, -1], color=BLUE, linestyle="-")
    below.set(xlabel="x at t = 1", xticks=[-2, 0, 2], yticks=[])
axes[0, 0].set_ylabel("x")
plt.show()
worst = np.max(distances)
print(f"largest of 16 Kolmogorov-Smirnov distances, four g, four times: {worst:.4f} (1% critical value {critical:.4f})")
assert worst < scipy.stats.kstwobign.isf(1e-4 / 16) / np.sqrt(num) + 0.002  # the last for the steps' own error

# %% [markdown]
# A velocity generates a path exactly if the two obey the continuity equation. The posterior average of the conditional
# velocities does. With the score, which is such an average too, any amount of noise may be added and the marginals
# stay. And averages are what least squares learns.
#
# Next: [Losses](05_losses.ipynb).
