# %% [markdown]
# # 8. Couplings
#
# The loss of [notebook 5](05_losses.ipynb) draws noise $x_0$ and data $x_1$ independently. Nothing in the theory asks
# for that: any joint law with the right ends will do. Which one should it be? One that costs little, in mean squared
# distance: what a coupling costs more than the flow that is learned from it is paid for in bent paths and in a noisy
# target, to the last digit. We compute that balance for two Gaussians, then pair minibatches, build a Schrödinger
# bridge, and rectify a flow until one Euler step samples it.
#
# Before this: [likelihood](07_likelihood.ipynb). It builds on [Theorem 1](04_continuity.ipynb#eq-4-4) and
# [Theorem 3](05_losses.ipynb#eq-5-3).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from lab import BLUE, GREEN, GREY, INK, ORANGE, PALE, RED, SMOKE, film
from scipy.linalg import inv, sqrtm

from fm_jax import couplings, fewstep, losses, metrics, models, oracles, paths, samplers, sources, train
from fm_jax.schedules import Linear

jax.config.update("jax_enable_x64", True)  # several statements below are exact, and deserve more than seven digits

# %% [markdown]
# ## Any coupling has the same ends
#
# A *coupling* of $p_0$ and $p_1$ is a joint law $\pi(x_0, x_1)$ with these two marginals. Draw a pair from it, join the
# two by a straight line, and average the lines' velocities where they meet:
#
# <a id="eq-8-1"></a>
#
# $$
# x_t = (1 - t)\, x_0 + t\, x_1, \qquad u_t = x_1 - x_0, \qquad
# v_t(x) = \mathbb{E}_\pi\big[\, x_1 - x_0 \mid x_t = x \,\big] \tag{8.1}
# $$
#
# That $v$ carries the law of $x_t$ needs one line. For every smooth test function $\varphi$ with compact support, and
# with $\mathbb{E}_\pi|x_1 - x_0| < \infty$,
#
# $$
# \frac{d}{dt}\, \mathbb{E}\,\varphi(x_t) = \mathbb{E}\big[\nabla\varphi(x_t) \cdot (x_1 - x_0)\big]
# = \mathbb{E}\big[\nabla\varphi(x_t) \cdot v_t(x_t)\big],
# $$
#
# which is the [continuity equation](04_continuity.ipynb#eq-4-2), tested with $\varphi$. Nowhere did we ask how $x_0$
# and $x_1$ depend on each other. At $t = 0$ and $t = 1$ the law is $p_0$ and $p_1$ whatever $\pi$ is; in between, the
# law and the velocity are the coupling's own. Where $v$ is smooth enough for its flow to be unique, as in all that
# follows, that flow carries $p_0$ to $p_1$. This is [Theorem 1](04_continuity.ipynb#eq-4-4) with the condition $x_1$
# replaced by the pair $(x_0, x_1)$, on the [path](03_paths.ipynb#eq-3-2) with $\alpha_t = t$ and $\sigma_t = 1 - t$.

# %% [markdown]
# Two Gaussians with a Gaussian coupling have all of this in closed form (`fm_jax.oracles.gaussian_pair`,
# `fm_jax.oracles.bridge_prediction`). Here are four couplings of the same two ends. *Independent* has no
# cross-covariance. *Optimal* has the least $\mathbb{E}|x_1 - x_0|^2$, by a map derived [below](#eq-8-5). *Entropic*
# lies between the two. *Rotated* is a map too, $x_1 = m_1 + C_1^{1/2} R\, C_0^{-1/2} (x_0 - m_0)$ with a rotation $R$:
# it has the right covariance but takes a detour.


# %%
path = paths.AffinePath()  # x_t = (1 - t) x0 + t x1
mean0, cov0 = np.array([-2.0, 0.0]), np.array([[1.5, 0.9], [0.9, 0.8]])
mean1, cov1 = np.array([2.0, 1.0]), np.array([[0.6, -0.6], [-0.6, 0.9]])
detour = sqrtm(cov1) @ np.array([[0.6, -0.8], [0.8, 0.6]]) @ inv(sqrtm(cov0))

independent = oracles.gaussian_pair(mean0, cov0, mean1, cov1)
plans = {
    "independent": independent,
    "entropic": oracles.entropic_plan(independent, 1.0),
    "rotated": oracles.gaussian_pair(mean0, cov0, mean1, cov1, cross=cov0 @ detour.T),
    "optimal": oracles.optimal_plan(independent),
}


