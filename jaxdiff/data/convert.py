"""Convert large captioned datasets into the ArrayRecord files of records.py.

    tar shards   the webdataset layout: KEY.jpg (png, webp, …) is the image; KEY.txt is its caption, or KEY.json
                 contains it (tar_shards.py defines keys)
    lists        CSV or Parquet with a column of image paths (relative to the list) and one of captions (lists.py)
    Parquet      with the images in a column, as on the Hugging Face hub (parquet_images.py)
    folders      of images with captions in .txt files or in metadata.jsonl (folder.py), or in the layout of the Hugging
                 Face hub (hugging_face.py)

The work is split into pieces: a tar file, or a run of rows or images. Each piece becomes one ArrayRecord file and one
small JSON report, both renamed into place when complete. A killed run loses only the pieces in progress; the same
command redoes those and no others. Skipped examples are counted by reason: a missing or damaged image, a missing
caption, an unused member of a tar file. An unreachable file or bucket stops the command, so that no images are lost.
`dataset.json` is written last and lists the pieces of the given inputs, so leftovers of other inputs are never read.
Paths with `://` use fsspec.
"""

import collections
import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from typing import Any

from jaxdiff.core.errors import ProcessLostError
from jaxdiff.core.files import remove_leftovers, write_json
from jaxdiff.core.json_files import read_object
from jaxdiff.core.messages import plain
from jaxdiff.core.settings import canonical
from jaxdiff.data import captions, images
from jaxdiff.data.array_records import new_records
from jaxdiff.data.fault import Fault
from jaxdiff.data.pieces import GUESSING, Piece, Settings, pieces
from jaxdiff.data.records import INDEX, is_count, pack


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a piece: its file and image count, the number skipped by kind of fault, and the first of each kind."""

    file: str
    source: str
    images: int
    skipped: dict[str, int]
    first: dict[str, str]
    replaced: int = 0
    """captions in which characters were replaced; `first` has one under REPLACED"""
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    """harmless unused members of tar files, by kind; `first` has one of each"""

    @property
    def fault(self) -> str | None:
        """The first line that is an error under strict."""
        return next((line for kind, line in self.first.items() if kind not in self.unused), None)


REPLACED = "characters replaced"


def convert(
    inputs: Iterable[str],
    out: Path | str,
    settings: Settings = GUESSING,
    *,
    processes: int = 1,
    progress: Callable[[Report], None] = lambda report: None,
) -> dict:
    """Convert `inputs` (.tar, .csv, .parquet; local or `://` paths; local folders) into the folder `out`.

    Returns the content of dataset.json. `processes` pieces run in parallel (1: in this process). `progress` is called
    with each report, including those of an earlier run. ValueError or OSError for an unreadable input,
    ProcessLostError if a process was killed; finished pieces are kept, and an older dataset.json stays valid.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reports = []
    for report in _run(pieces(inputs, settings), out, settings, processes):
        progress(report)
        reports.append(report)
    index = _index(reports, settings)
    if not index["images"]:
        left_out = index["skipped"] | index["unused"]
        raise ValueError(f"no usable image in the inputs; left out: {left_out or 'nothing'}")
    write_json(out / INDEX, index)
    remove_leftovers(out)
    return index


def _index(reports: list[Report], settings: Settings) -> dict:
    skipped: collections.Counter[str] = collections.Counter()
    unused: collections.Counter[str] = collections.Counter()
    for report in reports:
        skipped.update(report.skipped)
        unused.update(report.unused)
    return {
        "images": sum(report.images for report in reports),
        "skipped": dict(sorted(skipped.items())),
        "unused": dict(sorted(unused.items())),
        "replaced": sum(report.replaced for report in reports),
        "first": {kind: line for report in reversed(reports) for kind, line in report.first.items()},
        "settings": dataclasses.asdict(settings),
        "shards": [{"file": report.file, "source": report.source, "images": report.images} for report in reports],
    }


