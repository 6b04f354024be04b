"""Convert captioned images to ArrayRecord: tar shards (webdataset), lists, Parquet files, folders.

    python -m experiments.convert --out runs/data/laion 'tars/*.tar' --processes 16
    python -m experiments.convert --out gathered photos.csv --image-column file --caption-column text

Then train with `--data records:runs/data/laion`. Inputs can be patterns and bucket paths (gs://…, s3://…, with the
`bucket` extra). If it is killed, run it again with the same arguments to resume; further inputs are added. Cost: about
1 ms per image and process at 256 pixels, mostly the decoding that verifies images (--no-verify skips it). Result: one
.array_record and one .json report per input file (or 10,000 rows of a list), and dataset.json with the counts of kept
images, of skipped images by reason, and of captions with replaced characters.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from experiments.cli import run
from jaxdiff.core.messages import plain
from jaxdiff.data import convert, remote
from jaxdiff.training.lock import locked

DEFAULTS = convert.Settings()


def main(
    inputs: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    processes: int = 1,
    settings: Annotated[convert.Settings, tyro.conf.arg(name="")] = DEFAULTS,
) -> None:
    """Convert captioned images to ArrayRecord.

    Args:
        inputs: .tar, .csv and .parquet files, folders of images, patterns or bucket paths.
        out: the folder to write.
        processes: files converted at the same time.
        settings: how to convert.
    """
    if not inputs:
        raise ValueError("no inputs: name .tar, .csv or .parquet files, or folders")
    files = [file for pattern in inputs for file in remote.expand(pattern)]
    # A second conversion into the folder would delete this one's files as leftovers.
    with locked(out), tqdm(desc="convert", unit=" images") as bar:

        def progress(report: convert.Report) -> None:
            bar.update(report.images)
            bar.set_postfix_str(plain(report.source))

        index = convert.convert(files, out, settings, processes=processes, progress=progress)
    print(f"{index['images']} images in {len(index['shards'])} files: --data records:{out}")
    first = {kind: convert.shown(line) for kind, line in index["first"].items()}
    for kind, count in index["skipped"].items():
        print(f"warning: skipped {count} × {plain(kind)}; the first: {first[kind]}", file=sys.stderr)
    for kind, count in index["unused"].items():
        print(f"note: {count} × {plain(kind)}; the first: {first[kind]}", file=sys.stderr)
    if index["replaced"]:
        line = f"characters replaced in {index['replaced']} captions; the first: {first[convert.REPLACED]}"
        print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
