# %% [markdown]
# # 9. Images: two networks for one field
#
# What changes when a data point is a picture? Only the network that stands for the velocity: a U-Net of convolutions,
# or a transformer on patches (DiT), either of them told the time and the class. We take both apart, confirm each part
# by a number, train both from scratch on small digits, and let a classifier that only ever saw real ones judge what
# they draw.
#
# Before this: [couplings](08_couplings.ipynb). It builds on the path [(3.2)](03_paths.ipynb#eq-3-2), the loss of
# Theorem 3 [(5.3)](05_losses.ipynb#eq-5-3) and classifier-free guidance [(6.4)](06_guidance.ipynb#eq-6-4).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from lab import BLUE, GREY, INK, ORANGE, SMOKE, film
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

from fm_jax.conditions import DropCondition
from fm_jax.data.digits import load_digits
from fm_jax.data.pipeline import batches
from fm_jax.guidance import classifier_free_batched
from fm_jax.losses import flow_matching
from fm_jax.models import LabelEmbedding, forward_flops, init_params, linen_apply, make_dit, make_unet, num_params
from fm_jax.models.dit import DiTBlock, patchify, unpatchify
from fm_jax.models.layers import sinusoidal_features
from fm_jax.models.unet import ResBlock
from fm_jax.oracles import gaussian_mixture, velocity
from fm_jax.paths import AffinePath
from fm_jax.samplers import AdamsBashforth, sample
from fm_jax.train import create_state, make_optimizer, make_step

jax.config.update("jax_default_matmul_precision", "highest")  # where an accelerator would round factors to 10 bits
jax.config.update("jax_disable_most_optimizations", SMOKE)  # a few steps are over before they are well compiled

# %% [markdown]
# ## The data and the two networks
#
# `fm_jax.data.digits.load_digits` has 1,797 handwritten digits of $8\times 8$ pixels in $[-1, 1]$: points $x_1$ in
# $\mathbb{R}^d$, $d = 64$, each with a class $y$ from 0 to 9. On the straight path $x_t = t\,x_1 + (1-t)\,x_0$ the loss
# is as before, with the class as one more argument:
#
# <a id="eq-9-1"></a>
#
# $$
# L(\theta) = \mathbb{E}_{t,\, x_0,\, (x_1, y)}\ \frac1d\, \big| v_\theta(t, x_t, y) - (x_1 - x_0) \big|^2 . \tag{9.1}
# $$
#
# Its minimiser is $v_t(x\mid y)$, the marginal velocity of the digits of class $y$. `fm_jax.models.make_unet` and
# `fm_jax.models.make_dit` make candidates for $v_\theta$. Ours have about the same number of parameters; a convolution
# uses each of them at every pixel and a transformer at every patch, so the work they do with them differs.

# %%
train_set, test_set = load_digits("train"), load_digits("test")
small = dict(channels=8, channel_mults=(1,), attention_levels=()) if SMOKE else {}
unet = make_unet("tiny", embed=LabelEmbedding(10), **small)
dit = make_dit("tiny", hidden=72, num_layers=1 if SMOKE else 4, embed=LabelEmbedding(10, stddev=0.02))
networks = {"U-Net": unet, "DiT": dit}
fresh = {name: init_params(network, jax.random.key(0), (8, 8, 1)) for name, network in networks.items()}
for name, network in networks.items():
    size, flops = num_params(fresh[name]), forward_flops(network, (8, 8, 1))
    print(f"{name}: {size:,} parameters, {flops / 1e6:.1f} MFLOP an image; {flops / 2 / size:.0f} uses of a parameter")

