# %% [markdown]
# # 5. Losses: one regression, two literatures
#
# Which loss trains a flow, which one a diffusion model, and why does the same network serve both? Velocity and score
# are conditional means, so least-squares regression on single, noisy samples of them finds them; its loss exceeds the
# ideal one by a constant. We compute that constant, compare the gradients, convert each of the four predictions into
# the others, and let one field drive DDPM, DDIM and the probability-flow ODE.
#
# Before this: [the continuity equation](04_continuity.ipynb), where [(4.4)](04_continuity.ipynb#eq-4-4) made the
# marginal velocity a conditional mean. We also need the Gaussian path [(3.2)](03_paths.ipynb#eq-3-2),
# $x_t = \alpha_t x_1 + \sigma_t x_0$, with noise $x_0 \sim N(0, I)$ independent of the data $x_1$.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from lab import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SMOKE, film
from scipy import stats

from fm_jax import samplers
from fm_jax.losses import error_scale, flow_matching, noise_prediction, score_matching
from fm_jax.models import MLP, init_params, linen_apply
from fm_jax.oracles import cdf, gaussian_mixture, log_prob, prediction, sample, velocity
from fm_jax.parameterization import convert, reschedule, velocity_domain, velocity_fn
from fm_jax.paths import AffinePath
from fm_jax.samplers import DDIM, RungeKutta
from fm_jax.schedules import DDPM, EDM, VP, Cosine, Linear, linear_betas
from fm_jax.train import create_state, make_optimizer, make_step
from fm_jax.types import KINDS

jax.config.update("jax_enable_x64", True)  # so that "equal" can mean twelve digits

# %% [markdown]
# ## The loss we want and the loss we have
#
# A network $f^\theta_t(x)$ should be the marginal velocity $v_t(x)$. With $t$ uniform on $[0, 1]$ the loss we want is
#
# <a id="eq-5-1"></a>
#
# $$
# L_{\mathrm{FM}}(\theta) = \mathbb{E}_{t,\, x_t}\, \big| f^\theta_t(x_t) - v_t(x_t) \big|^2 , \tag{5.1}
# $$
#
# but nobody has $v_t$. What a path gives for the price of one sample is the conditional velocity
# $u_t = \dot\alpha_t x_1 + \dot\sigma_t x_0$, so the loss we have is **conditional flow matching** (Lipman et al. 2022,
# arXiv:2210.02747),
#
# <a id="eq-5-2"></a>
#
# $$
# L_{\mathrm{CFM}}(\theta) = \mathbb{E}_{t,\, x_0,\, x_1}\, \big| f^\theta_t(x_t) - u_t \big|^2 . \tag{5.2}
# $$
#
# **Theorem 3.** If $u_t$ and $f^\theta_t(x_t)$ have finite second moments,
#
# <a id="eq-5-3"></a>
#
# $$
# L_{\mathrm{CFM}}(\theta) = L_{\mathrm{FM}}(\theta) + C, \qquad
# C = \mathbb{E}\,\big| u_t - v_t(x_t) \big|^2 \ge 0, \qquad
# \nabla_\theta L_{\mathrm{CFM}} = \nabla_\theta L_{\mathrm{FM}} . \tag{5.3}
# $$
#
# *Proof.* Split the error as $f - u = (f - v) + (v - u)$, all at $x_t$, and square:
# $|f - u|^2 = |f - v|^2 + |v - u|^2 + 2\,(f - v)\cdot(v - u)$. In the last term $f - v$ is a function of $(t, x_t)$
# alone. Averaging first at fixed $(t, x_t)$, the tower property leaves
# $2\,\mathbb{E}\big[(f - v)\cdot(v - \mathbb{E}[u_t \mid x_t])\big]$, and $\mathbb{E}[u_t \mid x_t] = v_t(x_t)$ is
# [(4.4)](04_continuity.ipynb#eq-4-4): the term is 0. What remains is Pythagoras: $v$ is the orthogonal projection of
# $u$ onto the functions of $(t, x_t)$. $C$ contains no $\theta$, since the law of $(t, x_0, x_1)$ contains none, and
# functions that differ by a constant have the same gradient wherever they have one. $\square$
#
# The source notes write $L_{\mathrm{FM}} = L_{\mathrm{CFM}} + C$; their $C$ is minus ours. Nothing in the proof is
# Gaussian: it holds for every path, every law of $t$ and every coupling of $x_0$ with $x_1$. And $C = 0$ only where
# $x_t$ determines $u_t$: where conditional paths do not meet, or meet with the same velocity.

# %% [markdown]
# ## The constant, measured
#
# The data are a mixture of two Gaussians on the line. There `fm_jax.oracles` knows $p_t$ and $v_t$, and an integral
# over $(t, x)$ is a sum over a grid: Gauss-Legendre in $t$, the trapezoidal rule in $x$, both accurate to many digits
# for smooth integrands that vanish at the ends of the grid. So `expect` is $\mathbb{E}_{t, x_t}$ without chance, and by
# Pythagoras $C = \mathbb{E}|u_t|^2 - \mathbb{E}|v_t(x_t)|^2$. The path is the linear one, $\alpha_t = t$ and
# $\sigma_t = 1 - t$.

