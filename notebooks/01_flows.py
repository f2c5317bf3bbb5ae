# %% [markdown]
# # 1. Flows
#
# How does one make a new picture, when all there is is a pile of old ones? Draw noise and let it flow: a **velocity
# field** moves every point, and after one unit of time the cloud of noise has become a cloud of data. This notebook
# defines the words (trajectory, vector field, ODE, flow), proves that a flow can be undone, measures the error of
# Euler's method against a closed form, and ends with samples of a mixture of Gaussians made from noise.
#
# It is the first of eleven and needs calculus and a little probability. The next one,
# [diffusions](02_diffusions.ipynb), adds noise to the motion.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from lab import BLUE, GREEN, GREY, INK, ORANGE, PALE, RED, SMOKE, film
from scipy import stats
from scipy.linalg import expm

from fm_jax import metrics, oracles
from fm_jax.samplers import RungeKutta, grids, sample
from fm_jax.schedules import Linear

jax.config.update("jax_enable_x64", True)  # errors of a fourth-order method are soon below the rounding of float32

# %% [markdown]
# ## Generation is sampling
#
# A picture, a film, a molecule: each is a vector $x\in\mathbb{R}^d$, so many pixels by so many colours. Most vectors
# are not pictures of anything. What is meant by "the pictures" is a probability distribution $p_\text{data}$ on
# $\mathbb{R}^d$, high where pictures are and almost zero elsewhere, and **to generate is to draw
# $x_1\sim p_\text{data}$**. To generate with a prompt $y$ is to draw from $p_\text{data}(\cdot\mid y)$, another
# distribution for each $y$, which is what [guidance](06_guidance.ipynb) is about.
#
# Nobody has a formula for $p_\text{data}$. There is a data set: finitely many draws
# $x_1^{(1)},\dots,x_1^{(N)}\sim p_\text{data}$, from which averages are known up to an error of order $1/\sqrt N$ and
# no better. In these notebooks we do have the formula: our data are a mixture of Gaussians in the plane, made by
# `fm_jax.oracles.gaussian_mixture`, so that every claim can be held against the truth.

# %%
key_data, key_noise, key_judge = jax.random.split(jax.random.key(0), 3)
means, weights = np.array([[-1.7, -0.8], [1.6, -0.9], [0.2, 1.6]]), np.array([0.4, 0.35, 0.25])
covariances = np.array([[[0.12, 0.07], [0.07, 0.16]], [[0.25, -0.08], [-0.08, 0.08]], [[0.40, 0.0], [0.0, 0.05]]])
mixture = oracles.gaussian_mixture(means, covariances, weights)

centre = weights @ means  # the mean of p_data, and its covariance: that within the components plus that between them
spread = np.einsum("k,kij->ij", weights, covariances + np.einsum("ki,kj->kij", means - centre, means - centre))
data_set = np.asarray(oracles.sample(mixture, key_data, 10_000))
for num in (100, 10_000):
    error, expected = np.linalg.norm(data_set[:num].mean(axis=0) - centre), np.sqrt(np.trace(spread) / num)
    print(f"{num:6} examples: their mean is off by {error:.4f}, where sqrt(tr Cov / N) = {expected:.4f} is usual")
    assert error < 4 * expected

# %% [markdown]
# The other thing we have is noise. It is easy to draw $x_0\sim p_\text{init}$, as a rule from the standard normal
# distribution $\mathcal N(0, I)$. **A generative model is a machine that turns a draw from $p_\text{init}$ into a draw
# from $p_\text{data}$.** It could be one big map $x_0\mapsto x_1$, as in a GAN. A flow model takes the way of small
# steps instead: it says in which direction and how fast to go from where you are, and you go.

