"""Damaged record files and lost worker processes: what can be left out is counted, all else is one line."""

import json
import multiprocessing
import os
import shutil
import signal
import warnings
from types import SimpleNamespace

import grain
import numpy as np
import pytest

from experiments.cli import run
from jaxdiff.core.errors import ProcessLostError
from jaxdiff.data import convert, embeddings, images, parts, pipeline, records, shapes, sources, tfds_sets
from jaxdiff.data.array_records import new_records
from jaxdiff.data.example import captions
from jaxdiff.data.pipeline import DataConfig, ReadAhead, image_batches
from jaxdiff.text.encoder import TextEmbedding

COUNT = 8
DATA = 20_000  # a byte in the middle of record 1: each holds 12 kB of noise


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A converted set of two files, of 5 and 3 images."""
    folder = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    rows = ["path,caption"]
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(images.encode_png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
        rows.append(f"{i}.png,number {i}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    convert.convert([str(folder / "list.csv")], folder / "records", convert.Settings(rows_per_file=5))
    return folder / "records"


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "records")
    return tmp_path / "records"


def shards(folder):
    return [folder / shard["file"] for shard in json.loads((folder / "dataset.json").read_text())["shards"]]


def flip(file, *places):
    content = bytearray(file.read_bytes())
    for place in places:
        content[place] ^= 4
    file.write_bytes(content)


def everything(folder, **settings):
    """The captions that come out in one epoch, and what was skipped."""
    source = sources.open(sources.Records(folder), 64, "train", "")
    batches = image_batches(source, DataConfig(64, 3, repeat=False, shuffle=False, captions=True, **settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = [caption for batch in batches for caption in batch["caption"].tolist()]
    return seen, batches.skipped, [str(warning.message) for warning in caught]


def test_a_whole_set(whole):
    assert everything(whole)[0] == [f"number {i}" for i in range(COUNT)]


def test_a_damaged_record_is_skipped_and_counted(copy):
    """In the first file, and in the second, whose records are counted from 0 again."""
    first, second = shards(copy)
    flip(first, DATA)
    flip(second, DATA)
    seen, skipped, lines = everything(copy)
    assert len(seen) == COUNT - 2 and skipped.reasons == {"unreadable": 2}
    for line, file in zip(lines, (first, second), strict=True):
        assert f"{file}, record 1" in line
        assert "damaged" in line and "\n" not in line


def test_every_damaged_record_is_one(copy):
    """Zeros over the head of the file and over several records, and a flip of each byte in a stretch."""
    first, _ = shards(copy)
    intact = first.read_bytes()
    for start, stop in ((0, 100), (0, 15_000), (10_000, 40_000)):
        first.write_bytes(intact[:start] + bytes(stop - start) + intact[stop:])
        seen, skipped, _ = everything(copy)
        assert len(seen) + skipped.count == COUNT and 1 <= skipped.count <= 5 and set(skipped.reasons) == {"unreadable"}
    for place in range(20_000, 20_040):
        first.write_bytes(intact)
        flip(first, place)
        seen, skipped, _ = everything(copy)
        assert (len(seen), skipped.count) == (COUNT - 1, 1), place


def test_strict_names_the_file_and_the_record(copy, capsys):
    file = shards(copy)[0]
    flip(file, DATA)

    def main() -> None:
        everything(copy, strict=True)

    with pytest.raises(SystemExit) as ended:
        run(main, [])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and line.endswith("(strict)")
    assert f"{file}, record 1: damaged" in line and "run the command that made it again" in line


CUTS = {
    "its end": lambda content: content[:-100],
    "half": lambda content: content[: len(content) // 2],
    "all but the head": lambda content: content[:1000],
    "everything": lambda content: b"",
    "the footer's first bytes": lambda content: content[:-65_536] + bytes(600) + content[-64_936:],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_file_of_which_nothing_can_be_read_is_an_error(copy, cut, capsys):
    file = shards(copy)[1]
    file.write_bytes(CUTS[cut](file.read_bytes()))

    def main() -> None:
        sources.open(sources.Records(copy), 64, "train", "")

    with pytest.raises(SystemExit) as ended:
        run(main, [])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert line.startswith(f"error: {file}: damaged (0 records where there should be 3); delete the file and run")


def test_a_file_of_another_set_is_an_error(copy):
    first, second = shards(copy)
    shutil.copyfile(first, second)
    with pytest.raises(ValueError, match=rf"{second}: damaged \(5 records where there should be 3\)"):
        records.read(copy)


def test_what_the_error_says_mends_the_set(whole, copy):
    """Delete the file, convert again: that piece alone is done."""
    first, second = shards(copy)
    second.write_bytes(b"")
    second.unlink()
    listed = whole.parent / "list.csv"
    before = first.stat().st_mtime_ns
    convert.convert([str(listed)], copy, convert.Settings(rows_per_file=5))
    assert first.stat().st_mtime_ns == before
    assert everything(copy)[0] == [f"number {i}" for i in range(COUNT)]


def test_a_file_that_goes_after_the_start_ends_the_run(copy):
    """It must not be counted as so many unreadable images."""
    source = records.read(copy)
    shards(copy)[1].unlink()
    with pytest.raises(ValueError, match=r"array_record: missing"):
        list(image_batches(source, DataConfig(64, 3, repeat=False)))


def test_records_of_another_program_are_named(copy):
    first, _ = shards(copy)
    for content in (b"", b"abc", b"\xff\xff\xff\x7f{}", b"\x02\x00\x00\x00[]", b"\x02\x00\x00\x00{}"):
        with new_records(first) as write:
            for _ in range(5):
                write(content)
        with pytest.raises(ValueError, match=r"record 0: not written by experiments\.convert"):
            everything(copy)


def test_a_failing_disk_is_no_damage(copy, monkeypatch):
    """Reads that fail for another reason end the run: a moment's failure must not cost images."""

    source = records.read(copy)
    reader = SimpleNamespace(read=lambda places: exec("raise RuntimeError('Input/output error; reading')"))
    monkeypatch.setattr(parts.Parts, "_reader", lambda *_: reader)
    with pytest.raises(ValueError, match=r"array_record: cannot be read \(Input/output error\)"):
        list(image_batches(source, DataConfig(64, 3, repeat=False)))


