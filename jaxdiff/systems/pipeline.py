"""The Imagen cascade: text → T5 → 64×64 → 256×256 → 1024×1024.

drawn = cascade.sample(model, ["a red circle"], seed=0)     # {64: (1 64 64 3), 256: …, 1024: …}
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion import noise
from jaxdiff.models.diffusion import DiffusionModel, NullText, null_text
from jaxdiff.models.sampling import Given, SamplingConfig, check, draw, first_step
from jaxdiff.nets.unet import Reading
from jaxdiff.text.encoder import TextEmbedding, TextEncoder


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A stage, its parameters, and how it draws unless told otherwise.

    text: the fingerprint of the text encoder that it was trained with, where that is known.
    """

    stage: DiffusionModel
    params: dict
    sampling: SamplingConfig
    text: str | None = None


def mean(models: Sequence[TrainedModel]) -> TrainedModel:
    """The first model with the mean of all parameters: stochastic weight averaging (arXiv 1803.05407).

    For the ends of successive runs, each begun with the parameters of the one before: each lies somewhere on the edge
    of what suits the data, their mean nearer its middle. Models that began apart have no useful mean.

    Raises ValueError where networks, predictions or text encoders differ.
    """
    first, *others = models
    for other in others:
        for part in ("unet", "prediction", "residual"):
            if getattr(other.stage, part) != getattr(first.stage, part):
                raise ValueError(f"models whose {part} differs have no mean")
    known = sorted({model.text for model in models if model.text is not None})
    if len(known) > 1:
        raise ValueError(f"models trained with the text encoders {' and '.join(known)} have no mean")
    params = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *(model.params for model in models))
    return replace(first, params=params, text=known[0] if known else None)


def check_order(models: Sequence[TrainedModel]) -> None:
    """ValueError unless the first of them draws from text, and each other one enlarges what the one before it draws."""
    first = models[0].stage
    if first.unet.low_res:
        raise ValueError(
            f"the first stage enlarges {first.low_resolution} pixels to {first.resolution}: "
            "the one that draws them from text has to come before it"
        )
    for lower, upper in itertools.pairwise(models):
        if upper.stage.low_resolution != lower.stage.resolution:
            takes = f"{upper.stage.low_resolution} pixels" if upper.stage.unet.low_res else "nothing"
            raise ValueError(
                f"the {upper.stage.resolution} stage enlarges {takes}, "
                f"but the stage before it draws {lower.stage.resolution}"
            )


