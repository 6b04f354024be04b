"""Conditioners: settings of a diffusion model, each of which computes a part of the network's `Conditioning`.

In training they read a batch, with dropout and augmentation; in sampling they return the conditional and the
unconditional branch of guidance. Here: text, sizes, masks, hints, low-resolution images.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.augmentation import augment
from jaxdiff.diffusion.degradation import Degradation
from jaxdiff.diffusion.schedules import CosineSchedule, Schedule
from jaxdiff.models.conditioner import Branches, SampleInputs, Shapes, check_dropout, entry
from jaxdiff.models.representations import Representation
from jaxdiff.nets.blocks import sinusoidal
from jaxdiff.nets.conditioning import Conditioning, Hint
from jaxdiff.text.encoder import TextEmbedding


class NullText(enum.Enum):
    """The null text: replaces dropped captions in training, and conditions the unconditional branch in sampling.

    ZEROS: zero embeddings, all masked (Imagen). EMPTY: the embedding of the empty caption with its padding (DeepFloyd
    IF). EMPTY_MASKED: the same, with the padding masked as that of any caption (Karlo).
    """

    ZEROS = "zeros"
    EMPTY = "empty"
    EMPTY_MASKED = "empty_masked"


class Enlargement(enum.Enum):
    """How a low-resolution image is upsampled to the output size.

    CUBIC: noised, then upsampled like Pillow's BICUBIC. BILINEAR: upsampled with aligned corner pixels, then noised
    (DeepFloyd IF).
    """

    CUBIC = "cubic"
    BILINEAR = "bilinear"


@dataclass(frozen=True)
class TextConditioner:
    """Caption embeddings for attention.

    width, length: those of the text encoder's embeddings; None until set by `DiffusionModel.reading`.
    dropout: fraction of captions replaced by the null text in training.
    pooled: width of the text encoder's pooled vector, if the network reads it beside the tokens. pooled_norm: the
    length that it is scaled to (`EmbeddingSpec.norm`); None: as the text encoder gives it.
    mean: the network reads the mean of the tokens as a vector, beside the tokens. For small models: what a caption says
    of the entire image need not be found by attention.
    """

    width: int | None = None
    length: int | None = None
    dropout: float = 0.1
    null: NullText = NullText.ZEROS
    pooled: int | None = None
    mean: bool = False
    pooled_norm: float | None = None

    def __post_init__(self):
        check_dropout(self.dropout, "captions")
        if self.pooled_norm is not None and self.pooled is None:
            raise ValueError("pooled_norm is for networks that read the pooled vector")
        if self.mean and self.pooled is not None:
            raise ValueError("a network reads one vector of the text: pooled or mean")

    @property
    def shape(self) -> tuple[int, int]:
        """Length and width; ValueError if they are not set."""
        if self.width is None or self.length is None:
            raise ValueError("the text encoder of this model is not set: use `DiffusionModel.reading`")
        return self.length, self.width

    def null_text(self, count: int) -> TextEmbedding:
        """Zeros, all masked."""
        pooled = None if self.pooled is None else jnp.zeros((count, self.pooled))
        return TextEmbedding(jnp.zeros((count, *self.shape)), jnp.zeros((count, self.shape[0]), bool), pooled)

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        shapes = {
            "text": jax.ShapeDtypeStruct((batch_size, *self.shape), jnp.float16),
            "text_mask": jax.ShapeDtypeStruct((batch_size, self.shape[0]), jnp.bool_),
        }
        if self.pooled is not None:
            shapes["text_pooled"] = jax.ShapeDtypeStruct((batch_size, self.pooled), jnp.float16)
        if self.null is not NullText.ZEROS:  # with a batch axis, along which every entry is sharded
            names = {"text": "null_text", "text_pooled": "null_pooled"}
            names |= {"text_mask": "null_mask"} if self.null is NullText.EMPTY_MASKED else {}
            shapes |= {null: shapes[name] for name, null in names.items() if name in shapes}
        return shapes

    def example(self, size: tuple[int, int]) -> Conditioning:
        return self._attended(self.null_text(1))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads text (b n d), text_mask (b n), with `pooled` text_pooled (b p), and for `NullText.EMPTY` null_text
        and null_pooled, the embedding of the empty caption, with or without a batch axis; for `EMPTY_MASKED` also
        null_mask. A batch without text trains unconditionally."""
        if "text" not in batch:
            return self._attended(self.null_text(keys.shape[0]))
        kept = noise.uniform(noise.fold(keys, 1)) >= self.dropout
        text, mask = batch["text"].astype(jnp.float32), batch["text_mask"]
        if self.null is not NullText.ZEROS:
            tokens = jnp.where(kept[:, None, None], text, entry(batch, "null_text"))
            if self.null is NullText.EMPTY_MASKED:  # otherwise neither text nor null text is masked
                mask = jnp.where(kept[:, None], mask, entry(batch, "null_mask", bool))
        else:
            mask = mask & kept[:, None]
            tokens = jnp.where(mask[..., None], text, 0.0)
        if self.pooled is None:
            return self._attended(TextEmbedding(tokens, mask))
        null = 0.0 if self.null is NullText.ZEROS else entry(batch, "null_pooled")
        return Conditioning(tokens, mask, self._scaled(jnp.where(kept[:, None], entry(batch, "text_pooled"), null)))

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        null = self.null_text(keys.shape[0]) if inputs.text is None or inputs.negative is None else None
        text, negative = (null if value is None else value for value in (inputs.text, inputs.negative))
        assert text is not None and negative is not None  # replaced by the null text
        return Branches(self._attended(text), self._attended(negative))

    def _attended(self, text: TextEmbedding) -> Conditioning:
        if self.pooled is None:
            return Conditioning(text.tokens, text.mask, _mean(text) if self.mean else None)
        if text.pooled is None or text.pooled.shape[-1] != self.pooled:
            width = "none" if text.pooled is None else f"one of {text.pooled.shape[-1]}"
            raise ValueError(f"this model reads a pooled text of width {self.pooled}, its text encoder gives {width}")
        return Conditioning(text.tokens, text.mask, self._scaled(text.pooled))

    def _scaled(self, pooled: Float[Array, "b p"]) -> Float[Array, "b p"]:
        return EmbeddingSpec(pooled.shape[-1], self.pooled_norm).normalized(pooled)


