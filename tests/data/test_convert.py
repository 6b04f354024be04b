"""Conversion to ArrayRecord: everything once, nothing lost to a kill, damage counted, one line for bad input."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import convert as command
from experiments.cli import run
from jaxdiff.core import files
from jaxdiff.data import convert, images, records, remote
from jaxdiff.data.convert import Settings

PNG = images.encode_png(np.full((8, 8, 3), 7, np.uint8))


def write_tar(path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz" if str(path).endswith("gz") else "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def write_tars(folder, tars: int, each: int, png: bytes = PNG) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = []
    for t in range(tars):
        texts = {f"{i:03d}.txt": f"{t}/{i}".encode() for i in range(each)}
        pairs = {name: content for text in texts for name, content in ((text[:-3] + "png", png), (text, texts[text]))}
        paths.append(write_tar(folder / f"{t:03d}.tar", pairs))
    return paths


def captions(out) -> list[str]:
    source = records.read(out)
    return [source[i]["caption"] for i in range(len(source))]


def test_tar_shards(tmp_path):
    path = write_tar(
        tmp_path / "a.b.tar",
        {
            "x/1.png": PNG,
            "x/1.txt": b" one\n",
            "x/2.JPG": PNG,
            "x/2.json": json.dumps({"caption": "two", "other": 1}).encode(),
            "x/2.seg.png": b"another feature of example 2",
            "x/3.webp": PNG,
            "x/3.cls": b"7",
            "y/1.png": PNG[:45],
            "y/1.txt": b"damaged",
            "y/2.txt": b"alone",
        },
    )
    index = convert.convert([path], tmp_path / "out")
    source = records.read(tmp_path / "out")
    assert [(source[i]["caption"], source[i]["image"]) for i in range(len(source))] == [("one", PNG), ("two", PNG)]
    assert source[1]["name"] == f"{path}/x/2.JPG"
    assert index["images"] == 2 and index["skipped"] == {"no caption": 1, "no image": 1, "unreadable": 1}
    assert index["unused"] == {"member not used": 2} and index["first"]["member not used"].startswith(f"{path}/x/2.seg")
    assert index["first"]["no caption"].startswith(f"{path}/x/3")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == index


def test_images_alone_may_have_no_caption(tmp_path):
    path = write_tar(tmp_path / "a.tgz", {"1.png": PNG, "2.png": PNG, "2.txt": b"two"})
    index = convert.convert([path], tmp_path / "out", Settings(images_only=True))
    assert index["images"] == 2 and not index["skipped"] and captions(tmp_path / "out") == [None, "two"]


def write_list(folder, kind: str, rows: list[tuple[str, str | None]], columns=("path", "caption")) -> str:
    path = folder / f"list.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet lists need the parquet extra")
        import pyarrow

        parquet.write_table(pyarrow.table(dict(zip(columns, map(list, zip(*rows))))), path)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_lists(tmp_path, kind):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png", "c.png"):
        (tmp_path / name).write_bytes(PNG)
    whole = str(tmp_path / "sub/b.png")
    rows = [("a.png", 'one, "quoted"\nline'), (whole, "deux é"), ("gone.png", "x"), ("c.png", None)]
    path = write_list(tmp_path, kind, rows, ("file", "text"))
    settings = Settings(image_column="file", caption_column="text", rows_per_file=3)
    index = convert.convert([path], tmp_path / "out", settings)
    assert captions(tmp_path / "out") == ['one, "quoted"\nline', "deux é"]
    assert index["skipped"] == {"no caption": 1, "not there": 1} and len(index["shards"]) == 2


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_lists_of_pictures_alone_need_no_captions(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(PNG)
    path = write_list(tmp_path, kind, [("a.png",)], ("path",))
    assert convert.convert([path], tmp_path / "out", Settings(images_only=True))["images"] == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_missing_column_is_named(tmp_path, kind):
    path = write_list(tmp_path, kind, [("a", "b")], ("url", "caption"))
    with pytest.raises(ValueError, match="no column 'path', only url, caption"):
        convert.convert([path], tmp_path / "out")


def test_bucket_paths(tmp_path):
    """fsspec's memory filesystem stands for a bucket."""
    fsspec = pytest.importorskip("fsspec", reason="bucket paths need the bucket extra")
    local = write_tars(tmp_path, 2, 3)
    bucket = fsspec.filesystem("memory")
    for path in local:
        bucket.pipe(f"/tars/{Path(path).name}", Path(path).read_bytes())
    bucket.pipe("/lists/images/a.png", PNG)
    bucket.pipe("/lists/list.csv", b"path,caption\nimages/a.png,beside\nmemory://lists/images/a.png,whole\nno.png,x\n")
    inputs = [*remote.expand("memory://tars/*.tar"), "memory://lists/list.csv"]
    index = convert.convert(inputs, tmp_path / "out")
    assert captions(tmp_path / "out") == [*(f"{t}/{i}" for t in range(2) for i in range(3)), "beside", "whole"]
    assert index["skipped"] == {"not there": 1}


