"""The batches of images of a training run."""

from typing import Any

import jax

from experiments.options.training import TrainSettings
from jaxdiff.data.embeddings import Embeddings
from jaxdiff.data.example import Source
from jaxdiff.data.image_sizes import ImageSizes
from jaxdiff.data.pipeline import Batches, DataConfig, ReadAhead, image_batches


def stream(
    settings: TrainSettings,
    source: Source,
    side: int,
    embeddings: Embeddings | None = None,
    sizes: ImageSizes | None = None,
    **config: Any,
) -> Batches:
    """This process's shard of the batches. side: of the images in pixels. sizes: of the source's images, for buckets.
    config: other fields of `DataConfig`."""
    return image_batches(
        source,
        DataConfig(
            side,
            settings.run.batch // jax.process_count(),
            seed=settings.run.seed,
            strict=settings.dataset.strict,
            **config,
        ),
        embeddings,
        sizes=sizes,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        read_ahead=ReadAhead(workers=settings.dataset.workers),
    )
