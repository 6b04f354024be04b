"""Tar shards: what a key is, and that nothing in a shard is left out without being counted."""

import collections
import gzip
import io
import json
import random
import tarfile

import numpy as np
import pytest

from experiments import convert as command
from experiments.cli import run
from jaxdiff.data import convert, images, records, tar_shards
from jaxdiff.data.fault import Fault

PNG = {name: images.encode_png(np.full((8, 8, 3), value, np.uint8)) for value, name in enumerate("ABCD")}


def tar(members, mode="w", form=tarfile.GNU_FORMAT) -> bytes:
    """A tar file of (name, content); None is a folder, a string a link to that name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            else:
                member.type, member.linkname = (tarfile.DIRTYPE, "") if content is None else (tarfile.LNKTYPE, content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return file.getvalue()


def read(content: bytes):
    """The examples as (name, image, caption), and the faults and what is harmless as (name, kind)."""
    kept, faults, harmless = [], [], []
    for name, image, caption in tar_shards.examples("S", io.BytesIO(content), "caption"):
        if isinstance(image, Fault):
            (harmless if image.harmless else faults).append((name.removeprefix("S/"), image.kind))
        else:
            kept.append((name.removeprefix("S/"), image, caption))
    return kept, faults, harmless


def pairs(*names):
    return [
        member for name in names for member in ((f"{name}.jpg", name.encode()), (f"{name}.txt", f"of {name}".encode()))
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("22.05", "22.06", "22.07"),
        ("IMG.edited", "IMG"),
        ("IMG", "IMG.edited", "IMG.edited.again"),
        ("Dr. Who", "v1.2.3", "a..b", "1.", "folder.d/7", "folder.d/8.0"),
        tuple(f"2024.{day:03d}" for day in range(300)),
        ("é.ü", "图.片", "a" * 150 + ".b" * 20),
        ("png", "txt.json", "a.jpg"),
    ],
    ids=["numbers", "edited", "edited twice", "mixed", "a whole shard", "unicode and long", "suffixes"],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_with_dots_are_keys(names, form):
    kept, faults, harmless = read(tar(pairs(*names), form=form))
    assert sorted(kept) == sorted((f"{name}.jpg", name.encode(), f"of {name}") for name in names)
    assert not faults and not harmless


A, B, C = (name.encode() for name in "ABC")

READINGS = {
    "folders of programs": (
        [("__MACOSX/a.jpg", A), ("x/@eaDir/a.jpg", A), ("x/.b.jpg", B), ("__MACOSX.jpg", C), ("../d.jpg", A)],
        [("__MACOSX.jpg", C, None), ("../d.jpg", A, None)],
        [],
        ["__MACOSX/a.jpg", "x/@eaDir/a.jpg", "x/.b.jpg"],
    ),
    "an image behind a lone caption of its name": (
        [("a.txt", b"a"), ("b.jpg", B), ("a.jpg", A), ("c.cls", b"1"), ("b.txt", b"b"), ("c.jpg", C)],
        [("b.jpg", B, None), ("a.jpg", A, None), ("c.jpg", C, None)],
        [("a.txt", "no image"), ("c.cls", "unknown member"), ("b.txt", "repeated key")],
        [],
    ),
    "webdataset's features": (
        [("7.jpg", A), ("7.seg.png", B), ("7.cls", b"1"), ("7.json", b"{}"), ("7.txt", b"a")],
        [("7.jpg", A, "a")],
        [],
        ["7.cls", "7.seg.png"],
    ),
    "an only image with a prefix": ([("7.rgb.png", A), ("7.txt", b"a")], [("7.rgb.png", A, "a")], [], []),
    "and with its own caption": (
        [("22.05.jpg", A), ("22.05.txt", b"a"), ("22.txt", b"b")],
        [("22.05.jpg", A, "a")],
        [("22.txt", "no image")],
        [],
    ),
    "two images with a prefix": (
        [("7.a.png", A), ("7.b.png", B), ("7.txt", b"a")],
        [("7.a.png", A, None), ("7.b.png", B, None)],
        [("7.txt", "no image")],
        [],
    ),
    "a caption in JSON behind a blank text": (
        [("1.WEBP", A), ("1.json", b'{"caption": "j"}'), ("1.TXT", b" \n")],
        [("1.WEBP", A, "j")],
        [],
        [],
    ),
    "two images of a key": (
        [("a.jpg", A), ("a.png", B), ("a.webp", C), ("a.txt", b"a")],
        [("a.jpg", A, "a")],
        [("a.png", "second image of a key"), ("a.webp", "second image of a key")],
        [],
    ),
    "two captions of a key": (
        [("a.jpg", A), ("a.txt", b"a"), ("a.TXT", b"b")],
        [("a.jpg", A, "a")],
        [("a.TXT", "second caption of a key")],
        [],
    ),
    "a repeated key side by side": (
        [("a.jpg", A), ("a.txt", b"a"), ("a.jpg", B), ("a.txt", b"b")],
        [("a.jpg", A, "a")],
        [("a.jpg", "repeated key"), ("a.txt", "second caption of a key")],
        [],
    ),
    "a repeated key further on": (
        [("a.jpg", A), ("a.txt", b"a"), ("b.jpg", B), ("b.txt", b"b"), ("a.jpg", C), ("a.txt", b"c")],
        [("a.jpg", A, "a"), ("b.jpg", B, "b")],
        [("a.jpg", "repeated key")],
        [],
    ),
    "images before captions": (
        [("a.jpg", A), ("b.jpg", B), ("a.txt", b"a"), ("b.txt", b"b")],
        [("a.jpg", A, None), ("b.jpg", B, None)],
        [("a.txt", "repeated key"), ("b.txt", "repeated key")],
        [],
    ),
    "an orphan caption": (
        [("a.txt", b"a"), ("b.json", b"[]")],
        [],
        [("a.txt", "no image"), ("b.json", "no image")],
        [],
    ),
    "unknown members": (
        [("README", b"x"), ("a.heic", b"x"), ("b.jpg.part", b"x"), ("b", b"x")],
        [],
        [(name, "unknown member") for name in ("README", "a.heic", "b.jpg.part", "b")],
        [],
    ),
    "folders, hidden files and ./": (
        [
            ("./", None),
            ("./d", None),
            ("./d/a.jpg", A),
            ("./d/a.txt", b"a"),
            ("./d/._a.jpg", b"x"),
            (".git/a.jpg", b"x"),
        ],
        [("d/a.jpg", A, "a")],
        [],
        ["d/._a.jpg", ".git/a.jpg"],
    ),
    "links": ([("a.jpg", A), ("a.txt", b"a"), ("b.jpg", "a.jpg")], [("a.jpg", A, "a")], [("b.jpg", "link")], []),
    "an empty image": ([("a.jpg", b""), ("a.txt", b"a")], [("a.jpg", b"", "a")], [], []),
}


@pytest.mark.parametrize("members, kept, faults, harmless", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_what_is_read_and_what_is_left_out(members, kept, faults, harmless, mode):
    found = read(tar(members, mode))
    assert found[:2] == (kept, sorted(faults, key=found[1].index)) and [name for name, _ in found[2]] == harmless


def test_a_long_run_of_one_first_dot_name_does_not_fill_memory(monkeypatch):
    longest = 0
    real = tar_shards._of_run

    def measured(run, *rest):
        nonlocal longest
        longest = max(longest, len(run))
        return real(run, *rest)

    monkeypatch.setattr(tar_shards, "_of_run", measured)
    assert len(read(tar(pairs(*(f"IMG.{i:04d}" for i in range(1000)))))[0]) == 1000
    assert longest <= tar_shards._TOGETHER + 1


WHOLE = tar([*pairs("1", "2", "3.0"), ("3.0.cls", b"1")])
HEADER = 512


@pytest.mark.parametrize(
    "content, count, reason",
    [
        (WHOLE[: 8 * HEADER], 2, "no end mark"),  # between two members
        (WHOLE[: 8 * HEADER + 100], 2, "truncated header"),
        (WHOLE[: 9 * HEADER + 2], 2, "unexpected end of data"),
        (WHOLE[: 4 * HEADER] + b"\1" + WHOLE[4 * HEADER + 1 :], 1, "bad checksum at byte 2048"),
        (b"", 0, "empty file"),
        (bytes(4096), 0, "no members"),
        (b"junk" * 500, 0, "invalid header"),
        (gzip.compress(WHOLE)[:-30], None, "ended before the end"),
        (WHOLE + b"junk" * 128, 3, "at byte"),
    ],
)
def test_a_damaged_file_keeps_what_came_before(content, count, reason):
    kept, faults, _ = read(content)
    assert faults[-1] == ("S", "damaged tar file") and count in (None, len(kept))
    (fault,) = [
        image for _, image, _ in tar_shards.examples("S", io.BytesIO(content), "") if str(image).startswith("dam")
    ]
    assert reason in str(fault)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "gz"])
def test_files_joined_by_cat_are_read_to_the_end(pack):
    kept, faults, _ = read(pack(tar(pairs("1"))) + pack(tar(pairs("2"))) + pack(tar(pairs("3"))))
    assert [name for name, _, _ in kept] == ["1.jpg", "2.jpg", "3.jpg"] and not faults


def test_any_damage_is_a_fault():
    """Bytes at random, cut anywhere: never an exception, and what is missing is accounted for."""
    rng = random.Random(0)
    whole = [tar(pairs("1", "2.5"), mode, form) for mode in ("w", "w:gz", "w:bz2") for form in (0, 1, 2)]
    for _ in range(600):
        content = bytearray(rng.choice(whole))
        for _ in range(rng.randrange(3)):
            content[rng.randrange(min(len(content), 4096))] = rng.randrange(256)
        kept, faults, harmless = read(bytes(content[: rng.choice([None, rng.randrange(len(content))])]))
        assert len(kept) + len(faults) + len(harmless) >= 2 or ("S", "damaged tar file") in faults


def converted(tmp_path, members, *flags):
    """Exit code and output of the command on one shard of real images."""
    (tmp_path / "s.tar").write_bytes(tar([(name, PNG.get(name_of(content), content)) for name, content in members]))
    with pytest.raises(SystemExit) as ended:
        run(command.main, [str(tmp_path / "s.tar"), "--out", str(tmp_path / "out"), *flags])
    return ended.value.code


def name_of(content):
    return content.decode("latin-1") if isinstance(content, bytes) else content


def test_the_command_keeps_names_with_dots(tmp_path, capsys):
    assert (
        converted(tmp_path, [("22.05.jpg", A), ("22.05.txt", b"a"), ("IMG.edited.jpg", B), ("IMG.edited.txt", b"b")])
        == 0
    )
    source = records.read(tmp_path / "out")
    assert [source[i]["caption"] for i in range(len(source))] == ["a", "b"]
    assert "skipped" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "case, culprit",
    [
        ("two images of a key", "a.png: second image of a key (a.jpg is kept)"),
        ("a repeated key side by side", "a.jpg: repeated key (a.jpg is kept)"),
        ("a repeated key further on", "a.jpg: repeated key (the first is kept"),
        ("links", "b.jpg: link (to a.jpg"),
        ("and with its own caption", "22.txt: no image"),
        ("an empty image", "a.jpg: unreadable (an empty file)"),
        ("unknown members", "README: unknown member"),
    ],
)
def test_strict_names_the_shard_and_the_member(tmp_path, capsys, case, culprit):
    members, _, faults, _ = READINGS[case]
    assert converted(tmp_path, members, "--strict") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {tmp_path}/s.tar/{culprit}") and line.endswith("(strict)")
    # Without it the same is counted and said.
    code = converted(tmp_path, [*members, ("zz.jpg", C), ("zz.txt", b"z")], "--no-verify")
    told = capsys.readouterr().err
    index = json.loads((tmp_path / "out" / "dataset.json").read_text())
    kinds = collections.Counter(kind for _, kind in faults) or {"unreadable": 1}
    assert code == 0 and index["skipped"] == kinds
    assert all(
        f"warning: skipped {count} × {kind}; the first: {tmp_path}/s.tar/" in told for kind, count in kinds.items()
    )


def test_strict_allows_what_a_good_shard_has(tmp_path, capsys):
    members = [*READINGS["webdataset's features"][0], ("d", None), ("d/.hidden.jpg", b"x")]
    assert converted(tmp_path, members, "--strict") == 0
    index = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert index["unused"] == {"hidden member": 1, "member not used": 2} and not index["skipped"]
    assert "note: 2 × member not used; the first:" in capsys.readouterr().err
    assert converted(tmp_path, members, "--strict") == 0  # finished before


def test_a_repair_is_found_by_retry(tmp_path):
    """What is harmless alone makes no piece to be done again."""
    (tmp_path / "s.tar").write_bytes(tar([("1.jpg", PNG["A"]), ("1.txt", b"a"), ("1.cls", b"1")]))
    convert.convert([str(tmp_path / "s.tar")], tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.array_record")
    before = file.stat().st_mtime_ns
    convert.convert([str(tmp_path / "s.tar")], tmp_path / "out", convert.Settings(retry=True))
    assert file.stat().st_mtime_ns == before
