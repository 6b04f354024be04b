"""Data of one's own at the command line: Hugging Face folders, mixtures, aspect-ratio buckets, and a text encoder."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import convert, train
from jaxdiff.data.records import read as read_records

pytestmark = pytest.mark.usefixtures("small_presets")
SHORT = "--steps", 2, "--batch", 8, "--sample-every", 0, "--ema-decay", 0.995


def write(folder, count=16, first=0):
    """An imagefolder of the Hugging Face hub, half of its images wide and half high."""
    (folder / "train").mkdir(parents=True)
    lines = []
    for i in range(first, first + count):
        image = np.full((64, 96, 3) if i % 2 else (96, 64, 3), 7 * i, np.uint8)
        Image.fromarray(image).save(folder / "train" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"grey {i}"}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_hugging_face_folder_mixed_with_shapes(standin, tmp_path, command):
    data = (
        "--data",
        f"hf:{write(tmp_path / 'mine')}",
        "shapes",
        "--data-weights",
        3,
        1,
        "--examples",
        8,
        "--held-out",
        2,
    )
    arguments = *data, "--text", standin / "text", "--data-dir", tmp_path / "data", *SHORT
    done = command(train, "imagen.base64", *arguments, "--out", tmp_path / "run")
    assert (done.code == 0 and "'text'" in done.err + done.out) or "text" in done.err + done.out, done.err
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert kept["data"][1] == "shapes" and kept["data-weights"] == [3, 1]
    again = command(train, "--config", tmp_path / "run" / "settings.json")
    assert again.code == 0, again.err
    done = command(train, "imagen.base64", *arguments, "--data-weights", 1, 1, "--out", tmp_path / "run")
    assert done.code == 2 and "--data-weights 3.0 1.0 → 1.0 1.0" in done.err, done.err


@pytest.mark.slow
def test_images_keep_their_shape_in_buckets(standin, tmp_path, command):
    data = "--data", f"hf:{write(tmp_path / 'mine', 32)}", "--data-dir", tmp_path / "data"
    arguments = *data, "--text", standin / "text", *SHORT, "--buckets", "--log-every", 1, "--steps", 4
    done = command(train, "imagen.base64", *arguments, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    done = command(train, "imagen.sr256", *arguments, "--text", "none", "--crop", 64, "--out", tmp_path / "sr")
    assert done.code == 2 and "--crop 64 and --buckets" in done.err


@pytest.mark.parametrize(
    "more, culprit",
    [
        (("--data", "hf:/nowhere"), "/nowhere"),
        (("--data", "shapes", "shapes"), "named twice"),
        (("--data", "shapes", "rainbow", "--data-weights", 1), "--data-weights"),
        (("--data",), "--data names no source"),
    ],
)
def test_bad_data(more, culprit, standin, tmp_path, command):
    done = command(train, "imagen.base64", *more, *SHORT, "--text", standin / "text", "--out", tmp_path / "run")
    assert done.code == 2 and culprit in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run" / "model").exists()


def test_a_text_encoder_has_to_be_named(tmp_path, command):
    """The error has three choices, each with its command."""
    data = f"hf:{write(tmp_path / 'mine')}"
    done = command(train, "imagen.base64", "--data", data, *SHORT, "--out", tmp_path / "run")
    assert done.code == 2 and done.err.count("\n") == 1
    for words in ("--text google/flan-t5-base (width 768", f"experiments.train t5 --data {data}", "experiments.embed"):
        assert words in done.err
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "model").exists()


def test_a_folder_is_converted(tmp_path, command):
    folder = write(tmp_path / "mine", 6)
    done = command(convert, folder, "--out", tmp_path / "records")
    assert done.code == 0 and "6 images" in done.out, done.err
    assert read_records(tmp_path / "records")[0]["caption"] == "grey 0"
