# %% [markdown]
# # 15. Where straight lines are not straight
#
# A wind direction, a place on the earth, the pose of a molecule: points of a curved space. The line from one to another
# leaves the space, and so does a step of Euler's method. Chen & Lipman (2023, arXiv:2302.03660) keep everything else of
# flow matching and replace the line by a *geodesic*. Here each equation is set against a number in double precision,
# most of them on the sphere, where all of it has a closed form.
#
# Previous: [Paths](03_paths.ipynb), [The continuity equation](04_continuity.ipynb) and
# [Likelihood](07_likelihood.ipynb), each of which is repeated on a curved space.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from lab import BLUE, GREEN, GREY, INK, ORANGE, PALE, RED, SKY, SMOKE, film

from fm_jax.likelihood import log_prob
from fm_jax.losses import flow_matching
from fm_jax.manifolds import SO3, FlatTorus, Hyperbolic, Sphere, UniformOn, VonMisesFisher
from fm_jax.models import MLP, init_params, linen_apply
from fm_jax.oracles import moebius, point_mixture
from fm_jax.parameterization import bind
from fm_jax.paths import GeodesicPath
from fm_jax.samplers import RungeKutta, sample
from fm_jax.samplers.runge_kutta import TABLEAUX
from fm_jax.schedules import Linear
from fm_jax.train import create_state, make_step
from fm_jax.train.step import scan_steps

jax.config.update("jax_enable_x64", True)
sphere = Sphere(2)

# %% [markdown]
# ## There and back: exp and log
#
# At each point $x$ of a manifold there is a **tangent space**, the velocities that do not leave it, with an inner
# product: the **metric**. A geodesic goes straight on as well as it can. Following the one of velocity $u$ for a unit
# of time is the **exponential map** $\exp_x(u)$; the shortest velocity that arrives at $y$ is its inverse, the
# **logarithm** $\log_x(y)$, and its length is the distance. On the unit sphere
#
# <a id="eq-15-1"></a>
#
# $$
# \exp_x(u) = \cos|u|\; x + \frac{\sin|u|}{|u|}\, u, \qquad
# \log_x(y) = \frac{\theta}{\sin\theta}\,(y - \cos\theta\; x), \quad \cos\theta = \langle x, y\rangle. \tag{15.1}
# $$
#
# By $\arccos$ of the inner product this loses half of the digits: near 0 and near $\pi$ the cosine hardly changes. In
# float32 an angle of $10^{-4}$ is rounded away. `Sphere.log` takes differences first, and the angle by sine and cosine.

# %%
angles = np.geomspace(1e-6, 1, 60)
angles = np.concatenate([angles, np.pi - angles[::-1]])
x = sphere.uniform(jax.random.key(0), jnp.zeros((len(angles), 3)))
u = sphere.normal(jax.random.key(1), x)
y = sphere.exp(x, u * (angles / np.linalg.norm(u, axis=1))[:, None])
x32, y32 = x.astype(jnp.float32), y.astype(jnp.float32)
exact = sphere.distance(*(each.astype(float) for each in (x32, y32)))
by_arccos = jnp.arccos(jnp.clip((x32 * y32).sum(axis=1), -1, 1))
ours, theirs = (np.abs(each.astype(float) / exact - 1) for each in (sphere.distance(x32, y32), by_arccos))
fig, ax = plt.subplots(figsize=(4.6, 2.8))
ax.plot(np.maximum(theirs, 1e-9), color=ORANGE, label="arccos")
ax.plot(np.maximum(ours, 1e-9), color=BLUE, label="sine and cosine")
ax.set(yscale="log", ylabel="relative error in float32", xlabel="angle", title="Distances on the sphere")
ax.set_xticks([0, 59, 119], ["$10^{-6}$", "1", r"$\pi - 10^{-6}$"])
ax.legend()
plt.show()
print(f"worst relative error: {ours.max():.1e}, by arccos {theirs.max():.0%}")
assert ours.max() < 1e-6