def _mean(text: TextEmbedding) -> Float[Array, "b d"]:
    """The mean over the tokens that are not masked; zero without tokens."""
    mask = text.mask[..., None].astype(jnp.float32)
    return (text.tokens.astype(jnp.float32) * mask).sum(1) / jnp.maximum(mask.sum(1), 1.0)


@dataclass(frozen=True)
class SizeConditioner:
    """The size of an image before it was resized, the corner of its crop, and its size in training (SDXL, arXiv
    2307.01952, 2.2): six numbers, each embedded by sines of `frequencies` values, as a vector.

    stride: pixels per latent. In sampling, original and final size are those of the image, and the crop starts at its
    corner.
    """

    frequencies: int = 256
    stride: int = 8

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        return {"sizes": jax.ShapeDtypeStruct((batch_size, 6), jnp.float32)}

    def example(self, size: tuple[int, int]) -> Conditioning:
        return self._embedded(jnp.zeros((1, 6)))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads sizes (b 6), in pixels: height and width before resizing, top and left of the crop, height and width of
        the crop."""
        return self._embedded(entry(batch, "sizes"))

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        height, width = (side * self.stride for side in size)
        sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
        both = self._embedded(jnp.broadcast_to(sizes, (keys.shape[0], 6)))
        return Branches(both, both)

    def _embedded(self, sizes: Float[Array, "b 6"]) -> Conditioning:
        return Conditioning(vector=sinusoidal(sizes.reshape(-1), self.frequencies).reshape(sizes.shape[0], -1))


@dataclass(frozen=True)
class MaskConditioner:
    """Inpainting: the mask, 1 where sampled, and the product of the image with the masked pixels grey, beside the
    network's input (Stable Diffusion's inpainting).

    channels: of the product. dropout: fraction of examples of which everything is masked in training.
    """

    channels: int = 4
    dropout: float = 0.25

    def __post_init__(self):
        check_dropout(self.dropout, "images")

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        shape = (batch_size, side, side)
        return {
            "mask": jax.ShapeDtypeStruct((*shape, 1), jnp.float32),
            "masked": jax.ShapeDtypeStruct((*shape, self.channels), jnp.float32),
        }

    def example(self, size: tuple[int, int]) -> Conditioning:
        return Conditioning(concat=jnp.zeros((1, *size, 1 + self.channels)))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads mask (b h w 1) and masked (b h w c)."""
        kept = (noise.uniform(noise.fold(keys, 4)) >= self.dropout)[:, None, None, None]
        mask, masked = jnp.where(kept, entry(batch, "mask"), 1.0), jnp.where(kept, entry(batch, "masked"), 0.0)
        return Conditioning(concat=jnp.concatenate([mask, masked], axis=-1))

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        """Without an image everything is masked."""
        if inputs.mask is None or inputs.masked is None:
            shape = (keys.shape[0], *size)
            concat = jnp.concatenate([jnp.ones((*shape, 1)), jnp.zeros((*shape, self.channels))], axis=-1)
        else:
            concat = jnp.concatenate([inputs.mask, inputs.masked], axis=-1)
        return Branches(Conditioning(concat=concat), Conditioning(concat=concat))


