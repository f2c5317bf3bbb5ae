"""Four simulated devices, strict rank promotion, and a compilation cache that makes the second run quick."""

import os
import tempfile
from pathlib import Path

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "fm_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_xdist_auto_num_workers():
    """One more than there are cores, for some tests wait: for other processes, or for a compiler with one thread."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Double precision, for convergence orders and derivatives by differences."""
    with jax.enable_x64(True):
        yield
