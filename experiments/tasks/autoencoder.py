"""Training the autoencoder of latent diffusion, on images alone: no captions are needed.

    python -m experiments.train sd.autoencoder --data shapes --out runs/autoencoder
    python -m experiments.train sd.autoencoder --preset kl-f8 --data folder:photos --side 256 --out runs/autoencoder

OUT/model is an autoencoder in diffusers' layout, with the scale of its latents measured on the training images. OUT
also gets samples/: held-out images, or training images, above their reconstructions. `--autoencoder OUT` of `sd.unet`
reads it, `experiments.evaluate reconstruction` scores it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.options.training import ComputeOptions, PresetOptimizer, Rule, TrainSettings
from experiments.tasks.reconstruction import ReconstructionTask
from experiments.tasks.task import Inference
from jaxdiff.data.example import Source
from jaxdiff.data.mixture import spread
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.models import codebook
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.autoencoder_training import AutoencoderModel, latent_scale
from jaxdiff.models.codebook import EMACodebook, GradientCodebook
from jaxdiff.nets.autoencoder import KLBottleneck
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.optimizer import AdamW, Muon
from jaxdiff.training.state import Params, abstract_params
from jaxdiff.weights import autoencoder, latent_runs

SHOWN = 8
"""Images of a sample grid."""
MEASURED = 1024
"""Images on which the scale of the latents is measured."""


@dataclass(frozen=True)
class AutoencoderOptions:
    """Settings of an autoencoder; defaults are the preset's."""

    side: int | None = None
    """Side of the training images in pixels."""
    kl_weight: float | None = None
    """Weight of the KL divergence."""
    discriminator_start: int | None = None
    """First step of the discriminator; 0: none at all."""
    codebook: Literal["gradient", "ema"] | None = None
    """Train the codebook of VQ by gradients, or by averages of the codes with restarts of unused entries."""
    store: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored parameters."""

    def applied(self, model: AutoencoderModel) -> AutoencoderModel:
        """The preset with the changes of the command line. ValueError naming the flag."""
        given: dict[str, Any] = {
            name: value for name in ("side", "kl_weight") if (value := getattr(self, name)) is not None
        }
        if self.codebook is not None:
            if isinstance(model.network.bottleneck, KLBottleneck):
                raise ValueError(f"--codebook {self.codebook}: this preset has no codebook")
            given["codebook"] = EMACodebook() if self.codebook == "ema" else GradientCodebook()
        start, adversary = self.discriminator_start, model.adversary
        if start is not None and start < 0:
            raise ValueError(f"--discriminator-start {start}: a step, or 0 for no discriminator")
        if start == 0:
            adversary = None
        elif start is not None:
            if adversary is None:
                raise ValueError(f"--discriminator-start {start}: this preset has no discriminator")
            adversary = dataclasses.replace(adversary, start=start)
        return dataclasses.replace(model, adversary=adversary, **given)


@dataclass(frozen=True)
class AutoencoderCompute(ComputeOptions):
    """Compute settings of an autoencoder."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and optimizer stay float32. Use bfloat16 on accelerators."""
    remat: bool = False
    """Recompute every block in the backward pass to save memory."""


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Train an autoencoder."""

    autoencoder: AutoencoderOptions = AutoencoderOptions()
    compute: AutoencoderCompute = AutoencoderCompute()


@dataclass(frozen=True)
class Preset:
    """A model and the defaults of its training."""

    model: AutoencoderModel
    optimizer: PresetOptimizer = PresetOptimizer("adam", 1e-4)


@dataclass(frozen=True)
class AutoencoderTask(ReconstructionTask):
    """An autoencoder of images."""

    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW(b1=0.5, b2=0.9), "muon": Muon()}
    presets: dict[str, Preset] = field(default_factory=dict)
    settings: Settings = Settings()

    def config(self, settings: TrainSettings, name: str) -> TrainConfig:
        """One optimizer for each network, with the same settings."""
        config = settings.config(self.rules, name, self.unit, self.preset(settings.preset).optimizer)
        labels = {"autoencoder"} if self.trained_model(settings).adversary is None else {"autoencoder", "discriminator"}
        return dataclasses.replace(config, optimizer=dict.fromkeys(sorted(labels), config.optimizer))

    def model(self, preset: str, compute: AutoencoderCompute) -> AutoencoderModel:
        model = self.preset(preset).model
        network = dataclasses.replace(model.network, dtype=compute.dtype, remat=compute.remat)
        return dataclasses.replace(model, network=network)

    def inference(self, preset: str, model: AutoencoderModel, count: int) -> Inference:
        """The decoding of latents."""
        side, network = model.side // model.network.stride, model.network.module()
        code = jax.ShapeDtypeStruct((count, side, side, model.network.code_channels), jnp.float32)
        decode = lambda params, code: network.apply({"params": params}, code, method="decode")  # noqa: E731
        return Inference(decode, (code,), lambda params, frozen: params["autoencoder"])

    def trained_model(self, settings: TrainSettings) -> AutoencoderModel:
        assert isinstance(settings, Settings)
        return settings.autoencoder.applied(self.model(settings.preset, settings.compute))

    def initial(self, settings: Settings, model: AutoencoderModel) -> tuple[Params, Any]:
        """The parameters of another run's autoencoder, with a new discriminator; its codebook with new averages."""
        trained = latent_runs.load_autoencoder(settings.run.init)
        plain = dataclasses.replace(model.network, dtype="float32", remat=False)
        if trained.config != plain:
            raise ValueError(f"--init {settings.run.init}: another network than --preset {settings.preset}")
        params = jax.tree.map(np.zeros_like, abstract_params(model))
        if model.adversary is not None:
            params = jax.device_get(jax.jit(lambda key: model.init(key)[0])(jax.random.key(settings.run.seed)))
        own = dict(trained.params)
        extra = codebook.initial(own.pop("codebook"))._asdict() if model.averaged else ()
        return jax.device_get((params | {"autoencoder": own}, extra))

    def saved(self, settings: Settings, model: AutoencoderModel, source: Source, trained: TrainedAutoencoder) -> str:
        folder = settings.out / "model"
        config = DataConfig(model.side, 64, shuffle=False, repeat=False)
        measured = spread(source, min(MEASURED, len(source)))
        images = (batch["image"] for batch in image_batches(measured, config))
        scale = latent_scale(trained, images, jax.random.key(settings.run.seed))
        layout = autoencoder.Settings(trained.config, scale, False, model.side)
        autoencoder.export(layout, trained.params, folder, settings.autoencoder.store)
        return f"{folder}: an autoencoder of stride {trained.factor}, the scale of its latents is {scale:.5f}"
