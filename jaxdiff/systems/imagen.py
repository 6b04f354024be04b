"""Imagen (arXiv 2205.11487): one stage of the cascade, trained on its own.

A stage is a diffusion model of pictures: the base draws 64×64 from text, a super-resolution stage enlarges fourfold,
from the low-resolution picture and, where it has one, the text. Joining stages is `systems/cascade.py`; the paper's
settings and the tiny ones are `systems/imagen_presets.py`.
"""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.augmentation import augment
from jaxdiff.diffusion.grids import Grid, Spacing, UniformTime, grid
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.losses import Simple, Weighting, diffusion_loss, variance_loss
from jaxdiff.diffusion.parameterization import Denoised, DenoisedWithVariance, Prediction, denoised, from_x0, noised
from jaxdiff.diffusion.samplers import DDPM, Sampler, integrate
from jaxdiff.diffusion.schedules import Cosine, Discrete, Schedule
from jaxdiff.diffusion.thresholding import Dynamic, Thresholding
from jaxdiff.nets.unet import UNetConfig
from jaxdiff.systems.tiles import Tiles, in_tiles
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
class Stage:
    """Settings of one stage. `low_resolution` makes it a super-resolution stage.

    resolution: sides of the pictures that it is trained for, in pixels; sampling takes any multiple of the stride.
    schedule, prediction, weighting: the diffusion process; Imagen's are cosine, ε and the plain squared error.
    augmentation: schedule of the noise on the low-resolution input, whose time is the level (2.4). max_aug_level: the
    highest level in training, where levels are uniform from 0. enlargement: how that input is enlarged, and when.
    residual: the network says what to add to the enlarged input (x₀ prediction only): flat areas come out exact.
    text_length: tokens per caption. text_dropout: share of captions replaced by the null text.
    """

    unet: UNetConfig = UNetConfig()
    resolution: int = 64
    low_resolution: int | None = None
    schedule: Schedule = Cosine()
    prediction: Prediction = Prediction.EPSILON
    weighting: Weighting = Simple()
    augmentation: Schedule = Cosine()
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
        if self.unet.learned_variance and not isinstance(self.schedule, Discrete):
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
        return self.unet.module().init(key, x, ones, text.embeddings, text.mask, *low_res)["params"]

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
        t = self.schedule.sample_time(jax.random.permutation(jax.random.fold_in(key, count), u))
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = noise.normal_like(noise.fold(keys, 0), image.shape[1:])
        x = noised(image, eps, alpha, sigma)
        text = self._dropped_text(batch, keys)
        low_res = self._augmented(batch, image.shape, keys)
        output, gamma = self.parts(self.predict(params, x, t, text, *low_res))
        losses = diffusion_loss(output, self.prediction, image, eps, alpha, sigma, self.weighting)
        if gamma is not None:
            x0 = jax.lax.stop_gradient(denoised(self.prediction, output, x, alpha, sigma).x0)
            losses += variance_loss(self.schedule, gamma, image, x0, x, t)
        return losses.mean(), {}

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
        position = self.schedule.position(t)
        output = self.unet.module().apply({"params": params}, x, position, text.embeddings, text.mask, *given)
        if self.residual:
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


@dataclass(frozen=True)
class Sampling:
    """How a stage draws. `aug_level` in [0, 1] is the noise put on the low-resolution input of super-resolution.

    keep_eps: after thresholding x₀, ε stays the network's own, as in diffusers' DDIM, instead of that which x₀ implies.
    clean_known: what a mask keeps is put back as it is after each step, as in DeepFloyd IF, instead of noised to the
    step's level.
    """

    sampler: Sampler = DDPM()
    steps: int = 256
    spacing: Spacing = UniformTime()
    guidance: Guidance = Guidance()
    thresholding: Thresholding = Dynamic()
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
    stage: Stage,
    params: dict,
    sampling: Sampling,
    text: TextEmbedding,
    negative: TextEmbedding,
    keys: Key[Array, " b"],
    size: tuple[int, int],
    low_res: Float[Array, "b lower_h lower_w c"] | None = None,
    progress: Callable[[int], None] | None = None,
    chunk: int = 4,
    given: Given | None = None,
) -> Float[Array, "b h w c"]:
    """Pictures (b, *size, 3) in [-1, 1] from text, and from the low-resolution pictures of a super-resolution stage.

    `negative` is what guidance leads away from: the null text, or a negative prompt. `keys` are the samples' own;
    picture i depends on nothing but its own key, text and input. `given`: a picture to begin with. With `progress`, the
    host runs the compiled program `chunk` steps at a time and reports how many are done; the pictures are the same.
    """
    check(stage, sampling, size)
    if not stage.unet.reads_text:  # both branches of guidance would be the same
        sampling = replace(sampling, guidance=Guidance())
    first = 0 if given is None else first_step(given.strength, sampling.steps)
    known = () if given is None or given.mask is None else (given.image, given.mask)
    condition = _Condition(text, negative, _prepare_low_res(stage, sampling, low_res, keys, size), known)
    x = noise.normal_like(noise.fold(keys, 0), (*size, 3))
    if given is not None:
        x = _begin(stage, sampling, given.image, x, known, first)
    carry = sampling.sampler.init(x)
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