def test_bucket_paths_need_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"jaxdiff\[bucket\]"):
        convert.convert(["gs://bucket/a.tar"], tmp_path / "out")


def test_a_rerun_does_nothing_twice_and_more_inputs_are_added(tmp_path):
    tars = write_tars(tmp_path / "tars", 4, 3)
    convert.convert(tars[:2], tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("0*")}
    convert.convert(tars, tmp_path / "out")
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    assert captions(tmp_path / "out") == [f"{t}/{i}" for t in range(4) for i in range(3)]
    convert.convert(tars[2:], tmp_path / "out")  # a folder's leftovers are not part of the set
    assert captions(tmp_path / "out") == [f"{t}/{i}" for t in range(2, 4) for i in range(3)]


def test_changed_inputs_and_settings_are_converted_anew(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    path = write_list(tmp_path, "csv", [("a.png", "old")])
    convert.convert([path], tmp_path / "out")
    write_list(tmp_path, "csv", [("a.png", "new"), ("a.png", "")])
    convert.convert([path], tmp_path / "out")
    assert captions(tmp_path / "out") == ["new"]
    convert.convert([path], tmp_path / "out", Settings(images_only=True))
    assert captions(tmp_path / "out") == ["new", None]


def test_processes_give_the_same_set_in_the_same_order(tmp_path):
    tars = write_tars(tmp_path / "tars", 9, 2)
    one = convert.convert(tars, tmp_path / "one")
    two = convert.convert(tars, tmp_path / "two", processes=2)
    assert one == two and captions(tmp_path / "one") == captions(tmp_path / "two")


def test_a_killed_conversion_continues(tmp_path):
    """SIGKILL in the middle; the second run keeps what was whole, does the rest, and the set has everything once."""
    rng = np.random.default_rng(0)
    png = images.encode_png(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))
    tars, out = write_tars(tmp_path / "tars", 30, 20, png), tmp_path / "out"
    code = f"from pathlib import Path; from jaxdiff.data import convert; convert.convert({tars!r}, Path({str(out)!r}))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.json"))) < 3 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.wait()
    whole = {file: file.stat().st_mtime_ns for file in out.glob("*.array_record") if file.with_suffix(".json").exists()}
    assert 3 <= len(whole) < 30, "the kill came too early or too late to test anything"
    with pytest.raises(FileNotFoundError, match=r"no dataset\.json"):
        records.read(out)
    convert.convert(tars, out)
    assert all(file.stat().st_mtime_ns == then for file, then in whole.items())
    assert captions(out) == [f"{t}/{i}" for t in range(30) for i in range(20)]
    assert not list(out.glob("*.part"))


def test_a_file_without_its_report_is_done_again(tmp_path):
    """A kill between the two renames."""
    tars = write_tars(tmp_path / "tars", 2, 3)
    convert.convert(tars, tmp_path / "out")
    report = next((tmp_path / "out").glob("000-*.json"))
    report.unlink()
    report.with_suffix(".array_record").write_bytes(b"cannot be trusted")
    convert.convert(tars, tmp_path / "out")
    assert captions(tmp_path / "out") == [f"{t}/{i}" for t in range(2) for i in range(3)]


def test_strict_stops_with_the_culprit_and_keeps_the_older_set(tmp_path):
    good = write_tars(tmp_path / "tars", 1, 2)
    convert.convert(good, tmp_path / "out")
    bad = write_tar(tmp_path / "bad.tar", {"7.png": PNG[:50], "7.txt": b"x", "8.png": PNG, "8.txt": b"y"})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"bad\.tar/7\.png: unreadable .* \(strict\)"):
            convert.convert([*good, bad], tmp_path / "out", Settings(strict=True))
        convert.convert([bad], tmp_path / "other")  # a lenient run of before makes strict no laxer
        (tmp_path / "other" / "dataset.json").unlink()
        with pytest.raises(ValueError, match=r"\(strict\)"):
            convert.convert([bad], tmp_path / "other", Settings(strict=True))
    assert captions(tmp_path / "out") == ["0/0", "0/1"]
    assert not list((tmp_path / "out").glob("bad*"))