# %%
data = gaussian_mixture([[-1.5], [0.9]], [0.25, 0.4], weights=[0.35, 0.65])
second_moment = jnp.sum(data.weights * (data.means[:, 0] ** 2 + data.eigenvalues[:, 0]))  # E|x1|^2
oracle = jax.jit(lambda schedule, t, x: prediction(data, schedule, t, x), static_argnums=0)
draw = jax.jit(sample, static_argnums=2)
path = AffinePath(Linear())

nodes, node_weights = np.polynomial.legendre.leggauss(40)
times, xs = (nodes + 1) / 2, np.linspace(-7, 7, 701)
t, x = np.repeat(times, len(xs)), np.tile(xs, len(times))[:, None]
exact = oracle(Linear(), t, x)


@jax.jit(static_argnums=1)
def expect_at_t(f, schedule):
    terms = jnp.exp(log_prob(data, schedule, t, x)) * f[:, 0]
    return 0.02 * terms.reshape(len(times), len(xs)).sum(axis=1)


def expect(f, schedule=path.schedule):
    return node_weights / 2 @ expect_at_t(f, schedule)


assert abs(expect_at_t(np.ones_like(x), Linear()) - 1).max() < 1e-10  # every p_t integrates to 1
constant = second_moment + 1 - expect(exact.velocity**2)  # u_t = x1 - x0, so that E|u_t|^2 = E|x1|^2 + 1

# %% [markdown]
# The network of this section has four weights, and contains the truth:
#
# $$
# f^\theta_t(x) = \theta_1 + \theta_2\, x + \theta_3 \tanh 2x + \theta_4\, v_t(x) .
# $$
#
# We take it four times: saying 0, twice at random, and perfect. `fm_jax.losses.flow_matching` measures
# $L_{\mathrm{CFM}}$ on 2048 minibatches, whose scatter gives the standard error; $L_{\mathrm{FM}}$ is an integral. The
# difference should be $C$ each time.

# %%
num, size = 2048, 32  # minibatches, examples in each
key_x1, key_x0, key_t, key_theta, key_gaussian, key_loss = jax.random.split(jax.random.key(0), 6)
x1, x0 = draw(data, key_x1, num * size).reshape(num, size, 1), jax.random.normal(key_x0, (num, size, 1))
batch = {"x1": x1, "x0": x0, "t": jax.random.uniform(key_t, (num, size))}  # leaves no chance: keys may be None


def network(theta, t, x, cond=None, **_):
    return theta[0] + theta[1] * x + theta[2] * jnp.tanh(2 * x) + theta[3] * velocity(data, Linear())(t, x)


@jax.jit(static_argnums=(0, 1))
def losses(loss, apply_fn, params):  # one number for each minibatch
    return jax.vmap(lambda batch: loss(apply_fn, path)(params, None, batch)[0])(batch)


@jax.jit(static_argnums=(0, 2, 3))
def ideal_loss(apply_fn, params, kind, schedule):
    f = apply_fn(params, t, x, None, train=False, rngs=None)
    return expect((f - getattr(oracle(schedule, t, x), kind)) ** 2, schedule)


random, other, perfect = *jax.random.normal(key_theta, (2, 4)), jnp.eye(4)[3]
for name, theta in {"zero": jnp.zeros(4), "random": random, "another": other, "perfect": perfect}.items():
    cfm, fm = np.array(losses(flow_matching, network, theta)), ideal_loss(network, theta, "velocity", Linear())
    difference, error = cfm.mean() - fm, cfm.std() / np.sqrt(num)
    print(
        f"{name:8} L_CFM {cfm.mean():.3f}, L_FM {fm:.3f}, difference {difference:.3f} +- {error:.3f}, C {constant:.3f}"
    )
    assert abs(difference - constant) < 5 * error

# %% [markdown]
# The perfect network's $L_{\mathrm{CFM}}$ is $C$, not 0. **A flow-matching loss that stands at a large value may belong
# to a perfect network**, and two losses may be compared only on the same path and data.
#
# For a single Gaussian, $x_1 \sim N(m, s^2)$, the constant has a closed form. $(u_t, x_t)$ is an affine image of
# $(x_1, x_0)$, by a matrix with determinant $\dot\alpha\sigma - \alpha\dot\sigma$, and of two jointly Gaussian numbers
# the conditional variance of one is the determinant of their covariance over the variance of the other:
#
# <a id="eq-5-4"></a>
#
# $$
# \begin{aligned}
# C_t &= \operatorname{Var}(u_t \mid x_t)
#     = \frac{s^2\, (\dot\alpha_t \sigma_t - \alpha_t \dot\sigma_t)^2}{\alpha_t^2 s^2 + \sigma_t^2} , \\
# C &= \int_0^1 \! \frac{s^2 \,\mathrm{d}t}{t^2 s^2 + (1 - t)^2}
#   = \int_0^\infty \!\! \frac{s^2 \,\mathrm{d}r}{r^2 s^2 + 1} = \frac{\pi}{2}\, s
#   \qquad \text{for } \alpha_t = t,\ \sigma_t = 1 - t,\ r = \tfrac{t}{1 - t} .
# \end{aligned} \tag{5.4}
# $$
#
# So on the linear path the perfect network of a Gaussian of width $s$ has a loss of $\pi s / 2$ per dimension.

