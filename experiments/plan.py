"""Plan a run on chips that need not be there: will it fit, how fast could it be, what holds it back?

    python -m experiments.plan --topology v5p:4x8x8 --stage base64 --preset 2b --batch 2048 --mesh fsdp=256
    python -m experiments.plan --topology v5e:16x16 --stage sr256 --preset paper --batch 2048 --remat blocks
    python -m experiments.plan --topology v5e:2x2 --stage text --batch 256 --json runs/t5.json
    python -m experiments.plan --topology h100:8 --stage base64 --preset 500m --batch 512     # an estimate from shapes

The real step is compiled by the TPU's own compiler (libtpu, `pip install -e '.[tpu]'`), which needs no TPU. That takes
from one minute (tiny presets) to fifty (2b) on one core, and up to 21 GB of memory. With `--json` the result is
kept, and the same question is answered from the file. `--sample` plans the drawing of pictures instead of training.

Sizes, counts and rates are of the compiled program and the vendors' data sheets; how near a real run comes to them is
not known until one has been measured. `--mesh` counts devices, which are two a chip on tpu7x.
"""

import dataclasses
import importlib.metadata
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments.cli import run
from experiments.imagen import presets
from jaxdiff.core import json_files
from jaxdiff.data.files import usable_file, write_json
from jaxdiff.diffusion import noise
from jaxdiff.nets import t5
from jaxdiff.nets.placement import Axes
from jaxdiff.nets.unet import Remat
from jaxdiff.systems.imagen import Stage, check_size
from jaxdiff.systems.imagen_drawing import draw
from jaxdiff.text.t5 import TextEmbedding
from jaxdiff.training import chips
from jaxdiff.training.compilation_cache import without_compilation_cache
from jaxdiff.training.hlo import COUNTING
from jaxdiff.training.mesh import AXES, BATCH_AXES, AnyMesh, batch_devices, check_batch, make_mesh, parse
from jaxdiff.training.optimizer import Adafactor, AdamW, OptimizerConfig
from jaxdiff.training.placement import bytes_on_a_device, shardings, table
from jaxdiff.training.plan import Costs, Roofline, compiled_costs, estimated_costs, roofline
from jaxdiff.training.state import TrainState, abstract_state
from jaxdiff.training.step import make_step

PAPER_STEPS = 2_500_000
OPTIMIZERS = {"adam": AdamW(), "adafactor": Adafactor()}


@dataclasses.dataclass(frozen=True)
class Run:
    """What to plan."""

    topology: str
    """Chips and their shape: v4:4x8x8 | v5e:16x16 | v5p:4x8x8 | v6e:16x16 | tpu7x:4x8x8, or h100:8 (an estimate)."""
    stage: Literal["base64", "sr256", "sr1024", "text"] = "base64"
    """Which stage; text: the frozen T5-XXL encoder over a batch of captions."""
    preset: str = "2b"
    """Its size: tiny | quick | 300m | 500m | 2b for base64, tiny | paper for the others; text has one."""
    batch: int = 2048
    """Pictures (captions) of a step, of all devices together."""
    mesh: str = "fsdp=-1"
    """Devices along each axis, such as data=8,fsdp=32 or fsdp=64,tensor=4; -1: what the others leave."""
    rows: bool = False
    """The tensor axis splits the rows of pictures instead of the channels of layers."""
    remat: Remat = "none"
    """What the backward pass computes again: none | outputs (norms, activations, attention) | blocks (all)."""
    scan: bool = False
    """Equal blocks in a row as one loop: compiles faster, sr256 and sr1024 alone."""
    accumulate: int = 1
    """Parts that a batch is taken in."""
    crop: int | None = None
    """Side of super-resolution's training pictures; a quarter of the resolution when left out."""
    optimizer: Literal["adam", "adafactor"] | None = None
    """Left out: the paper's, Adafactor for base64 and Adam for the others."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the network computes in."""
    sample: bool = False
    """A step of drawing whole pictures, both branches of guidance, instead of a training step."""
    json: Path | None = None
    """Where the plan is kept, and read from when the same is asked again."""
    hlo: Path | None = None
    """A file for the text of the compiled program."""
    arrays: bool = False
    """List every array of the train state with its placement and bytes."""


