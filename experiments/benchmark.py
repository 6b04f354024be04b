"""Benchmark any preset of any model on the available devices: speed and size.

    python -m experiments.benchmark imagen.base64
    python -m experiments.benchmark imagen.base64 --preset 300m --batch 64 --dtype bfloat16 --json runs/300m.json
    python -m experiments.benchmark imagen.base64 --preset 2b --steps 0     # count and compile only

Prints a table (Markdown): parameters; FLOPs per example of the network's convolutions and matrix products, in a
training step (forward and backward) and in an inference step (sampling full images with guidance, encoding captions);
compile time; median step time; examples per second; fraction of the devices' published peak; peak memory. Training uses
random batches that are already on the devices; super-resolution uses crops of a quarter of the image's side, as in
`experiments.train`. The tiny presets take about a minute each on 2 CPU cores.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.cli import Command, run
from experiments.options.training import ComputeOptions
from experiments.table import TASKS
from experiments.tasks.task import Task
from jaxdiff.core.files import usable_file, write_json
from jaxdiff.training.chips import PEAK_TFLOPS
from jaxdiff.training.compilation_cache import without_compilation_cache
from jaxdiff.training.mesh import batch_sharding, make_mesh, to_devices
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.plan import network_flops, training_flops
from jaxdiff.training.state import (
    Trainable,
    TrainState,
    abstract_frozen,
    abstract_params,
    abstract_state,
    placements_of,
)
from jaxdiff.training.step import make_step


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of the benchmark."""

    preset: str = "tiny"
    """Size of the network."""
    batch: int = 16
    """Examples per training step over all devices."""
    sample_batch: int = 1
    """Examples per sampling or encoding step; 0: skip it."""
    crop: int | None = None
    """Side of super-resolution's training images in pixels; default: a quarter of the resolution."""
    fsdp: int = 1
    """Number of devices over which each parameter is sharded."""
    steps: int = 10
    """Steps to time, after one warm-up step; 0: compile only."""
    json: Path | None = None
    """Write the numbers to this file."""
    compute: ComputeOptions = ComputeOptions()


@dataclasses.dataclass(frozen=True)
class Asked:
    """Benchmark settings of a task."""

    name: str
    task: Task
    settings: BenchmarkSettings

    @property
    def model(self) -> Trainable:
        return self.task.on_one_device(self.task.model(self.settings.preset, self.settings.compute))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; None: not measured. Times in seconds, memory in bytes per device."""

    model: str
    preset: str
    parameters: int
    batch: int
    side: int
    dtype: str
    flops_per_example: float
    compile_seconds: float
    memory: int
    step_seconds: float | None
    unit: str
    examples_per_second: float | None
    fraction_of_peak: float | None
    sampling_flops_per_example: float | None
    sampling_compile_seconds: float | None
    sampling_seconds: float | None


def commands(tasks: Mapping[str, Task] = TASKS) -> dict[str, Command]:
    """One command per task."""
    return {
        name: Command(partial(main, name, task), BenchmarkSettings(compute=task.settings.compute), task.about)
        for name, task in tasks.items()
    }


def main(name: str, task: Task, settings: BenchmarkSettings) -> None:
    """Measure the training step and the inference step of a model."""
    if settings.batch < 1 or min(settings.sample_batch, settings.steps) < 0:
        raise ValueError("--batch must be at least 1, --sample-batch and --steps at least 0")
    asked = Asked(name, task, settings)
    _ = asked.model
    if settings.json is not None:
        usable_file(settings.json)
    with without_compilation_cache():
        row = measure(asked)
    kind = jax.devices()[0].device_kind
    print(f"{jax.device_count()} × {kind}, jax {jax.__version__}\n\n" + table([row]))
    if settings.json is not None:
        machine = {"device": kind, "devices": jax.device_count(), "jax": jax.__version__}
        write_json(settings.json, {**machine, "rows": [dataclasses.asdict(row)]})


def measure(asked: Asked) -> Row:
    """Compile and time one model."""
    row = compile_training(asked).timed(asked.settings.steps)
    count = asked.settings.sample_batch
    measured = _sampling(asked) if count else None
    if measured is None:
        return row
    flops, compiling, seconds = measured
    return dataclasses.replace(
        row, sampling_flops_per_example=flops / count, sampling_compile_seconds=compiling, sampling_seconds=seconds
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """A compiled training step; `timed` runs it. Several can be compiled in threads before the first is timed.

    program: of (state, batch, key, frozen). state, frozen: shapes and placements. flops: per step. compiling: seconds.
    """

    asked: Asked
    side: int
    program: Any
    state: TrainState
    frozen: Any
    batch: dict[str, np.ndarray]
    flops: float
    compiling: float

    def timed(self, steps: int) -> Row:
        """The row of the table, with the median time of `steps` steps; without times if `steps` is 0."""
        before, seconds = _peak(), None
        if steps:
            mesh = self.state.step.sharding.mesh
            with jax.set_mesh(mesh):
                batch = to_devices(self.batch, mesh)
                seconds = _median(self._steps(batch), steps)
        count = self.asked.settings.batch
        return Row(
            model=self.asked.name,
            preset=self.asked.settings.preset,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            batch=count,
            side=self.side,
            dtype=getattr(self.asked.settings.compute, "dtype", "float32"),
            flops_per_example=self.flops / count,
            compile_seconds=self.compiling,
            memory=_memory(self.program, before),
            step_seconds=seconds,
            unit=self.asked.task.unit,
            examples_per_second=count / seconds if seconds else None,
            fraction_of_peak=fraction_of_peak(self.flops, seconds),
            sampling_flops_per_example=None,
            sampling_compile_seconds=None,
            sampling_seconds=None,
        )

    def _steps(self, batch: Any) -> Iterator[Any]:
        state, frozen, key = _filled(self.state), _filled(self.frozen), jax.random.key(1)
        while True:
            state, metrics = self.program(state, batch, key, frozen)
            yield metrics["loss"]


def compile_training(asked: Asked) -> Training:
    """Compile the training step for the available devices, without running it."""
    model, settings = asked.model, asked.settings
    side = asked.task.side(model, settings.crop)
    mesh, optimizer = make_mesh(fsdp=settings.fsdp), OptimizerConfig()
    abstract, batch = abstract_state(model, optimizer, mesh), random_arrays(model.batch_spec(settings.batch, side))
    with jax.set_mesh(mesh):
        frozen = abstract_frozen(asked.task.frozen(model), mesh)
        step = make_step(model, optimizer, placements_of(abstract), frozen=placements_of(frozen))
        shapes = {name: _shape(array, batch_sharding(mesh)) for name, array in batch.items()}
        compiled, compiling = _compiled(step, abstract, shapes, jax.random.key(1), frozen)
    # cuDNN's attention (GPUs in bfloat16) is not counted, so the fraction of the peak is a lower bound there.
    flops = training_flops(model, shapes, frozen)
    return Training(asked, side, compiled, abstract, frozen, batch, flops, compiling)


def _shape(array: np.ndarray, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _filled(shapes: Any) -> Any:
    """Non-negative random values of the magnitude of parameters, valid as second moments, without compiling a program.

    Not zeros: a device that multiplies zeros uses less power and is faster."""
    values = np.abs(np.random.default_rng(0).normal(0, 0.02, 1 << 16)).astype(np.float32)
    sent: dict[Any, jax.Array] = {}  # one transfer for all leaves of a shape

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        form = leaf.shape, leaf.dtype, leaf.sharding
        if form not in sent:
            sent[form] = jax.device_put(np.resize(values, leaf.shape).astype(leaf.dtype), leaf.sharding)
        return jax.device_put(sent[form], leaf.sharding, may_alias=False)  # no aliases, as the step donates its inputs

    return jax.tree.map(fill, shapes)


def _sampling(asked: Asked) -> tuple[float, float, float | None] | None:
    """FLOPs, compile seconds and seconds of an inference step; None if the task has no inference."""
    model, settings = asked.model, asked.settings
    inference = asked.task.inference(settings.preset, model, settings.sample_batch)
    if inference is None:
        return None
    given = jax.tree.map(jnp.asarray, random_arrays(inference.given))
    frozen = asked.task.frozen(model)
    shapes = jax.eval_shape(inference.used, abstract_params(model), frozen)
    compiled, compiling = _compiled(jax.jit(inference.function), shapes, *given)
    flops = network_flops(inference.function, shapes, *given)
    if not settings.steps:
        return flops, compiling, None
    start = jax.jit(lambda key, frozen: inference.used(model.init(key)[0], frozen))
    params = start(jax.random.key(0), random_arrays(frozen))
    return flops, compiling, _median((compiled(params, *given) for _ in iter(int, 1)), settings.steps)


def random_arrays(shapes: Any) -> Any:
    """Random arrays of these shapes and types: normal numbers, ids 0 and 1, masks of True, keys."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(0, 2, leaf.shape).astype(leaf.dtype)
        return rng.normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(fill, shapes)


