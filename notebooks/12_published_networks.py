# %% [markdown]
# # 12. Published networks: what is inside, and how it becomes ours
#
# Stable Diffusion 3, FLUX and DiT are velocities like any other, once four things are said: how their tokens attend to
# each other, which time and sign they speak, which latents they were trained on, and in which order their files hold
# the numbers. Each is a line of algebra. We derive these lines, confirm each by a number, and then train a small
# network of the same make that reads the words "zero" to "nine" letter by letter, and draws what it has read.
#
# Before this: [bring your own](11_bring_your_own.ipynb). It builds on adaLN [(9.7)](09_images.ipynb#eq-9-7), the loss
# [(9.1)](09_images.ipynb#eq-9-1) and classifier-free guidance [(6.4)](06_guidance.ipynb#eq-6-4).

# %%
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from lab import BLUE, INK, ORANGE, SMOKE
from sklearn.svm import SVC

from fm_jax import oracles
from fm_jax.conditions import DropCondition
from fm_jax.data.digits import load_digits
from fm_jax.data.pipeline import batches
from fm_jax.guidance import Extrapolate, FirstChannels, classifier_free, classifier_free_batched
from fm_jax.latents import SD, LatentSpace, check_latents
from fm_jax.losses import flow_matching
from fm_jax.models import Conditions, apply_rope, attend, init_params, make_mmdit, num_params, rope_angles
from fm_jax.models.attention import layer_norm
from fm_jax.models.conditioning import RECTIFIED
from fm_jax.models.dit import modulate
from fm_jax.models.mmdit import JointAttention
from fm_jax.paths import AffinePath
from fm_jax.samplers import AdamsBashforth, RungeKutta, grids, sample
from fm_jax.train import create_state, make_optimizer, make_step
from fm_jax.weights import open_model, open_tensors, rearrange, save_model

jax.config.update("jax_default_matmul_precision", "highest")  # where an accelerator would round factors to 10 bits
jax.config.update("jax_disable_most_optimizations", SMOKE)  # a few steps are over before they are well compiled
keys = iter(jax.random.split(jax.random.key(12), 60))


def normal(*shape):
    return jax.random.normal(next(keys), shape)


# %% [markdown]
# ## Attention, and what a mask is
#
# A token asks with a **query** $q_i$; every token, this one included, answers a **key** $k_j$ and offers a **value**
# $v_j$, vectors of $d$ numbers. What the token gets is a mean of the values (Vaswani et al. 2017, arXiv:1706.03762):
#
# <a id="eq-12-1"></a>
#
# $$
# o_i = \sum_j w_{ij}\, v_j, \qquad
# w_{ij} = \frac{m_j\, e^{q_i\cdot k_j/\sqrt d}}{\sum_l m_l\, e^{q_i\cdot k_l/\sqrt d}}, \qquad
# m_j\in\{0,1\} . \tag{12.1}
# $$
#
# Why $\sqrt d$: if the numbers in $q$ and $k$ are independent, of mean 0 and variance 1, $q\cdot k$ is a sum of $d$
# terms of variance 1, and $q\cdot k/\sqrt d$ has variance 1 at any width. Why a mask $m$: texts have different lengths
# and a batch has one, so that short texts are padded with tokens that should not be there. With $m_j = 0$ they are not:
# $v_j$ is multiplied by zero and $k_j$ is in no sum, so that they change no bit, and have no gradient.
# `fm_jax.models.attend` is this function, for all networks of the library.

# %%
q, k, v = normal(2, 6, 4, 16), normal(2, 5, 4, 16), normal(2, 5, 4, 16)  # [batch, tokens, heads, d]
seen = jnp.array([[True] * 5, [True] * 3 + [False] * 2])  # the second text has three words
out = attend(q, k, v, mask=seen)

