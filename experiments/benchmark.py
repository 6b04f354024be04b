"""How fast, and how large: any preset of any stage, on the devices at hand.

    python -m experiments.benchmark                                          # the tiny presets of all stages
    python -m experiments.benchmark --stage base64 --preset 300m --batch 64 --dtype bfloat16 --json runs/300m.json
    python -m experiments.benchmark --stage base64 --preset 2b --steps 0     # count and compile only

Prints a table (Markdown): parameters; FLOPs per image of the network's convolutions and matrix products, in a training
step (forward and backward) and in one evaluation while sampling; seconds to compile; the median time of a step; images
a second; the share of the devices' published peak; peak memory. Training is on made-up batches that are already
on the devices, super-resolution on crops of a quarter of the picture's side as in `experiments.imagen.train`;
sampling is at the stage's whole resolution, without guidance. The tiny presets take about 3 minutes on 2 CPU cores.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.cli import run
from experiments.imagen import presets
from jaxdiff.core.files import usable_file, write_json
from jaxdiff.diffusion import noise
from jaxdiff.models.conditioners import SampleInputs, joined
from jaxdiff.models.diffusion import DiffusionModel, check_crop
from jaxdiff.nets.unet import Remat
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training.chips import PEAK_TFLOPS
from jaxdiff.training.compilation_cache import without_compilation_cache
from jaxdiff.training.mesh import batch_sharding, make_mesh, to_devices
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.plan import network_flops
from jaxdiff.training.state import TrainState, abstract_params, abstract_state, loss_inputs, placements_of
from jaxdiff.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Run:
    """What to measure."""

    stage: Literal["all", "base64", "sr256", "sr1024"] = "all"
    """Which stage."""
    preset: str = "tiny"
    """Its size: tiny | 300m | 500m | 2b for base64, tiny | paper for the others."""
    batch: int = 16
    """Pictures of a training step, of all devices together."""
    sample_batch: int = 1
    """Pictures of a sampling evaluation; 0 leaves it out."""
    crop: int | None = None
    """Side of the training pictures of super-resolution; a quarter of the resolution when left out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in."""
    remat: Remat = "none"
    """What the backward pass computes again: none | outputs | blocks (each of them whole)."""
    scan: bool = False
    """Equal blocks in a row are one loop (Efficient U-Net): a shorter compilation."""
    fsdp: int = 1
    """Devices that share each parameter."""
    steps: int = 10
    """Steps to time, after one that is not; 0: compile only."""
    json: Path | None = None
    """A file for the numbers."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; None is not measured. Times in seconds, memory in bytes per device."""

    stage: str
    preset: str
    parameters: int
    batch: int
    side: int
    dtype: str
    flops_per_image: float
    compile_seconds: float
    memory: int
    step_seconds: float | None
    images_per_second: float | None
    share_of_peak: float | None
    sampling_side: int
    sampling_flops_per_image: float | None
    sampling_compile_seconds: float | None
    sampling_seconds: float | None


def main(settings: Run) -> None:
    """Measure the training step and a sampling evaluation of a stage."""
    if min(settings.batch, 1) < 1 or min(settings.sample_batch, settings.steps) < 0:
        raise ValueError("--batch must be at least 1, --sample-batch and --steps at least 0")
    names = ["base64", "sr256", "sr1024"] if settings.stage == "all" else [settings.stage]
    stages = {name: configured(presets.reading(name, settings.preset), settings) for name in names}
    if settings.json is not None:
        usable_file(settings.json)
    with without_compilation_cache():
        rows = [measure(name, stage, settings) for name, stage in stages.items()]
    kind = jax.devices()[0].device_kind
    print(f"{jax.device_count()} × {kind}, jax {jax.__version__}\n\n" + table(rows))
    if settings.json is not None:
        rows = [dataclasses.asdict(row) for row in rows]
        write_json(settings.json, {"device": kind, "devices": jax.device_count(), "jax": jax.__version__, "rows": rows})


def configured(stage: DiffusionModel, settings: Run) -> DiffusionModel:
    return presets.executed(stage, dtype=settings.dtype, remat=settings.remat, scan=settings.scan)