# %%
s, gaussian = 0.5, gaussian_mixture([[0.7]], 0.5)
loss_fn = flow_matching(lambda gaussian, t, x, cond, **_: velocity(gaussian, Linear())(t, x), path)
loss = jax.jit(loss_fn)(gaussian, key_loss, {"x1": 0.7 + s * jax.random.normal(key_gaussian, (num * size, 1))})[0]
print(f"the perfect network's loss on a Gaussian is {loss:.4f}, pi s / 2 = {np.pi * s / 2:.4f}")
assert abs(loss / (np.pi * s / 2) - 1) < 0.03  # the standard error is about 0.5%

# %% [markdown]
# ## The same gradient, with more noise
#
# Training sees minibatches. Where differentiation and expectation may be exchanged (a smooth network, finite moments),
# both losses give unbiased estimates of the same gradient. Their noise differs: with the Jacobian
# $J = \partial f / \partial \theta$, one sample gives
#
# $$
# \underbrace{2 J^\top (f - u_t)}_{\text{CFM}} = \underbrace{2 J^\top (f - v_t)}_{\text{FM}} + 2 J^\top (v_t - u_t) ,
# $$
#
# and the last term has mean 0 given $(t, x_t)$. So it is uncorrelated with the FM term and the variances add: **the CFM
# gradient is never less noisy.** As the network learns, $f \to v$, the FM noise dies out and the CFM noise stays, which
# is why learning rates decay and weights are averaged. At the perfect network the first entry of the CFM gradient on a
# batch of $B$ is $\frac{2}{B} \sum (v_t - u_t)$, because $\partial f / \partial \theta_1 = 1$: its variance is
# $4 C / B$, where FM has none.


# %%
def marginal(theta, key, batch):
    x_t = path.sample(key, batch["t"], batch["x0"], batch["x1"]).x_t
    return jnp.mean((network(theta, batch["t"], x_t) - velocity(data, Linear())(batch["t"], x_t)) ** 2), {}


truth = jax.grad(ideal_loss, argnums=1)(network, random, "velocity", Linear())
for name, loss_fn in (("FM", marginal), ("CFM", flow_matching(network, path))):
    gradient = jax.jit(jax.vmap(jax.grad(loss_fn, has_aux=True), (None, None, 0)))
    at_random, at_perfect = (np.array(gradient(theta, None, batch)[0]) for theta in (random, perfect))
    noise = at_random.var(axis=0).sum()
    off = np.linalg.norm(at_random.mean(axis=0) - truth) / np.sqrt(noise / num)
    print(f"{name:3} at random: variance {noise:.3f}, the mean off by {off:.1f} standard errors (about 1 expected)")
    print(f"{name:3} at the perfect network: variance of the first entry {at_perfect[:, 0].var():.4f}")
    assert off < 4
print(f"4 C / B = {4 * constant / size:.4f}")
assert abs(at_perfect[:, 0].var() / (4 * constant / size) - 1) < 0.2  # the standard error is about 3%

# %% [markdown]
# ## Scores: the other literature
#
# Diffusion models learn the score $s_t = \nabla \log p_t$. Where $\sigma_t > 0$ the Gaussian $p_t(x \mid x_1)$ lets us
# differentiate $p_t(x) = \int p_t(x \mid x_1)\, p_{\mathrm{data}}(x_1)\, \mathrm{d}x_1$ under the integral, and
# $\nabla p = p\, \nabla \log p$ gives $s_t(x) = \mathbb{E}\big[\nabla \log p_t(x_t \mid x_1) \,\big|\, x_t = x\big]$
# with $\nabla \log p_t(x_t \mid x_1) = -(x_t - \alpha_t x_1) / \sigma_t^2 = -x_0 / \sigma_t$. A conditional mean again,
# and the proof of Theorem 3 holds word by word: **denoising score matching** is score matching plus a constant (Vincent
# 2011). With a weight $\lambda_t \ge 0$ that leaves both sides finite,
#
# <a id="eq-5-5"></a>
#
# $$
# \begin{aligned}
# \underbrace{\mathbb{E}\, \lambda_t \big| s^\theta_t(x_t) + x_0 / \sigma_t \big|^2}_{L_{\mathrm{DSM}}}
# &= \underbrace{\mathbb{E}\, \lambda_t \big| s^\theta_t(x_t) - s_t(x_t) \big|^2}_{L_{\mathrm{SM}}} + C' , \\
# \text{and for } \lambda_t = \sigma_t^2: \quad L_{\mathrm{DSM}}
# &= \mathbb{E}\, \big| n^\theta_t(x_t) - x_0 \big|^2 \quad \text{with } n^\theta_t = -\sigma_t\, s^\theta_t .
# \end{aligned} \tag{5.5}
# $$
#
# The last loss is DDPM's $L_{\mathrm{simple}}$ (Ho et al. 2020, arXiv:2006.11239, eq. 14): **predicting the noise is
# predicting the score times $-\sigma_t$**, and the weight $\sigma_t^2$ keeps a target of size $1 / \sigma_t$ from
# drowning everything else near the data. So `fm_jax.losses.score_matching` and `fm_jax.losses.noise_prediction` are the
# same numbers, batch by batch. Our network, here read as a prediction of noise, shows it; and
# $C' = \mathbb{E}|x_0|^2 - \mathbb{E}|n_t|^2$.