# %% [markdown]
# ## How the network is told the time
#
# A network to which $t\in[0,1]$ is given as one more number among many hardly notices it. So
# `fm_jax.models.layers.sinusoidal_features` spreads it over $D$ waves, with $D/2$ frequencies evenly spaced in the
# logarithm from 1000 to nearly 0.1 (Vaswani et al. 2017, arXiv:1706.03762; in diffusion models since Ho et al. 2020,
# arXiv:2006.11239, whose time counts steps up to 1000, hence the factor):
#
# <a id="eq-9-2"></a>
#
# $$
# \varphi(t) = \big(\cos\omega_0 t, \dots, \cos\omega_{D/2-1} t,\ \sin\omega_0 t, \dots, \sin\omega_{D/2-1} t\big),
# \qquad \omega_i = 1000\cdot 10000^{-2i/D}. \tag{9.2}
# $$
#
# Since $\cos a\cos b + \sin a\sin b = \cos(a - b)$, two times are compared by their difference alone:
#
# $$
# \varphi(t)\cdot\varphi(t') = \sum_i \cos\omega_i (t - t') .
# $$
#
# Near times are alike and far ones are not, on all scales from a thousandth to one. (The angles go up to 1000 radians,
# which float32 rounds by up to $3\cdot10^{-5}$. The fastest waves are too fast for the picture.)

# %%
t = np.linspace(0, 1, 401)
features = np.asarray(sinusoidal_features(jnp.asarray(t), 64))
omega = 1000 * 10_000 ** (-np.arange(32) / 32)
likeness = np.cos(omega * (t[:, None] - t[None])[..., None]).mean(-1)
off = abs(features @ features.T / 32 - likeness).max()
print(f"phi(t) . phi(t') less its closed form, in units of phi(t) . phi(t): {off:.0e}")
assert off < 1e-4

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.5), width_ratios=(3, 2))
left.imshow(features.T, aspect="auto", extent=(0, 1, 63.5, -0.5), interpolation="nearest")
left.set(title=r"$\varphi(t)$, from $-1$ (white) to $+1$ (blue)", xlabel="time t", ylabel="feature", yticks=[0, 31, 63])
right.semilogx(t[1:], likeness[0, 1:])
right.set(title=r"$\varphi(t)\cdot\varphi(t')\ /\ \varphi(t)\cdot\varphi(t)$", xlabel=r"$|t - t'|$", ylim=(-0.2, 1))
plt.show()

# %% [markdown]
# ## How the network is told the class
#
# A class is looked up in a table $E$ with eleven rows: one for each digit, and one, $\varnothing$, for "no class". A
# small network of $\varphi(t)$ is added. This vector is all that the rest of the network gets to know:
#
# <a id="eq-9-3"></a>
#
# $$
# e(t, y) = W_2\, \mathrm{silu}\big(W_1 \varphi(t) + b_1\big) + b_2 + E_y . \tag{9.3}
# $$
#
# The table is the network's `embed`, a module of its own; for a vector or a set of words, another one takes its place.
#
# In training the loss replaces a label by $\varnothing$ with probability 0.1 (Ho & Salimans 2022, arXiv:2207.12598). So
# $\varnothing$ comes with digits of all classes, and $v_\theta(t, x, \varnothing)$ learns the velocity $v_t(x)$ of all
# of them together: guidance needs both. In $n$ draws the share of labels lost is 0.1, with a standard error of
# $0.3/\sqrt n$.

# %%
table = fresh["U-Net"]["embed"]["table"]
rows = unet.embed.apply({"params": {"table": table}}, jnp.array([3, 10]), table.shape[1], 2)
assert (rows == table[jnp.array([3, 10])]).all()
drop, n = DropCondition(0.1, null_cond=10), 40_000
lost = float((drop(jax.random.key(1), jnp.arange(n) % 10) == 10).mean())
print(f"share of labels lost in training: {lost:.4f}, standard error {0.3 / n**0.5:.4f}")
assert abs(lost - 0.1) < 5 * 0.3 / n**0.5

# %% [markdown]
# ## FiLM: how a convolution listens
#
# The U-Net's residual block normalises its channels (group normalisation $N$) and then lets $e$ set their scale and
# shift, channel by channel and the same at all pixels. This is **feature-wise linear modulation** (Perez et al. 2018,
# arXiv:1709.07871):
#
# <a id="eq-9-4"></a>
#
# $$
# x \;\leftarrow\; x + \mathrm{conv}_2\, \mathrm{silu}\big( (1 + \gamma) \odot N(h) + \beta \big), \qquad
# h = \mathrm{conv}_1\, \mathrm{silu}\, N(x), \qquad (\gamma, \beta) = W \mathrm{silu}(e) + b . \tag{9.4}
# $$
#
# With $\gamma = -1$ and $\beta = 0$ a channel is silent: which features count may depend on time and class. To look
# inside, we replace $\mathrm{conv}_2$ by one that copies its input; then the block returns $x$ plus what
# $\mathrm{conv}_2$ is given. As initialised, $\mathrm{conv}_2$ is zero and the block returns $x$ itself (through a
# $1\times 1$ convolution where the number of channels changes).