@pytest.mark.parametrize("name", ["torn.tar", "torn.tgz"])
def test_a_torn_tar_file_keeps_what_came_before(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    pairs = {}
    for i, each in enumerate(noise):
        pairs |= {f"{i}.png": images.encode_png(each), f"{i}.txt": b"x"}
    path = Path(write_tar(tmp_path / name, pairs))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    index = convert.convert([str(path)], tmp_path / "out")
    assert 1 <= index["images"] <= 3 and index["skipped"]["damaged tar file"] == 1
    with pytest.raises(ValueError, match="damaged tar file"):
        convert.convert([str(path)], tmp_path / "strict", Settings(strict=True))


def test_bad_inputs_are_named(tmp_path):
    tars = write_tars(tmp_path / "tars", 1, 1)
    empty = write_tar(tmp_path / "empty.tar", {"readme.md": b"x"})
    for inputs, message in [
        (["a.zip"], "a.zip: neither a folder, a tar file, nor"),
        ([tars[0], tars[0]], "given twice"),
        ([str(tmp_path / "no.tar")], "no.tar"),
        ([empty], "no usable image"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            convert.convert(inputs, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        remote.expand(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match="rows_per_file"):
        Settings(rows_per_file=0)


def test_the_command(tmp_path, capsys):
    write_tars(tmp_path / "tars", 3, 2)
    write_tar(tmp_path / "tars" / "x.tar", {"1.png": PNG, "1.cls": b"7"})
    command.main((f"{tmp_path}/tars/*.tar",), tmp_path / "out")
    told = capsys.readouterr()
    assert "6 images in 4 files" in told.out
    assert "warning: skipped 1 × no caption; the first:" in told.err
    assert f"note: 1 × member not used; the first: {tmp_path}/tars/x.tar/1.cls: member not used" in told.err
    assert len(captions(tmp_path / "out")) == 6


def test_bad_input_on_the_command_line_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command.main, ["no.zip", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err.strip().splitlines()[-1].startswith("error: no.zip: neither a folder, a tar file, nor")
    )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_without_a_path_or_with_other_things_are_left_out(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(PNG)
    rows = [("a.png", "one"), (None, "two"), ("a.png", None)]
    index = convert.convert([write_list(tmp_path, kind, rows)], tmp_path / "out")
    assert index["images"] == 1 and index["skipped"] == {"no caption": 1, "no path": 1}
    assert "row 1" in index["first"]["no path"]


def test_lists_that_are_no_lists_of_rows(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "short.csv").write_text("caption,path\na dog\nyes,a.png\n")
    with pytest.raises(ValueError, match=r"short\.csv, line 2: the header has 2 fields, this row 1"):
        convert.convert([str(tmp_path / "short.csv")], tmp_path / "out")
    (tmp_path / "long.csv").write_text("caption,path\n" + "x" * 140_000 + ",a.png\n")
    with pytest.raises(ValueError, match=r"long\.csv, line \d: field larger"):
        convert.convert([str(tmp_path / "long.csv")], tmp_path / "out")
    many = write_list(tmp_path, "parquet", [("a.png", ["one", "two"])])
    (tmp_path / "good.csv").write_text("caption,path\nyes,a.png\n")
    assert convert.convert([many, str(tmp_path / "good.csv")], tmp_path / "out")["skipped"] == {"no caption": 1}


def test_another_tools_index_is_named(tmp_path):
    for content in ('{"name": "x"}', "[1]", "{"):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=r"dataset\.json: not written by experiments\.convert"):
            records.read(tmp_path)


def test_a_bucket_out_of_reach_costs_no_pictures(tmp_path, monkeypatch):
    """It stops the command, which goes on when it is run again; what is not there is left out, unless it is retried."""
    (tmp_path / "a.png").write_bytes(PNG)
    path = write_list(tmp_path, "csv", [("a.png", "one"), ("b.png", "two")])

    def unreachable(file):
        raise TimeoutError(f"{file}: no answer")

    with monkeypatch.context() as patched:
        patched.setattr(remote, "read_bytes", unreachable)
        with pytest.raises(TimeoutError, match=r"a\.png: no answer"):
            convert.convert([path], tmp_path / "out")
    assert convert.convert([path], tmp_path / "out")["skipped"] == {"not there": 1}
    (tmp_path / "b.png").write_bytes(PNG)
    assert convert.convert([path], tmp_path / "out")["images"] == 1
    assert convert.convert([path], tmp_path / "out", convert.Settings(retry=True))["images"] == 2
    assert captions(tmp_path / "out") == ["one", "two"]


def test_damaged_lists_are_named(tmp_path):
    (tmp_path / "list.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"list\.parquet: not a Parquet file"):
        convert.convert([str(tmp_path / "list.parquet")], tmp_path / "out")
    (tmp_path / "list.csv").write_bytes("path,caption\na.png,x\n".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"list\.csv, line \d"):
        convert.convert([str(tmp_path / "list.csv")], tmp_path / "out")


ODD = {  # bytes of a caption → the caption, and whether characters were replaced
    "plain": ("a café 😀".encode(), "a café 😀", False),
    "UTF-8 with a mark": ("a café".encode("utf-8-sig"), "a café", False),
    "UTF-16 LE": (b"\xff\xfe" + "a café 😀".encode("utf-16-le"), "a café 😀", False),
    "UTF-16 BE": (b"\xfe\xff" + "a café 😀".encode("utf-16-be"), "a café 😀", False),
    "UTF-32": ("a café".encode("utf-32"), "a café", False),
    "latin-1": ("a café".encode("latin-1"), "a caf\ufffd", True),
    "UTF-16 cut off": (b"\xff\xfea\0b", "a\ufffd", True),
}


@pytest.mark.parametrize("content, caption, replaced", ODD.values(), ids=ODD)
def test_captions_of_any_encoding(tmp_path, content, caption, replaced):
    path = write_tar(tmp_path / "a.tar", {"1.png": PNG, "1.txt": content, "2.png": PNG, "2.txt": b"two"})
    index = convert.convert([path], tmp_path / "out")
    assert captions(tmp_path / "out") == [caption, "two"]
    assert index["replaced"] == replaced and index["images"] == 2 and not index["skipped"]
    if replaced:
        assert f"{path}/1.png: 1 character of the caption replaced" in index["first"][convert.REPLACED]
        with pytest.raises(ValueError, match=r"a\.tar/1\.png: .*replaced.*\(strict\)"):
            convert.convert([path], tmp_path / "strict", Settings(strict=True))
        with pytest.raises(ValueError, match=r"a\.tar/1\.png: .*replaced.*\(strict\)"):
            convert.convert([path], tmp_path / "out", Settings(strict=True))  # finished, but not strictly
    else:
        convert.convert([path], tmp_path / "strict", Settings(strict=True))


@pytest.mark.parametrize(
    "content, caption",
    [
        (b'{"caption": "half \\ud83d"}', "half \ufffd"),
        (b'{"caption": "other \\udc00 half"}', "other \ufffd half"),
        (b'{"caption": "whole \\ud83d\\ude00"}', "whole 😀"),
        ('{"caption": "é"}'.encode("utf-16"), "é"),
        ('{"caption": "é"}'.encode("utf-16-be"), "é"),
        ('\ufeff{"caption": "é"}'.encode(), "é"),
        (b'{"caption": "\\ufeff\\u00e9"}', "é"),
        ('{"caption": "é"}'.encode("latin-1"), "\ufffd"),
    ],
)
def test_captions_in_json_of_any_encoding(tmp_path, content, caption):
    path = write_tar(tmp_path / "a.tar", {"1.png": PNG, "1.json": content})
    index = convert.convert([path], tmp_path / "out")
    assert captions(tmp_path / "out") == [caption] and index["replaced"] == ("\ufffd" in caption)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_captions_of_lists_that_are_no_text(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(PNG)
    rows = [("a.png", b"one \xe9"), ("a.png", b"two"), ("a.png", b"\xff\xfe"), ("a.png", b"\xef\xbb\xbfsix")]
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        path.write_bytes(b"path,caption\n" + b"".join(name.encode() + b"," + text + b"\n" for name, text in rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet lists need the parquet extra")
        import pyarrow

        texts = pyarrow.array([text for _, text in rows], pyarrow.binary()).cast(pyarrow.string(), safe=False)
        parquet.write_table(pyarrow.table({"path": [name for name, _ in rows], "caption": texts}), path)
    index = convert.convert([str(path)], tmp_path / "out")
    # A cell of a Parquet list is a text of its own, and a byte order mark without text is a blank one.
    expected = ["one \ufffd", "two", "\ufffd\ufffd", "six"] if kind == "csv" else ["one \ufffd", "two", "six"]
    assert captions(tmp_path / "out") == expected
    assert index["replaced"] == (2 if kind == "csv" else 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_a_csv_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "list.csv").write_bytes("path,caption\r\na.png,é 😀\r\n".encode(encoding))
    index = convert.convert([str(tmp_path / "list.csv")], tmp_path / "out", Settings(strict=True))
    assert captions(tmp_path / "out") == ["é 😀"] and index["replaced"] == 0


def test_replaced_characters_are_said_once_they_are_counted(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", {"1.png": PNG, "1.txt": b"caf\xe9", "2.png": PNG, "2.txt": b"\xe9"})
    with pytest.raises(SystemExit) as stop:
        run(command.main, [path, "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert stop.value.code == 0
    assert f"warning: characters replaced in 2 captions; the first: {path}/1.png: 1 character" in said.err


def test_names_that_are_no_text(tmp_path):
    """A file name is bytes: what is not UTF-8 in it neither stops the job nor hides the image."""
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(PNG)
    (tmp_path / "list.csv").write_bytes(b"path,caption\ncaf\xe9.png,one\ncaf\xe9s.png,gone\n")
    path = write_tar(tmp_path / "a.tar", {os.fsdecode(b"\xe9.png"): PNG, os.fsdecode(b"\xe9.txt"): b"two"})
    index = convert.convert([path, str(tmp_path / "list.csv")], tmp_path / "out")
    assert captions(tmp_path / "out") == ["two", "one"] and index["skipped"] == {"not there": 1}
    assert records.read(tmp_path / "out")[1]["name"] == str(tmp_path / name)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == index


def test_json_of_lone_surrogates_is_read_back_as_it_was(tmp_path):
    value = {"a \udce9": ["\ud83d", "😀"]}
    files.write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


BAD_INDEX = {
    "nested deeply": "[" * 200_000,
    "infinite": '{"shards": [{"file": "a", "images": Infinity}]}',
    "negative": '{"shards": [{"file": "a", "images": -1}]}',
    "a fraction": '{"shards": [{"file": "a", "images": 1.5}]}',
    "true": '{"shards": [{"file": "a", "images": true}]}',
    "no names": '{"shards": [{"file": 7, "images": 1}]}',
    "no shards": '{"shards": 7}',
    "shards of another kind": '{"shards": [[]]}',
    "two values": '{"shards": [], "shards": [1]}',
    "bytes": "\udcff",
}


@pytest.mark.parametrize("content", BAD_INDEX.values(), ids=BAD_INDEX)
def test_an_index_that_was_not_written_here_is_one_line(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"dataset\.json: not written by experiments\.convert") as caught:
        records.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [b"[" * 200_000, b"[]", b'{"caption": 7, "name": "a"}', b'{"caption": "a"}', b'{"caption": null, "name": 1}'],
)
def test_a_record_that_was_not_written_here_is_a_value_error(header):
    with pytest.raises(ValueError, match="the header"):
        records.unpack(len(header).to_bytes(4, "little") + header)


def test_a_record_may_be_long():
    record = records.pack(b"image", "x" * 2**24, "a.png")
    assert len(records.unpack(record)["caption"]) == 2**24


BAD_REPORT = {
    "first": 7,
    "skipped": {"a": "b"},
    "unused": [],
    "images": float("inf"),
    "replaced": 1,
    "file": "other.array_record",
    "source": None,
    "more": 1,
}


@pytest.mark.parametrize("field", [*BAD_REPORT, "nested"])
def test_a_report_that_was_not_written_here_is_one_line(tmp_path, field):
    (path,) = write_tars(tmp_path / "tars", 1, 1)
    convert.convert([path], tmp_path / "out")
    (report,) = (file for file in (tmp_path / "out").glob("*.json") if file.name != "dataset.json")
    values = json.loads(report.read_text())
    report.write_text("[" * 200_000 if field == "nested" else json.dumps(values | {field: BAD_REPORT[field]}))
    with pytest.raises(ValueError, match=r"\.json: not a report of this converter .*; delete it") as caught:
        convert.convert([path], tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [[], ["--strict"]])
def test_names_in_an_archive_cannot_write_to_the_terminal(tmp_path, capsys, flags):
    name = "\x1b[2J\x1b]0;title\x07\n"
    path = write_tar(
        tmp_path / "a.tar",
        {"a.png": PNG, "a.txt": b"x", f"{name}{'y' * 9000}.bin": b"x", f"b{name}.png": PNG, f"b{name}.txt": b"\xff"},
    )
    try:
        run(command.main, [path, "--out", str(tmp_path / "out"), *flags])
    except SystemExit as ended:
        assert ended.code == (2 if flags else 0)
    written = capsys.readouterr()
    said = written.out + written.err
    lines = [line for line in said.splitlines() if line.startswith(("error", "warning", "note"))]
    assert len(lines) == (1 if flags else 2) and all(line.isprintable() and len(line) < 1000 for line in lines)
    assert "\x07" not in said and "]0;title" in said
