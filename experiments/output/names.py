"""Files that are named by a number and a text, such as a prompt: one rule for every command, and no name is fatal."""

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
"""How much of a text a name holds at most."""
BYTES = 255 - 80
"""The longest name, number and suffix included, as encoded: file systems allow 255, and `replacing` adds the host and
the process to a name while the file is written."""


class Named(NamedTuple):
    """An image (h w 3) in [-1, 1], and what its file is called: the number, words of the text, the suffix."""

    number: str
    text: str
    image: np.ndarray
    metadata: Metadata
    suffix: str = ".png"


def file_name(number: str, text: str, suffix: str = ".png") -> str:
    """`number`, the first words of `text` in small letters, joined by hyphens, and `suffix`.

    Words are letters, digits and what is written above or below them; all else parts words, so that no name holds a
    separator, a control character or what Windows forbids, and none begins with a dot. It is cut to CHARACTERS of the
    text and to BYTES, between characters and, where that is possible, not before a combining mark.
    """
    slug = "".join(f"-{word}" for word in _words(text))
    room = BYTES - len(f"{number}{suffix}".encode())
    end = min(len(slug), CHARACTERS)
    while len(slug[:end].encode()) > room:
        end -= 1
    whole = end
    while 0 < whole < len(slug) and _is_mark(slug[whole]):
        whole -= 1
    # A letter with more marks than there is room for is cut after all.
    return f"{number}{slug[: whole if slug[:whole].strip('-') else end].rstrip('-')}{suffix}"


def save_all(folder: Path, images: Iterable[Named]) -> list[Path]:
    """Saves every image that can be saved, and returns where: under its name, or, where the file system does not take
    that, under its number alone (one warning says how many).

    OSError where images could not be saved at all, after all the others have been: how many, and why.
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
            except (OSError, UnicodeError) as error:  # UnicodeError: a locale whose file names have not all characters
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
        raise OSError(code, f"{count}, the first one {name}: {_reason(error)}; the others are there", str(folder))
    return saved


def _words(text: str) -> list[str]:
    """The words of a text, composed (NFC) and in small letters. A mark without a letter belongs to none."""
    text = unicodedata.normalize("NFC", text.lower())
    kept = "".join(c if c == "_" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    words = (word.lstrip("".join(filter(_is_mark, word))) for word in kept.split())
    return [word for word in words if word]


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
