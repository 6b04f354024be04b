"""Arrays to PNG files and captioned grids."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from jaxdiff.core.files import replacing
from jaxdiff.data import png_metadata
from jaxdiff.data.images import to_uint8
from jaxdiff.data.png_metadata import Metadata

GAP = 8
"""Pixels between the images of a grid."""
LINES = 12
"""Maximum lines of a caption in a grid."""


def save_png(path: Path, image: np.ndarray, metadata: Metadata | None = None) -> None:
    """Write one image (h w 3) in [-1, 1] atomically, with `metadata` as PNG text (`png_metadata`)."""
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_itxt(png_metadata.KEY, png_metadata.to_text(metadata))
    write(path, Image.fromarray(to_uint8(image)), pnginfo=info)


def write(path: Path, image: Image.Image, **options) -> None:
    """Write an image as a PNG file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="png", **options)


def scaled(array: np.ndarray, side: int) -> Image.Image:
    """Convert an image (h w 3) in [-1, 1] to a Pillow image whose longer side has `side` pixels.

    Integer enlargements use nearest neighbour, so that individual pixels stay visible; other scales use Lanczos.
    """
    image = Image.fromarray(to_uint8(array))
    longer = max(image.size)
    if longer == side:
        return image
    filter = Image.Resampling.NEAREST if side % longer == 0 else Image.Resampling.LANCZOS
    width, height = (max(1, round(length * side / longer)) for length in image.size)
    return image.resize((width, height), filter)


def grid(
    images: Sequence[np.ndarray], captions: Sequence[str], side: int, columns: int, font_size: int = 12
) -> Image.Image:
    """Images (h w 3 in [-1, 1]), each scaled to `side` pixels with its caption below, `columns` to a row."""
    return sheet([scaled(image, side) for image in images], captions, side, columns, font_size)


def sheet(
    images: Sequence[Image.Image], captions: Sequence[str], side: int, columns: int, font_size: int = 12
) -> Image.Image:
    """`grid` for images already scaled to at most `side` pixels."""
    texts = [wrapped(caption, side, font_size) for caption in captions]
    height = side + text_height(texts, font_size)
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    for i, image in enumerate(images):
        x, y = GAP + (i % columns) * (side + GAP), GAP + (i // columns) * (height + GAP)
        paste(canvas, image, (x, y))
        write_text(canvas, texts[i], (x, y + side + 3), font_size)
    return canvas


def paste(sheet: Image.Image, image: Image.Image, place: tuple[int, int]) -> None:
    """Paste `image` with a thin frame, its top left corner at `place`."""
    (x, y), (width, height) = place, image.size
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + width, y + height), outline=(200, 200, 200))
    sheet.paste(image, place)


def wrapped(text: str, width: int, font_size: int, lines: int = LINES) -> str:
    """Wrap text to `width` pixels; text beyond `lines` lines is cut ("…")."""
    characters = max(8, int(width / (0.52 * font_size)))
    printable = "".join(c if c.isprintable() else " " for c in text[: 2 * lines * characters])
    return "\n".join(textwrap.wrap(printable, characters, max_lines=lines, placeholder=" …"))


def text_height(texts: Sequence[str], font_size: int) -> int:
    """Height in pixels of the longest of these texts."""
    return max((text.count("\n") + 1 for text in texts), default=0) * int(1.3 * font_size) + GAP


def write_text(sheet: Image.Image, text: str, place: tuple[int, int], font_size: int) -> None:
    font = ImageFont.load_default(font_size)
    ImageDraw.Draw(sheet).multiline_text(place, text, fill="black", font=font, spacing=1)
