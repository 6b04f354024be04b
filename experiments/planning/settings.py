"""Settings of a plan and their checks."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.options.training import ComputeOptions
from experiments.tasks.diffusion import UNetCompute
from experiments.tasks.task import Task
from jaxdiff.training import chips
from jaxdiff.training.mesh import parse
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.state import Trainable


@dataclass(frozen=True)
class PlanSettings:
    """Settings of a plan."""

    topology: str = ""
    """Chips and their topology: v4:4x8x8 | v5e:16x16 | v5p:4x8x8 | v6e:16x16 | tpu7x:4x8x8, or GPUs of one host:
    h100:8 | h200:8 | b200:8 | a100:8 | l4:1 | rtx4090:1 | rtx3090:1, which are estimated without the extra `cuda`."""
    preset: str = "tiny"
    """Size of the network."""
    batch: int = 256
    """Global batch size: examples per step over all devices."""
    mesh: str = "fsdp=-1"
    """Devices along each axis, such as data=8,fsdp=32 or fsdp=64,tensor=4; -1: all remaining devices."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches per step."""
    crop: int | None = None
    """Side of super-resolution's training images in pixels; default: a quarter of the resolution."""
    side: int | None = None
    """Side of the images in pixels; default: the preset's."""
    optimizer: Literal["adam", "adafactor", "muon"] | None = None
    """Default: the paper's, Adafactor for Imagen's base and Adam for the others."""
    sample: bool = False
    """Plan inference instead of a training step: a sampling step of full images with both branches of guidance, or the
    encoding of captions by a T5."""
    json: Path | None = None
    """Save the plan to this file; the same settings read it instead of compiling."""
    hlo: Path | None = None
    """Write the compiled program as text to this file."""
    arrays: bool = False
    """List every array of the train state with its sharding and bytes."""
    compute: ComputeOptions = ComputeOptions()


ADAFACTOR = ("imagen.base64",)
"""Models trained with Adafactor in the paper."""


@dataclass(frozen=True)
class Planned:
    """A task with the settings of its plan."""

    name: str
    task: Task
    settings: PlanSettings

    @property
    def model(self) -> Trainable:
        return self._model(self.settings.compute)

    @property
    def plain(self) -> Trainable:
        """The model on one device without rematerialization, for counting."""
        compute = self.settings.compute
        left = {"remat": "none", "scan": False, "rows": False} if isinstance(compute, UNetCompute) else {}
        return self.task.on_one_device(self._model(dataclasses.replace(compute, **left)))

    @property
    def side(self) -> int:
        return self.task.side(self.model, self.settings.crop)

    @property
    def optimizer(self) -> OptimizerConfig:
        chosen = self.settings.optimizer or ("adafactor" if self.name in ADAFACTOR else "adam")
        if chosen not in self.task.rules:
            raise ValueError(f"--optimizer {chosen}: {self.name} has {', '.join(self.task.rules)}")
        return OptimizerConfig(kind=self.task.rules[chosen])

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a batch."""
        return self.model.batch_spec(self.settings.batch, self.side)

    def inference(self, model: Trainable) -> Any:
        """The inference step. ValueError if the task has none."""
        inference = self.task.inference(self.settings.preset, model, self.settings.batch)
        if inference is None:
            raise ValueError(f"--sample: {self.name} has only a training step to plan")
        return inference

    def _model(self, compute: ComputeOptions) -> Trainable:
        model, side = self.task.model(self.settings.preset, compute), self.settings.side
        return model if side is None else self.task.resized(model, side)

    def __str__(self) -> str:
        return f"{self.name} {self.settings.preset} for {self.settings.topology}"


def check(asked: Planned, topology: chips.Topology) -> None:
    """ValueError for settings that cannot be planned, before anything is traced."""
    settings = asked.settings
    for name in ("batch", "accumulate", "crop", "side"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    missing = None if topology.is_tpu else chips.missing_compiler(topology)
    shape = parse(settings.mesh).over(topology.devices)
    if missing is not None and settings.sample:
        raise ValueError(f"--sample is for chips that are compiled for: {missing}")
    if missing is not None and shape.tensor > 1:
        raise ValueError(f"--mesh tensor: estimates know data and fsdp alone, and {missing}")
    default = flat(dataclasses.replace(PlanSettings(), compute=type(settings.compute)()))
    given = flat(settings)
    for names, reason in _without_meaning(asked, topology, shape.tensor):
        for name in names:
            if given.get(name) != default.get(name):
                raise ValueError(f"--{name} means nothing here: {reason}")
    _ = asked.model, asked.side, asked.optimizer
    _check_memory(asked, topology, shape.data * shape.fsdp)


def flat(settings: PlanSettings) -> dict[str, Any]:
    """All settings by name, including the compute settings."""
    values = dataclasses.asdict(settings)
    return values | values.pop("compute")


def _without_meaning(asked: Planned, topology: chips.Topology, tensor: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings without effect on this plan, and the reason."""
    if asked.settings.sample:
        yield (
            ("remat", "accumulate", "crop", "optimizer", "arrays"),
            "sampling has no backward pass, crops or optimizer",
        )
    if tensor == 1:
        yield ("rows",), "the mesh has one device along tensor; --mesh data=2,tensor=2 has two"
    if not topology.is_tpu and (missing := chips.missing_compiler(topology)):
        yield ("scan", "hlo"), f"nothing is compiled: {missing}"


def _check_memory(asked: Planned, topology: chips.Topology, shards: int) -> None:
    """ValueError if the input batch alone exceeds the memory of the devices."""
    settings, one = asked.settings, dataclasses.replace(asked.settings, batch=1)
    row = dataclasses.replace(asked, settings=one)  # some batches are too large for a shape
    given = jax.tree.leaves(row.inference(row.plain).given if settings.sample else row.spec)
    size = settings.batch * sum(leaf.size * leaf.dtype.itemsize for leaf in given if _is_plain(leaf)) // shards
    memory = topology.chip.memory / topology.chip.devices
    if size > memory:
        raise ValueError(
            f"--batch {settings.batch}: split into {shards}, its arrays alone take {size // 2**30:,} GiB of a device, "
            f"which has {memory / chips.GIB:.0f}"
        )


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers, not of keys."""
    return isinstance(leaf.dtype, np.dtype)
