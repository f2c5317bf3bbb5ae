# %% [markdown]
# # 13. Conditions: what they are aligned with
#
# A label, a caption, a picture with a hole: all are "conditions", and a network takes each by another door. What tells
# the doors apart is not the modality but what a condition is *aligned with*: with nothing (one vector for the whole
# state), with the places of the state, with a set of its own, or with nothing that the network sees, because it enters
# when we sample. For each kind there is a world in which the exact conditional velocity has a closed form. There we
# find what a condition is worth, to the digit; and that with a set of tokens the exact velocity *is* a cross-attention,
# which a small network then learns.
#
# Before this: [published networks](12_published_networks.ipynb). It builds on classifier guidance
# [(6.2)](06_guidance.ipynb#eq-6-2), on CFG [(6.4)](06_guidance.ipynb#eq-6-4) and on attention
# [(12.1)](12_published_networks.ipynb#eq-12-1).

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from lab import BLUE, ORANGE, SMOKE

from fm_jax.conditions import DropConditions, without
from fm_jax.guidance import classifier, compose
from fm_jax.guidance.classifier_free import nested
from fm_jax.losses import flow_matching
from fm_jax.models import Conditions, attend, linen_apply
from fm_jax.oracles import field as fields
from fm_jax.oracles import observation
from fm_jax.oracles.token_set import attention_of, sample_points, token_mixture, token_velocity
from fm_jax.paths import AffinePath
from fm_jax.samplers import RungeKutta, sample
from fm_jax.times import Stratified
from fm_jax.train import create_state, make_optimizer, make_step

keys = iter(jax.random.split(jax.random.key(13), 60))
path, linear = AffinePath(), AffinePath().schedule


def normal(*shape):
    return jax.random.normal(next(keys), shape)


def distance(one, other):  # relative
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


# %% [markdown]
# ## What a condition is worth
#
# Let the loss see a condition $y$ beside $x_t$. By [(5.3)](05_losses.ipynb#eq-5-3) the best answer is the mean of $u_t$
# given both, $v_t(x\mid y)$, and what is left is the variance of $u_t$ about it. The mean of $v_t(x_t\mid y)$ given
# $x_t$ is $v_t(x_t)$; so by Pythagoras the two least losses, without and with $y$, differ by
#
# <a id="eq-13-1"></a>
#
# $$
# \mathbb E\,\big|u_t - v_t(x_t)\big|^2 - \mathbb E\,\big|u_t - v_t(x_t\mid y)\big|^2
# = \mathbb E\,\big|v_t(x_t\mid y) - v_t(x_t)\big|^2 : \tag{13.1}
# $$
#
# a condition is worth the mean square of the very difference that CFG multiplies.
#
# For numbers we need a world. Let $x_1\sim\mathcal N(0, K)$ be a stationary Gaussian field, pictures of
# $9\times 9$ places and three channels, and $y = A x_1 + \tau z$ with $z$ normal and any linear $A$: the mean colour
# of the picture, a low resolution, grey, the picture with a hole. Gaussians condition by linear algebra (Kalman 1960):
#
# <a id="eq-13-2"></a>
#
# $$
# x_1\mid y\ \sim\ \mathcal N(G y,\ S), \qquad G = K A^\top\big(A K A^\top + \tau^2\big)^{-1}, \qquad S = K - G A K .
# \tag{13.2}
# $$
#
# Only the mean depends on $y$. In the direction of an eigenvector of $S$ with eigenvalue $\lambda$, $u_t$ and $x_t$ are
# two Gaussian numbers, and $u_t$ given $x_t$ has the variance $\lambda/(t^2\lambda + (1-t)^2)$ on straight lines. Put
# $s = t/(1-t)$; then $\int_0^1\!\frac{\lambda\,\mathrm dt}{t^2\lambda + (1-t)^2} =
# \int_0^\infty\!\frac{\lambda\,\mathrm ds}{s^2\lambda + 1}$, and the least loss over uniform times, a mean over the $d$
# numbers of $x$, is
#
# <a id="eq-13-3"></a>
#
# $$
# \min L = \frac{\pi}{2d}\,\mathrm{tr}\,\sqrt S , \tag{13.3}
# $$
#
# with $K$ for $S$ where nothing is told. `fm_jax.oracles` has all of it. We confirm it by the library's own loss
# of the exact velocity, and (13.1) by the mean square of the differences.