def field(plan):
    """The velocity (8.1) in closed form: straight lines between the ends, without latent noise."""
    bridge = oracles.GaussianBridge(plan, Linear(), jnp.zeros_like)
    return lambda t, x: oracles.bridge_prediction(bridge, t, x).velocity


# %% [markdown]
# Everything we want to know of these flows is the mean of a quadratic function of $(x_0, x_1)$, because their velocity
# is affine in $x$. Such a mean needs no random numbers: the eight points $\pm 2 e_i$ in $\mathbb{R}^4$ have mean zero
# and covariance $I$, so their images have the mean and the covariance of the pair, and the average over them is the
# expectation, exactly. We send them through each flow and compare the moments at $t = 1$ with those of $p_1$.


# %%
def eight_points(plan):
    corners = 2 * jnp.concatenate([jnp.eye(4), -jnp.eye(4)]) @ plan.factor
    return plan.mean0 + corners[:, :2], plan.mean1 + corners[:, 2:]


@jax.jit
def measure(plan, x0):
    """The trajectory of the flow from x0, its straightness, and where a single Euler step leads."""
    v = field(plan)
    way = samplers.sample(v, x0, samplers.RungeKutta("rk4"), times=100, trajectory=True).trajectory
    straightness = metrics.straightness(v, x0, sampler=samplers.RungeKutta("rk4"), times=100)
    return way, straightness, samplers.sample(v, x0, samplers.RungeKutta("euler"), times=1).x


for name, plan in plans.items():
    way = np.asarray(measure(plan, eight_points(plan)[0])[0])
    error = max(abs(way[-1].mean(0) - mean1).max(), abs(np.cov(way[-1].T, bias=True) - cov1).max())
    print(f"{name:12} variances at t = 1/2: {way[50].var(0).round(2)}; error of the moments at t = 1: {error:.0e}")
    assert error < 1e-6

# %% [markdown]
# Four flows that differ on the way and agree at the end, up to the error of the solver ($O(h^4)$ for rk4).
#
# ## Straightness
#
# Let $\psi_t$ be the flow, $V_t = v_t(\psi_t(x_0))$ the velocity that a particle sees on its way, and
# $\psi_1(x_0) - x_0 = \int_0^1 V_t\, dt$ its displacement. The *straightness* of Liu, Gong and Liu (2022,
# arXiv:2209.03003) is the variance of $V_t$ over time, averaged over particles:
#
# <a id="eq-8-2"></a>
#
# $$
# S = \mathbb{E} \int_0^1 \big| V_t - (\psi_1(x_0) - x_0) \big|^2 dt
# = \mathbb{E} \int_0^1 |V_t|^2\, dt - \mathbb{E}\, \big| \psi_1(x_0) - x_0 \big|^2 \tag{8.2}
# $$
#
# A variance is zero if and only if $V_t$ is constant in $t$: every particle moves on a straight line at constant
# speed. Then Euler's step $x + (t' - t)\, v_t(x)$ is exact from any $t$ to any $t'$, and one of them samples. (The
# converse needs all steps, not one lucky one: $v_t = 1 + \sin 2\pi t$ has an exact Euler step from 0 to 1, and
# $S = 1/2$.) The library measures $S$ with `fm_jax.metrics.straightness`, and the energy $\mathbb{E}\int |V_t|^2 dt$
# with `fm_jax.metrics.path_energy`.

# %%
angles = np.arange(8) * np.pi / 4
ring = mean0 + 1.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1) @ sqrtm(cov0)
figure, axes = plt.subplots(1, 3, figsize=(7, 2.5), sharey=True)
for ax, name in zip(axes, ("independent", "rotated", "optimal"), strict=True):
    way, straightness, one_step = measure(plans[name], eight_points(plans[name])[0])
    rms = jnp.sqrt(((one_step - way[-1]) ** 2).sum(1).mean())
    print(f"{name:12} S = {straightness:8.1e}; root mean square error of one Euler step: {rms:.1e}")
    assert (abs(straightness) < 1e-9) == (rms < 1e-6) == (name != "independent")
    way = np.asarray(measure(plans[name], ring)[0])
    ax.plot(way[[0, -1], :, 0], way[[0, -1], :, 1], color=GREY, linestyle=":", linewidth=1)
    ax.plot(way[..., 0], way[..., 1], color=BLUE, linestyle="-", linewidth=1.2)
    ax.plot(*way[0].T, "o", color=INK, markersize=3.5)
    ax.plot(*way[-1].T, "s", color=ORANGE, markersize=3.5)
    ax.set(title=f"{name}: S = {abs(straightness):.2f}", xlabel="first coordinate", aspect="equal")
