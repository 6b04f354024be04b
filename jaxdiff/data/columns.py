"""Select the image and caption columns of a table: the named ones, or those with usual names.

Callers report the selection in a note. If several columns match, or captions have no usual name, an error names the
columns and the setting to use.
"""

import dataclasses
import re
from collections.abc import Sequence

from jaxdiff.core.messages import plain

_IMAGES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixel_values", "image_bytes")
_CAPTIONS = (
    *("text", "texts", "caption", "captions", "prompt", "prompts", "sentence", "sentences", "sentences_raw", "title"),
    *("description", "descriptions", "label_text", "alt_text", "alt", "txt", "label text", "alt text"),
)
_CAPTION_WORDS = {"text", "caption", "captions", "prompt", "sentence", "description"}
_OTHER_WORDS = {"id", "ids", "url", "path", "file", "filename", "name", "source", "language", "lang", "length", "hash"}


@dataclasses.dataclass(frozen=True)
class ColumnNames:
    """Column names from the settings; None: select by usual names. caption "": no captions."""

    image: str | None = None
    caption: str | None = None


GUESSED = ColumnNames()


def image_column(where: str, images: Sequence[str], named: str | None, there: Sequence[str]) -> str:
    """The image column. `images`: candidates by type; `there`: all columns. ValueError, prefixed by `where`, if none or
    several match."""
    if named is not None:
        return _named(where, images, named, there, "images", "image_column")
    usual = [name for name in images if name.lower() in _IMAGES]
    candidates = usual or list(images)
    if not candidates:
        raise ValueError(f"{where}: no column holds images, only {_listed(there)}")
    if len(candidates) > 1:
        raise ValueError(f"{where}: the columns {_listed(candidates)} all hold images: say which with image_column")
    return candidates[0]


def caption_column(where: str, texts: Sequence[str], named: str | None, there: Sequence[str]) -> str | None:
    """The caption column; None if no column holds text or captions are disabled. `texts`: the text columns. ValueError,
    prefixed by `where`, if several match, or if none has a usual name."""
    if named == "":
        return None
    if named is not None:
        return _named(where, texts, named, there, "text", "caption_column")
    usual = [name for name in texts if name.lower() in _CAPTIONS]
    usual = usual or [name for name in texts if _is_like_a_caption(name)]
    if len(usual) > 1:
        raise ValueError(
            f"{where}: the columns {_listed(usual)} could all hold the captions: say which with caption_column"
        )
    if not usual and texts:
        raise ValueError(
            f"{where}: no column has a usual name for captions: say with caption_column which of {_listed(texts)} it "
            "is, or that it is '' (none)"
        )
    return usual[0] if usual else None


def chosen(where: str, image: str, caption: str | None, rest: str = "") -> str:
    """`where: images from 'image', captions from 'text'`"""
    captions = "no captions" if caption is None else f"captions from {caption!r}"
    return f"{where}: images from {image!r}, {captions}{rest}"


def _named(where: str, fitting: Sequence[str], named: str, there: Sequence[str], what: str, setting: str) -> str:
    if named in fitting:
        return named
    kind = "is no column" if named not in there else f"holds no {what}"
    raise ValueError(f"{where}: {setting} {named!r} {kind}; with {what}: {_listed(fitting)}")


def _is_like_a_caption(name: str) -> bool:
    """`blip_caption`, `caption_en`, but not `caption_id`."""
    words = set(re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
    return bool(words & _CAPTION_WORDS) and not words & _OTHER_WORDS


def _listed(names: Sequence[str]) -> str:
    return plain(", ".join(names), 400) or "none"