def _compiled(function: Callable, *arguments: Any) -> tuple[Any, float]:
    """The compiled function and the compile time in seconds, without tracing."""
    lowered = function.lower(*arguments)
    begun = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - begun


def _median(runs: Iterator[Any], count: int) -> float:
    """The median seconds of `count` runs after one warm-up run."""
    jax.block_until_ready(next(runs))
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        jax.block_until_ready(next(runs))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _peak() -> int:
    """Peak bytes in use on the first device since the process started; 0 if unknown."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or 0


def _memory(compiled: Any, before: int) -> int:
    """Peak bytes per device: the larger of the compiler's plan and the measured peak, if that exceeds `before`, the
    peak of earlier programs."""
    plan = compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    seen = _peak()
    return int(max(seen if seen > before else 0, planned - plan.alias_size_in_bytes))


def fraction_of_peak(flops: float, seconds: float | None) -> float | None:
    """Fraction of all devices' dense bfloat16 peak; None if unknown."""
    kind = jax.devices()[0].device_kind
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in kind), None)
    return None if peak is None or not seconds else flops / seconds / (peak * 1e12 * jax.device_count())


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda r: f"{r.model} {r.preset}",
        "parameters": lambda r: f"{r.parameters / 1e6:,.1f} M",
        "batch": lambda r: f"{r.batch}{f' × {r.side}²' * (r.side > 0)}, {r.dtype}",
        "GFLOP each": lambda r: f"{r.flops_per_example / 1e9:,.2f}",
        "compile": lambda r: f"{r.compile_seconds:.1f} s",
        "step": lambda r: _number(r.step_seconds, 1e3, " ms"),
        "per second": lambda r: _number(r.examples_per_second, 1, f" {r.unit}"),
        "of peak": lambda r: _number(r.fraction_of_peak, 100, " %", "not known"),
        "memory": lambda r: f"{r.memory / 2**30:.2f} GiB",
        "sampling GFLOP each": lambda r: _number(r.sampling_flops_per_example, 1e-9),
        "sampling compile": lambda r: _number(r.sampling_compile_seconds, 1, " s"),
        "sampling step": lambda r: _number(r.sampling_seconds, 1e3, " ms"),
    }
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, scale: float = 1.0, unit: str = "", missing: str = "–") -> str:
    return missing if value is None else f"{value * scale:,.4g}{unit}"


if __name__ == "__main__":
    run(commands())