axes[0].set_ylabel("second coordinate")
axes[0].annotate("t = 0", (-3.3, 1.2))
axes[0].annotate("t = 1", (2.6, 1.8))
plt.show()

# %% [markdown]
# Particles (blue) under three couplings of the same ends, from a ring around $m_0$ (dots) to $t = 1$ (squares), with
# the straight lines between their ends (dotted). The rotated coupling shows that straight does not mean optimal.
#
# ## Where the cost of a coupling goes
#
# At each $t$ the velocity $v_t(x_t)$ is the conditional mean of $u_t = x_1 - x_0$, so that the mixed term of
# $|u_t|^2 = |v_t + (u_t - v_t)|^2$ has mean zero (Pythagoras):
# $\mathbb{E}|u_t|^2 = \mathbb{E}|v_t(x_t)|^2 + \mathbb{E}|u_t - v_t(x_t)|^2$. Integrate over $t$: the left side does
# not depend on it, and (8.2) rewrites the middle, since the flow's $\psi_t(x_0)$ and the lines' $x_t$ have one law.
# Altogether, where second moments are finite,
#
# <a id="eq-8-3"></a>
#
# $$
# \underbrace{\mathbb{E}_\pi |x_1 - x_0|^2}_{\text{cost of the coupling}} \;=\;
# \underbrace{\mathbb{E}\,|\psi_1(x_0) - x_0|^2}_{\text{cost of the flow's own coupling}} \;+\;
# \underbrace{S\vphantom{|}}_{\text{bent paths}} \;+\;
# \underbrace{\mathbb{E}\!\int_0^1\! |u_t - v_t(x_t)|^2\, dt}_{C:\ \text{variance of the target}} \tag{8.3}
# $$
#
# $C$ is the constant of [Theorem 3](05_losses.ipynb#eq-5-3), the loss of a perfect network: what no training removes,
# and what makes gradients noisy. Three consequences, with $W_2^2$ the least cost that any coupling has:
#
# 1. **The flow's coupling $(x_0, \psi_1(x_0))$ never costs more** than the one it was made from, and less by exactly
#    $S + C$.
# 2. **An optimal coupling has $S = C = 0$**: a straight flow, and a target without variance. In general
#    $S + C \le \mathbb{E}_\pi|x_1 - x_0|^2 - W_2^2$: the excess cost bounds both.
# 3. $\mathbb{E}\int |V_t|^2 dt \ge W_2^2$, by (8.2): no flow from $p_0$ to $p_1$ has less energy (Benamou and Brenier,
#    2000).
#
# The four terms come from public functions; $C$ is `fm_jax.losses.flow_matching` itself with the closed form in place
# of a network, at the eight points and 500 midpoints of $t$ (error $O(h^2)$), times $d = 2$ since losses average over
# dimensions.


# %%
@jax.jit
def target_variance(plan, x0, x1):
    v, t = field(plan), ((jnp.arange(500) + 0.5) / 500).repeat(8)
    loss_fn = losses.flow_matching(lambda _, t, x, *rest, **options: v(t, x), path, coupling=couplings.paired)
    return 2 * loss_fn(None, None, {"x0": jnp.tile(x0, (500, 1)), "x1": jnp.tile(x1, (500, 1)), "t": t})[0]


print("coupling         cost =  flow's own +      S +      C     (left - right)")
for name, plan in plans.items():
    x0, x1 = eight_points(plan)
    way, s, _ = measure(plan, x0)
    cost, own = (float(((end - x0) ** 2).sum(1).mean()) for end in (x1, way[-1]))
    s, c = max(float(s), 0.0), float(target_variance(plan, x0, x1))
    print(f"{name:12} {cost:8.4f} = {own:11.4f} + {s:6.4f} + {c:6.4f}     ({cost - own - s - c:.0e})")
    assert abs(cost - own - s - c) < 1e-4