# %%
c, keys = unet.channels, jax.random.split(jax.random.key(2), 4)
block = ResBlock(c, film=True, dropout=0.0, num_groups=unet.num_groups)
x, e = jax.random.normal(keys[0], (4, 8, 8, c)), jax.random.normal(keys[1], (4, 4 * c))
run = jax.jit(lambda params: block.apply({"params": params}, x, e, False, capture_intermediates=True))
params = fresh["U-Net"]["down_0_0"]
untouched = float(abs(run(params)[0] - x).max())

copy = {"kernel": jnp.zeros((3, 3, c, c)).at[1, 1].set(jnp.eye(c)), "bias": jnp.zeros(c)}
out, seen = run(params | {"conv_out": copy})
seen = {name: value["__call__"][0] for name, value in seen["intermediates"].items() if name != "__call__"}
gamma, beta = jnp.split(seen["embed"][:, None, None, :], 2, axis=-1)
off = float(abs(out - x - jax.nn.silu((1 + gamma) * seen["norm_out"] + beta)).max())
print(f"FiLM by (9.4) less the library's: {off:.0e}; a fresh block less the identity: {untouched}")
assert off < 1e-4
assert untouched == 0

# %% [markdown]
# ## Skip connections: the shape of the U
#
# A convolution sees $3\times 3$ pixels at a time. To see a whole digit, the U-Net (Ronneberger et al. 2015,
# arXiv:1505.04597) halves the resolution and comes back, and on the way up it puts the activations $h$ of the way down
# beside those that come from below:
#
# <a id="eq-9-5"></a>
#
# $$
# h_{\ell+1} = \mathrm{down}(h_\ell), \qquad
# g_\ell = \mathrm{block}\big( \big[\, \mathrm{up}(g_{\ell+1}),\ h_\ell \,\big] \big) . \tag{9.5}
# $$
#
# Without these skip connections the value of a pixel would reach its own output through the coarse level only. The
# velocity needs it: $x_1 - x_0$ contains the noise of that very pixel. Which channels a block on the way up reads is
# seen in the shape of its kernel, and `jax.eval_shape` finds all shapes without computing anything.

# %%
u, x = make_unet("tiny"), jnp.zeros((1, 8, 8, 1))
_, found = jax.eval_shape(lambda: u.init_with_output(jax.random.key(0), 0.5, x, capture_intermediates=True))
shape = {name: value["__call__"][0].shape[1:] for name, value in found["intermediates"].items() if name != "__call__"}
shape["halved"] = (4, 4, 24)  # down_0_0, averaged over squares of four pixels
down, up = ["stem", "down_0_0", "halved", "down_1_0"], ["up_1_0", "up_1_1", "up_0_0", "up_0_1"]
order = [*down, "middle_0", "middle_1", *up]

figure, ax = plt.subplots(figsize=(7, 2.6))
for i, name in enumerate(order):
    height, _, channels = shape[name]
    color, hatch = (BLUE, "") if name in down else (ORANGE, "//") if name in up else (GREY, "")
    ax.bar(i, height, channels / 60, bottom=-height, color=color, hatch=hatch, edgecolor="white")
    ax.text(i, -height - 0.4, f"{name}\n{height}x{height}x{channels}", ha="center", va="top", fontsize=7)
for below, name, skip in zip(["middle_1", *up], up, reversed(down), strict=False):
    reads = found["params"][name]["conv_in"]["kernel"].shape[2]
    print(f"{name} reads {reads} channels: {shape[below][2]} of {below} and {shape[skip][2]} of {skip}")
    assert reads == shape[below][2] + shape[skip][2]
    arrow = dict(arrowstyle="->", connectionstyle="arc3,rad=-0.25", color=INK, lw=0.8)
    ax.annotate("", (order.index(name), 0.1), (order.index(skip), 0.1), arrowprops=arrow)
