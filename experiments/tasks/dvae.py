"""Training the discrete VAE of DALL·E 1, on images alone: no captions are needed.

    python -m experiments.train dalle.dvae --data shapes --out runs/dvae
    python -m experiments.train dalle.dvae --preset paper --data folder:photos --out runs/dvae

OUT/model is the dVAE (`weights/dvae.py`). OUT also gets samples/: held-out images, or training images, above their
reconstructions from their likeliest codes.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from experiments.options.training import PresetOptimizer, Rule, TrainSettings
from experiments.tasks.autoencoder import AutoencoderCompute
from experiments.tasks.reconstruction import ReconstructionTask
from experiments.tasks.task import Inference
from jaxdiff.data.example import Source
from jaxdiff.models.dvae import Annealed, DVAEModel, TrainedDVAE
from jaxdiff.nets.dvae import DVAEConfig
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.optimizer import AdamW, Muon
from jaxdiff.training.state import Params
from jaxdiff.weights import dvae


@dataclass(frozen=True)
class DVAEOptions:
    """Settings of a dVAE; defaults are the preset's."""

    side: int | None = None
    """Side of the training images in pixels."""
    kl_weight: float | None = None
    """Final weight of the KL divergence from the uniform distribution."""
    kl_steps: int | None = None
    """Steps until the KL divergence has its final weight."""
    temperature: float | None = None
    """Final temperature of the relaxed codes; the first is the preset's."""
    temperature_steps: int | None = None
    """Steps until the temperature is at its final value."""
    store: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored parameters."""

    def applied(self, model: DVAEModel) -> DVAEModel:
        """The preset with the changes of the command line. ValueError naming the flag."""
        changes: dict[str, Any] = {} if self.side is None else {"side": self.side}
        for name, end, steps, flag in (
            ("kl_weight", self.kl_weight, self.kl_steps, "--kl-steps"),
            ("temperature", self.temperature, self.temperature_steps, "--temperature-steps"),
        ):
            rule: Annealed = getattr(model, name)
            if steps is not None and steps < 1:
                raise ValueError(f"{flag} {steps}: at least 1")
            rule = rule if end is None else dataclasses.replace(rule, end=end)
            changes[name] = rule if steps is None else dataclasses.replace(rule, steps=steps)
        return dataclasses.replace(model, **changes)


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Train a dVAE."""

    dvae: DVAEOptions = DVAEOptions()
    compute: AutoencoderCompute = AutoencoderCompute()


@dataclass(frozen=True)
class Preset:
    """A model and the defaults of its training."""

    model: DVAEModel
    optimizer: PresetOptimizer = PresetOptimizer("adam", 1e-4)


@dataclass(frozen=True)
class DVAETask(ReconstructionTask):
    """A discrete VAE of images."""

    rules: ClassVar[dict[str, Rule]] = {"adam": AdamW(weight_decay=1e-4), "muon": Muon()}
    presets: dict[str, Preset] = field(default_factory=dict)
    settings: Settings = Settings()

    def config(self, settings: TrainSettings, name: str) -> TrainConfig:
        return settings.config(self.rules, name, self.unit, self.preset(settings.preset).optimizer)

    def inference(self, preset: str, model: DVAEModel, count: int) -> Inference:
        """The decoding of codes."""
        side, network = model.side // model.network.stride, model.network.module()
        codes = jax.ShapeDtypeStruct((count, side, side), jnp.int32)
        decode = lambda params, codes: network.apply({"params": params}, codes, method="decode_indices")  # noqa: E731
        return Inference(decode, (codes,), lambda params, frozen: params)

    def model(self, preset: str, compute: AutoencoderCompute) -> DVAEModel:
        model = self.preset(preset).model
        return dataclasses.replace(model, network=_executed(model.network, compute))

    def trained_model(self, settings: Settings) -> DVAEModel:
        return settings.dvae.applied(self.model(settings.preset, settings.compute))

    def initial(self, settings: Settings, model: DVAEModel) -> tuple[Params, Any]:
        """The parameters of another run's dVAE."""
        assert settings.run.init is not None
        trained = dvae.load(dvae.folder_of(settings.run.init))
        if trained.config != dataclasses.replace(model.network, dtype="float32", remat=False):
            raise ValueError(f"--init {settings.run.init}: another network than --preset {settings.preset}")
        return jax.device_get(trained.params), ()

    def saved(self, settings: Settings, model: DVAEModel, source: Source, trained: TrainedDVAE) -> str:
        folder = settings.out / "model"
        dvae.save(trained, folder, settings.dvae.store)
        return f"{folder}: a dVAE of stride {trained.factor} with {trained.config.codes} codes"


def _executed(network: DVAEConfig, compute: AutoencoderCompute) -> DVAEConfig:
    return dataclasses.replace(network, dtype=compute.dtype, remat=compute.remat)
