"""Image decoding, resizing and aligned crops: an encoded image to a uint8 array of a given size.

All images are decoded by `decode`: for training, evaluation, conversion and user input. It applies the EXIF or XMP
orientation and converts every Pillow mode to 8-bit RGB:

    1, L, P, RGB, RGBX, CMYK, YCbCr, HSV   Pillow's conversion (CMYK without a colour profile)
    RGBA, RGBa, LA, La, PA, and any mode   composited on white
    with a transparent colour (tRNS)
    I;16 in any byte order, I of a PGM     16 bits, 0…65535 → 0…255, rounded
    LAB                                    to sRGB by LittleCMS (white point D50)
    I of other files, F                    refused: the value range is unknown

The filter is Pillow's BICUBIC (a = -0.5), antialiased when downsampling, applied in one pass over the whole image
(`reducing_gap=None`). Training images, low-resolution inputs made from true images and bicubic baselines all use
`resize`: models and metrics are sensitive to the choice of filter.
"""

import io
from collections.abc import Callable
from typing import IO, cast

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

FILTER = Image.Resampling.BICUBIC

# EXIF orientation → the transpose that makes the stored pixels upright.
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
    """An image that cannot be decoded; the message is the reason."""


def decode(source: bytes | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """An encoded image (anything Pillow reads) or a uint8 array (h w), (h w 1|3|4) → uint8 RGB.

    Transparent images are composited on white, and the EXIF or XMP orientation is applied. Only the first frame is
    used. Raises `Unreadable` for any damage; damaged EXIF is ignored.
    """
    try:
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else _from_array(source)
        rgb = _rgb(image)
        turn = _turn(image)  # after the pixels: PNG may store it behind them, TIFF applies it itself
        return np.asarray(rgb if turn is None else rgb.transpose(turn))
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("not an image in any known format") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet: SyntaxError, zlib.error, …
        raise Unreadable(f"damaged image ({error})") from error


def upright_size(source: bytes | np.ndarray | io.BufferedIOBase) -> tuple[int, int]:
    """(height, width) after `decode`, from the header alone. source: encoded bytes, an open file or an array. A PNG
    with EXIF behind its pixels gives the size before orientation. Raises `Unreadable`.
    """
    if isinstance(source, np.ndarray):
        if source.ndim < 2:
            raise Unreadable(f"an array of shape {source.shape}")
        return source.shape[0], source.shape[1]
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else cast(IO[bytes], source)) as image:
            width, height = image.size
            # PNG's own `getexif` would decode the pixels to read EXIF behind them. TIFF's size is already oriented.
            turn = None if image.format == "TIFF" else _turn_of(image, Image.Image.getexif)
    except UnidentifiedImageError as error:
        raise Unreadable("not an image in any known format") from error
    except Exception as error:
        raise Unreadable(f"damaged image ({error})") from error
    return (width, height) if turn in _SIDEWAYS else (height, width)


def has_transparency(image: Image.Image) -> bool:
    """Whether any pixel is not opaque: an alpha channel that is 255 everywhere does not count.

    Pass the result of `Image.open` before its pixels are loaded: the bit depth needed for a PNG's transparent colour is
    lost afterwards.
    """
    return image.has_transparency_data and bool((np.asarray(_rgba(image).getchannel("A")) < 255).any())


def resize(image: UInt8[np.ndarray, "h w 3"], size: int | tuple[int, int]) -> UInt8[np.ndarray, "r q 3"]:
    """Centre-crop an image to the aspect ratio of `size` (height, width; one number: a square) and resample it.

    The crop's edges may fall between pixels, and the filter reads pixels beyond them, as if the whole image were
    resized and then cropped. An image of the right size is returned unchanged.
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
    """The same random window of an image and of its downsampled version; `crop` is its side in the high image.

    Windows start at integer pixels of the low image, so their top left corners coincide.
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
    """float -1…1 → uint8 0…255, rounded and clipped. The inverse of `to_float`."""
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
    except Exception:  # damaged EXIF raises many types; the pixels are intact
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
        # Pillow converts the pixels to 8 bits, but not the transparent colour.
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
    """Scale pixels 0…65535, which Pillow would clip at 255."""
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
