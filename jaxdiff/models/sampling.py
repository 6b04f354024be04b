"""Sampling from a diffusion model: settings, the denoiser for samplers, and the model as a box of a pipeline.

One compiled program runs all steps. Numeric settings are traced, so that new values do not recompile: guidance weight
and interval, thresholding percentile and cap, augmentation level, strength and seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.core.products import EmbeddingSpec, ImageSpec, LatentSpec, ProductSpec
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Denoised, DenoisedWithVariance, denoised, from_x0
from jaxdiff.diffusion.samplers import DDPM, Sampler, integrate
from jaxdiff.diffusion.thresholding import DynamicThreshold, Thresholding
from jaxdiff.diffusion.time_grid import Spacing, TimeGrid, UniformTime, time_grid
from jaxdiff.models.conditioner import Branches, SampleInputs, joined
from jaxdiff.models.conditioners import HintConditioner, MaskConditioner, NullText
from jaxdiff.models.diffusion import DiffusionModel, check_size
from jaxdiff.models.hints import HintImage, check_hints, folded, traced, unfolded
from jaxdiff.models.start import InitProduct, begin, first_step
from jaxdiff.models.tiles import Tiles, in_tiles
from jaxdiff.nets.activation_sharding import check_rows
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.text.encoder import TextEmbedding


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings of a model.

    aug_level: noise level in [0, 1] of the low-resolution input of super-resolution.
    keep_eps: keep the network's ε after thresholding x₀ (diffusers' DDIM) instead of the ε implied by x₀.
    scaled_start: begin with σ ε, the noised image 0, instead of unit noise ε. The two differ if the schedule's last
    entry is not pure noise (diffusers' Euler samplers, with linspace and trailing spacing).
    clean_known: in inpainting, restore the known pixels without noise after each step (DeepFloyd IF) instead of noised
    to the step's level. A network that reads the mask restores them itself. fresh_start: in inpainting at strength 1,
    start from noise alone (Stable Diffusion) instead of from the initial product, of which the first step's noise
    leaves a trace.
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
    fresh_start: bool = False
    scaled_start: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 <= self.aug_level <= 1:
            raise ValueError(f"aug_level must lie in [0, 1], not {self.aug_level}")


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One batch of samples for a box of a pipeline to produce.

    keys: one per sample, for this box; sample i depends only on its own key and conditions. size: height and width of
    the product. text, negative: text of the conditional and unconditional branches (None: the null text).
    progress: called periodically with the number of steps done. hints: one for each ControlNet. given: conditions of
    the other conditioners, such as `label` or `semantic_map`, by the names of their entries in a training batch.
    """

    keys: Key[Array, " b"]
    size: tuple[int, int]
    text: TextEmbedding | None = None
    negative: TextEmbedding | None = None
    init: InitProduct | None = None
    progress: Callable[[int], None] | None = None
    hints: tuple[HintImage, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Denoiser:
    """A network with its guidance and thresholding, for samplers.

    A pytree: model, tiles and the two switches are static, everything else is traced. guided: evaluate the
    unconditional branch; if guidance has an interval, only inside it.
    """

    model: DiffusionModel = field(metadata={"static": True})
    tiles: Tiles | None = field(metadata={"static": True})
    guided: bool = field(metadata={"static": True})
    keep_eps: bool = field(metadata={"static": True})
    params: Any
    given: Branches
    guidance: Guidance
    thresholding: Thresholding

    def __call__(self, x: Float[Array, "b h w c"], point: TimeGrid) -> Denoised | DenoisedWithVariance:
        """x₀ and ε of samples noised at one grid point (scalars), and γ if the variance is learned."""
        model, guidance = self.model, self.guidance
        t = jnp.broadcast_to(point.t, x.shape[:1])
        predict = model.predict if self.tiles is None else partial(_predict_in_tiles, model, self.tiles)

        def guided():
            """Both branches in one doubled batch."""
            twice, times = jnp.concatenate([x, x]), jnp.concatenate([t, t])
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *self.given)
            (cond, gamma), (uncond, _) = map(model.split_output, jnp.split(predict(self.params, twice, times, both), 2))
            return guidance.apply(cond, uncond, point.logsnr), gamma

        def conditional():
            return model.split_output(predict(self.params, x, t, self.given.conditional))

        if not self.guided:
            output, gamma = conditional()
        elif guidance.interval is None:
            output, gamma = guided()
        else:
            output, gamma = jax.lax.cond(guidance.inside(point.logsnr).any(), guided, conditional)
        estimate = denoised(model.prediction, output, x, point.alpha, point.sigma)
        x0 = self.thresholding.apply(estimate.x0)
        eps = estimate.eps if self.keep_eps else from_x0(x0, x, point.alpha, point.sigma).eps
        return Denoised(x0, eps) if gamma is None else DenoisedWithVariance(x0, eps, gamma)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A diffusion model with parameters and sampling settings: a generator, or a decoder if it has a low-resolution
    input.

    text_fingerprint: that of its text encoder in training; None if unknown.
    """

    model: DiffusionModel
    params: dict
    sampling: SamplingConfig
    text_fingerprint: str | None = None

    @property
    def produces(self) -> ImageSpec | LatentSpec | EmbeddingSpec:
        product = self.model.product
        return replace(product, stride=self.model.unet.stride) if isinstance(product, ImageSpec) else product

    @property
    def consumes(self) -> ProductSpec | None:
        """The input product of a decoder; None for a generator."""
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
        """Length and width of the text embeddings (each None if unknown); None if the model reads no text."""
        return None if self.model.text is None else (self.model.text.length, self.model.text.width)

    @property
    def reads_padding(self) -> bool:
        """Whether it reads the text encoder's outputs for padding and for the empty caption."""
        text = self.model.text
        return text is not None and (text.null is NullText.EMPTY or self.model.unet.reads_padding)

    @property
    def reads_empty(self) -> bool:
        """Whether its unconditional branch reads the text encoder's outputs for the empty caption."""
        text = self.model.text
        return text is not None and text.null is not NullText.ZEROS

    @property
    def takes_init(self) -> bool:
        return True

    @property
    def reads_mask(self) -> bool:
        return any(isinstance(each, MaskConditioner) for each in self.model.conditioners)

    @property
    def reads_hints(self) -> HintConditioner | None:
        return next((each for each in self.model.conditioners if isinstance(each, HintConditioner)), None)

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(each.entry for each in self.model.representations)

    def batch_size(self, wanted: int) -> int:
        """`wanted` rounded up to a multiple of the number of devices over which batches are sharded."""
        return self.model.unet.execution.sharding.padded(wanted)

    def check(self, size: tuple[int, int]) -> None:
        """ValueError if the model cannot sample this size with its settings (tiles included)."""
        _check(self.model, self.sampling, size)

    def decode(self, product: Float[Array, "b h w c"] | None, request: SampleRequest) -> Float[Array, "b h2 w2 c2"]:
        """Sample (b, *size, c), clipped to [-1, 1] for images. product: the previous box's, as super-resolution input;
        None for a generator. ValueError as from `check`."""
        model, sampling, keys, size = self.model, self.sampling, request.keys, request.size
        self.check(size)
        inputs, init = _inputs(model, sampling, _checked(model, product, size), request), request.init
        branches = jax.tree.map(self._shard, _conditioned(model, size, keys, inputs))
        guided = model.guided and sampling.guidance.on
        guidance = sampling.guidance if guided else Guidance()
        switches = model, sampling.tiles, guided, sampling.keep_eps
        denoiser = Denoiser(*switches, self.params, branches, guidance, sampling.thresholding)
        points = _points(model.schedule, sampling.steps, sampling.spacing)
        x = noise.normal_like(noise.fold(keys, 0), (*size, model.product.channels))
        first, known = 0, None
        pure = points.sigma[0] * x if sampling.scaled_start else x
        if init is None:
            x = pure
        else:
            first = first_step(init.strength, sampling.steps)
            # A network that reads the mask keeps the known pixels itself.
            held = None if self.reads_mask else init.mask
            x, known = begin(sampling.clean_known, init.value, held, x, points, first)
            if sampling.fresh_start and init.mask is not None and first == 0:
                x = pure
        carry = jax.tree.map(self._shard, sampling.sampler.init(x))
        chunk = sampling.steps if request.progress is None else CHUNK
        for start in range(first, sampling.steps, chunk):
            stop = min(start + chunk, sampling.steps)
            carry = _integrate(sampling.sampler, denoiser, carry, points, noise.fold(keys, 1), start, stop, known)
            carry = jax.tree.map(self._shard, carry)
            if request.progress is not None:
                jax.block_until_ready(carry)
                request.progress(stop)
        samples = sampling.sampler.image(carry)
        if known is not None:
            samples = known.finished(samples)
        return jnp.clip(samples, -1.0, 1.0) if isinstance(model.product, ImageSpec) else samples

    generate = partialmethod(decode, None)

    def _shard(self, leaf: Array) -> Array:
        """Shard feature maps alike before and after a program, which would otherwise be compiled for both shardings."""
        return self.model.unet.execution.sharding.images(leaf) if leaf.ndim == 4 else leaf