ax.set(title="The U-Net: resolution (height), channels (width), skip connections (arrows)", ylim=(-10.5, 5.5))
ax.axis("off")
plt.show()

# %% [markdown]
# ## The transformer: a picture as a set of patches
#
# DiT (Peebles & Xie 2022, arXiv:2212.09748) cuts the picture into patches of $p\times p$ pixels, maps each linearly to
# a token, lets the tokens attend to one another, and maps each back to a patch of the velocity. With $K = hw/p^2$
# tokens $h_k$, and $\mathrm{LN}$ normalising the features of each,
#
# <a id="eq-9-6"></a>
#
# $$
# \begin{aligned}
# h_k &\leftarrow W\,\mathrm{patch}_k(x) + b + \pi_k, \qquad k = 1, \dots, K, \\
# h &\leftarrow \mathrm{block}_n(h, e), \qquad n = 1, \dots, N, \\
# v_\theta &= \mathrm{unpatch}\big(W'\big[(1 + \gamma') \odot \mathrm{LN}(h) + \beta'\big] + b'\big) .
# \end{aligned} \tag{9.6}
# $$
#
# To cut and to put back are inverse to each other. The fixed $\pi_k$, sines and cosines of row and column, say where a
# patch was; the blocks, attention over all tokens and an MLP on each, do not know: if tokens go in permuted, they come
# out permuted in the same way.
#
# ## adaLN-Zero: how a transformer listens
#
# A block has two branches, attention and MLP. Each is normalised, scaled and shifted as in FiLM, and also multiplied by
# a **gate** $g$, all six of them functions of $e$:
#
# <a id="eq-9-7"></a>
#
# $$
# \begin{aligned}
# h &\leftarrow h + g_a \odot \mathrm{Attention}\big( (1 + \gamma_a) \odot \mathrm{LN}(h) + \beta_a \big), \\
# h &\leftarrow h + g_m \odot \mathrm{MLP}\big( (1 + \gamma_m) \odot \mathrm{LN}(h) + \beta_m \big), \qquad
# (\beta_a, \gamma_a, g_a, \beta_m, \gamma_m, g_m) = W \mathrm{silu}(e) + b .
# \end{aligned} \tag{9.7}
# $$
#
# "Zero" is for $W = b = 0$ at the start. All gates are then closed and every block is the identity. The U-Net begins
# alike, and both end in a layer of zeros, so that the two fresh networks are one and the same function: zero. We check
# the inverse and the zeros on the fresh networks, and the formula and the permutation on a block with other weights.

# %%
images = jnp.asarray(test_set.images)
cut = float(abs(unpatchify(patchify(images, 2), 2, 8, 8) - images).max())
print(f"unpatchify(patchify(x)) less x: {cut}; x becomes {patchify(images, 2).shape[1]} tokens")

block = DiTBlock(4, mlp_ratio=4.0, dropout=0.0)
h, e = jax.random.normal(keys[2], (4, 16, 72)), jax.random.normal(keys[3], (4, 72))
run = jax.jit(lambda params, h: block.apply({"params": params}, h, e, None, False, capture_intermediates=True))
params = fresh["DiT"]["block_0"]
untouched = float(abs(run(params, h)[0] - h).max())
largest = [float(abs(jax.jit(networks[name].apply)({"params": fresh[name]}, 0.5, images)).max()) for name in networks]
print(f"a fresh block less the identity: {untouched}; largest output of a fresh U-Net and DiT: {largest}")
assert cut == untouched == max(largest) == 0

awake = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(1.0, p.size + 1)).reshape(p.shape), params)
out, seen = run(awake, h)
seen = {name: value["__call__"][0] for name, value in seen["intermediates"].items() if name != "__call__"}
gates = jnp.split(seen["modulation"][:, None, :], 6, axis=-1)
by_hand = float(abs(h + gates[2] * seen["attention"] + gates[5] * seen["mlp_out"] - out).max())
mixed = jax.random.permutation(keys[1], 16)
permuted = float(abs(run(awake, h[:, mixed])[0] - out[:, mixed]).max())
print(f"block by (9.7) less the library's: {by_hand:.0e}; permuted before less permuted after: {permuted:.0e}")
assert max(by_hand, permuted) < 1e-3

