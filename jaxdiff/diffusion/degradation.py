"""Corruptions of the low-resolution images that upsamplers train on, as in DALL·E 2 (arXiv 2204.06125, 2.1).

A generated image is no clean downsampled one: an upsampler that has seen blurred and noisy inputs copies fewer of its
faults. Each class is a frozen dataclass of settings with `apply(image, keys)`: images (b h w c) in [-1, 1] and one key
for each, so that an image's corruption does not depend on the batch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

BLOCK = 8
"""Side of a block of JPEG."""
LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMINANCE = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
"""Quantization tables of JPEG (ITU-T T.81, Annex K), row by row."""


@dataclass(frozen=True)
class GaussianBlur:
    """A blur with one kernel: the paper's for 64→256. sigma: in pixels. kernel: its side, odd."""

    sigma: float = 0.6
    kernel: int = 3

    def __post_init__(self):
        if not self.sigma > 0 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"a blur needs a sigma above 0 and an odd kernel, not {self.sigma} and {self.kernel}")

    def apply(self, image: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
        kernel = gaussian_kernel(self.kernel, jnp.float32(self.sigma), jnp.float32(self.sigma), jnp.float32(0.0))
        return jax.vmap(lambda each: blur(each, kernel))(image)


@dataclass(frozen=True)
class BSRDegradation:
    """Random blur, resizing, noise and JPEG, in the manner of BSRGAN (arXiv 2103.14006): the paper's for 256→1024.

    Differences from BSRGAN: each once and in this order, Gaussian noise alone, JPEG without chroma subsampling.

    sigmas: range of the blur's standard deviation along each of its two axes, in pixels, which are turned by a random
    angle. kernel: its side, odd. scales: the image is shrunk to one of these fractions of its size, and enlarged again.
    noise: highest standard deviation of the noise, for images in [-1, 1]. qualities: range of JPEG's quality, 1 to 100.
    jpeg: fraction of the images that are compressed.
    """

    sigmas: tuple[float, float] = (0.2, 1.6)
    kernel: int = 7
    scales: tuple[float, ...] = (1.0, 0.75, 0.5)
    noise: float = 0.1
    qualities: tuple[float, float] = (40.0, 95.0)
    jpeg: float = 0.75

    def __post_init__(self):
        if not 0 < self.sigmas[0] <= self.sigmas[1] or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"a blur needs sigmas above 0 and an odd kernel, not {self.sigmas} and {self.kernel}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales {self.scales}: at least one, each above 0 and up to 1")
        if self.noise < 0 or not 0 <= self.jpeg <= 1:
            raise ValueError(f"noise {self.noise} must be at least 0, jpeg {self.jpeg} a fraction")
        if not 1 <= self.qualities[0] <= self.qualities[1] <= 100:
            raise ValueError(f"qualities {self.qualities}: an ascending range within 1 to 100")

    def apply(self, image: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
        """ValueError for images without three channels."""
        if image.shape[-1] != 3:
            raise ValueError(f"JPEG needs images of three channels, not {image.shape[-1]}")
        return jax.vmap(self._apply)(image, keys)

    def _apply(self, image: Float[Array, "h w 3"], key: Key[Array, ""]) -> Float[Array, "h w 3"]:
        blurring, turning, scaling, loudness, noising, compressing, quality = jax.random.split(key, 7)
        along, across = jax.random.uniform(blurring, (2,), minval=self.sigmas[0], maxval=self.sigmas[1])
        angle = jax.random.uniform(turning, maxval=jnp.pi)
        image = blur(image, gaussian_kernel(self.kernel, along, across, angle))
        resized = jnp.stack([rescaled(image, scale) for scale in self.scales])
        image = resized[jax.random.randint(scaling, (), 0, len(self.scales))]
        image += self.noise * jax.random.uniform(loudness) * jax.random.normal(noising, image.shape)
        image = jnp.clip(image, -1.0, 1.0)
        chosen = jax.random.uniform(quality, minval=self.qualities[0], maxval=self.qualities[1])
        return jnp.where(jax.random.uniform(compressing) < self.jpeg, jpeg(image, chosen), image)


Degradation = GaussianBlur | BSRDegradation


def gaussian_kernel(
    side: int, along: Float[Array, ""], across: Float[Array, ""], angle: Float[Array, ""]
) -> Float[Array, "k k"]:
    """A Gaussian with these standard deviations in pixels along and across a direction (radians), with the sum 1."""
    offset = jnp.arange(side) - side // 2
    y, x = jnp.meshgrid(offset, offset, indexing="ij")
    u, v = x * jnp.cos(angle) + y * jnp.sin(angle), y * jnp.cos(angle) - x * jnp.sin(angle)
    kernel = jnp.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    return kernel / kernel.sum()


def blur(image: Float[Array, "h w c"], kernel: Float[Array, "k k"]) -> Float[Array, "h w c"]:
    """Convolve each channel; beyond the borders the outermost pixels are repeated."""
    half = kernel.shape[0] // 2
    padded = jnp.pad(image, ((half, half), (half, half), (0, 0)), mode="edge")
    channels = jnp.moveaxis(padded, -1, 0)[..., None]
    layout = "NHWC", "HWIO", "NHWC"
    blurred = jax.lax.conv_general_dilated(
        channels, kernel[..., None, None], (1, 1), "VALID", dimension_numbers=layout, precision="highest"
    )
    return jnp.moveaxis(blurred[..., 0], 0, -1)


def rescaled(image: Float[Array, "h w c"], scale: float) -> Float[Array, "h w c"]:
    """Shrunk to a fraction of its size, antialiased, and enlarged to it again, both bilinear."""
    size = tuple(max(1, round(scale * side)) for side in image.shape[:2])
    if size == image.shape[:2]:
        return image
    small = jax.image.resize(image, (*size, image.shape[2]), "linear")
    return jax.image.resize(small, image.shape, "linear", antialias=False)


def jpeg(image: Float[Array, "h w 3"], quality: Float[Array, ""] | float) -> Float[Array, "h w 3"]:
    """The image after JPEG compression at a quality of 1 to 100 in libjpeg's scale, without chroma subsampling: the
    8×8 cosine transforms of YCbCr, in 8 bits, are rounded to multiples of the tables."""
    height, width = image.shape[:2]
    padded = jnp.pad(image, ((0, -height % BLOCK), (0, -width % BLOCK), (0, 0)), mode="edge")
    colours = jnp.round(_product(jnp.round(127.5 * (padded + 1.0)), _TO_YCBCR.T)) - _MIDDLE
    rows, columns = padded.shape[0] // BLOCK, padded.shape[1] // BLOCK
    blocks = colours.reshape(rows, BLOCK, columns, BLOCK, 3).transpose(0, 2, 4, 1, 3)
    factor = jnp.where(quality < 50, 5000.0 / quality, 200.0 - 2.0 * quality)
    steps = jnp.clip(jnp.floor((_TABLES * factor + 50.0) / 100.0), 1.0, 255.0)
    kept = steps * jnp.round(_product(_product(_DCT, blocks), _DCT.T) / steps)
    blocks = _product(_product(_DCT.T, kept), _DCT).transpose(0, 3, 1, 4, 2)
    colours = jnp.round(blocks.reshape(padded.shape)) + _MIDDLE
    return jnp.clip(_product(colours, np.linalg.inv(_TO_YCBCR).T) / 127.5 - 1.0, -1.0, 1.0)[:height, :width]


def _product(a: Array | np.ndarray, b: Array | np.ndarray) -> Array:
    """The matrix product in float32, which accelerators would round."""
    return jnp.matmul(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), precision="highest")


def _table(text: str) -> np.ndarray:
    return np.asarray(text.split(), np.float32).reshape(BLOCK, BLOCK)


_TABLES = np.stack([_table(LUMINANCE), _table(CHROMINANCE), _table(CHROMINANCE)])
_TO_YCBCR = np.asarray([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
"""Without the offset of 128 of Cb and Cr."""
_MIDDLE = np.asarray([128.0, 0.0, 0.0], np.float32)
"""Of the values that are transformed, before the shift."""
_DCT = np.sqrt(2 / BLOCK) * np.cos(np.pi / BLOCK * np.outer(np.arange(BLOCK), np.arange(BLOCK) + 0.5))
_DCT[0] /= np.sqrt(2)