def measure(name: str, stage: DiffusionModel, settings: Run) -> Row:
    """Compile and time one stage."""
    training = compile_training(name, stage, settings)
    row = training.timed(settings.steps)
    if not settings.sample_batch:
        return row
    flops, compiling, seconds = _sampling(stage, settings)
    return dataclasses.replace(
        row,
        sampling_flops_per_image=flops / settings.sample_batch,
        sampling_compile_seconds=compiling,
        sampling_seconds=seconds,
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """A training step, compiled: `timed` runs it. Several may be compiled in threads before the first is timed.

    program: of (state, batch, key); state: shapes and placements; flops: of a step; compiling: seconds.
    """

    name: str
    stage: DiffusionModel
    settings: Run
    side: int
    program: Any
    state: TrainState
    batch: dict[str, np.ndarray]
    flops: float
    compiling: float

    def timed(self, steps: int) -> Row:
        """The row of the table, its speed the median of `steps` steps; without speed where they are 0."""
        before, seconds = _peak(), None
        if steps:
            mesh = self.state.step.sharding.mesh
            with jax.set_mesh(mesh):
                batch = to_devices(self.batch, mesh)
                seconds = _median(self._steps(batch), steps)
        count = self.settings.batch
        return Row(
            stage=self.name,
            preset=self.settings.preset,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            batch=count,
            side=self.side,
            dtype=self.settings.dtype,
            flops_per_image=self.flops / count,
            compile_seconds=self.compiling,
            memory=_memory(self.program, before),
            step_seconds=seconds,
            images_per_second=count / seconds if seconds else None,
            share_of_peak=share_of_peak(self.flops, seconds),
            sampling_side=self.stage.side,
            sampling_flops_per_image=None,
            sampling_compile_seconds=None,
            sampling_seconds=None,
        )

    def _steps(self, batch: Any) -> Iterator[Any]:
        state, key = _filled(self.state), jax.random.key(1)
        while True:
            state, metrics = self.program(state, batch, key)
            yield metrics["loss"]


def compile_training(name: str, stage: DiffusionModel, settings: Run) -> Training:
    """The training step of a stage for the devices at hand, compiled; nothing runs on them."""
    side = stage.side if stage.low_res is None else settings.crop or stage.side // 4
    check_crop(stage, side)
    mesh, optimizer = make_mesh(fsdp=settings.fsdp), OptimizerConfig()
    abstract, batch = abstract_state(stage, optimizer, mesh), made_up(stage, settings.batch, side)
    with jax.set_mesh(mesh):
        step = make_step(stage, optimizer, placements_of(abstract))
        shapes = {name: _shape(array, batch_sharding(mesh)) for name, array in batch.items()}
        compiled, compiling = _compiled(step, abstract, shapes, jax.random.key(1))
    # A gradient multiplies twice where the loss multiplies once. What cuDNN's attention does (GPUs in bfloat16) cannot
    # be counted: there the share of the peak is a lower bound.
    flops = 3 * network_flops(stage.loss, *loss_inputs(stage, shapes))
    return Training(name, stage, settings, side, compiled, abstract, batch, flops, compiling)


def _shape(array: np.ndarray, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _filled(shapes: Any) -> Any:
    """Values of the size of parameters, none below 0 so that they can be second moments, without a program to compile.

    Not zeros: a device that multiplies zeros draws less power, and is faster."""
    values = np.abs(np.random.default_rng(0).normal(0, 0.02, 1 << 16)).astype(np.float32)
    sent: dict[Any, jax.Array] = {}  # one transfer for all leaves of a shape

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        form = leaf.shape, leaf.dtype, leaf.sharding
        if form not in sent:
            sent[form] = jax.device_put(np.resize(values, leaf.shape).astype(leaf.dtype), leaf.sharding)
        return jax.device_put(sent[form], leaf.sharding, may_alias=False)  # each its own, as the step donates them

    return jax.tree.map(fill, shapes)


def _sampling(stage: DiffusionModel, settings: Run) -> tuple[float, float, float | None]:
    """FLOPs, seconds to compile and seconds of one evaluation of the network at the whole resolution."""
    count = settings.sample_batch
    parameters = abstract_params(stage)
    batch = jax.tree.map(jnp.asarray, made_up(stage, count, stage.side))
    text = TextEmbedding(batch["text"].astype(jnp.float32), batch["text_mask"]) if "text" in batch else None
    given = SampleInputs(text, low_res=batch.get("low_res"))
    keys = noise.sample_keys(jax.random.key(0), jnp.arange(count))
    sizes = stage.side, stage.side
    conditioning = joined([each.sampling(given, keys, sizes).conditional for each in stage.conditioners])

    def evaluate(params, x, conditioning):
        return stage.predict(params, x, jnp.ones(count), conditioning)

    inputs = batch["image"], conditioning
    compiled, compiling = _compiled(jax.jit(evaluate), parameters, *inputs)
    flops = network_flops(evaluate, parameters, *inputs)
    if not settings.steps:
        return flops, compiling, None
    params = jax.jit(stage.init)(jax.random.key(0))[0]
    return flops, compiling, _median((compiled(params, *inputs) for _ in iter(int, 1)), settings.steps)


def made_up(stage: DiffusionModel, count: int, side: int) -> dict[str, np.ndarray]:
    """A batch of the right shapes."""
    rng = np.random.default_rng(0)
    batch = {
        name: rng.normal(size=leaf.shape).astype(leaf.dtype) for name, leaf in stage.batch_spec(count, side).items()
    }
    return batch | ({"text_mask": np.ones_like(batch["text_mask"])} if "text_mask" in batch else {})


def _compiled(function: Callable, *arguments: Any) -> tuple[Any, float]:
    """The compiled function and the seconds that compiling took, tracing left out."""
    lowered = function.lower(*arguments)
    begun = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - begun


def _median(runs: Iterator[Any], count: int) -> float:
    """The median seconds of `count` runs after a first one."""
    jax.block_until_ready(next(runs))
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        jax.block_until_ready(next(runs))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _peak() -> int:
    """The most bytes in use on a device since the process began; 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or 0


def _memory(compiled: Any, before: int) -> int:
    """Peak bytes on a device: what it has seen where that is more than `before`, an earlier program's peak, and what
    the compiler plans otherwise."""
    plan = compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    seen = _peak()
    return int(max(seen if seen > before else 0, planned - plan.alias_size_in_bytes))


def share_of_peak(flops: float, seconds: float | None) -> float | None:
    """Of all devices' dense bfloat16 peak; None where it is not known."""
    kind = jax.devices()[0].device_kind
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in kind), None)
    return None if peak is None or not seconds else flops / seconds / (peak * 1e12 * jax.device_count())