# %% [markdown]
# ## Trajectory, field, flow
#
# Time $t$ runs from 0 (noise) to 1 (data). A **trajectory** is a path $t\mapsto x_t\in\mathbb{R}^d$. A **velocity
# field** $v_t(x)$ gives a velocity to every place at every time. A trajectory follows the field if it solves the
# **ordinary differential equation** (ODE)
#
# <a id="eq-1-1"></a>
#
# $$
# \frac{\mathrm d}{\mathrm dt}x_t = v_t(x_t), \qquad x_0 \text{ given}. \tag{1.1}
# $$
#
# Let go of a point $x$ at time $s$ and look where it is at time $t$: that is $\varphi_{s,t}(x)$. All trajectories
# together, as a function of where and when they begin, are the **flow**. If each start determines the rest of the way,
# then going from $r$ to $s$ and on to $t$ is going from $r$ to $t$, and going back undoes it:
#
# <a id="eq-1-2"></a>
#
# $$
# \varphi_{s,t}\circ\varphi_{r,s} = \varphi_{r,t}, \qquad \varphi_{t,t} = \mathrm{id}, \qquad
# \varphi_{t,s} = \varphi_{s,t}^{-1}. \tag{1.2}
# $$
#
# A field defines an ODE, an ODE has a flow, and a trajectory is one path of the flow. In a **flow model** the field is
# a network $v_t^\theta(x)$; the network is the velocity, not the flow, which still has to be computed by following it.
# That is a bargain. An invertible map is hard to parametrise (the sum of the invertible maps $x$ and $-x$ is 0), while
# every smooth field of bounded slope will do as a velocity, and the sum of two such fields is another.

# %% [markdown]
# One flow that is known in closed form: a swirl that comes to rest. With a matrix $A$ that turns and shrinks,
#
# $$
# v_t(x) = 2(1-t)\,A\,x,\quad A = \begin{pmatrix}-a & -b\\ b & -a\end{pmatrix}
# \qquad\Longrightarrow\qquad
# \varphi_{s,t}(x) = e^{(\tau_t-\tau_s)A}\,x,\quad \tau_t = 2t - t^2,
# $$
#
# because $\dot\tau_t = 2(1-t)$ and $\frac{\mathrm d}{\mathrm d\tau}e^{\tau A} = A\,e^{\tau A}$. Here
# $e^{\tau A} = e^{-a\tau}\begin{pmatrix}\cos b\tau & -\sin b\tau\\ \sin b\tau & \cos b\tau\end{pmatrix}$, since
# $A = -a I + b J$ with $J^2 = -I$. The cell checks all of that: the matrix exponential, the ODE (by automatic
# differentiation in $t$), and the composition [(1.2)](#eq-1-2).

# %%
a, b = 0.6, 2.0
A = np.array([[-a, -b], [b, -a]])


def swirl(t, x):
    return 2 * (1 - t) * x @ A.T


def swirl_flow(s, t, x):
    tau = (2 * t - t**2) - (2 * s - s**2)
    turn = jnp.array([[jnp.cos(b * tau), -jnp.sin(b * tau)], [jnp.sin(b * tau), jnp.cos(b * tau)]])
    return jnp.exp(-a * tau) * x @ turn.T


x0 = jax.random.normal(key_noise, (1500, 2))
r, s, t = 0.1, 0.4, 0.9
x_t, slope = jax.jvp(lambda t: swirl_flow(0.0, t, x0), (t,), (1.0,))
off = {
    "matrix exponential": jnp.abs(swirl_flow(0.0, 1.0, x0) - x0 @ expm(A).T).max(),
    "ODE (1.1)": jnp.abs(slope - swirl(t, x_t)).max(),
    "composition (1.2)": jnp.abs(swirl_flow(s, t, swirl_flow(r, s, x0)) - swirl_flow(r, t, x0)).max(),
    "inverse (1.2)": jnp.abs(swirl_flow(1.0, 0.0, swirl_flow(0.0, 1.0, x0)) - x0).max(),
}
print("largest differences:", ", ".join(f"{name} {value:.0e}" for name, value in off.items()))
assert max(off.values()) < 1e-12

