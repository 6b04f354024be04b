"""A diffusion model of images or latents, trained on its own: a stage of Imagen, or the generator of latent diffusion.

What it is conditioned on is a tuple of conditioners (`models/conditioners.py`): text, a low-resolution image. How it
samples is `models/sampling.py`; presets are in `systems/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.core.products import ImageSpec, LatentSpec
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.losses import UniformWeighting, Weighting, diffusion_loss, variance_loss
from jaxdiff.diffusion.parameterization import Prediction, denoised, noised
from jaxdiff.diffusion.schedules import CosineSchedule, Schedule, TabulatedSchedule
from jaxdiff.diffusion.time_samplers import TimeSampler, UniformTimes
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner, joined, without_dropout
from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.nets.unet import UNetConfig

HELD_OUT_LEVELS = 8
"""Times at which held-out examples are evaluated, evenly spread over the schedule: as many as in MLPerf's benchmarks of
diffusion models."""


@dataclass(frozen=True)
class DiffusionModel(SingleOptimizer):
    """Settings of a diffusion model.

    side: of the images that it is trained for; sampling takes any multiples of the network's stride. product: what it
    generates. conditioners: what it is conditioned on; with a `LowResConditioner` it is super-resolution.
    schedule, time_sampler, prediction, weighting: the diffusion process and its training; Imagen's are cosine, uniform
    times, ε and the plain squared error.
    residual: the network says what to add to the enlarged input (x₀ prediction only): flat areas come out exact.
    """

    unet: UNetConfig = UNetConfig()
    side: int = 64
    product: ImageSpec | LatentSpec = ImageSpec()
    conditioners: tuple[TextConditioner | LowResConditioner, ...] = (TextConditioner(),)
    schedule: Schedule = CosineSchedule()
    time_sampler: TimeSampler = UniformTimes()
    prediction: Prediction = Prediction.EPSILON
    weighting: Weighting = UniformWeighting()
    residual: bool = False

    def __post_init__(self):
        check_size(self, self.side)
        kinds = [type(conditioner) for conditioner in self.conditioners]
        if len(set(kinds)) != len(kinds):
            raise ValueError("two conditioners of one kind")
        if self.unet.reads_text != (self.text is not None):
            raise ValueError("a network that reads text needs a TextConditioner, and no other has one")
        if self.low_res is not None and self.side % self.low_res.factor:
            raise ValueError(f"a side of {self.side} is not a multiple of the factor {self.low_res.factor}")
        if self.residual and (self.prediction is not Prediction.X0 or self.low_res is None):
            raise ValueError("residual is for super-resolution models that predict x0")
        if self.residual and self.low_res is not None and self.low_res.channels != self.product.channels:
            raise ValueError(f"residual adds {self.low_res.channels} channels to {self.product}")
        if self.unet.learned_variance and not isinstance(self.schedule, TabulatedSchedule):
            raise ValueError("a variance is learned between the entries of a tabulated schedule")

    @property
    def text(self) -> TextConditioner | None:
        return next((each for each in self.conditioners if isinstance(each, TextConditioner)), None)

    @property
    def low_res(self) -> LowResConditioner | None:
        return next((each for each in self.conditioners if isinstance(each, LowResConditioner)), None)

    @property
    def factor(self) -> int:
        """How many times super-resolution enlarges; 1 for a generator."""
        return 1 if self.low_res is None else self.low_res.factor

    def reading(self, length: int, width: int) -> "DiffusionModel":
        """The model for a text encoder that gives `length` embeddings of `width`; itself, where it reads no text."""
        conditioners = [replace(c, length=length, width=width) if c is self.text else c for c in self.conditioners]
        return replace(self, conditioners=tuple(conditioners))

    def init(self, key: Key[Array, ""]) -> tuple[dict, tuple]:
        """Fresh parameters, float32, and no extra. Widths alone decide their shapes, so the smallest image does."""
        size = (self.unet.stride, self.unet.stride)
        given = joined([conditioner.example(size) for conditioner in self.conditioners])
        plain = replace(self.unet.execution, sharding=ActivationSharding())  # one image cannot be split
        network = replace(self.unet, execution=plain).module()
        return network.init(key, jnp.zeros((1, *size, self.product.channels)), jnp.ones(1), given)["params"], ()

    def loss(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Array, tuple[dict, tuple]]:
        """The weighted squared error, averaged over the batch.

        `batch`: image (b h w c), in [-1, 1] where it is one of pixels, and what the conditioners read.
        """
        count = batch["image"].shape[0]
        keys = noise.sample_keys(key, jnp.arange(count))
        # Times are spread evenly over [0, 1] (VDM, arXiv 2107.00630, I.1): the same density, a loss of less variance.
        u = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
        t = self.time_sampler.times(jax.random.permutation(jax.random.fold_in(key, count), u), self.schedule)
        return self._losses(params, batch, t, keys).mean(), ({}, extra)

    def held_out_losses(
        self, params: dict, extra: tuple, frozen: tuple, batch: Mapping, numbers: Int[Array, " b"], key: Key[Array, ""]
    ) -> dict[str, tuple[Array, Array]]:
        """The training loss of examples that are not trained on, at eight noise levels, with all their text.

        Example i is evaluated at one time of the schedule, (i mod 8 + 1/2) / 8, with noise of its own that stays the
        same. `batch` as in `loss`; numbers (b): i of each example, or −1 for a row that is padding. Captions are not
        dropped; a low-resolution input is noised as in training. The loss at a time has the model's weighting; the time
        sampler has no part in it: the mean over all differs from the training loss where that samples other times.

        Returns the sum over the examples and their number: `held_out_loss` of all, `held_out_loss_t0.06` to
        `held_out_loss_t0.94` of those at each time.
        """
        example = jnp.maximum(numbers, 0)
        level = example % HELD_OUT_LEVELS
        t = self.schedule.entry_time((level + 0.5) / HELD_OUT_LEVELS)
        conditional = replace(self, conditioners=tuple(map(without_dropout, self.conditioners)))
        losses = conditional._losses(params, batch, t, noise.sample_keys(key, example))

        def over(counted: Array) -> tuple[Array, Array]:
            return jnp.where(counted, losses, 0.0).sum(), counted.astype(jnp.float32).sum()

        at_levels = {
            f"held_out_loss_t{(i + 0.5) / HELD_OUT_LEVELS:.2f}": over((numbers >= 0) & (level == i))
            for i in range(HELD_OUT_LEVELS)
        }
        return {"held_out_loss": over(numbers >= 0)} | at_levels

    def _losses(
        self, params: dict, batch: Mapping, t: Float[Array, " b"], keys: Key[Array, " b"]
    ) -> Float[Array, " b"]:
        """The loss of each example at its time, with noise from its key."""
        image = batch["image"].astype(jnp.float32)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = noise.normal_like(noise.fold(keys, 0), image.shape[1:])
        x = noised(image, eps, alpha, sigma)
        given = joined([conditioner.training(batch, keys, image.shape[1:3]) for conditioner in self.conditioners])
        output, gamma = self.split_output(self.predict(params, x, t, given))
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
        """The kernels in the type that the network computes in, which its layers would give them anyway."""
        dtype = self.unet.execution.dtype
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)

    def split_output(
        self, output: Float[Array, "b h w o"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"] | None]:
        """Of a network's output: what `prediction` says and, where it is learned, γ of the variance (`DDPM`)."""
        if not self.unet.learned_variance:
            return output, None
        output, variance = jnp.split(output, 2, axis=-1)
        return output, 0.5 * (variance + 1.0)

    def predict(
        self, params: dict, x: Float[Array, "b h w c"], t: Float[Array, " b"], given: Conditioning
    ) -> Float[Array, "b h w o"]:
        """The network's output at the noised images x and the times t."""
        time = self.schedule.network_time(t)
        output = cast(Array, self.unet.module().apply({"params": params}, x, time, given))
        if self.residual:
            assert self.low_res is not None  # see __post_init__
            output += self.low_res.kept(given)
        return output


def executed(model: DiffusionModel, **how: Any) -> DiffusionModel:
    """The same model, computed in another way: fields of `ExecutionConfig`."""
    execution = replace(model.unet.execution, **how)
    return replace(model, unet=replace(model.unet, execution=execution))


def check_size(model: DiffusionModel, *sides: int, name: str = "side") -> None:
    """ValueError where a side (`name` says of what) is not a multiple of the network's stride."""
    for side in sides:
        if side < 1 or side % model.unet.stride:
            raise ValueError(f"a {name} of {side} pixels is not a multiple of the network's stride {model.unet.stride}")


def check_crop(model: DiffusionModel, side: int) -> None:
    """ValueError where the model cannot be trained on crops of this side: one that the network does not take, or that
    is larger than its images."""
    check_size(model, side, name="crop")
    if side > model.side:
        raise ValueError(f"--crop {side}: larger than the images, {model.side}")