# %%
def score_network(theta, t, x, cond=None, **_):
    return convert("noise", network(theta, t, x), t, x, Linear()).score


dsm, simple = np.array(losses(score_matching, score_network, random)), losses(noise_prediction, network, random)
sm = ideal_loss(network, random, "noise", Linear())  # sigma^2 |s - s_t|^2
floor, error = 1 - expect(exact.noise**2), dsm.std() / np.sqrt(num)
print(f"L_DSM and L_simple: {dsm.mean():.4f}, apart by at most {abs(dsm - simple).max():.0e}")
print(f"L_DSM - L_SM = {dsm.mean() - sm:.4f} +- {error:.4f}, C' = {floor:.4f}")
assert abs(dsm - simple).max() < 1e-9
assert abs(dsm.mean() - sm - floor) < 5 * error

# %% [markdown]
# ## One network, four readings
#
# Let $d_t(x) = \mathbb{E}[x_1 \mid x_t = x]$ be the denoised data and $n_t(x) = \mathbb{E}[x_0 \mid x_t = x]$ the
# noise. The conditional means of $x_t = \alpha_t x_1 + \sigma_t x_0$, of $u_t = \dot\alpha_t x_1 + \dot\sigma_t x_0$
# and of $-x_0 / \sigma_t$ are the first three equations below, and eliminating $d$ and $n$ from them gives the fourth:
#
# <a id="eq-5-6"></a>
#
# $$
# \begin{aligned}
# x &= \alpha_t\, d_t + \sigma_t\, n_t , \qquad v_t = \dot\alpha_t\, d_t + \dot\sigma_t\, n_t , \qquad
# n_t = -\sigma_t\, s_t , \\
# v_t(x) &= \frac{\dot\alpha_t}{\alpha_t}\, x
#   + \Big( \frac{\sigma_t^2 \dot\alpha_t}{\alpha_t} - \sigma_t \dot\sigma_t \Big)\, s_t(x) .
# \end{aligned} \tag{5.6}
# $$
#
# Two linear equations in two unknowns: any one of velocity, data, noise and score gives the other three, by
# `fm_jax.parameterization.convert`. We try all 16 ordered pairs on four schedules against the oracle, which computes
# data and score from the mixture itself.

# %%
worst = 0.0
for schedule in (Linear(), Cosine(), VP(), EDM()):
    expected = oracle(schedule, t, x)
    for kind in KINDS:
        converted = convert(kind, getattr(expected, kind), t, x, schedule)
        worst = max(worst, *(float(abs(a - b).max() / abs(b).max()) for a, b in zip(converted, expected, strict=True)))
print(f"16 pairs on each of four schedules: largest relative error {worst:.0e}")
assert worst < 1e-8
print("linear path, t with a velocity:", {kind: velocity_domain(kind, Linear()) for kind in KINDS})

# %% [markdown]
# The last line names the **singular ends**. A denoiser says nothing of the noise where $\sigma_t = 0$, and noise or
# score say nothing of the data where $\alpha_t = 0$: the library stays 0.001 away from such an end, and a velocity
# network needs no such care. (Going from velocity to data and noise divides by $\alpha\dot\sigma - \sigma\dot\alpha$,
# which vanishes only where the signal-to-noise ratio stands still, as for $\alpha = t^2$, $\sigma = 1 - t^2$ at
# $t = 0$.)
#
# ## Four losses, one error
#
# At a given $x$, [(5.6)](#eq-5-6) ties the *errors* of the four kinds together:
# $\alpha\, \delta d + \sigma\, \delta n = 0$ from the first equation, and the others from that. So do the spreads of
# the four targets around their means:
#
# <a id="eq-5-7"></a>
#
# $$
# |\delta n| = \frac{\alpha_t}{\sigma_t}\, |\delta d| , \qquad
# |\delta s| = \frac{\alpha_t}{\sigma_t^2}\, |\delta d| , \qquad
# |\delta v| = \Big| \dot\alpha_t - \frac{\dot\sigma_t \alpha_t}{\sigma_t} \Big|\, |\delta d| . \tag{5.7}
# $$
#
# The four losses are therefore one loss with four weights over time. To choose between them is to choose a weight, and
# what the network has to output: [the design space](10_design_space.ipynb) takes that up. `fm_jax.losses.error_scale`
# holds these factors. The constant $C_t$ of each kind at time $t$, the mean square of its target less that of the
# perfect answer, is what no network can learn.

# %%
squares = (second_moment + 1, second_moment, 1.0, 1 / (1 - times) ** 2)  # E|target|^2, in the order of KINDS
figure, ax = plt.subplots(figsize=(5, 3))
styles = ((BLUE, "-", "bottom"), (GREEN, "--", "top"), (ORANGE, "-.", "top"), (PINK, ":", "bottom"))
for kind, square, (color, style, va) in zip(KINDS, squares, styles, strict=True):
    spread = square - expect_at_t(getattr(exact, kind) ** 2, Linear())
    data_spread = second_moment - expect_at_t(exact.data**2, Linear())
    assert jnp.allclose(spread, error_scale(kind, times, Linear()) ** 2 * data_spread, rtol=1e-6)
    ax.semilogy(times, spread, style, color=color)
    ax.annotate(kind, (times[-6], spread[-6]), (8, 0), textcoords="offset points", color=color, va=va)
