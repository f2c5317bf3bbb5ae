"""The page of messages: each one that it quotes is what the library says, to the letter."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax import couplings, likelihood, losses, models, parameterization, paths, samplers, schedules, times, train
from fm_jax.samplers import RungeKutta, sample
from fm_jax.train.checkpoint import Checkpointer
from fm_jax.train.folder import lock_folder
from fm_jax.train.loop import fit
from fm_jax.train.parallel import pmap_step

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "when_it_fails.md"
QUOTED = re.findall(r"^### `(.*)`$", PAGE.read_text(), flags=re.MULTILINE)
KEY, X = jax.random.key(0), jnp.ones((4, 2))
PATH = paths.AffinePath()
OPTIMIZER = optax.sgd(0.1)


def network(params, t, x, cond, *, train, rngs):
    return params * x


def v(t, x):
    return -x


def loss(params, key, batch):
    return params * jnp.mean(batch["x1"]), {}


class Data:
    """Batches without end."""

    def __next__(self):
        return {"x1": X}

    def get_state(self):
        return {}

    def set_state(self, state):
        """Nothing."""


def run(folder, config, scale):
    checkpointer = Checkpointer(folder, config)
    state = train.create_state(jnp.asarray(scale), OPTIMIZER)
    try:
        checkpointer.restore(state)
        step = jax.jit(train.make_step(loss, OPTIMIZER, axis_name=None))
        options = {"num_steps": 1, "batch_to_device": lambda batch: batch, "images_per_batch": 4, "progress": False}
        fit(step, state, KEY, Data(), checkpointer=checkpointer, **options)
    finally:
        checkpointer.close()


def other_run(folder):
    run(folder, {"learning_rate": 0.1}, 1.0)
    run(folder, {"learning_rate": 0.2}, 1.0)


def twice_at_once(folder):
    with lock_folder(folder), lock_folder(folder):
        pass


def flow(**options):
    return losses.flow_matching(network, PATH, **options)


def at_time_one():
    return flow(kind="score")(1.0, KEY, {"x1": X, "t": jnp.ones(4)})


CALLS = {
    "what the network returns": lambda _: losses.flow_matching(lambda p, t, x, c, **_: x[:, :1], PATH)(
        1.0, KEY, {"x1": X}
    ),
    "apply_fn must be": lambda _: losses.flow_matching(models.MLP((4,)), PATH),
    "cond must be": lambda _: flow()(1.0, KEY, {"x1": X, "cond": jnp.arange(3)}),
    "schedule must be": lambda _: samplers.DDIM(schedules.Linear),
    "coupling must be": lambda _: flow(coupling="minibatch_ot"),
    "key must be one": lambda _: flow()(1.0, jax.random.PRNGKey(0), {"x1": X}),
    "key must be given": lambda _: sample(v, X, samplers.EulerMaruyama(schedules.Linear())),
    "x1 must be": lambda _: flow()(1.0, KEY, {"x1": np.zeros((4, 2), np.uint8)}),
    "times must be within": lambda _: sample(v, X, times=[80.0, 40.0, 0.0]),
    "t must be within": lambda _: at_time_one(),
    "time_sampler draws": lambda _: flow(kind="score", time_sampler=times.Uniform()),
    "The velocity says nothing": lambda _: sample(
        v, X, samplers.DDIM(schedules.Polynomial(2.0)), times=np.linspace(0, 1, 3)
    ),
    "r must be within": lambda _: parameterization.reschedule(v, schedules.VP(), schedules.Linear())(0.001, X),
    "the step averages": lambda _: jax.jit(train.make_step(loss, OPTIMIZER))(
        train.create_state(jnp.ones(()), OPTIMIZER), KEY, {"x1": X}
    ),
    "the batch must be": lambda _: pmap_step(train.make_step(loss, OPTIMIZER))(
        train.create_state(jnp.ones(()), OPTIMIZER), KEY, {"x1": jnp.ones((3, 2))}
    ),
    "x0 must be float32": lambda _: sample(v, X.astype(jnp.bfloat16), samplers.Adaptive()),
    "the solve has not converged": lambda _: likelihood.bits_per_dim(
        lambda t, x: 50 * jnp.sin(9 * x), KEY, np.ones((2, 2), int), levels=4, sampler=RungeKutta("euler"), times=2
    ),
    "Not finite": lambda folder: run(folder, {}, jnp.inf),
    "... comes from": other_run,
    "... is in use": twice_at_once,
}


def test_there_are_twenty():
    assert len(QUOTED) == len(CALLS) == 20


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: quoted[:30])
def test_the_library_says_so(quoted, tmp_path):
    (call,) = (call for start, call in CALLS.items() if quoted.startswith(start))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(tmp_path)
    said = str(caught.value).partition("\n---")[0]
    assert re.fullmatch(re.escape(quoted).replace(r"\.\.\.", ".*") + ".*", said, flags=re.DOTALL), said


def test_a_coupling_in_its_place_is_taken():
    assert np.isfinite(flow(coupling=couplings.minibatch_ot)(1.0, KEY, {"x1": X})[0])
