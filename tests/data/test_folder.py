"""Folders: links followed once, hidden ones left out, and nothing that is left out goes unsaid."""

import json
import os
import warnings

import pytest

from jaxdiff.data import folder
from jaxdiff.evaluation.image_sets import open_folder


def fill(root, *names: str, picture: bytes = b"image") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)


def said(root) -> list[str]:
    """The warnings of a folder, without its path."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder.read(root)
    return [str(each.message).removeprefix(f"{root}: ") for each in caught]


def names(root) -> list[str]:
    return [name for name, _ in folder.read(root).entries]


def test_linked_folders_are_followed(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    fill(photos, "a.png", "deep/b.png")
    fill(elsewhere, "c.png", "deeper/d.png")
    (photos / "link").symlink_to(elsewhere)
    assert names(photos) == ["a.png", "deep/b.png", "link/c.png", "link/deeper/d.png"]
    assert said(photos) == []


def test_a_folder_is_visited_once_by_its_own_path(tmp_path):
    fill(tmp_path, "b/1.png", "c/2.png")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "z").symlink_to(tmp_path / "b")
    assert names(tmp_path) == ["b/1.png", "c/2.png"]


def test_two_links_to_one_folder_outside(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    fill(photos, "a.png")
    fill(elsewhere, "c.png", "sub/d.png")
    (photos / "one").symlink_to(elsewhere)
    (photos / "two").symlink_to(elsewhere)
    (photos / "two-sub").symlink_to(elsewhere / "sub")
    assert names(photos) == ["a.png", "one/c.png", "one/sub/d.png"]


def test_links_in_a_circle_end(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "over").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to("self")
    assert names(tmp_path) == ["a/1.png", "b/2.png"]


def test_the_folder_itself_may_be_a_link_and_hidden(tmp_path):
    fill(tmp_path, ".cache/a.png", ".cache/deep/b.png")
    (tmp_path / "photos").symlink_to(".cache")
    for root in (tmp_path / "photos", tmp_path / ".cache"):
        assert names(root) == ["a.png", "deep/b.png"] and said(root) == []


def test_links_to_files_are_read_and_broken_ones_counted(tmp_path):
    photos = tmp_path / "photos"
    fill(tmp_path, "blob")
    fill(photos, "a.png")
    (photos / "b.png").symlink_to(tmp_path / "blob")
    (photos / "c.png").symlink_to(tmp_path / "gone")
    found = folder.read(photos)
    assert [name for name, _ in found.entries] == ["a.png", "b.png", "c.png"]
    assert found[1]["image"] == b"image"
    with pytest.raises(FileNotFoundError):  # which training counts as unreadable
        found[2]


@pytest.mark.parametrize(
    "hidden", [".ipynb_checkpoints/a.png", ".git/a.png", "deep/.thumbs/a.png", "__MACOSX/a.png", "@eaDir/a.png"]
)
def test_hidden_folders_are_left_out(tmp_path, hidden):
    fill(tmp_path, "a.png", hidden)
    assert names(tmp_path) == ["a.png"]
    assert said(tmp_path) == [f"left out 1 hidden folder or image ({os.path.dirname(hidden)})"]


def test_hidden_pictures_are_left_out(tmp_path):
    fill(tmp_path, "a.png", "._a.png", ".b.JPG", ".DS_Store", "deep/._a.txt")
    assert names(tmp_path) == ["a.png"]
    assert said(tmp_path) == ["left out 2 hidden folders or images (._a.png, .b.JPG)"]


def test_files_of_unknown_kinds_are_counted(tmp_path):
    fill(tmp_path, "a.png", "b.HEIC", "c.heic", "deep/d.jxl", "e", "f.png.1", "a.txt", "a.json", "notes.md", "x.npz")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    assert names(tmp_path) == ["a.png"]
    (line,) = said(tmp_path)
    assert line.startswith("left out 6 files of unknown kinds (2 .heic, ")
    for kind in ("1 .jxl", "1 without suffix", "1 .1", "1 neither file nor folder"):
        assert kind in line


@pytest.mark.parametrize("suffix", [".JPG", ".jfif", ".mpo", ".jpe", ".avif"])
def test_suffixes_of_pictures(tmp_path, suffix):
    fill(tmp_path, f"a{suffix}")
    assert names(tmp_path) == [f"a{suffix}"] and said(tmp_path) == []


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path):
    fill(tmp_path, "set.png/a.png")
    assert names(tmp_path) == ["set.png/a.png"]


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    fill(tmp_path, "a.png", "closed/b.png")
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(folder.os, "scandir", scandir)
    assert names(tmp_path) == ["a.png"]
    assert said(tmp_path) == ["left out 1 folder that cannot be read (closed/ (Permission denied))"]


def test_pictures_that_metadata_does_not_list_are_counted(tmp_path):
    fill(tmp_path, *(f"{number}.png" for number in range(8)), ".hidden/a.png", "x.heic")
    rows = [{"file_name": "./0.png"}, {"file_name": ".hidden/a.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert names(tmp_path) == ["./0.png", ".hidden/a.png"]  # what is listed is meant
    assert said(tmp_path) == [
        "left out 7 images that metadata.jsonl does not list (1.png, 2.png, 3.png, 4.png, 5.png, …)"
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"file_name": None, "text": "a"}, "file_name is null"),
        ({"file_name": 7}, "file_name is not a string but 7"),
        ({"file_name": ["a.png"]}, r"file_name is not a string but \['a.png'\]"),
        ({"file_name": ""}, "no file can have the file_name ''"),
        ({"file_name": "a\0.png"}, "no file can have the file_name 'a"),
        ({"file_name": "\ud83d.png"}, "no file can have the file_name '.ud83d.png'"),
        ({"name": "a.png"}, "not a JSON object with a file_name$"),
    ],
)
def test_a_bad_file_name_is_named_by_line(tmp_path, row, message):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png"}) + "\n\n" + json.dumps(row))
    with pytest.raises(ValueError, match=rf"metadata\.jsonl:3: {message}"):
        folder.read(tmp_path)


def test_metadata_that_is_nested_deeply_is_named_by_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: not a JSON object"):
        folder.read(tmp_path)


@pytest.mark.parametrize("blank", ["  ", "", None, "\ufeff"])
def test_a_blank_text_hides_neither_the_caption_nor_the_file_beside(tmp_path, blank):
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "b.txt").write_text("beside")
    rows = [{"file_name": "a.png", "text": blank, "caption": "a cat"}, {"file_name": "b.png", "text": blank}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = folder.read(tmp_path)
    assert [found[0]["caption"], found[1]["caption"]] == ["a cat", "beside"]


def test_judged_folders_are_walked_alike(tmp_path, source):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for root, name in [(photos, "a.png"), (photos, ".ipynb_checkpoints/a.png"), (elsewhere, "b.png")]:
        fill(root, name, picture=source.examples[0]["image"])
    fill(photos, "c.heic")
    (photos / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    (photos / "link").symlink_to(elsewhere)
    with pytest.warns(UserWarning) as caught:
        shown = open_folder(photos)
    assert [str(file) for file in shown.files] == [f"{photos}/a.png", f"{photos}/link/b.png"]
    assert shown.caption(0) == "caf\ufffd"
    lines = [str(each.message) for each in caught]
    assert f"{photos}: left out 1 hidden folder or image (.ipynb_checkpoints)" in lines
    assert f"{photos}: left out 1 file of an unknown kind (1 .heic)" in lines
    assert any("a.png: 1 character of the caption replaced" in line for line in lines)


@pytest.mark.parametrize("place", ["up", "deep/up", "link/up"])
def test_a_link_to_a_folder_around_the_set_is_not_followed(tmp_path, place):
    photos = tmp_path / "photos"
    fill(tmp_path, "photos/deep/a.png", "neighbour/b.png", "elsewhere/c.png")
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    (photos / place).symlink_to(tmp_path)
    assert names(photos) == ["deep/a.png", "link/c.png"]
    assert said(photos) == [f"left out 1 link to a folder around it ({place})"]


def test_a_linked_set_is_not_left_upwards_either(tmp_path):
    fill(tmp_path, "mine/photos/a.png", "theirs/set/b.png", "theirs/other/c.png")
    (tmp_path / "mine" / "photos" / "link").symlink_to(tmp_path / "theirs" / "set")
    (tmp_path / "theirs" / "set" / "up").symlink_to("..")
    assert names(tmp_path / "mine" / "photos") == ["a.png", "link/b.png"]
    assert said(tmp_path / "mine" / "photos") == ["left out 1 link to a folder around it (link/up)"]


@pytest.mark.parametrize(
    "name, is_folder, hidden",
    [
        ("a/.b/c.png", False, True),
        ("a/__MACOSX/c.png", False, True),
        ("@eaDir", True, True),
        ("@eaDir", False, False),
        ("../a.png", False, False),
        ("./a.png", False, False),
    ],
)
def test_what_is_hidden(name, is_folder, hidden):
    assert folder.is_hidden(name, is_folder) == hidden


def test_names_cannot_write_to_the_terminal(tmp_path):
    fill(tmp_path, "a.png", ".\x1b[2J.png", ".b\n.png")
    (line,) = said(tmp_path)
    assert line.isprintable() and "\\x1b" in line


def test_long_values_of_metadata_are_cut(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": ["x" * 10_000] * 1000}))
    with pytest.raises(ValueError, match="file_name is not a string") as caught:
        folder.read(tmp_path)
    assert len(str(caught.value)) < len(str(tmp_path)) + 250