CHUNK = 4
"""Steps between two progress reports."""

_integrate = jax.jit(integrate, static_argnums=0, donate_argnums=2)
_points = jax.jit(time_grid, static_argnums=(0, 1, 2))


def mean(models: Sequence[TrainedModel]) -> TrainedModel:
    """The first model with the mean of all parameters: stochastic weight averaging (arXiv 1803.05407).

    Average the final models of successive runs, each started from the previous one. The mean of models with different
    initializations is not useful.

    Raises ValueError if networks, predictions or text encoders differ.
    """
    first, *others = models
    for other in others:
        for part in ("unet", "prediction", "residual"):
            if getattr(other.model, part) != getattr(first.model, part):
                raise ValueError(f"cannot average models whose {part} differs")
    known = sorted({model.text_fingerprint for model in models if model.text_fingerprint is not None})
    if len(known) > 1:
        raise ValueError(f"cannot average models trained with the text encoders {' and '.join(known)}")
    params = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *(model.params for model in models))
    return replace(first, params=params, text_fingerprint=known[0] if known else None)


@partial(jax.jit, static_argnums=(0, 1))
def _conditioned(model: DiffusionModel, size: tuple[int, int], keys: Array, inputs: SampleInputs) -> Branches:
    """The network's conditioning in both branches."""
    branches = [conditioner.sampling(inputs, keys, size) for conditioner in model.conditioners]
    return Branches(*(joined(list(conditionings)) for conditionings in zip(*branches)))