# %% [markdown]
# ## When does each start determine the rest?
#
# **Theorem** (Picard and Lindelöf). Let $v$ be continuous and let its slope in $x$ be bounded:
# $|v_t(x)-v_t(y)|\le L\,|x-y|$ for all $t\in[0,1]$ and all $x, y$ (*Lipschitz*). Then [(1.1)](#eq-1-1) has exactly one
# solution through each point at each time, and it exists on all of $[0,1]$. (A network of linear layers and
# activations of bounded slope is Lipschitz.)
#
# *Proof.* The solutions from $x_0$ are the continuous paths with $X = \Gamma X$, where
# $(\Gamma X)_t = x_0 + \int_0^t v_r(X_r)\,\mathrm dr$. Measure the distance of two paths by
# $\|X-Y\| = \max_t e^{-2Lt}|X_t-Y_t|$. Then
# $|(\Gamma X-\Gamma Y)_t| \le \int_0^t L\,e^{2Lr}\,\|X-Y\|\,\mathrm dr \le \tfrac12 e^{2Lt}\,\|X-Y\|$, so that
# $\Gamma$ halves distances, and a map of a complete space that halves distances has exactly one fixed point. Starts at
# other times, and the way back, go alike. $\square$
#
# How far apart do two trajectories get? The squared distance $D = |x_t-y_t|^2$ has
# $|\dot D| = 2\,|(x_t-y_t)\cdot(v_t(x_t)-v_t(y_t))| \le 2LD$. So $D e^{2Lt}$ never falls and $D e^{-2Lt}$ never rises
# (*Grönwall*):
#
# <a id="eq-1-3"></a>
#
# $$
# e^{-L(t-s)}\,|x-y| \;\le\; |\varphi_{s,t}(x)-\varphi_{s,t}(y)| \;\le\; e^{L(t-s)}\,|x-y|, \qquad s\le t. \tag{1.3}
# $$
#
# The left inequality says that **trajectories never meet**; with the way back it makes $\varphi_{s,t}$ one-to-one and
# onto. Where $v$ also has a continuous derivative in $x$, so has the flow (that belongs to the classical theorem): its
# Jacobian solves the derivative of [(1.1)](#eq-1-1), the linear ODE $\dot J_t = \nabla v_t(x_t)\,J_t$, $J_s = I$. The
# way back has one too, so flow maps are **diffeomorphisms**: they bend and stretch space but never tear or fold it.
#
# The condition is not a formality. The field $v(x) = 3x^{2/3}$ has an infinite slope at 0, and many solutions start
# there, $x_t = 0$ and $x_t = t^3$ among them. From $x>0$ the solution is $(x^{1/3}+t)^3$: a distance of $10^{-12}$
# grows to 1. No such thing happens to the swirl. Its $L$ at time $t$ is $2(1-t)\,|A|$, with $|A| = \sqrt{a^2+b^2}$ the
# largest stretch of a vector by $A$, and $\int_0^1 2(1-t)\,\mathrm dt = 1$, so that $e^{\pm|A|}$ bounds the scaling of
# distances, which is exactly $e^{-a}$.

# %%
start = jnp.array([[0.0], [1e-12]])
end = sample(lambda t, x: 3 * jnp.cbrt(x) ** 2, start, RungeKutta("rk4"), times=4000).x[:, 0]
print(f"3 x^(2/3): starts {start[1, 0]:.0e} apart end {end[1] - end[0]:.3f} apart; closed form {(1e-4 + 1) ** 3:.3f}")
assert end[0] == 0
assert jnp.abs(end[1] - (1e-4 + 1) ** 3) < 0.02

norm = np.linalg.norm(A, 2)
before, after = (jnp.linalg.norm(jnp.diff(x, axis=0), axis=1) for x in (x0, swirl_flow(0.0, 1.0, x0)))
ratios = after / before
print(f"the swirl scales distances by {ratios.min():.4f} to {ratios.max():.4f}: exp(-a) = {np.exp(-a):.4f},", end=" ")
print(f"between the bounds {np.exp(-norm):.4f} and {np.exp(norm):.1f} of (1.3)")
assert np.exp(-norm) <= ratios.min()
assert ratios.max() <= np.exp(norm)

