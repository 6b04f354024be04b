"""dalle-mini's form of captions: lower-case ASCII with commas as the only punctuation.

Three of its steps are left out, because they need dictionaries: names of emojis (which are dropped), letters of other
scripts (dropped too), and the words within hashtags (which stay one word).
"""

import html
import re
import unicodedata
from typing import NamedTuple


class _Step(NamedTuple):
    """Replace all matches of `pattern` with `replacement`."""

    pattern: re.Pattern[str]
    replacement: str
    why: str


_STEPS = (
    _Step(re.compile(r"\A\s*\[\d+\]|\[\d+\]\s*\Z"), "", "numbers of references"),
    _Step(re.compile(r"<[^<>]+>"), " ", "tags"),
    _Step(re.compile(r"\bhttps?:\S*"), "", "addresses"),
    _Step(re.compile(r"(?<=\d),(?=\d{3})"), "", "commas within numbers"),
    _Step(re.compile(r"(?<=\w)-(?=\w)"), " ", "compounds become words"),
    _Step(re.compile(r"(?<!\d)/|/(?!\d)|[%&$*]"), r" \g<0> ", "signs stand alone, except in dates"),
    _Step(re.compile(r"[_#\\]"), " ", "signs without meaning"),
    _Step(re.compile(r"[\"`]|'(?!(?:[stdm]|ll|re|ve)\b)"), ' " ', "one kind of quote, except in contractions"),
    _Step(re.compile(r"[()\[\],|:;?!=+~{}-]|(?<!\d)/|/(?!\d)|(?<!\w)\.|\.(?!\w)"), ",", "except in 1.5 and dates"),
    _Step(re.compile(r"(\D)\1{3,}"), r"\1", "a character that stands four times or more"),
    _Step(re.compile(r'(?:\s*"+\s*)+'), ' " ', "repeated quotes"),
    _Step(re.compile(r"(?:\s*,+\s*)+"), ", ", "repeated commas"),
    _Step(re.compile(r"\s+"), " ", "repeated spaces"),
    _Step(re.compile(r"\A\s*,|,\s*\Z"), "", "outer commas"),
)


def simplified(caption: str) -> str:
    """The caption with one space before it, since a word's first token includes its space; "" if nothing is left."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    for step in _STEPS:
        text = step.pattern.sub(step.replacement, text)
    text = text.strip()
    return f" {text}" if text else ""
