"""How a CPU is split for training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.options.cores import devices_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("batches", "cores", "devices"),
    [
        ((32,), 1, 1),
        ((32,), 2, 2),
        ((64, 32, 16), 16, 2),  # eight examples a device at the least, of the smallest batch
        ((256,), 64, 32),
        ((48,), 5, 4),
        ((24, 32), 16, 1),  # nothing but 8 divides both
        ((7,), 4, 1),
        ((0,), 4, 1),  # said to be wrong elsewhere
    ],
)
def test_a_device_for_each_core_that_every_batch_can_use(batches, cores, devices):
    assert devices_for(batches, cores) == devices


def test_small_images_share_a_device():
    assert devices_for((64,), 4, least=32) == 2 and devices_for((16,), 4, least=64) == 1


def counted(code: str, **environment: str) -> list[str]:
    """What `code` prints in a process of its own, as words."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    code = (
        f"import jax; from experiments.options.cores import devices_for, use_cores; {code}; print(jax.device_count())"
    )
    command = [sys.executable, "-c", code]
    environment = inherited | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_first_call_counts_and_comes_before_the_first_computation():
    cores = len(os.sched_getaffinity(0))
    expected = str(devices_for((64, 16), cores))
    assert counted("use_cores(64, 16); use_cores(7)") == [expected]
    assert counted("print(jax.device_count()); use_cores(64)") == ["1", "1"]


def test_what_the_user_says_stands():
    assert counted("use_cores(64)", XLA_FLAGS="--xla_force_host_platform_device_count=3") == ["3"]
    assert counted("use_cores(64)", JAX_NUM_CPU_DEVICES="5") == ["5"]
