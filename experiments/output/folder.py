"""Output folders for images, protected against accidental overwriting."""

from pathlib import Path

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def has_images(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in IMAGES for path in folder.iterdir())


def folder_for_images(given: Path | None, default: Path, overwrite: bool) -> Path:
    """The given folder; otherwise the first of `default`, `default-2`, `default-3`, … without images.

    ValueError if a given folder has images, unless `overwrite`.
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
