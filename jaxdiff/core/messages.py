"""Foreign text in messages: escaped, on one line, and cut, so that no file decides what a terminal shows.

Names and values that come out of a file (tensors, settings, tokens, captions) and the messages of other libraries pass
through here wherever they are printed. Control characters, line breaks and lone surrogates become escapes.
"""

import reprlib
from typing import Any

LONGEST = 80
"""Characters of a name or a value that are shown."""


class Note(UserWarning):
    """What was chosen or found, for people to see, where nothing is wrong: a warning that is shown as a note."""


def quoted(value: Any, most: int = LONGEST) -> str:
    """`repr` of a value in about `most` characters: long text is cut, of lists and groups the first items are shown."""
    if isinstance(value, str):
        return _cut(repr(value[:most]), value, most)
    shown = _Short().repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}…"


def plain(text: str, most: int = LONGEST) -> str:
    """Text without quotes: each run of whitespace is one space, what cannot be printed is escaped."""
    words = " ".join(text[:most].split())
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in words), text, most)


def reason(error: BaseException, most: int = 400) -> str:
    """What an error of another library says, as `plain` text; its type where it says nothing."""
    return plain(str(error).strip(), most) or type(error).__name__


def _cut(shown: str, text: str, most: int) -> str:
    return shown if len(text) <= most else f"{shown}… ({len(text)} characters)"


class _Short(reprlib.Repr):
    """Nested to a few levels, with a few items on each."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 6, 8, 8
        self.maxstring = self.maxlong = self.maxother = LONGEST

    def repr_str(self, value: str, level: int) -> str:
        return _cut(repr(value[: self.maxstring]), value, self.maxstring)