scores = np.einsum("bnhd,bmhd->bhnm", np.float64(q), np.float64(k)) / 16**0.5
weights = np.where(seen[:, None, None], np.exp(scores), 0)
by_hand = np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), np.float64(v))
absent = ~seen[:, :, None, None]
changed = attend(q, jnp.where(absent, 1e3, k), jnp.where(absent, -1e6, v), mask=seen)
pull = jax.grad(lambda kv: (attend(q, *kv, mask=seen) ** 2).sum())((k, v))
moved = [float(abs(changed - out).max()), *(float(abs(jnp.where(absent, grad, 0)).max()) for grad in pull)]
print(f"variance of the scores {scores.var():.2f}; attend less (12.1): {abs(out - by_hand).max():.0e}")
print(f"what masked tokens change, and the gradients of their keys and values: {moved}")
assert abs(out - by_hand).max() < 1e-5
assert moved == [0, 0, 0]

# %% [markdown]
# ## Two streams, one attention
#
# In MM-DiT (Esser et al. 2024, arXiv:2403.03206, Stable Diffusion 3) the words are tokens too. Image and text have
# projections, modulation and MLPs of their own, and meet in one attention over the concatenation. What does that do?
# Cut the sums of (12.1) in two. Let $\mathrm{att}_A(q)$ be the attention over the image's tokens alone, $A$, and
# $\mathrm{att}_B(q)$ over the text's alone, with the denominators $Z_A(q)$ and $Z_B(q)$. Then
#
# <a id="eq-12-2"></a>
#
# $$
# \mathrm{att}_{A\cup B}(q) = \lambda\,\mathrm{att}_A(q) + (1 - \lambda)\,\mathrm{att}_B(q), \qquad
# \lambda = \frac{Z_A(q)}{Z_A(q) + Z_B(q)} . \tag{12.2}
# $$
#
# This is self-attention and cross-attention, mixed in a proportion that each query chooses for itself. A network with
# cross-attention in a layer of its own (PixArt, Movie Gen) must take from the text with total weight one whatever there
# is to read; here a patch can leave the text alone. `JointAttention` is the layer of the library; we take its kernels
# out and compute both parts.

# %%
joint, x, c = JointAttention(num_heads=4), normal(2, 6, 32), normal(2, 5, 32)
kernels = joint.init(next(keys), x, c, seen)["params"]


def project(h, name):
    return jnp.einsum("bni,ihd->bnhd", h, kernels[name]["kernel"]) + kernels[name]["bias"]


q, *image = (project(x, name) for name in ("query", "key", "value"))
text = [project(c, name) for name in ("context_key", "context_value")]
alone = attend(q, *image), attend(q, *text, mask=seen)
scores = [jnp.einsum("bnhd,bmhd->bnhm", q, part[0]) / 8**0.5 for part in (image, text)]
scores[1] = jnp.where(seen[:, None, None], scores[1], -jnp.inf)
share = jax.nn.softmax(jnp.stack([jax.nn.logsumexp(part, -1, keepdims=True) for part in scores]), 0)[0]
mixed = share * alone[0] + (1 - share) * alone[1]
by_hand = jnp.einsum("bnhd,hdo->bno", mixed, kernels["out"]["kernel"]) + kernels["out"]["bias"]
off = float(abs(joint.apply({"params": kernels}, x, c, seen)[0] - by_hand).max())
print(f"share of the image: from {share.min():.2f} to {share.max():.2f}; joint attention less (12.2): {off:.0e}")
assert off < 1e-5

# %% [markdown]
# ## Where a token is
#
# (12.1) does not know the order of its tokens. DiT and Stable Diffusion 3 add sines and cosines of the place to the
# tokens once, at the entrance; FLUX turns queries and keys in every layer instead (RoPE, Su et al. 2021,
# arXiv:2104.09864), and LightningDiT does both. Read a pair of channels as a complex number. A token at place $n$ turns
# it by the angle $n\omega$, and since the product of two pairs of reals is $\mathrm{Re}(q\,\bar k)$,
#
# <a id="eq-12-3"></a>
#
# $$
# \mathrm{Re}\big( q\,e^{\mathrm i n\omega}\ \overline{k\,e^{\mathrm i m\omega}} \big)
# = \mathrm{Re}\big( q\,\bar k\ e^{\mathrm i (n - m)\omega} \big), \qquad
# \omega_j = \theta^{-2j/d} . \tag{12.3}
# $$
#
# Scores depend on differences of places alone, for every pair with a frequency of its own. On a picture some pairs
# turn by the row and others by the column: `fm_jax.models.rope_angles` gives the angles, `fm_jax.models.apply_rope`
# turns. We move a grid of $4\times 4$ patches by 100 rows and 30 columns.

