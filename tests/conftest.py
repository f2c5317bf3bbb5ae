"""Four simulated devices, strict rank promotion, quick compilation and a cache that makes the second run quicker."""

import gc
import importlib.metadata
import os
from pathlib import Path

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs run once: compiling them is what takes the time, less without LLVM's optimisations.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that jaxlib does not know ends the process
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {QUICK}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # The user's own, and nobody else's: what lies in there is executed.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fm_jax" / "tests"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of tests marked `slow_but_one` the first case that is not `slow` itself stays quick; before -m chooses."""
    seen = set()
    for item in items:
        if item.get_closest_marker("slow_but_one") and not item.get_closest_marker("slow"):
            family = item.nodeid.partition("[")[0]
            if family in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(family)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Between two files, a process that has grown large forgets its programs, which else would fill a machine."""
    if (nextitem is None or nextitem.path != item.path) and memory() > 3 * 2**30:
        jax.clear_caches()
        gc.collect()


def memory():
    """Bytes that this process holds now, where Linux tells; elsewhere 0."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def pytest_runtest_setup(item):
    if item.get_closest_marker("parity"):
        reason = "torch is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md"
        pytest.importorskip("torch", reason=reason)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Double precision, for convergence orders and derivatives by differences."""
    with jax.enable_x64(True):
        yield
