"""How a diffusion model samples: its settings, the denoiser that samplers see, and the box that it is in a pipeline.

One compiled program runs the steps. Numbers that only scale are traced, so that they compile nothing anew: the guidance
weight and its interval, thresholding's percentile and cap, the noise on a low-resolution input, strength and seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.core.products import ImageSpec, LatentSpec, ProductSpec
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Denoised, DenoisedWithVariance, denoised, from_x0, noised
from jaxdiff.diffusion.samplers import DDPM, Sampler, integrate
from jaxdiff.diffusion.thresholding import DynamicThreshold, Thresholding
from jaxdiff.diffusion.time_grid import Spacing, TimeGrid, UniformTime, time_grid
from jaxdiff.models.conditioners import Branches, NullText, SampleInputs, joined
from jaxdiff.models.diffusion import DiffusionModel, check_size
from jaxdiff.models.tiles import Tiles, in_tiles
from jaxdiff.nets.activation_sharding import check_rows
from jaxdiff.nets.conditioning import Conditioning, WholeText
from jaxdiff.text.encoder import TextEmbedding


@dataclass(frozen=True)
class SamplingConfig:
    """How a model samples. `aug_level` in [0, 1] is the noise put on the low-resolution input of super-resolution.

    keep_eps: after thresholding x₀, ε stays the network's own, as in diffusers' DDIM, instead of that which x₀ implies.
    clean_known: what a mask keeps is put back as it is after each step, as in DeepFloyd IF, instead of noised to the
    step's level.
    """

    sampler: Sampler = DDPM()
    steps: int = 256
    spacing: Spacing = UniformTime()
    guidance: Guidance = Guidance()
    thresholding: Thresholding = DynamicThreshold()
    aug_level: float = 0.0
    tiles: Tiles | None = None
    keep_eps: bool = False
    clean_known: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 <= self.aug_level <= 1:
            raise ValueError(f"aug_level must lie in [0, 1], not {self.aug_level}")


@dataclass(frozen=True, eq=False)
class InitProduct:
    """What sampling begins with (image to image) and, with a mask, keeps in part (inpainting).

    value: (b h w c), of what the box produces and of the size asked for. strength in (0, 1]: the fraction of the steps
    that are taken, from the value noised to where they begin. mask: (b h w 1), 1 where is sampled and 0 where the value
    is kept.
    """

    value: Float[Array, "b h w c"]
    strength: float = 1.0
    mask: Float[Array, "b h w 1"] | None = None


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One batch that a box of a pipeline is asked for.

    keys: the samples' own, for this box; sample i depends on nothing but its own key and conditions. size: height and
    width of what is produced. text, negative: what is read, and what guidance leads away from (None: the null text).
    progress: told how many steps are done, from time to time.
    """

    keys: Key[Array, " b"]
    size: tuple[int, int]
    text: TextEmbedding | None = None
    negative: TextEmbedding | None = None
    init: InitProduct | None = None
    progress: Callable[[int], None] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Denoiser:
    """A network with its guidance and thresholding: what samplers see.

    A pytree: model, tiles and the two switches are static, everything else is traced. guided: whether the second branch
    is evaluated; where guidance has an interval, only inside it.
    """

    model: DiffusionModel = field(metadata={"static": True})
    tiles: Tiles | None = field(metadata={"static": True})
    guided: bool = field(metadata={"static": True})
    keep_eps: bool = field(metadata={"static": True})
    params: Any
    given: Branches
    guidance: Guidance
    thresholding: Thresholding

    def __call__(self, x: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Denoised | DenoisedWithVariance:
        """x₀ and ε of noised samples, and γ where the variance is learned."""
        model, guidance, logsnr = self.model, self.guidance, self.model.schedule.logsnr(t)
        predict = model.predict if self.tiles is None else partial(_predict_in_tiles, model, self.tiles)

        def guide():
            """Both branches in one doubled batch."""
            twice, times = jnp.concatenate([x, x]), jnp.concatenate([t, t])
            given = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *self.given)
            (cond, gamma), (uncond, _) = map(
                model.split_output, jnp.split(predict(self.params, twice, times, given), 2)
            )
            return guidance.apply(cond, uncond, logsnr), gamma

        def follow():
            return model.split_output(predict(self.params, x, t, self.given.conditional))

        if not self.guided:
            output, gamma = follow()
        elif guidance.interval is None:
            output, gamma = guide()
        else:
            output, gamma = jax.lax.cond(guidance.inside(logsnr).any(), guide, follow)
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        estimate = denoised(model.prediction, output, x, alpha, sigma)
        x0 = self.thresholding.apply(estimate.x0)
        eps = estimate.eps if self.keep_eps else from_x0(x0, x, alpha, sigma).eps
        return Denoised(x0, eps) if gamma is None else DenoisedWithVariance(x0, eps, gamma)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A diffusion model, its parameters, and how it samples: a generator, or with a low-resolution input a decoder.

    text_fingerprint: of the text encoder that it was trained with, where that is known.
    """

    model: DiffusionModel
    params: dict
    sampling: SamplingConfig
    text_fingerprint: str | None = None

    @property
    def produces(self) -> ImageSpec | LatentSpec:
        product = self.model.product
        return replace(product, stride=self.model.unet.stride) if isinstance(product, ImageSpec) else product

    @property
    def consumes(self) -> ProductSpec | None:
        """What a decoder decodes; None for a generator."""
        return None if self.model.low_res is None else ImageSpec(self.model.low_res.channels)

    @property
    def side(self) -> int:
        return self.model.side

    @property
    def factor(self) -> int:
        return self.model.factor

    @property
    def steps(self) -> int:
        return self.sampling.steps

    @property
    def reads(self) -> tuple[int | None, int | None] | None:
        """Length and width of the text embeddings that it reads, where they are known; None where it reads none."""
        return None if self.model.text is None else (self.model.text.length, self.model.text.width)

    @property
    def reads_padding(self) -> bool:
        """Whether it reads what the text encoder gives for padding and for the empty caption."""
        text = self.model.text
        return text is not None and (
            text.null is NullText.EMPTY or isinstance(self.model.unet.conditioning.text, WholeText)
        )

    def batch_size(self, wanted: int) -> int:
        """The smallest multiple of the devices that batches are split over, from `wanted` on."""
        batch_devices, _ = self.model.unet.execution.sharding.sizes()
        return -(-wanted // batch_devices) * batch_devices

    def check(self, size: tuple[int, int]) -> None:
        """ValueError where it cannot sample this size, not in tiles or not in these, or not with these settings."""
        _check(self.model, self.sampling, size)

    def decode(self, product: Float[Array, "b h w c"] | None, request: SampleRequest) -> Float[Array, "b h2 w2 c2"]:
        """Samples (b, *size, c), clipped to [-1, 1] where they are images, from a product of the box before, which
        super-resolution enlarges; a generator has none. ValueError as from `check`."""
        model, sampling, keys, size = self.model, self.sampling, request.keys, request.size
        self.check(size)
        inputs = SampleInputs(request.text, request.negative, _checked(model, product, size), sampling.aug_level)
        given = jax.tree.map(self._split, _conditioned(model, size, keys, inputs))
        guided = model.text is not None and sampling.guidance.on  # else both branches would be the same
        guidance = sampling.guidance if guided else Guidance()
        switches = model, sampling.tiles, guided, sampling.keep_eps
        denoiser = Denoiser(*switches, self.params, given, guidance, sampling.thresholding)
        points = _points(model.schedule, sampling.steps, sampling.spacing)
        x = noise.normal_like(noise.fold(keys, 0), (*size, model.product.channels))
        first, known = 0, None
        if request.init is not None:
            first = first_step(request.init.strength, sampling.steps)
            x, known = _begin(sampling.clean_known, request.init.value, request.init.mask, x, points, first)
        carry = jax.tree.map(self._split, sampling.sampler.init(x))
        chunk = sampling.steps if request.progress is None else CHUNK
        for start in range(first, sampling.steps, chunk):
            stop = min(start + chunk, sampling.steps)
            carry = _integrate(sampling.sampler, denoiser, carry, points, noise.fold(keys, 1), start, stop, known)
            carry = jax.tree.map(self._split, carry)
            if request.progress is not None:
                jax.block_until_ready(carry)
                request.progress(stop)
        samples = sampling.sampler.image(carry)
        return jnp.clip(samples, -1.0, 1.0) if isinstance(model.product, ImageSpec) else samples

    generate = partialmethod(decode, None)

    def _split(self, leaf: Array) -> Array:
        """Feature maps lie over the mesh before and after a program alike, which else would be compiled for both."""
        return self.model.unet.execution.sharding.images(leaf) if leaf.ndim == 4 else leaf


CHUNK = 4
"""Steps that run between two reports of progress."""

_integrate = jax.jit(integrate, static_argnums=0, donate_argnums=2)
_points = jax.jit(time_grid, static_argnums=(0, 1, 2))


def mean(models: Sequence[TrainedModel]) -> TrainedModel:
    """The first model with the mean of all parameters: stochastic weight averaging (arXiv 1803.05407).

    For the ends of successive runs, each begun with the parameters of the one before: each lies somewhere on the edge
    of what suits the data, their mean nearer its middle. Models that began apart have no useful mean.

    Raises ValueError where networks, predictions or text encoders differ.
    """
    first, *others = models
    for other in others:
        for part in ("unet", "prediction", "residual"):
            if getattr(other.model, part) != getattr(first.model, part):
                raise ValueError(f"models whose {part} differs have no mean")
    known = sorted({model.text_fingerprint for model in models if model.text_fingerprint is not None})
    if len(known) > 1:
        raise ValueError(f"models trained with the text encoders {' and '.join(known)} have no mean")
    params = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *(model.params for model in models))
    return replace(first, params=params, text_fingerprint=known[0] if known else None)


def first_step(strength: float, steps: int) -> int:
    """The first of the steps that are taken at this strength. ValueError where it would be none of them."""
    taken = int(steps * strength) if 0.0 < strength <= 1.0 else 0
    if taken < 1:
        raise ValueError(f"strength {strength} leaves no step of {steps} to draw, or lies above 1")
    return steps - taken


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Known:
    """The part that a mask keeps, put back into the state after each step; its noise is the same at every step."""

    clean: bool = field(metadata={"static": True})
    value: Array
    mask: Array
    eps: Array

    def __call__(self, x: Array, point: TimeGrid) -> Array:
        value = self.value if self.clean else noised(self.value, self.eps, point.alpha, point.sigma)
        return self.mask * x + (1.0 - self.mask) * value


@partial(jax.jit, static_argnums=0)
def _begin(
    clean: bool, value: Array, mask: Array | None, eps: Array, points: TimeGrid, first: Array
) -> tuple[Array, _Known | None]:
    """The value noised to the level where sampling begins, and what is kept of it."""
    point = TimeGrid(*(values[first] for values in points))
    x = noised(value, eps, point.alpha, point.sigma)
    if mask is None:
        return x, None
    known = _Known(clean, value, mask, eps)
    return known(x, point), known


@partial(jax.jit, static_argnums=(0, 1))
def _conditioned(model: DiffusionModel, size: tuple[int, int], keys: Array, inputs: SampleInputs) -> Branches:
    """What the network sees in both branches."""
    branches = [conditioner.sampling(inputs, keys, size) for conditioner in model.conditioners]
    return Branches(*(joined(list(conditionings)) for conditionings in zip(*branches)))


def _predict_in_tiles(
    model: DiffusionModel, tiles: Tiles, params: Any, x: Array, t: Array, given: Conditioning
) -> Array:
    images = (x,) if given.concat is None else (x, given.concat)

    def network(x: Array, *concat: Array) -> Array:
        return model.predict(params, x, t, given._replace(concat=concat[0] if concat else None))

    return cast(Array, in_tiles(network, images, tiles))


def _checked(model: DiffusionModel, low_res: Array | None, size: tuple[int, int]) -> Array | None:
    """The input of super-resolution; ValueError where it is missing or of another size."""
    if model.low_res is None:
        return None
    if low_res is None or tuple(side * model.factor for side in low_res.shape[1:3]) != tuple(size):
        have = "none" if low_res is None else "×".join(map(str, low_res.shape[1:3]))
        raise ValueError(f"drawing {size[0]}×{size[1]} needs a low-resolution input 1/{model.factor} of it, not {have}")
    return low_res


def _check(model: DiffusionModel, sampling: SamplingConfig, size: tuple[int, int]) -> None:
    check_size(model, *size)
    height = size[0] if sampling.tiles is None else sampling.tiles.side
    check_rows(height // model.unet.stride, model.unet.execution.sharding.sizes()[1])
    jax.eval_shape(lambda: time_grid(model.schedule, sampling.steps, sampling.spacing))
    if sampling.sampler == DDPM(None) and not model.unet.learned_variance:
        raise ValueError(f"the {model.side} stage has learned no variance, so its DDPM needs a gamma")
    if sampling.tiles is not None:
        if model.unet.coordinates:
            raise ValueError("this stage's network reads coordinates, so it cannot draw in tiles: leave out tiles")
        check_size(model, sampling.tiles.side, name="tile")
        check_size(model, sampling.tiles.overlap, name="tile overlap")
    if model.low_res is not None and sampling.aug_level > model.low_res.max_level:
        raise ValueError(
            f"aug_level {sampling.aug_level} is above {model.low_res.max_level}, the highest that the {model.side} "
            "stage was trained with"
        )