ax.set(title="What no network can learn", xlabel="t (0 noise, 1 data)", ylabel="mean squared error", ylim=(1e-3, 1e3))
plt.show()

# %% [markdown]
# ## Trained on noise, read as a velocity
#
# A diffusion model in miniature: a small `fm_jax.models.MLP` learns to predict noise on the variance-preserving path
# `fm_jax.schedules.VP`, by DDPM's loss. Its loss falls to $C'$ and no further, and what is left above $C'$ is its true
# error, the $L_{\mathrm{SM}}$ of [(5.5)](#eq-5-5). Then `fm_jax.parameterization.velocity_fn` reads it as a velocity,
# which any sampler takes. It is good where training examples were, and guesses elsewhere.

# %%
vp, num_steps = VP(), 20 if SMOKE else 2000
model = MLP(features=(32, 32), time_features=16)
apply_fn, params = linen_apply(model), init_params(model, jax.random.key(1), (1,))
optimizer = make_optimizer(1e-2, total_steps=num_steps, decay="cosine")
step = make_step(noise_prediction(apply_fn, AffinePath(vp)), optimizer, axis_name=None)

key_data, key_steps = jax.random.split(jax.random.key(2))
batches = draw(data, key_data, num_steps * 512).reshape(num_steps, 512, 1)
train = jax.jit(lambda state: jax.lax.scan(lambda state, x1: step(state, key_steps, {"x1": x1}), state, batches))
state, metrics = train(create_state(params, optimizer))
v_network = jax.jit(velocity_fn(lambda t, x, cond: model.apply({"params": state.params}, t, x, cond), "noise", vp))

floor, excess = 1 - expect(oracle(vp, t, x).noise ** 2, vp), ideal_loss(apply_fn, state.params, "noise", vp)
last = metrics["loss"][-500:].mean()
print(f"C' = {floor:.4f}, true error {excess:.4f}: together {floor + excess:.4f}; the last losses average {last:.4f}")
assert SMOKE or abs(last - floor - excess) < 0.01

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.7))
left.plot(np.arange(0, num_steps, 10) + 5, metrics["loss"].reshape(-1, 10).mean(axis=1), color=BLUE, lw=1)
left.axhline(floor, color=INK, ls="--", lw=1)
left.set(title="noise-prediction loss (dashed: $C'$)", xlabel="training step", ylim=(0.2, 0.4))
line = np.linspace(-3, 3, 121)[:, None]
for time, color, style in ((0.5, BLUE, "-"), (0.8, ORANGE, "--"), (0.9, GREEN, "-.")):
    right.plot(line, v_network(time, line), style, color=color)
    right.plot(line, oracle(vp, time, line).velocity, ".", color=color, markevery=6)
    right.text(3, v_network(time, line)[-1, 0], f" t = {time}", color=color, va="center")
right.set(title="read as a velocity (dots: exact)", xlabel="x")
plt.show()

# %% [markdown]
# ## The dictionary
#
# | diffusion papers | here |
# |---|---|
# | time from data to noise, $\tau \in [0, 1]$ or $k = 0, \dots, N$ | $t = 1 - \tau = 1 - k/N$: 0 noise, 1 data |
# | data $x_0$ (the course notes: $z$); noise $\epsilon$, $x_T$ or $x_N$ | $x_1$; $x_0$: the same letters, swapped |
# | $\alpha_t$, $\beta_t$ of the course notes | $\alpha_t$, $\sigma_t$, the coefficients of data and noise |
# | table $\beta_k$, $\bar\alpha_k = \prod_{i \le k} (1 - \beta_i)$ | $\alpha_t^2 = \bar\alpha_k = 1 - \sigma_t^2$ |
# | $\sigma_t$ of the course notes' SDE, $g(t)$, $\sqrt{\beta(t)}$ | $g_t$; our $\sigma_t$ is always the path's |
# | forward process, $q(x_k \mid x_0)$ | conditional path, $p_t(x \mid x_1)$ |
# | reverse process, $p_\theta(x_{k-1} \mid x_k)$ | a step of `fm_jax.samplers.DDIM` with `eta=1` |
# | $\epsilon_\theta$; $D_\theta$ or $\hat x_0$; $s_\theta$ | the kinds `"noise"`; `"data"`; `"score"` |
# | $L_{\mathrm{simple}}$; denoising score matching | `noise_prediction`; `score_matching` |
# | $v$-prediction $\alpha\epsilon - \sigma x_0$ (arXiv:2202.00512) | on `Cosine()`, $-\tfrac{2}{\pi}\, u_t$ |
# | probability-flow ODE | the flow of $v_t$ |
# | negative ELBO, less constants | $\int \frac{1}{2} g_t^2\, \mathbb{E} \lvert s^\theta_t - s_t \rvert^2 \mathrm{d}t$ |
#
# The last row, with the $g_t$ of [(5.12)](#eq-5-12), bounds from above the KL divergence from the data to the samples
# of an SDE that starts at the right noise (Song et al. 2021, arXiv:2101.09258). In continuous time the exact score
# makes it an equality, 0 on both sides; in discrete time a gap stays, as the reversal of a finite step is not Gaussian.
#
# DDPM defines its path by a Markov chain that adds a little noise at a time, each $z_k \sim N(0, I)$ drawn
# independently. The chain composes: if $x_{k-1}$ given the data has variance $1 - \bar\alpha_{k-1}$, then $x_k$ has
# variance $(1 - \beta_k)(1 - \bar\alpha_{k-1}) + \beta_k = 1 - \bar\alpha_k$. In diffusion's letters, by induction from
# $\bar\alpha_0 = 1$,
#
# <a id="eq-5-8"></a>
#
# $$
# x_k = \sqrt{1 - \beta_k}\; x_{k-1} + \sqrt{\beta_k}\; z_k \quad \Longrightarrow \quad
# x_k \mid x_{\text{data}} \sim N\big( \sqrt{\bar\alpha_k}\; x_{\text{data}},\ (1 - \bar\alpha_k) I \big) . \tag{5.8}
# $$
#
# A thousand steps of noising are one affine path, `fm_jax.schedules.DDPM`, and training never walks the chain. We check
# that, and the row on $v$-prediction.