# %% [markdown]
# A text in place of the class comes as a row of vectors from an encoder trained before (CLIP, T5). In one design the
# picture's tokens look the words up by cross-attention (Rombach et al. 2022, arXiv:2112.10752; Movie Gen, Polyak et al.
# 2024, arXiv:2410.13720, with three encoders). In MM-DiT (Esser et al. 2024, arXiv:2403.03206, Stable Diffusion 3) the
# words are tokens too: image and text are two streams, each with its own weights for projections, modulation and MLP,
# that meet in one attention over all tokens, so that the picture reads the words and the words read the picture; a
# pooled vector of the text goes the way of $e$. All of these draw not pixels but the codes of an autoencoder, to which
# everything here applies with the code as $x_1$.
#
# ## Zero is a good place to start
#
# A network that says 0 has a loss that we know: with $x_0$ standard normal and independent of $x_1$,
#
# <a id="eq-9-8"></a>
#
# $$
# L(\theta_0) = \frac1d\, \mathbb{E}\,|x_1 - x_0|^2 = \frac1d\, \mathbb{E}\,|x_1|^2 + 1 . \tag{9.8}
# $$
#
# It is the same at all $t$: no time is louder than another at the start. We give the loss its times and noise, and no
# key, so that no label is lost and nothing but the noise is random.

# %%
path, n = AffinePath(), len(images)
losses = {name: jax.jit(flow_matching(linen_apply(network), path, drop=drop)) for name, network in networks.items()}


def held_out(loss_fn, params, key, low, high):  # the loss on the test images at times between low and high
    key_t, key_x0 = jax.random.split(key)
    t, x0 = jax.random.uniform(key_t, (n,), minval=low, maxval=high), jax.random.normal(key_x0, images.shape)
    return float(loss_fn(params, None, {"t": t, "x0": x0, "x1": images, "cond": test_set.labels})[0])


closed, keys = float((images**2).mean()) + 1, jax.random.split(jax.random.key(3), 10)
for name in networks:
    at_start = [held_out(losses[name], fresh[name], key, 0, 1) for key in keys]
    error = np.std(at_start) / len(at_start) ** 0.5
    print(f"{name}: loss at the start {np.mean(at_start):.4f}, standard error {error:.4f}; closed form {closed:.4f}")
    assert abs(np.mean(at_start) - closed) < 8 * error

# %% [markdown]
# Zero is not dead. At the first step the last layer alone has a gradient, because its zeros keep the gradient from all
# that is below. At the second step the tokens' projection, the gates and the last modulation have one; then the gates
# open, and at the third everything learns. Adam's running mean of the gradient tells, since it is exactly zero where
# there never was one.

# %%
num_steps, batch_size = (4, 16) if SMOKE else (600, 64)
optimizer = make_optimizer(4e-3, total_steps=num_steps, decay="cosine")
step = {name: jax.jit(make_step(losses[name], optimizer, axis_name=None), donate_argnums=0) for name in networks}
key_train, shares = jax.random.key(4), []
state, data = create_state(fresh["DiT"], optimizer, (0.99,)), batches(train_set, batch_size=batch_size, seed=0)
for _ in range(3):
    state, _ = step["DiT"](state, key_train, next(data))
    moved = jax.tree.map(jnp.count_nonzero, optax.tree.get(state.opt_state, "mu"))
    shares.append(sum(jax.tree.leaves(moved)) / num_params(fresh["DiT"]))
print("share of the DiT's weights that have had a gradient after 1, 2 and 3 steps:", *(f"{s:.2%}" for s in shares))
assert shares[0] < 0.01 < shares[1] < 0.9 < shares[2]

# %% [markdown]
# ## Training
#
# Both networks get the same steps, batches and keys, Adam with a cosine decay, and an exponential moving average of the
# weights, which is what we sample from (`fm_jax.train.make_step`). The steps are dispatched one by one: on a CPU the
# gradient of a convolution is many times slower inside `lax.scan`.


