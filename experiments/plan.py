"""Plan a run without the hardware: memory, bounds on the step time, the bottleneck.

    python -m experiments.plan imagen.base64 --preset 2b --topology v5p:4x8x8 --batch 2048 --mesh fsdp=256
    python -m experiments.plan imagen.sr256 --preset paper --topology v5e:16x16 --batch 2048 --remat blocks
    python -m experiments.plan t5 --preset xxl --topology v5e:2x2 --batch 256 --sample --json runs/t5.json
    python -m experiments.plan imagen.base64 --preset 50m --topology rtx4090:1 --batch 32 --mesh data=1

The real step is compiled by the TPU compiler (libtpu, `pip install -e '.[tpu]'`) or by XLA for NVIDIA GPUs
(`pip install -e '.[cuda]'`; without it, GPUs are estimated from shapes, and the report says so). Neither needs the
chip. This takes one minute (tiny presets) to fifty (2b) on one core, and up to 21 GB of memory. `--json` saves the
plan, and the same settings then read it from the file. `--sample` plans inference.

Sizes, counts and rates are of the compiled program and the vendors' data sheets; a real run may be slower. Fractions of
the peak are of useful FLOPs: those of the network, the same on every chip. `--mesh` counts devices, of which tpu7x has
two per chip.
"""

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from experiments.cli import Command, run
from experiments.options.training import ComputeOptions
from experiments.planning.report import is_plan, report
from experiments.planning.settings import Planned, PlanSettings, check, flat
from experiments.table import TASKS
from experiments.tasks.task import Task
from jaxdiff.core import json_files
from jaxdiff.core.clock import clock
from jaxdiff.core.files import usable_file, write_json
from jaxdiff.training import chips
from jaxdiff.training.compilation_cache import without_compilation_cache
from jaxdiff.training.hlo import COUNTING
from jaxdiff.training.mesh import AXES, BATCH_AXES, AnyMesh, batch_devices, check_batch, make_mesh, parse
from jaxdiff.training.param_sharding import bytes_on_a_device, shardings, table
from jaxdiff.training.plan import Costs, compiled_costs, estimated_costs, network_flops, training_flops
from jaxdiff.training.state import TrainState, abstract_frozen, abstract_params, abstract_state, placements_of
from jaxdiff.training.step import make_step


def commands(tasks: Mapping[str, Task] = TASKS) -> dict[str, Command]:
    """One command per task."""
    return {
        name: Command(partial(main, name, task), PlanSettings(compute=accelerated(task.settings.compute)), task.about)
        for name, task in tasks.items()
    }


def accelerated(compute: ComputeOptions) -> ComputeOptions:
    """The compute settings in bfloat16, if they have a dtype."""
    names = {field.name for field in dataclasses.fields(compute)}
    return dataclasses.replace(compute, dtype="bfloat16") if "dtype" in names else compute


def main(name: str, task: Task, settings: PlanSettings) -> None:
    """Print the memory and the bounds on the time of a step."""
    if not settings.topology:
        raise ValueError("--topology names the chips, such as v6e:2x4 or h100:8")
    topology, question = chips.parse(settings.topology), Planned(name, task, settings)
    check(question, topology)
    if settings.json is not None:
        usable_file(settings.json)
        kept = read(settings.json)
        if kept is not None and kept["asked"] == asked(question, topology) and not (settings.arrays or settings.hlo):
            print(report(kept))
            return
    plan = planned(question, topology)
    if settings.json is not None:
        write_json(settings.json, plan)
    print(report(plan))


def asked(question: Planned, topology: chips.Topology | None) -> dict[str, Any]:
    """The key of a saved plan: the settings, the version of the counting and, with a topology, the compiler's
    version."""
    ours = {name: value for name, value in flat(question.settings).items() if name not in ("json", "hlo", "arrays")}
    ours |= {"model": question.name, "counting": COUNTING}
    return ours if topology is None else ours | {"compiler": compiler(topology)}


def compiler(topology: chips.Topology) -> str:
    """The compiler's version; `none` for GPUs without a compiler. ValueError for TPUs without theirs."""
    missing = chips.missing_compiler(topology)
    if missing is None:
        name = f"libtpu {importlib.metadata.version('libtpu')}" if topology.is_tpu else "XLA for CUDA"
        return f"{name}, jax {jax.__version__}"
    if topology.is_tpu:
        raise ValueError(f"planning for TPUs needs their compiler: {missing}")
    return f"none, jax {jax.__version__}"


def is_estimate(topology: chips.Topology) -> bool:
    """Whether the plan is an estimate without compilation: GPUs without their compiler."""
    return not topology.is_tpu and chips.missing_compiler(topology) is not None


def read(path: Path) -> dict[str, Any] | None:
    """A saved plan; None if absent. ValueError for any other file or a damaged plan, which is left unchanged."""
    if not path.is_file():
        return None
    try:
        plan = json_files.parse(path.read_bytes(), str(path), "a plan")
    except ValueError:
        plan = None
    if not is_plan(plan):
        raise ValueError(f"{path}: not a plan, or a damaged one, and not overwritten: name another file, or delete it")
    return plan