# %%
grid, colours = (9, 9), [[1.0, 0.75, 0.5], [0.75, 1.0, 0.75], [0.5, 0.75, 1.0]]
field, known = fields.stationary_field(fields.power_law_spectrum(grid, 4.0), colours), np.ones(grid, bool)
known[2:7, 3:7] = False
operators = {"mean colour": observation.block_means(grid, 9, 3), "low resolution": observation.block_means(grid, 3, 3)}
operators |= {"grey": observation.channel_means(grid, 3), "hole": observation.known_values(known, 3)}
laws = {name: fields.field_posterior(field, operator, noise=0.05) for name, operator in operators.items()}
x1 = fields.sample_field(field, next(keys), 1000)
told = {name: fields.observe(law, next(keys), x1) for name, law in laws.items()}
free = fields.field_velocity(field, linear)


@jax.jit
def measured(law, y, key):
    exact = fields.field_velocity(law, linear)
    loss = flow_matching(lambda params, t, x, y, **_: exact(t, x, y), path, time_sampler=Stratified())
    t = Stratified()(key, len(x1))
    x = path.sample(None, t, jax.random.normal(key, x1.shape), x1).x_t
    return loss(None, key, {"x1": x1, "cond": y})[0], jnp.square(exact(t, x, y) - free(t, x)).mean()


nothing = np.pi / 2 * np.sqrt(field.eigenvalues).mean()
print(f"least loss without a condition: {nothing:.4f}")
for name, law in laws.items():
    floor = np.pi / 2 * np.sqrt(law.eigenvalues).mean()
    loss, worth = measured(law, told[name], next(keys))
    print(
        f"{name:>14}: (13.3) {floor:.4f}, measured {loss:.4f}; worth (13.1) {nothing - floor:.4f}, measured {worth:.4f}"
    )
    assert abs(fields.loss_floor(law, linear, Stratified()(next(keys), 4096)).mean() - floor) < 1e-3
    assert abs(loss - floor) < 0.02
    assert abs(worth - nothing + floor) < 0.02

# %% [markdown]
# The mean colour is three numbers of 243 and worth little by this measure, though nothing changes the look of a picture
# more: a loss counts numbers. A picture with a hole is worth most, as most of its numbers are told; grey says something
# of every place, and of no place all.
#
# ## What a condition moves with
#
# Why do the four enter a network differently? Shift the picture by $T$ on its (periodic) grid. The law of the field
# does not change, hence exactly
#
# <a id="eq-13-4"></a>
#
# $$
# \text{global:}\quad v(Tx\mid y) = T\,v(x\mid y), \qquad
# \text{local:}\quad v(Tx\mid Ty) = T\,v(x\mid y), \qquad
# \text{a set:}\quad v(x\mid \pi y) = v(x\mid y) \tag{13.4}
# $$
#
# with any permutation $\pi$. That is the alignment. A *global* condition is what the symmetry of $x$ leaves alone: one
# vector, the same at all places, so it is added to the embedding of time. A *local* one moves with $x$: it has $x$'s
# grid and goes beside it into the convolution, as channels or as features. A *set* has a symmetry of its own, which $x$
# does not feel: only a function that does not know its order will do.

# %%
x, shift = normal(1000, *grid, 3), lambda a: jnp.roll(a, (2, 4), (1, 2))
for name, moves in (("mean colour", lambda y: y), ("grey", shift)):
    v = jax.jit(fields.field_velocity(laws[name], linear))
    off, moved = (
        distance(v(0.6, shift(x), f(told[name])), shift(v(0.6, x, told[name]))) for f in (moves, lambda y: -y)
    )
    print(f"{name}: error of (13.4) {off:.0e}; under another condition {moved:.2f}")
    assert off < 1e-4 < moved

