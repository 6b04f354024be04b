"""What the tasks of transformers of codes share: DALL·E 1's (`dalle.py`) and DALL·E 2's autoregressive prior
(`prior_codes.py`)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import jax

from experiments.options.training import ComputeOptions, PresetOptimizer, Rule, TrainSettings
from experiments.tasks.task import Inference, Task
from jaxdiff.data.example import Source
from jaxdiff.data.latents import Stream
from jaxdiff.models.autoregressive import AutoregressiveModel
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.nets.execution import ExecutionConfig, Remat
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.optimizer import AdamW, Muon
from jaxdiff.training.state import Params
from jaxdiff.weights import dalle


@dataclass(frozen=True)
class TransformerCompute(ComputeOptions):
    """Compute settings of a transformer."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and optimizer stay float32. Use bfloat16 on accelerators."""
    remat: Remat = "none"
    """What the backward pass recomputes to save memory."""
    scan: bool = False
    """Run layers as a loop, which compiles faster."""


@dataclass(frozen=True)
class Preset:
    """A model, its sampling settings, and the defaults of its training. side: of the images, for plans."""

    model: AutoregressiveModel
    sampling: TokenSampling = TokenSampling()
    optimizer: PresetOptimizer = PresetOptimizer("adam", 1e-4)


@dataclass(frozen=True)
class CodesTask(Task):
    """A transformer of text and codes."""

    takes_init: ClassVar[bool] = True
    replicated_parameters: ClassVar[bool] = False  # the paper's does not fit one chip
    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW(b2=0.96), "muon": Muon()}
    presets: dict[str, Preset] = field(default_factory=dict)

    def config(self, settings: TrainSettings, name: str) -> TrainConfig:
        return settings.config(self.rules, name, self.unit, self.preset(settings.preset).optimizer)

    def model(self, preset: str, compute: TransformerCompute) -> AutoregressiveModel:
        model = self.preset(preset).model
        execution = ExecutionConfig(compute.dtype, compute.remat, compute.scan)
        return dataclasses.replace(model, network=dataclasses.replace(model.network, execution=execution))

    def inference(self, preset: str, model: AutoregressiveModel, count: int) -> Inference:
        """The logits of complete sequences."""
        batch, network = model.batch_spec(count, 0), model.network.module()
        run = lambda params, *given: network.apply({"params": params}, *given)  # noqa: E731
        return Inference(run, tuple(batch[name] for name in ("ids", "text_mask", "image")), lambda params, _: params)


def initial(settings: TrainSettings, model: AutoregressiveModel) -> Params | None:
    """The parameters of another run. ValueError if it is of another network."""
    if settings.run.init is None or settings.resumes:
        return None
    other = dalle.load_generator(settings.run.init)
    if other.model.network != model.network:
        raise ValueError(f"--init {settings.run.init}: another network than --preset {settings.preset} on these codes")
    return jax.device_get(other.params)


def finished(settings: TrainSettings, folder: Path, batches: Stream, source: Source) -> str:
    """The last lines of a run: examples that were left out, if there were any, and where the model is."""
    line = f"{folder}: the averaged parameters of step {settings.run.steps}"
    summary = batches.skipped.summary(len(source))
    return f"{summary}\n{line}" if summary else line
