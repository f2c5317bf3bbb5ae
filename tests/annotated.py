"""Calls the library with all of its annotations checked. `test_types.py` runs this in a process of its own.

The import hook checks every function of fm_jax, private and inner ones too, which costs time; nothing of it is to be
left behind for other tests. Prints as JSON what was called, what went wrong, and what was refused as it should be.
"""

import doctest
import importlib
import json
import pkgutil
import sys
import time

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An `int` is a `float`, as it is for mypy."""

NEED_EXTRAS = ("fm_jax.data.digits", "fm_jax.data.images", "fm_jax.data.pipeline", "fm_jax.metrics.sinkhorn")
NEED_EXTRAS += tuple(f"fm_jax.data.{name}" for name in ("folder", "picture", "reading", "records"))
NEED_EXTRAS += ("fm_jax.couplings.entropic", "fm_jax.couplings.gromov", "fm_jax.couplings.unbalanced")
LEAVES = ("fm_jax.models", "fm_jax.train")
"""Not annotated with shapes, and slow to run."""
T, BATCH = 0.4, 3
called, failed, refused = [], {}, {}


ALL = ("eager", "numpy", "traced")
HOST = ("numpy", "traced")
"""Where a call compiles something: once is enough."""


def attempt(name, function, *args, hows=ALL):
    """Calls as a user may: with JAX's arrays, with NumPy's, and traced."""
    numpy = jax.tree.map(np.asarray, args)
    calls = {
        "eager": lambda: function(*args),
        "numpy": lambda: function(*numpy),
        "traced": lambda: jax.eval_shape(lambda *args: leaves(function(*args)), *args),
    }
    for how in hows:
        called.append(f"{name} ({how})")
        try:
            calls[how]()
        except Exception as error:
            failed[called[-1]] = f"{type(error).__name__}: {error}"[:600]


def leaves(tree):
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def refuse(name, function, *args):
    try:
        function(*args)
        refused[name] = "nothing"
    except Exception as error:
        refused[name] = type(error).__name__


def examples():
    """The examples in the docstrings."""
    import fm_jax

    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    for info in pkgutil.walk_packages(fm_jax.__path__, "fm_jax."):
        if info.name in NEED_EXTRAS or info.name.startswith(LEAVES):
            continue
        for each in doctest.DocTestFinder().find(importlib.import_module(info.name)):
            if not each.examples:
                continue
            said = []
            called.append(f"{each.name} (doctest)")
            if runner.run(each, out=said.append, clear_globs=False).failed:
                failed[called[-1]] = "".join(said)[-600:]


def contract():
    """Every value that is listed, in the ways that it is used."""
    import contracts

    from fm_jax import guidance, likelihood, oracles, parameterization, rates, samplers, schedules, shapes
    from fm_jax.conditions import DropCondition
    from fm_jax.self_conditioning import self_conditioned

    key = jax.random.key(0)
    linear = schedules.Linear()
    x = jax.random.normal(key, (BATCH, 2))
    images = jnp.ones((BATCH, 4, 4, 1))
    each = jnp.array([0.2, 0.4, 0.7])
    times = {"number": T, "integer": 0, "scalar": jnp.asarray(T), "batch": each}

    ways = {which: ("eager", "numpy") if which == "integer" else ALL for which in times}  # traced, it may be a step
    for which, t in times.items():
        attempt(f"expand_time, t a {which}", shapes.expand_time, t, images, hows=ways[which])
        attempt(f"batch_time, t a {which}", shapes.batch_time, t, images, hows=ways[which])
    for schedule in contracts.SCHEDULES:
        for t in (T, each, jnp.full((2, 2), T)):
            attempt(f"coefficients of {schedule}", lambda t, s=schedule: schedules.coefficients(s, t), t)
            attempt(f"{schedule}.alpha", schedule.alpha, t)
            attempt(f"{schedule}.sigma", schedule.sigma, t)
            attempt(f"inverse of {schedule}", schedule.t_from_log_snr, t)
        convert = lambda t, x, s=schedule: parameterization.convert("data", x, t, x, s)  # noqa: E731
        attempt(f"convert, {schedule}", convert, each, images)
    for which, t in times.items():
        v = parameterization.velocity_fn(lambda t, x, cond: -x, "data", linear)
        attempt(f"velocity_fn, t a {which}", v, t, images, hows=ways[which])
        attempt(f"score_fn, t a {which}", parameterization.score_fn(v, linear), t, images, hows=ways[which])
        moved = parameterization.reschedule(v, linear, schedules.Cosine())
        attempt(f"reschedule, t a {which}", moved, t, images, hows=ways[which])
    for source in contracts.SOURCES:
        for like in (jax.ShapeDtypeStruct((BATCH, 2), jnp.bfloat16), np.zeros((BATCH, 2), np.float32), x):
            attempt(f"draw of {source}", lambda source=source, like=like: source.draw(key, like))
        if not str(source).startswith("Sampled"):
            attempt(f"log_prob of {source}", source.log_prob, images)
    for sampler in contracts.TIME_SAMPLERS:
        attempt(f"{sampler}", lambda sampler=sampler: sampler(key, BATCH))
        attempt(
            f"quantiles of {sampler}", lambda sampler=sampler: samplers.grids.quantiles(4, sampler, *sampler.domain)
        )
    attempt("quantiles", lambda: samplers.grids.quantiles(4, contracts.TIME_SAMPLERS[0]), hows=HOST)
    for path in contracts.PATHS:
        for which, t in times.items():
            if which == "integer":
                continue  # an end, where not all targets are finite
            ends = (jnp.ones((BATCH, len(path.times), 2)),) if path.source is None else (x, x + 1)
            sample = lambda t, *ends, p=path: p.targets(p.sample(key, t, *ends))  # noqa: E731
            attempt(f"{path}, t a {which}", sample, t, *ends, hows=HOST)
    tokens, uniform = jnp.ones((BATCH, 2, 3), int), contracts.TOKEN_PATHS[1]
    for source in contracts.TOKEN_SOURCES:
        attempt(f"draw of {source}", lambda like, source=source: source.draw(key, like), tokens)
        attempt(f"log_prob of {source}", source.log_prob, tokens)
    for path in contracts.TOKEN_PATHS:
        f = lambda t, x, p=path: jnp.zeros((*x.shape, p.num_tokens))  # noqa: E731
        kinds = [rates.kinetic_rates] + [rates.forward_rates, rates.reversal_rates] * hasattr(path, "schedule")
        for which, t in times.items():
            if which == "integer":
                continue  # an end, where not all rates are finite
            attempt(f"{path}, t a {which}", lambda t, x, p=path: p.sample(key, t, x, x), t, tokens, hows=HOST)
            for kind in kinds:
                u = kind(f, path)
                attempt(f"{kind.__name__} of {path}, t a {which}", u, t, tokens, hows=HOST)
        for scale in (2.0, each):
            attempt("classifier_free_logits", guidance.classifier_free_logits(f, f, scale), T, tokens, hows=HOST)
            attempt("classifier_free_rates", guidance.classifier_free_rates(u, u, scale), T, tokens, hows=HOST)
            log_prob = lambda t, x: 0.1 * x.reshape(len(x), -1).sum(axis=1)  # noqa: E731
            for make in (guidance.predictor, guidance.predictor_taylor):
                attempt(make.__name__, make(u, log_prob, scale), T, tokens, hows=HOST)
    plain = rates.forward_rates(lambda t, x: jnp.zeros((*x.shape, 3)), uniform)
    u = rates.with_corrector(plain, uniform, 2.0)
    attempt("with_corrector", u, T, tokens, hows=HOST)
    table = oracles.token_table(np.full((3, 3), 1 / 9))
    attempt("exact_denoiser", oracles.exact_denoiser(table, uniform), each, tokens[:, 0, :2], hows=HOST)
    states = oracles.all_states(table)
    attempt("rate_matrix", lambda: oracles.rate_matrix(u, T, states, 3), hows=("eager",))
    attempt("token_posterior", lambda: oracles.token_posterior(table, uniform, T, states), hows=("eager",))
    integers = jnp.arange(BATCH * 2).reshape(BATCH, 2)
    attempt("path between integers", lambda x: contracts.PATHS[0].sample(None, each, x, x), integers)
    for name, coupling in contracts.COUPLINGS.items():
        attempt(f"{name}", lambda x0, x1, c=coupling: c(key, x0, x1), images, images + 1)
        labels = jnp.array([0, 0, 1])
        attempt(f"{name} with labels", lambda x0, x1, c, f=coupling: f(key, x0, x1, c), x, x + 1, labels)
    for rule in contracts.RULES:
        for scale in (2.0, each):
            attempt(f"{rule}", rule, each, images, images, 2 * images, scale)
    for scale in (2, 2.0, each):
        v = guidance.classifier_free(lambda t, x: x, lambda t, x: 0 * x, scale, interval=(0.1, 0.9))
        attempt("classifier_free", v, T, images, hows=HOST)
        v = guidance.classifier(lambda t, x: x, lambda t, x: x.sum(axis=1), scale, linear)
        attempt("classifier", v, T, x, hows=HOST)
    attempt("DropCondition", lambda c: DropCondition(0.5, -1)(key, c), jnp.arange(BATCH))
    for divergence in contracts.DIVERGENCES:
        attempt(
            f"{divergence}",
            lambda t, x, d=divergence: d(lambda t, x: x**2, d.draw(key, x), t, x),
            each,
            images,
        )
        midpoint = samplers.RungeKutta("midpoint")
        for solve in (likelihood.log_prob, likelihood.encode_and_log_prob, likelihood.sample_and_log_prob):
            options = {"key": key, "divergence": divergence, "sampler": midpoint, "times": 2}
            attempt(
                f"{solve.__name__}, {divergence}",
                lambda x, f=solve, o=options: f(lambda t, x: -x, x, **o),
                x,
                hows=HOST,
            )
    for name, make in {**contracts.FIXED_STEPS, **contracts.LEARNED}.items():
        sampler = make(linear)
        options = {"key": key if sampler.stochastic else None, "times": None if name == "learned" else 2}
        sample = lambda x, s=sampler, o=options: samplers.sample(lambda t, x: -x, x, s, **o)  # noqa: E731
        attempt(f"{name}", sample, x, hows=HOST)

    def apply_fn(params, t, x, cond, *, train, rngs):
        return params["w"] * x if "w" in params else params["latent"]["w"] * x

    w = {"w": jnp.ones(())}
    for name, make in contracts.LOSSES.items():
        params = {"drift": w, "latent": w} if name == "bridge_matching" else w
        batch = {"x": jnp.ones((BATCH, 3, 2))} if name == "trajectory_matching" else {"x0": x, "x1": x + 1}
        batch = {**batch, "weight": each} | ({} if name == "distillation" else {"t": each})
        loss_fn = make(apply_fn)
        attempt(f"{name}", lambda params, batch, f=loss_fn: f(params, key, batch), params, batch, hows=HOST)
    denoiser = lambda t, x: jnp.zeros((*x.shape, 5))  # noqa: E731
    for name, make in contracts.TOKEN_LOSSES.items():
        loss_fn = make(lambda params, t, x, cond, *, train, rngs: params["w"] * denoiser(t, x))
        batch = {"x1": tokens, "weight": each, "t": each}
        attempt(name, lambda params, batch, f=loss_fn: f(params, key, batch), w, batch, hows=HOST)

    def told(params, t, x, cond, *, train, rngs, estimate=None):
        return params["w"] * denoiser(t, x) + (0 if estimate is None else estimate)

    loss_fn, batch = contracts.TOKEN_LOSSES["masked_elbo"](self_conditioned(told)), {"x1": tokens, "t": each}
    attempt("self_conditioned", lambda params, batch: loss_fn(params, key, batch), w, batch, hows=HOST)
    for make in (samplers.MixtureSteps, samplers.FirstHitting):
        for f, carry in ((self_conditioned(told), False), (told, True)):
            sampler = make(contracts.TOKEN_PATHS[0], carry_estimate=carry)
            draw = lambda x0, f=f, sampler=sampler: samplers.sample(  # noqa: E731
                parameterization.bind(f, w), x0, sampler, times=2, key=key
            )
            attempt(f"{sampler}", draw, jnp.full((BATCH, 2), 4), hows=HOST)
    for bound in ("mask", "reversal", "forward"):
        found = lambda x1, bound=bound: likelihood.token_bound(  # noqa: E731
            denoiser, contracts.TOKEN_PATHS[0], key, x1, bound=bound, num_times=2
        )
        attempt(f"token_bound, {bound}", found, tokens)
    order = lambda x1: likelihood.any_order_log_prob(denoiser, contracts.TOKEN_PATHS[0], key, x1)  # noqa: E731
    attempt("any_order_log_prob", order, tokens)
    late = lambda x1: likelihood.next_token_log_prob(denoiser, contracts.TOKEN_PATHS[0], x1)  # noqa: E731
    attempt("next_token_log_prob", late, tokens)
    for unit in (likelihood.bits_per_token, likelihood.perplexity):
        attempt(unit.__name__, lambda nats, unit=unit: unit(nats, 3), each)
    for weight in contracts.WEIGHTS:
        attempt(f"{weight}", lambda t, w=weight: w(t, "velocity", linear), each)
    mixture = contracts.mixture()
    for which, t in times.items():
        attempt(
            f"oracles.log_prob, t a {which}",
            lambda t, x: oracles.log_prob(mixture, linear, t, x),
            t,
            x,
            hows=ways[which],
        )
        attempt(
            f"oracles.prediction, t a {which}",
            lambda t, x: oracles.prediction(mixture, linear, t, x),
            t,
            x,
            hows=ways[which],
        )


def wrong_calls():
    from fm_jax import guidance, likelihood, losses, parameterization, paths, schedules, shapes
    from fm_jax.types import Elementwise, PerExample, State

    @jaxtyping.jaxtyped(typechecker=check)
    def sums(x: State) -> PerExample:
        return x.sum(axis=0)

    @jaxtyping.jaxtyped(typechecker=check)
    def first(t: Elementwise) -> Elementwise:
        return t[:1]

    x, linear = jnp.ones((BATCH, 2)), schedules.Linear()
    refuse("t of another batch", parameterization.convert, "data", x, jnp.ones(2), x, linear)
    refuse("t with the axes of x", paths.AffinePath().sample, None, jnp.ones((BATCH, 1)), x, x)
    refuse("x0 of another event", paths.AffinePath().sample, None, T, jnp.ones((BATCH, 3)), x)
    refuse("x without a batch", shapes.mean_over_event, jnp.ones(()))
    refuse("complex x", likelihood.log_prob, lambda t, x: x, x + 1j)
    refuse("an example for a time", guidance.Extrapolate(), x, x, x, x, 2.0)
    refuse("a state for the times of a weight", losses.SNRWeight(), x, "data", linear)
    refuse("a class for a schedule", parameterization.convert, "data", x, T, x, 0.5)
    refuse("a sum over the wrong axis", sums, x)
    refuse("another shape than that of t", first, jnp.ones(BATCH))


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # This file once more, as a module: the hook imports the checker by name.
    with jaxtyping.install_import_hook("fm_jax", "annotated.check"):
        for part in (examples, contract, wrong_calls):
            part()
            print(f"{part.__name__}: {time.process_time():.0f} s", file=sys.stderr)
    json.dump({"called": called, "failed": failed, "refused": refused}, sys.stdout)