# %% [markdown]
# The first row is the usual training: most of what it pays beyond the optimum is variance of its target. Optimal
# transport pays nothing, and neither does the rotated coupling, whose lines do not meet either.
#
# The first consequence holds for every convex cost $c$, by Jensen's inequality twice, over time and over the pairs that
# meet (Liu et al. 2022, theorem 3.5):
#
# <a id="eq-8-4"></a>
#
# $$
# \mathbb{E}\, c\big(\psi_1(x_0) - x_0\big) = \mathbb{E}\, c\Big(\int_0^1 V_t\, dt\Big) \le \int_0^1 \mathbb{E}\,
# c\big(\mathbb{E}_\pi[x_1 - x_0 \mid x_t]\big)\, dt \le \mathbb{E}_\pi\, c(x_1 - x_0) \tag{8.4}
# $$
#
# Quadratic functions no longer suffice for this one; [below](#eq-8-9) we check it on samples.

# %% [markdown]
# ## Optimal transport between Gaussians
#
# With given ends, $\mathbb{E}|x_1 - x_0|^2 = |m_1 - m_0|^2 + \operatorname{tr} C_0 + \operatorname{tr} C_1 - 2
# \operatorname{tr} K$ depends on the coupling through its cross-covariance $K$ alone. The joint covariance is positive
# semi-definite if and only if $K = C_0^{1/2} L\, C_1^{1/2}$ with a matrix $L$ of spectral norm at most 1, and then
# $\operatorname{tr} K = \operatorname{tr}(L\, C_1^{1/2} C_0^{1/2})$ is at most the sum of the singular values of
# $C_1^{1/2} C_0^{1/2}$, which are the eigenvalues of $(C_0^{1/2} C_1 C_0^{1/2})^{1/2}$. Hence, for invertible $C_0$,
#
# <a id="eq-8-5"></a>
#
# $$
# \begin{aligned}
# W_2^2 &= |m_1 - m_0|^2 + \operatorname{tr}\big( C_0 + C_1 - 2\, (C_0^{1/2} C_1 C_0^{1/2})^{1/2} \big), \\
# x_1 &= m_1 + T (x_0 - m_0), \qquad T = C_0^{-1/2} (C_0^{1/2} C_1 C_0^{1/2})^{1/2} C_0^{-1/2}
# \end{aligned} \tag{8.5}
# $$
#
# The map has the right covariance, $T C_0 T = C_1$, and its $K = C_0 T$ has the largest trace. These are
# `fm_jax.oracles.bures_distance` and `fm_jax.oracles.monge_map`. Since $T$ is positive definite when $C_1$ is,
# $(1 - t) I + t T$ is invertible: two lines $(1 - t)\, x_0 + t\, x_1$ never meet, and
# `fm_jax.oracles.displacement_velocity` is the velocity of the one that passes.

# %%
singular_values = np.linalg.svd(sqrtm(cov1) @ sqrtm(cov0), compute_uv=False)
w2_squared = ((mean1 - mean0) ** 2).sum() + np.trace(cov0 + cov1) - 2 * singular_values.sum()
displacement = oracles.displacement_velocity(independent)
of_field = jax.jit(lambda x: abs(displacement(0.3, x) - field(plans["optimal"])(0.3, x)).max())(ring)
of_map = abs(oracles.monge_map(independent, ring) - measure(plans["optimal"], ring)[0][-1]).max()
of_distance = abs(oracles.bures_distance(independent) ** 2 - w2_squared)
print(f"W2^2 = {w2_squared:.4f} by the singular values; bures_distance differs by {of_distance:.0e},")
print(f"the map from where the flow arrives by {of_map:.0e}, the two velocities by {of_field:.0e}")
assert max(of_distance, of_map, of_field) < 1e-6

# %% [markdown]
# ## Minibatches
#
# For data there is no closed form, but a batch can be paired optimally: $n$ points against $n$ points is an assignment
# problem, which `fm_jax.couplings.ExactOT` solves (Tong et al. 2023, arXiv:2302.00482; Pooladian et al. 2023,
# arXiv:2304.14772). Watch 100 pairs from a normal to eight Gaussians (`fm_jax.oracles.gaussian_mixture`): as they come,
# and as `ExactOT` pairs them. The clouds at $t = 0$ and at $t = 1$ are the same on both sides.

# %%
key = jax.random.key(8)
key_film, key_pool, key_sde, key_pairs, key_flow, key_init, key_fit, key_test, key_floor = jax.random.split(key, 9)
data = oracles.gaussian_mixture(4 * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.4)


@jax.jit(static_argnums=1)
def draw_pairs(key, num):
    key_x0, key_x1 = jax.random.split(key)
    return jax.random.normal(key_x0, (num, 2)), oracles.sample(data, key_x1, num)


