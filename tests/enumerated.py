"""What losses of tokens are on average, by sums over all tokens and quadrature over time: nothing is drawn."""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.oracles import tokens
from fm_jax.types import TokenSample


def pairs_of(table):
    """Every x_t with every x1: [n m, D] each, x1 the faster."""
    states = tokens.all_states(table)
    return np.repeat(states, len(table.states), axis=0), np.tile(table.states, (len(states), 1))


def each_at(integrand, path, table, t, log_posterior):
    """`E[integrand | x1]` of each x1 of the table, summed over its tokens, at one time; under `jax.jit` too.

    `log_posterior(x)` are those of the states x [n, D].
    """
    x, x1 = map(jnp.asarray, pairs_of(table))
    there = jnp.take_along_axis(path.probs(t, x1), x[..., None], axis=-1)[..., 0].prod(axis=1)
    sample = TokenSample(jnp.asarray(t), x, x, x1)
    each = integrand(path, sample, path.log_posterior(log_posterior(x), x)).sum(axis=1)
    return jnp.where(there > 0, there * jnp.where(there > 0, each, 0), 0).reshape(-1, len(table.states)).sum(axis=0)


def each_bound(integrand, path, table, denoiser, end=1.0, num=100):
    """The integral over time from 0 to `end`, of each x1 of the table; nodes are denser near both ends."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    nodes, weights = (nodes + 1) / 2, weights / 2
    nodes, weights = end * nodes**2 * (3 - 2 * nodes), end * 6 * nodes * (1 - nodes) * weights
    at = jax.jit(
        lambda: jax.lax.map(lambda t: each_at(integrand, path, table, t, lambda x: denoiser(t, x)), jnp.asarray(nodes))
    )
    return weights @ np.asarray(at())
