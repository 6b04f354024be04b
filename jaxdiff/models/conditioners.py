"""Conditioners: settings of a diffusion model, each of which computes a part of the network's `Conditioning`.

In training they read a batch, with dropout and augmentation; in sampling they return the conditional and the
unconditional branch of guidance.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.augmentation import augment
from jaxdiff.diffusion.schedules import CosineSchedule, Schedule
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.text.encoder import TextEmbedding

Shapes = dict[str, jax.ShapeDtypeStruct]


class NullText(enum.Enum):
    """The null text: replaces dropped captions in training, and conditions the unconditional branch in sampling.

    ZEROS: zero embeddings, all masked (Imagen). EMPTY: the embedding of the empty caption (DeepFloyd IF).
    """

    ZEROS = "zeros"
    EMPTY = "empty"


class Enlargement(enum.Enum):
    """How a low-resolution image is upsampled to the output size.

    CUBIC: noised, then upsampled like Pillow's BICUBIC. BILINEAR: upsampled with aligned corner pixels, then noised
    (DeepFloyd IF).
    """

    CUBIC = "cubic"
    BILINEAR = "bilinear"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleInputs:
    """Conditions of a batch of samples.

    text: the embedded prompts (b n d); None: no text. negative: text of the unconditional branch; None: the null text.
    low_res: (b h w c). aug_level: its noise level in [0, 1].
    """

    text: TextEmbedding | None = None
    negative: TextEmbedding | None = None
    low_res: Float[Array, "b h w c"] | None = None
    aug_level: Float[Array, ""] | float = 0.0


class Branches(NamedTuple):
    """The conditionings of the two branches of guidance."""

    conditional: Conditioning
    unconditional: Conditioning


@runtime_checkable
class Conditioner(Protocol):
    """A frozen dataclass of settings. Sizes are (height, width) of the network's input."""

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        """The entries of training batches that it reads, for square images of that side."""
        ...

    def example(self, size: tuple[int, int]) -> Conditioning:
        """A batch of one, to initialize the network: which fields of `Conditioning` are present, and their shapes."""
        ...

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning: ...

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches: ...