# %%
grid = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1).reshape(16, 2)
q, k = normal(1, 16, 1, 16), normal(1, 16, 1, 16)


def turned_scores(ids):
    angles = rope_angles(ids, dims=(8, 8))
    return jnp.einsum("bnhd,bmhd->nm", apply_rope(q, angles), apply_rope(k, angles))


z_q, z_k = (np.complex128(a[0, :, 0, 0::2] + 1j * a[0, :, 0, 1::2]) for a in (q, k))
omega = 10_000 ** (-np.arange(4) / 4)
difference = np.concatenate([(grid[:, None, a, None] - grid[None, :, a, None]) * omega for a in (0, 1)], -1)
closed = (z_q[:, None] * z_k.conj() * np.exp(1j * difference)).real.sum(-1)
off = [float(abs(turned_scores(ids) - closed).max()) for ids in (grid, grid + np.array([100, 30]))]
print(f"scores less the right side of (12.3): {off[0]:.0e}; of the moved grid: {off[1]:.0e}")
assert max(off) < 1e-4

# %% [markdown]
# ## Why these norms have no weights
#
# A LayerNorm usually ends with a scale $g$ and a shift $b$ of its own. Where it is modulated, as in
# [(9.7)](09_images.ipynb#eq-9-7), these would be a second way to say one thing. With $\hat h = \mathrm{LN}(h)$,
#
# <a id="eq-12-4"></a>
#
# $$
# (1 + \gamma)\odot(g\odot\hat h + b) + \beta = (1 + \gamma')\odot\hat h + \beta', \qquad
# 1 + \gamma' = (1 + \gamma)\odot g, \quad \beta' = (1 + \gamma)\odot b + \beta , \tag{12.4}
# $$
#
# and $\gamma', \beta'$ are affine in $\mathrm{silu}(e)$ if $\gamma, \beta$ are: the layer that makes them absorbs $g$
# and $b$. DiT, MM-DiT and FLUX leave them out, as `layer_norm` does unless told otherwise.

# %%
h, e, g, b = normal(2, 6, 32), normal(2, 8), normal(32), normal(32)
w = [(normal(8, 32), normal(32)) for _ in range(2)]  # of shift and scale
wide = [(w[0][0] + w[1][0] * b, w[0][1] + (1 + w[1][1]) * b), (w[1][0] * g, (1 + w[1][1]) * g - 1)]
(shift, scale), (shift_wide, scale_wide) = ([(e @ m + n)[:, None] for m, n in each] for each in (w, wide))
own = layer_norm(jnp.float32, "norm", affine=True).apply({"params": {"scale": g, "bias": b}}, h)
bare = layer_norm(jnp.float32, "norm").apply({}, h)
off = float(abs(modulate(own, shift, scale) - modulate(bare, shift_wide, scale_wide)).max())
print(f"a norm with weights, modulated, less one without, modulated by (12.4): {off:.0e}")
assert off < 1e-3

# %% [markdown]
# ## The border: their time and sign
#
# The published rectified flows go from data to noise. They write $x_\sigma = (1-\sigma)\,x_1 + \sigma\,x_0$, are told
# $1000\,\sigma$, and were trained to answer noise minus data, whose best answer is
# $f(1000\sigma, x) = \mathbb E[x_0 - x_1\mid x_\sigma = x]$. With $\sigma = 1 - t$ it is our $x_t$, so that
#
# <a id="eq-12-5"></a>
#
# $$
# v_t(x) = \mathbb E[x_1 - x_0\mid x_t = x] = -f\big(1000\,(1 - t),\ x\big) . \tag{12.5}
# $$
#
# `fm_jax.models.conditioning.RECTIFIED` has both halves, and each network crosses this border inside, once. For one
# Gaussian $x_1\sim\mathcal N(m, a^2)$ we write $f$ in their terms: $x_0 - x_1$ and $x_\sigma$ have the covariance
# $\sigma - (1-\sigma)\,a^2$, $x_\sigma$ has the variance $(1-\sigma)^2a^2 + \sigma^2$, and for Gaussians the mean of
# one given the other is linear.

