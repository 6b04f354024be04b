"""How a stage of Imagen draws: `SamplingConfig`, what it may begin with, and `draw`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Denoised, DenoisedWithVariance, denoised, from_x0, noised
from jaxdiff.diffusion.samplers import DDPM, Sampler, integrate
from jaxdiff.diffusion.thresholding import DynamicThreshold, Thresholding
from jaxdiff.diffusion.time_grid import Spacing, TimeGrid, UniformTime, time_grid
from jaxdiff.models.diffusion import DiffusionModel, check_size, low_res_input
from jaxdiff.models.tiles import Tiles, in_tiles
from jaxdiff.text.encoder import TextEmbedding


@dataclass(frozen=True)
class SamplingConfig:
    """How a stage draws. `aug_level` in [0, 1] is the noise put on the low-resolution input of super-resolution.

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
class Given:
    """A picture to begin with (image to image) and, with a mask, to keep in part (inpainting).

    image: (b h w 3) in [-1, 1], of the size that is drawn. strength in (0, 1]: the share of the steps that are drawn,
    from the picture noised to where they begin. mask: (b h w 1), 1 where is drawn and 0 where the picture is kept.
    """

    image: Float[Array, "b h w 3"]
    strength: float = 1.0
    mask: Float[Array, "b h w 1"] | None = None


def first_step(strength: float, steps: int) -> int:
    """The first of the steps that are drawn at this strength. ValueError where it would be none of them."""
    drawn = int(steps * strength) if 0.0 < strength <= 1.0 else 0
    if drawn < 1:
        raise ValueError(f"strength {strength} leaves no step of {steps} to draw, or lies above 1")
    return steps - drawn


def draw(
    stage: DiffusionModel,
    params: dict,
    sampling: SamplingConfig,
    text: TextEmbedding,
    negative: TextEmbedding,
    keys: Key[Array, " b"],
    size: tuple[int, int],
    low_res: Float[Array, "b lower_h lower_w c"] | None = None,
    progress: Callable[[int], None] | None = None,
    chunk: int = 4,
    given: Given | None = None,
    weights: Float[Array, " b"] | None = None,
) -> Float[Array, "b h w c"]:
    """Pictures (b, *size, 3) in [-1, 1] from text, and from the low-resolution pictures of a super-resolution stage.

    `negative` is what guidance leads away from: the null text, or a negative prompt. `keys` are the samples' own;
    picture i depends on nothing but its own key, text and input. `given`: a picture to begin with. With `progress`, the
    host runs the compiled program `chunk` steps at a time and reports how many are done; the pictures are the same.
    `weights`: guidance weights of the samples, in place of the one of `sampling`: one program draws with all of them.
    """
    check(stage, sampling, size)
    if not stage.unet.reads_text:  # both branches of guidance would be the same
        sampling, weights = replace(sampling, guidance=Guidance()), None
    first = 0 if given is None else first_step(given.strength, sampling.steps)
    known = () if given is None or given.mask is None else (given.image, given.mask)
    text, negative = (TextEmbedding(read.tokens, read.mask) for read in (text, negative))  # what the network reads
    condition = _Condition(text, negative, _prepare_low_res(stage, sampling, low_res, keys, size), known, weights)
    x = noise.normal_like(noise.fold(keys, 0), (*size, 3))
    if given is not None:
        x = _begin(stage, sampling, given.image, x, known, first)
    carry = _split(stage, sampling.sampler.init(x))
    if progress is None:
        chunk = sampling.steps
    for start in range(first, sampling.steps, chunk):
        stop = min(start + chunk, sampling.steps)
        carry = _advance(stage, sampling, params, carry, condition, keys, start, stop)
        if progress is not None:
            jax.block_until_ready(carry)
            progress(stop)
    return jnp.clip(sampling.sampler.image(carry), -1.0, 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Condition:
    """What the network is given beside the noised picture."""

    text: TextEmbedding
    negative: TextEmbedding
    low_res: tuple
    known: tuple = ()
    weights: Array | None = None


@partial(jax.jit, static_argnums=(0, 1))
def _begin(stage, sampling, image, eps, known, first):
    """The given picture, noised to the level where drawing begins."""
    point = TimeGrid(*(values[first] for values in time_grid(stage.schedule, sampling.steps, sampling.spacing)))
    x = noised(image, eps, point.alpha, point.sigma)
    return _kept(sampling, known, eps, x, point) if known else x


def _kept(sampling, known, eps, x, point):
    """x with the known part of the picture in it; its noise is the same at every step."""
    image, mask = known
    if not sampling.clean_known:
        image = noised(image, eps, point.alpha, point.sigma)
    return mask * x + (1.0 - mask) * image


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _advance(stage, sampling, params, carry, condition, keys, start, stop):
    """Steps start…stop−1, one program whatever the two are."""
    denoise = partial(_denoise, stage, sampling, params, condition)
    points = time_grid(stage.schedule, sampling.steps, sampling.spacing)
    keep = None
    if condition.known:
        eps = noise.normal_like(noise.fold(keys, 0), condition.known[0].shape[1:])
        keep = partial(_kept, sampling, condition.known, eps)
    return _split(stage, integrate(sampling.sampler, denoise, carry, points, noise.fold(keys, 1), start, stop, keep))


def _split(stage: DiffusionModel, carry: Any) -> Any:
    """The sampler's state over the mesh, before and after a program alike, which else would be compiled for both."""
    return jax.tree.map(lambda leaf: stage.unet.axes.images(leaf) if leaf.ndim == 4 else leaf, carry)


def _denoise(stage: DiffusionModel, sampling: SamplingConfig, params: dict, condition: _Condition, x: Array, t: Array):
    """The network with guidance and thresholding around it."""
    guidance, logsnr = sampling.guidance, stage.schedule.logsnr(t)
    predict = partial(_predict, stage, sampling.tiles, params)

    def conditional():
        return stage.parts(predict(condition.text, x, t, *condition.low_res))

    def guided():
        """Both branches in one doubled batch."""
        inputs = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, t, *condition.low_res))
        text = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition.text, condition.negative)
        (cond, gamma), (uncond, _) = map(stage.parts, jnp.split(predict(text, *inputs), 2))
        return guidance.apply(cond, uncond, logsnr, condition.weights), gamma

    if not guidance.on and condition.weights is None:
        output, gamma = conditional()
    elif guidance.interval is None:
        output, gamma = guided()
    else:
        output, gamma = jax.lax.cond(guidance.inside(logsnr).any(), guided, conditional)
    alpha, sigma = stage.schedule.alpha(t), stage.schedule.sigma(t)
    found = denoised(stage.prediction, output, x, alpha, sigma)
    x0 = sampling.thresholding.apply(found.x0)
    eps = found.eps if sampling.keep_eps else from_x0(x0, x, alpha, sigma).eps
    return Denoised(x0, eps) if gamma is None else DenoisedWithVariance(x0, eps, gamma)