# %% [markdown]
# ## The path
#
# From $x_0$ to $x_1$ along the shortest way, at the speed of a schedule $\kappa_t$ from 0 to 1:
#
# <a id="eq-15-2"></a>
#
# $$
# x_t = \exp_{x_0}\!\big(\kappa_t \log_{x_0}(x_1)\big). \tag{15.2}
# $$
#
# What is left of the way at $t$ is the share $1 - \kappa_t$, and it is gone at the rate $\kappa_t'$. So the velocity
# points to $x_1$ from wherever one is,
#
# <a id="eq-15-3"></a>
#
# $$
# u_t(x \mid x_1) = \frac{\kappa_t'}{1 - \kappa_t}\, \log_x(x_1), \tag{15.3}
# $$
#
# as in $\mathbb R^n$, where $\log_x(x_1) = x_1 - x$. The proofs of the notebooks before need nothing but the continuity
# equation, which holds with the divergence of the manifold: the marginal velocity is $\mathbb E[u_t \mid x_t = x]$, and
# the regression on (15.3) learns it. What is regressed is a tangent vector, and the norm is that of the metric.

# %%
spaces = {"S^2": sphere, "T^2": FlatTorus(2), "H^2": Hyperbolic(2), "SO(3)": SO3()}
starts = {"S^2": x[:1], "T^2": jnp.zeros((1, 2)), "H^2": jnp.array([[1.0, 0, 0]]), "SO(3)": jnp.eye(3)[None]}
for name, space in spaces.items():
    base = jnp.repeat(starts[name], 6, axis=0)
    ends = [space.exp(base, 0.7 * space.normal(jax.random.key(i), base)) for i in range(2)]
    t = jnp.linspace(0.1, 0.9, 6)
    point = GeodesicPath(space).sample(None, t, *ends)
    wanted = space.log(point.x_t, ends[1]) / (1 - t).reshape(-1, *(1,) * (base.ndim - 1))
    print(f"{name:>6}: time derivative of (15.2) against (15.3): {jnp.abs(point.u_t - wanted).max():.0e}")
    assert jnp.abs(point.u_t - wanted).max() < 1e-9

# %% [markdown]
# ## Densities
#
# In $\mathbb R^n$ all of the source shrinks towards $x_1$ alike, by $(1 - \kappa_t)^n$. On a curved space the spheres
# around $x_1$ of radius $r$ do not grow as $r^{n-1}$ but as $s(r)^{n-1}$, $s = \sin$ on a sphere and $\sinh$ on a
# hyperbolic space. With $r$ the distance to $x_1$, and $x_0$ where the geodesic through $x$ began,
#
# <a id="eq-15-4"></a>
#
# $$
# p_t(x \mid x_1) = p_0(x_0)\, \frac{1}{1 - \kappa_t}
# \left(\frac{s\big(r / (1 - \kappa_t)\big)}{s(r)}\right)^{n-1}, \qquad
# x_0 = \exp_{x_1}\!\Big(\frac{\log_{x_1}(x)}{1 - \kappa_t}\Big), \tag{15.4}
# $$
#
# and 0 where $r / (1 - \kappa_t)$ is beyond the antipode. A mixture of points has the weighted sum as its marginal, and
# the average of (15.3) with the posterior weights as its exact velocity: an oracle, for any manifold. Here is the mass
# of three points on the sphere, by quadrature, and a sample that follows the velocity.

# %%
cities = jnp.array([[0.0, 0.0, 1.0], [0.9, 0.1, -0.4], [-0.5, 0.8, 0.2]])
cities = sphere.project(cities)
source = UniformOn(sphere)
oracle = point_mixture(sphere, cities, jnp.array([0.5, 0.3, 0.2]), Linear(), source)
z, weights = np.polynomial.legendre.leggauss(200)
longitude = np.arange(400) * 2 * np.pi / 400
r = np.sqrt(1 - z**2)[:, None]
grid = np.stack([r * np.cos(longitude), r * np.sin(longitude), z[:, None] + 0 * longitude], axis=-1)
measure = np.repeat(weights * 2 * np.pi / 400, 400)
for t in (0.1, 0.3, 0.5):
    mass = (np.exp(oracle.log_prob(t, jnp.asarray(grid.reshape(-1, 3)))) * measure).sum()
    print(f"t = {t}: the marginal has the mass {mass:.4f}")
    assert abs(mass - 1) < 0.02  # it has edges, where ways stop being the shortest

x0 = source.draw(jax.random.key(2), jnp.zeros((3000, 3)))
flow = sample(oracle.velocity, x0, RungeKutta("heun", sphere), times=jnp.linspace(0, 0.99, 100), trajectory=True)
arrived = sphere.distance(flow.x[:, None] + 0 * cities[None], cities[None] + 0 * flow.x[:, None]).argmin(axis=1)
shares = np.bincount(arrived, minlength=3) / 3000
print("shares that arrive at each point:", shares.round(3), "of weights 0.5, 0.3, 0.2")
assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.04