# %%
def train(name):
    state, data = create_state(fresh[name], optimizer, (0.99,)), batches(train_set, batch_size=batch_size, seed=0)
    for _ in range(num_steps):
        state, _ = step[name](state, key_train, next(data))
    return state.ema["0.99"]


trained = {name: train(name) for name in networks}

# %% [markdown]
# ## What have they learnt, and when?
#
# A loss of 0.4 says nothing by itself. The least that any field can reach is unknown here, but the least for an
# *affine* field $A_t x + b_t$ is known, and needs only the eigenvalues $\lambda_i$ of the data's covariance. In the
# eigenbasis, component $i$ of $x_t$ has variance $q_i = t^2\lambda_i + (1-t)^2$, that of $u_t = x_1 - x_0$ has variance
# $\lambda_i + 1$, and their covariance is $c_i = t\lambda_i - (1-t)$; different components are uncorrelated. The best
# linear prediction of one from the other leaves $\lambda_i + 1 - c_i^2 / q_i$, and
# $(\lambda_i + 1)\, q_i - c_i^2 = \lambda_i\,(t + 1 - t)^2 = \lambda_i$. Hence
#
# <a id="eq-9-9"></a>
#
# $$
# \min_{A,\, b}\ \frac1d\, \mathbb{E}\,\big| A x_t + b - u_t \big|^2
# = \frac1d \sum_{i=1}^d \frac{\lambda_i}{t^2\lambda_i + (1-t)^2} . \tag{9.9}
# $$
#
# That field is the marginal velocity of a Gaussian with the mean and covariance of the data
# (`fm_jax.oracles.velocity`). We give it the moments of the very test images that it is judged on, an advantage that
# the networks do not have.

# %%
pixels = np.asarray(images, dtype=np.float64).reshape(n, 64)
covariance = np.cov(pixels.T, bias=True)
v = velocity(gaussian_mixture(pixels.mean(0)[None], covariance[None]), path.schedule)
affine = jax.jit(flow_matching(lambda params, t, x, cond, **_: v(t, x.reshape(n, 64)).reshape(x.shape), path))

times = np.linspace(0, 0.98, 99)
scale = np.linalg.eigvalsh(covariance).clip(0)
closed = (scale / (times[:, None] ** 2 * scale + (1 - times[:, None]) ** 2)).mean(1)
for i in (25, 50, 75):
    measured = np.mean([held_out(affine, None, key, times[i], times[i]) for key in keys])
    print(f"best affine field at t = {times[i]:.2f}: loss {measured:.3f}, by (9.9) {closed[i]:.3f}")
    assert abs(measured / closed[i] - 1) < 0.05

middles = np.arange(10) / 10 + 0.05
figure, ax = plt.subplots(figsize=(7, 2.7))
ax.plot(times, closed, color=GREY, ls=":")
ax.text(0.4, 0.58, "best affine field, by (9.9)", color=INK, ha="right")
for name, color, line, y in (("U-Net", BLUE, "o-", 0.31), ("DiT", ORANGE, "s--", 0.51)):
    by_time = [held_out(losses[name], trained[name], k, t - 0.05, t + 0.05) for t, k in zip(middles, keys, strict=True)]
    ax.plot(middles, by_time, line, color=color)
    ax.text(0.57, y, name, color=color, ha="center")
    assert SMOKE or max(by_time / np.interp(middles, times, closed)) < 0.95
ax.set(title="loss on held-out digits, by time", xlabel="time t", ylabel="mean squared error", ylim=(0, 1))
plt.show()

# %% [markdown]
# Near $t = 0$ there is little to do but to say the mean of the class less the noise, and both do it. They differ later,
# where strokes are decided and the noise of each pixel has to be told from the ink beneath it.
#
# ## Drawing
#
# We ask for each digit in turn, at guidance scale $w$ of 1 and of 2, by `fm_jax.guidance.classifier_free_batched`: one
# call of the network for both branches, at [(6.4)](06_guidance.ipynb#eq-6-4)
# $v = v_\theta(t, x, \varnothing) + w\,\big(v_\theta(t, x, y) - v_\theta(t, x, \varnothing)\big)$. The two networks
# start from the same noise.