def table(rows: list[Row]) -> str:
    """Markdown."""
    columns: dict[str, Callable[[Row], str]] = {
        "stage": lambda r: f"{r.stage} {r.preset}",
        "parameters": lambda r: f"{r.parameters / 1e6:,.1f} M",
        "batch": lambda r: f"{r.batch} × {r.side}², {r.dtype}",
        "GFLOP/image": lambda r: f"{r.flops_per_image / 1e9:,.2f}",
        "compile": lambda r: f"{r.compile_seconds:.1f} s",
        "step": lambda r: _number(r.step_seconds, 1e3, " ms"),
        "images/s": lambda r: _number(r.images_per_second),
        "of peak": lambda r: _number(r.share_of_peak, 100, " %", "not known"),
        "memory": lambda r: f"{r.memory / 2**30:.2f} GiB",
        "sampling GFLOP/image": lambda r: f"{_number(r.sampling_flops_per_image, 1e-9)} at {r.sampling_side}²",
        "sampling compile": lambda r: _number(r.sampling_compile_seconds, 1, " s"),
        "evaluation": lambda r: _number(r.sampling_seconds, 1e3, " ms"),
    }
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, scale: float = 1.0, unit: str = "", missing: str = "–") -> str:
    return missing if value is None else f"{value * scale:,.4g}{unit}"


if __name__ == "__main__":
    run(main)
