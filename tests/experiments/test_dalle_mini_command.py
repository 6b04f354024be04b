"""dalle-mini by `experiments.sample`: two folders as published, with candidates and a mask."""

import json

import numpy as np
import pytest
import small_dalle_mini
from PIL import Image

from experiments import sample


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_dalle_mini.folder(tmp_path_factory.mktemp("dalle"))


def test_sample_with_candidates(folders, command, tmp_path):
    """The shipped CLIP ranks the candidates; the settings are those of the published models."""
    given = "A small red circle!", "--weights", folders[0], "--vae", folders[1], "--per-prompt", 2, "--candidates", 2
    done = command(sample, *given, "--out", tmp_path / "images")
    assert done.code == 0, done.err
    paths = sorted((tmp_path / "images").glob("0*.png"))
    assert len(paths) == 2 and {Image.open(path).size for path in paths} == {(8, 8)}
    values = json.loads(Image.open(paths[0]).text["jaxdiff"])["settings"]
    assert values["vae"] == str(folders[1]) and values["candidates"] == 2
    assert values["stages"][0]["top_k"] == 256 and values["stages"][0]["guidance"] == 16.0


def test_completion_and_settings(folders, command, tmp_path):
    """An image and a mask, and other settings of tokens."""
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "image.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = "a", "--weights", folders[0], "--vae", folders[1], "--top-k", 3, "--guidance", 2, "--temperature", 0.9
    images = "--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"
    done = command(sample, *given, *images, "--out", tmp_path / "images")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "has no decoder of its codes: name the folder of its VQGAN (--vae)"),
        (("--vae", "{mini}"), "_class_name"),
        (("--vae", "{vqgan}", "--lora", "style.safetensors"), "LoRAs and ControlNets are for a Stable Diffusion"),
        (("--vae", "{vqgan}", "--size", "16"), "samples 4×4 codes, not 8×8"),
        (("--vae", "{vqgan}", "--steps", 5), "--steps: this model samples tokens"),
    ],
)
def test_refused(arguments, message, folders, command, tmp_path):
    places = {"mini": folders[0], "vqgan": folders[1]}
    given = [each.format(**places) if isinstance(each, str) else each for each in arguments]
    done = command(sample, "a", "--weights", folders[0], *given, "--out", tmp_path / "images")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
