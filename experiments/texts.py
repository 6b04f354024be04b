"""Text files that a user gives, one text a line."""

import codecs
from pathlib import Path

# UTF-32's mark begins with UTF-16's, so it comes first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def lines(path: Path) -> list[str]:
    """The lines that are not blank, without the spaces around them.

    A line ends with \\n or \\r\\n and with nothing else: other separators of Unicode belong to the text, as does a
    \\r within a line. UTF-8, or what a byte order mark says (UTF-16, UTF-32); the mark goes.

    Raises:
        ValueError: the file is not text in such an encoding, or all its lines end with \\r alone, as on old Macs.
    """
    text = _decoded(path)
    if "\n" not in text and "\r" in text.strip():
        raise ValueError(f"{path}: its lines end with carriage returns alone; save it with line feeds")
    # Files that were joined have marks within.
    stripped = (line.strip().removeprefix("\ufeff").strip() for line in text.split("\n"))
    return [line for line in stripped if line]


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not {encoding.removesuffix('-sig').upper()} ({error})") from error
    if "\0" in text:
        raise ValueError(f"{path}: not text, it holds NUL characters; UTF-16 needs its byte order mark")
    return text
