"""Imagen (arXiv 2205.11487): one stage of the cascade, trained on its own.

A stage is a diffusion model of pictures: the base draws 64×64 from text, a super-resolution stage enlarges fourfold,
from the low-resolution picture and, where it has one, the text. How it draws is `models/sampling.py`, joining
stages `systems/pipeline.py`; the paper's settings and the tiny ones are `systems/imagen.py`.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.augmentation import augment
from jaxdiff.diffusion.losses import UniformWeighting, Weighting, diffusion_loss, variance_loss
from jaxdiff.diffusion.parameterization import Prediction, denoised, noised
from jaxdiff.diffusion.schedules import CosineSchedule, Schedule, TabulatedSchedule
from jaxdiff.diffusion.time_samplers import TimeSampler, UniformTimes
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.unet import UNetConfig
from jaxdiff.text.t5 import TextEmbedding


class NullText(enum.Enum):
    """What stands for no text: in training in place of dropped captions, in drawing what guidance leads away from.

    ZEROS: embeddings of zeros, all of them masked (Imagen). EMPTY: the encoder's embedding of the empty caption
    (DeepFloyd IF).
    """

    ZEROS = "zeros"
    EMPTY = "empty"


class Enlargement(enum.Enum):
    """How the low-resolution input of super-resolution comes to the output's size.

    CUBIC: noised, then enlarged as Pillow's BICUBIC does. BILINEAR: enlarged, the corner pixels of both sizes in one
    place, and then noised (DeepFloyd IF).
    """

    CUBIC = "cubic"
    BILINEAR = "bilinear"


@dataclass(frozen=True)
class DiffusionModel:
    """Settings of one stage. `low_resolution` makes it a super-resolution stage.

    resolution: sides of the pictures that it is trained for, in pixels; sampling takes any multiple of the stride.
    schedule, prediction, weighting: the diffusion process; Imagen's are cosine, ε and the plain squared error.
    time_sampler: where training spends its time; Imagen's is uniform.
    augmentation: schedule of the noise on the low-resolution input, whose time is the level (2.4). max_aug_level: the
    highest level in training, where levels are uniform from 0. enlargement: how that input is enlarged, and when.
    residual: the network says what to add to the enlarged input (x₀ prediction only): flat areas come out exact.
    text_length: tokens per caption. text_dropout: share of captions replaced by the null text.
    """

    unet: UNetConfig = UNetConfig()
    resolution: int = 64
    low_resolution: int | None = None
    schedule: Schedule = CosineSchedule()
    time_sampler: TimeSampler = UniformTimes()
    prediction: Prediction = Prediction.EPSILON
    weighting: Weighting = UniformWeighting()
    augmentation: Schedule = CosineSchedule()
    max_aug_level: float = 1.0
    enlargement: Enlargement = Enlargement.CUBIC
    residual: bool = False
    text_length: int = 128
    text_dropout: float = 0.1
    null_text: NullText = NullText.ZEROS

    def __post_init__(self):
        check_size(self, self.resolution)
        if (self.low_resolution is not None) != self.unet.low_res:
            raise ValueError("low_resolution is for networks with low_res, and they need it")
        if self.low_resolution is not None and (self.low_resolution < 1 or self.resolution % self.low_resolution):
            raise ValueError(f"resolution {self.resolution} is not a multiple of low_resolution {self.low_resolution}")
        if self.residual and (self.prediction is not Prediction.X0 or not self.unet.low_res):
            raise ValueError("residual is for super-resolution stages that predict x0")
        if self.unet.learned_variance and not isinstance(self.schedule, TabulatedSchedule):
            raise ValueError("a variance is learned between the entries of a discrete schedule")
        if not 0 <= self.max_aug_level <= 1:
            raise ValueError(f"max_aug_level must lie in [0, 1], not {self.max_aug_level}")
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"text_dropout must be a share between 0 and 1, not {self.text_dropout}")

    @property
    def factor(self) -> int:
        """How many times a super-resolution stage enlarges; 1 for a base stage."""
        return self.resolution // (self.low_resolution or self.resolution)

    def init(self, key: Key[Array, ""]) -> dict:
        """Fresh parameters, float32. Widths alone decide their shapes, so the smallest picture does."""
        side = self.unet.stride
        x, ones = jnp.zeros((1, side, side, 3)), jnp.ones(1)
        low_res = (x, ones) if self.unet.low_res else ()
        text = null_text(self, 1)
        unet = replace(self.unet, axes=ActivationSharding())  # one picture cannot be split
        return unet.module().init(key, x, ones, text.embeddings, text.mask, *low_res)["params"]

    def loss(self, params: dict, batch: Mapping, key: Key[Array, ""]) -> tuple[Array, dict]:
        """The weighted squared error, averaged over the batch.

        `batch`: image (b h w 3) in [-1, 1]; for super-resolution low_res (b h/f w/f 3); text (b n d) and text_mask
        (b n) where there are captions, and null_text (n d), the embedding of the empty caption, where that is the null
        text; without captions the stage trains on pictures alone.
        """
        image = batch["image"].astype(jnp.float32)
        count = image.shape[0]
        keys = noise.sample_keys(key, jnp.arange(count))
        # Times are spread evenly over [0, 1] (VDM, arXiv 2107.00630, I.1): the same density, a loss of less variance.
        u = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
        t = self.time_sampler.times(jax.random.permutation(jax.random.fold_in(key, count), u), self.schedule)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = noise.normal_like(noise.fold(keys, 0), image.shape[1:])
        x = noised(image, eps, alpha, sigma)
        text = self._dropped_text(batch, keys)
        low_res = self._augmented(batch, image.shape, keys)
        output, gamma = self.parts(self.predict(params, x, t, text, *low_res))
        losses = diffusion_loss(output, self.prediction, image, eps, alpha, sigma, self.weighting)
        if gamma is not None:
            x0 = jax.lax.stop_gradient(denoised(self.prediction, output, x, alpha, sigma).x0)
            assert isinstance(self.schedule, TabulatedSchedule)  # see __post_init__
            losses += variance_loss(self.schedule, gamma, image, x0, x, t)
        return losses.mean(), {}

    def batch(self, count: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch of pictures of that side, with captions."""
        shapes: dict[str, tuple[tuple[int, ...], jax.typing.DTypeLike]] = {
            "image": ((count, side, side, 3), jnp.float32),
            "text": ((count, self.text_length, self.unet.text_width), jnp.float16),
            "text_mask": ((count, self.text_length), jnp.bool_),
        }
        if self.low_resolution is not None:
            shapes["low_res"] = ((count, side // self.factor, side // self.factor, 3), jnp.float32)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def cast(self, params: dict) -> dict:
        """The kernels in the type that the network computes in, which its layers would give them anyway."""
        return jax.tree.map(lambda leaf: leaf.astype(self.unet.dtype) if leaf.ndim > 1 else leaf, params)

    def parts(self, output: Float[Array, "b h w o"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"] | None]:
        """Of a network's output: what `prediction` says and, where it is learned, γ of the variance (`DDPM`)."""
        if not self.unet.learned_variance:
            return output, None
        output, variance = jnp.split(output, 2, axis=-1)
        return output, 0.5 * (variance + 1.0)

    def predict(
        self,
        params: dict,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        text: TextEmbedding,
        low_res: Float[Array, "b h w c"] | None = None,
        level: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The network's output at the noised pictures x; `low_res` is enlarged and noised to its level already."""
        given = () if low_res is None else (low_res, level)
        position = self.schedule.network_time(t)
        inputs = x, position, text.embeddings, text.mask, *given
        output = cast(Array, self.unet.module().apply({"params": params}, *inputs))
        if self.residual:
            assert low_res is not None and level is not None  # residual is for super-resolution alone
            alpha = self.augmentation.alpha(self.augmentation.level_time(level))
            output += alpha[:, None, None, None] * low_res
        return output

    def _dropped_text(self, batch: Mapping, keys: Key[Array, " b"]) -> TextEmbedding:
        if "text" not in batch:
            return null_text(self, batch["image"].shape[0])
        kept = noise.uniform(noise.fold(keys, 1)) >= self.text_dropout
        text, mask = batch["text"].astype(jnp.float32), batch["text_mask"]
        if self.null_text is NullText.EMPTY:
            if "null_text" not in batch:
                raise ValueError("this stage's null text is the empty caption: a batch needs null_text, its embedding")
            # Nothing of either is masked.
            return TextEmbedding(jnp.where(kept[:, None, None], text, batch["null_text"].astype(jnp.float32)), mask)
        mask = mask & kept[:, None]
        return TextEmbedding(jnp.where(mask[..., None], text, 0.0), mask)

    def _augmented(self, batch: Mapping, shape: tuple, keys: Key[Array, " b"]) -> tuple:
        """The enlarged low-resolution input with noise of a random level each, and the levels."""
        if not self.unet.low_res:
            return ()
        level = self.max_aug_level * noise.uniform(noise.fold(keys, 2))
        return low_res_input(self, batch["low_res"], level, noise.fold(keys, 3), shape[1:3])


def low_res_input(
    stage: DiffusionModel,
    low_res: Float[Array, "b h w c"],
    level: Float[Array, " b"],
    keys: Key[Array, " b"],
    size: tuple[int, int],
) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, " b"]]:
    """The low-resolution pictures as the network sees them, noised and enlarged, and the level that it is told."""
    low_res, schedule = low_res.astype(jnp.float32), stage.augmentation
    if stage.enlargement is Enlargement.CUBIC:
        seen = enlarge(augment(low_res, level, keys, schedule), size)
    else:
        seen = augment(enlarge_between_corners(low_res, size), level, keys, schedule)
    return seen, schedule.network_time(schedule.level_time(level)) / 1000.0


def enlarge(low_res: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """The low-resolution input at the output's size, bicubic (Keys, a = −1/2: Pillow's BICUBIC)."""
    shape = (low_res.shape[0], *size, low_res.shape[3])
    return jax.image.resize(low_res, shape, jax.image.ResizeMethod.CUBIC, antialias=False)


def enlarge_between_corners(low_res: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Bilinear, the centres of the corner pixels of both sizes in one place (PyTorch's align_corners)."""
    shape = (low_res.shape[0], *size, low_res.shape[3])
    scale = jnp.asarray([(after - 1) / max(before - 1, 1) for before, after in zip(low_res.shape[1:3], size)])
    shift = 0.5 - 0.5 * scale
    return jax.image.scale_and_translate(low_res, shape, (1, 2), scale, shift, "linear", antialias=False)


def null_text(stage: DiffusionModel, count: int) -> TextEmbedding:
    """Zeros, all of it masked: NullText.ZEROS, and what a stage is given that reads no text."""
    shape = (count, stage.text_length)
    return TextEmbedding(jnp.zeros((*shape, stage.unet.text_width)), jnp.zeros(shape, bool))


def check_size(stage: DiffusionModel, *sides: int, name: str = "side") -> None:
    """ValueError where a side (`name` says of what) is not a multiple of the network's stride."""
    for side in sides:
        if side < 1 or side % stage.unet.stride:
            raise ValueError(f"a {name} of {side} pixels is not a multiple of the network's stride {stage.unet.stride}")


def check_crop(stage: DiffusionModel, side: int) -> None:
    """ValueError where the stage cannot be trained on crops of this side: one that the network does not take, or that
    is larger than its images."""
    check_size(stage, side, name="crop")
    if side > stage.resolution:
        raise ValueError(f"--crop {side}: larger than the pictures, {stage.resolution}")