# %%
m, a = 0.7, 0.5


def published(step, x):  # a network of Stable Diffusion 3's kind, for one Gaussian
    sigma = (step / 1000)[:, None]
    slope = (sigma - (1 - sigma) * a**2) / ((1 - sigma) ** 2 * a**2 + sigma**2)
    return -m + slope * (x - (1 - sigma) * m)


t, x = jax.random.uniform(next(keys), (1000,)), normal(1000, 1)
path = AffinePath()
ours = oracles.velocity(oracles.gaussian_mixture([[m]], [a]), path.schedule)
off = float(abs(RECTIFIED.output(published(RECTIFIED.time(t), x)) - ours(t, x)).max())
print(f"t = 0.25 is their {RECTIFIED.time(0.25):.0f}; their network through the border less our velocity: {off:.0e}")
assert off < 1e-4

# %% [markdown]
# ## More pixels need more noise
#
# Esser et al. (2024, section 5.3.2) ask how well a *constant* picture of $n$ pixels, all of value $c$, can be guessed
# from $x_\sigma$. The mean over the pixels, divided by $1-\sigma$, is $c$ plus noise of standard deviation
# $\frac{\sigma}{1-\sigma}\frac1{\sqrt n}$. A picture with $r$ times as many pixels is as uncertain at $\sigma'$ if
#
# <a id="eq-12-6"></a>
#
# $$
# \frac{\sigma'}{1-\sigma'} = s\,\frac{\sigma}{1-\sigma}, \quad s = \sqrt r, \qquad\text{that is}\qquad
# \sigma' = \frac{s\,\sigma}{1 + (s-1)\,\sigma} . \tag{12.6}
# $$
#
# A grid of times that was good for the small picture is so shifted towards the noise: `fm_jax.samplers.grids.shifted`.
# Odds multiply, and so do shifts: first $s$, then $s'$ is
#
# <a id="eq-12-7"></a>
#
# $$
# S_{s'}\circ S_s = S_{s's} . \tag{12.7}
# $$
#
# That explains a riddle of the published grid of Stable Diffusion 3. It has $s = 3$ and should come down to
# $\sigma = 0.001$, shifted: $S_3(0.001) = 0.002994$. But the code shifts the ends of its grid before the whole, and the
# last step begins at $S_9(0.001) = 9\cdot0.001/(1 + 8\cdot0.001) = 0.008929$. That is the grid it was published with:
# `fm_jax.samplers.grids.stable_diffusion_3`.


# %%
def shift_by(s, sigma):
    return s * sigma / (1 + (s - 1) * sigma)


def guess(side, sigma):  # standard deviation of the guess, over 4000 pictures
    return float(np.std((0.5 * (1 - sigma) + sigma * normal(4000, side**2)).mean(1) / (1 - sigma)))


sigma = np.linspace(0.1, 0.9, 5)
plan = (8, sigma), (16, sigma), (16, shift_by(2, sigma))
small, large, shifted = ([guess(side, level) for level in levels] for side, levels in plan)
off = abs(1 - grids.shifted(10, 2.0) - shift_by(2, np.linspace(1, 0, 11))).max()
last, closed = 1 - float(grids.stable_diffusion_3(28)[-2]), shift_by(3, shift_by(3, 0.001))
print(f"grids.shifted less (12.6): {off:.0e}; same guess, 16x16 over 8x8:", *np.round(np.divide(shifted, small), 2))
print(f"last noise of Stable Diffusion 3: {last:.6f}, shifted twice {closed:.6f}, by 9 {shift_by(9, 0.001):.6f}")
assert max(off, abs(last - closed), abs(closed - shift_by(9, 0.001))) < 1e-6
assert np.allclose(shifted, small, rtol=0.08)  # 4000 draws: 1.6% for the ratio

figure, ax = plt.subplots(figsize=(7, 2.4))
for side, measured, color, marker in ((8, small, BLUE, "o"), (16, large, ORANGE, "s")):
    fine = np.linspace(0.05, 0.93, 99)
    ax.semilogy(fine, fine / (1 - fine) / side, color=color, ls="-")
    ax.semilogy(sigma, measured, marker, color=color, label=f"{side}x{side} pixels")
