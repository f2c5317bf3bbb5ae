# %% [markdown]
# # 14. Jumps instead of velocities
#
# Letters, digits of a puzzle, classes of pixels: what is one of $K$ things cannot move a little. It stays, or it jumps.
# Everything of the notebooks before has a twin here: a velocity becomes a table of *rates*, the continuity equation a
# sum over states, the regression of a velocity a classification, and Euler's method the throw of a coin. Spaces are
# finite, so that all of it can be checked by adding up. At the end a sudoku fills itself in.
#
# Previous: [The continuity equation](04_continuity.ipynb), whose proofs are repeated with sums in place of integrals;
# [Likelihood](07_likelihood.ipynb) for bounds.

# %%
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from lab import BLUE, GREEN, GREY, INK, ORANGE, PALE, RED, film

from fm_jax import oracles, rates, schedules, sources
from fm_jax.likelihood import token_bound
from fm_jax.paths import MixturePath
from fm_jax.samplers import FirstHitting, MixtureSteps, mixture_step, sample, tau_leap

jax.config.update("jax_enable_x64", True)  # sums over all states, to the last digits

# %% [markdown]
# ## Probability is conserved, once more
#
# A **continuous-time Markov chain** on a finite set is at $x$ and, within a short time $h$, goes to $y \ne x$ with
# probability $h\, u_t(y, x) + o(h)$. The rates $u_t(y, x) \ge 0$ may depend on time; nothing else is asked of them.
# What arrives at $y$ in that time, less what leaves, is the change of its probability:
#
# <a id="eq-14-1"></a>
#
# $$
# \frac{d}{dt} p_t(y) = \sum_{x \ne y} u_t(y, x)\, p_t(x) - \sum_{x \ne y} u_t(x, y)\, p_t(y). \tag{14.1}
# $$
#
# This **Kolmogorov equation** is linear with bounded coefficients, so that it has one solution: rates that fulfil it
# carry $p_t$, and there is no need to follow a path. A state here is a sequence of $D$ tokens from $K$, of which there
# are $K^D$. Rates between all pairs are out of reach. But within $h$ two tokens jump with probability of order $h^2$:
# it is enough to say of each token how often it jumps to what, $D K$ numbers, each of which may depend on the whole
# sequence.
#
# As a small world we take two tokens from $\{a, b, c\}$ that depend on each other, all nine probabilities known.

# %%
q = np.array([[0.30, 0.05, 0.00], [0.02, 0.20, 0.13], [0.10, 0.05, 0.15]])
table = oracles.token_table(q)
states = oracles.all_states(table)
print("states", [f"{'abc'[i]}{'abc'[j]}" for i, j in states], "of probability", q.ravel())

# %% [markdown]
# ## A path, one pair at a time
#
# As for points, data $x_1$ and a draw $x_0$ of a source are joined first, each token by itself. There is nothing
# between two tokens to go through, so a token is that of the source up to some time, and that of the data from there
# on, with $\kappa_t$ growing from 0 to 1 (Gat et al. 2024, arXiv:2407.15595):
#
# <a id="eq-14-2"></a>
#
# $$
# p_t(x \mid x_0, x_1) = (1 - \kappa_t)\, \delta_{x_0}(x) + \kappa_t\, \delta_{x_1}(x). \tag{14.2}
# $$
#
# With independent tokens as a source this is *uniform* diffusion; with a token of its own, the **mask**, that no data
# hold, it is *masked* diffusion: text with gaps. A token that has not jumped by $t$, which has probability
# $1 - \kappa_t$, does so within $h$ with probability $h \kappa_t'$. So its rate, given that it is still waiting, is
#
# <a id="eq-14-3"></a>
#
# $$
# u_t(y, x \mid x_1) = \frac{\kappa_t'}{1 - \kappa_t}\, \delta_{x_1}(y), \qquad y \ne x. \tag{14.3}
# $$
#
# ## The average over the data
#
# The data are not known when one samples. **Theorem**: the average of the conditional rates over what the data may be,
#
# <a id="eq-14-4"></a>
#
# $$
# u_t(y, x) = \mathbb E\big[u_t(y, x \mid x_1) \,\big|\, x_t = x\big]
# = \frac{\kappa_t'}{1 - \kappa_t}\; p(x_1 = y \mid x_t = x), \qquad y \ne x, \tag{14.4}
# $$
#
# carries the marginal path. The proof is that of [(4.5)](04_continuity.ipynb#eq-4-5): multiply (14.1) for each $x_1$ by
# its probability and add up; by Bayes' rule $p_t(x \mid x_1)\, p(x_1) = p(x_1 \mid x_t = x)\, p_t(x)$. All that has to
# be learned is a classifier, $p(x_1 \mid x_t)$ of each token: a **denoiser**. What cross entropy is to it, the squared
# error was to the velocity.
#
# We compare the slope of $p_t$, by differences, with the right side of (14.1), for all nine states.