def convert_piece(piece: Piece, out: Path, settings: Settings) -> Report:
    """Convert one piece into an ArrayRecord file and its report, unless both exist already."""
    file = out / f"{_name(piece, settings)}.array_record"
    done = file.with_suffix(".json")
    if done.is_file() and file.is_file():
        try:
            report = _report(read_object(done, "a report"), file.name)
        except ValueError as error:
            raise ValueError(f"{done}: not a report of this converter ({error}); delete it") from error
        if settings.strict and report.fault and not settings.retry:
            raise ValueError(f"{shown(report.fault)} (strict)")
        if not (settings.retry and report.fault):
            return report
    skipped: collections.Counter[str] = collections.Counter()
    unused: collections.Counter[str] = collections.Counter()
    first: dict[str, str] = {}
    images = replaced = 0
    with new_records(file) as write:
        for name, image, raw in piece.examples(settings):
            caption, invalid = captions.clean(raw)
            fault = _fault(image, caption, settings)
            if fault is None and invalid is not None:
                fault = Fault(REPLACED, invalid) if settings.strict else None
                replaced += 1
                first.setdefault(REPLACED, f"{name}: {invalid}")
            if fault is None:
                assert not isinstance(image, Fault)  # otherwise it is the fault
                write(pack(image, caption, name))
                images += 1
            elif settings.strict and not fault.harmless:
                raise ValueError(f"{shown(name)}: {shown(str(fault))} (strict)")
            else:
                (unused if fault.harmless else skipped)[fault.kind] += 1
                first.setdefault(fault.kind, f"{name}: {fault}")
    report = Report(file.name, piece.path, images, dict(skipped), first, replaced, dict(unused))
    write_json(done, dataclasses.asdict(report))  # last: a file without its report is incomplete
    return report


def shown(text: str) -> str:
    """Text from an input, escaped for a message, so that inputs cannot control the terminal."""
    return plain(text, 400)


def _report(values: Mapping[str, Any], file: str) -> Report:
    """The report of the output `file`. ValueError if it was not written by a conversion."""
    expected = {field.name for field in dataclasses.fields(Report)}
    if set(values) - expected:
        raise ValueError("it has other entries than a report")
    counts = [values.get("skipped"), values.get("unused", {})]
    first = values.get("first")
    texts = [values.get("file"), values.get("source"), *(first.values() if isinstance(first, dict) else [None])]
    numbers = [values.get("images"), values.get("replaced", 0)]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(each, dict) for each in counts):
        raise ValueError("a text or a group of counts is missing, or something else")
    if not all(is_count(number) for number in (*numbers, *(number for each in counts for number in each.values()))):
        raise ValueError("a count is missing, or not an integer of at least 0")
    report = Report(**values)
    if report.file != file:
        raise ValueError("it is about another file")
    if ({*report.skipped, *report.unused} | ({REPLACED} if report.replaced else set())) - set(report.first):
        raise ValueError("it names no example of something left out")
    return report


def _run(work: Iterator[Piece], out: Path, settings: Settings, processes: int) -> Iterator[Report]:
    """The reports in the order of the pieces: the dataset's order must not depend on timing."""
    if processes <= 1:
        yield from (convert_piece(piece, out, settings) for piece in work)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (JAX's, fsspec's) can hang
    with _lost_processes(), ProcessPoolExecutor(processes, mp_context=context, initializer=_die_with_parent) as pool:
        queue: collections.deque = collections.deque()
        try:
            for piece in work:
                queue.append(pool.submit(convert_piece, piece, out, settings))
                if len(queue) >= 4 * processes:  # bounded: queued pieces hold their rows in memory
                    wait(queue, return_when=FIRST_COMPLETED)
                while queue and (queue[0].done() or len(queue) >= 8 * processes):
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


@contextlib.contextmanager
def _lost_processes() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ProcessLostError(
            "a process of the conversion was killed, perhaps because memory ran out: start again, with fewer processes "
            "if it happens again; the files that are done are kept"
        ) from error


def _die_with_parent() -> None:
    """Exit with the parent: workers of a killed command would otherwise wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _fault(image: bytes | Fault, caption: str | None, settings: Settings) -> Fault | None:
    if isinstance(image, Fault):
        return image
    if not settings.images_only and caption is None:
        return Fault("no caption")
    if not image:
        return Fault("unreadable", "an empty file")
    if settings.verify:
        try:
            images.decode(image)
        except images.Unreadable as error:
            return Fault("unreadable", str(error))
    return None


def _name(piece: Piece, settings: Settings) -> str:
    """The output's name, which contains a hash of the piece and of the settings that affect it."""
    what = (piece.identity(), settings.images_only, settings.verify, settings.caption_key)
    stem = PurePosixPath(piece.path).name.partition(".")[0]
    return f"{stem}-{hashlib.blake2b(canonical(what), digest_size=8).hexdigest()}"
