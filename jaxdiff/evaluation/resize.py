"""How images come to the size that a metric's network takes: numbers of two ways cannot be compared.

First a `Fit`, the same for both sets. `SQUEEZE`: the whole image goes to the network's square, whatever its shape, as
in pytorch-fid, clean-fid and torch-fidelity. `CROP`: the centred square is cut out and brought to one size by the
filter of training (`jaxdiff.data.images.resize`), for models that were trained on such squares. Then a `Resize`:

`CLEAN`: Pillow's antialiased BICUBIC on floating-point channels, nothing rounded in between, and what goes beyond the
range of an image clipped, as clean-fid does (arXiv 2104.11222). `LEGACY`: bilinear as in TensorFlow 1, pixel i of the
output read at i · scale, without antialiasing: what FID was published with, which makes shrunk images jagged and
moves them by part of a pixel. `PYTORCH`: bilinear with the centres of pixels aligned (`align_corners=False`), without
antialiasing either: pytorch-fid, which also scales what Inception sees a little otherwise (`features.inception`).
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
    """The whole image, squeezed where it is not square as FID does, as float32 from 0 to 255. One that has the
    size already is not touched."""
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
    """The two neighbours of each place, and how far it is on the way to the second. centred: pixels are squares, the
    middle of the first half a pixel from the border; else points, the first on the border."""
    half = np.float32(0.5 if centred else 0)
    at = np.maximum((np.arange(side, dtype=np.float32) + half) * np.float32(length / side) - half, 0)
    low = np.minimum(at.astype(int), length - 1)
    return low, np.minimum(low + 1, length - 1), at - low
