"""Prepare the emoji dataset: download artwork and names from npm, rasterise every emoji at 64, 256 and 1024 pixels.

    python -m experiments.recipes.emoji_data

Cost: 10 MB of downloads; on one core about 5 s at 64, 30 s at 256 and 5 minutes at 1024 pixels; 120 MB in total.
Result: 1,644 images at each size below runs/data/noto_emoji/, for `--data emoji`. Without npm or the network, put the
two tarballs into the folder named by the error message and run it again.
"""

import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

from experiments.cli import run
from jaxdiff.core.files import replacing
from jaxdiff.data import emoji

PACKAGES = {emoji.ARTWORK: "@iconify-json/noto", emoji.NAMES: "emojibase-data"}


def main(
    data_dir: Path = Path("runs/data"),
    resolutions: tuple[int, ...] = emoji.RESOLUTIONS,
    packages: Path | None = None,
) -> None:
    """Prepare the emoji dataset.

    Args:
        data_dir: folder of prepared datasets.
        resolutions: the sizes to rasterise.
        packages: folder of the npm packages; existing tarballs are used; default: DATA_DIR/npm.
    """
    folder = packages or data_dir / "npm"
    for name, package in PACKAGES.items():
        fetch(package, folder, name)
    for resolution in resolutions:
        builder = emoji.prepare(resolution, data_dir, folder)
        print(f"emoji at {resolution}: {builder.info.splits['train'].num_examples} images in {builder.data_dir}")


def fetch(package: str, folder: Path, name: str) -> None:
    """Unpack the needed files of an npm package into `folder/name`, from an existing tarball or `npm pack`."""
    if all((folder / name / file).is_file() for file in emoji.FILES[name]):
        return
    tarball = tarball_of(package, folder)
    try:
        with tarfile.open(tarball) as archive:
            for file in emoji.FILES[name]:
                member = archive.getmember(f"package/{file}")
                target = folder / name / file
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    temporary.write_bytes(archive.extractfile(member).read())
    except (KeyError, tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{tarball}: not the npm package {package} ({error}); delete it and run again") from error


def tarball_of(package: str, folder: Path) -> Path:
    """The newest tarball of an npm package in `folder`, downloaded if absent. OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    return _newest(package, folder) or _npm_pack(package, folder)


def _npm_pack(package: str, folder: Path) -> Path:
    advice = f"put the tarball of {package} ({_stem(package)}-VERSION.tgz) into {folder} and run again"
    if shutil.which("npm") is None:
        raise FileNotFoundError(f"npm is not installed: {advice}")
    done = subprocess.run(
        ["npm", "pack", "--loglevel=error", "--fetch-retries=1", package],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    tarball = _newest(package, folder)
    if done.returncode or tarball is None:
        reason = "; ".join(done.stderr.strip().splitlines()[:2]) or "no tarball came"
        raise OSError(f"npm could not fetch {package} ({reason}): {advice}")
    return tarball


def _newest(package: str, folder: Path) -> Path | None:
    return max(folder.glob(f"{_stem(package)}-*.tgz"), key=lambda file: file.stat().st_mtime, default=None)


def _stem(package: str) -> str:
    """npm's name of a package's tarball: `@scope/name` becomes `scope-name`."""
    return package.removeprefix("@").replace("/", "-")


if __name__ == "__main__":
    run(main)