def main(settings: Run) -> None:
    """Print what a step needs and what it could reach."""
    topology = chips.parse(settings.topology)
    if settings.json is not None:
        usable_file(settings.json)
        kept = None if settings.arrays or settings.hlo else read(settings.json)
        if kept is not None and kept["asked"] == asked(settings, topology):
            print(report(kept))
            return
    plan = planned(settings, topology)
    if settings.json is not None:
        write_json(settings.json, plan)
    print(report(plan))


def asked(settings: Run, topology: chips.Topology | None) -> dict[str, Any]:
    """The question that a kept plan must have answered: the settings, how programs are counted here and, with a
    topology, the compiler's version."""
    ours = {
        name: value for name, value in dataclasses.asdict(settings).items() if name not in ("json", "hlo", "arrays")
    }
    ours |= {"counting": COUNTING}
    return ours if topology is None else ours | {"compiler": compiler(topology)}


def compiler(topology: chips.Topology) -> str:
    """Versions of what would compile; `none` for chips that are only estimated."""
    if not topology.is_tpu:
        return f"none, jax {jax.__version__}"
    try:
        return f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}"
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "planning for TPUs needs their compiler: pip install -e '.[tpu]' (no TPU has to be there)"
        ) from None


def read(path: Path) -> dict[str, Any] | None:
    """A kept plan, None where there is none. ValueError for any other file, which is left as it is."""
    if not path.is_file():
        return None
    try:
        plan = json_files.parse(path.read_bytes(), str(path), "a plan")
        _ = plan["asked"], plan["costs"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a plan, and not overwritten: name another file") from None
    return plan


def planned(settings: Run, topology: chips.Topology) -> dict[str, Any]:
    """The plan as JSON-able values."""
    mesh = mesh_of(settings, topology)
    check_batch(settings.batch, mesh, settings.accumulate)
    begun = time.monotonic()
    if settings.stage == "text":
        if not topology.is_tpu or settings.sample:
            raise ValueError("--stage text: for TPU topologies, and there is nothing to sample")
        work = _text(settings, mesh)
    else:
        stage = stage_of(settings)
        if topology.is_tpu:
            work = _drawing(settings, stage, mesh) if settings.sample else _training(settings, stage, mesh)
        else:
            work = _estimate(settings, stage, mesh)
    costs = work["costs"]
    return {
        "asked": asked(settings, topology),
        "estimate": not topology.is_tpu,
        "mesh": dict(mesh.shape),
        "chips": topology.chips,
        **work,
        "costs": dataclasses.asdict(costs),
        "date": time.strftime("%Y-%m-%d"),
        "seconds_to_plan": round(time.monotonic() - begun, 1),
    }


def rooflined(plan: Mapping[str, Any]) -> Roofline:
    """The roofline of a plan, by the rates as they are known now."""
    return roofline(Costs(**plan["costs"]), chips.parse(plan["asked"]["topology"]))


def mesh_of(settings: Run, topology: chips.Topology) -> AnyMesh:
    shape = parse(settings.mesh).over(topology.devices)
    if topology.is_tpu:
        return make_mesh(*shape.sizes, devices=chips.described(topology))
    return AbstractMesh(shape.sizes, AXES)


def stage_of(settings: Run) -> Stage:
    stage = presets.stage(settings.stage, settings.preset)
    stage = dataclasses.replace(stage, unet=dataclasses.replace(stage.unet, dtype=settings.dtype))
    return presets.split(stage, settings.remat, settings.scan, settings.rows)


def optimizer_of(settings: Run) -> OptimizerConfig:
    name = settings.optimizer or ("adafactor" if settings.stage == "base64" else "adam")
    return OptimizerConfig(kind=OPTIMIZERS[name])


def side_of(settings: Run, stage: Stage) -> int:
    side = stage.resolution if stage.low_resolution is None else settings.crop or stage.resolution // 4
    check_size(stage, side, name="crop")
    return side


def _training(settings: Run, stage: Stage, mesh: Mesh) -> dict[str, Any]:
    state = abstract_state(stage, optimizer_of(settings), mesh, presets.placement(stage, settings.rows))
    step = make_step(
        stage,
        optimizer_of(settings),
        jax.tree.map(lambda leaf: leaf.sharding, state),
        accumulate=settings.accumulate,
    )
    batch = stage.batch(settings.batch, side_of(settings, stage))
    with jax.set_mesh(mesh):
        costs = _compiled(
            step, state, placed(batch, mesh, BATCH_AXES), key_shape(mesh), name=name_of(settings), hlo=settings.hlo
        )
    return _sizes(settings, state) | {"costs": costs}


def _drawing(settings: Run, stage: Stage, mesh: Mesh) -> dict[str, Any]:
    """One step of drawing: parameters whole on every device in the compute type, pictures split over the devices."""
    sampling = dataclasses.replace(presets.sampling(settings.stage, settings.preset), steps=1)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    params = placed(jax.eval_shape(stage.cast, shapes), mesh)
    count, side = settings.batch, stage.resolution
    keys = jax.eval_shape(lambda: noise.sample_keys(jax.random.key(0), jnp.arange(count)))
    batch = stage.batch(count, side)
    text = TextEmbedding(batch["text"].update(dtype=jnp.float32), batch["text_mask"])
    given = (text, text, keys, batch.get("low_res"))

    def step(params, text, negative, keys, low_res):
        return draw(stage, params, sampling, text, negative, keys, (side, side), low_res)

    with jax.set_mesh(mesh):
        arguments = [placed(value, mesh, BATCH_AXES) for value in given]
        costs = _compiled(jax.jit(step), params, *arguments, name=f"drawing {name_of(settings)}", hlo=settings.hlo)
    return {"parameters": count_of(shapes), "costs": costs}


def _text(settings: Run, mesh: Mesh) -> dict[str, Any]:
    """T5-XXL's encoder over a batch of captions of 128 tokens."""
    config = dataclasses.replace(t5.XXL, decoder_layers=0, dtype=settings.dtype)
    encoder = t5.T5Encoder(config)
    tokens = jax.ShapeDtypeStruct((settings.batch, 128), jnp.int32)
    mask = jax.ShapeDtypeStruct((settings.batch, 128), jnp.bool_)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), tokens, mask)
    params = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(settings.dtype)), shapes)
    params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), params, shardings(params, mesh))
    encode = jax.jit(lambda params, tokens, mask: encoder.apply(params, tokens, mask))
    with jax.set_mesh(mesh):
        costs = _compiled(
            encode, params, *placed((tokens, mask), mesh, BATCH_AXES), name="T5-XXL encoder", hlo=settings.hlo
        )
    return {"parameters": count_of(shapes), "costs": costs}


