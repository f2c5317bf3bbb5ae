# %% [markdown]
# # 11. Bring your own network, trainer and devices
#
# You have a JAX project of your own and want only the loss. What else comes with it? Nothing: a loss is a pure function
# of parameters, key and batch, and sees the network as a function. We write one field as plain JAX, as Flax NNX and as
# Equinox, find one loss and one gradient in all three, and train each in its own idiom; then we take only the target,
# bring a path of our own, and go from one device to four.
#
# Before this: [the design space](10_design_space.ipynb). It builds on the flow ODE [(1.1)](01_flows.ipynb#eq-1-1), the
# Gaussian path [(3.2)](03_paths.ipynb#eq-3-2) and Theorem 3 [(5.3)](05_losses.ipynb#eq-5-3).
#
# The four devices are simulated: XLA splits the processor if told so before JAX starts. They share its cores and save
# no time, but compute what four accelerators would.

# %%
import os

flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"  # before JAX is imported
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx
from lab import BLUE, GREEN, GREY, ORANGE, PALE, SMOKE, film

from fm_jax import parameterization, samplers, schedules, shapes
from fm_jax.data.toy import moons
from fm_jax.losses import flow_matching
from fm_jax.metrics import measure, wasserstein
from fm_jax.models import from_equinox, from_nnx
from fm_jax.paths import AffinePath
from fm_jax.train import create_state, make_step, parallel
from fm_jax.types import PathSample

jax.config.update("jax_disable_most_optimizations", SMOKE)  # a few steps are over before they are well compiled

# %% [markdown]
# ## What a loss is
#
# `fm_jax.losses.flow_matching(apply_fn, path)` returns the function
#
# <a id="eq-11-1"></a>
#
# $$
# L(\theta;\, k, B) = \frac1n \sum_{i=1}^n \frac1d\,
# \big| f_\theta(t_i,\, x_{t_i}^{(i)},\, y^{(i)}) - u_{t_i}^{(i)} \big|^2 \tag{11.1}
# $$
#
# of the parameters $\theta$ (any pytree), a key $k$ and a batch $B$ of $n$ examples in $d$ dimensions (a dict: the data
# as `x1` and, if there is a condition $y$, it as `cond`). The key draws the times $t_i$ and the noise $x_0^{(i)}$; the
# path makes $x_t$ and $u_t$ of them. Nothing else goes in and nothing is kept, so that `jax.value_and_grad`, `jit`,
# `vmap`, `scan` and `pmap` take it as it is. The network comes in as a function,
#
# ```python
# apply_fn(params, t, x, cond, *, train, rngs)    # t [batch], x [batch, ...] -> [batch, ...]
# ```
#
# ## One: plain JAX
#
# Parameters are a list of dicts, and the network is a loop over it.

# %%
keys = jax.random.split(jax.random.key(11), 9)
key_init, key_data, key_train, key_batch, key_loss, key_given, key_x0, key_judge, key_run = keys
layers = [(3, 64), (64, 64), (64, 64), (64, 2)]  # x and t go in, a velocity in the plane comes out
start = [
    {"kernel": jax.random.normal(key, shape) / shape[0] ** 0.5, "bias": jnp.zeros(shape[1])}
    for key, shape in zip(jax.random.split(key_init, 4), layers, strict=True)
]


def plain_apply(params, t, x, cond, *, train, rngs):
    h = jnp.concatenate([x, t[:, None]], axis=1)
    for layer in params[:-1]:
        h = jax.nn.silu(h @ layer["kernel"] + layer["bias"])
    return h @ params[-1]["kernel"] + params[-1]["bias"]


# %% [markdown]
# ## Two: Flax NNX
#
# NNX modules hold their arrays. `nnx.split` takes them out as a pytree and `nnx.merge` puts them back; between the two
# stands a pure function of the parameters, and that is the whole of `fm_jax.models.from_nnx`, but for dropout, which it
# draws from `rngs` while `train` (this network has none). `nnx.update` copies the weights of the plain network in.


# %%
class NNXField(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(*shape, rngs=rngs) for shape in layers])

    def __call__(self, t, x, cond=None):
        h = jnp.concatenate([x, t[:, None]], axis=1)
        for layer in self.layers[:-1]:
            h = nnx.silu(layer(h))
        return self.layers[-1](h)


