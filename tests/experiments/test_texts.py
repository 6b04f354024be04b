"""Files of texts: where a line ends, and what encodings are read."""

import codecs
import json

import pytest
from PIL import Image

from experiments import sample
from experiments.options.texts import lines
from experiments.tasks.tokenizers import lines_of
from jaxdiff.data import png_metadata

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_only_line_feeds_end_a_line(separator, tmp_path):
    """Also where `str.splitlines` would part."""
    file = tmp_path / "texts.txt"
    file.write_bytes(f"a red{separator}circle\r\n\r\na blue star\n{separator}  \n last ".encode())
    assert lines(file) == [f"a red{separator}circle", "a blue star", "last"]
    assert lines_of(file, 9) == lines(file)


@pytest.mark.parametrize(
    "encoding, mark",
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ],
)
def test_byte_order_marks(encoding, mark, tmp_path):
    (tmp_path / "texts.txt").write_bytes(mark + "ein Käfer\r\n猫\n🐱".encode(encoding))
    assert lines(tmp_path / "texts.txt") == ["ein Käfer", "猫", "🐱"]


def test_marks_of_files_that_were_joined(tmp_path):
    (tmp_path / "texts.txt").write_text("\ufeffone\n \ufeff two\n\ufeff\n", encoding="utf-8")
    assert lines(tmp_path / "texts.txt") == ["one", "two"]


def test_a_carriage_return_within_a_line_is_a_space_of_it(tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"a\rb\nc\r\r\n")
    assert lines(tmp_path / "texts.txt") == ["a\rb", "c"]
    (tmp_path / "texts.txt").write_bytes(b"one line\r")
    assert lines(tmp_path / "texts.txt") == ["one line"]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"a red circle\ra blue star\r", "carriage returns alone"),
        ("a cat\nein Käfer".encode("latin-1"), ":2: not text in UTF-8"),
        (codecs.BOM_UTF16_LE + "a".encode("utf-16-le") + b"\x00", "cut off"),
        (codecs.BOM_UTF16_LE + "a\ud83d".encode("utf-16-le", "surrogatepass"), ":1: not text"),
        ("a red circle\n".encode("utf-16-le"), ":1: not text in UTF-8, nor marked as UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ":1: not text"),
    ],
)
def test_what_is_no_text(content, reason, tmp_path, command):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    done = command(sample, "--prompts", file, "--out", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1 and str(file) in done.err and reason in done.err
    assert not (tmp_path / "out").exists()


def test_the_command_draws_a_picture_a_line(standin, tmp_path, command):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red\u2028circle\r\na blue\x85star".encode())
    arguments = "--prompts", tmp_path / "prompts.txt", "--up-to", 64, "--steps", 1, "--weights", standin
    done = command(sample, *arguments, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000-a-red-circle.png", "0001-a-blue-star.png", "grid.png"]
    with Image.open(tmp_path / "out" / names[0]) as image:
        assert json.loads(image.text[png_metadata.KEY])["prompt"] == "a red\u2028circle"
