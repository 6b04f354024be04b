"""How pictures come to the size that a network judges them at: numbers of two ways cannot be compared.

`CLEAN`: Pillow's antialiased BICUBIC on floating-point channels, nothing rounded in between, and what goes beyond the
range of a picture clipped, as clean-fid does (arXiv 2104.11222). `LEGACY`: bilinear as in TensorFlow 1, pixel i of the
output read at i · scale, without antialiasing: what FID was published with, which makes shrunk pictures jagged and
moves them by part of a pixel.
"""

import enum

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


class Resize(enum.Enum):
    CLEAN = "clean"
    LEGACY = "legacy"


def resized(picture: UInt8[np.ndarray, "h w 3"], side: int, how: Resize) -> Float[np.ndarray, "s s 3"]:
    """The whole picture, squeezed where it is not square as FID does, as float32 from 0 to 255. One that has the
    size already is not touched."""
    if picture.shape[:2] == (side, side):
        return picture.astype(np.float32)
    return (_clean if how is Resize.CLEAN else _legacy)(picture, side)


def _clean(picture: np.ndarray, side: int) -> np.ndarray:
    channels = [Image.fromarray(channel) for channel in np.moveaxis(picture.astype(np.float32), -1, 0)]
    shrunk = np.stack([np.asarray(c.resize((side, side), Image.Resampling.BICUBIC)) for c in channels], -1)
    return shrunk.clip(0, 255)


def _legacy(picture: np.ndarray, side: int) -> np.ndarray:
    picture = picture.astype(np.float32)
    (y0, y1, fy), (x0, x1, fx) = (_between(length, side) for length in picture.shape[:2])
    fy, fx = fy[:, None, None], fx[None, :, None]
    rows = picture[y0] * (1 - fy) + picture[y1] * fy
    return rows[:, x0] * (1 - fx) + rows[:, x1] * fx


def _between(length: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two neighbours of each place, and how far it is on the way to the second."""
    at = np.arange(side, dtype=np.float32) * np.float32(length / side)
    low = np.minimum(at.astype(int), length - 1)
    return low, np.minimum(low + 1, length - 1), at - low