# %% [markdown]
# ## A constraint needs no network
#
# Say that only an unconditional velocity is at hand. Bayes' rule [(6.2)](06_guidance.ipynb#eq-6-2) adds what $y$ says,
# and for a Gaussian that is known. With $D_t(x) = \mathbb E[x_1\mid x_t = x]$ and $\Sigma_t$ the covariance of $x_1$
# given $x_t$,
#
# <a id="eq-13-5"></a>
#
# $$
# v_t(x\mid y) = v_t(x) + b_t\,\nabla_x\log p_t(y\mid x), \qquad
# p_t(y\mid x) = \mathcal N\big(y;\ A D_t(x),\ A\Sigma_t A^\top + \tau^2\big) . \tag{13.5}
# $$
#
# Methods for inverse problems approximate $\Sigma_t$, as one does not know it for pictures; here it is exact, and so is
# the guided velocity. A cruder way is to overwrite, at all times, what is known: the known places then go straight
# from noise to $y$, and the others follow the unconditional velocity. It obeys the constraint, and the law is another
# one: early on, the other places see a noisy picture of $y$ where the exact velocity sees $y$. For this linear flow,
# where it carries 0 and the unit vectors says it all.


# %%
def log_likelihood(t, x):
    """log p(y | x) of (13.5), for the low resolution of the first pictures."""
    a, y = operators["low resolution"].reshape(27, 243), told["low resolution"][: len(x)].reshape(-1, 27)
    rows = a @ field.eigenvectors.reshape(243, 243)
    rest = field.eigenvalues / (1 + (t[:, None] / (1 - t[:, None])) ** 2 * field.eigenvalues)
    cov = jnp.einsum("id,bd,jd->bij", rows, rest, rows) + 0.05**2 * jnp.eye(27)
    mean = fields.field_prediction(field, linear, t, x).data.reshape(-1, 243) @ a.T
    return jax.vmap(jax.scipy.stats.multivariate_normal.logpdf)(y, mean, cov)


low, t = told["low resolution"][:8], jnp.linspace(0.1, 0.9, 8)
guided = jax.jit(classifier(free, log_likelihood, 1.0, linear))
off = distance(guided(t, x[:8]), fields.field_velocity(laws["low resolution"], linear)(t, x[:8], low))
print(f"the unconditional velocity, guided by (13.5), less the conditional one: {off:.0e}")
assert off < 1e-3

unit = jnp.eye(243).reshape(243, *grid, 3)
mask, told_hole = jnp.asarray(known)[..., None], jnp.zeros((243, *grid, 3))
exact, s = fields.field_velocity(laws["hole"], linear), fields.field_covariance(laws["hole"]).reshape(243, 243)
ways = {"exact": lambda t, x: exact(t, x, told_hole), "overwritten": lambda t, x: jnp.where(mask, -unit, free(t, x))}
for name, v in ways.items():
    ends = jax.jit(lambda x0, v=v: sample(v, x0, RungeKutta("midpoint"), times=24).x)(unit).reshape(243, 243)
    hidden = np.repeat(~known.ravel(), 3)
    ratio = float(jnp.trace((ends.T @ ends)[hidden][:, hidden]) / jnp.trace(s[hidden][:, hidden]))
    print(f"{name}: variance in the hole, over that of (13.2): {ratio:.2f}")
    assert (abs(ratio - 1) < 0.02) == (name == "exact")

# %% [markdown]
# ## The set: attention is exact
#
# The third kind. An example is told $m$ tokens $c_k$, vectors in any order, and its points $x_1$ are drawn around them:
# with equal chances, $x_1\sim\mathcal N(c_k, s^2 I)$. Given $x_t$, the chance $r_k$ that a point belongs to token $k$
# is Bayes' rule for the Gaussians $\mathcal N(t\,c_k, S_t)$ with $S_t = t^2s^2 + (1-t)^2$. The square of $x$ is common
# to all of them and drops out:
#
# <a id="eq-13-6"></a>
#
# $$
# r_k = \operatorname{softmax}_k\Big(-\frac{|x - t\,c_k|^2}{2S_t}\Big)
# = \operatorname{softmax}_k\Big(\frac{t}{S_t}\,x\cdot c_k - \frac{t^2}{2S_t}|c_k|^2\Big) , \tag{13.6}
# $$
#
# and the velocity, a mean over the tokens of what each would say, needs of them only $\sum_k r_k c_k$:
#
# <a id="eq-13-7"></a>
#
# $$
# v_t(x\mid c) = a_t\,x + (1 - t\,a_t)\sum_k r_k\,c_k , \qquad a_t = \frac{t s^2 - (1-t)}{S_t} . \tag{13.7}
# $$
#
# That is [(12.1)](12_published_networks.ipynb#eq-12-1), word for word. The point asks, the tokens are keys and values,
# the mask takes out those that are not there, and a skip connection with weights of $t$ does the rest. The scale of the
# products is $t/S_t$: attention is flat in noise and sharpens as it falls. The only term that attention lacks,
# $|c_k|^2$, is the same for all keys of one length, which is what norms of keys are for.