def test_captions_of_damaged_records_are_missing(copy):
    flip(shards(copy)[0], DATA)
    read = list(captions(records.read(copy)))
    assert read.count(None) == 1 and len(read) == COUNT


def test_damaged_embeddings_name_the_file_and_the_record(copy):
    """They can be made again, so that nothing is left out for them."""

    def encode(texts):
        return TextEmbedding(np.ones((len(texts), 40, 900)), np.ones((len(texts), 40), bool))

    source = records.read(copy)
    path = copy.parent / "text"
    stored = embeddings.store_embeddings(captions(source), encode, path, encoder="ones", batch=4, part=5)
    flip(path / "part-00001.array_record", 100_000)
    with pytest.raises(ValueError, match=r"part-00001\.array_record, record 1: damaged .*run the command that made it"):
        list(image_batches(source, DataConfig(64, 3, repeat=False), stored))


@pytest.fixture
def prepared(tmp_path):
    """A small set of TFDS, and its one file of training examples."""
    folder = shapes.prepare(512, tmp_path, train=30, held_out=1)
    source = tfds_sets.Captioned(folder, "train[10:]")
    (file,) = tmp_path.rglob("*train*array_record*")
    return source, file


def test_a_damaged_record_of_tfds_is_skipped_and_counted(prepared):
    source, file = prepared
    flip(file, 70_000)
    batches = image_batches(source, DataConfig(64, 5, repeat=False))
    with pytest.warns(UserWarning, match=r"train.*array_record.*, record \d+: damaged .*prepared again"):
        assert sum(len(batch["image"]) for batch in batches) == 19
    assert batches.skipped.reasons == {"unreadable": 1}
    with pytest.raises(ValueError, match=r"record \d+: damaged .*\(strict\)"):
        list(image_batches(source, DataConfig(64, 5, repeat=False, strict=True)))


def test_a_cut_file_of_tfds_is_an_error(prepared):
    source, file = prepared
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=rf"{file.name}: damaged \(no records found\); delete the dataset's folder"):
        list(image_batches(source, DataConfig(64, 5, repeat=False)))


def ended_by(code):
    """Batches whose worker process ended, in Grain's words."""

    def read(_):
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Search the logs")

    return pipeline.Batches(grain.MapDataset.range(3).map(read).to_iter_dataset(), pipeline.Skipped(1, False))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGRTMIN + 1])
def test_a_worker_that_a_signal_ended_is_lost(number):
    with pytest.raises(ProcessLostError, match=rf"was ended by signal {int(number)} \(.+\), perhaps .*memory"):
        next(ended_by(-number))


def test_a_worker_that_ended_itself_is_a_bug():
    with pytest.raises(RuntimeError, match="exit code 1") as caught:
        next(ended_by(1))
    assert not isinstance(caught.value, ProcessLostError)


def test_a_killed_worker_process_is_worth_another_start(whole, capsys):
    """Exit code 71 and one line, of a real one; what it had read before is used first."""

    def main() -> None:
        batches = image_batches(records.read(whole), DataConfig(64, 3), read_ahead=ReadAhead(workers=1))
        next(batches)
        (worker,) = [child for child in multiprocessing.active_children() if "grain" in child.name]
        os.kill(worker.pid, signal.SIGKILL)
        for _ in batches:
            pass

    with pytest.raises(SystemExit) as ended:
        run(main, [])
    assert ended.value.code == 71
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: a worker process that reads data was ended by signal 9 (Killed)")
