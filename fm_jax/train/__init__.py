"""Training: state, optimiser, step, devices, checkpoints, metrics, loop. Import the modules, or these names."""

from fm_jax.train.ema import update_ema as update_ema
from fm_jax.train.optim import make_optimizer as make_optimizer
from fm_jax.train.optim import make_schedule as make_schedule
from fm_jax.train.state import TrainState as TrainState
from fm_jax.train.state import create_state as create_state
from fm_jax.train.step import make_step as make_step