nnx_field = NNXField(nnx.Rngs(0))
nnx.update(nnx_field.layers, dict(enumerate(start)))

# %% [markdown]
# ## Three: Equinox
#
# An Equinox module *is* a pytree, and is written for one example. `fm_jax.models.from_equinox` separates its arrays
# from the rest (`eqx.partition`, `eqx.combine`) and maps it over the batch (`jax.vmap`). Equinox keeps its kernels
# transposed.


# %%
class EquinoxField(eqx.Module):
    network: eqx.nn.MLP

    def __call__(self, t, x, cond=None):
        return self.network(jnp.append(x, t))


fresh = EquinoxField(eqx.nn.MLP(3, 2, width_size=64, depth=3, activation=jax.nn.silu, key=jax.random.key(0)))
arrays = [array for layer in start for array in (layer["kernel"].T, layer["bias"])]
eqx_field = eqx.tree_at(lambda field: [a for n in field.network.layers for a in (n.weight, n.bias)], fresh, arrays)

# %% [markdown]
# ## One loss, one gradient
#
# With the same weights, key and batch, the loss [(11.1)](#eq-11-1) is one function written three times. What may differ
# is the order in which sums are rounded: about $10^{-7}$ of their size, in float32.

# %%
path, batch = AffinePath(), {"x1": moons(key_batch, 256)}
plain_loss = jax.jit(flow_matching(plain_apply, path))


def largest(one, other):  # difference of two pytrees
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), one, other)))


in_plain = {  # the weights, or a gradient, in the form of the plain network
    "Flax NNX": lambda state: [layer for _, layer in sorted(nnx.to_pure_dict(state)["layers"].items())],
    "Equinox": lambda field: [{"kernel": layer.weight.T, "bias": layer.bias} for layer in field.network.layers],
}
(plain_value, _), plain_grad = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))(start, key_loss, batch)
for name, (params, apply_fn) in {"Flax NNX": from_nnx(nnx_field), "Equinox": from_equinox(eqx_field)}.items():
    (value, _), grad = jax.jit(jax.value_and_grad(flow_matching(apply_fn, path), has_aux=True))(params, key_loss, batch)
    off = abs(float(value - plain_value)), largest(in_plain[name](grad), plain_grad)
    print(f"{name}: loss {value:.4f}; less that of plain JAX {off[0]:.0e}, gradient at most {off[1]:.0e}")
    assert max(off) < 1e-5

# %% [markdown]
# ## Three trainings, each in its own idiom
#
# Plain JAX: the whole training is one `lax.scan` under `jit`, over a key and a batch for each step.

# %%
num_steps = 50 if SMOKE else 1500
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
keys = jax.random.split(key_train, num_steps)
data = moons(key_data, num_steps * 256).reshape(num_steps, 256, 2)


@jax.jit
def train_plain(params):
    def step(carry, inputs):
        (params, state), (key, x1) = carry, inputs
        grads, metrics = jax.grad(plain_loss, has_aux=True)(params, key, {"x1": x1})
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), metrics["loss"]

    return jax.lax.scan(step, (params, optimizer.init(params)), (keys, data))


(plain_params, _), losses = train_plain(start)
print(f"mean loss of the first 20 steps: {losses[:20].mean():.2f}, of the last 20: {losses[-20:].mean():.2f}")

# %% [markdown]
# NNX: module and optimiser stay the objects that they are in an NNX project. The loss is made inside the step; that
# costs nothing, since to make it is to close over two functions, and it happens once, when the step is traced.
# (`nnx.split` copies nothing: what it gave before a training changes with the module. What `from_nnx` gave does not.)


# %%
@nnx.jit
def nnx_step(field, optimizer, key, x1):
    params, apply_fn = from_nnx(field)
    grads, _ = jax.grad(flow_matching(apply_fn, path), has_aux=True)(params, key, {"x1": x1})
    optimizer.update(field, grads)


nnx_optimizer = nnx.Optimizer(nnx_field, optimizer, wrt=nnx.Param)
for key, x1 in zip(keys, data, strict=True):
    nnx_step(nnx_field, nnx_optimizer, key, x1)

# %% [markdown]
# Equinox: the module goes in and the updated module comes out.


