"""Prepare plain English for T5: the definitions of WordNet 3.0, one per line, from Debian's package `wordnet-base`.

    python -m experiments.recipes.glosses
    python -m experiments.train t5 --texts runs/data/glosses.txt --out runs/t5

Cost: a 6 MB download by apt-get (without root, without installation), seconds. Result: 117,659 lines. If the package is
installed, it is read from /usr/share/wordnet. `--source` reads a folder with data.noun, data.verb, data.adj and
data.adv of WordNet's own distribution. Princeton's licence allows use, copies and distribution of WordNet for any
purpose; jaxdiff contains no part of it.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.cli import run
from jaxdiff.core.files import replacing, usable

PACKAGE = "wordnet-base"
INSTALLED = Path("/usr/share/wordnet")
PARTS = ("data.noun", "data.verb", "data.adj", "data.adv")


def main(data_dir: Path = Path("runs/data"), source: Path | None = None) -> None:
    """Write the definitions of WordNet as a text file.

    Args:
        data_dir: folder for glosses.txt.
        source: a folder with data.noun etc.; default: the installed package, or a downloaded one.
    """
    usable(data_dir)
    with tempfile.TemporaryDirectory() as temporary:
        folder = source or (INSTALLED if _is_complete(INSTALLED) else fetched(Path(temporary)))
        if not _is_complete(folder):
            raise FileNotFoundError(f"{folder}: not WordNet's files, which are {', '.join(PARTS)}")
        lines = list(glosses(folder))
    with replacing(data_dir / "glosses.txt") as file:
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{data_dir / 'glosses.txt'}: {len(lines)} definitions")


def glosses(folder: Path) -> Iterator[str]:
    """Each synset's definition, without its examples. ValueError for an unknown line."""
    for part in PARTS:
        for number, line in enumerate((folder / part).read_text(encoding="latin-1").split("\n"), 1):
            if not line or line.startswith("  "):  # the licence, and the end of the file
                continue
            _, bar, gloss = line.partition(" | ")
            if not bar:
                raise ValueError(f"{folder / part}:{number}: not a line of WordNet's")
            definition = gloss.partition('; "')[0].strip()
            if definition:
                yield definition


def fetched(folder: Path) -> Path:
    """Download and unpack the package below `folder`. OSError with the alternative if it fails."""
    advice = (
        f"fetch the Debian package {PACKAGE} yourself, unpack it with dpkg-deb -x, and name its folder with --source"
    )
    for command in ("apt-get", "dpkg-deb"):
        if shutil.which(command) is None:
            raise FileNotFoundError(f"{command} is not installed: {advice}")
    for command in (["apt-get", "download", PACKAGE], ["sh", "-c", "dpkg-deb -x *.deb unpacked"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise OSError(f"{command[0]} could not fetch {PACKAGE} ({reason}): {advice}")
    return folder / "unpacked" / INSTALLED.relative_to("/")


def _is_complete(folder: Path) -> bool:
    return all((folder / part).is_file() for part in PARTS)


if __name__ == "__main__":
    run(main)