# %%
e, z, time = x0[0, :, 0], x1[0, :, 0], batch["t"][0]  # noise, data, time
v_prediction = Cosine().alpha(time) * e - Cosine().sigma(time) * z
assert jnp.allclose(v_prediction, -2 / np.pi * AffinePath(Cosine()).sample(None, time, e, z).u_t)

ddpm, betas = DDPM(), np.array(linear_betas())
means, variances = np.ones(1001), np.zeros(1001)  # for k = 0, ..., 1000
for k, beta in enumerate(betas, start=1):
    means[k], variances[k] = np.sqrt(1 - beta) * means[k - 1], (1 - beta) * variances[k - 1] + beta
ts = 1 - np.arange(1001) / 1000
gap = max(abs(means - ddpm.alpha(ts)).max(), abs(variances - ddpm.sigma(ts) ** 2).max())
print(f"the chain of {len(betas)} steps and the schedule, mean and variance: apart by at most {gap:.0e}")
assert gap < 1e-10

# %% [markdown]
# ## DDIM is Euler's method
#
# Divide the state of the flow by $\alpha_t$ and measure time by the noise-to-signal ratio
# $\rho_t = \sigma_t / \alpha_t$. With $x = \alpha d + \sigma n$ and $\dot x = \dot\alpha d + \dot\sigma n$ from
# [(5.6)](#eq-5-6),
#
# <a id="eq-5-9"></a>
#
# $$
# \begin{aligned}
# \frac{\mathrm{d}}{\mathrm{d}t} \frac{x_t}{\alpha_t} &= \frac{\alpha \dot x - \dot\alpha x}{\alpha^2}
#   = \frac{\alpha\dot\sigma - \dot\alpha\sigma}{\alpha^2}\, n_t(x_t) = \dot\rho_t\, n_t(x_t) , \\
# \text{so Euler's step in } \rho \text{ is}\quad
# x_+ &= \alpha_+ \Big( \frac{x}{\alpha} + (\rho_+ - \rho)\, n \Big) = \alpha_+ d + \sigma_+ n ,
# \end{aligned} \tag{5.9}
# $$
#
# where the subscript $+$ marks the next time. That is **DDIM**: predict data and noise, and mix them anew (Song et al.
# 2020, arXiv:2010.02502). It makes sense at $\alpha = 0$ too, where $\rho$ is infinite. And on the linear path
# $\alpha_+ d + \sigma_+ n = x + (t_+ - t)(d - n) = x + (t_+ - t)\, v$: **there DDIM is Euler's method
# [(1.4)](01_flows.ipynb#eq-1-4) for the flow.**
#
# To check the first claim without a formula of our own: $x / \alpha$ against $\rho$ is the path of
# `fm_jax.schedules.EDM`, on which $\rho$ falls at constant speed. `fm_jax.parameterization.reschedule` carries the
# field there, and `fm_jax.samplers.RungeKutta` takes Euler's steps. All fields from here on are exact; the trained
# network's `v_network` would go in their place.

# %%
key_x0, key_step, key_noise = jax.random.split(jax.random.key(3), 3)
x0, grid = jax.random.normal(key_x0, (5000, 1)), np.linspace(0, 1, 101)
v, v_linear = velocity(data, vp), velocity(data, Linear())
alpha, rho = np.array(vp.alpha(grid)), np.array(vp.sigma(grid) / vp.alpha(grid))
v_edm = reschedule(v, vp, EDM(float(rho[0])), clip=True)  # no step begins at t = 1, where v is not defined


@jax.jit
def deterministic(x0):
    def states(v, x0, sampler, times):
        return samplers.sample(v, x0, sampler, times=times, trajectory=True).trajectory

    ode = states(v, x0, RungeKutta("rk4"), grid.clip(max=vp.domain[1]))
    ddim = states(v, x0, DDIM(vp), grid)
    scaled = states(v_edm, x0 / alpha[0], RungeKutta("euler"), 1 - rho / rho[0])
    ddim_linear, euler_linear = (states(v_linear, x0, each, 10)[-1] for each in (DDIM(Linear()), RungeKutta("euler")))
    return ode, ddim, abs(ddim - alpha[:, None, None] * scaled).max(), abs(ddim_linear - euler_linear).max()