def _estimate(settings: Run, stage: Stage, mesh: Any) -> dict[str, Any]:
    if settings.sample:
        raise ValueError("--sample: for TPU topologies, which are compiled for")
    state = abstract_state(stage, optimizer_of(settings), mesh, presets.placement(stage, settings.rows))
    if mesh.shape["tensor"] > 1:
        raise ValueError("--mesh tensor: for TPU topologies, which are compiled for; estimates know data and fsdp")
    local = dataclasses.replace(stage, unet=dataclasses.replace(stage.unet, axes=Axes()))
    rows = settings.batch // batch_devices(mesh) // settings.accumulate
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    costs = estimated_costs(
        local.loss,
        state,
        jax.eval_shape(local.cast, shapes),
        stage.batch(rows, side_of(settings, stage)),
        jax.eval_shape(lambda: jax.random.key(0)),
        mesh.shape["fsdp"],
        mesh.shape["data"],
        settings.accumulate,
    )
    return _sizes(settings, state) | {"costs": costs}


def _sizes(settings: Run, state: TrainState) -> dict[str, Any]:
    parts = {"parameters": state.params, "average": state.ema, "optimizer": state.opt_state}
    if settings.arrays:
        print(table(state))
    return {
        "parameters": count_of(state.params),
        "bytes_per_device": {name: bytes_on_a_device(tree) for name, tree in parts.items()},
    }