# %%
path = MixturePath(schedules.Linear(), sources.UniformTokens(3))
denoiser = oracles.exact_denoiser(table, path)
forward = rates.forward_rates(denoiser, path)


def residual(u, t, h=1e-4):
    law = lambda s: oracles.path_law(table, path, s)  # noqa: E731
    slope = (8 * (law(t + h) - law(t - h)) - (law(t + 2 * h) - law(t - 2 * h))) / (12 * h)
    return np.abs(law(t) @ oracles.rate_matrix(u, t, states, 3) - slope).max() / np.abs(slope).max()


print("slope against flow of probability:", [f"{residual(forward, t):.0e}" for t in (0.1, 0.5, 0.9)])
assert max(residual(forward, t) for t in (0.1, 0.5, 0.9)) < 1e-8
wrong = lambda t, x: forward(t, x) * (1 + 0.1 * (x[..., None] == 0))  # noqa: E731
print(f"and with rates that are wrong by a tenth at one token: {residual(wrong, 0.5):.0e}")

# %% [markdown]
# ## Many rates, one path
#
# For points we found a family of processes with the same marginals, from the flow to SDEs with any noise. Here too.
#
# **Reversal.** Noise data by (14.2) and reverse the film. By Bayes' rule a chain with rates $\tilde u$ that runs
# backwards has, seen forwards, $u_t(y, x) = \tilde u_t(x, y)\, p_t(y) / p_t(x)$. The noising chain draws a token anew
# with rate $\kappa_t' / \kappa_t$, and the ratio is an average over the denoiser:
#
# <a id="eq-14-5"></a>
#
# $$
# u_t(y, x) = \frac{\kappa_t'}{\kappa_t}\, p_0(x) \sum_a p(x_1 = a \mid x_t)\;
# \frac{\kappa_t \delta_a(y) + (1 - \kappa_t)\, p_0(y)}{\kappa_t \delta_a(x) + (1 - \kappa_t)\, p_0(x)}. \tag{14.5}
# $$
#
# For a mask it is (14.4) again. For any other source tokens also jump to what is not data yet.
#
# **Correctors.** Going forth and back in balance changes no probability: to (14.4) add, $c$ times, itself and the
# noising chain,
#
# <a id="eq-14-6"></a>
#
# $$
# u^c_t(y, x) = (1 + c)\, u_t(y, x) + c\, \frac{\kappa_t'}{\kappa_t}\, p_0(y). \tag{14.6}
# $$
#
# What was decided too early can be taken back. The price is in the number of jumps.

# %%
kinds = {
    "forward": forward,
    "reversal": rates.reversal_rates(denoiser, path),
    "corrector, c = 1": rates.with_corrector(forward, path, 1.0),
}
fig, ax = plt.subplots(figsize=(4.6, 2.8))
times = np.linspace(0.05, 0.95, 37)
for (name, u), colour in zip(kinds.items(), (BLUE, ORANGE, RED), strict=True):
    u = jax.jit(u)
    jumps = [oracles.path_law(table, path, t) @ np.asarray(u(t, states)).sum(axis=(1, 2)) for t in times]
    print(f"{name:>16}: residual {residual(u, 0.5):.0e}, {np.trapezoid(jumps, times):.2f} jumps from 0.05 to 0.95")
    ax.plot(times, jumps, color=colour, label=name)
    assert residual(u, 0.5) < 1e-8
ax.set(xlabel="t", ylabel="jumps per unit of time", ylim=(0, 12), title="One path, three chains")
ax.legend()
plt.show()

# %% [markdown]
# ## Steps
#
# Euler's method holds the rates for a step: a token jumps with probability $h$ times its total rate, and then to $y$ in
# proportion to the rates (`TauLeaping`). With a denoiser one can do better. Given that $x_1$ is $y$, (14.2) is solved
# exactly: of the tokens that wait at $t$ the share $1 - (1 - \kappa_s) / (1 - \kappa_t)$ has jumped at $s$. So
#
# <a id="eq-14-7"></a>
#
# $$
# P(x_s = y \mid x_t = x) = \frac{1 - \kappa_s}{1 - \kappa_t}\, \delta_x(y)
# + \Big(1 - \frac{1 - \kappa_s}{1 - \kappa_t}\Big)\, p(x_1 = y \mid x_t = x) \tag{14.7}
# $$
#
# is right for one token, however long the step (`MixtureSteps`). What remains is that tokens of one step do not see
# each other. No draws are needed to see it: the vector of all nine probabilities goes through the matrix of a step.


