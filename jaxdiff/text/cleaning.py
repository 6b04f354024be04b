"""DeepFloyd IF's caption cleaning before T5. A model trained on cleaned text needs it at sampling too.

Later rules apply to the output of earlier ones, so the order matters. Rules are merged where the result is the same.
"""

import html
import io
import re
from typing import NamedTuple
from urllib.parse import unquote_plus


class _Step(NamedTuple):
    """Replace all matches of `pattern` with `replacement`."""

    pattern: re.Pattern[str]
    replacement: str
    why: str


_SITE = r"[a-z0-9.-]+\.(?:com?|edu|gov|it|net|org|ru)[\w/-]*\b/?(?!@)"
_FILE_TYPE = r"(?:apk|bmp|eps|jpe?g|mp4|pdf|png|webp)"
_DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_TIMES = r"x\u0445\u00d7"  # the letter x, the similar Cyrillic letter, the multiplication sign
_JOINERS = re.compile("[-_]")

_ADDRESSES = (
    _Step(re.compile("<person>"), "person", "a dataset's placeholder for names, before it is parsed as a tag"),
    # Two steps, because the first can create a new match.
    _Step(re.compile(rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})"), "", "addresses"),
    _Step(re.compile(rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})"), "", "addresses, www: misspelt"),
)
"""Applied to lower-case text, before HTML is stripped."""

_MARKS = (
    _Step(re.compile(r"@\w+"), "", "nicknames"),
    _Step(re.compile(r"[\u31c0-\u9fff]+"), "", "CJK, from the strokes to the end of the unified ideographs"),
    _Step(re.compile(f"[{_DASHES}]+"), "-", "one dash for all kinds"),
    _Step(re.compile("[`\u00a8\u00ab\u00b4\u00bb\u201c\u201d]"), '"', "one double quote for all kinds"),
    _Step(re.compile("[\u2018\u2019]"), "'", "one single quote for all kinds"),
    _Step(re.compile("&quot;?"), "", "an entity that was escaped twice"),
    _Step(re.compile("&amp"), "", "likewise; the semicolon stays"),
    _Step(re.compile(r"\d{1,3}(?:\.\d{1,3}){3}"), " ", "IP addresses"),
    _Step(re.compile(r"\d:\d\d\s+\Z"), "", "the end of an article's id"),
    _Step(re.compile(r"\\n"), " ", "an escaped line break"),
    _Step(re.compile(r"#(?:\d{1,3}|\d{5,})\b"), "", "#123 and #12345, though not #1234"),
    _Step(re.compile(r"\b\d{6,}\b"), "", "long numbers"),
    _Step(re.compile(rf"\S+\.{_FILE_TYPE}"), "", "file names"),
    _Step(re.compile("[\"']{2,}"), '"', "repeated quotes"),
    _Step(re.compile(r"\.{2,}|[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+"), " ", "repeated dots, and symbols without meaning"),
    _Step(re.compile(r"\s+\.\s+"), " ", "an isolated dot"),
)
"""Applied to text without tags."""

_ADVERTS = (
    _Step(
        re.compile(r"\b(?:[a-zA-Z]{1,3}\d{3,15}|[a-zA-Z]+\d+[a-zA-Z]+|\d+[a-zA-Z]+\d+)\b"),
        "",
        "ids: jc6640, jc6640vc, 6640vc231",
    ),
    _Step(re.compile(r"(?:worldwide\s+)?(?:free\s+)?shipping"), "", "shops"),
    _Step(re.compile(r"(?:free\s)?download(?:\sfree)?"), "", "download sites"),
    _Step(re.compile(r"\bclick\s(?:for|on)\s\w+"), "", "click prompts"),
    _Step(re.compile(rf"\b{_FILE_TYPE}(?:\simages?)?"), "", "file types"),
    _Step(re.compile(r"\bpage\s+\d+\b"), "", "page numbers"),
    _Step(re.compile(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b"), " ", "ids: j2d1a2a"),
    _Step(re.compile(rf"\b\d+\.?\d*[{_TIMES}]\d+\.?\d*\b"), "", "sizes: 1920x1080"),
    _Step(re.compile(r"\b\s+:\s+"), ": ", "no space before a colon"),
    _Step(re.compile(r"(\D[,./])\b"), r"\1 ", "a space after a comma, a dot or a slash"),
    _Step(re.compile(r"\s+"), " ", "single spaces"),
    _Step(re.compile(r"\A[\"'](.+)[\"']\Z"), r"\1", "quotes around the caption"),
    _Step(re.compile(r"\A['_,:;-]|['_,:+-]\Z"), "", "one stray symbol at each end"),
    _Step(re.compile(r"\A\.\S+\Z"), "", "only a file extension"),
)
"""Applied to text with repaired characters; unescaped entities may have added upper case."""


def clean_caption(caption: str) -> str:
    """`caption` in lower case, without addresses, HTML, ids, CJK, advertising and stray symbols; may be "".

    Cleaned twice, as in IF, since a pass can create new matches. Never raises, unlike IF's code: HTML that cannot be
    parsed is kept as text, and half of a surrogate pair becomes U+FFFD.
    """
    return _clean(_clean(caption))


def _clean(caption: str) -> str:
    import ftfy

    text = _without_tags(_apply(_ADDRESSES, unquote_plus(caption).strip().lower()))
    text = _apply(_MARKS, text)
    if len(_JOINERS.findall(text)) > 3:  # this-is-my-cute-cat
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_ADVERTS, text).strip()


def _without_tags(text: str) -> str:
    from bs4 import BeautifulSoup, ParserRejectedMarkup  # imported here: it takes an eighth of a second

    try:
        # As a file object, because BeautifulSoup warns about strings that look like a file name or URL.
        return BeautifulSoup(io.StringIO(text), "html.parser").text
    except ParserRejectedMarkup:
        return text


def _apply(steps: tuple[_Step, ...], text: str) -> str:
    for step in steps:
        text = step.pattern.sub(step.replacement, text)
    return text
