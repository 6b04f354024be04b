"""Folders for images: none is written over by accident."""

from pathlib import Path

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def has_images(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in IMAGES for path in folder.iterdir())


def folder_for_images(given: Path | None, default: Path, overwrite: bool) -> Path:
    """The folder that is given; without one, `default` or the first of `default-2`, `default-3`, … without images.

    ValueError for a given one that has images, unless they may be overwritten.
    """
    if given is not None:
        if has_images(given) and not overwrite:
            raise ValueError(f"--out {given}: has images already; name another folder, or allow it with --overwrite")
        return given
    folder, number = default, 1
    while has_images(folder) and not overwrite:
        number += 1
        folder = default.with_name(f"{default.name}-{number}")
    return folder
