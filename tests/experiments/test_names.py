"""Files named by prompts: what a name may hold, and that no name, and no full disk, loses what can be saved."""

import errno
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import quickstart, sample
from experiments.output import names
from experiments.output.names import BYTES, Named, file_name, save_all
from jaxdiff.data import grids, png_metadata
from jaxdiff.data.png_metadata import Metadata

ROOT = Path(__file__).parents[2]

TEXTS = {
    "a red circle": "a-red-circle",
    "A Photo, of 3 cats!": "a-photo-of-3-cats",
    "": "",
    "   ": "",
    "?!*": "",
    "../../etc/passwd": "etc-passwd",
    "..": "",
    ".hidden": "hidden",
    'a/b\\c:d|e<f>g"h*i?j': "a-b-c-d-e-f-g-h-i-j",
    "line\nbreak\ttab\x00nul\x1b[31m\u2028\x85": "line-break-tab-nul-31m",
    "con": "con",
    "snake_case": "snake_case",
    "ends with a dot.": "ends-with-a-dot",
    "ein Käfer": "ein-käfer",
    "ein Ka\u0308fer": "ein-käfer",  # composed
    "हिन्दी में": "हिन्दी-में",
    "सुबह": "सुबह",
    "猫在垫子上": "猫在垫子上",
    "❤️ love 🐱": "love",  # the heart's variation selector is a mark of no letter
    "half \ud83d emoji": "half-emoji",
    "\u202egnp.exe": "gnp-exe",  # turns the direction of what is shown
}


@pytest.mark.parametrize("text, slug", TEXTS.items(), ids=map(ascii, TEXTS))
def test_names(text, slug):
    assert file_name("0007", text) == f"0007-{slug}.png".replace("-.png", ".png")
    assert file_name("07", text, "-64.png") == f"07-{slug}-64.png".replace("--64", "-64")


LONG = {
    "letters": "ab " * 500,
    "one word": "x" * 5_000,
    "two bytes each": "ß" * 500,
    "three bytes each": "猫" * 500,
    "four bytes each": "𓀀" * 500,
    "marks": "e\u0323\u0306\u0331" * 500,
    "vowel signs": "नि" * 500,
    "one letter with marks": "z" + "\u0331\u0323\u0353" * 500,
    "words of four bytes": "𓀀𓀁 " * 500,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("suffix", [".png", "-1024.png"])
def test_long_names_are_cut_by_bytes(text, suffix, tmp_path):
    name = file_name("0123", text, suffix)
    assert name.startswith("0123-") and name.endswith(suffix) and len(name.encode()) <= BYTES < 255 - 64
    slug = name.removeprefix("0123").removesuffix(suffix)
    assert 12 < len(slug) <= 60 and not slug.endswith("-")
    (tmp_path / name).touch()
    # Nothing that could have stayed is missing.
    assert len(slug) >= 56 or len(name.encode()) > BYTES - 8


def test_marks_stay_with_their_letters():
    cluster = "q\u0323\u0307"  # has no composed form
    slug = file_name("0", cluster * 100).removeprefix("0-").removesuffix(".png")
    assert slug == cluster * (len(slug) // 3) and len(slug) % 3 == 0 and len(slug) > 50
    syllable = "क्षि"
    slug = file_name("0", syllable * 100).removeprefix("0-").removesuffix(".png")
    rest = (syllable * 100)[len(slug) :]
    assert unicodedata.category(rest[0])[0] != "M"


def of(*texts):
    picture = np.zeros((4, 4, 3), np.float32)
    return [Named(f"{i:04d}", text, picture, Metadata(text, 1)) for i, text in enumerate(texts)]


def test_a_name_that_the_file_system_refuses_becomes_the_number(tmp_path, monkeypatch):
    """As on file systems that take fewer bytes than others."""
    monkeypatch.setattr(names, "BYTES", 10_000)
    monkeypatch.setattr(names, "CHARACTERS", 10_000)
    with pytest.warns(UserWarning, match="2 images could not be saved under their prompts .*File name too long") as w:
        saved = save_all(tmp_path, of("a red circle", "x" * 300, "猫" * 90))
    assert len(w) == 1 and "0001.png" in str(w[0].message)
    assert [path.name for path in saved] == ["0000-a-red-circle.png", "0001.png", "0002.png"]
    assert sorted(tmp_path.iterdir()) == saved
    assert png_metadata.read(saved[2].read_bytes()).prompt == "猫" * 90


def test_a_locale_whose_names_have_not_all_characters(tmp_path):
    code = (
        "import numpy as np; from pathlib import Path; from experiments.output.names import *; import sys;"
        "texts = ['a red circle', '\\u732b', '\\u0161\\u010d'];"
        "print(sys.getfilesystemencoding());"
        f"save_all(Path({str(tmp_path)!r}), [Named(f'{{i:04d}}', t, np.zeros((4, 4, 3)), Metadata(t, 1))"
        " for i, t in enumerate(texts)])"
    )
    posix = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | posix, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != "utf-8":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["0000-a-red-circle.png", "0001.png", "0002.png"]
        assert "2 images could not be saved under their prompts" in done.stderr


@pytest.fixture
def refused(monkeypatch):
    """`refused(code, *numbers)`: files that begin with these numbers, or all, cannot be written."""

    def refuse(code, *numbers):
        real = grids.write

        def write(path, image, **options):
            if not numbers or path.name.startswith(numbers):
                raise OSError(code, os.strerror(code), str(path))
            real(path, image, **options)

        monkeypatch.setattr(grids, "write", write)

    return refuse


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EINVAL])
def test_what_can_be_saved_is_saved(code, refused, tmp_path):
    refused(code, "0001", "0003")
    with pytest.raises(OSError, match=r"2 of 5 images could not be saved, the first one 0001\.png") as told:
        save_all(tmp_path, of("a", "b", "c", "d", ""))
    assert told.value.errno == code and os.strerror(code) in str(told.value) and str(tmp_path) in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000-a.png", "0002-c.png", "0004.png"]


