"""`Pipeline`: text → text encoder → generator → intermediate product → decoders → image.

    pipeline = weights.imagen.load()
    base, sr256, sr1024 = pipeline.sample(["a red circle"], SampleOptions(seed=0))  # (1 64 64 3), (1 256 256 3), …

A *box* is the generator or a decoder. Sample i of a seed does not depend on the other samples.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.core.products import EmbeddingSpec, ImageSpec, check_product, same_kind
from jaxdiff.diffusion import noise
from jaxdiff.models.boxes import Box, Decoder, Generator
from jaxdiff.models.hints import HintImage, check_hints
from jaxdiff.models.sampling import SampleRequest, TrainedModel
from jaxdiff.systems.init_image import InitImage
from jaxdiff.text.encoder import TextEmbedding, TextEncoder

Progress = Callable[[int, int, int], None]
"""Called with (number of the box, samples × steps done, samples × steps in total)."""


INPUT = -1
"""Number of the box before the first, see `After`."""


class After(NamedTuple):
    """Start sampling after box number `box`, with `product` as its output; after `INPUT`, with what the first box
    consumes (the image that an upscaler enlarges)."""

    box: int
    product: np.ndarray


@dataclass(frozen=True, eq=False)
class SampleOptions:
    """Options of `Pipeline.sample`.

    first: number of the first sample, to sample a long list in parts. negative: negative prompt; empty is the null
    text. size: height and width of the generator's product; its side by default. last: number of the last box to run;
    None: all. init: initial image of every box that takes one. after: products to start from. batch: samples per
    program of the generator; for larger products it decreases in proportion to their pixels (embeddings count as the
    first images after them). hints: one for each
    ControlNet, for every box that has them. given: arrays of the generator's other conditions (`SampleRequest.given`),
    with a row for each sample of the call.
    """

    seed: int = 0
    first: int = 0
    per_prompt: int = 1
    negative: str = ""
    size: tuple[int, int] | None = None
    last: int | None = None
    batch: int = 16
    init: InitImage | None = None
    after: After | None = None
    hints: tuple[HintImage, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:  # jax's keys would wrap around
            raise ValueError(f"seed {self.seed}: must be at least 0 and below 2**32")


class Batch(NamedTuple):
    """first: number of this batch's first sample within the call. products: one array per box that ran, float32, with
    one row per sample."""

    first: int
    products: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A text encoder (possibly precomputed embeddings), a generator, and decoders in order.

    A generator that is itself a decoder starts from a product instead of from text alone: `SampleOptions.after`.
    Raises ValueError if they do not fit together.
    """

    text_encoder: TextEncoder | None
    generator: Generator | Decoder
    decoders: tuple[Decoder, ...] = ()

    def __post_init__(self):
        check_order(self.boxes)
        for box in self.boxes:
            _check_text(self.text_encoder, box)

    @property
    def boxes(self) -> tuple[Generator | Decoder, ...]:
        return (self.generator, *self.decoders)

    @property
    def sides(self) -> tuple[int, ...]:
        """The side of each box's product, in its own pixels."""
        return tuple(box.side for box in self.boxes)

    @property
    def image_boxes(self) -> dict[int, int]:
        """The numbers of the boxes that produce images, by the side of their images."""
        return {box.side: number for number, box in enumerate(self.boxes) if isinstance(box.produces, ImageSpec)}

    def sample(
        self, prompts: Sequence[str], options: SampleOptions = SampleOptions(), progress: Progress | None = None
    ) -> tuple[np.ndarray, ...]:
        """The product of each box that ran, the image last: float32 (n · per_prompt, …). ValueError as `batches`."""
        products = [batch.products for batch in self.batches(prompts, options, progress)]
        return tuple(chunks[0] if len(chunks) == 1 else np.concatenate(chunks) for chunks in zip(*products))

    def batches(
        self, prompts: Sequence[str], options: SampleOptions = SampleOptions(), progress: Progress | None = None
    ) -> Iterator[Batch]:
        """As `sample`, batch by batch, so that large images need not all be in memory.

        ValueError, before sampling, for a missing box or an unsupported size, tiles or strength; while sampling, if a
        box produces non-finite values. An empty prompt is sampled without text, with a warning.
        """
        return _run(self, _plan(self, prompts, options), progress)


def with_boxes(pipeline: Pipeline, boxes: Sequence[Any]) -> Pipeline:
    """The pipeline with these boxes, the generator first."""
    return replace(pipeline, generator=boxes[0], decoders=tuple(boxes[1:]))


def models_of(pipeline: Pipeline) -> tuple[TrainedModel, ...]:
    """The diffusion models among the boxes, in order."""
    return tuple(box for box in pipeline.boxes if isinstance(box, TrainedModel))


def with_models(pipeline: Pipeline, models: Sequence[TrainedModel]) -> Pipeline:
    """The pipeline with these diffusion models in the places of its own."""
    remaining = iter(models)
    boxes = [next(remaining) if isinstance(box, TrainedModel) else box for box in pipeline.boxes]
    return with_boxes(pipeline, boxes)