def _predict(stage: DiffusionModel, tiles: Tiles | None, params: dict, text: TextEmbedding, x, t, *low_res) -> Array:
    """The stage's prediction, of the whole picture or tile by tile."""
    pictures, levels = (x, *low_res[:1]), low_res[1:]

    def network(x, *low_res):
        return stage.predict(params, x, t, text, *low_res, *levels)

    return network(*pictures) if tiles is None else in_tiles(network, pictures, tiles)


@partial(jax.jit, static_argnums=(0, 1, 4))
def _noise_low_res(stage, sampling, low_res, keys, size):
    level = jnp.full(low_res.shape[0], sampling.aug_level, jnp.float32)
    seen, level = low_res_input(stage, low_res, level, noise.fold(keys, 2), size)
    return stage.unet.axes.images(seen), level


def _prepare_low_res(stage, sampling, low_res, keys, size) -> tuple:
    if not stage.unet.low_res:
        return ()
    if low_res is None or tuple(side * stage.factor for side in low_res.shape[1:3]) != tuple(size):
        have = "none" if low_res is None else "×".join(map(str, low_res.shape[1:3]))
        raise ValueError(f"drawing {size[0]}×{size[1]} needs a low-resolution input 1/{stage.factor} of it, not {have}")
    return _noise_low_res(stage, sampling, low_res, keys, size)


def check(stage: DiffusionModel, sampling: SamplingConfig, size: tuple[int, int]) -> None:
    """ValueError where the stage cannot draw this size, not in tiles or not in these, or not with these settings, or
    where the rows of its smallest maps do not divide over the devices that share a picture."""
    check_size(stage, *size)
    height = size[0] if sampling.tiles is None else sampling.tiles.side
    rows, (_, devices) = height // stage.unet.stride, stage.unet.axes.sizes()
    if rows % devices:
        raise ValueError(
            f"{height} pixels are {rows} rows in the smallest maps of the {stage.resolution} stage: {devices} devices "
            "cannot share them"
        )
    jax.eval_shape(lambda: time_grid(stage.schedule, sampling.steps, sampling.spacing))
    if sampling.sampler == DDPM(None) and not stage.unet.learned_variance:
        raise ValueError(f"the {stage.resolution} stage has learned no variance, so its DDPM needs a gamma")
    if sampling.tiles is not None:
        if stage.unet.coordinates:
            raise ValueError("this stage's network reads coordinates, so it cannot draw in tiles: leave out tiles")
        check_size(stage, sampling.tiles.side, name="tile")
        check_size(stage, sampling.tiles.overlap, name="tile overlap")
    if stage.unet.low_res and sampling.aug_level > stage.max_aug_level:
        raise ValueError(
            f"aug_level {sampling.aug_level} is above {stage.max_aug_level}, the highest that the {stage.resolution} "
            "stage was trained with"
        )
