"""Training a LoRA, a ControlNet or all parameters of a given latent diffusion model.

    python -m experiments.train sd.lora --weights v1-5.safetensors --data folder:photos --steps 500 --out runs/lora
    python -m experiments.sample "a photo of sks dog" --weights v1-5.safetensors --lora runs/lora/lora.safetensors
    python -m experiments.train sd.controlnet --weights v1-5.safetensors --data folder:photos --out runs/edges
    python -m experiments.sample "a house" --weights v1-5.safetensors --control runs/edges/model --hint a.png --edges
    python -m experiments.train sd.finetune --weights v1-5.safetensors --data folder:photos --out runs/photos
    python -m experiments.train sd.finetune --weights v1-5.safetensors --fresh --data folder:photos --out runs/scratch

The base is a Stable Diffusion, or a run of `sd.unet`. Images are encoded once, captions too if they are few. A LoRA is
written in diffusers' and in kohya's layout; the hints of a ControlNet are the edge maps of the training images;
`sd.finetune` writes a pipeline in diffusers' layout.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from experiments.options.training import Rule
from experiments.tasks.diffusion import sampling_step
from experiments.tasks.fine_tuning import Captions, FineTuning, FineTuningSettings
from experiments.tasks.task import Inference
from jaxdiff.models import lora
from jaxdiff.models.control import ControlModel, with_controls
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.diffusion_lora import DiffusionLoRA, TextTower
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.control import ControlNetConfig
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.clip import CLIPTextEncoder
from jaxdiff.text.combined import CombinedTextEncoder
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.training.optimizer import Adafactor, AdamW
from jaxdiff.training.state import Params
from jaxdiff.weights import control, latent_unet, stable_diffusion_export
from jaxdiff.weights import lora as lora_files
from jaxdiff.weights.lora import Layout
from jaxdiff.weights.lora_names import Networks

TARGETS = {"attention": lora.ATTENTION, "transformers": lora.TRANSFORMERS, "all": lora.ALL}
"""Names of the kernels with a LoRA."""


@dataclass(frozen=True)
class LoRAOptions:
    """Size of a LoRA."""

    rank: int = 8
    """Rank of the differences."""
    alpha: float | None = None
    """Scale times the rank; default: the rank, a scale of 1."""
    targets: Literal["attention", "transformers", "all"] = "attention"
    """Layers of the U-Net: attention, all of the transformers, or all."""
    train_text: bool = False
    """Train a LoRA of the attention of the CLIP text encoders too."""


@dataclass(frozen=True)
class LoRASettings(FineTuningSettings):
    """Train a LoRA."""

    lora: LoRAOptions = LoRAOptions()


@dataclass(frozen=True)
class ControlSettings(FineTuningSettings):
    """Train a ControlNet."""


@dataclass(frozen=True)
class WholeOptions:
    """Initial parameters."""

    fresh: bool = False
    """Start from random parameters: trains the network of --weights from scratch, on its text encoder and
    autoencoder."""


@dataclass(frozen=True)
class WholeSettings(FineTuningSettings):
    """Train all parameters of the U-Net."""

    whole: WholeOptions = WholeOptions()


@dataclass(frozen=True)
class LoRATask(FineTuning):
    """A LoRA of a latent diffusion model."""

    settings: LoRASettings = LoRASettings()

    def adapter(self, settings: LoRASettings, base: DiffusionModel, text: TextEncoder | None = None) -> DiffusionLoRA:
        options = settings.lora
        if options.rank < 1:
            raise ValueError(f"--rank {options.rank}: at least 1")
        towers = tuple(map(_tower, _clips(text))) if options.train_text else ()
        return DiffusionLoRA(base, TARGETS[options.targets], options.rank, options.alpha, towers)

    def given(self, base: Params) -> Any:
        return {lora.MODEL: base}

    def with_text(self, frozen: Any, model: DiffusionLoRA, text: TextEncoder) -> Any:
        if not model.towers:
            return frozen
        params = ({"text": encoder.params["text"]} for encoder in _clips(text))
        return frozen | jax.device_get(dict(zip(lora.TEXT, params)))

    def text_entries(self, model: DiffusionLoRA, captions: Captions, texts: list[str]) -> dict[str, np.ndarray]:
        if not model.towers:
            return captions.entries(texts)
        names = (name.replace("text", "ids") for name in lora.TEXT)
        return {name: np.asarray(clip.tokenize(texts).ids) for name, clip in zip(names, _clips(captions.encoder))}

    def applied(self, pipeline: Pipeline, params: Params, model: DiffusionLoRA) -> Pipeline:
        generator, text = pipeline.generator, pipeline.text_encoder
        assert isinstance(generator, TrainedModel)
        merged = lora.merged(generator.params, [(params[lora.MODEL], 1.0)])
        if model.towers:
            each = [
                dataclasses.replace(clip, params=clip.params | lora.merged({"text": clip.params["text"]}, [(own, 1.0)]))
                for clip, own in zip(_clips(text), (params[name] for name in lora.TEXT if name in params))
            ]
            text = dataclasses.replace(text, encoders=tuple(each)) if isinstance(text, CombinedTextEncoder) else each[0]
        return dataclasses.replace(pipeline, generator=dataclasses.replace(generator, params=merged), text_encoder=text)

    def save(self, settings: LoRASettings, pipeline: Pipeline, model: DiffusionLoRA, params: Params) -> str:
        assert isinstance(pipeline.generator, TrainedModel)
        towers = tuple(tower.config for tower in model.towers)
        networks = Networks(latent_unet.network_of(pipeline.generator.model), towers)
        for name, layout in (("lora", Layout.DIFFUSERS), ("lora-kohya", Layout.KOHYA)):
            lora_files.export(params, networks, settings.out / f"{name}.safetensors", layout=layout)
        return (
            f"{settings.out / 'lora.safetensors'}: a LoRA of rank {settings.lora.rank} for diffusers, and "
            "lora-kohya.safetensors beside it for others"
        )


@dataclass(frozen=True)
class ControlTask(FineTuning):
    """A ControlNet of a latent diffusion model."""

    settings: ControlSettings = ControlSettings()
    hinted: ClassVar[bool] = True
    dropout: ClassVar[float] = 0.5

    def adapter(self, settings: ControlSettings, base: DiffusionModel, text: TextEncoder | None = None) -> ControlModel:
        stride, channels = base.product.stride, base.product.channels
        # It is executed as the base is; diffusers' layout has no coordinates.
        plain = dataclasses.replace(base.unet, execution=ExecutionConfig(), coordinates=False)
        return ControlModel(base, ControlNetConfig(plain, channels, 3, (16, 32, 96, 256)[: stride.bit_length()]))

    def given(self, base: Params) -> Any:
        return base

    def start(self, settings: ControlSettings, model: ControlModel, base: Params) -> Params:
        return jax.device_get(model.initial(jax.random.key(settings.run.seed), base))

    def inference(self, preset: str, model: ControlModel, count: int) -> Inference:
        """A sampling step of the base with this ControlNet."""
        step = sampling_step(model.model, self.base(preset).sampling, count)

        def used(params: Params, frozen: Any) -> Params:
            return {"base": model.base.cast(frozen), "controls": (params,)}

        return dataclasses.replace(step, used=used)

    def applied(self, pipeline: Pipeline, params: Params, model: ControlModel) -> Pipeline:
        assert isinstance(pipeline.generator, TrainedModel)
        return dataclasses.replace(pipeline, generator=with_controls(pipeline.generator, [(model.control, params)]))

    def save(self, settings: ControlSettings, pipeline: Pipeline, model: ControlModel, params: Params) -> str:
        assert isinstance(pipeline.generator, TrainedModel)
        unet = latent_unet.network_of(pipeline.generator.model)
        network, folder = control.Network(model.control, unet.text_width, unet.vector), settings.out / "model"
        control.export_control(network, params, folder)
        return f"{folder}: a ControlNet of edge maps, for diffusers and --control of experiments.sample"


@dataclass(frozen=True)
class WholeTask(FineTuning):
    """All parameters of a latent diffusion model's U-Net."""

    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW(), "adafactor": Adafactor()}
    settings: WholeSettings = WholeSettings()

    def adapter(self, settings: WholeSettings, base: DiffusionModel, text: TextEncoder | None = None) -> DiffusionModel:
        return base

    def base_of(self, model: DiffusionModel) -> DiffusionModel:
        return model

    def on_base(self, model: DiffusionModel, base: DiffusionModel) -> DiffusionModel:
        return base

    def given(self, base: Params) -> Any:
        return ()

    def start(self, settings: WholeSettings, model: DiffusionModel, base: Params) -> Params | None:
        return None if settings.whole.fresh else jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), base)

    def inference(self, preset: str, model: DiffusionModel, count: int) -> Inference:
        return sampling_step(model, self.base(preset).sampling, count)

    def applied(self, pipeline: Pipeline, params: Params, model: DiffusionModel) -> Pipeline:
        assert isinstance(pipeline.generator, TrainedModel)
        return dataclasses.replace(pipeline, generator=dataclasses.replace(pipeline.generator, params=params))

    def check(self, pipeline: Pipeline) -> None:
        if not all(isinstance(clip, CLIPTextEncoder) for clip in _encoders(pipeline.text_encoder)):
            raise ValueError("--weights: its text encoder is not CLIP; continue a run with sd.unet --init RUN")

    def save(self, settings: WholeSettings, pipeline: Pipeline, model: DiffusionModel, params: Params) -> str:
        folder = settings.out / "model"
        stable_diffusion_export.export(self.applied(pipeline, params, model), folder)
        return f"{folder}: a pipeline in diffusers' layout"


def _encoders(text: TextEncoder | None) -> tuple[TextEncoder | None, ...]:
    return text.encoders if isinstance(text, CombinedTextEncoder) else (text,)


def _clips(text: TextEncoder | None) -> tuple[CLIPTextEncoder, ...]:
    """The CLIP text encoders. ValueError for others."""
    found = tuple(each for each in _encoders(text) if isinstance(each, CLIPTextEncoder))
    if len(found) != len(_encoders(text)) or any(clip.chunks > 1 for clip in found):
        raise ValueError("--train-text: the text encoder of --weights is not CLIP")
    return found


def _tower(clip: CLIPTextEncoder) -> TextTower:
    empty = tuple(map(int, np.asarray(clip.tokenize([""]).ids)[0]))
    return TextTower(clip.config, clip.skip_last, clip.final_norm, clip.pooling, empty=empty)