x0, x1 = draw_pairs(key_film, 100)
pairings = {"independent": x0, "optimal": couplings.ExactOT()(None, x0, x1).x0}
to_right = np.asarray(x1[:, 0] > 0)


def draw(t, *axes):
    for ax, (name, x0) in zip(axes, pairings.items(), strict=True):
        x_t = np.asarray((1 - t) * x0 + t * x1)
        ax.plot(*x_t[to_right].T, "o", color=BLUE, markersize=3)
        ax.plot(*x_t[~to_right].T, "^", color=ORANGE, markersize=3)
        ax.set(xlim=(-5, 5), ylim=(-5, 5), xticks=[], yticks=[], aspect="equal", xlabel=name)


alt = (
    "Pairs on their way: independent ones, bound for the left (triangles) and the right (dots), mix; optimal ones part."
)
film(draw, np.linspace(0, 1, 13), panels=2, size=(2.0, 2.2), alt=alt)

# %% [markdown]
# Draw $n$ noises and $n$ data points, pair them optimally, and keep one of the pairs at random. Its law is a coupling
# in its own right: the pairing leaves nobody out, so a pair at random has an $x_0$ at random, distributed as $p_0$, and
# an $x_1$ distributed as $p_1$. Its cost $c_n$ is therefore never below $W_2^2$. And a batch of $2n$ can be paired in
# two halves, whose cost its best pairing does not exceed, so that
#
# <a id="eq-8-6"></a>
#
# $$
# \mathbb{E}_{\text{independent}} |x_1 - x_0|^2 = c_1 \ge c_2 \ge c_4 \ge \dots \ge c_{2^k} \ge W_2^2 \tag{8.6}
# $$
#
# Minibatch transport is biased towards independence, less so for larger batches. (Where the network sees labels, pair
# within each class, as `ExactOT` does when it is given them: otherwise each class would be trained on its own noise.)
#
# We draw 4,096 pairs, and cut them into eight pools and each pool into batches of 1 to 512. Within a pool the
# inequalities hold exactly. What a pool's independent pairs are off by, against the closed form of $c_1$, is subtracted
# from all its batch sizes (a control variate).

# %%
sizes, pools = 2 ** np.arange(10), 8
x0, x1 = (np.asarray(x) for x in oracles.sample_pair(independent, key_pool, 512 * pools))
costs = np.zeros((len(sizes), pools))
for row, n in zip(costs, sizes, strict=True):
    parts = [couplings.ExactOT()(None, x0[i : i + n], x1[i : i + n]).x0 for i in range(0, len(x0), n)]
    row[:] = ((x1 - np.concatenate(parts)) ** 2).sum(1).reshape(pools, 512).mean(1)
assert (np.diff(costs, axis=0) <= 1e-9).all()
c1 = ((mean1 - mean0) ** 2).sum() + np.trace(cov0 + cov1)
costs += c1 - costs[:1]
cost, error = costs.mean(1), costs.std(1, ddof=1) / np.sqrt(pools)
print(f"cost with batches of 1, 8, 64, 512: {cost[::3].round(2)}, standard error of the last {error[-1]:.2f}")
print(f"least cost of all couplings, W2^2:  {w2_squared:.2f}")
assert -5 * error[-1] < cost[-1] - w2_squared < 0.2 * (c1 - w2_squared)

# %% [markdown]
# ## Schrödinger bridges
#
# Between independent and optimal lies a family with a dial, the entropic couplings. For $\sigma > 0$,
#
# <a id="eq-8-7"></a>
#
# $$
# \pi_\sigma = \arg\min_\pi\; \tfrac12\, \mathbb{E}_\pi |x_1 - x_0|^2 + \sigma^2\,
# \mathrm{KL}(\pi \,\|\, p_0 \otimes p_1)
# \qquad\Longleftrightarrow\qquad \pi_\sigma(x_0, x_1) = f(x_0)\, g(x_1)\, e^{-|x_1 - x_0|^2 / 2\sigma^2} \tag{8.7}
# $$
#
# To see it, let $\pi_\sigma$ have the form on the right, and the right marginals. The objective is
# $\sigma^2\, \mathrm{KL}(\pi \| R)$ up to a constant, with $R \propto p_0\, p_1\, e^{-|x_1 - x_0|^2 / 2\sigma^2}$, and
# $\mathrm{KL}(\pi \| R) = \mathrm{KL}(\pi \| \pi_\sigma) + \mathbb{E}_\pi \log(\pi_\sigma / R)$. Now
# $\log(\pi_\sigma / R)$ is a function of $x_0$ plus a function of $x_1$: its expectation is the same for every
# coupling. So the least value is at $\pi = \pi_\sigma$, and only there.
#
# For Gaussians the form says that the off-diagonal block of the inverse joint covariance is $-I / \sigma^2$, and
# `fm_jax.oracles.entropic_plan` has this block. Its cross-covariance $C_0^{1/2} \big(C_0^{1/2} C_1 C_0^{1/2} +
# \tfrac{\sigma^4}{4} I\big)^{1/2} C_0^{-1/2} - \tfrac{\sigma^2}{2} I$ is $C_0 T - \tfrac{\sigma^2}{2} I$, up to order
# $\sigma^4$, when $\sigma$ is small, and $C_0 C_1 / \sigma^2$, up to order $\sigma^{-6}$, when it is large: it goes
# from optimal, at a cost of $W_2^2 + d \sigma^2$, to independent. For data, Sinkhorn's iteration finds $f$ and $g$ of a
# batch (`fm_jax.couplings.EntropicOT`; Cuturi 2013, arXiv:1306.0895).


