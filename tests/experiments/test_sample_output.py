"""Where images go: no folder is written over by accident, grids have pages, and what cannot work is said."""

import pytest
from PIL import Image

from experiments import sample
from experiments.output.folder import folder_for_images
from jaxdiff.data.shapes_caption import WORDS, caption, unknown_words
from jaxdiff.data.shapes_scene import scene


def test_a_folder_with_images_is_refused(standin, tmp_path, command):
    small = "--weights", standin, "--up-to", 64, "--steps", 2
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "mine.jpg")
    done = command(sample, "a red circle", *small, "--out", tmp_path / "photos")
    assert done.code == 2 and "has images already" in done.err and "--overwrite" in done.err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["mine.jpg"]
    done = command(sample, "a red circle", *small, "--out", tmp_path / "photos", "--overwrite", "--no-grid")
    assert done.code == 0 and "no grid" in done.out, done.err
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["0000-a-red-circle.png", "mine.jpg"]


def test_the_first_free_folder(tmp_path):
    default = tmp_path / "sample"
    assert folder_for_images(None, default, False) == default
    for name in ("sample", "sample-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    assert folder_for_images(None, default, False) == tmp_path / "sample-3"
    assert folder_for_images(None, default, True) == default
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    assert folder_for_images(tmp_path / "notes", default, False) == tmp_path / "notes"


def test_a_grid_has_pages(standin, tmp_path, command, monkeypatch):
    monkeypatch.setattr(sample, "PAGE", 3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle {i}" for i in range(7)))
    small = "--weights", standin, "--up-to", 64, "--steps", 2
    done = command(sample, "--prompts", prompts, *small, "--out", tmp_path / "out")
    assert done.code == 0 and "grid.png to grid-3.png" in done.out, done.err
    pages = [Image.open(tmp_path / "out" / name).size for name in ("grid.png", "grid-2.png", "grid-3.png")]
    assert pages[0] == pages[1] and pages[2][0] < pages[0][0]
    assert len(list((tmp_path / "out").glob("0*.png"))) == 7


@pytest.mark.parametrize("weights", ["-2", "1,-0.5,1"])
def test_guidance_below_0_is_refused(weights, standin, tmp_path, command):
    done = command(sample, "a red circle", "--weights", standin, "--guidance", weights, "--out", tmp_path / "out")
    assert done.code == 2 and "--guidance" in done.err and "use --negative" in done.err


def test_too_few_steps_are_warned_of(standin, tmp_path, command):
    small = "a red circle", "--weights", standin, "--up-to", 64
    done = command(sample, *small, "--sampler", "ddpm", "--steps", "1,,", "--out", tmp_path / "a")
    assert done.code == 0 and "--steps 1: DDPM needs 2 or more" in done.err  # as many as the preset has
    done = command(sample, *small, "--out", tmp_path / "b")
    assert "needs" not in done.err


def test_words_that_the_shipped_cascade_has_never_seen(tmp_path, command, monkeypatch):
    """One warning names them, and the words there are; other weights may know them."""
    monkeypatch.setattr(sample.WeightsOptions, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(sample, "_embedded", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        command(sample, "a photo of a cat", "a red circle", "--out", tmp_path / "out")
    with pytest.warns(UserWarning, match="never seen 'photo', 'cat'.* whose words are a, above"):
        settings = sample.Run(("a photo of a cat", "a red, striped circle."))
        sample._warn_of_unknown_words(settings, settings.prompt)


def test_the_words_are_those_of_the_captions():
    used = set()
    for split in ("train", "held_out"):
        for index in range(1500):
            text = caption(scene(split, index), split, index).text
            assert not unknown_words([text]), text
            used |= set(text.replace(",", "").split())
    assert used == WORDS
    assert unknown_words(["A Red (circle)!", "two 猫"]) == ["two", "猫"]