@dataclass(frozen=True, eq=False)
class Cascade:
    """A frozen text encoder (or the precomputed embeddings of the captions that will be drawn), a base model and any
    number of super-resolution models, in the order of their use."""

    text: TextEncoder
    base: TrainedModel
    super_resolution: tuple[TrainedModel, ...] = ()

    def __post_init__(self):
        check_order(self.models)
        have = self.text.width, self.text.length
        for stage in (model.stage for model in self.models if model.stage.unet.reads_text):
            want = stage.unet.text_width, stage.text_length
            if have != want:
                raise ValueError(
                    f"the text encoder gives embeddings of width {have[0]}, {have[1]} of them; "
                    f"the {stage.resolution} stage reads {want[0]}, {want[1]} of them"
                )
            reads_all = stage.unet.reading is Reading.WHOLE or stage.null_text is NullText.EMPTY
            if reads_all and not self.text.padding_is_read:
                raise ValueError(
                    f"the {stage.resolution} stage reads padding and empty captions too, which this text encoder masks"
                )

    @property
    def models(self) -> tuple[TrainedModel, ...]:
        return (self.base, *self.super_resolution)

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(model.stage.resolution for model in self.models)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to begin with (image to image) and, with a mask, to keep in part (inpainting), for all that is drawn.

    image: (h, w, 3) in [-1, 1], of any size: each stage sees it at its own. strengths: for each stage, the share of its
    steps that are drawn, above 0 and up to 1. mask: (h, w), True where is drawn and False where the picture is kept.
    """

    image: np.ndarray
    strengths: tuple[float, ...]
    mask: np.ndarray | None = None

    def given(self, number: int, count: int, size: tuple[int, int]) -> Given:
        """For a stage that draws pictures of this size."""
        image = jax.image.resize(jnp.asarray(self.image, jnp.float32), (*size, 3), "cubic")
        image = jnp.broadcast_to(jnp.clip(image, -1.0, 1.0), (count, *size, 3))
        if self.mask is None:
            return Given(image, self.strengths[number])
        mask = jax.image.resize(jnp.asarray(self.mask, jnp.float32)[..., None], (*size, 1), "linear")
        mask = jnp.broadcast_to((mask >= 0.5).astype(jnp.float32), (count, *size, 1))
        return Given(image, self.strengths[number], mask)


Progress = Callable[[int, int, int], None]
"""Called with (resolution, pictures × steps done, pictures × steps in all)."""


def sample(
    cascade: Cascade,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    per_prompt: int = 1,
    negative: str = "",
    up_to: int | None = None,
    samplings: Sequence[SamplingConfig] | None = None,
    size: tuple[int, int] | None = None,
    picture: Picture | None = None,
    batch: int = 16,
    progress: Progress | None = None,
) -> dict[int, np.ndarray]:
    """Pictures of every stage: {resolution: float32 (n · per_prompt, h, w, 3) in [-1, 1]}.

    Arguments as in `stages`, which yields the same one stage at a time.
    """
    return dict(
        stages(
            cascade,
            prompts,
            seed=seed,
            per_prompt=per_prompt,
            negative=negative,
            up_to=up_to,
            samplings=samplings,
            size=size,
            picture=picture,
            batch=batch,
            progress=progress,
        )
    )


def stages(
    cascade: Cascade,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    first: int = 0,
    per_prompt: int = 1,
    negative: str = "",
    up_to: int | None = None,
    samplings: Sequence[SamplingConfig] | None = None,
    size: tuple[int, int] | None = None,
    after: tuple[int, np.ndarray] | None = None,
    picture: Picture | None = None,
    batch: int = 16,
    progress: Progress | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(resolution, pictures) of each stage in turn, up to the resolution `up_to`.

    Picture i of seed s is the same whatever else is drawn with it; `first` is the number of the first one here, so that
    a long list can be drawn in parts. `negative`: what guidance leads away from; empty is the null text. `samplings`:
    one for each stage, in place of the models' own. `size`: height and width of the base's pictures, which every stage
    enlarges; its resolution by default. `after`: (resolution, pictures) to go on from, as if that stage had drawn them.
    `picture`: what every stage begins with, or keeps in part.
    `batch`: pictures in one program at the base; a larger picture takes the place of as many as it has of their pixels,
    up to the one that is left. Stages with `axes` draw on the ambient mesh, at least one picture on each of its parts.

    ValueError, before anything is drawn, for an `up_to` or `after` that is no stage's, a size, tiles or strength that a
    stage cannot draw, a seed below 0 or from 2³² on; and for a stage that draws values that are not finite. An empty
    prompt is drawn without text, with a warning.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    if not 0 <= seed < 2**32:  # beyond, jax's keys would begin again from 0
        raise ValueError(f"seed {seed}: must be at least 0 and below 2**32")
    count = len(prompts) * per_prompt
    if count < 1 or batch < 1:
        raise ValueError(f"nothing to draw: {len(prompts)} prompts, {per_prompt} of each, in batches of {batch}")
    samplings = samplings or [model.sampling for model in cascade.models]
    if len(samplings) != len(cascade.models):
        raise ValueError(f"{len(samplings)} samplings for {len(cascade.models)} stages: give one for each")
    begin = 0 if after is None else _number(cascade, after[0]) + 1
    end = len(cascade.models) if up_to is None else _number(cascade, up_to) + 1
    if after is None:
        nominal = cascade.base.stage.resolution
        height, width = size or (nominal, nominal)
    else:
        if len(after[1]) != count:
            raise ValueError(f"{len(after[1])} pictures to go on from, for {count} to draw")
        if up_to is not None and begin >= end:
            raise ValueError(f"nothing to draw: going on from {after[0]} pixels, up to {up_to}")
        nominal, (height, width) = after[0], after[1].shape[1:3]
    for model, sampling in list(zip(cascade.models, samplings))[begin:end]:
        side = model.stage.resolution
        check(model.stage, sampling, (height * side // nominal, width * side // nominal))
    if picture is not None:
        _check_picture(cascade, picture, samplings, begin, end)
    _warn_of_blanks(prompts)
    text = jax.tree.map(lambda a: jnp.repeat(a, per_prompt, axis=0), cascade.text.encode(prompts))
    empty = any(model.stage.null_text is NullText.EMPTY for model in cascade.models)
    away = cascade.text.encode([negative]) if negative.strip() or empty else None
    keys = noise.sample_keys(jax.random.key(seed), jnp.arange(first, first + count))

    def drawn(pictures: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
        for number in range(begin, end):
            model, sampling, folded = cascade.models[number], samplings[number], noise.fold(keys, number)
            rows = max(1, batch * cascade.base.stage.resolution**2 // model.stage.resolution**2)
            parts, _ = model.stage.unet.axes.sizes()
            rows = -(-min(rows, count) // parts) * parts
            draws = _Task(model, sampling, text, away, folded, pictures, (height, width), rows)
            task = draws if picture is None else replace(draws, begin=partial(picture.given, number))
            pictures = task.run(progress)
            yield model.stage.resolution, pictures

    return drawn(None if after is None else after[1])


def _check_picture(
    cascade: Cascade, picture: Picture, samplings: Sequence[SamplingConfig], begin: int, end: int
) -> None:
    if len(picture.strengths) != len(cascade.models):
        raise ValueError(f"{len(picture.strengths)} strengths for {len(cascade.models)} stages: give one for each")
    if picture.image.ndim != 3 or picture.image.shape[2] != 3:
        raise ValueError(f"a picture to begin with is of h×w×3 values, not of {_times(picture.image.shape)}")
    if picture.mask is not None and picture.mask.shape != picture.image.shape[:2]:
        have, want = _times(picture.mask.shape), _times(picture.image.shape[:2])
        raise ValueError(f"a mask of {have} pixels for a picture of {want}")
    for number in range(begin, end):
        first_step(picture.strengths[number], samplings[number].steps)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _warn_of_blanks(prompts: Sequence[str]) -> None:
    if not all(prompt.strip() for prompt in prompts):
        warnings.warn("an empty prompt is drawn without text", stacklevel=3)


def _number(cascade: Cascade, resolution: int) -> int:
    """Which stage draws pictures of this resolution."""
    if resolution not in cascade.resolutions:
        drawn = ", ".join(map(str, cascade.resolutions))
        raise ValueError(f"no stage draws {resolution} pixels; this cascade draws {drawn}")
    return cascade.resolutions.index(resolution)


@dataclass(frozen=True, eq=False)
class _Task:
    """One stage's share of the work, in batches of one size so that one compiled program serves all of them."""

    model: TrainedModel
    sampling: SamplingConfig
    text: TextEmbedding
    away: TextEmbedding | None
    keys: jax.Array
    low_res: np.ndarray | None
    size: tuple[int, int]
    batch: int
    begin: Callable[[int, tuple[int, int]], Given] | None = None

    def run(self, progress: Progress | None) -> np.ndarray:
        count, resolution = len(self.keys), self.model.stage.resolution
        total = -(-count // self.batch) * self.batch * self.sampling.steps
        pictures = None  # one array for all, so that large pictures are never held twice
        for first in range(0, count, self.batch):
            # The last batch is filled up with repeats of its last picture, which are dropped again.
            rows = np.minimum(np.arange(first, first + self.batch), count - 1)
            report = None
            if progress is not None:

                def report(step, before=first * self.sampling.steps):
                    progress(resolution, before + step * self.batch, total)

            part = np.asarray(self._draw(rows, report))[: count - first]
            if not np.isfinite(part).all():
                raise ValueError(
                    f"the {resolution} stage drew values that are not finite: its weights, or its sampler's settings, "
                    "lead there"
                )
            pictures = np.empty((count, *part.shape[1:]), part.dtype) if pictures is None else pictures
            pictures[first : first + len(part)] = part
        assert pictures is not None  # there is at least one key
        return pictures

    def _draw(self, rows: np.ndarray, report: Callable[[int], None] | None) -> jax.Array:
        stage = self.model.stage
        text = negative = null_text(stage, len(rows))
        if stage.unet.reads_text:
            text = jax.tree.map(lambda a: a[rows], self.text)
            if self.away is not None:
                negative = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(rows), *a.shape[1:])), self.away)
        low_res = None if self.low_res is None else jnp.asarray(self.low_res[rows])
        size = self.size
        if low_res is not None:
            size = low_res.shape[1] * stage.factor, low_res.shape[2] * stage.factor
        given = None if self.begin is None else self.begin(len(rows), size)
        inputs = text, negative, self.keys[rows], size, low_res, report
        return draw(stage, self.model.params, self.sampling, *inputs, given=given)