# %%
def cross(sigma):
    return np.asarray(oracles.entropic_plan(independent, sigma).cross)


for sigma in (0.03, 1.0, 30.0):
    precision = np.linalg.inv(np.block([[cov0, cross(sigma)], [cross(sigma).T, cov1]]))
    residual = abs(sigma**2 * precision[:2, 2:] + np.eye(2)).max()
    print(f"sigma {sigma:5}: cost {c1 - 2 * np.trace(cross(sigma)):.3f}, residual of the form (8.7) {residual:.0e}")
    assert residual < 1e-5
assert abs(c1 - 2 * np.trace(cross(0.03)) - (w2_squared + 2 * 0.03**2)) < 1e-4
assert abs(np.trace(cross(30.0)) - np.trace(cov0 @ cov1) / 30**2) < 1e-4
plan = couplings.schrodinger_bridge_ot(1.0).plan(x0[:512], x1[:512])
of_batch = abs((x0[:512] - mean0).T @ np.asarray(plan) @ (x1[:512] - mean1) / 512 - cross(1.0)).max()
print(f"sigma 1, Sinkhorn on 512 points: the cross-covariance differs from the closed form by {of_batch:.2f}")
assert of_batch < 0.3

# %% [markdown]
# Now put a Brownian bridge between the ends of $\pi_\sigma$ (`fm_jax.paths.BrownianBridge`), with $z \sim N(0, I)$ at
# each $t$:
#
# <a id="eq-8-8"></a>
#
# $$
# x_t = (1 - t)\, x_0 + t\, x_1 + \sigma \sqrt{t (1 - t)}\, z, \qquad
# dX_t = \big[ v_t(X_t) + \tfrac{\sigma^2}{2}\, s_t(X_t) \big]\, dt + \sigma\, dW_t \tag{8.8}
# $$
#
# Against Brownian motion of variance $\sigma^2$, this law of paths has the density $f(x_0)\, g(x_1)$, up to a constant,
# by (8.7). Of all processes with these ends it is the closest to Brownian motion, for the divergence of path laws is
# that of their ends plus the mean divergence of what goes on between them, and both are least: Schrödinger's problem.
# A density $f g$ in the two ends keeps the process Markov (Léonard 2014, arXiv:1308.0215). It therefore solves an SDE
# with noise $\sigma$, whose drift is the mean drift of the bridges, $\mathbb{E}[(x_1 - x_t) / (1 - t) \mid x_t = x]$.
# Insert $x_t$ from (8.8), the score $s_t(x) = -\mathbb{E}[z \mid x_t = x] / (\sigma \sqrt{t (1 - t)})$ and the velocity
# $v_t(x) = \mathbb{E}\big[x_1 - x_0 + \tfrac{\sigma (1 - 2t)}{2 \sqrt{t (1 - t)}}\, z \mid x_t = x\big]$ to find the
# drift in (8.8), the SDE of [Theorem 2](04_continuity.ipynb#eq-4-7) for $g_t = \sigma$.
#
# Theorem 2 gives the same marginals for every $g$. The pairs $(X_0, X_1)$, however, are those of $\pi_\sigma$ for
# $g = \sigma$ and, as their cross-covariance shows, for neither of two others (`fm_jax.samplers.EulerMaruyama`; 4,096
# paths on the same Brownian motions, so errors of about 0.02).