def planned(question: Planned, topology: chips.Topology) -> dict[str, Any]:
    """The plan as JSON-able values."""
    settings = question.settings
    mesh = mesh_of(settings, topology)
    check_batch(settings.batch, mesh, settings.accumulate)
    begun = time.monotonic()
    if is_estimate(topology):
        work = _estimate(question, mesh)
    else:
        options = chips.compiler_options(topology)
        work = (_inference if settings.sample else _training)(question, mesh, options)
    costs = work["costs"]
    return {
        "asked": asked(question, topology),
        "estimate": is_estimate(topology),
        "mesh": dict(mesh.shape),
        "chips": topology.chips,
        "unit": question.task.unit,
        "useful_flops": useful_flops(question),
        "links": links_of(mesh, topology),
        **work,
        "costs": dataclasses.asdict(costs),
        "date": time.strftime("%Y-%m-%d"),
        "seconds_to_plan": round(time.monotonic() - begun, 1),
    }


def useful_flops(question: Planned) -> float:
    """FLOPs of the network per step, without recomputation: the forward pass for sampling and encoding, for training
    also the backward pass."""
    model = question.plain
    if question.settings.sample:
        inference = question.inference(model)
        params = jax.eval_shape(inference.used, abstract_params(model), question.task.frozen(model))
        return network_flops(inference.function, params, *inference.given)
    return training_flops(model, question.spec, question.task.frozen(model))


def links_of(mesh: AnyMesh, topology: chips.Topology) -> dict[str, float]:
    """Links of a chip per mesh axis of more than one device; none for GPUs, which a switch connects."""
    if not topology.is_tpu or not isinstance(mesh, Mesh):
        return {}
    counted = zip(AXES, chips.links(mesh.devices, topology), strict=True)
    return {name: number for name, number in counted if mesh.shape[name] > 1}


def mesh_of(settings: PlanSettings, topology: chips.Topology) -> AnyMesh:
    shape = parse(settings.mesh).over(topology.devices)
    if is_estimate(topology):
        return AbstractMesh(shape.sizes, AXES)
    return make_mesh(*shape.sizes, devices=chips.described(topology))


def _training(question: Planned, mesh: Mesh, options: dict[str, Any]) -> dict[str, Any]:
    model, settings = question.model, question.settings
    placement = question.task.placement(model, settings.compute)
    state = abstract_state(model, question.optimizer, mesh, placement)
    frozen = abstract_frozen(question.task.frozen(model), mesh, placement)
    step = make_step(
        model, question.optimizer, placements_of(state), frozen=placements_of(frozen), accumulate=settings.accumulate
    )
    with jax.set_mesh(mesh):
        batch = placed(question.spec, mesh, BATCH_AXES)
        arguments = state, batch, key_shape(mesh), frozen
        costs = _compiled(step, *arguments, name=str(question), hlo=settings.hlo, options=options)
    return _sizes(settings, state, frozen) | {"costs": costs}


def _inference(question: Planned, mesh: Mesh, options: dict[str, Any]) -> dict[str, Any]:
    """Plan an inference step: the batch split over the devices, parameters in the compute type, replicated for
    diffusion models and sharded as in training for others."""
    model = question.model
    inference = question.inference(model)
    frozen = question.task.frozen(model)
    cast = jax.eval_shape(lambda *trees: inference.used(model.cast(trees[0]), trees[1]), abstract_params(model), frozen)
    if question.task.replicated_parameters:
        params = placed(cast, mesh)
    else:
        params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), cast, shardings(cast, mesh))
    with jax.set_mesh(mesh):
        arguments = [placed(value, mesh, BATCH_AXES) for value in inference.given]
        name = f"sampling with {question}"
        costs = _compiled(
            jax.jit(inference.function), params, *arguments, name=name, hlo=question.settings.hlo, options=options
        )
    return {"parameters": count_of(cast), "costs": costs}


def _estimate(question: Planned, mesh: Any) -> dict[str, Any]:
    settings, model = question.settings, question.model
    placement = question.task.placement(model, settings.compute)
    state = abstract_state(model, question.optimizer, mesh, placement)
    frozen = abstract_frozen(question.task.frozen(model), mesh, placement)
    rows = settings.batch // batch_devices(mesh) // settings.accumulate
    spec = model.batch_spec(rows, question.side)
    costs = estimated_costs(question.task.on_one_device(model), state, spec, frozen, settings.accumulate)
    return _sizes(settings, state, frozen) | {"costs": costs}


def _sizes(settings: PlanSettings, state: TrainState, frozen: Any) -> dict[str, Any]:
    trees = {"parameters": state.params, "average": state.ema, "optimizer": state.opt_state}
    if jax.tree.leaves(frozen):
        trees["frozen"] = frozen
    if settings.arrays:
        print(table(state))
    return {
        "parameters": count_of(state.params),
        "bytes_per_device": {name: bytes_on_a_device(tree) for name, tree in trees.items()},
    }


def placed(tree: Any, mesh: Mesh, axes: tuple[str, ...] | None = None) -> Any:
    """Shapes with a sharding: the first dimension over `axes`, or replicated."""
    sharding = NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def key_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return placed(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def count_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _compiled(function: Any, *arguments: Any, name: str, hlo: Path | None, options: dict[str, Any]) -> Costs:
    devices = jax.tree.leaves(arguments)[0].sharding.mesh.size
    with clock(f"tracing {name}"):
        lowered = function.lower(*arguments)
    with clock(f"compiling {name}"), without_compilation_cache():
        compiled = lowered.compile(compiler_options=options or None)
    if hlo is not None:
        hlo.write_text(compiled.as_text())
    return compiled_costs(compiled, devices)


if __name__ == "__main__":
    run(commands())