def placed(tree: Any, mesh: Mesh, axes: tuple[str, ...] | None = None) -> Any:
    """Shapes with a placement: the first axis over `axes`, or copied."""
    sharding = NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def key_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return placed(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def count_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def name_of(settings: Run) -> str:
    return f"{settings.stage} {settings.preset} for {settings.topology}"


def _compiled(function: Any, *arguments: Any, name: str, hlo: Path | None) -> Costs:
    devices = jax.tree.leaves(arguments)[0].sharding.mesh.size
    with _clock(f"tracing {name}"):
        lowered = function.lower(*arguments)
    with _clock(f"compiling {name}"), without_compilation_cache():
        compiled = lowered.compile()
    if hlo is not None:
        hlo.write_text(compiled.as_text())
    return compiled_costs(compiled, devices)


def report(plan: dict[str, Any]) -> str:
    """One screen."""
    asked, costs, roof = plan["asked"], Costs(**plan["costs"]), rooflined(plan)
    topology = chips.parse(asked["topology"])
    chip, devices = topology.chip, topology.devices
    peak = costs.peak_bytes * chip.devices
    mesh = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    what = "drawing step" if asked["sample"] else "batch" if asked["stage"] == "text" else "training step"
    size = "" if asked["stage"] == "text" else f" {asked['preset']}"
    lines = [
        f"{asked['stage']}{size} on {topology}: {topology.chips} chips, {devices} devices ({mesh})",
        f"{what} of {asked['batch']}, {asked['dtype']}, remat {asked['remat']}, {asked['compiler']}",
    ]
    if plan["estimate"]:
        lines.append("AN ESTIMATE from shapes alone: nothing was compiled for this chip")
    lines += ["", f"parameters            {plan['parameters'] / 1e6:,.1f} M"]
    for name, size in plan.get("bytes_per_device", {}).items():
        lines.append(f"{name + ', a device':21} {_gib(size)}")
    lines += [
        f"arguments, a device   {_gib(costs.argument_bytes)}",
        f"temporaries, a device {_gib(costs.temporary_bytes)}",
        f"peak, a device        {_gib(costs.peak_bytes)}",
        f"peak, a chip          {_gib(peak)} of {_gib(chip.memory)}: {1 - peak / chip.memory:.0%} free",
        "",
        f"FLOPs a step          {costs.flops * devices / 1e12:,.1f} T, {costs.flops / 1e12:,.3f} T a device",
    ]
    for kind, found in sorted(costs.collectives.items()):
        lines.append(f"{kind:21} {found['count']:,} with {found['bytes'] / 1e9:.3f} GB a device")
    if costs.unknown_loops:
        lines.append(f"{costs.unknown_loops} loops of unknown length count once")
    lines += [
        "",
        f"compute               {_ms(roof.compute)}",
        f"memory                {_ms(roof.memory)} for {costs.bytes_accessed / 1e9:.1f} GB",
        f"interconnect          {_ms(roof.interconnect)}",
        *_outcome("all overlapped", roof.overlapped, roof.share_overlapped, asked),
        *_outcome("none overlapped", roof.serial, roof.share_serial, asked),
        *_outcome("compiler's estimate", costs.seconds, roof.share_compiler, asked),
    ]
    return "\n".join(lines)


def _outcome(name: str, seconds: float | None, share: float | None, asked: dict[str, Any]) -> list[str]:
    if seconds is None or share is None:
        return [f"{name:21} none"]
    line = f"{name:21} {_ms(seconds)}, {share:.0%} of peak, {asked['batch'] / seconds:,.0f} a second"
    if asked["stage"] != "text" and not asked["sample"]:
        line += f", {seconds * PAPER_STEPS / 86400:.1f} days to {PAPER_STEPS:,} steps"
    return [line]


def _gib(size: float) -> str:
    return f"{size / chips.GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


@contextmanager
def _clock(what: str) -> Iterator[None]:
    """A line that shows how long something takes that cannot say how far it is."""
    done = threading.Event()
    with tqdm(desc=what, bar_format="{desc}: {elapsed}") as bar:

        def tick() -> None:
            while not done.wait(1.0):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()


if __name__ == "__main__":
    run(main)
