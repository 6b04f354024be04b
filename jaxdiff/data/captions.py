"""Captions as encodable text: decoding by byte order mark, JSON, and one cleaning function.

Undecodable bytes first become lone surrogates, like half an emoji in JSON ("\\ud83d"). `clean` replaces them all by
U+FFFD and reports it, so that sources can name the row and readers can count or refuse it.
"""

import codecs
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.core.json_files import parse
from jaxdiff.core.messages import quoted

# The longer marks come first: UTF-32's starts with UTF-16's.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_OUTER = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff"  # U+3000 is the last whitespace character
_UNDECODABLE = "\udcff"
_REASONS = {
    "undecodable bytes": re.compile("[\udc80-\udcff]"),
    "half of a surrogate pair": re.compile("[\ud800-\udc7f\udd00-\udfff]"),
    "NUL: UTF-16 without a byte order mark?": re.compile("\0"),
}
_INVALID = re.compile("[\0\ud800-\udfff]")


class Cleaned(NamedTuple):
    """A caption (None: missing or blank) and a description of replaced characters (None: none)."""

    text: str | None
    fault: str | None = None


def clean(text: str | None) -> Cleaned:
    """Strip outer whitespace and byte order marks. Lone surrogates and NUL are replaced by U+FFFD and counted in
    `fault`. A blank caption becomes None."""
    text = (text or "").strip(_OUTER)
    replaced, count = _INVALID.subn("\ufffd", text)
    if not count:
        return Cleaned(text or None)
    reasons = ", ".join(reason for reason, pattern in _REASONS.items() if pattern.search(text))
    characters = "1 character" if count == 1 else f"{count} characters"
    return Cleaned(replaced, f"{characters} of the caption replaced by U+FFFD ({reasons})")


def decode(content: bytes) -> str:
    """Decode by byte order mark, or as UTF-8, with \\n line ends. Never fails: undecodable bytes become lone
    surrogates, which `clean` replaces."""
    encoding, mark = _encoding(content)
    try:
        text = content[len(mark) :].decode(encoding, _errors(encoding))
    except UnicodeDecodeError:  # UTF-16 or UTF-32, cut off
        text = content[len(mark) :].decode(encoding, "replace").replace("\ufffd", _UNDECODABLE)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def reader(stream: Any) -> io.TextIOWrapper:
    """`decode` for a binary stream, read incrementally, with its own line ends. Reading raises UnicodeDecodeError for
    truncated UTF-16 or UTF-32."""
    buffered = io.BufferedReader(stream, 1 << 20)  # an HTTP stream cannot seek
    encoding, mark = _encoding(buffered.peek(4)[:4])
    buffered.read(len(mark))
    return io.TextIOWrapper(buffered, encoding=encoding, errors=_errors(encoding), newline="")


def from_json(content: bytes | str) -> Any:
    """A JSON value. ValueError if it is invalid, too large, nested too deeply, or has duplicate names."""
    if not isinstance(content, str):
        guessed = json.detect_encoding(content)  # UTF-16 and UTF-32 without a mark too, by the first two characters
        marked = _encoding(content)[1] or guessed == "utf-8"
        content = decode(content) if marked else content.decode(guessed, "surrogatepass")
    return parse(content, "the text", "a caption")


def chosen(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first non-blank value of these keys. ValueError if a value is not a string."""
    for key in keys:
        value = row.get(key)
        if not isinstance(value, str | None):
            raise ValueError(f"the caption is not a string but {quoted(value)}")
        if present(value) is not None:
            return value
    return None


def present(text: str | None) -> str | None:
    """The caption, not yet cleaned; None if it is blank."""
    return None if clean(text).text is None else text


def _encoding(start: bytes) -> tuple[str, bytes]:
    """The encoding and its byte order mark; UTF-8 without a mark."""
    return next(((encoding, mark) for mark, encoding in _MARKS.items() if start.startswith(mark)), ("utf-8", b""))


def _errors(encoding: str) -> str:
    """The error handler that turns invalid bytes into lone surrogates."""
    return "surrogateescape" if encoding == "utf-8" else "surrogatepass"
