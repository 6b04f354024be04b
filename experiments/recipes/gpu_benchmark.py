"""GPU report: training steps of all presets, and the matrix product rate measured on the same card.

Steps are compiled in groups, in threads; then each is timed alone. FLOPs are those of the network's convolutions and
matrix products, without cuDNN's attention, so the fractions of a peak are lower bounds.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import jax
import jax.numpy as jnp

from experiments import benchmark
from experiments.benchmark import Asked, BenchmarkSettings, Training
from experiments.recipes.gpu_section import Context, median_seconds
from experiments.table import TASKS
from experiments.tasks.diffusion import UNetCompute
from jaxdiff.nets.execution import Remat


def _asked(stage: str, preset: str, batch: int, dtype: str = "bfloat16", remat: Remat = "none") -> Asked:
    name = f"imagen.{stage}"
    return Asked(name, TASKS[name], BenchmarkSettings(preset, batch, compute=UNetCompute(dtype, remat)))


PRESETS = {
    "base64 500m": _asked("base64", "500m", 64),
    "sr256 paper": _asked("sr256", "paper", 64),
    "base64 tiny": _asked("base64", "tiny", 512),
    "base64 2b": _asked("base64", "2b", 16, remat="outputs"),
    "base64 300m": _asked("base64", "300m", 64),
    "sr1024 paper": _asked("sr1024", "paper", 64),
    "base64 tiny, float32": _asked("base64", "tiny", 512, "float32"),
    "sr256 tiny": _asked("sr256", "tiny", 256),
}
GROUP = 4
"""Presets compiled at once, before any is timed, as a compilation occasionally occupies the accelerator."""
TIMING = 25.0
"""Seconds reserved for timing a group."""
TINY = {"sr256 tiny": _asked("sr256", "tiny", 8, "float32")}


def main(context: Context) -> None:
    """Measure the peak, then the presets in the order above, until the time is over."""
    peak = matrix_peak(256 if context.tiny else 8192)
    device = jax.devices()[0].device_kind
    context.record(device=device, jax=jax.__version__, measured_bfloat16_tflops=peak / 1e12)
    chosen = TINY if context.tiny else PRESETS
    for first in range(0, len(chosen), GROUP):
        group = dict(list(chosen.items())[first : first + GROUP])
        pool = ThreadPoolExecutor(min(GROUP, os.cpu_count() or 1))
        compiled = {name: pool.submit(benchmark.compile_training, asked) for name, asked in group.items()}
        wait(compiled.values(), max(0.0, context.left() - TIMING))
        late = [name for name, training in compiled.items() if not training.done()]
        for name, training in compiled.items():
            if name not in late:
                context.attempt(name, partial(_time, context, name, training, peak, bool(late)))
        if late:
            for name in [*late, *list(chosen)[first + GROUP :]]:
                context.record(not_measured=name, why="its compilation was not done in time")
            os._exit(0)  # a compilation cannot be interrupted, and its result is not needed
        compiled.clear()


def matrix_peak(side: int) -> float:
    """FLOP/s of the product of two random bfloat16 matrices."""
    x, y = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16)
    product = jax.jit(lambda x, y: x @ y)
    return 2 * side**3 / median_seconds(partial(product, x, y), 10)


def _time(context: Context, name: str, compiled: Future[Training], peak: float, disturbed: bool) -> None:
    training = compiled.result()
    begun = time.time()
    row = training.timed(2 if context.tiny else 10)
    useful = row.flops_per_example * row.batch
    context.record(
        preset=name,
        parameters_m=round(row.parameters / 1e6, 1),
        batch=f"{row.batch} × {row.side}²",
        dtype=row.dtype,
        remat=training.asked.settings.compute.remat,
        gflop_per_image=row.flops_per_example / 1e9,
        step_ms=1e3 * row.step_seconds,
        images_per_second=row.examples_per_second,
        fraction_of_published_peak=row.fraction_of_peak,
        fraction_of_measured_peak=useful / row.step_seconds / (peak * jax.device_count()),
        memory_gib=row.memory / 2**30,
        compile_s=round(row.compile_seconds, 1),
        timing_s=round(time.time() - begun, 1),
        while_others_compiled=disturbed,
    )
    jax.clear_caches()
