"""One encoded image in, one uint8 array of a given size out: decoding, resizing and aligned crops.

`decode` is the only way from a file to pixels: for training, evaluation, conversion and the images that a user gives.
It turns every format upright as its EXIF or XMP orientation says, and brings every mode of Pillow to 8-bit RGB:

    1, L, P, RGB, RGBX, CMYK, YCbCr, HSV   as Pillow converts them (CMYK without a colour profile)
    RGBA, RGBa, LA, La, PA, and any mode   laid on white
    with a transparent colour (tRNS)
    I;16 in any byte order, I of a PGM     16 bits, 0…65535 → 0…255, rounded
    LAB                                    to sRGB by LittleCMS (white point D50)
    I of other files, F                    refused: the range of their values is not known

The filter is Pillow's BICUBIC (a = -0.5), which widens with the scale when it shrinks (antialiased), applied in
one pass over the whole image (`reducing_gap=None`). Every image that is trained on, every low-resolution input
made from a true image and every bicubic baseline goes through `resize`: one filter everywhere, because a model
and its judges notice the difference between two of them.
"""

import io
from collections.abc import Callable
from typing import IO, cast

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

FILTER = Image.Resampling.BICUBIC

# EXIF's orientation → what turns the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}


class Unreadable(Exception):
    """An image that cannot be decoded; the message is the reason, in a few words."""


def decode(source: bytes | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """An encoded image (anything Pillow reads) or a uint8 array (h w), (h w 1|3|4) → uint8 RGB.

    Transparent images are laid on white, and every format is turned upright as its EXIF or XMP orientation says. Of
    several frames the first is taken. Raises `Unreadable`, whatever is wrong with the bytes; damaged EXIF counts as
    none.
    """
    try:
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else _from_array(source)
        rgb = _rgb(image)
        turn = _turn(image)  # after the pixels: PNG may hold it behind them, TIFF turns itself
        return np.asarray(rgb if turn is None else rgb.transpose(turn))
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("not an image in any known format") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet: SyntaxError, zlib.error, …
        raise Unreadable(f"damaged image ({error})") from error


def upright_size(source: bytes | np.ndarray | io.BufferedIOBase) -> tuple[int, int]:
    """(height, width) of what `decode` makes of an encoded image, of its file or of an array, read from the header
    alone. Of a PNG whose EXIF lies behind its pixels, the size before it is turned. Raises `Unreadable`.
    """
    if isinstance(source, np.ndarray):
        if source.ndim < 2:
            raise Unreadable(f"an array of shape {source.shape}")
        return source.shape[0], source.shape[1]
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else cast(IO[bytes], source)) as image:
            width, height = image.size
            # Not PNG's own `getexif`, which decodes the pixels to look behind them. TIFF has its size upright already.
            turn = None if image.format == "TIFF" else _turn_of(image, Image.Image.getexif)
    except UnidentifiedImageError as error:
        raise Unreadable("not an image in any known format") from error
    except Exception as error:
        raise Unreadable(f"damaged image ({error})") from error
    return (width, height) if turn in _SIDEWAYS else (height, width)


def has_transparency(image: Image.Image) -> bool:
    """Whether any pixel is not opaque: an alpha channel that is 255 everywhere is no transparency.

    Give it as `Image.open` returned it: the bit depth, by which a PNG's transparent colour is read, is known until the
    pixels are loaded.
    """
    return image.has_transparency_data and bool((np.asarray(_rgba(image).getchannel("A")) < 255).any())


def resize(image: UInt8[np.ndarray, "h w 3"], size: int | tuple[int, int]) -> UInt8[np.ndarray, "r q 3"]:
    """The centred part of an image that has the form of `size` (height, width; one number: a square), resampled to it:
    one side fits, the ends of the other are cut.

    The part's edges may fall between pixels, and the filter sees what lies beyond them, as if the whole image had been
    resized, then cut. One that already has the size comes back untouched.
    """
    height, width = image.shape[:2]
    rows, columns = (size, size) if isinstance(size, int) else size
    if (height, width) == (rows, columns):
        return image
    if height * columns <= width * rows:
        part_height, part_width = float(height), height * columns / rows
    else:
        part_height, part_width = width * rows / columns, float(width)
    left, top = (width - part_width) / 2, (height - part_height) / 2
    part = (left, top, left + part_width, top + part_height)
    resampled = Image.fromarray(image).resize((columns, rows), FILTER, box=part, reducing_gap=None)
    return np.asarray(resampled)


def aligned_crops(
    high: UInt8[np.ndarray, "r r 3"], low: UInt8[np.ndarray, "q q 3"], crop: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "c c 3"], UInt8[np.ndarray, "d d 3"]]:
    """The same random window of an image and of its small version: `crop` pixels of the high one on a side.

    Windows start at whole pixels of the low image, so pixel (0, 0) of one is the top left of the other.
    """
    factor = len(high) // len(low)
    size = crop // factor
    top, left = rng.integers(0, len(low) - size + 1, size=2)
    window = (slice(top, top + size), slice(left, left + size))
    scaled = tuple(slice(part.start * factor, part.stop * factor) for part in window)
    return high[scaled], low[window]


def to_float(images: UInt8[np.ndarray, "*b h w 3"]) -> np.ndarray:
    """uint8 0…255 → float32 -1…1."""
    return images.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(images: np.ndarray) -> UInt8[np.ndarray, "*b h w 3"]:
    """float -1…1 → uint8 0…255, rounded; what lies outside the range is clipped. The inverse of `to_float`."""
    return np.clip(np.rint((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A uint8 image as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _from_array(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)


def _turn(image: Image.Image) -> Image.Transpose | None:
    return _turn_of(image, lambda image: image.getexif())


def _turn_of(image: Image.Image, exif: Callable[[Image.Image], Image.Exif]) -> Image.Transpose | None:
    try:
        return _TURNS.get(exif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF, in as many errors as there are parsers; the pixels are sound
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = _rgba(image)
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if _has_sixteen_bits(image):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        raise Unreadable(f"pixels of mode {image.mode}, whose range is not known")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    return image.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    """An image that has transparency data, in 8 bits."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        rgba = _eight_bits(image).convert("RGBA")
        rgba.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return rgba
    if image.mode in ("L", "RGB") and transparent is not None:
        # Pillow brings the pixels to 8 bits, but leaves the transparent colour in those of the file.
        scale = _eight_bits_from(image)
        image = image.copy()
        image.info["transparency"] = scale(transparent) if image.mode == "L" else tuple(map(scale, transparent))
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGBA")


def _eight_bits_from(image: Image.Image) -> Callable[[int], int]:
    tiles = getattr(image, "tile", None)
    raw = str(tiles[0].args) if tiles else image.mode
    scales = {"L;2": lambda value: value * 85, "L;4": lambda value: value * 17, "RGB;16B": lambda value: value >> 8}
    return scales.get(raw, lambda value: value)


def _has_sixteen_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pixels 0…65535, which Pillow would clip at 255."""
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
