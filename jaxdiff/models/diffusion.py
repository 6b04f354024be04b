"""A diffusion model of images or latents: a stage of Imagen, or the generator of latent diffusion.

Its conditioners (text, a low-resolution image) are in `models/conditioners.py`, sampling is in `models/sampling.py`,
presets are in `systems/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.core.products import EmbeddingSpec, ImageSpec, LatentSpec
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.losses import UniformWeighting, Weighting, diffusion_loss, variance_loss
from jaxdiff.diffusion.parameterization import Prediction, denoised, noised
from jaxdiff.diffusion.schedules import CosineSchedule, Schedule, TabulatedSchedule
from jaxdiff.diffusion.time_samplers import TimeSampler, UniformTimes
from jaxdiff.models.conditioner import joined
from jaxdiff.models.conditioners import AnyConditioner, LowResConditioner, TextConditioner, without_dropout
from jaxdiff.models.representations import Form, Representation
from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.nets.unet import UNetConfig

HELD_OUT_LEVELS = 8
"""Number of evenly spaced times at which held-out examples are evaluated, as in MLPerf's diffusion benchmarks."""


@dataclass(frozen=True)
class DiffusionModel(SingleOptimizer):
    """Settings of a diffusion model.

    side: side of the training images; sampling takes any multiples of the network's stride. product: type of the
    output. conditioners: with a `LowResConditioner` the model is super-resolution.
    schedule, time_sampler, prediction, weighting: the diffusion process and its training; Imagen's are cosine, uniform
    times, ε and the unweighted squared error.
    residual: the network predicts the difference from the upsampled input (x₀ prediction only), so that flat areas are
    exact.
    """

    unet: UNetConfig | LatentUNetConfig | PriorConfig = UNetConfig()
    side: int = 64
    product: ImageSpec | LatentSpec | EmbeddingSpec = ImageSpec()
    conditioners: tuple[AnyConditioner, ...] = (TextConditioner(),)
    schedule: Schedule = CosineSchedule()
    time_sampler: TimeSampler = UniformTimes()
    prediction: Prediction = Prediction.EPSILON
    weighting: Weighting = UniformWeighting()
    residual: bool = False

    def __post_init__(self):
        check_size(self, self.side)
        kinds = [type(conditioner) for conditioner in self.conditioners]
        if len(set(kinds)) != len(kinds):
            raise ValueError("two conditioners of the same type")
        tokens = any(getattr(each, "form", None) is Form.TOKENS for each in self.representations)
        if self.unet.reads_text != (self.text is not None or tokens):
            raise ValueError("a network has a conditioner with tokens if and only if it reads text")
        if self.low_res is not None and self.side % self.low_res.factor:
            raise ValueError(f"a side of {self.side} is not a multiple of the factor {self.low_res.factor}")
        if self.residual and (self.prediction is not Prediction.X0 or self.low_res is None):
            raise ValueError("residual is for super-resolution models that predict x0")
        if self.residual and self.low_res is not None and self.low_res.channels != self.product.channels:
            raise ValueError(f"residual adds {self.low_res.channels} channels to {self.product}")
        if self.unet.learned_variance and not isinstance(self.schedule, TabulatedSchedule):
            raise ValueError("a learned variance needs a tabulated schedule")

    @property
    def text(self) -> TextConditioner | None:
        return next((each for each in self.conditioners if isinstance(each, TextConditioner)), None)

    @property
    def low_res(self) -> LowResConditioner | None:
        return next((each for each in self.conditioners if isinstance(each, LowResConditioner)), None)

    @property
    def representations(self) -> tuple[Representation, ...]:
        return tuple(each for each in self.conditioners if isinstance(each, Representation))

    @property
    def guided(self) -> bool:
        """Whether the two branches of guidance differ: it has a conditioner with a null condition."""
        return self.text is not None or bool(self.representations)

    @property
    def factor(self) -> int:
        """The upsampling factor of super-resolution; 1 for a generator."""
        return 1 if self.low_res is None else self.low_res.factor

    def reading(self, length: int, width: int) -> "DiffusionModel":
        """The model for a text encoder with `length` embeddings of `width`; unchanged if it reads no text."""
        conditioners = [replace(c, length=length, width=width) if c is self.text else c for c in self.conditioners]
        return replace(self, conditioners=tuple(conditioners))

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        """Initial float32 parameters, no extra. Their shapes do not depend on the image size; the smallest is used."""
        size = (self.unet.stride, self.unet.stride)
        inputs = joined([conditioner.example(size) for conditioner in self.conditioners])
        plain = replace(self.unet.execution, sharding=ActivationSharding())  # one image cannot be sharded
        network = replace(self.unet, execution=plain).module()
        return network.init(key, jnp.zeros((1, *size, self.product.channels)), jnp.ones(1), inputs)["params"], ()

    def loss(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict, tuple]]:
        """The weighted squared error, averaged over the batch.

        batch: image (b h w c), in [-1, 1] for pixels, and the entries of the conditioners.
        """
        count = batch["image"].shape[0]
        keys = noise.sample_keys(key, jnp.arange(count))
        # Evenly spaced times over [0, 1] (VDM, arXiv 2107.00630, I.1): the same density, lower variance of the loss.
        u = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
        t = self.time_sampler.times(jax.random.permutation(jax.random.fold_in(key, count), u), self.schedule)
        return self._losses(params, batch, t, keys).mean(), ({}, extra)

    def held_out_losses(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, numbers: Int[Array, " b"], key: Key[Array, ""]
    ) -> dict[str, tuple[Array, Array]]:
        """The training loss of held-out examples at eight noise levels, without caption dropout.

        Example i is evaluated at one time of the schedule, (i mod 8 + 1/2) / 8, with its own fixed noise. batch: as in
        `loss`. numbers (b): i of each example, or −1 for padding rows. A low-resolution input is noised as in training.
        The loss has the model's weighting but ignores the time sampler, so the mean differs from the training loss if
        that samples other times.

        Returns sums over examples and their counts: `held_out_loss` for all, `held_out_loss_t0.06` to
        `held_out_loss_t0.94` for each time.
        """
        example = jnp.maximum(numbers, 0)
        level = example % HELD_OUT_LEVELS
        t = self.schedule.entry_time((level + 0.5) / HELD_OUT_LEVELS)
        conditional = replace(self, conditioners=tuple(map(without_dropout, self.conditioners)))
        losses = conditional._losses(params, batch, t, noise.sample_keys(key, example))

        def masked_sum(mask: Array) -> tuple[Array, Array]:
            return jnp.where(mask, losses, 0.0).sum(), mask.astype(jnp.float32).sum()

        at_levels = {
            f"held_out_loss_t{(i + 0.5) / HELD_OUT_LEVELS:.2f}": masked_sum((numbers >= 0) & (level == i))
            for i in range(HELD_OUT_LEVELS)
        }
        return {"held_out_loss": masked_sum(numbers >= 0)} | at_levels

    def _losses(
        self, params: dict, batch: Mapping, t: Float[Array, " b"], keys: Key[Array, " b"]
    ) -> Float[Array, " b"]:
        """The loss of each example at its time, with noise from its key."""
        image = batch["image"].astype(jnp.float32)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = noise.normal_like(noise.fold(keys, 0), image.shape[1:])
        x = noised(image, eps, alpha, sigma)
        inputs = joined([conditioner.training(batch, keys, image.shape[1:3]) for conditioner in self.conditioners])
        output, gamma = self.split_output(self.predict(params, x, t, inputs))
        losses = diffusion_loss(output, self.prediction, image, eps, alpha, sigma, self.weighting)
        if gamma is not None:
            x0 = jax.lax.stop_gradient(denoised(self.prediction, output, x, alpha, sigma).x0)
            assert isinstance(self.schedule, TabulatedSchedule)  # see __post_init__
            losses += variance_loss(self.schedule, gamma, image, x0, x, t)
        return losses

    def batch_spec(self, batch_size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a training batch of images of that side."""
        shapes = {"image": jax.ShapeDtypeStruct((batch_size, side, side, self.product.channels), jnp.float32)}
        for conditioner in self.conditioners:
            shapes |= conditioner.batch_spec(batch_size, side)
        return shapes

    def cast(self, params: dict) -> dict:
        """Cast the kernels to the network's compute type, as its layers would."""
        dtype = self.unet.execution.dtype
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)

    def split_output(
        self, output: Float[Array, "b h w o"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"] | None]:
        """Split a network's output into the prediction and γ of the variance (`DDPM`; None if it is not learned)."""
        if not self.unet.learned_variance:
            return output, None
        output, variance = jnp.split(output, 2, axis=-1)
        return output, 0.5 * (variance + 1.0)

    def predict(
        self, params: dict, x: Float[Array, "b h w c"], t: Float[Array, " b"], given: Conditioning
    ) -> Float[Array, "b h w o"]:
        """The network's output at noised images x and times t."""
        time = self.schedule.network_time(t)
        output = cast(Array, self.unet.module().apply({"params": params}, x, time, given))
        if self.residual:
            assert self.low_res is not None  # see __post_init__
            output += self.low_res.kept(given)
        return output


def executed(model: DiffusionModel, **how: Any) -> DiffusionModel:
    """The model with other execution settings, given as fields of `ExecutionConfig`."""
    execution = replace(model.unet.execution, **how)
    return replace(model, unet=replace(model.unet, execution=execution))


def check_size(model: DiffusionModel, *sides: int, name: str = "side") -> None:
    """ValueError if a side is not a multiple of the network's stride. name: its name in the message."""
    unit = "latents" if isinstance(model.product, LatentSpec) else "pixels"
    for side in sides:
        if side < 1 or side % model.unet.stride:
            raise ValueError(f"a {name} of {side} {unit} is not a multiple of the network's stride {model.unet.stride}")


def check_crop(model: DiffusionModel, side: int) -> None:
    """ValueError if the model cannot train on crops of this side: not a multiple of the stride, or larger than its
    images."""
    check_size(model, side, name="crop")
    if side > model.side:
        raise ValueError(f"--crop {side}: larger than the images, {model.side}")