# %%
@eqx.filter_jit
def eqx_step(field, state, key, x1):
    params, apply_fn = from_equinox(field)
    grads, _ = jax.grad(flow_matching(apply_fn, path), has_aux=True)(params, key, {"x1": x1})
    updates, state = optimizer.update(grads, state)
    return eqx.apply_updates(field, updates), state


eqx_state = optimizer.init(eqx.filter(eqx_field, eqx.is_inexact_array))
for key, x1 in zip(keys, data, strict=True):
    eqx_field, eqx_state = eqx_step(eqx_field, eqx_state, key, x1)

# %% [markdown]
# After all these steps the three sets of weights are still one. Each network is now a velocity function, made by
# `fm_jax.parameterization.velocity_fn`, and any sampler takes it. How good the samples are says their Wasserstein
# distance to real moons, beside its floor, the distance that two real samples of this size have.


# %%
def velocity_of(params, apply_fn):
    model_fn = jax.tree_util.Partial(apply_fn, params, train=False, rngs=None)
    return parameterization.velocity_fn(model_fn, "velocity", schedules.Linear())


x0 = jax.random.normal(key_x0, (500, 2))
samples = {"plain JAX": samplers.sample(velocity_of(plain_params, plain_apply), x0, times=25).x}
for name, (params, apply_fn) in {"Flax NNX": from_nnx(nnx_field), "Equinox": from_equinox(eqx_field)}.items():
    print(f"weights of {name} less those of plain JAX: {largest(in_plain[name](params), plain_params):.0e}")
    samples[name] = samplers.sample(velocity_of(params, apply_fn), x0, times=25).x
distance = measure(wasserstein, moons, key_judge, samples["plain JAX"], repeats=5)
print(f"2-Wasserstein distance to real moons: {distance}")
assert SMOKE or distance.value < 3 * distance.floor.mean

# %% [markdown]
# ## What to know of a loss
#
# | | |
# |---|---|
# | `batch` | `x1` is required. `x0`, `t`, `cond` and `weight` are optional: noise and times are drawn unless given |
# | `cond` | any pytree with a leading batch axis, handed to the network; a coupling keeps it with its `x1` |
# | `weight` | a number for each example: it multiplies the loss, not the metric `mse`, and is not normalised |
# | `key` | a new one for each step. The same key gives the same loss; with `None` nothing may be random |
# | `train`, `rngs` | with a key `True` and `{"dropout": key}`, without one `False` and `None` |
# | metrics | a dict of scalars; `fm_jax.train.make_step` adds the norms of gradient, update and parameters |
# | `target_params` | a second set of weights, for losses that compare a network with its own average; not used here |
# | traces | one for each structure of the batch and its shapes: all choices are made when the loss is built |
#
# Python runs only while a function is traced, so that a network which keeps a diary tells how often that was, and how
# it was called.

# %%
diary = []


def watched(params, t, x, cond, *, train, rngs):
    diary.append((train, rngs is not None))
    return plain_apply(params, t, x, cond, train=train, rngs=rngs)


loss_fn = jax.jit(flow_matching(watched, path))
one, same, other = (float(loss_fn(start, jax.random.key(seed), batch)[0]) for seed in (0, 0, 1))
given = batch | {"x0": jax.random.normal(key_given, (256, 2)), "t": jnp.linspace(0, 1, 256)}
fixed, _ = loss_fn(start, None, given)
print(f"one key twice: {one:.4f} and {same:.4f}; another key: {other:.4f}; no key, all given: {fixed:.4f}")
print(f"traces in these four calls, each with (train, has rngs): {diary}")
assert one == same != other
assert diary == [(True, True), (False, False)]

# %% [markdown]
# ## Only the target
#
# A path is a value: `fm_jax.paths.AffinePath.sample` gives $x_t$ and the velocity $u_t$ to regress, and the loss around
# them can be your own. With the square it is (11.1) again.
#
# The square is no matter of taste. The flow needs the conditional *mean* $v_t(x) = \mathbb{E}[u_t \mid x_t = x]$
# ([Theorem 1](04_continuity.ipynb#eq-4-4)), which is what least squares finds; the absolute error finds the conditional
# median. Let three quarters of the data be 0 and one quarter be 1. At $t = 0$ the velocity is $u_0 = x_1 - x_0$ with
# $x_1$ independent of $x_0$, so that its mean given $x_0$ is $\tfrac14 - x_0$; its median $0 - x_0$ has lost the ones.