# %% [markdown]
# ## Euler's method
#
# A network's flow has no closed form. Euler's method pretends that the velocity stays what it is for a short time
# $h = 1/n$:
#
# <a id="eq-1-4"></a>
#
# $$
# x_{t+h} = x_t + h\,v_t(x_t), \qquad t = 0,\ h,\ 2h,\ \dots,\ 1-h. \tag{1.4}
# $$
#
# These are $n$ steps: a loop over $1,\dots,n-1$ would stop at $1-h$. In code it takes three lines, and they give what
# `fm_jax.samplers.sample` gives with `RungeKutta("euler")`. That function takes a velocity function `v(t, x)`, never a
# model: it is the one interface of the library. How $v$ is followed is a value, and every sampler is run like this one.

# %%
x, h = x0, 1 / 20
for i in range(20):
    x = x + h * swirl(i * h, x)

euler = sample(swirl, x0, RungeKutta("euler"), times=20, trajectory=True)
print(f"Euler by hand and sample differ by at most {jnp.abs(x - euler.x).max():.0e}, after {euler.calls} evaluations")
assert jnp.abs(x - euler.x).max() < 1e-12

# %% [markdown]
# The picture: arrows are the field at $t=0$ (later they shrink to nothing), lines are trajectories in closed form,
# squares are Euler's steps. A step leaves along the tangent and so, here, always lands on the outer side of the curve.
# The errors add up, and the field decides whether they grow or shrink on the way.

# %%
fig, ax = plt.subplots(figsize=(4.4, 4.0))
grid = np.stack(np.meshgrid(np.linspace(-2, 2, 11), np.linspace(-2, 2, 11)), axis=-1).reshape(-1, 2)
ax.quiver(*grid.T, *swirl(0.0, grid).T, color=GREY, width=0.003, scale=110, pivot="mid")
starts = 1.9 * np.stack([np.cos((0.3, 2.4, 4.5)), np.sin((0.3, 2.4, 4.5))], axis=1)
exact = np.asarray(jax.vmap(swirl_flow, (None, 0, None))(0.0, np.linspace(0, 1, 60), starts))
coarse = np.asarray(sample(swirl, starts, RungeKutta("euler"), times=8, trajectory=True).trajectory)
for k in range(3):
    ax.plot(*exact[:, k].T, color=BLUE, ls="-", marker="o", markevery=[-1])
    ax.plot(*coarse[:, k].T, color=RED, ls=":", marker="s", ms=3)
    ax.plot(*starts[k], "o", color=INK, mfc="white")
ax.annotate("exact", exact[25, 0], (-8, -8), textcoords="offset points", color=BLUE, ha="right", va="top")
ax.annotate("Euler, 8 steps", coarse[2, 0], (6, 4), textcoords="offset points", color=RED)
ax.set(title="A swirl that comes to rest", xlabel="first coordinate", ylabel="second coordinate", aspect="equal")
ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
plt.show()

# %% [markdown]
# How wrong is it? Let $M$ bound $|\ddot x_t|$ along the solution. By Taylor's formula,
# $x_{t+h} = x_t + h\,v_t(x_t) + \int_0^h (h-r)\,\ddot x_{t+r}\,\mathrm dr$, so that one step starting on the solution
# is off by at most $Mh^2/2$. An error $e_n$ that is already there is changed by the step to at most $(1+hL)\,e_n$.
# Together $e_{n+1}\le(1+hL)\,e_n + Mh^2/2$ with $e_0 = 0$, and by summing the geometric series
#
# <a id="eq-1-5"></a>
#
# $$
# e_n \;\le\; \frac{Mh}{2L}\big((1+hL)^n - 1\big) \;\le\; \frac{Mh}{2L}\,\big(e^{L} - 1\big) \;=\; O(h). \tag{1.5}
# $$
#
# This is a worst case: it lets every error grow as fast as $L$ allows, where the swirl shrinks them. Its message is
# $O(h)$: Euler's method has **order 1**, half the step, half the error. A method of order $p$ looks at $v$ several
# times within a step, so that the terms of Taylor's series cancel up to $h^p$; one step is then off by $O(h^{p+1})$,
# and the same sum gives $O(h^p)$ at the end. The midpoint method looks once more, half a step ahead; Heun's method at
# the end of the step; the classical Runge-Kutta method ("rk4") looks four times. The price of a step is the number of
# looks: each is an evaluation of the network. (`fm_jax.samplers.Adaptive` chooses its steps by itself.) Orders
# are slopes on doubly logarithmic paper.