# %%
std = 0.3
words = jnp.array([[[-1.2, -0.6], [1.3, -0.7], [0.1, 1.2], [5.0, 5.0]]])  # the fourth is masked
there = jnp.array([[True, True, True, False]])
x, t = 1.5 * normal(1, 500, 2), 0.6
spread = t**2 * std**2 + (1 - t) ** 2
bias = -(t**2) * jnp.square(words).sum(-1)[:, None, None] / (2 * spread)
looked_up = attend(x[:, :, None], words[:, :, None], words[:, :, None], mask=there, bias=bias, scale=t / spread)[
    :, :, 0
]
slope = (t * std**2 - (1 - t)) / spread
v = token_velocity(std, linear)
off = float(abs(slope * x + (1 - t * slope) * looked_up - v(t, x, Conditions(tokens=words, mask=there))).max())
print(f"skip connection and attend less the exact velocity, (13.7): {off:.0e}")
assert off < 1e-5

# %% [markdown]
# One picture a kind: above what is told, below a draw of its exact velocity. Of the hole also $G y$, and below it the
# square root of the diagonal of $S$, darker where less is known.

# %%
figure, axes = plt.subplots(2, 6, figsize=(7, 2.7))
x0, picture = normal(1, *grid, 3), lambda a: np.clip(0.5 + 0.2 * np.asarray(a).repeat(3 // a.shape[-1], -1), 0, 1)
for column, name in zip(axes.T, ("mean colour", "grey", "hole"), strict=False):
    exact = fields.field_velocity(laws[name], linear)
    drawn = jax.jit(lambda x0, y, v=exact: sample(lambda t, x: v(t, x, y), x0, times=20).x)(x0, told[name][:1])
    for ax, each in zip(column, (told[name][0], drawn[0]), strict=True):
        ax.imshow(picture(each))
axes[0, 3].imshow(picture(low[0]))
axes[1, 3].imshow(picture(jax.jit(lambda x0: sample(guided, x0, times=np.linspace(0, 0.99, 21)).x)(x0)[0]))
deviation = jnp.sqrt(jnp.diag(s)).reshape(*grid, 3).mean(-1)
axes[0, 4].imshow(picture(fields.posterior_mean(laws["hole"], told["hole"][:1])[0]))
axes[1, 4].imshow(deviation, cmap="Blues")
points = sample(lambda t, x: v(t, x, Conditions(tokens=words, mask=there)), normal(1, 200, 2), times=20).x[0]
axes[0, 5].plot(*words[0, :3].T, "X", color=ORANGE, ms=7)
axes[1, 5].plot(*points.T, ".", color=BLUE, ms=2)
titles = "global:\nmean colour", "local:\ngrey", "local:\na hole", "constraint:\nlow resolution", "the hole:\nmean, std"
for ax, title in zip(axes[0], (*titles, "a set:\ntokens"), strict=True):
    ax.set_title(title, fontsize=8)
for ax in axes.flat:
    ax.set(xticks=(), yticks=(), aspect="equal")
for ax in axes[:, 5]:
    ax.set(xlim=(-2.3, 2.3), ylim=(-2, 2.3))
plt.show()

# %% [markdown]
# ## Several conditions, and fewer
#
# A network that was told two things may be asked with one of them, if it has learned to do without the other: in the
# loss, `fm_jax.conditions.DropConditions` drops each *group* of parts by itself, so that all subsets come up. What can
# one do with the $v$ of every subset? Let $v_i$ be the velocity under the first $i$ conditions. The sum
#
# <a id="eq-13-8"></a>
#
# $$
# v_0 + \sum_{i=1}^n w_i\,(v_i - v_{i-1}) \tag{13.8}
# $$
#
# (Brooks et al. 2023, arXiv:2211.09800, for an image and a text) is exact at $w_i = 1$, whatever the conditions are: it
# telescopes to $v_n$. It is `fm_jax.guidance.nested`, and $w_i$ asks for what condition $i$ adds to those before it.
# `fm_jax.guidance.compose` adds each condition to nothing, $v_0 + \sum_i w_i\,(v_{\{i\}} - v_0)$, and needs no network
# that ever saw two at once (Liu et al. 2022, arXiv:2206.01714). By [(6.2)](06_guidance.ipynb#eq-6-2) that is exact at
# $w_i = 1$ if $p_t(y_1, y_2\mid x) = p_t(y_1\mid x)\,p_t(y_2\mid x)$. At $t = 1$ it is so, as each $y$ is made of $x_1$
# alone; in noise it is not, and what both conditions know is counted twice. We take grey and the hole, and for the
# network the exact velocities of all four subsets.

# %%
both = fields.field_posterior(field, np.concatenate([operators["grey"], operators["hole"]], axis=2), noise=0.05)
subsets = {(1, 0): laws["grey"], (0, 1): laws["hole"], (1, 1): both}


def network(t, x, cond):
    y, v = (cond["grey"], cond["hole"]), free(t, x)
    for (grey, hole), law in subsets.items():
        seen = jnp.concatenate([each for each, there in zip(y, (grey, hole), strict=True) if there], axis=-1)
        this = (cond["has_grey"] == grey) & (cond["has_hole"] == hole)
        v = jnp.where(this[:, None, None, None], fields.field_velocity(law, linear)(t, x, seen), v)
    return v


yes = jnp.ones(1000, bool)
cond = {"grey": told["grey"], "hole": told["hole"], "has_grey": yes, "has_hole": yes}
null = {"grey": 0, "hole": 0, "has_grey": False, "has_hole": False}
kept = DropConditions({("grey", "has_grey"): 0.2, ("hole", "has_hole"): 0.3}, null)(next(keys), cond)
shares = {(a, b): float(((kept["has_grey"] == a) & (kept["has_hole"] == b)).mean()) for a in (0, 1) for b in (0, 1)}
print("told (grey, hole), in 1000:", {each: round(share, 3) for each, share in shares.items()}, "of .06 .14 .24 .56")
assert abs(shares[0, 0] - 0.06) < 0.02

cond = jax.tree.map(lambda leaf: leaf[:64], cond)
alone = {name: without(cond, null, (other, f"has_{other}")) for name, other in (("grey", "hole"), ("hole", "grey"))}
telescope = nested(network, "velocity", linear, [alone["grey"], cond], null, [1.5, 2.0])
of_sum = compose(network, "velocity", linear, [alone["grey"], alone["hole"]], null, [1.0, 1.0])
for t in (0.05, 0.5, 0.95):
    xt = path.sample(None, t, normal(64, *grid, 3), x1[:64]).x_t
    v_0, v_1, v_2 = free(t, xt), network(t, xt, alone["grey"]), network(t, xt, cond)
    off = distance(telescope(t, xt), v_0 + 1.5 * (v_1 - v_0) + 2 * (v_2 - v_1)), distance(of_sum(t, xt), v_2)
    print(f"t = {t:.2f}: nested less (13.8) {off[0]:.0e}; the sum of single conditions, less the exact: {off[1]:.2f}")
    assert off[0] < 1e-4 < off[1]

# %% [markdown]
# ## Does a network find the attention?
#
# Nobody tells a network (13.6). We give it what it needs, one attention whose queries are made of $x$ and $t$ and whose
# keys are made of the tokens by a small MLP, and as much of $t$ as it likes in the skip connection. It is trained on
# sets of two to four random tokens. The values are linear in the tokens, so that the mean token $\sum_k r_k c_k$ of
# three tokens in the plane determines the weights: if the velocity is learned, the attention must be the exact one.


# %%
class Reader(nn.Module):
    @nn.compact
    def __call__(self, t, x, cond, *, train=False):
        emb = nn.silu(nn.Dense(64)(nn.silu(nn.Dense(64)(t[:, None]))))[:, None]
        q = nn.Dense(16)(x) * nn.Dense(16)(emb) + nn.Dense(16)(emb)
        k = nn.Dense(16)(nn.silu(nn.Dense(64)(cond.tokens)))
        value = nn.Dense(16, use_bias=False)(cond.tokens)
        q, k, value = q[:, :, None], k[:, :, None], value[:, :, None]  # one head
        one_hot = jnp.broadcast_to(jnp.eye(k.shape[1], 16)[:, None], k.shape)
        self.sow("intermediates", "attention", attend(q, k, one_hot, mask=cond.mask)[:, :, 0, : k.shape[1]])
        out = attend(q, k, value, mask=cond.mask)[:, :, 0] * nn.Dense(16)(emb)
        return nn.Dense(1)(emb) * x + nn.Dense(2, use_bias=False)(out)


def examples(key, num):
    key_tokens, key_number, key_points = jax.random.split(key, 3)
    tokens = 1.2 * jax.random.normal(key_tokens, (num, 4, 2))
    mask = jnp.arange(4)[None] < jax.random.randint(key_number, (num, 1), 2, 5)
    x1 = sample_points(token_mixture(tokens, std, mask), key_points, 16)
    return {"x1": x1, "cond": Conditions(tokens=tokens, mask=mask)}


reader, num_steps = Reader(), 4 if SMOKE else 1500
example, optimizer = examples(next(keys), 64), make_optimizer(5e-3, total_steps=num_steps, decay="cosine")
params = reader.init(next(keys), jnp.zeros(64), example["x1"], example["cond"])["params"]
step = make_step(flow_matching(linen_apply(reader), path, time_sampler=Stratified()), optimizer, axis_name=None)
state, _ = jax.jit(lambda state, steps: jax.lax.scan(lambda s, key: step(s, key, examples(key, 64)), state, steps))(
    create_state(params, optimizer, (0.99,)), jax.random.split(next(keys), num_steps)
)


@jax.jit
def attentions(t, x, cond):
    _, kept = reader.apply({"params": state.ema["0.99"]}, t, x, cond, mutable="intermediates")
    exact = attention_of(token_mixture(cond.tokens, std, cond.mask), linear, t, x)
    return exact, kept["intermediates"]["attention"][0]


test = examples(next(keys), 500)
t = Stratified()(next(keys), 500)
xt = path.sample(None, t, normal(500, 16, 2), test["x1"]).x_t
right, learned = attentions(t, xt, test["cond"])
flat = test["cond"].mask[:, None] / test["cond"].mask.sum(1)[:, None, None]
off, chance = (float(abs(each - right).sum(-1).mean() / 2) for each in (learned, flat))

ticks = np.linspace(-2.2, 2.2, 45)
plane = jnp.asarray(np.stack(np.meshgrid(ticks, ticks), -1).reshape(1, -1, 2), jnp.float32)
paint = np.array([[0, 0.45, 0.7], [0.9, 0.62, 0], [0, 0.62, 0.45], [1, 1, 1]])
figure, axes = plt.subplots(2, 4, figsize=(7, 3.7))
for time, column in zip((0.1, 0.4, 0.7, 0.95), axes.T, strict=True):
    maps = attentions(jnp.full(1, time), plane, Conditions(tokens=words, mask=there))
    for ax, weights in zip(column, maps, strict=True):
        shown = (np.asarray(weights)[0] @ paint).reshape(45, 45, 3).clip(0, 1)
        ax.imshow(shown, origin="lower", extent=(-2.2, 2.2, -2.2, 2.2))
        ax.scatter(*(time * words[0, :3].T), c=paint[:3], marker="X", s=40, edgecolors="white")
        ax.set(xticks=(), yticks=())
    column[0].set_title(f"t = {time}")
axes[0, 0].set_ylabel("exact, (13.6)")
axes[1, 0].set_ylabel("learned")
plt.show()
assert SMOKE or off < 0.05
print(f"of its attention, the network gives {off:.1%} to other tokens than (13.6); attention to all alike {chance:.1%}")

# %% [markdown]
# The colour of a place is the token that a point there would look at, a blend where it is torn; the crosses are
# $t\,c_k$. In noise everybody looks everywhere. As noise falls, the plane falls into the cells of its tokens, and the
# network draws the same borders without having been shown one.
#
# A condition is then four questions: which symmetry moves it, what it is worth, what may be left out, and whether it is
# known in training or at sampling alone. The answers name the door: the embedding of time, the channels, the attention,
# or none.
#
# Next: [jumps](14_jumps.ipynb), where the data are tokens, and have no velocity.
