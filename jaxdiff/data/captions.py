"""Captions as text that can be encoded: decoding of files by their byte order mark, JSON, and one cleaning for all.

Bytes that cannot be decoded become lone surrogates first, as half an emoji in JSON ("\\ud83d") is one already. `clean`
replaces them all by U+FFFD and says so, so that sources can name the row, and readers count it or refuse it.
"""

import codecs
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.core.json_files import parse
from jaxdiff.core.messages import quoted

# The longer marks come first: UTF-32's begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_OUTER = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff"  # U+3000 is the last of the blanks
_UNDECODABLE = "\udcff"
_REASONS = {
    "undecodable bytes": re.compile("[\udc80-\udcff]"),
    "half of a surrogate pair": re.compile("[\ud800-\udc7f\udd00-\udfff]"),
    "NUL: UTF-16 without a byte order mark?": re.compile("\0"),
}
_INVALID = re.compile("[\0\ud800-\udfff]")


class Cleaned(NamedTuple):
    """A caption (None: missing or blank) and what was replaced in it (None: nothing)."""

    text: str | None
    fault: str | None = None


def clean(text: str | None) -> Cleaned:
    """A caption without outer blanks and byte order marks. What no encoding can hold (lone surrogates), and NUL, is
    replaced by U+FFFD and counted in `fault`. A blank caption is None."""
    text = (text or "").strip(_OUTER)
    replaced, count = _INVALID.subn("\ufffd", text)
    if not count:
        return Cleaned(text or None)
    reasons = ", ".join(reason for reason, pattern in _REASONS.items() if pattern.search(text))
    characters = "1 character" if count == 1 else f"{count} characters"
    return Cleaned(replaced, f"{characters} of the caption replaced by U+FFFD ({reasons})")


def decode(content: bytes) -> str:
    """Text with \\n for line ends, decoded as its byte order mark says, or as UTF-8. Never fails: what cannot be
    decoded becomes lone surrogates, which `clean` replaces."""
    encoding, mark = _encoding(content)
    try:
        text = content[len(mark) :].decode(encoding, _errors(encoding))
    except UnicodeDecodeError:  # UTF-16 or UTF-32, cut off
        text = content[len(mark) :].decode(encoding, "replace").replace("\ufffd", _UNDECODABLE)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def reader(stream: Any) -> io.TextIOWrapper:
    """The same for a binary stream, to be read in steps, with its own line ends. UnicodeDecodeError, while it is read,
    for UTF-16 or UTF-32 that is cut off."""
    buffered = io.BufferedReader(stream, 1 << 20)  # what comes over HTTP cannot seek
    encoding, mark = _encoding(buffered.peek(4)[:4])
    buffered.read(len(mark))
    return io.TextIOWrapper(buffered, encoding=encoding, errors=_errors(encoding), newline="")


def from_json(content: bytes | str) -> Any:
    """A JSON value. ValueError for what is none, too large, nested too deeply, or has two values of one name."""
    if not isinstance(content, str):
        guessed = json.detect_encoding(content)  # UTF-16 and UTF-32 without a mark too, by the first two characters
        marked = _encoding(content)[1] or guessed == "utf-8"
        content = decode(content) if marked else content.decode(guessed, "surrogatepass")
    return parse(content, "the text", "a caption")


def chosen(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these keys' values that is not blank. ValueError for one that is no string."""
    for key in keys:
        value = row.get(key)
        if not isinstance(value, str | None):
            raise ValueError(f"the caption is not a string but {quoted(value)}")
        if present(value) is not None:
            return value
    return None


def present(text: str | None) -> str | None:
    """A caption as it is, still to be cleaned; None where it is blank."""
    return None if clean(text).text is None else text


def _encoding(start: bytes) -> tuple[str, bytes]:
    """By the byte order mark, which comes too; UTF-8 without one."""
    return next(((encoding, mark) for mark, encoding in _MARKS.items() if start.startswith(mark)), ("utf-8", b""))


def _errors(encoding: str) -> str:
    """How what is invalid in an encoding becomes lone surrogates."""
    return "surrogateescape" if encoding == "utf-8" else "surrogatepass"