# %%
truth = swirl_flow(0.0, 1.0, x0)
lipschitz, second = 2 * norm, (2 * norm + 4 * norm**2) * jnp.linalg.norm(x0, axis=1)  # L, and M for each particle
bound = second / 20 / (2 * lipschitz) * (np.exp(lipschitz) - 1)
share = (jnp.linalg.norm(euler.x - truth, axis=1) / bound).max()
print(f"Euler's error in 20 steps is at most {share:.3f} of the bound (1.5)")
assert share < 1

orders = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
steps = np.array([16, 32, 64, 128])
styles = dict(zip(orders, ((RED, "s", ":"), (ORANGE, "^", "--"), (GREEN, "v", "-."), (BLUE, "o", "-")), strict=True))
fig, ax = plt.subplots(figsize=(5.4, 3.4))
for method, order in orders.items():
    solutions = [sample(swirl, x0, RungeKutta(method), times=n) for n in steps]
    calls = np.array([int(solution.calls) for solution in solutions])
    errors = np.array([jnp.sqrt(((solution.x - truth) ** 2).sum(axis=1).mean()) for solution in solutions])
    measured = -np.polyfit(np.log(calls[1:]), np.log(errors[1:]), 1)[0]
    print(f"{method:9} order {order}, measured {measured:.3f}")
    assert abs(measured - order) < 0.2
    color, marker, dash = styles[method]
    ax.loglog(calls, errors, color=color, marker=marker, ls=dash)
    lift = {"midpoint": 5, "heun": -5}.get(method, 0)
    label = f"{method}, slope {-measured:.2f}"
    ax.annotate(label, (calls[-1], errors[-1]), (6, lift), textcoords="offset points", va="center", color=color)
ax.set(title="Error at t = 1 against the closed form", xlabel="evaluations of v", ylabel="root mean square distance")
ax.set_xlim(right=6000)
plt.show()

# %% [markdown]
# ## What a flow does to a distribution
#
# So far single points. Now let $x_0\sim p_0$ be random; then $x_t = \varphi_{0,t}(x_0)$ is random too, and its
# distribution is called $p_t$. The task of a flow model is to find a field with $p_0 = p_\text{init}$ and
# $p_1 = p_\text{data}$. For a mixture of Gaussians such a field exists in closed form: `fm_jax.oracles.velocity`. It
# belongs to the family of distributions $p_t$ of $x_t = t\,x_1 + (1-t)\,x_0$, with data $x_1$ and noise $x_0$ drawn
# independently ([paths](03_paths.ipynb)), and why it is the right field is the subject of [notebook
# 4](04_continuity.ipynb#eq-4-4). It satisfies the theorem's conditions: with covariances $C_k$ that are positive
# definite, all that it divides by, $\alpha^2C_k+\sigma^2I$, stays away from 0, and its slope is bounded on all of
# $[0,1]$. (For data at isolated points it would grow without bound as $t\to1$, and the flow would be defined for $t<1$
# only.)
#
# Here we take the field as given and check that it does what it says. In one dimension that can be done without
# sampling. Trajectories never meet, so they keep their order, and $\varphi_{0,t}$ is increasing; what lies to the left
# of a trajectory stays on its left. With the distribution functions $F_t(x) = P(x_t\le x)$,
#
# <a id="eq-1-6"></a>
#
# $$
# F_t\big(\varphi_{0,t}(x)\big) = F_0(x) \qquad\text{for all } t \text{ and } x: \tag{1.6}
# $$
#
# **a trajectory stays at its quantile**. The marginal of the path is the mixture of
# $\mathcal N(\alpha m_k, \alpha^2 s_k^2+\sigma^2)$ with $\alpha = t$, $\sigma = 1-t$, whose distribution function is a
# weighted sum of normal ones, `fm_jax.oracles.cdf`. The cell starts 41 trajectories at quantiles of the noise and asks
# at all times which quantile they are at.

