"""One encoded picture in, one square uint8 array out: decoding, resizing and aligned crops.

The filter is Pillow's BICUBIC (a = -0.5), which widens with the scale when it shrinks (antialiased), applied in
one pass over the whole picture (`reducing_gap=None`). Every picture that is trained on, every low-resolution input
made from a true picture and every bicubic baseline goes through `resize`: one filter everywhere, because a model
and its judges notice the difference between two of them.
"""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

FILTER = Image.Resampling.BICUBIC


class Unreadable(Exception):
    """A picture that cannot be decoded; the message is the reason, in a few words."""


def decode(picture: bytes | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """An encoded picture (anything Pillow reads) or a uint8 array (h w), (h w 1|3|4) → uint8 RGB.

    Transparent pictures are laid on white, and a photograph is turned upright as its EXIF tag says. Raises
    `Unreadable`, whatever is wrong with the bytes.
    """
    try:
        image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else _from_array(picture)
        if image.format == "JPEG":
            image = ImageOps.exif_transpose(image)
        return np.asarray(_rgb(image))
    except UnidentifiedImageError as error:
        raise Unreadable("not a picture in any known format") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet: SyntaxError, zlib.error, …
        raise Unreadable(f"damaged picture ({error})") from error


def has_transparency(image: Image.Image) -> bool:
    """Whether any pixel is not opaque: an alpha channel that is 255 everywhere is no transparency."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def resize(picture: UInt8[np.ndarray, "h w 3"], resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """The centred square of a picture, resampled to `resolution`: the short side fits, the long one is cut.

    The square's edges may fall between pixels (an odd difference of the sides), and the filter sees what lies beyond
    them, as if the whole picture had been resized, then cut. One that already has the size comes back untouched.
    """
    height, width = picture.shape[:2]
    if height == width == resolution:
        return picture
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    square = (left, top, left + side, top + side)
    resampled = Image.fromarray(picture).resize((resolution, resolution), FILTER, box=square, reducing_gap=None)
    return np.asarray(resampled)


def aligned_crops(
    high: UInt8[np.ndarray, "r r 3"], low: UInt8[np.ndarray, "q q 3"], crop: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "c c 3"], UInt8[np.ndarray, "d d 3"]]:
    """The same random window of a picture and of its small version: `crop` pixels of the high one on a side.

    Windows start at whole pixels of the low picture, so pixel (0, 0) of one is the top left of the other.
    """
    factor = len(high) // len(low)
    size = crop // factor
    top, left = rng.integers(0, len(low) - size + 1, size=2)
    window = (slice(top, top + size), slice(left, left + size))
    scaled = tuple(slice(part.start * factor, part.stop * factor) for part in window)
    return high[scaled], low[window]


def to_float(pictures: UInt8[np.ndarray, "*b h w 3"]) -> np.ndarray:
    """uint8 0…255 → float32 -1…1."""
    return pictures.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(pictures: np.ndarray) -> UInt8[np.ndarray, "*b h w 3"]:
    """float -1…1 → uint8 0…255, rounded; what lies outside the range is clipped. The inverse of `to_float`."""
    return np.clip(np.rint((np.asarray(pictures, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def encode_png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A uint8 picture as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _from_array(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture)


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unreadable(f"pixels of mode {image.mode}, whose range is not known")
    return image.convert("RGB")