@dataclass(frozen=True)
class TextConditioner:
    """Caption embeddings for attention.

    width, length: those of the text encoder's embeddings; None until set by `DiffusionModel.reading`.
    dropout: fraction of captions replaced by the null text in training.
    """

    width: int | None = None
    length: int | None = None
    dropout: float = 0.1
    null: NullText = NullText.ZEROS

    def __post_init__(self):
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout {self.dropout}: must be a fraction of the captions, between 0 and 1")

    @property
    def shape(self) -> tuple[int, int]:
        """Length and width; ValueError if they are not set."""
        if self.width is None or self.length is None:
            raise ValueError("the text encoder of this model is not set: use `DiffusionModel.reading`")
        return self.length, self.width

    def null_text(self, count: int) -> TextEmbedding:
        """Zeros, all masked."""
        return TextEmbedding(jnp.zeros((count, *self.shape)), jnp.zeros((count, self.shape[0]), bool))

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        return {
            "text": jax.ShapeDtypeStruct((batch_size, *self.shape), jnp.float16),
            "text_mask": jax.ShapeDtypeStruct((batch_size, self.shape[0]), jnp.bool_),
        }

    def example(self, size: tuple[int, int]) -> Conditioning:
        return _attended(self.null_text(1))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads text (b n d), text_mask (b n) and, for `NullText.EMPTY`, null_text (n d), the embedding of the empty
        caption. A batch without text trains unconditionally."""
        if "text" not in batch:
            return _attended(self.null_text(keys.shape[0]))
        kept = noise.uniform(noise.fold(keys, 1)) >= self.dropout
        text, mask = batch["text"].astype(jnp.float32), batch["text_mask"]
        if self.null is NullText.EMPTY:
            if "null_text" not in batch:
                raise ValueError("the null text of this model is the empty caption: a batch needs null_text")
            # Neither text nor null text is masked.
            null = batch["null_text"].astype(jnp.float32)
            return Conditioning(tokens=jnp.where(kept[:, None, None], text, null), token_mask=mask)
        mask = mask & kept[:, None]
        return Conditioning(tokens=jnp.where(mask[..., None], text, 0.0), token_mask=mask)

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        null = self.null_text(keys.shape[0]) if inputs.text is None or inputs.negative is None else None
        text, negative = (null if value is None else value for value in (inputs.text, inputs.negative))
        assert text is not None and negative is not None  # replaced by the null text
        return Branches(_attended(text), _attended(negative))


@dataclass(frozen=True)
class LowResConditioner:
    """A low-resolution image, upsampled and noised to a known level (Imagen 2.4).

    factor: upsampling factor. augmentation: the schedule of the noise; the level is its time. max_level: training
    levels are uniform in [0, max_level]. enlargement: the upsampling method, and its order with the noise.
    """

    factor: int = 4
    augmentation: Schedule = CosineSchedule()
    max_level: float = 1.0
    enlargement: Enlargement = Enlargement.CUBIC
    channels: int = 3

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"factor {self.factor}: must be at least 1")
        if not 0 <= self.max_level <= 1:
            raise ValueError(f"max_level {self.max_level}: must lie in [0, 1]")

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        lower = side // self.factor
        return {"low_res": jax.ShapeDtypeStruct((batch_size, lower, lower, self.channels), jnp.float32)}

    def example(self, size: tuple[int, int]) -> Conditioning:
        return Conditioning(concat=jnp.zeros((1, *size, self.channels)), aug_level=jnp.ones(1))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads low_res (b h/f w/f c); each example has its own level."""
        level = self.max_level * noise.uniform(noise.fold(keys, 2))
        return self.seen(batch["low_res"], level, noise.fold(keys, 3), size)

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        assert inputs.low_res is not None  # checked before sampling
        level = jnp.full(inputs.low_res.shape[0], inputs.aug_level, jnp.float32)
        both = self.seen(inputs.low_res, level, noise.fold(keys, 2), size)
        return Branches(both, both)

    def seen(
        self, low_res: Float[Array, "b h w c"], level: Float[Array, " b"], keys: Key[Array, " b"], size: tuple[int, int]
    ) -> Conditioning:
        """The network's inputs: the noised and upsampled images, and the level."""
        low_res, schedule = low_res.astype(jnp.float32), self.augmentation
        if self.enlargement is Enlargement.CUBIC:
            seen = enlarge(augment(low_res, level, keys, schedule), size)
        else:
            seen = augment(enlarge_between_corners(low_res, size), level, keys, schedule)
        return Conditioning(concat=seen, aug_level=schedule.network_time(schedule.level_time(level)) / 1000.0)

    def kept(self, given: Conditioning) -> Float[Array, "b h w c"]:
        """α(level) times the noised image, to which a residual network's output is added."""
        assert given.concat is not None and given.aug_level is not None  # `seen` sets both
        alpha = self.augmentation.alpha(self.augmentation.level_time(given.aug_level))
        return alpha[:, None, None, None] * given.concat


def joined(conditionings: list[Conditioning]) -> Conditioning:
    """Concatenate conditionings: tokens along the sequence, channels and vectors along the last axis.

    ValueError if more than one sets a noise level, residuals or an interval.
    """
    fields: dict[str, Any] = {}
    for name in Conditioning._fields:
        values = [getattr(each, name) for each in conditionings if getattr(each, name) is not None]
        if len(values) > 1 and name not in _AXIS:
            raise ValueError(f"{len(values)} conditioners set {name}, a network takes one")
        fields[name] = None if not values else values[0] if len(values) == 1 else jnp.concatenate(values, _AXIS[name])
    return Conditioning(**fields)


def without_dropout(conditioner: TextConditioner | LowResConditioner) -> TextConditioner | LowResConditioner:
    """The conditioner without dropout, to evaluate the conditional model."""
    return replace(conditioner, dropout=0.0) if isinstance(conditioner, TextConditioner) else conditioner


_AXIS = {"tokens": 1, "token_mask": 1, "vector": -1, "concat": -1}


def _attended(text: TextEmbedding) -> Conditioning:
    return Conditioning(tokens=text.tokens, token_mask=text.mask)


def enlarge(low_res: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Upsample to the output size, bicubic (Keys, a = −1/2, as in Pillow's BICUBIC)."""
    shape = (low_res.shape[0], *size, low_res.shape[3])
    return jax.image.resize(low_res, shape, jax.image.ResizeMethod.CUBIC, antialias=False)


def enlarge_between_corners(low_res: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Upsample bilinearly with aligned centres of the corner pixels (PyTorch's align_corners)."""
    shape = (low_res.shape[0], *size, low_res.shape[3])
    scale = jnp.asarray([(after - 1) / max(before - 1, 1) for before, after in zip(low_res.shape[1:3], size)])
    shift = 0.5 - 0.5 * scale
    return jax.image.scale_and_translate(low_res, shape, (1, 2), scale, shift, "linear", antialias=False)
