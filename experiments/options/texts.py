"""Text files with one text per line."""

import io
from pathlib import Path

from jaxdiff.data import captions


def lines(path: Path) -> list[str]:
    """The non-blank lines, stripped.

    Only \\n and \\r\\n end a line: other Unicode separators, and \\r within a line, are part of the text. UTF-8, or the
    encoding of a byte order mark (UTF-16, UTF-32), which is removed.

    Raises:
        ValueError: the file is not in such an encoding (the message names the first bad line), or all lines end with
            \\r only, as on old Macs.
    """
    try:
        text = captions.reader(io.BytesIO(path.read_bytes())).read()  # keeps the line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cut off, or not what its byte order mark says ({error})") from error
    if "\n" not in text and "\r" in text.strip():
        raise ValueError(f"{path}: its lines end with carriage returns alone; save it with line feeds")
    stripped = []
    for number, line in enumerate(text.split("\n"), 1):
        cleaned = captions.clean(line)
        if cleaned.fault is not None:
            raise ValueError(f"{path}:{number}: not text in UTF-8, nor marked as UTF-16; save the file as UTF-8")
        if cleaned.text is not None:
            stripped.append(cleaned.text)
    return stripped
