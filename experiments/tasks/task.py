"""The interface between commands and trainable models.

`train`, `sample`, `plan` and `benchmark` use `Task`; a new system adds its tasks to `experiments/table.py` and changes
no command.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jax.sharding import Mesh

from experiments.options.cores import LEAST
from experiments.options.training import ComputeOptions, Rule, TrainSettings
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.held_out import HeldOutBatches
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.param_sharding import ParamSharding
from jaxdiff.training.prefetch import Batches
from jaxdiff.training.state import Params, Trainable


@dataclass(frozen=True)
class Start:
    """The number of processes and the mesh over their devices."""

    processes: int
    mesh: Mesh


@dataclass(frozen=True)
class Work:
    """A model and its data.

    data: description of the batches, which must be unchanged when a run resumes.
    finish: called on process 0 with the EMA parameters and `extra`; writes OUT/model and returns a line about it.
    initial, initial_extra: initial parameters and `extra`. frozen: arrays that the loss reads and never updates. All on
    the host.
    begin: called on process 0 before the first step, after all checks.
    held_out: batches of the held-out loss.
    """

    model: Trainable
    batches: Batches
    data: Mapping[str, Any]
    finish: Callable[[Params, Any], str]
    initial: Params | None = None
    initial_extra: Any = None
    frozen: Any = ()
    begin: Callable[[], None] = lambda: None
    placement: ParamSharding = ParamSharding()
    sample_hook: Callable[[int, Params, Any], None] | None = None
    held_out: HeldOutBatches | None = None


@dataclass(frozen=True)
class Inference:
    """The repeated computation of a trained model: a sampling step, or the encoding of a batch.

    function: of (params, *given). given: shapes and types. used: the parameters of `function`, from the trained and the
    frozen ones.
    """

    function: Callable[..., Any]
    given: tuple[Any, ...]
    used: Callable[[Params, Any], Params] = lambda params, frozen: params


@dataclass(frozen=True)
class Task(ABC):
    """A kind of model, for the commands.

    about: one line for --help. presets: settings of the model by size.
    """

    about: str
    presets: dict[str, Any] = field(default_factory=dict)
    settings: TrainSettings = TrainSettings()
    unit: ClassVar[str] = "images"
    replicated_parameters: ClassVar[bool] = True
    """Whether inference replicates the parameters on every device."""
    least_batch: ClassVar[int] = 1
    least_on_a_core: ClassVar[int] = LEAST
    """Examples for which a core of a CPU becomes a device of its own."""
    takes_init: ClassVar[bool] = False
    """Whether a run can start from the parameters of another (--init)."""
    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW()}

    @abstractmethod
    def prepare(self, settings: Any, start: Start) -> Work:
        """Prepare a training run. Bad settings are rejected before anything is written."""

    def config(self, settings: TrainSettings, name: str) -> TrainConfig:
        """Settings of the training loop, with the preset's defaults. ValueError naming the flag."""
        return settings.config(self.rules, name, self.unit)

    def model(self, preset: str, compute: ComputeOptions) -> Trainable:
        """The preset with these compute settings. ValueError for an unknown preset."""
        return self.preset(preset)

    def preset(self, name: str) -> Any:
        if name not in self.presets:
            raise ValueError(f"--preset {name}: choose from {', '.join(self.presets)}")
        return self.presets[name]

    def side(self, model: Any, crop: int | None) -> int:
        """Side of the training images in pixels; 0 if there are none. ValueError for a bad `crop`."""
        if crop is not None:
            raise ValueError("--crop: this model is not trained on crops")
        return getattr(model, "side", 0)

    def resized(self, model: Any, side: int) -> Trainable:
        """The model for images of this side in pixels. ValueError if it cannot have this one."""
        raise ValueError(f"--side {side}: this model has one size")

    def frozen(self, model: Any) -> Any:
        """Shapes and types of the arrays that the loss reads and never updates."""
        return ()

    def placement(self, model: Any, compute: ComputeOptions) -> ParamSharding:
        """How the parameters are sharded over a mesh."""
        return ParamSharding()

    def inference(self, preset: str, model: Any, count: int) -> Inference | None:
        """One evaluation for `count` examples; None if only training is planned and measured."""
        return None

    def on_one_device(self, model: Any) -> Trainable:
        """The model computed without a mesh."""
        return model

    def pipeline(self, folders: Sequence[str | Path]) -> Pipeline | None:
        """The pipeline for folders of runs, the first of which is of this task; None if `from_pretrained` loads it."""
        return None
