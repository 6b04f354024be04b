"""What the commands know of a model that is trained on its own.

`train`, `sample`, `plan` and `benchmark` are written against `Task`; a new system adds its tasks to the table in
`experiments/table.py`, and changes no command.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jax.sharding import Mesh

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
    """Where a run starts: the number of processes, the mesh over their devices."""

    processes: int
    mesh: Mesh


@dataclass(frozen=True)
class Work:
    """What is trained, on what.

    data: what the batches are made of, which must stay the same when a run goes on. initial: parameters to begin with,
    on the host. finish: called on process 0 with the averaged parameters; writes OUT/model and returns a line about it.
    held_out: batches whose loss is measured now and then.
    begin: called on process 0 before the first step, once nothing was refused.
    """

    model: Trainable
    batches: Batches
    data: Mapping[str, Any]
    finish: Callable[[Params], str]
    initial: Params | None = None
    begin: Callable[[], None] = lambda: None
    placement: ParamSharding = ParamSharding()
    sample_hook: Callable[[int, Params], None] | None = None
    held_out: HeldOutBatches | None = None


@dataclass(frozen=True)
class Inference:
    """What a trained model computes over and over: a step of sampling, or the encoding of a batch.

    function: of (params, *given). given: shapes and types. used: the parameters that it takes, made of all that are
    trained.
    """

    function: Callable[..., Any]
    given: tuple[Any, ...]
    used: Callable[[Params], Params] = lambda params: params


@dataclass(frozen=True)
class Task:
    """A model as the commands see it; a subclass for each kind.

    about: one line for --help. presets: settings of the model by the names of its sizes.
    """

    about: str
    presets: dict[str, Any] = field(default_factory=dict)
    settings: TrainSettings = TrainSettings()
    unit: ClassVar[str] = "images"
    whole_parameters: ClassVar[bool] = True
    """Whether every device has all parameters when the trained model is used."""
    least_batch: ClassVar[int] = 1
    takes_init: ClassVar[bool] = False
    """Whether a run may begin with the parameters of another."""
    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW()}

    def prepare(self, settings: Any, start: Start) -> Work:
        """What a training run needs. All that can be wrong is refused before anything is written."""
        raise NotImplementedError

    def config(self, settings: TrainSettings, name: str) -> TrainConfig:
        """Of the training loop, where `settings` leave something to the preset too. ValueError naming the flag."""
        return settings.config(self.rules, name, self.unit)

    def model(self, preset: str, compute: ComputeOptions) -> Trainable:
        """The settings of a preset, computed in a certain way. ValueError for a preset that there is not."""
        return self.preset(preset)

    def preset(self, name: str) -> Any:
        if name not in self.presets:
            raise ValueError(f"--preset {name}: choose from {', '.join(self.presets)}")
        return self.presets[name]

    def side(self, model: Any, crop: int | None) -> int:
        """Side in pixels of the images that it is trained on; 0 where there are none. ValueError for a bad `crop`."""
        if crop is not None:
            raise ValueError("--crop: this model is not trained on crops")
        return getattr(model, "side", 0)

    def placement(self, model: Any, compute: ComputeOptions) -> ParamSharding:
        """How its parameters are split over a mesh."""
        return ParamSharding()

    def inference(self, preset: str, model: Any, count: int) -> Inference | None:
        """One evaluation for `count` examples; None where only training is planned and measured."""
        return None

    def on_one_device(self, model: Any) -> Trainable:
        """The model as it is computed without a mesh."""
        return model

    def pipeline(self, folders: Sequence[str | Path]) -> Pipeline | None:
        """The pipeline that samples from folders of runs, the first of them this task's; None: `from_pretrained`
        knows them."""
        return None
