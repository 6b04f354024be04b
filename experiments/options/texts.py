"""Text files that a user gives, one text a line."""

import io
from pathlib import Path

from jaxdiff.data import captions


def lines(path: Path) -> list[str]:
    """The lines that are not blank, without the spaces around them.

    A line ends with \\n or \\r\\n and with nothing else: other separators of Unicode belong to the text, as does a
    \\r within a line. UTF-8, or what a byte order mark says (UTF-16, UTF-32); the mark goes.

    Raises:
        ValueError: the file is not text in such an encoding (the message names the first such line), or all its lines
            end with \\r alone, as on old Macs.
    """
    try:
        text = captions.reader(io.BytesIO(path.read_bytes())).read()  # with the line ends of the file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cut off, or not what its byte order mark says ({error})") from error
    if "\n" not in text and "\r" in text.strip():
        raise ValueError(f"{path}: its lines end with carriage returns alone; save it with line feeds")
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        cleaned = captions.clean(line)
        if cleaned.fault is not None:
            raise ValueError(f"{path}:{number}: not text in UTF-8, nor marked as UTF-16; save the file as UTF-8")
        if cleaned.text is not None:
            found.append(cleaned.text)
    return found
