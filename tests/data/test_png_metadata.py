"""What a PNG of ours says of itself, and that the text of other programs is not taken for it."""

import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from jaxdiff.data import png_metadata
from jaxdiff.data.grids import save_png
from jaxdiff.data.png_metadata import Metadata, read
from jaxdiff.evaluation.image_sets import open_folder, without_captions

OURS = Metadata("ein roter Käfer 🐱\n\u2028\x00", 7, {"number": 3, "stages": [{"steps": 2}]})
WORKFLOW = json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 5}}})


def png(*chunks, after=()):
    """A PNG with (name, text[, kind]) chunks before and after its pixels."""
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    for name, text in chunks:
        info.add_itxt(name, text)
    Image.new("RGB", (64, 64), "red").save(buffer, "png", pnginfo=info)
    data = buffer.getvalue()
    end = data.rindex(b"IEND") - 4
    return data[:end] + b"".join(chunk(*each) for each in after) + data[end:]


def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_what_is_written_is_read(tmp_path):
    save_png(tmp_path / "a.png", np.zeros((4, 4, 3)), OURS)
    assert read((tmp_path / "a.png").read_bytes()) == OURS
    with Image.open(tmp_path / "a.png") as image:
        assert list(image.text) == ["jaxdiff"] and json.loads(image.text["jaxdiff"])["version"] == 1
    save_png(tmp_path / "b.png", np.zeros((4, 4, 3)))
    assert read((tmp_path / "b.png").read_bytes()) is None


def test_settings_with_names_that_are_not_unicode_lose_no_picture(tmp_path):
    """A file of bytes that are no UTF-8, given with --image: Python's name of it has lone surrogates."""
    save_png(tmp_path / "a.png", np.zeros((4, 4, 3)), Metadata("a cat", 1, {"image": "caf\udce9.png"}))
    assert read((tmp_path / "a.png").read_bytes()).settings == {"image": "caf\udce9.png"}


def test_text_that_other_programs_have_moved_or_rewritten():
    text = png_metadata.to_text(Metadata("a cat", 1))
    assert read(png(after=[(b"iTXt", b"jaxdiff\0\0\0\0\0" + text.encode())])).prompt == "a cat"
    assert read(png(after=[(b"tEXt", b"jaxdiff\0" + text.encode())])).prompt == "a cat"
    assert read(png(after=[(b"zTXt", b"jaxdiff\0\0" + zlib.compress(text.encode()))])).prompt == "a cat"
    assert read(png(("parameters", "steps: 20"), ("jaxdiff", text))).prompt == "a cat"


@pytest.mark.parametrize(
    "name, text",
    [
        ("prompt", WORKFLOW),
        ("prompt", "a red circle"),
        ("workflow", WORKFLOW),
        ("parameters", "a cat\nSteps: 20, Sampler: Euler a"),
        ("Description", "a cat"),
        ("invokeai_metadata", '{"positive_prompt": "a cat"}'),
        ("jaxdiff2", png_metadata.to_text(OURS)),
        ("Comment", "jaxdiff\0 in it"),
    ],
)
def test_text_of_other_programs_is_none(name, text):
    assert read(png((name, text))) is None


@pytest.mark.parametrize("content", [b"", b"jaxdiff\0", b"GIF89a jaxdiff\0"])
def test_what_is_no_png_has_none(content):
    assert read(content) is None


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a cat", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "is not JSON with metadata|no JSON object"),
        ('{"prompt": "a cat"}', "with a version"),
        ('{"version": 2, "prompt": "a cat", "seed": 1, "settings": {}}', "version 2"),
        ('{"version": true, "prompt": "a cat", "seed": 1, "settings": {}}', "with a version"),
        ('{"version": 1, "prompt": 7, "seed": 1, "settings": {}}', "lacks"),
        ('{"version": 1, "prompt": "a", "seed": true, "settings": {}}', "lacks"),
        ('{"version": 1, "prompt": "\\ud83d", "seed": 1, "settings": {}}', "not Unicode"),
    ],
)
def test_ours_that_is_damaged(text, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read(png(("jaxdiff", text)))
    (tmp_path / "a.png").write_bytes(png(("jaxdiff", text)))
    with pytest.warns(UserWarning, match=f"a.png: no caption, .*{reason}") as warned:
        assert open_folder(tmp_path).caption(0) is None
    assert len(warned) == 1 and len(str(warned[0].message)) < 400


def test_a_text_that_explodes_is_one_line(tmp_path):
    """Kilobytes that become gigabytes."""
    bomb = (b"zTXt", b"jaxdiff\0\0" + zlib.compress(bytes(80 << 20)))
    with pytest.raises(ValueError, match="too large"):
        read(png(after=[bomb]))
    (tmp_path / "a.png").write_bytes(png(after=[bomb]))
    (tmp_path / "b.png").write_bytes(png())
    with pytest.warns(UserWarning, match="a.png") as warned:
        assert len(open_folder(tmp_path)) in (1, 2)
    assert len(warned) == 1


def test_captions_of_a_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(("jaxdiff", png_metadata.to_text(Metadata("a cat", 1)))))
    (tmp_path / "b.png").write_bytes(png(("prompt", WORKFLOW)))
    (tmp_path / "c.png").write_bytes(png(("jaxdiff", png_metadata.to_text(Metadata("a dog", 1)))))
    (tmp_path / "c.txt").write_text("beside it")
    (tmp_path / "d.png").write_bytes(png(("jaxdiff", png_metadata.to_text(Metadata(" ", 1)))))  # drawn without text
    found = open_folder(tmp_path)
    captions = [found.caption(i) for i in range(4)]
    assert captions == ["a cat", None, "beside it", None]
    line = without_captions(captions)
    assert line.startswith("2 of 4 images have no caption") and ".txt" in line and "metadata.jsonl" in line
    assert without_captions(["a", ""]) == ""