# %%
curved, nums = MixturePath(schedules.Polynomial(2.0), sources.UniformTokens(3)), [2, 4, 8, 16, 32]


def errors(law, step):
    everything, wanted, found = oracles.all_states(law), oracles.path_law(law, curved, 0.9), []
    for num in nums:
        p, times = oracles.path_law(law, curved, 0.0), np.linspace(0, 0.9, num + 1)
        for t, s in pairwise(times):
            p = p @ oracles.transition_matrix(step(t, s, everything).probs(everything), everything)
        found.append(np.abs(p - wanted).sum() / 2)
    return found


fig, axes = plt.subplots(1, 2, figsize=(6.6, 2.8), sharey=True)
for ax, law, title in zip(axes, (oracles.token_table(q.sum(1)), table), ("one token", "two tokens"), strict=True):
    f = oracles.exact_denoiser(law, curved)
    leaps = errors(law, partial(tau_leap, rates.forward_rates(f, curved)))
    exact = errors(law, partial(mixture_step, f, curved))
    for name, found, colour in (("tau-leaping", leaps, ORANGE), ("(14.7)", exact, BLUE)):
        print(f"{title}, {name}: {' '.join(f'{each:.1e}' for each in found)}")
        ax.loglog(nums, np.maximum(found, 1e-16), "o-", color=colour, label=name)
    ax.set(title=title, xlabel="steps", xticks=nums, xticklabels=nums)
    ax.minorticks_off()
axes[0].set(ylabel="total variation at t = 0.9")
axes[1].legend()
plt.show()

# %% [markdown]
# ## Bounds, and why they differ
#
# How likely is $x_1$ under the chain of a network, with rates $u^\theta$? Within $h$ a jump to $y$ has probability
# $h u_t(y, x)$ under the conditional chain and $h u^\theta_t(y, x)$ under the network's. The expected logarithm of the
# ratio, added up over all steps as $h \to 0$, is the divergence between the two laws of whole trajectories; what one
# sees of them at $t = 1$ diverges less:
#
# <a id="eq-14-8"></a>
#
# $$
# -\log p^\theta(x_1) \le \int_0^1 \mathbb E_{x_t \mid x_1} \sum_{y \ne x_t}
# \Big( u^\theta_t - u_t + u_t \log \frac{u_t}{u^\theta_t} \Big)\, dt, \tag{14.8}
# $$
#
# all of them rates from $x_t$ to $y$.
# Any pair of conditional rates $u_t(\cdot \mid x_1)$ and their average has such a bound. Is it tight for the exact
# average? The difference is a divergence between two laws of trajectories, the mixture of the conditional chains and
# the Markov chain with the averaged rates: it is zero where the mixture is Markov itself. The noising chain of the data
# *is* Markov, whatever the data, and so is its reversal: (14.5) gives the entropy of the data. A mixture of the chains
# (14.3) remembers: a token that has jumped will not jump again, and with a uniform source nobody can see whether it
# has. A mask shows it. Here are all three for one token of four.

# %%
q4 = np.array([0.55, 0.25, 0.15, 0.05])
entropy, four = -(q4 * np.log(q4)).sum(), oracles.token_table(q4)
uniform4, masked4 = (
    MixturePath(schedules.Linear(), source) for source in (sources.UniformTokens(4), sources.Masked(5, 4))
)
x1 = np.repeat(np.arange(4), (10000 * q4).round().astype(int))[:, None]
cases = {"mask": (oracles.with_mask(four), masked4), "reversal": (four, uniform4), "forward": (four, uniform4)}
found = {}
for name, (law, path4) in cases.items():
    f = oracles.exact_denoiser(law, path4)
    bound = jax.jit(lambda key, f=f, path4=path4, name=name: token_bound(f, path4, key, x1, bound=name))(
        jax.random.key(0)
    )
    error = np.sqrt((bound.error**2).sum()) / len(x1)
    found[name] = float(bound.nats.mean())
    print(f"{name:>8}: {found[name]:.3f} +- {error:.3f} nats, entropy {entropy:.4f}")
    if name != "forward":
        assert abs(found[name] - entropy) < 4 * error