# %% [markdown]
# ## Steps
#
# A Runge-Kutta method adds velocities of several points, which lie in different tangent spaces. In **normal
# coordinates** at $x$, $\xi = \log_x(y)$, the space is flat and the flow an ordinary one, $\dot\xi = D\log_x(v)$. A
# step there, and $\exp_x$ of the result:
#
# <a id="eq-15-5"></a>
#
# $$
# k_i = D\log_x\big(y_i\big)\,[v(t_i, y_i)], \quad y_i = \exp_x\!\Big(h \sum_{j<i} a_{ij} k_j\Big), \qquad
# x_{\text{next}} = \exp_x\!\Big(h \sum_i b_i k_i\Big). \tag{15.5}
# $$
#
# One Jacobian product a stage, no transport of vectors, and any method has its order, since coordinates do not change
# it. Not a bit off the manifold either. A flow with a closed form: $v(x) = a - \langle a, x\rangle x$, the gradient of
# the height above an equator, of which $\operatorname{artanh}\langle a, x\rangle$ grows with $t$.

# %%
steep = moebius(jnp.array([0.0, 0.6, 0.8]))
start = x0[:50]
nums = np.array([4, 8, 16, 32, 64])
fig, ax = plt.subplots(figsize=(4.6, 3.0))
for (name, tableau), colour in zip(TABLEAUX.items(), (GREY, SKY, BLUE, GREEN, ORANGE, RED), strict=True):
    ends = [sample(steep.velocity, start, RungeKutta(name, sphere), times=int(num)).x for num in nums]
    errors = np.array([np.abs(end - steep.flow_map(1.0, start)).max() for end in ends])
    order = np.log2(errors[-2] / errors[-1])
    off = max(np.abs(np.linalg.norm(end, axis=1) - 1).max() for end in ends)
    print(f"{name:>8}: order {order:.2f}, off the sphere by {off:.0e}")
    ax.loglog(nums, errors, "o-", color=colour, label=name)
    assert abs(order - tableau.order) < 0.15
    assert off < 1e-14
ax.set(xticks=nums, xticklabels=nums, xlabel="steps", ylabel="error at t = 1", title="Usual methods on the sphere")
ax.minorticks_off()
ax.legend(ncol=2)
plt.show()

# %% [markdown]
# ## Likelihood
#
# Along the flow the density changes by the divergence **of the manifold**,
#
# <a id="eq-15-6"></a>
#
# $$
# \frac{d}{dt} \log p_t(x_t) = -\operatorname{div}_g v(t, x_t)
# = -\operatorname{tr} D\big(v \circ \pi\big)(x_t), \tag{15.6}
# $$
#
# with $\pi$ the projection onto the manifold: of a field that is constant along the normals, the divergence in the
# surrounding space is that on the manifold. So `log_prob` needs no other solver. Densities are with respect to the
# Riemannian volume; for a chart with other coordinates `log_volume` is added at both ends.

# %%
x1 = source.draw(jax.random.key(3), jnp.zeros((20, 3)))
found = log_prob(steep.velocity, x1, manifold=sphere, source=source, sampler=RungeKutta("rk4"), times=200)
print(f"log-density against the closed form: {np.abs(found - steep.log_prob(1.0, x1)).max():.0e} nats")
assert np.abs(found - steep.log_prob(1.0, x1)).max() < 1e-8
plain = log_prob(lambda t, x: steep.velocity(t, x), x1, sampler=RungeKutta("rk4"), times=200)
print(f"as if the sphere were flat and the source normal: off by {np.abs(plain - found).mean():.1f} nats on average")

# %% [markdown]
# ## A trained flow on the globe
#
# Three regions of different size and weight, a network of three layers, the loss of all other notebooks. The path says
# where it is; nothing else changes.

# %%
regions = [(VonMisesFisher(city, kappa), share) for city, kappa, share in zip(cities, (80, 20, 40), (0.5, 0.3, 0.2))]