def _inputs(
    model: DiffusionModel, sampling: SamplingConfig, low_res: Array | None, request: SampleRequest
) -> SampleInputs:
    """The conditions of a request. ValueError unless its hints and given conditions suit the model."""
    init, count = request.init, len(request.keys)
    reads = next((each for each in model.conditioners if isinstance(each, HintConditioner)), None)
    check_hints(reads, request.hints, request.size, count, f"the {model.side} stage")
    mask, masked = (None, None) if init is None else (init.mask, init.masked)
    check_given(model, request.given, request.size, count)
    given = {name: jnp.asarray(value) for name, value in request.given.items()}
    inputs = SampleInputs(request.text, request.negative, low_res, sampling.aug_level, mask, masked, given=given)
    if not request.hints:
        return inputs
    times = _points(model.schedule, sampling.steps, sampling.spacing).t
    run = times if init is None else times[first_step(init.strength, sampling.steps) :]
    guess = tuple(hint.guess for hint in request.hints)
    return replace(inputs, hints=traced(request.hints, count, run), guess=guess)


def check_given(model: DiffusionModel, given: Mapping[str, Any], size: tuple[int, int], count: int) -> None:
    """ValueError unless these are conditions that the model reads, for `count` samples of this size."""
    readers = {each.entry: each for each in model.representations}
    for name, value in given.items():
        if name not in readers:
            known = ", ".join(readers) or "none"
            raise ValueError(f"{name} is given, and the {model.side} stage does not read it: it reads {known}")
        readers[name].check(value, count, size)


def _predict_in_tiles(
    model: DiffusionModel, tiles: Tiles, params: Any, x: Array, t: Array, conditioning: Conditioning
) -> Array:
    hints, size = conditioning.hints or (), x.shape[1:3]
    beside = () if conditioning.concat is None else (conditioning.concat,)
    images = x, *(folded(hint.image, (size[0], size[1])) for hint in hints), *beside

    def network(x: Array, *rest: Array) -> Array:
        cut = [hint._replace(image=unfolded(b, hint.image.shape[-1])) for hint, b in zip(hints, rest)]
        concat = rest[len(hints)] if beside else None
        given = conditioning._replace(concat=concat, hints=tuple(cut) if hints else None)
        return model.predict(params, x, t, given)

    return cast(Array, in_tiles(network, images, tiles))


def _checked(model: DiffusionModel, low_res: Array | None, size: tuple[int, int]) -> Array | None:
    """The input of super-resolution; ValueError if it is missing or has another size."""
    if model.low_res is None:
        return None
    if low_res is None or tuple(side * model.factor for side in low_res.shape[1:3]) != tuple(size):
        have = "none" if low_res is None else "×".join(map(str, low_res.shape[1:3]))
        raise ValueError(
            f"sampling {size[0]}×{size[1]} needs a low-resolution input 1/{model.factor} of it, not {have}"
        )
    return low_res


def _check(model: DiffusionModel, sampling: SamplingConfig, size: tuple[int, int]) -> None:
    check_size(model, *size)
    height = size[0] if sampling.tiles is None else sampling.tiles.side
    check_rows(height // model.unet.stride, model.unet.execution.sharding.sizes()[1])
    jax.eval_shape(lambda: time_grid(model.schedule, sampling.steps, sampling.spacing))
    if sampling.sampler == DDPM(None) and not model.unet.learned_variance:
        raise ValueError(f"the {model.side} stage has no learned variance, so its DDPM needs a gamma")
    if sampling.tiles is not None:
        if model.unet.coordinates:
            raise ValueError("this stage's network reads coordinates, so it cannot sample in tiles: leave out tiles")
        check_size(model, sampling.tiles.side, name="tile")
        check_size(model, sampling.tiles.overlap, name="tile overlap")
    if model.low_res is not None and model.low_res.augmentation is None and sampling.aug_level:
        raise ValueError(f"the {model.side} stage reads its low-resolution input without noise: leave out aug_level")
    if model.low_res is not None and sampling.aug_level > model.low_res.max_level:
        raise ValueError(
            f"aug_level {sampling.aug_level} is above {model.low_res.max_level}, the highest that the {model.side} "
            "stage was trained with"
        )
