"""XLA flags that were found by measurement to be worth having, for all experiments and benchmarks."""

import os
from importlib.metadata import version

MEASURED_WITH = ("0.10.", "0.11.")
"""Versions of jaxlib. A flag that another one does not know would end the process."""
FLAGS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Flags and their values.

* `xla_cpu_experimental_ynn_fusion_type`: on a CPU convolutions go to Eigen in place of YNNPACK. Two cores, jax 0.10.2,
  float32: an evaluation of the MNIST U-Net takes 0.53 of the time, its training step 0.73, of CIFAR-10's 0.91, of
  DiT-S/2's 0.95; matrix products alone gain nothing. `python -m benchmarks.train_step`, with the flag and without.

On GPUs and TPUs: not yet measured. Candidates are those of `benchmarks/gpu.py`.
"""
QUICK = {"xla_cpu_use_fusion_emitters": "false"}
"""Flags for programs that run a few times, of jaxlib 0.10: on two cores a U-Net's training step, whose optimiser has
six fused loops for each parameter, compiles in half of the time."""


def use_flags(*, smoke: bool = False) -> None:
    """Adds the flags to `XLA_FLAGS`, except those that stand there already; before JAX looks for devices.

    Args:
        smoke: whether the run has next to no computation, and is to compile soon.
    """
    jaxlib = version("jaxlib")
    if not jaxlib.startswith(MEASURED_WITH):
        return
    flags = FLAGS | (QUICK if smoke and jaxlib.startswith("0.10.") else {})
    given = os.environ.get("XLA_FLAGS", "")
    names = {each.removeprefix("--").partition("=")[0] for each in given.split()}
    added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *added])