def draw_data(key, num):
    keys = jax.random.split(key, 4)
    which = jax.random.choice(keys[3], 3, (num,), p=jnp.array([0.5, 0.3, 0.2]))
    each = [law.draw(k, jnp.zeros((num, 3), jnp.float32)) for (law, _), k in zip(regions, keys[:3], strict=True)]
    return jnp.stack(each)[which, jnp.arange(num)]


def log_data(x):
    return jax.nn.logsumexp(jnp.stack([jnp.log(share) + law.log_prob(x) for law, share in regions]), axis=0)


path = GeodesicPath(sphere, source=source)
model = MLP(features=(128, 128, 128))
apply_fn = linen_apply(model)
params = jax.tree.map(lambda p: p.astype(jnp.float32), init_params(model, jax.random.key(0), (3,)))
steps = 100 if SMOKE else 4000
optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
many = jax.jit(scan_steps(make_step(flow_matching(apply_fn, path), optimizer, axis_name=None)))
state = create_state(params, optimizer, ema_decays=(0.99,))
for i in range(steps // 100):
    batches = {"x1": jax.vmap(lambda key: draw_data(key, 512))(jax.random.split(jax.random.key(i), 100))}
    state, _ = many(state, jax.random.key(10_000), batches)
v = bind(apply_fn, state.ema["0.99"])

held_out = draw_data(jax.random.key(7), 1000)
solver = jax.jit(lambda x: log_prob(v, x, manifold=sphere, source=source, sampler=RungeKutta("rk4"), times=30))
nats, floor = -solver(held_out).mean(), -log_data(held_out).mean()
print(f"{nats:.3f} nats, where the data themselves have {floor:.3f} and the uniform density {np.log(4 * np.pi):.3f}")
start = source.draw(jax.random.key(8), jnp.zeros((600, 3), jnp.float32))
run = sample(v, start, RungeKutta("heun", sphere), times=48, trajectory=True).trajectory


def globe(ax, points, colour):
    """Seen from the first octant: what is behind is pale."""
    view = np.array([[-0.7, 0.7, 0.0], [-0.35, -0.35, 0.87], [0.62, 0.62, 0.49]])
    east, north, front = (np.asarray(points) @ view.T).T
    ax.add_patch(plt.Circle((0, 0), 1, facecolor="white", edgecolor=GREY))
    ax.scatter(east[front < 0], north[front < 0], s=3, color=PALE)
    ax.scatter(east[front >= 0], north[front >= 0], s=3, color=colour)
    ax.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), xticks=[], yticks=[], aspect="equal")
    for side in ax.spines.values():
        side.set_visible(False)


film(
    lambda t, ax: globe(ax, run[round(48 * t)], BLUE),
    np.linspace(0, 1, 25),
    alt="Points spread evenly over a globe gather in three regions of different size, each along the surface.",
)

# %% [markdown]
# One figure and one number to take away: the density of the flow over all of the sphere, and its distance to the data.

# %%
lat, lon = np.meshgrid(np.linspace(-89, 89, 60), np.linspace(-180, 180, 120), indexing="ij")
cos = np.cos(np.deg2rad(lat))
places = np.stack([cos * np.cos(np.deg2rad(lon)), cos * np.sin(np.deg2rad(lon)), np.sin(np.deg2rad(lat))], axis=-1)
density = np.exp(solver(jnp.asarray(places.reshape(-1, 3), jnp.float32))).reshape(lat.shape)
fig, ax = plt.subplots(figsize=(5.2, 2.8))
shown = ax.pcolormesh(lon, lat, density, cmap="Blues", vmax=np.quantile(density, 0.99), shading="auto")
some = np.rad2deg([np.arctan2(held_out[:200, 1], held_out[:200, 0]), np.arcsin(held_out[:200, 2])])
ax.plot(*some, ".", color=INK, markersize=1.5)
ax.set(xlabel="longitude", ylabel="latitude", title="Density of the flow, and held-out data")
fig.colorbar(shown, label="per unit of area")
plt.show()
gap = float(nats - floor)
print(f"{gap:.3f} nats from the density of the data")
assert SMOKE or gap < 0.1

# %% [markdown]
# Lines became geodesics, sums steps in normal coordinates, traces divergences of the manifold, and the network did not
# notice. [Jumps](14_jumps.ipynb) are the other way to leave $\mathbb R^n$.
#
# This is the end of the series. To read it again with all of it in mind: [flows](01_flows.ipynb). To run it at size:
# the [experiments](../experiments/README.md), from digits in minutes to pictures from words.
