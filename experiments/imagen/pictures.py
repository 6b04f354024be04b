"""Pictures for people to look at: arrays to PNG files and captioned grids."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0…255, rounded."""
    return np.clip(np.round((np.asarray(pictures, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def save_png(path: Path, picture: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    """One picture (h w 3) in [-1, 1], complete or not at all; `metadata` as PNG text."""
    info = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        info.add_itxt(name, value)
    write(path, Image.fromarray(to_uint8(picture)), pnginfo=info)


def write(path: Path, image: Image.Image, **options) -> None:
    """Save under another name, then rename: a full disk leaves no half-written picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        image.save(temporary, format="png", **options)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def grid(
    pictures: Sequence[np.ndarray], captions: Sequence[str], side: int, columns: int, font_size: int = 12
) -> Image.Image:
    """Pictures (h w 3 in [-1, 1]), each scaled to `side` pixels with its caption below, `columns` to a row."""
    font = ImageFont.load_default(font_size)
    lines = [textwrap.wrap(caption, max(8, int(side / (0.52 * font_size)))) or [""] for caption in captions]
    height = side + (max(map(len, lines), default=0) * int(1.3 * font_size)) + 8
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (height + 8) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = 8 + (i % columns) * (side + 8), 8 + (i // columns) * (height + 8)
        image = Image.fromarray(to_uint8(picture))
        if image.size != (side, side):
            # Small pictures are enlarged without smoothing: what one sees are the pixels that were drawn.
            filter = Image.Resampling.NEAREST if side % image.width == 0 else Image.Resampling.LANCZOS
            image = image.resize((side, side), filter)
        sheet.paste(image, (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=(200, 200, 200))
        pen.multiline_text((x, y + side + 3), "\n".join(lines[i]), fill="black", font=font, spacing=1)
    return sheet
