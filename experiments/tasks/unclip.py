"""Training DALL·E 2: a prior of CLIP's image embeddings, and the decoder that turns them into images.

    python -m experiments.train unclip.prior --data shapes --out runs/prior
    python -m experiments.train unclip.decoder --data shapes --out runs/decoder
    python -m experiments.sample "a large red circle" --weights runs/prior runs/decoder
    python -m experiments.train unclip.sr256 --data shapes --out runs/upsampler

`--clip-model` names the CLIP of prior and decoder, by default the shipped one of `shapes`. All images and captions are
embedded once, and the embeddings stored below --data-dir. `unclip.sr256` trains an upsampler without text; those of
`imagen.sr256` fit too.
"""

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.options.training import TrainSettings
from experiments.tasks.diffusion import DiffusionOptions, DiffusionTask, UNetCompute
from experiments.tasks.samples import Samples
from experiments.tasks.spaces import Space
from experiments.tasks.streams import stream
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.data.embeddings import Embeddings
from jaxdiff.data.example import Source
from jaxdiff.data.latents import IndexedBatches, stored_latents
from jaxdiff.data.mixture import Spread
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.models.conditioners import TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.embedding_boxes import embedding_of
from jaxdiff.models.image_embeddings import CLIPImageEncoder
from jaxdiff.models.representations import EmbeddingConditioner
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.text.clip import CLIPTextEncoder
from jaxdiff.training import multihost
from jaxdiff.training.distributed import once
from jaxdiff.weights import unclip
from jaxdiff.weights.imagen import SHIPPED


@dataclass(frozen=True)
class CLIPOptions:
    """The frozen CLIP."""

    clip_model: str = ""
    """OUT/model of experiments.train clip, or a directory or hub id in the transformers layout. Default: the shipped
    one, for `shapes`."""
    clip_skip: int = 0
    """Take the captions' states before this number of the text tower's last blocks: the last ones may have lost what
    the images of CLIP's training did not tell apart. Prior and decoder must agree."""

    def load(self, data: tuple[str, ...]) -> unclip.CLIPTowers:
        """Both towers. ValueError also for more blocks than the text tower has."""
        source = self.source(data)
        towers = unclip.load_clip(source)
        assert towers.text.config.text is not None  # see `CLIPTextEncoder`
        blocks = towers.text.config.text.layers
        if not 0 <= self.clip_skip <= blocks:
            raise ValueError(f"--clip-skip {self.clip_skip}: the text tower of {source} has {blocks} blocks")
        return dataclasses.replace(towers, text=dataclasses.replace(towers.text, skip_last=self.clip_skip))

    def source(self, data: tuple[str, ...]) -> str:
        """Its place. ValueError if none is named and the shipped one does not know the dataset."""
        if not self.clip_model and set(data) != {"shapes"}:
            raise ValueError(
                f"--data {' '.join(data)}: the shipped CLIP knows `shapes` alone: name another with --clip-model "
                "(openai/clip-vit-large-patch14, or the model/ of a run of python -m experiments.train clip)"
            )
        return self.clip_model or str(SHIPPED / "clip")


@dataclass(frozen=True)
class UnCLIPSettings(TrainSettings):
    """Train a prior, or a decoder of image embeddings."""

    clip: CLIPOptions = CLIPOptions()
    diffusion: DiffusionOptions = DiffusionOptions()
    compute: UNetCompute = UNetCompute()