# %%
point = path.sample(None, given["t"], given["x0"], given["x1"])
own = jnp.mean((plain_apply(start, point.t, point.x_t, None, train=False, rngs=None) - point.u_t) ** 2)
print(f"own loss less the library's: {abs(float(own - fixed)):.0e}")
assert abs(own - fixed) < 1e-5

noise, data_01 = given["x0"][:, :1], 1.0 * (jnp.arange(256) % 4 == 0)[:, None]
c = jnp.linspace(-0.5, 1.5, 201)  # of the field c - x_0, a column for each c
error = abs(c - noise - path.sample(None, jnp.zeros(256), noise, data_01).u_t)
best = [abs(float(c[jnp.argmin((error**power).mean(0))])) for power in (2, 1)]
print(f"best c of the field c - x_0: {best[0]:.2f} by the square, {best[1]:.2f} by the absolute error")
assert max(abs(best[0] - 0.25), best[1]) < 0.02

# %% [markdown]
# ## Your own path
#
# Anything that has what `fm_jax.types.Path` lists is a path: where it starts, what can be learned of it and at which
# times, a schedule if there is one, and `sample`. A frozen dataclass is the natural form, as it compares, hashes and
# prints as what it is. Here the plane turns while the points go their straight ways, by a rotation $R_t$ through the
# angle $2\pi (1 - t)$ times `turns`, so that $R_1$ is the identity:
#
# $$
# x_t = R_t\, y_t, \qquad y_t = t\, x_1 + (1 - t)\, x_0, \qquad u_t = \dot R_t\, y_t + R_t\, \dot y_t .
# $$
#
# `jax.jvp` makes $u_t$ of $(y_t, \dot y_t)$, so that there is no derivative to get wrong. As $y_t = R_t^\top x_t$, the
# mean of $u_t$ given $x_t = x$ is the straight path's marginal velocity $v_t$, seen from the turning frame:
#
# <a id="eq-11-2"></a>
#
# $$
# v^{\text{swirl}}_t(x) = \dot R_t\, R_t^\top x + R_t\, v_t\big(R_t^\top x\big) . \tag{11.2}
# $$
#
# Put the trained network in place of $v_t$, and no more training is needed: its error is only turned,
# $|R_t\,(v_t - \dot y_t)| = |v_t - \dot y_t|$, so that its loss on this path is its loss on the straight one.


# %%
@dataclass(frozen=True)
class Swirl:
    turns: float = 1.0
    source, schedule, domain, kinds = path.source, None, path.domain, ("velocity",)

    def turn(self, t, y):
        angle = 2 * jnp.pi * self.turns * (1 - shapes.expand_time(t, y))
        cos, sin, a, b = jnp.cos(angle), jnp.sin(angle), y[:, :1], y[:, 1:]
        return jnp.concatenate([cos * a - sin * b, sin * a + cos * b], axis=1)

    def sample(self, key, t, x0, x1):
        y = path.sample(key, t, x0, x1)
        return PathSample(t, *jax.jvp(self.turn, (t, y.x_t), (jnp.ones_like(t), y.u_t)), x0, x1)

    def targets(self, sample):
        return {"velocity": sample.u_t}

    def target_domain(self, kind):
        return self.domain


def swirl_apply(params, t, x, cond, *, train, rngs):
    y = Swirl(-1.0).turn(t, x)  # the opposite turn is the inverse
    v = plain_apply(params, t, y, cond, train=train, rngs=rngs)
    return jax.jvp(Swirl().turn, (t, y), (jnp.ones_like(t), v))[1]


straight_value, _ = plain_loss(plain_params, key_loss, batch)
swirl_value, _ = flow_matching(swirl_apply, Swirl())(plain_params, key_loss, batch)
print(f"{Swirl()}: loss {swirl_value:.5f}; {path}: {straight_value:.5f}")
assert abs(swirl_value - straight_value) < 1e-4

# %% [markdown]
# Both flows have one goal. At each time the second picture is the first, turned; after one whole turn the two agree.

# %%
grid = [i / 84 for i in range(85)]
straight, turned = (
    samplers.sample(velocity_of(plain_params, apply_fn), x0[:150], times=grid, trajectory=True).trajectory
    for apply_fn in (plain_apply, swirl_apply)
)