ode, ddim, gap, gap_linear = deterministic(x0)
print(f"DDIM and Euler's method in rho: apart by {gap:.0e}; in t on the linear path: {gap_linear:.0e}")
assert max(gap, gap_linear) < 1e-9

# %% [markdown]
# ## DDPM is DDIM with fresh noise
#
# DDIM reuses the noise it predicts. A step may as well replace a share of it, measured by $\eta \in [0, 1]$, by fresh
# noise $z \sim N(0, I)$, so that the variances still add up to 1:
#
# <a id="eq-5-10"></a>
#
# $$
# x_+ = \alpha_+ d + \sigma_+ \Big( \sqrt{1 - \eta^2 (1 - \kappa^2)}\; n + \eta \sqrt{1 - \kappa^2}\; z \Big) , \qquad
# \kappa = \frac{\rho_+}{\rho} = \frac{\alpha\, \sigma_+}{\alpha_+ \sigma} . \tag{5.10}
# $$
#
# With $\eta = 1$ this draws from the chain's posterior given $x$ and $x_1 = d$. For in [(5.8)](#eq-5-8) $x$ is
# $(\alpha / \alpha_+)\, x_+$ plus independent noise, so given $x_1$ the covariance of $x_+$ and $x$ is
# $(\alpha / \alpha_+)\, \sigma_+^2$. The regression of $x_+$ on $x$ then has the slope
# $\alpha \sigma_+^2 / (\alpha_+ \sigma^2) = \kappa \sigma_+ / \sigma$ and leaves the variance
# $\sigma_+^2 (1 - \kappa^2)$, as in [(5.10)](#eq-5-10), where $x - \alpha d = \sigma n$.
#
# To recognise DDPM, insert $d = (x - \sigma n) / \alpha$, $\alpha^2 + \sigma^2 = 1$ and
# $\alpha^2 = (1 - \beta_k)\, \alpha_+^2$. The factor of $x$ is $\alpha_+ / \alpha = 1 / \sqrt{1 - \beta_k}$. That of
# $n$ is $\kappa\sigma_+ - \alpha_+ \sigma / \alpha = (\alpha^2 - \alpha_+^2) / (\alpha\alpha_+\sigma)$, which is
# $-\beta_k / (\sqrt{1 - \beta_k}\, \sigma)$, and the variance is
# $\sigma_+^2 (1 - \kappa^2) = (\sigma_+^2 / \sigma^2)\, \beta_k$. In diffusion's letters this is DDPM's **ancestral
# step**
#
# <a id="eq-5-11"></a>
#
# $$
# x_{k-1} = \frac{1}{\sqrt{1 - \beta_k}}
#   \Big( x_k - \frac{\beta_k}{\sqrt{1 - \bar\alpha_k}}\, \epsilon_\theta(x_k) \Big)
#   + \sqrt{\tilde\beta_k}\; z , \qquad
# \tilde\beta_k = \frac{1 - \bar\alpha_{k-1}}{1 - \bar\alpha_k}\, \beta_k \tag{5.11}
# $$
#
# (Ho et al. 2020, algorithm 2; the source notes have $\beta_k$ for $\tilde\beta_k$, the larger of the two variances
# that the paper allows).

# %%
k = 500
beta, variance, variance_next = betas[k - 1], variances[k], variances[k - 1]
epsilon = oracle(ddpm, jnp.asarray(ts[k]), x0).noise
z = jax.random.normal(jax.random.fold_in(key_step, 0), x0.shape)  # what the sampler draws in its first step
published = (x0 - beta / np.sqrt(variance) * epsilon) / np.sqrt(1 - beta) + np.sqrt(variance_next / variance * beta) * z
options = {"times": ts[[k, k - 1]], "key": key_step}
step = jax.jit(lambda x: samplers.sample(velocity(data, ddpm), x, DDIM(ddpm, eta=1.0), **options).x)
gap = abs(step(x0) - published).max()
print(f"DDIM with eta = 1 and (5.11): apart by {gap:.0e}")
assert gap < 1e-9

# %% [markdown]
# In small steps, and where $\alpha_t > 0$, this is an SDE. Let $\lambda = \log(\alpha / \sigma)$ and
# $\Delta = \lambda_+ - \lambda$. Then $\kappa = e^{-\Delta}$, so to first order $1 - \kappa^2 = 2 \Delta$ and
# $\sqrt{1 - \eta^2 (1 - \kappa^2)} = 1 - \eta^2 \Delta$. To DDIM's step [(5.10)](#eq-5-10) adds
# $-\eta^2 \Delta\, \sigma n + \eta \sqrt{2 \Delta}\, \sigma z$, and $\sigma n = -\sigma^2 s$:
#
# <a id="eq-5-12"></a>
#
# $$
# \mathrm{d}X_t = \Big( v_t + \frac{(\eta g_t)^2}{2}\, s_t \Big)\, \mathrm{d}t + \eta\, g_t\, \mathrm{d}W_t , \qquad
# g_t^2 = 2 \sigma_t^2\, \dot\lambda_t
#   = 2 \Big( \frac{\sigma_t^2 \dot\alpha_t}{\alpha_t} - \sigma_t \dot\sigma_t \Big) .
# \tag{5.12}
# $$
#
# That is [Theorem 2](04_continuity.ipynb#eq-4-7) with the diffusion coefficient $\eta g$: **in the limit of small steps
# every $\eta$ has the marginals $p_t$.** And $g_t^2 / 2$ is the factor of the score in [(5.6)](#eq-5-6). At $\eta = 1$
# the drift is therefore $(\dot\alpha / \alpha)\, x + g^2 s$, the reversal of the diffusion that noised the data
# (Anderson 1982; Song et al. 2021, arXiv:2011.13456); at $\eta = 0$ what is left is the ODE that they call the
# probability flow. (On the linear path $g_t^2 = 2 (1 - t) / t$ is infinite at $t = 0$; the step [(5.10)](#eq-5-10) is
# not.)
#
# What $\eta$ changes is the paths: they are as rough as their noise. Their quadratic variation $\sum |x_+ - x|^2$ tends
# to $\eta^2 \int g_t^2\, \mathrm{d}t$; on `VP`, where $g_t^2$ is the paper's $\beta$, that is
# $\eta^2 (\beta_{\min} + \beta_{\max}) / 2$. The marginals are measured by the Kolmogorov-Smirnov distance, the largest
# gap between two distribution functions, to `fm_jax.oracles.cdf` at four times; 5000 samples are about 0.012 away from
# their own law by chance alone.


