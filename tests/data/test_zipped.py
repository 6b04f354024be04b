"""A zip of images read like a folder: names, captions, what is left out, and damaged archives."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data import zipped
from jaxdiff.data.images import decode


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_pictures_in_order_with_their_captions(tmp_path):
    members = {
        "00001/img9.png": png(9),
        "00000/img1.PNG": png(1),
        "00000/img1.txt": "\ufeffa red wall\n",
        "dataset.json": "{}",
        "00001/": b"",
        "00000/img.2.png": png(2),
        "00000/img.2.txt": b"",
    }
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        found = zipped.read(write(tmp_path / "set.zip", members, compression=compression))
        assert [member.info.filename for member in found.members] == [
            "00000/img.2.png",
            "00000/img1.PNG",
            "00001/img9.png",
        ]
        assert [found[i]["caption"] for i in range(len(found))] == [None, "a red wall", None]
        assert decode(found[2]["image"])[0, 0].tolist() == [9, 0, 0]
        assert found[1]["name"].endswith("set.zip/00000/img1.PNG")
        assert (found.members[1].name, found.members[1].suffix) == ("img1.PNG", ".PNG")


def test_hidden_pictures_are_left_out_and_told(tmp_path):
    hidden = ["__MACOSX/._a.png", ".hidden.png", "b/.ipynb_checkpoints/a.png", ".Trash/c.jpg"]
    members = {"a.png": png(1), ".DS_Store": b"x", "__MACOSX/._a.txt": b"x"} | dict.fromkeys(hidden, png(2))
    with pytest.warns(UserWarning, match="set.zip: left out 4 hidden folders or images") as warned:
        found = zipped.read(write(tmp_path / "set.zip", members))
    assert len(found) == 1 and all(name in str(warned[0].message) for name in hidden)


def test_files_of_unknown_kinds_are_counted(tmp_path):
    members = {"a.png": png(1), "a.txt": "a wall", "b.heic": b"x", "c.heic": b"x", "d": b"x", "dataset.json": "{}"}
    with pytest.warns(UserWarning, match=r"left out 3 files of unknown kinds \(2 .heic, 1 without suffix\)"):
        assert len(zipped.read(write(tmp_path / "set.zip", members))) == 1


def test_captions_are_decoded_as_those_of_folders_are(tmp_path):
    texts = {"a": "\ufeffein Stern".encode("utf-16"), "b": b"caf\xe9", "c": "\ufeff \n".encode()}
    members = {f"{name}.png": png(1) for name in texts} | {f"{name}.txt": text for name, text in texts.items()}
    found = zipped.read(write(tmp_path / "set.zip", members))
    assert [found[i]["caption"] for i in range(3)] == ["ein Stern", "caf\ufffd", None]
    assert "1 character" in found[1]["caption_fault"] and found[0]["caption_fault"] is None


def test_a_name_twice_is_two_pictures(tmp_path):
    path = write(tmp_path / "set.zip", {"a.png": png(1)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.png", png(2))
    found = zipped.read(path)
    assert [int(decode(found[i]["image"])[0, 0, 0]) for i in range(2)] == [1, 2]


def test_damaged_members_are_unreadable_and_others_stay(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, 500).astype(np.uint8).tobytes()
    path = write(tmp_path / "set.zip", {"a.png": noise, "b.png": png(1), "c.png": noise * 3})
    content = bytearray(path.read_bytes())
    content[content.index(noise) + 20] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(zipped, "LARGEST", 1000)
    found = zipped.read(path)
    with pytest.raises(OSError, match="damaged or encrypted"):
        found[0]
    assert found[1]["image"] == png(1)
    with pytest.raises(OSError, match="unpacks to 1500 bytes"):
        found[2]


def test_encrypted_members_are_unreadable(tmp_path):
    path = write(tmp_path / "set.zip", {"a.png": png(1)})
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="encrypted"):
        zipped.read(path)[0]


def test_what_is_no_zip_of_pictures(tmp_path):
    (tmp_path / "text.zip").write_text("no archive")
    cut = write(tmp_path / "cut.zip", {"a.png": png(1)})
    cut.write_bytes(cut.read_bytes()[:-30])
    for name in ("text", "cut"):
        with pytest.raises(ValueError, match=rf"{name}\.zip: no zip, or a damaged one"):
            zipped.read(tmp_path / f"{name}.zip")
    with pytest.raises(FileNotFoundError, match="no such zip"):
        zipped.read(tmp_path / "absent.zip")
    with pytest.raises(FileNotFoundError, match="no images in it"):
        zipped.read(write(tmp_path / "other.zip", {"a.json": "{}", "__MACOSX/a.png": png(1)}))


def test_zips_are_told_from_folders(tmp_path):
    (tmp_path / "folder.zip").mkdir()
    path = write(tmp_path / "renamed", {"a.png": png(1)})
    assert [zipped.is_zip(each) for each in (tmp_path / "folder.zip", tmp_path, path, tmp_path / "absent.zip")] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_any_damage_of_a_member_is_unreadable(tmp_path, compression):
    noise = np.random.default_rng(0).integers(0, 9, 3000).astype(np.uint8).tobytes()
    path = write(tmp_path / "set.zip", {"a.png": noise}, compression=compression)
    intact, start = path.read_bytes(), 35  # behind the header and the name
    damaged = 0
    for place in range(start, start + 50):
        content = bytearray(intact)
        content[place] ^= 0xFF
        path.write_bytes(content)
        try:
            assert zipped.read(path)[0]["image"] == noise  # not each bit of LZMA's header counts
        except OSError:
            damaged += 1
    assert damaged > 40


def listing(*rows):
    return "\n".join(map(json.dumps, rows))


def test_metadata_is_read_as_in_a_folder(tmp_path):
    rows = [
        {"file_name": "./b.png", "text": " ", "caption": "of b"},
        {"file_name": "x/a.png"},
        {"file_name": ".h/c.png", "text": "listed"},
    ]
    members = {"x/a.png": png(1), "b.png": png(2), ".h/c.png": png(3), "x/a.txt": "beside", "b.txt": "not read"}
    found = zipped.read(write(tmp_path / "set.zip", {"metadata.jsonl": listing(*rows)} | members))
    assert [found[i]["caption"] for i in range(3)] == ["of b", "beside", "listed"]
    assert [found[i]["image"] for i in range(3)] == [png(2), png(1), png(3)]
    assert [member.info.filename for member in found.members] == ["b.png", "x/a.png", ".h/c.png"]


def test_what_metadata_leaves_out_is_told(tmp_path):
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "gone\x1b.png", "text": "b"}]
    path = write(tmp_path / "set.zip", {"a.png": png(1), "c.png": png(2), "metadata.jsonl": listing(*rows)})
    with pytest.warns(UserWarning) as warned:
        assert len(zipped.read(path)) == 1
    lines = [str(each.message) for each in warned]
    assert any("left out 1 image of metadata.jsonl that is not there" in line and "\x1b" not in line for line in lines)
    assert any("left out 1 image that metadata.jsonl does not list (c.png)" in line for line in lines)


@pytest.mark.parametrize(
    "row, message", [("[" * 200_000, "not a JSON object"), ('{"file_name": 7}', "not a string but 7")]
)
def test_damaged_metadata_is_named_by_line(tmp_path, row, message):
    text = listing({"file_name": "a.png"}) + "\n" + row
    path = write(tmp_path / "set.zip", {"a.png": png(1), "metadata.jsonl": text})
    with pytest.raises(ValueError, match=rf"set\.zip/metadata\.jsonl:2: .*{message}"):
        zipped.read(path)


def test_metadata_further_down_is_told_not_to_be_read(tmp_path):
    path = write(tmp_path / "set.zip", {"x/a.png": png(1), "x/metadata.jsonl": listing({"file_name": "a.png"})})
    with pytest.warns(UserWarning, match=r"left out 1 metadata.jsonl below the top \(x/metadata.jsonl\)"):
        assert zipped.read(path)[0]["caption"] is None
