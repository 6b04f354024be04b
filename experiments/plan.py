"""Plan a run on chips that need not be there: will it fit, between which times could a step lie, what holds it back?

    python -m experiments.plan --topology v5p:4x8x8 --stage base64 --preset 2b --batch 2048 --mesh fsdp=256
    python -m experiments.plan --topology v5e:16x16 --stage sr256 --preset paper --batch 2048 --remat blocks
    python -m experiments.plan --topology v5e:2x2 --stage text --batch 256 --json runs/t5.json
    python -m experiments.plan --topology h100:8 --stage base64 --preset 500m --batch 512     # an estimate from shapes

The real step is compiled by the TPU's own compiler (libtpu, `pip install -e '.[tpu]'`), which needs no TPU. That takes
from one minute (tiny presets) to fifty (2b) on one core, and up to 21 GB of memory. With `--json` the result is
kept, and the same question is answered from the file. `--sample` plans the drawing of pictures instead of training.

Sizes, counts and rates are of the compiled program and the vendors' data sheets; how near a real run comes to them is
not known until one has been measured. Shares of the peak are of useful FLOPs: those of the network, the same on every
chip. `--mesh` counts devices, which are two a chip on tpu7x.
"""

import dataclasses
import importlib.metadata
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments.cli import run
from experiments.imagen import presets
from experiments.plan_report import is_plan, report
from experiments.plan_settings import Run, check, optimizer_of, side_of, stage_of
from jaxdiff.core import json_files
from jaxdiff.core.files import usable_file, write_json
from jaxdiff.diffusion import noise
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SampleRequest, TrainedModel
from jaxdiff.nets import t5
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training import chips
from jaxdiff.training.compilation_cache import without_compilation_cache
from jaxdiff.training.hlo import COUNTING
from jaxdiff.training.mesh import AXES, BATCH_AXES, AnyMesh, batch_devices, check_batch, make_mesh, parse
from jaxdiff.training.param_sharding import bytes_on_a_device, shardings, table
from jaxdiff.training.plan import Costs, compiled_costs, estimated_costs, network_flops
from jaxdiff.training.state import TrainState, abstract_params, abstract_state, loss_inputs, placements_of
from jaxdiff.training.step import make_step


def main(settings: Run) -> None:
    """Print what a step needs and what it could reach."""
    topology = chips.parse(settings.topology)
    check(settings, topology)
    if settings.json is not None:
        usable_file(settings.json)
        kept = read(settings.json)
        answered = kept is not None and kept["asked"] == asked(settings, topology)
        if kept is not None and answered and not (settings.arrays or settings.hlo):
            whole = completed(kept)
            if whole != kept:
                write_json(settings.json, whole)
            print(report(whole))
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
    """A kept plan, None where there is none. ValueError for any other file, a damaged plan too, which is left as it
    is."""
    if not path.is_file():
        return None
    try:
        plan = json_files.parse(path.read_bytes(), str(path), "a plan")
    except ValueError:
        plan = None
    if not is_plan(plan):
        raise ValueError(f"{path}: not a plan, or a damaged one, and not overwritten: name another file, or delete it")
    return plan


def planned(settings: Run, topology: chips.Topology) -> dict[str, Any]:
    """The plan as JSON-able values."""
    mesh = mesh_of(settings, topology)
    check_batch(settings.batch, mesh, settings.accumulate)
    begun = time.monotonic()
    if settings.stage == "text":
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
        "useful_flops": useful_flops(settings),
        "links": links_of(mesh, topology),
        **work,
        "costs": dataclasses.asdict(costs),
        "date": time.strftime("%Y-%m-%d"),
        "seconds_to_plan": round(time.monotonic() - begun, 1),
    }


