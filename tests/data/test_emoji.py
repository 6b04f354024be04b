"""The emoji set on a made-up pair of packages: which are kept, how they are drawn, how the packages are fetched."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest

from experiments.recipes import emoji_data as command
from jaxdiff.data import emoji, images, sources


@pytest.fixture
def packages(tmp_path, emoji_packages):
    folder = tmp_path / "packages"
    for name, files in emoji_packages.items():
        for file, content in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(json.dumps(content))
    return folder


@pytest.fixture
def tarballs(tmp_path, emoji_packages):
    """The packages as npm packs them."""
    folder = tmp_path / "npm"
    folder.mkdir()
    for stem, name in (("iconify-json-noto-9.9.9", "noto"), ("emojibase-data-9.9.9", "emojibase")):
        with tarfile.open(folder / f"{stem}.tgz", "w:gz") as archive:
            for file, content in emoji_packages[name].items():
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(f"package/{file}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def test_flags_skin_tones_and_undrawn_ones_are_left_out(packages):
    found = emoji.read(packages)
    assert [each.name for each in found] == ["red hand", "green square", "blue heart"]
    assert found[0].tags == ("stop", "palm") and found[0].hexcode == "270B"


def test_drawings_are_right_at_any_size(packages):
    hand, _, heart = emoji.read(packages)
    for side in (64, 256):
        drawn = images.decode(emoji.draw(hand.svg, side))
        assert drawn.shape == (side, side, 3)
        np.testing.assert_array_equal(drawn[side // 4, side // 2], (255, 0, 0))
        np.testing.assert_array_equal(drawn[side // 16, side // 16], (255, 255, 255))
    blue = images.decode(emoji.draw(heart.svg, 64))  # its own view box is the square itself
    np.testing.assert_array_equal(blue, np.broadcast_to(np.uint8([0, 0, 255]), blue.shape))


def test_the_prepared_set_holds_names_and_tags(packages, tmp_path):
    builder = emoji.prepare(64, tmp_path / "data", packages, progress=False)
    examples = list(builder.as_data_source("train"))
    assert [example["caption"].decode() for example in examples] == ["red hand", "green square", "blue heart"]
    assert [example["tags"].decode() for example in examples] == ["stop, palm", "grass", ""]
    assert examples[1]["image"].shape == (64, 64, 3)
    (packages / "noto" / "icons.json").unlink()  # needed to prepare, not to read
    source = sources.open(sources.Emoji(), 64, "train", tmp_path / "data")
    assert source[2]["caption"] == "blue heart"
    with pytest.raises(FileNotFoundError, match="--resolutions 256"):
        sources.open(sources.Emoji(), 256, "train", tmp_path / "data")


def test_packages_that_are_wrong_leave_nothing_behind(packages, tmp_path):
    (packages / "emojibase" / "en" / "data.json").write_text("[]")
    with pytest.raises(ValueError, match="no emoji has both"):
        emoji.prepare(64, tmp_path / "data", packages)
    (packages / "emojibase" / "en" / "data.json").write_text("[")
    with pytest.raises(ValueError, match=r"data\.json is not JSON with emoji"):
        emoji.prepare(64, tmp_path / "data", packages)
    (packages / "noto" / "chars.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"chars\.json"):
        emoji.prepare(64, tmp_path / "data", packages)
    assert not list((tmp_path / "data").rglob("*.*"))


def test_the_command_uses_tarballs_that_are_there(tarballs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # neither npm nor a network
    command.main(tmp_path / "data", (64, 96), tarballs)
    assert "emoji at 96: 3 images" in capsys.readouterr().out
    assert len(sources.open(sources.Emoji(), 96, "train", tmp_path / "data")) == 3


def test_without_npm_the_command_says_which_tarball_goes_where(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError) as caught:
        command.main(tmp_path / "data")
    line = str(caught.value)
    assert "iconify-json-noto-VERSION.tgz" in line and str(tmp_path / "data" / "npm") in line and "\n" not in line


def test_a_failing_npm_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(command.shutil, "which", lambda name: "/usr/bin/npm")
    failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error more\n")
    monkeypatch.setattr(command.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(OSError, match=r"ENOTFOUND.*put the tarball of @iconify-json/noto") as caught:
        command.main(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_wrong_tarball_is_named(tarballs, tmp_path):
    whole = next(tarballs.glob("iconify-json-noto-*.tgz"))
    content, damaged = whole.read_bytes(), tmp_path / "damaged"
    damaged.mkdir()
    (damaged / whole.name).write_bytes(content[:40] + bytes(len(content) - 40))
    with pytest.raises(ValueError, match="not the npm package @iconify-json/noto"):
        command.main(tmp_path / "data", (64,), damaged)
    assert not [file for file in damaged.rglob("*") if file.is_file() and file.name != whole.name]
    (tarballs / "emojibase-data-9.9.9.tgz").write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"emojibase-data-9\.9\.9\.tgz: not the npm package emojibase-data"):
        command.main(tmp_path / "data", (64,), tarballs)


WRONG = {
    "nested deeply": ("emojibase/en/data.json", "[" * 200_000, "nested"),
    "names of another kind": ("emojibase/en/data.json", "{}", "it holds a dict, not a list"),
    "a name that is a number": ("emojibase/en/data.json", "[7]", "not of the form"),
    "a label that is a number": (
        "emojibase/en/data.json",
        '[{"label": 7, "hexcode": "1F7E9", "group": 8}]',
        "not of the form",
    ),
    "characters of another kind": ("noto/chars.json", "[1]", "it holds a list, not a dict"),
    "no drawings": ("noto/icons.json", "{}", "not of the form"),
}


@pytest.mark.parametrize("file, content, message", WRONG.values(), ids=WRONG)
def test_packages_of_another_form_are_one_line(packages, file, content, message):
    (packages / file).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        emoji.read(packages)
    assert "\n" not in str(caught.value)