# %%
@jax.jit
def bridge_end(key, x0, g):
    bridge = oracles.schroedinger_bridge(independent, 1.0)
    v, score = oracles.bridge_drift(bridge, 0.0), lambda t, x: oracles.bridge_prediction(bridge, t, x).score
    return samplers.sample(v, x0, samplers.EulerMaruyama(diffusion=lambda t: g, score=score), times=50, key=key).x


for g in (0.0, 1.0, 2.0):
    joint = np.cov(np.concatenate([x0, bridge_end(key_sde, x0, g)], axis=1).T)
    of_end, of_pairs = abs(joint[2:, 2:] - cov1).max(), abs(joint[:2, 2:] - cross(1.0)).max()
    print(f"g = {g:.0f}: error of the covariance at t = 1 {of_end:.3f}, of that between start and end {of_pairs:.3f}")
    assert of_end < 0.2
    assert (of_pairs < 0.12) == (g == 1)

# %% [markdown]
# Batch size and noise are two dials between the same two ends. One warning: the
# [conversion](05_losses.ipynb#eq-5-6) of a velocity to a score rests on an $x_0$ that is standard normal *given*
# $x_1$, as only independent pairs have it. For other couplings sample the ODE, or learn the score beside the velocity
# (`fm_jax.losses.bridge_matching`).

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2.5), sharey=True)
axes[0].errorbar(sizes, cost, error, color=BLUE, marker="o", linestyle="-", capsize=2)
axes[0].set(xscale="log", xlabel="pairs in a batch", ylabel="mean squared distance", title="minibatch transport")
axes[0].set_xticks(sizes[::3], sizes[::3])
sigmas = np.geomspace(0.05, 20, 40)
axes[1].plot(sigmas, [c1 - 2 * np.trace(cross(sigma)) for sigma in sigmas], color=GREEN)
axes[1].set(xscale="log", xlabel="sigma of the Schrödinger bridge", title="entropic transport")
for ax in axes:
    ax.axhline(c1, color=GREY, linestyle=":")
    ax.axhline(w2_squared, color=ORANGE, linestyle="--")
axes[1].annotate("independent", (0.05, c1), (0, -10), textcoords="offset points")
axes[0].annotate("optimal", (1, w2_squared), (0, 4), textcoords="offset points")
plt.show()

# %% [markdown]
# ## Rectified flow
#
# Consequence 1 of (8.3) asks to be iterated: take the pairs that a flow makes as the next coupling, fit a flow to
# them, and so on. With perfect fits round $k$ lowers the cost by $S_k + C_k$, and a cost is never below $W_2^2$.
# Summing over rounds,
#
# <a id="eq-8-9"></a>
#
# $$
# \sum_{k=0}^{K-1} (S_k + C_k) = \text{cost}_0 - \text{cost}_K \le \text{cost}_0 - W_2^2,
# \qquad\text{so}\qquad \min_{k < K}\, (S_k + C_k) \le \frac{\text{cost}_0 - W_2^2}{K} \tag{8.9}
# $$
#
# (Liu et al. 2022, theorem 3.7). No transport problem is solved, and the rounds stop at any coupling whose lines do not
# meet. `fm_jax.fewstep.make_pairs` draws the pairs of a flow, and `fm_jax.fewstep.reflow` alternates it with training.
#
# One round already does most, as we now see for a normal and eight Gaussians. The flow of independent pairs needs no
# training, for its velocity is known; a small network then learns its pairs, and pairs of `ExactOT`.

# %%
exact = oracles.velocity(data, Linear())
num_pairs, num_steps, num_test = (512, 20, 256) if SMOKE else (8192, 2000, 512)
options = {"source": sources.Sampled(lambda key, num: draw_pairs(key, num)[0]), "sampler": samplers.RungeKutta("rk4")}
of_flow, _ = fewstep.make_pairs(exact, key_flow, (num_pairs, 2), times=20, batch_size=num_pairs, **options)
x0, x1 = (np.asarray(x) for x in draw_pairs(key_pairs, num_pairs))
x0_ot = [couplings.ExactOT()(None, x0[i : i + 256], x1[i : i + 256]).x0 for i in range(0, num_pairs, 256)]
pairs = {"independent": {"x0": x0, "x1": x1}, "OT": {"x0": np.concatenate(x0_ot), "x1": x1}, "rectified": of_flow}
for name, pair in pairs.items():
    means = [(np.linalg.norm(pair["x1"] - pair["x0"], axis=1) ** power).mean() for power in (1, 2, 4)]
    print(f"{name:12} means of |x1 - x0|, of its square and of its fourth power: {np.round(means, 2)}")