ax.semilogy(sigma, shifted, "x", color=INK, ms=9, label=r"16x16, at $\sigma'$ of (12.6)")
ax.set(title="how uncertain a constant picture is", xlabel=r"noise $\sigma$", ylabel="standard deviation")
ax.legend()
plt.show()

# %% [markdown]
# ## Latents of unit variance
#
# The data of these networks are codes of an autoencoder, and its codes have any mean and size they like. Let them be
# $\kappa$ times too large. Then
#
# <a id="eq-12-8"></a>
#
# $$
# t\,\kappa x_1 + (1-t)\,x_0 = \big(t\kappa + 1 - t\big)\,\big[\, t' x_1 + (1-t')\,x_0 \,\big], \qquad
# \frac{1-t'}{t'} = \frac1\kappa\,\frac{1-t}{t} : \tag{12.8}
# $$
#
# a constant that is wrong by $\kappa$ is a shift [(12.6)](#eq-12-6) by $1/\kappa$ that nobody asked for, and the state
# has the wrong size. The codes of Stable Diffusion 1 are $1/0.18215 = 5.5$ times too large: who forgets that shifts by
# 0.18, away from the noise. `fm_jax.latents.LatentSpace` has mean and scale, for each system by name, and
# `fm_jax.latents.check_latents` refuses to train on codes of another size.

# %%
codes = 0.3 + 5.5 * normal(64, 8, 8, 4)  # as an encoder might give them
x1, x0, kappa, t = normal(1000), normal(1000), 1 / SD.scale, np.linspace(0.05, 0.95, 19)[:, None]
t_new = 1 - shift_by(1 / kappa, 1 - t)
off = float(abs(t * kappa * x1 + (1 - t) * x0 - (t * kappa + 1 - t) * (t_new * x1 + (1 - t_new) * x0)).max())
space = LatentSpace(shift=float(codes.mean()), scale=float(1 / codes.std()))
back = float(abs(space.to_latent(space.to_model(codes)) - codes).max())
print(f"(12.8): {off:.0e}; deviation for the model {check_latents(space.to_model(codes)):.3f}; and back: {back:.0e}")
assert max(off, back) < 1e-5
try:
    check_latents(codes)
except ValueError as refusal:
    print("refused:", str(refusal).partition(":")[0])

# %% [markdown]
# ## Guidance of three channels
#
# DiT's latents have four channels, and the FIDs that made it famous guide the first three. There is no theory behind
# it: the line came from a model of RGB pictures, and the authors kept it so that their numbers can be reproduced. SiT
# and LightningDiT, whose latents have 32, inherited it. What do their scales mean? Take two Gaussians
# $\mathcal N(m_y, a^2 I)$ with class and $\mathcal N(m, a^2 I)$ without. Their velocities are
# $m + \frac{t a^2 - (1-t)}{t^2a^2 + (1-t)^2}(x - t\,m)$: linear in $m$, with equal slopes, and each channel by itself.
# Hence CFG at scale $w$ is the velocity of a Gaussian whose mean is $m + w\,(m_y - m)$ in the channels that are guided,
# and $m_y$ in the others. If $K$ of $C$ are, and $m_y - m$ is as long in each, the part of the mean along $m_y - m$ is
#
# <a id="eq-12-9"></a>
#
# $$
# \frac{(\text{mean} - m)\cdot(m_y - m)}{|m_y - m|^2} = \frac{K w + C - K}{C} = 1 + \frac KC\,(w - 1) . \tag{12.9}
# $$
#
# Three of four channels at scale 1.5 are all four at 1.375, which is what Peebles & Xie (2022, arXiv:2212.09748,
# appendix A) found with FIDs: $1 + x$ on three does as $1 + \frac34x$ on four. LightningDiT's 6.7 on three of 32 is
# 1.53. `fm_jax.guidance.FirstChannels` is the rule; without it these scales mean nothing.