assert found["forward"] > entropy + 0.25

# %% [markdown]
# ## A sudoku fills itself in
#
# A sudoku of 4 by 4 has 288 solutions: sixteen tokens that know everything of each other, and a posterior that can be
# added up. Steps in which several cells are drawn at once contradict themselves, however right the denoiser. With a
# mask there is a way without steps: of $n$ masks any is as likely to fall next, when $\kappa$ has grown enough, and
# each sees all that fell before it (`FirstHitting`). Sixteen evaluations, and no error.

# %%
sudoku = oracles.with_mask(oracles.sudoku4())
hidden = MixturePath(schedules.Linear(), sources.Masked(5, 4))
solver = oracles.exact_denoiser(sudoku, hidden)
x0 = jnp.full((1000, 16), 4)
known = {tuple(grid) for grid in sudoku.states.tolist()}


def share(sampler, times=None):
    draw = jax.jit(lambda key: sample(solver, x0, sampler, times=times, key=key).x)
    return np.mean([tuple(grid) in known for grid in np.asarray(draw(jax.random.key(0))).tolist()])


nums = [4, 8, 16, 32, 64]
shares = [share(MixtureSteps(hidden), num) for num in nums]
rows = {
    "first hitting": share(FirstHitting(hidden)),
    "four at once, surest first": share(FirstHitting(hidden, "confidence", 4)),
}
for name, each in [*zip(nums, shares, strict=True), *rows.items()]:
    print(f"{name!s:>26}: {each:.1%} valid")
one = np.asarray(sample(solver, x0[:2], FirstHitting(hidden), key=jax.random.key(3), trajectory=True).trajectory)
apart = np.asarray(
    sample(solver, x0[:2], MixtureSteps(hidden), times=8, key=jax.random.key(4), trajectory=True).trajectory
)


def draw(i, *axes):
    for ax, states, title in zip(axes, (one[:, 0], apart[:, 0]), ("first hitting", "eight steps"), strict=True):
        grid = states[int(i) * (len(states) - 1) // 16].reshape(4, 4)
        for row, column in np.ndindex(4, 4):
            digit = grid[row, column]
            same = [(grid == digit)[row].sum(), (grid == digit)[:, column].sum()]
            same.append((grid == digit)[row // 2 * 2 :][:2, column // 2 * 2 :][:, :2].sum())
            colour = PALE if digit == 4 else "#F6C9B0" if max(same) > 1 else "#CFE6F5"
            ax.add_patch(plt.Rectangle((column, 3 - row), 1, 1, facecolor=colour, edgecolor=GREY))
            ax.text(column + 0.5, 3.5 - row, "" if digit == 4 else digit + 1, ha="center", va="center", fontsize=14)
        ax.plot([2, 2, 2, 0, 4], [0, 4, 2, 2, 2], color=INK, linewidth=1.5)
        ax.set(xlim=(0, 4), ylim=(0, 4), xticks=[], yticks=[], xlabel=title, aspect="equal")


film(
    draw,
    np.arange(17),
    alt="Two grids of 4 by 4 fill with digits, one cell at a time and several at once; what contradicts itself is red.",
    panels=2,
    size=(2.2, 2.4),
    caption="{:.0f} of 16",
)

# %% [markdown]
# One figure and one number to take away: the share of grids without a contradiction against the evaluations spent.

# %%
fig, ax = plt.subplots(figsize=(4.6, 2.9))
ax.plot(nums, shares, "o-", color=BLUE, label="(14.7), cells of a step apart")
ax.plot(16, rows["first hitting"], "*", color=GREEN, markersize=13, label="first hitting")
ax.plot(4, rows["four at once, surest first"], "s", color=RED, label="four at once, surest first")
ax.set(xscale="log", xticks=nums, xticklabels=nums, xlabel="evaluations", ylabel="valid", ylim=(-0.03, 1.06))
ax.minorticks_off()
ax.legend(loc="lower right")
plt.show()
print(f"first hitting: {rows['first hitting']:.1%} of 1,000 grids are valid, 16 evaluations each")
assert rows["first hitting"] == 1

# %% [markdown]
# Everything that a flow has, a chain has too: marginals that are averages, many processes for one path, steps and their
# orders, likelihoods. What a chain has not is a direction: one classifier serves all of it.
#
# Next: [Where straight lines are not straight](15_manifolds.ipynb).