def test_a_folder_that_is_gone_is_made_again(tmp_path):
    (saved,) = save_all(tmp_path / "gone" / "again", of("a"))
    assert saved.is_file()


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="2 of 2 images could not be saved"):
        save_all(tmp_path / "out", of("a", "b"))


def test_the_command_with_long_prompts_in_many_scripts(standin, tmp_path, command):
    prompts = ["猫" * 200, "𓀀" * 100, "../../a", "a\u2028b", "e\u0301" * 200, "🐱", "a" * 3_000]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    arguments = "--prompts", tmp_path / "prompts.txt", "--up-to", 64, "--weights", standin, "--steps", 1
    done = command(sample, *arguments, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = sorted(path for path in (tmp_path / "out").iterdir() if path.name != "grid.png")
    assert [png_metadata.read(path.read_bytes()).prompt for path in found] == prompts
    assert [path.name[:4] for path in found] == [f"{i:04d}" for i in range(7)] and found[5].name == "0005.png"
    assert Image.open(tmp_path / "out" / "grid.png").size[1] < 1_000  # captions on the sheet are cut, too


def test_the_command_on_a_disk_that_fills_up(standin, tmp_path, command, refused):
    refused(errno.ENOSPC, "0001")
    arguments = "--up-to", 64, "--batch", 2, "--weights", standin, "--steps", 1, "--out", tmp_path / "out"
    done = command(sample, "a", "b", "c", "d", *arguments)
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "1 of 2 images could not be saved" in last and "No space left" in last
    # What was drawn is there, the sheet too; nothing more was drawn.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000-a.png", "grid.png"]


def test_quickstart_on_a_disk_that_fills_up(standin, tmp_path, command, refused, monkeypatch):
    drawn = {side: np.zeros((2, side, side, 3), np.float32) for side in (64, 256, 1024)}
    monkeypatch.setattr(quickstart, "sample", lambda *_: (drawn, {}))
    refused(errno.ENOSPC, "00-", "00.", "grid")
    done = command(quickstart.main, "猫" * 200, "b", "--weights", standin, "--out", tmp_path)
    assert done.code == 2 and "3 of 6 images could not be saved" in done.err.strip().splitlines()[-1]
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["01-b-1024.png", "01-b-256.png", "01-b-64.png"]
    assert (tmp_path / "report.json").is_file()


def test_all_steps_are_tried():
    done = []

    def fail(text):
        done.append(text)
        raise OSError(text)

    with pytest.raises(OSError, match="one"):
        quickstart.attempt(lambda: fail("one"), lambda: done.append("two"), lambda: fail("three"))
    assert done == ["one", "two", "three"]
