"""Escaping of untrusted text in messages: printable, on one line and truncated.

Use these functions to print names and values from files (tensors, settings, tokens, captions) and messages of other
libraries. Control characters, line breaks and lone surrogates become escapes.
"""

import reprlib
from typing import Any

LONGEST = 80
"""Maximum characters of a name or value in a message."""


class Note(UserWarning):
    """Information for the user, such as an automatic choice, where nothing is wrong; shown as a note, not a warning."""


def quoted(value: Any, most: int = LONGEST) -> str:
    """`repr` of a value in about `most` characters: long text is truncated, collections show their first items."""
    if isinstance(value, str):
        return _cut(repr(value[:most]), value, most)
    shown = _Short().repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}…"


def plain(text: str, most: int = LONGEST) -> str:
    """Text without quotes: runs of whitespace become one space, unprintable characters are escaped."""
    words = " ".join(text[:most].split())
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in words), text, most)


def reason(error: BaseException, most: int = 400) -> str:
    """The message of another library's error as `plain` text, or its type if the message is empty."""
    return plain(str(error).strip(), most) or type(error).__name__


def _cut(shown: str, text: str, most: int) -> str:
    return shown if len(text) <= most else f"{shown}… ({len(text)} characters)"


class _Short(reprlib.Repr):
    """Shows a few levels of nesting, with a few items on each."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 6, 8, 8
        self.maxstring = self.maxlong = self.maxother = LONGEST

    def repr_str(self, value: str, level: int) -> str:
        return _cut(repr(value[: self.maxstring]), value, self.maxstring)