@partial(jax.jit, static_argnums=(0, 1))
def _begin(stage, sampling, image, eps, known, first):
    """The given picture, noised to the level where drawing begins."""
    point = Grid(*(values[first] for values in grid(stage.schedule, sampling.steps, sampling.spacing)))
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
    points = grid(stage.schedule, sampling.steps, sampling.spacing)
    keep = None
    if condition.known:
        eps = noise.normal_like(noise.fold(keys, 0), condition.known[0].shape[1:])
        keep = partial(_kept, sampling, condition.known, eps)
    return integrate(sampling.sampler, denoise, carry, points, noise.fold(keys, 1), start, stop, keep)


def _denoise(stage: Stage, sampling: Sampling, params: dict, condition: _Condition, x: Array, t: Array):
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
        return guidance.apply(cond, uncond, logsnr), gamma

    if not guidance.on:
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


def _predict(stage: Stage, tiles: Tiles | None, params: dict, text: TextEmbedding, x, t, *low_res) -> Array:
    """The stage's prediction, of the whole picture or tile by tile."""
    pictures, levels = (x, *low_res[:1]), low_res[1:]

    def network(x, *low_res):
        return stage.predict(params, x, t, text, *low_res, *levels)

    return network(*pictures) if tiles is None else in_tiles(network, pictures, tiles)


@partial(jax.jit, static_argnums=(0, 1, 4))
def _noise_low_res(stage, sampling, low_res, keys, size):
    level = jnp.full(low_res.shape[0], sampling.aug_level, jnp.float32)
    return low_res_input(stage, low_res, level, noise.fold(keys, 2), size)


def low_res_input(
    stage: Stage,
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
    return seen, schedule.position(schedule.level_time(level)) / 1000.0


def _prepare_low_res(stage, sampling, low_res, keys, size) -> tuple:
    if not stage.unet.low_res:
        return ()
    if low_res is None or tuple(side * stage.factor for side in low_res.shape[1:3]) != tuple(size):
        have = "none" if low_res is None else "×".join(map(str, low_res.shape[1:3]))
        raise ValueError(f"drawing {size[0]}×{size[1]} needs a low-resolution input 1/{stage.factor} of it, not {have}")
    return _noise_low_res(stage, sampling, low_res, keys, size)


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


def null_text(stage: Stage, count: int) -> TextEmbedding:
    """Zeros, all of it masked: NullText.ZEROS, and what a stage is given that reads no text."""
    shape = (count, stage.text_length)
    return TextEmbedding(jnp.zeros((*shape, stage.unet.text_width)), jnp.zeros(shape, bool))


def check(stage: Stage, sampling: Sampling, size: tuple[int, int]) -> None:
    """ValueError where the stage cannot draw this size, not in tiles or not in these, or not with these settings."""
    check_size(stage, *size)
    jax.eval_shape(lambda: grid(stage.schedule, sampling.steps, sampling.spacing))
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


def check_size(stage: Stage, *sides: int, name: str = "side") -> None:
    """ValueError where a side (`name` says of what) is not a multiple of the network's stride."""
    for side in sides:
        if side < 1 or side % stage.unet.stride:
            raise ValueError(f"a {name} of {side} pixels is not a multiple of the network's stride {stage.unet.stride}")