# %%
middle, of_class = np.zeros(4), np.array([1.0, -1.0, 1.0, 1.0])
cond, uncond = (oracles.velocity(oracles.gaussian_mixture(m[None], [0.5]), path.schedule) for m in (of_class, middle))
noise = normal(2000, 4)
noise -= noise.mean(0)
means = []
for w, rule in ((1.5, FirstChannels(3)), (1.375, Extrapolate())):
    v = classifier_free(cond, uncond, w, rule=rule)
    means.append(np.float64(sample(v, noise, RungeKutta("heun"), times=100).x).mean(axis=0))
    print(f"scale {w}, {rule}: mean {means[-1].round(3)}, along m_y - m: {means[-1] @ of_class / 4:.4f}")
assert all(abs(mean @ of_class / 4 - 1.375) < 1e-3 for mean in means)

# %% [markdown]
# ## Weights: the same numbers in another order
#
# A file of PyTorch holds the projection to $H$ heads of $d$ channels as a matrix of $Hd$ rows; ours has an axis for
# the heads, so that devices can share them. Both hold the same numbers:
#
# <a id="eq-12-10"></a>
#
# $$
# W_{i,h,j} = W^{\text{file}}_{h d + j,\ i}\ , \qquad i < D,\ \ h < H,\ \ j < d . \tag{12.10}
# $$
#
# `fm_jax.weights.rearrange` says it as `"(h d) i -> i h d"`, and read backwards it is the export. All rules are such
# permutations, and together they tile every array on both sides; so nothing is lost, and what is saved and opened again
# is the same to the bit. A wrong order, `"(d h) i"`, is a permutation too and fits all shapes, but another network.

# %%
matrix, x = normal(32, 8), normal(5, 8)  # 4 heads of 8 channels
right, wrong = (rearrange(matrix, f"{rows} i -> i h d", h=4) for rows in ("(h d)", "(d h)"))
theirs = (x @ matrix.T).reshape(5, 4, 8)
gaps = (jnp.einsum("ni,ihd->nhd", x, each) - theirs for each in (right, wrong))
off = [float(jnp.linalg.norm(gap) / jnp.linalg.norm(theirs)) for gap in gaps]
same = bool((rearrange(right, "i h d -> (h d) i") == matrix).all())
print(f"relative error of (12.10): {off[0]}, of the wrong order {off[1]:.0%}; back to the bit: {same}")
assert off[0] < 1e-5 < off[1]
assert same

# %% [markdown]
# Now a whole network, the one that we shall train: an MM-DiT of three blocks for pictures of $8\times8$ pixels. Its
# text is a word in letters, and each letter a token: which letter it is and at which place it stands, 26 + 5 zeros but
# for two ones. Short words are padded and masked. The empty word stands for "no text": all of its tokens are masked,
# and by (12.1) the picture is then alone. `fm_jax.models.Conditions` carries tokens and mask; the `vector`, which in
# Stable Diffusion 3 has a summary of the text, stays zero here, so that all the network gets to know, it has read.

# %%
words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", ""]
tokens, there = np.zeros((11, 5, 31), np.float32), np.zeros((11, 5), bool)
for row, word in enumerate(words):
    for place, letter in enumerate(word):
        tokens[row, place, [ord(letter) - ord("a"), 26 + place]] = there[row, place] = 1
texts = Conditions(vector=jnp.zeros((11, 1)), tokens=jnp.asarray(tokens), mask=jnp.asarray(there))

size = dict(hidden=64, num_layers=2 if SMOKE else 3, num_heads=4, qk_norm=True, table_size=4, table_base=4)
network = make_mmdit("tiny", channels=1, token_dim=31, vector_dim=1, **size)
fresh = init_params(network, jax.random.key(0), (8, 8, 1), jax.tree.map(lambda leaf: leaf[:1], texts))
awake = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(1.0, p.size + 1)).reshape(p.shape), fresh)

with tempfile.TemporaryDirectory() as folder:
    save_model(folder, network, awake)
    opened, params = open_model(folder)
    tensors, config = dict(open_tensors(folder)), json.loads((Path(folder) / "config.json").read_text())
