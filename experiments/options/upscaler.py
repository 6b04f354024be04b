"""An upscaler behind the pipeline: the published ×4 upscaler is DeepFloyd IF's third stage."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.options.sampling import unit_of
from jaxdiff.systems.pipeline import INPUT, After, Batch, Pipeline, SampleOptions, models_of, with_models
from jaxdiff.weights import pretrained
from jaxdiff.weights.pretrained import LoadOptions


@dataclass(frozen=True)
class UpscalerOptions:
    """A second pipeline, which enlarges the images."""

    upscaler: str = ""
    """A ×4 upscaler (file, folder or hub id) that enlarges the sampled images, with the same prompts and seed."""

    upscaler_steps: int | None = None
    """Sampling steps of the upscaler; default: its own."""

    def load(self, dtype: str | None) -> Pipeline | None:
        """The upscaler; None if there is none. ValueError for another kind of model."""
        if not self.upscaler:
            if self.upscaler_steps is not None:
                raise ValueError("--upscaler-steps is for an --upscaler")
            return None
        pipeline = pretrained.load(self.upscaler, LoadOptions(dtype))
        if pipeline.generator.consumes is None:
            raise ValueError(f"--upscaler {self.upscaler}: samples from text, and enlarges no image")
        if self.upscaler_steps is None:
            return pipeline
        if self.upscaler_steps < 1:
            raise ValueError(f"--upscaler-steps {self.upscaler_steps}: at least 1")
        (model,) = models_of(pipeline)
        sampling = dataclasses.replace(model.sampling, steps=self.upscaler_steps)
        return with_models(pipeline, [dataclasses.replace(model, sampling=sampling)])


def factor_of(upscaler: Pipeline | None) -> int:
    """How much larger the images become."""
    return 1 if upscaler is None else upscaler.generator.factor * int(np.prod([d.factor for d in upscaler.decoders]))


def enlarged_by(
    upscaler: Pipeline, batches: Iterable[Batch], prompts: Sequence[str], options: SampleOptions
) -> Iterator[Batch]:
    """The batches with a further product: the last one, enlarged, one image at a time. options: of the batches."""
    unit = unit_of(upscaler)
    for batch in batches:
        images = batch.products[-1]
        height, width = images.shape[1:3]
        padded = np.pad(images, ((0, 0), (0, -height % unit), (0, -width % unit), (0, 0)), mode="edge")
        texts = [prompts[number // options.per_prompt] for number in range(batch.first, batch.first + len(images))]
        after = After(INPUT, padded)
        given = SampleOptions(options.seed, batch.first, negative=options.negative, batch=1, after=after)
        larger = upscaler.sample(texts, given)[-1]
        factor = larger.shape[1] // padded.shape[1]
        yield Batch(batch.first, (*batch.products, larger[:, : factor * height, : factor * width]))
