"""A run small enough to be killed in a test: an MLP on pmapped steps, saving often.

python train_script.py RUN_DIR [--hold FILE] [--full-at BATCH] [--steps NUM] [--no-log]

While FILE exists, the data stop after batch `HOLD_AT`; from batch BATCH on no file can become longer than 64 bytes.
"""

import argparse
import contextlib
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.command_line import told_in_a_sentence
from fm_jax.train.checkpoint import Checkpointer
from fm_jax.train.folder import lock_folder
from fm_jax.train.log import MetricsWriter
from fm_jax.train.loop import fit
from fm_jax.train.optim import make_optimizer
from fm_jax.train.parallel import pmap_step, split_batch
from fm_jax.train.state import create_state
from fm_jax.train.step import make_step

NUM_STEPS, SAVE_EVERY, HOLD_AT = 240, 12, 200
CONFIG = {"learning_rate": 1e-2, "width": 8, "seed": 0, "total_steps": NUM_STEPS}


class Batches:
    """Batch number i depends on nothing but i."""

    def __init__(self, hold: Path | None = None, full_at: int | None = None):
        self.position, self.hold, self.full_at = 0, hold, full_at

    def __next__(self):
        while self.hold is not None and self.position >= HOLD_AT and self.hold.exists():
            time.sleep(0.01)
        if self.position == self.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        rng = np.random.default_rng([7, self.position])
        self.position += 1
        return {"x1": rng.normal(size=(8, 3)).astype(np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def loss_fn(params, key, batch):
    x1 = batch["x1"]
    key_x0, key_t = jax.random.split(key)
    x0 = jax.random.normal(key_x0, x1.shape)
    t = jax.random.uniform(key_t, (x1.shape[0], 1))
    hidden = jnp.tanh((t * x1 + (1 - t) * x0) @ params["w1"])
    return jnp.mean((hidden @ params["w2"] - (x1 - x0)) ** 2), {}


def build():
    """Returns the optimiser and a new state."""
    optimizer = make_optimizer(1e-2, total_steps=NUM_STEPS, warmup_steps=5, decay="cosine", weight_decay=1e-2)
    keys = jax.random.split(jax.random.key(3))
    params = {"w1": jax.random.normal(keys[0], (3, 8)), "w2": jax.random.normal(keys[1], (8, 3))}
    return optimizer, create_state(params, optimizer, ema_decays=(0.9, 0.999))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--hold", type=Path)
    parser.add_argument("--full-at", type=int)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--no-log", action="store_true")
    options = parser.parse_args()
    with told_in_a_sentence(), lock_folder(options.run_dir):
        train(options)


def train(options):
    optimizer, state = build()
    key, data = jax.random.key(11), Batches(options.hold, options.full_at)
    checkpointer = Checkpointer(options.run_dir, CONFIG, keep=2, save_every=SAVE_EVERY)
    restored = checkpointer.restore(state)
    if restored is not None:
        state, key, data_state = restored
        data.set_state(data_state)
    writer = None if options.no_log else MetricsWriter(options.run_dir, int(state.step))
    with contextlib.closing(checkpointer), contextlib.closing(writer) if writer else contextlib.nullcontext():
        fit(
            pmap_step(make_step(loss_fn, optimizer)),
            state,
            key,
            data,
            num_steps=options.steps,
            batch_to_device=lambda batch: split_batch(batch, jax.local_device_count()),
            images_per_batch=8,
            checkpointer=checkpointer,
            writer=writer,
            log_every=5,
        )


if __name__ == "__main__":
    main()