def up_to(pipeline: Pipeline, side: int | None) -> Pipeline:
    """The pipeline without the boxes after the one whose product has this side; None: the full pipeline.

    ValueError if no box has this side.
    """
    if side is None:
        return pipeline
    if side not in pipeline.sides:
        sides = ", ".join(map(str, pipeline.sides))
        raise ValueError(f"no stage samples {side} pixels, only {sides}")
    return replace(pipeline, decoders=pipeline.decoders[: pipeline.sides.index(side)])


def check_order(boxes: Sequence[Generator | Decoder]) -> None:
    """ValueError unless every box but the first decodes the product of the one before it."""
    for lower, upper in itertools.pairwise(boxes):
        if upper.consumes is None:
            raise ValueError(
                f"the {upper.side} stage samples from text, but after the {lower.side} stage only super-resolution can "
                "follow"
            )
        if not same_kind(lower.produces, upper.consumes):
            raise ValueError(
                f"the {upper.side} stage decodes {upper.consumes}, the one before it produces {lower.produces}"
            )
        if upper.side // upper.factor != lower.side:
            raise ValueError(
                f"the {upper.side} stage enlarges {upper.side // upper.factor} pixels, "
                f"but the stage before it produces {lower.side}"
            )


def check_start(first: Box) -> None:
    """ValueError unless a first box samples from text alone."""
    if first.consumes is not None:
        raise ValueError(
            f"the first stage enlarges {first.side // first.factor} pixels to {first.side}: "
            "it must come after a stage that samples from text"
        )


def _check_text(encoder: TextEncoder | None, box: Box) -> None:
    if box.reads is None:
        return
    if encoder is None:
        raise ValueError(f"the {box.side} stage reads text, and there is no text encoder")
    if None in box.reads:
        raise ValueError(f"the {box.side} stage has no text encoder set: use `DiffusionModel.reading`")
    if (encoder.length, encoder.width) != box.reads:
        raise ValueError(
            f"the text encoder gives embeddings of width {encoder.width}, {encoder.length} of them; "
            f"the {box.side} stage reads {box.reads[1]}, {box.reads[0]} of them"
        )
    if box.reads_padding and not encoder.padding_is_read:
        raise ValueError(f"the {box.side} stage reads padding and empty captions too, which this text encoder masks")


class _Stage(NamedTuple):
    """One box. size: height and width of its product. rows: samples per program."""

    number: int
    size: tuple[int, int]
    rows: int


@dataclass(frozen=True, eq=False)
class _Plan:
    """The data shared by all batches."""

    options: SampleOptions
    stages: tuple[_Stage, ...]
    keys: Array
    text: TextEmbedding | None
    negative: TextEmbedding | None
    rows: int
    """Samples per batch."""


def _plan(pipeline: Pipeline, prompts: Sequence[str], options: SampleOptions) -> _Plan:
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    count = len(prompts) * options.per_prompt
    if count < 1 or options.batch < 1:
        raise ValueError(
            f"nothing to sample: {len(prompts)} prompts, {options.per_prompt} of each, in batches of {options.batch}"
        )
    stages = tuple(_stages(pipeline, options, count))
    if options.init is not None:
        options.init.check(pipeline.boxes, [stage.number for stage in stages])
    _check_hints(pipeline, options, stages, count)
    _check_given(pipeline, options, stages, count)
    if not all(prompt.strip() for prompt in prompts):
        warnings.warn("an empty prompt is sampled without text", stacklevel=4)
    keys = noise.sample_keys(jax.random.key(options.seed), jnp.arange(options.first, options.first + count))
    text = negative = None
    if pipeline.text_encoder is not None:
        text = pipeline.text_encoder.encode(list(prompts))
        text = jax.tree.map(lambda a: jnp.repeat(a, options.per_prompt, axis=0), text)
        if options.negative.strip() or any(box.reads_padding or box.reads_empty for box in pipeline.boxes):
            negative = pipeline.text_encoder.encode([options.negative])
    rows = pipeline.generator.batch_size(min(options.batch, count))
    return _Plan(options, stages, keys, text, negative, rows)