equal = jax.tree.map(lambda one, other: bool((np.asarray(one) == np.asarray(other)).all()), params, awake)
print(f"{config['_class_name']}: {len(tensors)} tensors, {num_params(awake):,} parameters; in the first block")
for key in ("attn.to_q.weight", "attn.add_k_proj.weight", "norm1.linear.weight", "ff_context.net.2.weight"):
    print(f"  transformer_blocks.0.{key}", list(tensors[f"transformer_blocks.0.{key}"].shape))
ours, theirs = awake["modulation"]["kernel"], tensors["norm_out.linear.weight"].T
swapped = np.array_equal(theirs, np.concatenate([ours[:, 64:], ours[:, :64]], axis=1))
print("opened again, equal to the bit:", all(jax.tree.leaves(equal)), "| scale before shift in norm_out:", swapped)
assert all(jax.tree.leaves(equal))
assert swapped
assert opened.runs == network.runs

# %% [markdown]
# The folder is one that diffusers opens. (The last line is a trap of that layout: it keeps the final scale before the
# final shift, where we, and Stability's own files, have them the other way round. Every shape fits either way.)
#
# ## Reading letters, drawing digits
#
# The loss is [(9.1)](09_images.ipynb#eq-9-1) with the word as condition, and with probability 0.1 the word is lost.
# Where a published system would ask an encoder for the tokens, a table will do.

# %%
train_set, num_steps, batch_size = load_digits("train"), 4 if SMOKE else 500, 16 if SMOKE else 64


def apply_fn(params, t, x, label, *, train, rngs):
    return network.apply({"params": params}, t, x, jax.tree.map(lambda leaf: leaf[label], texts), train=train)


optimizer = make_optimizer(4e-3, total_steps=num_steps, decay="cosine")
loss = flow_matching(apply_fn, path, drop=DropCondition(0.1, null_cond=10))
step = jax.jit(make_step(loss, optimizer, axis_name=None), donate_argnums=0)
state, data = create_state(fresh, optimizer, (0.99,)), batches(train_set, batch_size=batch_size, seed=0)
key_train = next(keys)
for _ in range(num_steps):
    state, metrics = step(state, key_train, next(data))
print(f"loss after {num_steps} steps: {metrics['loss']:.2f}")

# %% [markdown]
# We ask for each word in turn at guidance 2, in one call of both branches (`fm_jax.guidance.classifier_free_batched`),
# and let the judge of [notebook 9](09_images.ipynb) decide: a support vector machine that saw real digits only.

# %%
num = 50 if SMOKE else 400
labels, x0 = jnp.arange(num) % 10, normal(num, 8, 8, 1)


@jax.jit
def draw(params):
    model_fn = jax.tree_util.Partial(apply_fn, params, train=False, rngs=None)
    v = classifier_free_batched(model_fn, "velocity", path.schedule, labels, 10, 2.0)
    return sample(v, x0, AdamsBashforth(2), times=20).x


drawn = np.asarray(draw(state.ema["0.99"]))
machine = SVC(C=10.0).fit(train_set.images.reshape(-1, 64), train_set.labels)
agreement = np.mean(machine.predict(drawn.reshape(-1, 64).clip(-1, 1)) == labels)

sheet = np.pad(drawn[:50, ..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=-1).reshape(5, 10, 10, 10)
figure, ax = plt.subplots(figsize=(7, 3.7))
ax.imshow(sheet.transpose(0, 2, 1, 3).reshape(50, 100), cmap="gray_r", vmin=-1, vmax=1)
ax.set(title="what the network drew, by the word that it read", yticks=[])
ax.set_xticks(np.arange(10) * 10 + 4.5, words[:10])
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()
assert SMOKE or agreement > 0.9
print(f"the classifier agrees with the word that was read: {agreement:.1%}; chance 10%")

# %% [markdown]
# Nothing in a published network was beyond a line of algebra: a mask is a factor of zero, two streams are one sum cut
# in two, a place is an angle, a border is a sign and $1 - t$, a resolution or a forgotten constant multiplies the odds
# of noise, three guided channels are a smaller scale, and a file is a permutation. What is left are the numbers in it,
# and those are open to the bit.
#
# The networks, their sizes and licences: [docs/networks](../docs/networks/README.md). Next:
# [conditions](13_conditions.ipynb).
