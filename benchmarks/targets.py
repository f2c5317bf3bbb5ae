"""The devices that a program is compiled for, whether they are at hand or not.

XLA's compilers for GPUs and TPUs run on any machine, and what they say of memory and collectives is what the device
would be given. They come as packages, best in a folder of their own; no device, driver or CUDA library is needed:

    pip install --no-deps --target compilers libtpu==0.0.42.* jax-cuda12-pjrt==0.10.2 jax-cuda12-plugin==0.10.2 \
        nvidia-cuda-nvcc-cu12==12.9.*
    JAX_PLATFORMS=cpu PYTHONPATH=compilers python -m benchmarks.memory --targets h200 v5e

Of versions: those that the extras `tpu` and `cuda12` of the installed jax name. Without cuDNN, attention is XLA's, and
convolutions are given no workspace.
"""

import contextlib
import os
from typing import Any, Literal, get_args

import jax
from jax.experimental import topologies

Target = Literal["cpu", "h100", "h200", "v5e", "v6e", "v5p"]
NUM_CPU_DEVICES = 64
BYTES = {"h100": 80e9, "h200": 141e9, "v5e": 16e9, "v6e": 32e9, "v5p": 95e9}
"""Memory of one device as its maker gives it."""

OPTIONS: dict[str, dict[str, str | bool]] = {
    target: {"xla_gpu_enable_triton_gemm": False} for target in ("h100", "h200")
}
"""Of the compilers without a device: Triton's products would be tried on it first."""

# Compute capability 9.0; the sizes that decide how a program is cut are those of XLA's own description of an H100.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {size} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_GPUS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "bandwidth": 3352320000000, "size": 84929347584},
    "h200": {"name": "NVIDIA H200 141GB HBM3e", "bandwidth": 4800000000000, "size": 151397597184},
}
_TOPOLOGIES = {
    "v5e": {8: "v5e:2x4", 64: "v5e:8x8"},
    "v6e": {8: "v6e:2x4", 64: "v6e:8x8"},
    "v5p": {8: "v5p:2x2x2", 64: "v5p:4x4x4"},
}


def devices(target: Target, num: int) -> list[Any]:
    """That many devices of one kind; simulated ones for `"cpu"`, for the compiler alone otherwise.

    Raises:
        ValueError: for an unknown target or number.
        ImportError: if the compiler is not installed.
    """
    compute_on_cpu()
    if target == "cpu":
        if len(found := jax.devices("cpu")) < num:
            raise ValueError(f"num must be at most {len(found)}, the simulated devices, got {num}.")
        return found[:num]
    try:
        if target in _GPUS:
            config = _HOPPER.format(**_GPUS[target])
            found = topologies.get_topology_desc(target, "cuda", target_config=config, topology=f"1x1x{num}").devices
        elif target in _TOPOLOGIES:
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask
            names = _TOPOLOGIES[target]
            name = names[min((size for size in names if size >= num), default=64)]
            found = topologies.get_topology_desc(name, "tpu").devices
        else:
            raise ValueError(f"target must be one of {get_args(Target)}, got {target!r}.")
    except (NotImplementedError, RuntimeError) as error:
        raise ImportError(
            f"the compiler for {target} is not installed; see benchmarks/targets.py. ({error})"
        ) from error
    if len(found) < num:
        raise ValueError(f"num must be at most {len(found)} for {target}, got {num}.")
    return list(found)[:num]


def compute_on_cpu() -> None:
    """Leaves accelerators alone and simulates CPU devices, where JAX has not begun yet."""
    with contextlib.suppress(RuntimeError):
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)
        jax.config.update("jax_platforms", "cpu")