def _stages(pipeline: Pipeline, options: SampleOptions, count: int) -> Iterator[_Stage]:
    boxes, after, consumed = pipeline.boxes, options.after, pipeline.generator.consumes
    end = len(boxes) if options.last is None else options.last + 1
    lowest = 0 if consumed is None else INPUT
    for number, least in ((end - 1, 0), *(() if after is None else ((after.box, lowest),))):
        if not least <= number < len(boxes):
            raise ValueError(f"no box {number}: this pipeline has {len(boxes)}")
    begin = 0
    size = options.size or (boxes[0].side,) * 2
    grid = next((box.side for box in boxes if not isinstance(box.produces, EmbeddingSpec)), 1)
    if after is None and consumed is not None:
        raise ValueError(f"this pipeline starts from {consumed}: pass a batch of them, `after=After(INPUT, …)`")
    if after is not None:
        product = consumed if after.box == INPUT else boxes[after.box].produces
        assert product is not None  # else `INPUT` is no box
        check_product(product, after.product, "the product of `after`")
        if len(after.product) != count:
            raise ValueError(f"`after` has {len(after.product)} products, for {count} samples")
        begin, size = after.box + 1, after.product.shape[1:3]
        if begin >= end:
            raise ValueError(
                f"nothing to sample: starting after {boxes[after.box].side} pixels, ending at {boxes[end - 1].side}"
            )
    for number in range(begin, end):
        box = boxes[number]
        if number or after is not None:
            size = size[0] * box.factor, size[1] * box.factor
        box.check(size)
        rows = max(1, options.batch * grid**2 // max(grid, box.side) ** 2)
        yield _Stage(number, size, box.batch_size(min(rows, count)))


def _check_hints(pipeline: Pipeline, options: SampleOptions, stages: Sequence[_Stage], count: int) -> None:
    """ValueError unless the hints suit every box that runs and reads hints."""
    readers = [stage for stage in stages if pipeline.boxes[stage.number].reads_hints is not None]
    if options.hints and not readers:
        raise ValueError(f"{len(options.hints)} hints, and no stage that runs has a ControlNet")
    for stage in readers:
        box = pipeline.boxes[stage.number]
        check_hints(box.reads_hints, options.hints, stage.size, count, f"the {box.side} stage")


def _check_given(pipeline: Pipeline, options: SampleOptions, stages: Sequence[_Stage], count: int) -> None:
    """ValueError unless the generator runs and reads all given conditions, and there is one for each sample."""
    known = pipeline.generator.conditions if stages[0].number == 0 else ()
    for name, values in options.given.items():
        if name not in known:
            raise ValueError(f"{name} is given, but the generator reads {', '.join(known) or 'no such condition'}")
        if len(values) != count:
            raise ValueError(f"{name} is given for {len(values)} samples, not {count}")


def _run(pipeline: Pipeline, plan: _Plan, progress: Progress | None) -> Iterator[Batch]:
    """Run each batch of samples through all boxes; a box processes it in chunks of one size, so that it needs only one
    compiled program."""
    count = len(plan.keys)
    for first in range(0, count, plan.rows):
        last = min(first + plan.rows, count)
        product = None if plan.options.after is None else plan.options.after.product[first:last]
        products: list[np.ndarray] = []
        for stage in plan.stages:
            box = pipeline.boxes[stage.number]
            result: np.ndarray | None = None
            for start in range(first, last, stage.rows):
                # The last chunk is padded with copies of its last sample, which are dropped afterwards.
                rows = np.minimum(np.arange(start, start + stage.rows), last - 1)
                request = _request(pipeline, plan, stage, rows, progress)
                if product is None:
                    assert isinstance(box, Generator)  # else the plan has a product
                    output = box.generate(request)
                else:
                    assert isinstance(box, Decoder)
                    output = box.decode(jnp.asarray(product[rows - first]), request)
                part = np.asarray(output)[: last - start]
                if not np.isfinite(part).all():
                    raise ValueError(
                        f"the {box.side} stage produced values that are not finite: check its weights and its "
                        "sampler's settings"
                    )
                if result is None:  # preallocated, so that large images are never held twice
                    result = np.empty((last - first, *part.shape[1:]), part.dtype)
                result[start - first : start - first + len(part)] = part
            assert result is not None  # there is at least one sample
            product = result
            products.append(result)
        yield Batch(first, tuple(products))


def _request(
    pipeline: Pipeline, plan: _Plan, stage: _Stage, rows: np.ndarray, progress: Progress | None
) -> SampleRequest:
    """The request to a box for these samples."""
    box = pipeline.boxes[stage.number]
    text = negative = None
    if box.reads is not None:
        text = jax.tree.map(lambda a: a[rows], plan.text)
        if plan.negative is not None:
            negative = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(rows), *a.shape[1:])), plan.negative)
    report = None
    if progress is not None:
        each = box.steps * stage.rows
        total, before = (_runs_of(plan, stage, samples) * each for samples in (len(plan.keys), int(rows[0])))

        def report(step: int) -> None:
            progress(stage.number, before + step * stage.rows, total)

    init = None
    if plan.options.init is not None and box.takes_init:
        init = plan.options.init.product(pipeline.boxes, stage.number, stage.size, len(rows))
    hints = tuple(hint.of_rows(rows) for hint in plan.options.hints) if box.reads_hints is not None else ()
    given = {} if stage.number else {name: np.asarray(values)[rows] for name, values in plan.options.given.items()}
    keys = noise.fold(plan.keys[rows], stage.number)
    return SampleRequest(keys, stage.size, text, negative, init, report, hints, given)


def _runs_of(plan: _Plan, stage: _Stage, samples: int) -> int:
    """The number of runs of the box for the first `samples` samples."""
    batches, rest = divmod(samples, plan.rows)
    return batches * -(-plan.rows // stage.rows) - (-rest // stage.rows)
