"""Resizing images for a metric's network: values obtained with different resizing are not comparable.

First a `Fit`, the same for both datasets. `SQUEEZE`: the whole image is resized to the network's square, whatever its
aspect ratio, as in pytorch-fid, clean-fid and torch-fidelity. `CROP`: the centred square is cropped and resized to one
size with the training filter (`jaxdiff.data.images.resize`), for models trained on such squares. Then a `Resize`:

`CLEAN`: Pillow's antialiased BICUBIC on float channels, without intermediate rounding, clipped to the image range, as
in clean-fid (arXiv 2104.11222). `LEGACY`: bilinear as in TensorFlow 1, output pixel i read at i · scale, without
antialiasing: the filter of the original FID, which aliases and shifts downsampled images by a fraction of a pixel.
`PYTORCH`: bilinear with aligned pixel centres (`align_corners=False`), also without antialiasing: pytorch-fid, which
also scales Inception's input slightly differently (`features.inception`).
"""

import enum

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


class Fit(enum.Enum):
    SQUEEZE = "squeeze"
    CROP = "crop"


class Resize(enum.Enum):
    CLEAN = "clean"
    LEGACY = "legacy"
    PYTORCH = "pytorch"


def resized(image: UInt8[np.ndarray, "h w 3"], side: int, how: Resize) -> Float[np.ndarray, "s s 3"]:
    """The whole image, resized to a square as in FID, as float32 from 0 to 255. An image of the right size is
    unchanged."""
    if image.shape[:2] == (side, side):
        return image.astype(np.float32)
    return _clean(image, side) if how is Resize.CLEAN else _bilinear(image, side, how is Resize.PYTORCH)


def _clean(image: np.ndarray, side: int) -> np.ndarray:
    channels = [Image.fromarray(channel) for channel in np.moveaxis(image.astype(np.float32), -1, 0)]
    shrunk = np.stack([np.asarray(c.resize((side, side), Image.Resampling.BICUBIC)) for c in channels], -1)
    return shrunk.clip(0, 255)


def _bilinear(image: np.ndarray, side: int, centred: bool) -> np.ndarray:
    image = image.astype(np.float32)
    (y0, y1, fy), (x0, x1, fx) = (_between(length, side, centred) for length in image.shape[:2])
    fy, fx = fy[:, None, None], fx[None, :, None]
    rows = image[y0] * (1 - fy) + image[y1] * fy
    return (rows[:, x0] * (1 - fx) + rows[:, x1] * fx).astype(np.float32)


def _between(length: int, side: int, centred: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two neighbours of each output pixel, and the weight of the second. centred: pixel centres lie half a pixel
    from the border; otherwise the first pixel lies on the border."""
    half = np.float32(0.5 if centred else 0)
    at = np.maximum((np.arange(side, dtype=np.float32) + half) * np.float32(length / side) - half, 0)
    low = np.minimum(at.astype(int), length - 1)
    return low, np.minimum(low + 1, length - 1), at - low