def draw(t, *axes):
    now = round(84 * t)
    for ax, x, title, color in zip(axes, (straight, turned), ("straight", "swirl"), (BLUE, ORANGE), strict=True):
        ax.plot(x[: now + 1, :8, 0], x[: now + 1, :8, 1], color=GREY, lw=0.6, ls="-")
        ax.scatter(x[now, :, 0], x[now, :, 1], s=5, color=color, lw=0)
        ax.set(ylabel=title, xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), xticks=[], yticks=[], aspect="equal")


alt = "Points go from a round cloud straight to two half moons; beside them the same, while the plane turns once."
film(draw, grid[::7], panels=2, size=(1.9, 2.1), alt=alt)

# %% [markdown]
# ## From one device to four
#
# `fm_jax.train.make_step` writes one update as a function of one device's share of the batch, with one average over the
# devices in it, and `fm_jax.train.parallel.pmap_step` runs it on all of them. (`shard_map_step`, the form that JAX
# develops further, gives the same bits.) Why the update is that of one device: the loss is a mean over examples, so
# that over four equal shares $B_0, \dots, B_3$, with the same times and noise for each example,
#
# <a id="eq-11-3"></a>
#
# $$
# \nabla_\theta L(\theta; B) = \frac14 \sum_{j=0}^{3} \nabla_\theta L(\theta; B_j) . \tag{11.3}
# $$
#
# Minibatch optimal transport is no mean over examples and would pair within each share; `fm_jax.couplings.Gathered`
# pairs across all devices. We give times and noise in the batch, so that nothing is left to the key, and compare.
# (Clipping acts on the mean gradient, not on the shares.)

# %%
optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
one, _ = jax.jit(make_step(plain_loss, optimizer, axis_name=None))(create_state(start, optimizer), key_run, given)
together = parallel.pmap_step(make_step(plain_loss, optimizer), jax.devices()[:4])
four, _ = together(create_state(start, optimizer), key_run, parallel.split_batch(given, 4))
print(f"an update changes weights by up to {largest(one.params, start):.0e}")
print(f"four devices less one: {largest(one.params, four.params):.0e}")
assert largest(one.params, four.params) < 1e-6

# %% [markdown]
# In earnest each device draws for itself, and must not draw what its neighbour draws. The step folds its own number and
# then the device's into the key, $k_j$ = `fold_in(fold_in(key, step), j)`, so that one key serves a whole run. By hand:

# %%
shares = parallel.split_batch(batch, 4)
_, metrics = together(create_state(start, optimizer), key_run, shares)
k = [jax.random.fold_in(jax.random.fold_in(key_run, 0), j) for j in range(4)]
of_first = [float(plain_loss(start, k[j], {"x1": shares["x1"][0]})[0]) for j in range(4)]
off = sum(plain_loss(start, k[j], {"x1": shares["x1"][j]})[0] for j in range(4)) / 4 - metrics["loss"]
print("loss of the first share under the four keys:", [round(value, 3) for value in of_first])
print(f"mean loss of the shares, each under its own key, less the loss of the four devices: {abs(off):.0e}")
assert len(set(of_first)) == 4
assert abs(off) < 1e-5

# %% [markdown]
# ## Three projects, one result
#
# The samples of the three trainings, from one noise, over real moons in grey.

# %%
figure, axes = plt.subplots(1, 3, figsize=(7, 2.3), sharex=True, sharey=True)
for ax, (name, x), color, marker in zip(axes, samples.items(), (BLUE, ORANGE, GREEN), "osD", strict=True):
    ax.scatter(*moons(key_judge, 500).T, s=10, color=PALE, lw=0)
    ax.scatter(*x.T, s=3, color=color, marker=marker, lw=0)
    ax.set(title=name, aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
plt.show()
apart = max(largest(x, samples["plain JAX"]) for x in samples.values())
assert SMOKE or apart < 0.1
print(f"largest difference between a sample of plain JAX and the same one of NNX or Equinox: {apart:.0e}")

# %% [markdown]
# A loss is a function, a network is a function and a path is a value. Three projects with nothing in common but JAX had
# the same loss, the same gradients and, after training, the same samples; four devices made the update of one.
#
# Next: [published networks](12_published_networks.ipynb).
