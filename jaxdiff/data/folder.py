"""A folder of pictures with captions: `.txt` beside each picture, or one metadata.jsonl for all.

photos/cat.jpg  photos/cat.txt                          any depth; the whole text is the caption
photos/metadata.jsonl                                   {"file_name": "a/cat.jpg", "text": "a cat"}, one a line;
                                                        "caption" is read too
"""

import dataclasses
import json
from pathlib import Path

from jaxdiff.data.example import Example

METADATA = "metadata.jsonl"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """The pictures in order of their paths (or of metadata.jsonl); a caption of None is looked for in a `.txt`."""

    path: Path
    entries: tuple[tuple[str, str | None], ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        name, caption = self.entries[index]
        file = self.path / name
        return {"image": file.read_bytes(), "caption": caption or _text_beside(file), "name": str(file)}


def read(path: Path | str) -> FolderSource:
    """The examples of a folder. FileNotFoundError when it is not there or holds no picture."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    metadata = path / METADATA
    entries = _from_metadata(metadata) if metadata.is_file() else _from_files(path)
    if not entries:
        raise FileNotFoundError(f"{path}: no pictures there ({', '.join(sorted(SUFFIXES))})")
    return FolderSource(path, entries)


def _from_files(path: Path) -> tuple[tuple[str, None], ...]:
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return tuple((name, None) for name in sorted(file.relative_to(path).as_posix() for file in found))


def _from_metadata(metadata: Path) -> tuple[tuple[str, str | None], ...]:
    entries = []
    with metadata.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row["file_name"]
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise ValueError(f"{metadata}:{number}: not a JSON object with a file_name ({error})") from error
            caption = row.get("text") or row.get("caption")
            if not isinstance(caption, str | None):
                raise ValueError(f"{metadata}:{number}: the caption is not a string but {caption!r}")
            entries.append((str(name), caption))
    return tuple(entries)


def _text_beside(file: Path) -> str | None:
    try:
        return file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip() or None
    except FileNotFoundError:
        return None
