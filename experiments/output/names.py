"""Image files named by a number and a text, such as a prompt, with a fallback for names the file system rejects."""

import errno
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdiff.data.grids import save_png
from jaxdiff.data.png_metadata import Metadata

CHARACTERS = 60
"""Maximum characters of the text in a name."""
BYTES = 255 - 80
"""Maximum encoded length of a name, with number and suffix: file systems allow 255, and `replacing` adds host and
process to a name while the file is written."""


class Named(NamedTuple):
    """An image (h w 3) in [-1, 1] and the parts of its file name: number, words of the text, suffix."""

    number: str
    text: str
    image: np.ndarray
    metadata: Metadata
    suffix: str = ".png"


def file_name(number: str, text: str, suffix: str = ".png") -> str:
    """`number` and the first words of `text`, in lower case and joined by hyphens, then `suffix`.

    Words are letters, digits, underscores and combining marks. Everything else separates words, so a name contains no
    path separator, control character or character forbidden by Windows, and does not begin with a dot. It is truncated
    to CHARACTERS of the text and to BYTES, if possible not before a combining mark.
    """
    slug = "".join(f"-{word}" for word in _words(text))
    room = BYTES - len(f"{number}{suffix}".encode())
    end = min(len(slug), CHARACTERS)
    while len(slug[:end].encode()) > room:
        end -= 1
    boundary = end
    while 0 < boundary < len(slug) and _is_mark(slug[boundary]):
        boundary -= 1
    # A letter with too many marks is truncated within its marks.
    return f"{number}{slug[: boundary if slug[:boundary].strip('-') else end].rstrip('-')}{suffix}"


def save_all(folder: Path, images: Iterable[Named]) -> list[Path]:
    """Save all images and return their paths. If the file system rejects a name, only the number is used (one warning
    with the count).

    OSError, after all other images are saved, with the number of images that could not be saved and the reason.
    """
    saved: list[Path] = []
    renamed: list[tuple[str, Exception]] = []
    lost: list[tuple[str, Exception]] = []
    for each in images:
        names = list(dict.fromkeys((file_name(*each[:2], each.suffix), file_name(each.number, "", each.suffix))))
        errors: list[Exception] = []
        for name in names:
            try:
                save_png(folder / name, each.image, each.metadata)
            except (OSError, UnicodeError) as error:  # UnicodeError: a file system encoding without some characters
                errors.append(error)
            else:
                saved.append(folder / name)
                renamed += [(name, error) for error in errors]
                break
        else:
            lost.append((names[-1], errors[-1]))
    if renamed:
        name, error = renamed[0]
        warnings.warn(
            f"{folder}: {len(renamed)} images could not be saved under their prompts ({_reason(error)}) and have "
            f"their numbers alone, such as {name}",
            stacklevel=2,
        )
    if lost:
        name, error = lost[0]
        code = error.errno if isinstance(error, OSError) and error.errno is not None else errno.EIO
        count = f"{len(lost)} of {len(lost) + len(saved)} images could not be saved"
        raise OSError(code, f"{count}, the first one {name}: {_reason(error)}; the others are saved", str(folder))
    return saved


def _words(text: str) -> list[str]:
    """The words of a text in lower case and NFC. Marks at the start of a word are dropped."""
    text = unicodedata.normalize("NFC", text.lower())
    kept = "".join(c if c == "_" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    words = (word.lstrip("".join(filter(_is_mark, word))) for word in kept.split())
    return [word for word in words if word]


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