@dataclass(frozen=True)
class HintConditioner:
    """Hints of ControlNets: images in [0, 1], with `stride` pixels per pixel or latent of the network's input.

    channels: of each hint.
    """

    channels: tuple[int, ...] = (3,)
    stride: int = 8

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        shape = batch_size, self.stride * side, self.stride * side
        return {
            name: jax.ShapeDtypeStruct((*shape, channels), jnp.float32)
            for name, channels in zip(self.entries, self.channels)
        }

    @property
    def entries(self) -> list[str]:
        """The names of the hints in a training batch: hint, hint_1, …"""
        return [f"hint_{i}" if i else "hint" for i in range(len(self.channels))]

    def example(self, size: tuple[int, int]) -> Conditioning:
        height, width = self.pixels(size)
        images = [jnp.zeros((1, height, width, channels)) for channels in self.channels]
        return Conditioning(hints=tuple(Hint(image, jnp.ones(1), jnp.zeros(1)) for image in images))

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads hint (b H W c), H and W: `stride` times the size. ValueError for a hint of another size."""
        count, hints = keys.shape[0], []
        for name, channels in zip(self.entries, self.channels):
            image = entry(batch, name)
            self.check_image(image, channels, size, f"the batch's {name}")
            hints.append(Hint(image, jnp.ones(count), jnp.zeros(count)))
        return Conditioning(hints=tuple(hints))

    def sampling(self, inputs: SampleInputs, keys: Key[Array, " b"], size: tuple[int, int]) -> Branches:
        """Both branches get the hints, but for those with `guess` the unconditional one: their weight is 0 there."""
        weights = [jnp.zeros_like(h.weight) if guess else h.weight for h, guess in zip(inputs.hints, inputs.guess)]
        unconditional = tuple(hint._replace(weight=weight) for hint, weight in zip(inputs.hints, weights))
        return Branches(Conditioning(hints=inputs.hints), Conditioning(hints=unconditional))

    def pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the hints for an input of this size."""
        return self.stride * size[0], self.stride * size[1]

    def check_image(self, image: Any, channels: int, size: tuple[int, int], what: str) -> None:
        """ValueError unless the last axes of a hint are those for an input of this size."""
        wanted = *self.pixels(size), channels
        if tuple(image.shape[-3:]) != wanted:
            have, want = ("×".join(map(str, shape)) for shape in (image.shape[-3:], wanted))
            raise ValueError(f"{what} is an image of {have}: sampling {size[0]}×{size[1]} needs {want}")


@dataclass(frozen=True)
class LowResConditioner:
    """A low-resolution image, upsampled and noised to a known level (Imagen 2.4).

    factor: upsampling factor. augmentation: the schedule of the noise; the level is its time. None: the image is not
    noised and the network reads no level (Karlo). max_level: training levels are uniform in [0, max_level].
    enlargement: the upsampling method, and its order with the noise.
    degradation: how the image is corrupted in training, before the noise (DALL·E 2); None: not.
    """

    factor: int = 4
    augmentation: Schedule | None = CosineSchedule()
    max_level: float = 1.0
    enlargement: Enlargement = Enlargement.CUBIC
    channels: int = 3
    degradation: Degradation | None = None

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"factor {self.factor}: must be at least 1")
        if not 0 <= self.max_level <= 1:
            raise ValueError(f"max_level {self.max_level}: must lie in [0, 1]")

    def batch_spec(self, batch_size: int, side: int) -> Shapes:
        lower = side // self.factor
        return {"low_res": jax.ShapeDtypeStruct((batch_size, lower, lower, self.channels), jnp.float32)}

    def example(self, size: tuple[int, int]) -> Conditioning:
        level = None if self.augmentation is None else jnp.ones(1)
        return Conditioning(concat=jnp.zeros((1, *size, self.channels)), aug_level=level)

    def training(self, batch: Mapping[str, Any], keys: Key[Array, " b"], size: tuple[int, int]) -> Conditioning:
        """Reads low_res (b h/f w/f c); each example has its own level."""
        level, low_res = self.max_level * noise.uniform(noise.fold(keys, 2)), batch["low_res"]
        if self.degradation is not None:
            low_res = self.degradation.apply(jnp.asarray(low_res, jnp.float32), noise.fold(keys, 8))
        return self.seen(low_res, level, noise.fold(keys, 3), size)

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
        cubic = self.enlargement is Enlargement.CUBIC
        if schedule is None:
            return Conditioning(concat=enlarge(low_res, size) if cubic else enlarge_between_corners(low_res, size))
        if cubic:
            seen = enlarge(augment(low_res, level, keys, schedule), size)
        else:
            seen = augment(enlarge_between_corners(low_res, size), level, keys, schedule)
        return Conditioning(concat=seen, aug_level=schedule.network_time(schedule.level_time(level)) / 1000.0)

    def kept(self, given: Conditioning) -> Float[Array, "b h w c"]:
        """α(level) times the noised image, to which a residual network's output is added; the image if there is no
        noise."""
        assert given.concat is not None  # `seen` sets it
        if self.augmentation is None:
            return given.concat
        assert given.aug_level is not None  # as above
        alpha = self.augmentation.alpha(self.augmentation.level_time(given.aug_level))
        return alpha[:, None, None, None] * given.concat


AnyConditioner = (
    TextConditioner | SizeConditioner | MaskConditioner | HintConditioner | LowResConditioner | Representation
)


def without_dropout(conditioner: AnyConditioner) -> AnyConditioner:
    """The conditioner without dropout, to evaluate the conditional model."""
    if isinstance(conditioner, TextConditioner | MaskConditioner | Representation):
        return replace(conditioner, dropout=0.0)
    return conditioner


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
