"""Training on top of a given latent diffusion model: its data, captions and samples. What is trained: `adapters.py`."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.options.training import OptimizerOptions, PresetOptimizer, Rule, RunOptions, TrainSettings
from experiments.tasks.diffusion import Preset, UNetCompute, placement, resized, split
from experiments.tasks.held_out import held_out_source
from experiments.tasks.latents import LatentOptions, Latents
from experiments.tasks.streams import stream
from experiments.tasks.task import Start, Task, Work
from jaxdiff.core.trees import digest_of
from jaxdiff.data import grids, sources
from jaxdiff.data.edges import edge_map
from jaxdiff.data.example import Source
from jaxdiff.data.images import to_uint8
from jaxdiff.data.latents import ExtendedBatches, LatentBatches
from jaxdiff.data.mixture import spread
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.diffusion import noise
from jaxdiff.models.autoencoder import TrainedAutoencoder
from jaxdiff.models.conditioners import NullText, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel, executed
from jaxdiff.models.hints import HintImage
from jaxdiff.models.sampling import SampleRequest, TrainedModel
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEmbedding, TextEncoder
from jaxdiff.training.distributed import gathered, once
from jaxdiff.training.held_out import HeldOutBatches
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.param_sharding import ParamSharding
from jaxdiff.training.state import Params, abstract_params
from jaxdiff.weights import pretrained
from jaxdiff.weights.pretrained import LoadOptions

SHOWN = 4
"""Samples of a grid."""
KEPT = 4096
"""Embedded captions in memory: 1 GB for Stable Diffusion 1, 2.6 GB for XL."""


class Captions:
    """Embeddings of captions, on the host. The last `KEPT` are kept, so that those of a small set are computed once.
    zeros: whether the null text is zeros."""

    def __init__(self, encoder: TextEncoder, text: TextConditioner | None):
        assert text is not None
        self.encoder, self._kept, self.zeros = encoder, {}, text.null is NullText.ZEROS

    def embedding(self, captions: list[str]) -> TextEmbedding:
        self._kept = dict(list(self._kept.items())[-KEPT:])
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        if new:
            embedded = jax.tree.map(np.asarray, self.encoder.encode(new)._replace(ids=None))
            self._kept |= {text: jax.tree.map(lambda a, i=i: a[i], embedded) for i, text in enumerate(new)}
        rows = [self._kept[caption] for caption in captions]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    def entries(self, captions: list[str]) -> dict[str, np.ndarray]:
        """What a batch of the model needs of its captions."""
        text = self.embedding(captions)
        result = {"text": text.tokens, "text_mask": text.mask}
        if text.pooled is not None:
            result["text_pooled"] = text.pooled
        if not self.zeros:
            null = self.embedding([""] * len(captions))
            result["null_text"] = null.tokens
            if null.pooled is not None:
                result["null_pooled"] = null.pooled
        return result


Read = Callable[[list[str]], dict[str, np.ndarray]]
"""Captions to entries of a batch."""


@dataclass(frozen=True)
class BaseOptions:
    """The latent diffusion model to begin with."""

    weights: str = ""
    """A Stable Diffusion (file, folder or hub id), or a run of sd.unet."""
    vae: str | None = None
    """File or folder of the autoencoder, instead of the model's."""
    side: int | None = None
    """Side of the training images in pixels; default: that of the model's training."""
    text_dropout: float | None = None
    """Fraction of captions to drop; default: 0.1, and 0.5 for a ControlNet."""
    base_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of parameters that are not trained. float16 changes nothing for files in float16; bfloat16 is for
    ControlNets: a LoRA then learns the difference to rounded parameters."""

    def load(self, dropout: float) -> Pipeline:
        """The pipeline, with the side and the dropout of this training. ValueError naming a bad option."""
        if not self.weights:
            raise ValueError("--weights is missing: name a Stable Diffusion, or a run of sd.unet")
        pipeline = pretrained.load(self.weights, LoadOptions(vae=self.vae))
        generator, decoder = pipeline.generator, pipeline.decoders[0] if pipeline.decoders else None
        if not isinstance(generator, TrainedModel) or not isinstance(decoder, TrainedAutoencoder):
            raise ValueError(f"--weights {self.weights}: not a latent diffusion model")
        side = generator.side * decoder.factor if self.side is None else self.side
        decoder.check((side, side))
        dropout = dropout if self.text_dropout is None else self.text_dropout
        conditioners = tuple(
            dataclasses.replace(each, dropout=dropout) if isinstance(each, TextConditioner) else each
            for each in generator.model.conditioners
        )
        model = dataclasses.replace(generator.model, side=side // decoder.factor, conditioners=conditioners)
        return dataclasses.replace(pipeline, generator=dataclasses.replace(generator, model=model))


@dataclass(frozen=True)
class FineTuningSettings(TrainSettings):
    """Settings of LoRAs, ControlNets and fine-tuning."""

    preset: str = "default"
    """Optimizer and learning rate; the size is that of --weights."""
    run: RunOptions = RunOptions(steps=500, batch=4, ema_decay=0.99)
    optimization: OptimizerOptions = OptimizerOptions(weight_decay=0.01)
    compute: UNetCompute = UNetCompute()
    base: BaseOptions = BaseOptions()


@dataclass(frozen=True)
class FineTuning(Task):
    """What trainings on top of a latent diffusion model have in common.

    bases: presets of the base, for planning and benchmarks; training takes the base from --weights.
    """

    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW()}
    presets: dict[str, PresetOptimizer] = dataclasses.field(default_factory=dict)
    settings: FineTuningSettings = FineTuningSettings()
    bases: dict[str, Preset] = dataclasses.field(default_factory=dict)
    hinted: ClassVar[bool] = False
    """Whether batches have hints."""
    dropout: ClassVar[float] = 0.1

    def config(self, settings: TrainSettings, name: str) -> Any:
        return settings.config(self.rules, name, self.unit, self.preset(settings.preset))

    def model(self, preset: str, compute: UNetCompute) -> Any:
        """The adapter of a preset of the base."""
        base = self.base(preset)
        return self.adapter(
            self.settings, split(executed(base.model.reading(*base.reads), dtype=compute.dtype), compute)
        )

    def side(self, model: Any, crop: int | None) -> int:
        return super().side(self.base_of(model), crop)

    def resized(self, model: Any, side: int) -> Any:
        return self.on_base(model, resized(self.base_of(model), side))

    def frozen(self, model: Any) -> Any:
        dtype = self.settings.base.base_dtype
        return self.given(jax.tree.map(lambda leaf: leaf.update(dtype=dtype), abstract_params(self.base_of(model))))

    def placement(self, model: Any, compute: UNetCompute) -> ParamSharding:
        return placement(self.base_of(model), compute)

    def on_one_device(self, model: Any) -> Any:
        return self.on_base(model, executed(self.base_of(model), sharding=ActivationSharding()))

    def base_of(self, model: Any) -> DiffusionModel:
        """The diffusion model of a trainable."""
        return model.base

    def on_base(self, model: Any, base: DiffusionModel) -> Any:
        """The trainable with this diffusion model."""
        return dataclasses.replace(model, base=base)

    def base(self, preset: str) -> Preset:
        if preset not in self.bases:
            raise ValueError(f"--preset {preset}: choose from {', '.join(self.bases)}")
        return self.bases[preset]

    @abstractmethod
    def adapter(self, settings: Any, base: DiffusionModel, text: TextEncoder | None = None) -> Any:
        """The trainable. text: the text encoder, if it is loaded."""

    @abstractmethod
    def given(self, base: Params) -> Any:
        """The frozen arrays, from the base's parameters."""

    def check(self, pipeline: Pipeline) -> None:
        """ValueError for a base that it cannot train on."""

    def text_entries(self, model: Any, captions: Captions, texts: list[str]) -> dict[str, np.ndarray]:
        """What a batch has of its captions."""
        return captions.entries(texts)

    def with_text(self, frozen: Any, model: Any, text: TextEncoder) -> Any:
        """The frozen arrays, with those of a text encoder that is trained too."""
        return frozen

    def start(self, settings: Any, model: Any, base: Params) -> Params | None:
        """Initial parameters; None: the trainable's own."""
        return None

    @abstractmethod
    def applied(self, pipeline: Pipeline, params: Params, model: Any) -> Pipeline:
        """The pipeline with what was trained."""

    @abstractmethod
    def save(self, settings: Any, pipeline: Pipeline, model: Any, params: Params) -> str:
        """Write what was trained; returns a line about it."""

    def prepare(self, settings: FineTuningSettings, start: Start) -> Work:
        if settings.run.init is not None:
            raise ValueError(f"--init {settings.run.init}: this training starts from --weights")
        pipeline, data = settings.base.load(self.dropout), settings.dataset
        self.check(pipeline)
        generator, decoder = pipeline.generator, pipeline.decoders[0]
        assert isinstance(generator, TrainedModel) and isinstance(decoder, TrainedAutoencoder)
        space = Latents(generator.model, decoder, LatentOptions())
        dataset = once(data.data_dir, lambda: sources.open(data.spec(), space.side, "train", data.data_dir))
        source = spread(dataset, data.limit) if data.limit else dataset
        assert pipeline.text_encoder is not None  # the model reads text
        captions = Captions(pipeline.text_encoder, generator.model.text)
        base = split(executed(generator.model, dtype=settings.compute.dtype), settings.compute)
        model, kept = self.adapter(settings, base, pipeline.text_encoder), np.dtype(settings.base.base_dtype)
        frozen = self.given(jax.tree.map(lambda leaf: np.asarray(leaf).astype(kept), generator.params))
        frozen = self.with_text(frozen, model, pipeline.text_encoder)
        held_out = held_out_source(settings, space.side)
        some = None if held_out is None else spread(held_out, min(data.evaluate_n, len(held_out)))
        contents = space.data | {"data": data.shown, "batch": settings.run.batch, "examples": len(source)}
        contents |= {"base": digest_of(generator.params), "text": pipeline.text_encoder.fingerprint}

        def finish(params: Params, extra: Any) -> str:
            return self.save(settings, pipeline, model, params)

        return Work(
            model,
            self._batches(settings, space, source, partial(self.text_entries, model, captions)),
            contents,
            finish,
            initial=self.start(settings, model, generator.params),
            frozen=frozen,
            placement=self.placement(model, settings.compute),
            sample_hook=self._samples(settings, space, source, captions, model, pipeline),
            held_out=self._held_out(settings, space, some, partial(self.text_entries, model, captions)),
        )

    def _batches(self, settings: FineTuningSettings, space: Latents, source: Source, read: Read, **order: bool) -> Any:
        images = stream(settings, source, space.side, captions=True, **order)
        folder = settings.dataset.data_dir / "latents"
        latents = once(settings.dataset.data_dir, lambda: space.encoded_once(source, folder))
        sizes = np.asarray([space.side, space.side, 0, 0, space.side, space.side], np.float32)

        def entries(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            """Embedded captions, image sizes and, if wanted, hints."""
            found = read([str(caption) for caption in batch["caption"]])
            found["sizes"] = np.broadcast_to(sizes, (len(batch["image"]), 6))
            return found | ({"hint": hint_of(batch["image"])} if self.hinted else {})

        return LatentBatches(ExtendedBatches(images, entries), latents)

    def _held_out(
        self, settings: FineTuningSettings, space: Latents, source: Source | None, read: Read
    ) -> HeldOutBatches | None:
        if source is None:
            return None
        return lambda: self._batches(settings, space, source, read, shuffle=False, repeat=False)

    def _samples(
        self,
        settings: FineTuningSettings,
        space: Latents,
        source: Source,
        captions: Captions,
        model: Any,
        pipeline: Pipeline,
    ) -> Callable[[int, Params, Any], None]:
        """The sample hook: a grid of fixed captions, with the hints of their images."""
        config = DataConfig(space.side, SHOWN, captions=True, shuffle=False, repeat=False)
        batch = next(image_batches(spread(source, min(SHOWN, len(source))), config))
        texts, hints = [str(caption) for caption in batch["caption"]], ()
        if self.hinted:
            hints = (HintImage(hint_of(batch["image"])),)
        keys = noise.sample_keys(jax.random.key(settings.run.seed), jnp.arange(len(texts)))

        def sample(step: int, params: Params, extra: Any) -> None:
            side = space.model.side
            now = self.applied(pipeline, params, model)
            assert now.text_encoder is not None and isinstance(now.generator, TrainedModel)
            own = now.text_encoder is pipeline.text_encoder
            read = captions if own else Captions(now.text_encoder, now.generator.model.text)
            text, negative = read.embedding(texts), read.embedding([""] * len(texts))
            request = SampleRequest(
                keys, (side, side), text, None if captions.zeros else negative, progress=lambda done: None, hints=hints
            )
            images = gathered(space.decode(now.generator.generate(request)))
            if images is None:
                return
            shown = [*(2.0 * hint.image[i] - 1.0 for hint in hints for i in range(len(texts))), *images]
            labels = ["hint"] * (len(shown) - len(texts)) + texts
            sheet = grids.grid(shown, labels, min(256, space.side), len(texts))
            grids.write(settings.out / "samples" / f"{step:07d}.png", sheet)
            tqdm.write(f"samples: {settings.out / 'samples' / f'{step:07d}.png'}")

        return sample


def hint_of(images: np.ndarray) -> np.ndarray:
    """The edge maps of images in [-1, 1]: (b h w 3), 0 or 1."""
    return np.stack([edge_map(image, sigma=0.0) for image in to_uint8(images)])
