"""A folder of captioned images for the tour of the README: OpenMoji artwork with its names as captions.

    python -m experiments.recipes.openmoji --out photos

Writes OUT/NAME.png (256×256) and OUT/NAME.txt for 300 animals, plants, dishes, places and things, evenly spread over
the collection. Takes half a minute, and 4 MB from npm once. Without npm or the network, put the tarball into the folder
named by the error message and run it again. The artwork is by OpenMoji (openmoji.org), CC BY-SA 4.0, which requires
attribution.
"""

import json
import tarfile
import zlib
from pathlib import Path

from experiments.cli import run
from experiments.recipes.emoji_data import tarball_of
from jaxdiff.core.files import replacing
from jaxdiff.data.emoji import draw

PACKAGE = "openmoji"
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")


def main(out: Path = Path("photos"), count: int = 300, side: int = 256, packages: Path = Path("runs/data/npm")) -> None:
    """Write a folder of captioned images.

    Args:
        out: the output folder.
        count: number of images.
        side: side of the images in pixels.
        packages: folder of the npm package; an existing tarball is used.
    """
    tarball = tarball_of(PACKAGE, packages)
    try:
        with tarfile.open(tarball) as archive:
            usable = [entry for entry in json.loads(_read(archive, "data/openmoji.json")) if _is_usable(entry)]
            artwork = {entry["annotation"]: _read(archive, f"color/svg/{entry['hexcode']}.svg") for entry in usable}
    except (KeyError, ValueError, tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{tarball}: not the npm package {PACKAGE} ({error}); delete it and run again") from error
    if not 1 <= count <= len(artwork):
        raise ValueError(f"count {count}: there are {len(artwork)}")
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        name = list(artwork)[index * len(artwork) // count]
        stem = "-".join(name.replace(".", "").replace("’", " ").lower().split())
        for file, content in (
            (f"{stem}.png", draw(artwork[name].decode(), side)),
            (f"{stem}.txt", f"{name}\n".encode()),
        ):
            with replacing(out / file) as temporary:
                temporary.write_bytes(content)
    print(f"{out}: {count} images of {side} pixels with captions")


def _is_usable(entry: dict) -> bool:
    return entry["group"] in GROUPS and not entry["skintone"] and not set(entry["annotation"]) & set("/:")


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/{name}")
    if file is None:
        raise KeyError(name)
    return file.read()


if __name__ == "__main__":
    run(main)
