"""Metadata of sampled PNGs: prompt, seed and settings, as JSON under our own key.

One iTXt chunk (Unicode, not compressed) with the keyword `jaxdiff` holds `{"version": 1, "prompt": …, "seed": …,
"settings": {…}}`. Text of other programs under names such as `prompt` is never used as a caption.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from jaxdiff.core import json_files
from jaxdiff.core.messages import quoted

KEY = "jaxdiff"
VERSION = 1
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Metadata:
    """Inputs of a sampled image. settings: JSON types."""

    prompt: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def to_text(metadata: Metadata) -> str:
    """The text of the chunk. Lone surrogates (from file names) stay JSON escapes."""
    values = {"version": VERSION, "prompt": metadata.prompt, "seed": metadata.seed, "settings": dict(metadata.settings)}
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def read(image: bytes) -> Metadata | None:
    """The metadata of an encoded image; None if it has no `jaxdiff` text. ValueError if it is damaged or of another
    version."""
    if not image.startswith(_SIGNATURE) or f"{KEY}\0".encode() not in image:
        return None
    try:
        with Image.open(io.BytesIO(image)) as opened:
            # Reads to the end of the file: programs may move the text behind the pixels.
            text = getattr(opened, "text", {}).get(KEY)
    except Exception as error:  # Pillow's plugins raise many types
        raise ValueError(f"damaged image ({error})") from error
    return None if text is None else _of_text(str(text))


def _of_text(text: str) -> Metadata:
    values = json_files.parse_object(text, f"its `{KEY}` text", "metadata")
    if type(values.get("version")) is not int:
        raise ValueError(f"its `{KEY}` text is no JSON object with a version")
    if values["version"] != VERSION:
        raise ValueError(
            f"its `{KEY}` text has version {quoted(values['version'])}, and version {VERSION} is read here"
        )
    prompt, seed, settings = values.get("prompt"), values.get("seed"), values.get("settings")
    if not isinstance(prompt, str) or type(seed) is not int or not isinstance(settings, dict):
        raise ValueError(f"its `{KEY}` text lacks a prompt, a seed or settings")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"its `{KEY}` text has a prompt that is not Unicode ({error})") from error
    return Metadata(prompt, seed, settings)