# %%
def ks_distance(x, t):
    return stats.kstest(x, lambda x: cdf(data, vp, t, x[:, None])).statistic


etas = (0.0, 1.0) if SMOKE else np.linspace(0, 1, 11)
shown = np.argsort(x0[:, 0])[416::833]  # six paths that start evenly spread
paths = {"ODE": ode[:, shown, 0], "DDIM": ddim[::5, shown, 0]}
for eta in etas:
    sampler, options = DDIM(vp, eta), {"times": 400, "key": key_noise if eta > 0 else None, "trajectory": True}
    run = jax.jit(lambda x0, each=sampler, options=options: samplers.sample(v, x0, each, **options).trajectory[:, :, 0])
    states = np.array(run(x0))
    variation, limit = (np.diff(states, axis=0) ** 2).sum(axis=0).mean(), eta**2 * (vp.beta_min + vp.beta_max) / 2
    distance = max(ks_distance(states[i], i / 400) for i in (100, 200, 300, 400))
    print(f"eta {eta:.1f}: quadratic variation {variation:5.2f}, limit {limit:5.2f}; KS distance up to {distance:.3f}")
    assert abs(variation - limit) < 0.03 * limit + 0.01
    assert distance < 0.04
    paths[eta] = states[:, shown]

# %% [markdown]
# Move the slider from DDIM to DDPM: the same starting points and the same random numbers, over the same density.

# %%
tt, xx = np.repeat(np.linspace(0, 1, 101), 151), np.tile(np.linspace(-3, 3, 151), 101)[:, None]
shade = np.exp(jax.jit(log_prob, static_argnums=1)(data, vp, tt, xx)).reshape(101, 151).T


def draw_paths(name, ax, color=BLUE, title="", ls="-", **style):
    ax.contourf(np.linspace(0, 1, 101), np.linspace(-3, 3, 151), shade, 6, cmap="Greys", vmax=1.2)
    ax.plot(np.linspace(0, 1, len(paths[name])), paths[name], color=color, lw=0.8, ls=ls, **style)
    ax.set(xlim=(0, 1), ylim=(-3, 3), xlabel="t (0 noise, 1 data)", ylabel="x", title=title)
    ax.label_outer()


alt = "Paths from noise to data over the density: smooth at eta = 0, rougher and rougher towards eta = 1"
film(draw_paths, etas, alt=alt, caption="η = {:.1f}", size=(3.8, 2.3), stills=3)

# %% [markdown]
# ## One field, three samplers
#
# The same noise, the same field, the same density at all times: the probability-flow ODE solved to high accuracy,
# DDIM's Euler steps along the same curves (100 each), and DDPM's random walk (400 steps). The number is the largest
# Kolmogorov-Smirnov distance of their samples from the data; beside it, what a sample of the data itself exceeds once
# in 100 times.

# %%
figure, axes = plt.subplots(1, 3, figsize=(7, 2.7), sharey=True)
draw_paths("ODE", axes[0], BLUE, "probability-flow ODE")
draw_paths("ODE", axes[1], GREY)
draw_paths("DDIM", axes[1], RED, "DDIM (every fifth step)", ls="", marker=".")
draw_paths(1.0, axes[2], GREEN, "DDPM")
plt.show()
worst = max(ks_distance(np.array(end), 1.0) for end in (ode[-1, :, 0], ddim[-1, :, 0], states[-1]))
chance = stats.kstwobign.isf(0.01) / np.sqrt(len(x0))
print(f"largest KS distance to the data, of all three samplers: {worst:.3f} (by chance alone up to {chance:.3f})")

# %% [markdown]
# Flow matching and denoising score matching are the same regression: its target is a noisy sample of a conditional
# mean, its loss stands a known constant above the ideal one, its gradient is right on average. Whatever a network was
# trained to predict, [(5.6)](#eq-5-6) reads it as a velocity or a score, and DDPM, DDIM and the probability-flow ODE
# are three ways, random or not, to follow the same field through the same marginals.
#
# Next: [Guidance](06_guidance.ipynb), where this field is bent towards a class.