# %%
line = oracles.gaussian_mixture([[-1.6], [1.2]], [0.25, 0.5], [0.4, 0.6])
quantiles = np.linspace(0.01, 0.99, 41)
times = np.linspace(0, 1, 129)
schedule = Linear()
v_line = oracles.velocity(line, schedule)
start = jnp.asarray(stats.norm.ppf(quantiles))[:, None]
paths = np.asarray(sample(v_line, start, RungeKutta("rk4"), times=times, trajectory=True).trajectory)
held = jax.vmap(oracles.cdf, (None, None, 0, 0))(line, schedule, times, paths)
drift = np.abs(held - quantiles).max()
print(f"over all times, no trajectory leaves its quantile by more than {drift:.0e}")
assert drift < 1e-5

x_axis = jnp.linspace(-3, 3, 150)
log_density = jax.vmap(oracles.log_prob, (None, None, 0, None))(line, schedule, times[::2], x_axis[:, None])
fig, ax = plt.subplots(figsize=(5.6, 3.4))
shade = ax.contourf(times[::2], x_axis, np.exp(log_density).T, levels=np.linspace(0, 0.8, 17), extend="max")
ax.plot(times, paths[:, ::2, 0], color=INK, lw=0.7, ls="-")
ax.plot(times, paths[:, 20, 0], color=RED, lw=2, ls="--")
ax.text(0.76, 0.12, "median", color=RED)
ax.set(title="Trajectories over the density $p_t$", xlabel="t: noise to data", ylabel="x", ylim=(-3, 3))
fig.colorbar(shade, label="density", aspect=30, ticks=[0, 0.2, 0.4, 0.6, 0.8])
plt.show()

# %% [markdown]
# ## In the plane
#
# Now the mixture of three Gaussians. On the left, particles that begin as noise; on the right, a square grid of lines
# that are carried along by the same flow. Colours tell where a particle will end: with trajectories that cannot meet,
# the noise is divided into territories from the start. The grid shows the diffeomorphism: it is squeezed where
# probability gathers and stretched where it is pulled apart, no line is ever cut, and no two lines meet that did not
# meet before. (Move the slider, or press play; in print there are stills.)

# %%
v = oracles.velocity(mixture, schedule)
ticks, along = np.linspace(-2.4, 2.4, 9), np.linspace(-2.4, 2.4, 61)
lattice = np.stack(np.meshgrid(ticks, along, indexing="ij"), axis=-1)  # 9 lines of 61 points, and the same transposed
carried = jnp.concatenate([x0[:240], lattice.reshape(-1, 2), lattice[..., ::-1].reshape(-1, 2)])
forward = sample(v, carried, RungeKutta("rk4"), times=96, trajectory=True)
states = np.asarray(forward.trajectory[::8])  # 13 frames
home = np.argmin(np.linalg.norm(states[-1, :240, None] - means[None], axis=-1), axis=1)


def draw(t, left, right):
    state = states[round(12 * t)]
    for k, (color, marker) in enumerate(((BLUE, "o"), (ORANGE, "^"), (GREEN, "s"))):
        left.plot(*state[:240][home == k].T, marker, color=color, ms=2.2, mew=0, ls="")
    for lines, color, dash in zip(state[240:].reshape(2, 9, 61, 2), (INK, RED), ("-", "--"), strict=True):
        right.plot(lines[..., 0].T, lines[..., 1].T, color=color, lw=0.6, ls=dash)
    for ax in (left, right):
        ax.set(xlim=(-3.1, 3.1), ylim=(-3.1, 3.1), xticks=(), yticks=(), aspect="equal")


film(
    draw,
    np.linspace(0, 1, 13),
    panels=2,
    size=(2.3, 2.3),
    alt="Left: 240 particles leave a round cloud of noise for three clusters, each colour to its own. Right: a square"
    " grid carried by the same flow crowds into the clusters and is stretched to threads between them.",
)

