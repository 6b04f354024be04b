"""Shared set-up: eight virtual CPU devices, a persistent compilation cache, shapes checked at run time.

Everything here happens before the first import of jax or of jaxdiff.
"""

import ctypes
import gc
import importlib.metadata
import os
import resource
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# PyTorch's threads wait in loops: two test processes with two threads each spend a third of two cores on waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Scripts that a test starts find the commands, which are not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
# Child processes inherit the cache, so that a script started by a test reuses what another one compiled. Of tests that
# run in several processes (pytest -n) each has its own: jax writes without a lock, and reads what is half written.
_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(tempfile.gettempdir()) / "jaxdiff-test-cache")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(_CACHE) / os.environ.get("PYTEST_XDIST_WORKER", ""))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of the suite's time is compilation: with few optimizations it takes half, and with the older code generator of
# fused operations, where jaxlib still has it, a third of that. test_jaxlib.py has the compiler's own settings.
_FLAGS: dict[str, int | str] = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
    "xla_cpu_opt_preset": "FAST_COMPILE",
    "xla_cpu_parallel_codegen_split_count": 1,
}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS["xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

_HOOK = install_import_hook("jaxdiff", "beartype.beartype")

MEMORY_MAPS = 12_000
"""Of 65,530 that Linux gives a process. Every compiled program takes some: the whole suite took all, and crashed."""
MEMORY = 2 << 30
"""Bytes of resident memory."""


@pytest.fixture(autouse=True, scope="module")
def bounded_caches():
    """After a module, compiled programs are let go where they have become many. Later ones read them from the disk."""
    yield
    if _many_programs():
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system


@pytest.fixture(scope="module")
def shared_steps():
    """Runs of a module with the same settings share one training step: it is traced and compiled once, not by each."""
    from jaxdiff.training import loop

    made, real = {}, loop.make_step

    def make_step(*arguments, **options):
        leaves, structure = jax.tree.flatten((arguments, options))
        key = structure, tuple(leaves)
        if key not in made:
            made[key] = real(*arguments, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", make_step)
        yield


@pytest.fixture
def small_disk():
    """No file may grow beyond 1 MB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _many_programs() -> bool:
    try:
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return True
    return maps > MEMORY_MAPS or resident > MEMORY


def pytest_terminal_summary(terminalreporter):
    """Tables that tests recorded, whichever process ran them."""
    for report in (*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())):
        for name, table in report.user_properties:
            if name == "table" and report.when == "call":
                terminalreporter.write_line(f"\n{table}\n")


def pytest_sessionfinish(session, exitstatus):
    """In CI every test runs: a skipped one (a missing PyTorch, say) fails the session, where PyTorch is asked for."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    must_run = os.environ.get("CI") and sys.version_info < (3, 12)
    if must_run and reporter and reporter.stats.get("skipped") and exitstatus == 0:
        reporter.write_line("skipped tests are failures in CI", red=True)
        session.exitstatus = 1
