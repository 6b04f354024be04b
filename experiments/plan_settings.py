"""What can be asked of a plan: the settings of `experiments.plan`, what they stand for, and what is refused."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from experiments.imagen import presets
from jaxdiff.models.diffusion import DiffusionModel, check_crop
from jaxdiff.nets import t5
from jaxdiff.nets.unet import EfficientUNetConfig, Remat
from jaxdiff.training import chips
from jaxdiff.training.mesh import parse
from jaxdiff.training.optimizer import Adafactor, AdamW, OptimizerConfig

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
    """Equal blocks in a row as one loop, which compiles faster: Efficient U-Nets alone (sr256, sr1024, tiny)."""
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


def stage_of(settings: Run) -> DiffusionModel:
    stage = presets.executed(presets.reading(settings.stage, settings.preset), dtype=settings.dtype)
    return presets.split(stage, settings.remat, settings.scan, settings.rows)


def optimizer_of(settings: Run) -> OptimizerConfig:
    name = settings.optimizer or ("adafactor" if settings.stage == "base64" else "adam")
    return OptimizerConfig(kind=OPTIMIZERS[name])


def side_of(settings: Run, stage: DiffusionModel) -> int:
    side = stage.side if stage.low_res is None else settings.crop or stage.side // 4
    check_crop(stage, side)
    return side


def check(settings: Run, topology: chips.Topology) -> None:
    """ValueError for what cannot be planned, before anything is traced."""
    for name in ("batch", "accumulate", "crop"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    if settings.stage == "text" and (not topology.is_tpu or settings.sample):
        raise ValueError("--stage text: for TPU topologies, and there is nothing to sample")
    if settings.sample and not topology.is_tpu:
        raise ValueError("--sample: for TPU topologies, which are compiled for")
    shape = parse(settings.mesh).over(topology.devices)
    if not topology.is_tpu and shape.tensor > 1:
        raise ValueError("--mesh tensor: for TPU topologies, which are compiled for; estimates know data and fsdp")
    default = Run(settings.topology)
    for names, reason in _without_meaning(settings, topology, shape.tensor):
        for name in names:
            if getattr(settings, name) != getattr(default, name):
                raise ValueError(f"--{name} means nothing here: {reason}")
    _check_memory(settings, topology, shape.data * shape.fsdp)


def _without_meaning(settings: Run, topology: chips.Topology, tensor: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that change nothing of this question, and why."""
    if settings.stage == "text":
        yield (
            ("preset", "rows", "remat", "scan", "accumulate", "crop", "optimizer", "arrays"),
            "the text encoder has one size and is not trained",
        )
        return
    if settings.sample:
        yield ("remat", "accumulate", "crop", "optimizer", "arrays"), "drawing has no backward pass, crops or optimizer"
    stage = presets.stage(settings.stage, settings.preset)
    if stage.low_res is None:
        yield ("crop",), f"{settings.stage} trains on whole pictures"
    if not isinstance(stage.unet, EfficientUNetConfig) or max(stage.unet.blocks) < 2:
        yield ("scan",), f"the network of {settings.stage} {settings.preset} has no equal blocks in a row"
    if tensor == 1:
        yield ("rows",), "the mesh has one device along tensor, as in --mesh data=2,tensor=2 it has two"
    if not topology.is_tpu:
        yield ("scan", "hlo"), "nothing is compiled for GPUs"


def _check_memory(settings: Run, topology: chips.Topology, parts: int) -> None:
    """ValueError where the batch alone, which the step reads, is larger than the chips' memory."""
    if settings.stage == "text":
        row = 128 * t5.XXL.d_model * 2  # the embedding of a caption
    else:
        stage = stage_of(settings)
        shapes = stage.batch_spec(1, stage.side if settings.sample else side_of(settings, stage))
        row = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
    size, memory = settings.batch * row // parts, topology.chip.memory / topology.chip.devices
    if size > memory:
        raise ValueError(
            f"--batch {settings.batch}: split into {parts}, its arrays alone take {size // 2**30:,} GiB of a device, "
            f"which has {memory / chips.GIB:.0f}"
        )