# %%
num = 50 if SMOKE else 400
labels, x0 = jnp.arange(num) % 10, jax.random.normal(jax.random.key(5), (num, 8, 8, 1))


def draw_digits(name):
    @jax.jit
    def draw(params, scale):
        model_fn = jax.tree_util.Partial(linen_apply(networks[name]), params, train=False, rngs=None)
        v = classifier_free_batched(model_fn, "velocity", path.schedule, labels, 10, jnp.full(num, scale))
        return sample(v, x0, AdamsBashforth(2), times=20, trajectory=True).trajectory

    return {scale: np.asarray(draw(trained[name], scale)) for scale in (1.0, 2.0)}


drawn = {name: draw_digits(name) for name in networks}


def show(ax, x, rows, **labels):  # pictures [num, 8, 8, 1] side by side, in so many rows
    x = np.pad(np.asarray(x)[..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    sheet = x.reshape(rows, -1, 10, 10).transpose(0, 2, 1, 3).reshape(rows * 10, -1)
    ax.imshow(sheet, cmap="gray_r", vmin=-1, vmax=1)
    ax.set(xticks=[], yticks=[], **labels)


def draw(t, *axes):
    for ax, name in zip(axes, networks, strict=True):
        show(ax, drawn[name][2.0][round(20 * t), :10], 2, ylabel=name)


alt = "Noise turns into the digits from 0 to 9, by the U-Net and by the DiT."
film(draw, np.linspace(0, 1, 21), panels=2, size=(2.4, 1.2), alt=alt)

# %% [markdown]
# ## Judging
#
# A support vector machine, fitted to real training digits alone, names each sample; we count how often it names the
# digit that was asked for. It would be pleased by copies, so we also measure the distance (median, in
# $\mathbb{R}^{64}$) from samples to their nearest training image, beside that of real held-out digits, which are no
# copies. And we measure how far the two networks' samples are apart, from the same noise and from another: noise and
# field determine the sample, and two networks that never met have learnt nearly the same field.

# %%
flat = train_set.images.reshape(-1, 64)
machine = SVC(C=10.0).fit(flat, train_set.labels)


def judge(x, labels):
    x = np.asarray(x).reshape(-1, 64)
    return np.mean(machine.predict(x.clip(-1, 1)) == labels), np.median(cdist(x, flat).min(axis=1))


verdict = {"real held-out digits": judge(images, test_set.labels)}
verdict |= {f"{name} at scale {w:.0f}": judge(x[-1], labels) for name in networks for w, x in drawn[name].items()}
for who, (agreement, distance) in verdict.items():
    print(f"{who}: {agreement:.1%} agree, {distance:.2f} from the nearest training image")
ours, theirs = (drawn[name][2.0][-1].reshape(num, 64) for name in networks)
for noise, moved in (("the same", theirs), ("another", np.roll(theirs, 10, axis=0))):
    print(f"U-Net and DiT from {noise} noise: {np.median(np.linalg.norm(ours - moved, axis=1)):.2f} apart")

# %%
chosen = [np.flatnonzero(test_set.labels == digit)[row] for row in range(5) for digit in range(10)]
figure, axes = plt.subplots(1, 3, figsize=(7, 1.5))
show(axes[0], images[np.array(chosen)], 5, title="real, held out")
for ax, name in zip(axes[1:], networks, strict=True):
    show(ax, drawn[name][2.0][-1, :50], 5, title=f"{name}, scale 2")
plt.show()
agreement = [verdict[f"{name} at scale 2"][0] for name in networks]
assert SMOKE or min(agreement) > 0.9
print("the classifier agrees with the class asked for: U-Net {:.1%}, DiT {:.1%}; chance 10%".format(*agreement))

# %% [markdown]
# The network is the one part of a flow that is not a theorem, and even it has parts with a known answer: features whose
# products depend on time differences alone, blocks that begin as the identity, a loss at the start in closed form, and
# an affine bound that both networks beat. With the same size, steps and data, the U-Net's convolutions have the
# advantage on small pictures, at a little more work for each.
#
# Next: [the design space](10_design_space.ipynb)
