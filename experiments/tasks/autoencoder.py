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
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.options.training import ComputeOptions, PresetOptimizer, Rule, TrainSettings
from experiments.tasks.held_out import held_out_source
from experiments.tasks.task import Inference, Start, Task, Work
from jaxdiff.data import grids, sources
from jaxdiff.data.example import Source
from jaxdiff.data.mixture import spread
from jaxdiff.data.pipeline import Batches, DataConfig, ReadAhead, image_batches
from jaxdiff.models import codebook
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.autoencoder_training import AutoencoderModel, latent_scale
from jaxdiff.models.codebook import EMACodebook, GradientCodebook
from jaxdiff.nets.autoencoder import KLBottleneck
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.distributed import once
from jaxdiff.training.held_out import HeldOutBatches
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
class AutoencoderTask(Task):
    """An autoencoder of images."""

    takes_init: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW(b1=0.5, b2=0.9), "muon": Muon()}
    presets: dict[str, Preset] = field(default_factory=dict)
    settings: Settings = Settings()

    def config(self, settings: TrainSettings, name: str) -> TrainConfig:
        """One optimizer for each network, with the same settings."""
        config = settings.config(self.rules, name, self.unit, self.preset(settings.preset).optimizer)
        labels = {"autoencoder"} if self._model(settings).adversary is None else {"autoencoder", "discriminator"}
        return dataclasses.replace(config, optimizer=dict.fromkeys(sorted(labels), config.optimizer))

    def model(self, preset: str, compute: AutoencoderCompute) -> AutoencoderModel:
        model = self.preset(preset).model
        network = dataclasses.replace(model.network, dtype=compute.dtype, remat=compute.remat)
        return dataclasses.replace(model, network=network)

    def resized(self, model: AutoencoderModel, side: int) -> AutoencoderModel:
        return dataclasses.replace(model, side=side)

    def inference(self, preset: str, model: AutoencoderModel, count: int) -> Inference:
        """The decoding of latents."""
        side, network = model.side // model.network.stride, model.network.module()
        code = jax.ShapeDtypeStruct((count, side, side, model.network.code_channels), jnp.float32)
        decode = lambda params, code: network.apply({"params": params}, code, method="decode")  # noqa: E731
        return Inference(decode, (code,), lambda params, frozen: params["autoencoder"])

    def prepare(self, settings: Settings, start: Start) -> Work:
        model, data = self._model(settings), settings.dataset
        plain = dataclasses.replace(model, network=dataclasses.replace(model.network, dtype="float32"))
        source = once(data.data_dir, lambda: sources.open(data.spec(), model.side, "train", data.data_dir))
        source = spread(source, data.limit) if data.limit else source
        stream = _batches(settings, model, source)
        held_out = held_out_source(settings, model.side)
        some = None if held_out is None else spread(held_out, min(data.evaluate_n, len(held_out)))
        shown = Reconstructions(model, source if some is None else some, settings.out / "samples")

        def finish(params: Params, extra: Any) -> str:
            return self._saved(settings, model, source, plain.trained(params, extra))

        contents = {"data": data.shown, "batch": settings.run.batch, "side": model.side, "examples": len(source)}
        initial = self._initial(settings, model)
        return Work(
            model,
            stream,
            contents,
            finish,
            initial=None if initial is None else initial[0],
            initial_extra=None if initial is None else initial[1],
            sample_hook=shown,
            held_out=_held_out(settings, model, some),
        )

    def _model(self, settings: TrainSettings) -> AutoencoderModel:
        assert isinstance(settings, Settings)
        return settings.autoencoder.applied(self.model(settings.preset, settings.compute))

    def _initial(self, settings: Settings, model: AutoencoderModel) -> tuple[Params, Any] | None:
        """The parameters of another run's autoencoder, with a new discriminator; its codebook with new averages."""
        if settings.run.init is None or settings.resumes:
            return None
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

    def _saved(self, settings: Settings, model: AutoencoderModel, source: Source, trained: TrainedAutoencoder) -> str:
        folder = settings.out / "model"
        config = DataConfig(model.side, 64, shuffle=False, repeat=False)
        measured = spread(source, min(MEASURED, len(source)))
        images = (batch["image"] for batch in image_batches(measured, config))
        scale = latent_scale(trained, images, jax.random.key(settings.run.seed))
        layout = autoencoder.Settings(trained.config, scale, False, model.side)
        autoencoder.export(layout, trained.params, folder, settings.autoencoder.store)
        return f"{folder}: an autoencoder of stride {trained.factor}, the scale of its latents is {scale:.5f}"


def _batches(settings: Settings, model: AutoencoderModel, source: Source, **order: bool) -> Batches:
    config = DataConfig(
        model.side,
        settings.run.batch // jax.process_count(),
        seed=settings.run.seed,
        strict=settings.dataset.strict,
        **order,
    )
    places = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return image_batches(source, config, **places, read_ahead=ReadAhead(workers=settings.dataset.workers))


def _held_out(settings: Settings, model: AutoencoderModel, source: Source | None) -> HeldOutBatches | None:
    if source is None:
        return None
    return lambda: _batches(settings, model, source, shuffle=False, repeat=False)


class Reconstructions:
    """A sample hook of the training loop: writes fixed images above their reconstructions."""

    def __init__(self, model: AutoencoderModel, source: Source, folder: Path) -> None:
        config = DataConfig(model.side, SHOWN, shuffle=False, repeat=False)
        self._images = next(image_batches(spread(source, min(SHOWN, len(source))), config))["image"]
        self._model, self._folder = model, folder

    def __call__(self, step: int, params: dict, extra: Any) -> None:
        trained: TrainedAutoencoder = self._model.trained(params, extra)
        again = np.asarray(jnp.clip(trained.decoded(trained.encode(jnp.asarray(self._images))), -1.0, 1.0))
        captions = ["image"] * len(again) + ["reconstruction"] * len(again)
        sheet = grids.grid([*self._images, *again], captions, max(128, self._model.side), len(again))
        grids.write(self._folder / f"{step:07d}.png", sheet)
        tqdm.write(f"samples: {self._folder / f'{step:07d}.png'}")
