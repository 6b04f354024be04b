"""What a diffusion model is trained in: pixels here, an autoencoder's latents in `latents.py`."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jax import Array
from tqdm import tqdm

from experiments.tasks.streams import stream
from jaxdiff.data.buckets import Buckets
from jaxdiff.data.embeddings import Embeddings
from jaxdiff.data.example import Source
from jaxdiff.data.image_sizes import ImageSizes, read_sizes
from jaxdiff.data.pipeline import Batches
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.training import multihost
from jaxdiff.training.distributed import once
from jaxdiff.training.state import Trainable

if TYPE_CHECKING:
    from experiments.tasks.diffusion import Settings


class Space(Protocol):
    """What a diffusion model is trained in: pixels, or an autoencoder's latents.

    model: fitted to it. side: of the training images in pixels. frozen: arrays that the loss reads. decode: the images
    of its samples, if they are not images themselves. data: of what the batches depend on.
    """

    model: DiffusionModel
    frozen: Any
    decode: Callable[[Array], Array] | None
    data: dict[str, Any]

    @property
    def side(self) -> int: ...

    def batches(self, settings: "Settings", source: Source, embeddings: Embeddings | None, **order: bool) -> Batches:
        """This process's shard of the batches. order: `shuffle` and `repeat` of `DataConfig`."""
        ...

    def trainable(self, model: DiffusionModel) -> Trainable: ...

    def record(self, run: Path) -> None:
        """Write what is needed to sample from the run, besides the model."""


@dataclass(frozen=True)
class Pixels(Space):
    """Images, and for super-resolution low-resolution images."""

    model: DiffusionModel
    frozen: Any = ()
    decode: None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def side(self) -> int:
        return self.model.side

    def batches(self, settings: "Settings", source: Source, embeddings: Embeddings | None, **order: bool) -> Batches:
        return batches(settings, self.model, source, embeddings, **order)

    def trainable(self, model: DiffusionModel) -> DiffusionModel:
        return model


def batches(settings: "Settings", model: DiffusionModel, source: Source, embeddings: Embeddings | None, **order: bool):
    """This process's shard of the batches. order: `shuffle` and `repeat` of `DataConfig`."""
    buckets, sizes = None, None
    if settings.diffusion.buckets:
        buckets, sizes = buckets_of(model, settings.diffusion.crop), sizes_of(source, settings.dataset.data_dir)
    return stream(
        settings,
        source,
        model.side,
        embeddings,
        sizes,
        low_resolution=model.side // model.factor if model.low_res is not None else None,
        crop=None if settings.diffusion.buckets else crop_of(model, settings.diffusion.crop),
        buckets=buckets,
        caption_optional=model.low_res is not None,
        **order,
    )


def buckets_of(model: DiffusionModel, crop: int | None) -> Buckets:
    """Buckets with a stride of about an eighth of the side, as a multiple of the network's stride."""
    if crop:
        raise ValueError(f"--crop {crop} and --buckets: crops are squares; give one of them")
    unit = math.lcm(model.unet.stride, model.factor)
    return Buckets(unit * max(1, round(model.side / 8 / unit)))


def sizes_of(source: Source, data_dir: Path) -> ImageSizes:
    """The sizes of all images, read once from their headers."""
    with tqdm(total=len(source), desc="read sizes", unit="image", disable=multihost.index() > 0) as bar:
        return once(data_dir, lambda: read_sizes(source, data_dir / "sizes", progress=bar.update))


def crop_of(model: DiffusionModel, crop: int | None) -> int | None:
    """Side of super-resolution's training crops, by default a quarter of the image's; None: full images."""
    if model.low_res is None:
        if crop:
            raise ValueError(f"--crop {crop}: for super-resolution; this model is trained on whole images")
        return None
    return model.side // 4 if crop is None else crop or None