# %% [markdown]
# ## There and back
#
# The flow is invertible, and so should its numerical solution be, nearly. We carry the noise to $t=1$ and back to
# $t=0$. Where does it arrive? A step of a method of order $p$ is off by $c\,h^{p+1}$ plus smaller terms, with some
# smooth $c(x)$; the step back, in which $h$ is negative, is off by $c\,(-h)^{p+1}$. For even $p$ the two cancel, and
# the round trip is off by one order less than the way there: with rk4, twice the steps should leave a 32nd part, not a
# 16th. Coming home is a milder test than arriving.
#
# The way back also turns *data* into noise. We send data along it and ask whether $|x_0|^2$ has the distribution that
# it has for standard normal noise in the plane, an exponential of mean 2. The Kolmogorov-Smirnov test answers with a
# p-value: any number in $[0,1]$ is equally likely if so.

# %%
solve = jax.jit(lambda x, times: sample(v, x, RungeKutta("rk4"), times=times).x)
returns = {}
for num_steps in (48, 96):
    there = solve(x0, grids.uniform(num_steps, 0.0, 1.0))
    back = solve(there, grids.uniform(num_steps, 1.0, 0.0))
    returns[num_steps] = jnp.sqrt(((back - x0) ** 2).sum(axis=1).mean())
    print(f"there and back in {num_steps} steps each: off by {returns[num_steps]:.1e} (root mean square)")
assert returns[96] < returns[48] / 16
assert returns[96] < 1e-5

noise = solve(data_set[:1500], grids.uniform(96, 1.0, 0.0))
test = stats.kstest(np.asarray((noise**2).sum(axis=1)), "expon", args=(0, 2))
squares = (noise**2).sum(axis=1).mean()
print(f"data carried back to t = 0: mean |x|^2 = {squares:.2f} (that of noise is 2), KS p-value {test.pvalue:.2f}")
assert test.pvalue > 1e-4

# %% [markdown]
# ## Samples of the mixture, from noise
#
# The whole of generation: draw $x_0$, follow $v$, keep $x_1$. How good are the samples? A distance between two finite
# samples is never 0, not even between two samples of the same distribution. So `fm_jax.metrics.measure` gives the
# 2-Wasserstein distance of the made samples to real ones (by how much, root mean square and at the least, real points
# have to be moved to become the made ones) beside its *floor*: the same distance between two real samples of that
# size. A perfect generator is at the floor.

# %%
made = there[:800]
draw_data = jax.jit(lambda key, num: oracles.sample(mixture, key, num), static_argnums=1)
measured = metrics.measure(metrics.wasserstein, draw_data, key_judge, made, repeats=5 if SMOKE else 20)

plane = np.stack(np.meshgrid(np.linspace(-3, 3, 90), np.linspace(-3, 3, 90)), axis=-1)
density = np.exp(oracles.log_prob(mixture, schedule, 1.0, plane.reshape(-1, 2))).reshape(90, 90)
fig, axes = plt.subplots(1, 3, figsize=(7, 2.5), sharex=True, sharey=True)
panels = {"noise": x0, "made from it": made, "real data": data_set}
for ax, (title, points) in zip(axes, panels.items(), strict=True):
    ax.contour(plane[..., 0], plane[..., 1], density, levels=[0.02, 0.1, 0.25], colors=[GREY], linewidths=0.7)
    ax.plot(*np.asarray(points)[:500].T, ".", color=BLUE, ms=2, ls="")
    ax.set(title=title, aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2), facecolor="white")
    ax.grid(color=PALE)
plt.show()
print(f"2-Wasserstein distance of made samples to real ones: {measured}")
assert measured.value < 2.5 * measured.floor.mean

# %% [markdown]
# A velocity field with a bounded slope has a flow; the flow is a diffeomorphism, moves probability along with the
# points, and can be solved to any accuracy, at a price in evaluations that the order of the method sets. Whoever has
# the right field generates by following it. Where the field comes from, for data known by examples only, takes
# notebooks 3 to 5; before that, motion gets its noise.
#
# Next: [Diffusions](02_diffusions.ipynb)