# %% [markdown]
# The pairs of the flow cost less than the independent ones that it was made from, whatever the power, as (8.4) says;
# here by so much that transport saves hardly more. Now the training.

# %%
model = models.MLP(features=(128, 128))
optimizer = train.make_optimizer(3e-3, total_steps=num_steps, decay="cosine")
loss_fn = losses.flow_matching(models.linen_apply(model), path, coupling=couplings.paired)
step = train.make_step(loss_fn, optimizer, axis_name=None)
start = train.create_state(models.init_params(model, key_init, (2,)), optimizer)
evaluations, distances, singles = (1, 4) if SMOKE else (1, 2, 4, 8, 16), {}, {}


@jax.jit
def fit(key, pairs):
    key_rows, key_step = jax.random.split(key)
    rows = jax.random.randint(key_rows, (num_steps, 256), 0, num_pairs)
    state, _ = jax.lax.scan(lambda state, i: step(state, key_step, {k: x[i] for k, x in pairs.items()}), start, rows)
    return state.params


@jax.jit
def judge(params, x0):
    v = exact if params is None else lambda t, x: model.apply({"params": params}, t, x)
    ends = [samplers.sample(v, x0, samplers.RungeKutta("euler"), times=n).x for n in evaluations]
    return ends, metrics.straightness(v, x0, times=100)


x0, x1 = draw_pairs(key_test, num_test)
floor = metrics.floor(metrics.wasserstein, lambda key, n: draw_pairs(key, n)[1], key_floor, num_test, repeats=4)
for i, (name, pair) in enumerate(pairs.items()):
    params = fit(jax.random.fold_in(key_fit, i), jax.tree.map(jnp.float32, pair)) if i else None
    ends, straightness = judge(params, x0)
    singles[name], distances[name] = ends[0], [metrics.wasserstein(end, x1) for end in ends]
    print(f"{name:12} S = {straightness:.3f}; W2 after {evaluations} steps: {np.round(distances[name], 2)}")

# %% [markdown]
# $W_2$ is the distance of 512 samples to 512 data points, beside its *floor*: what two draws of the data have
# (`fm_jax.metrics.floor`). Independent pairs start with $v_0(x) = \mathbb{E}[x_1] - x$, so that one Euler step sends
# all noise to the mean of the data, here 0, at a distance of $(\mathbb{E}|x_1|^2)^{1/2} = (16 + 2 \cdot 0.4^2)^{1/2}$.

# %%
assert abs(distances["independent"][0] - np.sqrt(16 + 2 * 0.4**2)) < 0.5
assert SMOKE or max(distances["OT"][0], distances["rectified"][0]) < 0.5 * distances["independent"][0]
figure, axes = plt.subplots(1, 4, figsize=(7, 2.3), width_ratios=(2, 1, 1, 1))
axes[0].axhspan(floor.mean - floor.std, floor.mean + floor.std, color=PALE)
axes[0].annotate("floor", (evaluations[-1], floor.mean + floor.std), (0, 2), textcoords="offset points", ha="right")
for (name, values), ax, color, marker in zip(distances.items(), axes[1:], (BLUE, ORANGE, RED), "o^s", strict=True):
    axes[0].plot(evaluations, values, color=color, marker=marker)
    ax.plot(*x1.T, ".", color=GREY, markersize=1)
    ax.plot(*singles[name].T, marker, color=color, markersize=1.5)
    ax.set(xticks=[], yticks=[], aspect="equal", xlabel="one Euler step")
    ax.set_title(name, color=color)
axes[0].set(xscale="log", xlabel="Euler steps (network evaluations)", ylabel="W2 to the data")
axes[0].set_xticks(evaluations, evaluations)
plt.show()
share = distances["rectified"][0] / distances["independent"][0]
print(f"W2 of one Euler step after rectifying, as a share of that before: {share:.2f}")

# %% [markdown]
# A coupling decides what lies between its ends. Its cost is that of its flow's own pairs, plus the bending of the
# paths, plus the variance of the target; transport, Schrödinger bridges and reflow all live on that balance. Straight
# paths are sampled in one step. For paths that are not straight, schedules, grids and solvers decide how few steps will
# do: that is [notebook 10](10_design_space.ipynb). `fm_jax.couplings` has more: by classes and conditions, for
# outliers, for whole data sets.
#
# Next: [images](09_images.ipynb).