def completed(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan of an earlier version with what it lacks: useful FLOPs, counted from the traced network, and the links of
    its mesh. Nothing is compiled."""
    if {"useful_flops", "links"} <= plan.keys():
        return plan
    names = {field.name for field in dataclasses.fields(Run)}
    settings = Run(**{name: value for name, value in plan["asked"].items() if name in names})
    topology = chips.parse(settings.topology)
    how = f"useful_flops and links: by tracing, not compiling; jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"
    links = links_of(mesh_of(settings, topology), topology)
    return plan | {"useful_flops": useful_flops(settings), "links": links, "added": how}


def useful_flops(settings: Run) -> float:
    """FLOPs that the network needs in the whole step: once forward for drawing and encoding, three times for training.
    Nothing that is computed again counts."""
    if settings.stage == "text":
        encoder, tokens, mask, shapes = _encoder(settings)
        return network_flops(encoder.apply, shapes, tokens, mask)
    stage = presets.reading(settings.stage, settings.preset)
    if settings.sample:
        step, *given = _step_of_drawing(settings, stage)
        return network_flops(step, abstract_params(stage), *given)
    batch = stage.batch_spec(settings.batch, side_of(settings, stage))
    return 3 * network_flops(stage.loss, *loss_inputs(stage, batch))


def links_of(mesh: AnyMesh, topology: chips.Topology) -> dict[str, float]:
    """Links of a chip for each axis of more than one device; none for GPUs, which a switch joins."""
    if not isinstance(mesh, Mesh):
        return {}
    counted = zip(AXES, chips.links(mesh.devices, topology), strict=True)
    return {name: number for name, number in counted if mesh.shape[name] > 1}


def mesh_of(settings: Run, topology: chips.Topology) -> AnyMesh:
    shape = parse(settings.mesh).over(topology.devices)
    if topology.is_tpu:
        return make_mesh(*shape.sizes, devices=chips.described(topology))
    return AbstractMesh(shape.sizes, AXES)


def _training(settings: Run, stage: DiffusionModel, mesh: Mesh) -> dict[str, Any]:
    state = abstract_state(stage, optimizer_of(settings), mesh, presets.placement(stage, settings.rows))
    step = make_step(
        stage,
        optimizer_of(settings),
        placements_of(state),
        accumulate=settings.accumulate,
    )
    batch = stage.batch_spec(settings.batch, side_of(settings, stage))
    with jax.set_mesh(mesh):
        costs = _compiled(
            step, state, placed(batch, mesh, BATCH_AXES), key_shape(mesh), name=name_of(settings), hlo=settings.hlo
        )
    return _sizes(settings, state) | {"costs": costs}


def _drawing(settings: Run, stage: DiffusionModel, mesh: Mesh) -> dict[str, Any]:
    """One step of drawing: parameters whole on every device in the compute type, pictures split over the devices."""
    shapes = abstract_params(stage)
    params = placed(jax.eval_shape(stage.cast, shapes), mesh)
    step, *given = _step_of_drawing(settings, stage)
    with jax.set_mesh(mesh):
        arguments = [placed(value, mesh, BATCH_AXES) for value in given]
        costs = _compiled(jax.jit(step), params, *arguments, name=f"drawing {name_of(settings)}", hlo=settings.hlo)
    return {"parameters": count_of(shapes), "costs": costs}


def _step_of_drawing(settings: Run, stage: DiffusionModel) -> tuple[Any, ...]:
    """The step as a function of the parameters and more, and the shapes of what is more."""
    sampling = dataclasses.replace(presets.sampling(settings.stage, settings.preset), steps=1)
    count, side = settings.batch, stage.side
    keys = jax.eval_shape(lambda: noise.sample_keys(jax.random.key(0), jnp.arange(count)))
    batch = stage.batch_spec(count, side)
    text = None
    if "text" in batch:
        text = TextEmbedding(batch["text"].update(dtype=jnp.float32), batch["text_mask"])

    def step(params, text, negative, keys, low_res):
        return TrainedModel(stage, params, sampling).decode(low_res, SampleRequest(keys, (side, side), text, negative))

    return step, text, text, keys, batch.get("low_res")


def _text(settings: Run, mesh: Mesh) -> dict[str, Any]:
    """T5-XXL's encoder over a batch of captions of 128 tokens."""
    encoder, tokens, mask, shapes = _encoder(settings)
    params = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(settings.dtype)), shapes)
    params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), params, shardings(params, mesh))
    encode = jax.jit(lambda params, tokens, mask: encoder.apply(params, tokens, mask))
    with jax.set_mesh(mesh):
        costs = _compiled(
            encode, params, *placed((tokens, mask), mesh, BATCH_AXES), name="T5-XXL encoder", hlo=settings.hlo
        )
    return {"parameters": count_of(shapes), "costs": costs}


def _encoder(settings: Run) -> tuple[t5.T5Encoder, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Any]:
    """The encoder, and the shapes of ids, mask and parameters."""
    encoder = t5.T5Encoder(dataclasses.replace(t5.XXL, decoder_layers=0, dtype=settings.dtype))
    tokens = jax.ShapeDtypeStruct((settings.batch, 128), jnp.int32)
    mask = jax.ShapeDtypeStruct((settings.batch, 128), jnp.bool_)
    return encoder, tokens, mask, jax.eval_shape(encoder.init, jax.random.key(0), tokens, mask)


def _estimate(settings: Run, stage: DiffusionModel, mesh: Any) -> dict[str, Any]:
    state = abstract_state(stage, optimizer_of(settings), mesh, presets.placement(stage, settings.rows))
    local = presets.executed(stage, sharding=ActivationSharding())
    rows = settings.batch // batch_devices(mesh) // settings.accumulate
    costs = estimated_costs(
        local, state, stage.batch_spec(rows, side_of(settings, stage)), accumulate=settings.accumulate
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