@dataclass(frozen=True)
class OnCLIP(Space):
    """Images with the embeddings of a frozen CLIP, which are computed once and stored."""

    model: DiffusionModel
    clip: unclip.CLIPTowers
    frozen: Any = ()
    decode: None = None

    @property
    def data(self) -> dict[str, Any]:
        return {"clip": self.clip.fingerprint}

    def trainable(self, model: DiffusionModel) -> DiffusionModel:
        return model

    def record(self, run: Path) -> None:
        unclip.save_clip_source(run, self.clip)

    def batches(
        self, settings: UnCLIPSettings, source: Source, embeddings: Embeddings | None, **order: bool
    ) -> IndexedBatches:
        images = stream(settings, source, self.side, embeddings, captions=True, **order)
        data_dir = settings.dataset.data_dir
        seen = once(data_dir, lambda: embedded_images(self.clip.image, source, data_dir / "image-embeddings"))
        return IndexedBatches(images, partial(self.entries, seen))

    @abstractmethod
    def entries(self, seen: np.ndarray, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a batch of the model has beside images and captions. seen: the embeddings of all images (n 1 1 e)."""


@dataclass(frozen=True)
class PriorSpace(OnCLIP):
    """Image embeddings as the product, captions as the condition."""

    @property
    def side(self) -> int:
        return self.clip.image.resolution

    def entries(self, seen: np.ndarray, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        product = self.model.product
        assert isinstance(product, EmbeddingSpec)
        image, text = product.normalized(seen[batch["index"]].astype(np.float32)), self.clip.text
        if text.skip_last:  # the stored states are not those that are pooled
            pooled = np.asarray(text.encode([str(caption) for caption in batch["caption"]]).pooled)
        else:
            pooled = text.pooled_of(batch["text"], batch["text_mask"])
        return {"image": image, "text_pooled": pooled}


@dataclass(frozen=True)
class DecoderSpace(OnCLIP):
    """Images as the product, captions and image embeddings as the conditions."""

    @property
    def side(self) -> int:
        return self.model.side

    def entries(self, seen: np.ndarray, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.condition(seen[batch["index"], 0, 0])

    def condition(self, seen: np.ndarray) -> dict[str, np.ndarray]:
        """The batch entry for CLIP's embeddings (b e)."""
        conditioner = embedding_of(self.model)
        assert conditioner is not None  # see `DecoderTask.space`
        return {conditioner.entry: conditioner.product.normalized(np.asarray(seen, np.float32))}


def embedded_images(clip: CLIPImageEncoder, source: Source, folder: Path) -> np.ndarray:
    """The embeddings (n 1 1 e) of all images of a source, not normalized, stored in `folder`."""

    def encode(images: np.ndarray) -> np.ndarray:
        return np.asarray(clip.encode(jnp.asarray(images)))[:, None, None]

    with tqdm(total=len(source), desc="embed images", unit="image", disable=multihost.index() > 0) as bar:
        return stored_latents(source, clip.resolution, encode, folder, clip.fingerprint, bar.update)


def spec_of(preset: EmbeddingSpec, clip: CLIPImageEncoder) -> EmbeddingSpec:
    """The preset's embeddings if they are as wide as this CLIP's, otherwise CLIP's with a mean square of 1."""
    return preset if preset.width == clip.width else EmbeddingSpec(clip.width, math.sqrt(clip.width))


def with_conditioner(model: DiffusionModel, kind: type, **changes: Any) -> DiffusionModel:
    """The model with changes of its conditioner of this kind."""
    changed = [dataclasses.replace(each, **changes) if isinstance(each, kind) else each for each in model.conditioners]
    return dataclasses.replace(model, conditioners=tuple(changed))


@dataclass(frozen=True)
class UnCLIPTask(DiffusionTask):
    """A model on a frozen CLIP."""

    settings: UnCLIPSettings = UnCLIPSettings()

    @abstractmethod
    def on_clip(self, model: DiffusionModel, clip: unclip.CLIPTowers) -> OnCLIP:
        """The model for this CLIP, with its data."""

    def space(self, settings: UnCLIPSettings, model: DiffusionModel) -> OnCLIP:
        if settings.diffusion.buckets:
            raise ValueError("--buckets: CLIP reads whole square images")
        return self.on_clip(model, settings.clip.load(settings.dataset.data))

    def text_of(
        self, settings: UnCLIPSettings, model: DiffusionModel, space: OnCLIP
    ) -> tuple[CLIPTextEncoder, Embeddings | None]:
        return space.clip.text, None

    def text_source(self, settings: UnCLIPSettings, embeddings: Embeddings) -> None:
        """None: the run records its CLIP instead (`OnCLIP.record`)."""


@dataclass(frozen=True)
class PriorTask(UnCLIPTask):
    """A diffusion prior."""

    def on_clip(self, model: DiffusionModel, clip: unclip.CLIPTowers) -> PriorSpace:
        assert isinstance(model.product, EmbeddingSpec) and isinstance(model.unet, PriorConfig)
        spec, text = spec_of(model.product, clip.image), clip.text
        unet = dataclasses.replace(model.unet, embedding=spec.width, text_width=text.width, text_length=text.length)
        model = with_conditioner(
            dataclasses.replace(model, unet=unet, product=spec),
            TextConditioner,
            pooled=spec.width,
            pooled_norm=spec.norm,
        )
        return PriorSpace(model, clip)

    def resized(self, model: DiffusionModel, side: int) -> DiffusionModel:
        raise ValueError(f"--side {side}: embeddings have no size")

    def samples(self, space: PriorSpace, trained: TrainedModel, source: Source, *_: Any) -> None:
        """None: embeddings are no images."""


@dataclass(frozen=True)
class DecoderTask(UnCLIPTask):
    """A decoder of image embeddings."""

    def on_clip(self, model: DiffusionModel, clip: unclip.CLIPTowers) -> DecoderSpace:
        conditioner = embedding_of(model)
        assert conditioner is not None  # presets of this task have one
        spec = spec_of(conditioner.product, clip.image)
        return DecoderSpace(with_conditioner(model, EmbeddingConditioner, width=spec.width, norm=spec.norm), clip)

    def samples(
        self,
        space: DecoderSpace,
        trained: TrainedModel,
        source: Source,
        embeddings: Embeddings | None,
        folder: Path,
    ) -> Samples:
        """Images of fixed examples, decoded from their embeddings and captions."""
        shown, clip = Spread(source, Samples.COUNT), space.clip.image
        config = DataConfig(clip.resolution, Samples.COUNT, captions=True, caption_optional=True, shuffle=False)
        batch = next(image_batches(shown, config))
        seen = np.zeros((Samples.COUNT, clip.width), np.float32)
        seen[batch["index"]] = clip.encode(jnp.asarray(batch["image"]))
        return Samples(trained, source, embeddings, folder, given=space.condition(seen))
