"""Bad input: one line that names the culprit, exit code 2, nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import benchmark, evaluate, export, sample, train
from jaxdiff.weights import tree

ROOT = Path(__file__).parents[2]

ARGUMENTS = {
    "unknown sampler": (("--sampler", "magic"), "'magic'"),
    "unknown thresholding": (("--thresholding", "soft"), "'soft'"),
    "no steps": (("--steps", "0"), "steps"),
    "no steps at one stage": (("--steps", "4,-1,4"), "-1"),
    "steps that are no number": (("--steps", "many"), "many"),
    "values for other stages": (("--steps", "4,4"), "--steps"),
    "guidance not a number": (("--guidance", "nan"), "guidance"),
    "guidance not finite": (("--guidance", "1,inf,1"), "guidance"),
    "size off the stride": (("--size", "65"), "65"),
    "size off the stride in one direction": (("--size", "64x60"), "60"),
    "size in words": (("--size", "large"), "large"),
    "tiles off the stride": (("--tile", "100"), "100"),
    "tiles that overlap too much": (("--tile", "96", "--tile-overlap", "64"), "overlap"),
    "no such stage": (("--up-to", "512"), "512"),
    "no such level": (("--aug-level", "1.5"), "aug_level"),
    "a level beyond training": (("--aug-level", "0.8"), "aug_level 0.8 is above 0.3"),
    "percentile without dynamic": (("--thresholding", "static", "--percentile", "0.9"), "--percentile"),
    "eta without ddim": (("--sampler", "euler", "--eta", "0.5"), "--eta"),
    "an interval upside down": (("--guidance-interval", "1", "-1"), "interval"),
    "percentile": (("--thresholding", "dynamic", "--percentile", "2"), "percentile"),
    "no images": (("--per-prompt", "0"), "--per-prompt 0"),
    "an option that does not exist": (("--colour", "red"), "--colour"),
    "a number that is none": (("--seed", "x"), "--seed"),
    "no such folder of weights": (("--weights", "/nowhere"), "/nowhere"),
    "no such image": (("--image", "/nowhere/a.png"), "/nowhere/a.png: no such image"),
    "a LoRA for a cascade": (("--lora", "a.safetensors"), "standin0: LoRAs and ControlNets are for"),
    "no such file of prompts": (("--prompts", "/nowhere/prompts.txt"), "/nowhere/prompts.txt"),
}


def one_line(done, culprit):
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert culprit in done.err, done.err


def test_an_export_into_a_run(command, tmp_path):
    """The run stays as it is."""
    (tmp_path / "settings.json").write_text("{}")
    for name, given in {"imagen": "--base64", "dalle": "--weights", "unclip": "--weights"}.items():
        done = command(export, name, given, tmp_path / "other", "--out", tmp_path)
        one_line(done, f"--out {tmp_path}: a training run, choose another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, standin, tmp_path, command):
    arguments, culprit = ARGUMENTS[case]
    out = tmp_path / "out"
    done = command(sample, "a red circle", "--weights", standin, "--out", out, *arguments)
    one_line(done, culprit)
    assert not out.exists()


def test_nothing_to_draw(tmp_path, command):
    one_line(command(sample, "--out", tmp_path / "out"), "--prompts")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(standin, tmp_path, command):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    one_line(command(sample, "a red circle", "--weights", standin, "--out", out), str(tmp_path / "file"))
    scores = ("--n", 1, "--weights", standin, "--json", out / "scores.json")
    one_line(command(evaluate, "attributes", *scores), str(tmp_path / "file"))


def damaged(standin, folder, change):
    """A copy of the stand-in whose base64 was changed."""
    shutil.copytree(standin, folder)
    change(folder / "base64")
    return folder


def without_a_key(folder):
    params, _ = tree.load_tree(folder / "model.safetensors")
    del params["head"]
    tree.save_tree(folder / "model.safetensors", params, {})


def with_another_key(folder):
    params, _ = tree.load_tree(folder / "model.safetensors")
    tree.save_tree(folder / "model.safetensors", {**params, "spare": {"kernel": np.zeros(3)}}, {})


def of_another_preset(folder):
    settings = json.loads((folder / "stage.json").read_text())
    settings["stage"]["unet"]["channels"] = 16
    (folder / "stage.json").write_text(json.dumps(settings))


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_unknown_settings(folder):
    settings = json.loads((folder / "stage.json").read_text())
    settings["stage"]["colour"] = "red"
    (folder / "stage.json").write_text(json.dumps(settings))


def nested(folder):
    (folder / "stage.json").write_text("[" * 10**5 + "]" * 10**5)


def with_size(**sizes):
    def change(folder):
        settings = json.loads((folder / "stage.json").read_text())
        settings["stage"]["unet"] |= sizes
        (folder / "stage.json").write_text(json.dumps(settings))

    return change


def with_heads(count):
    def change(folder):
        settings = json.loads((folder / "stage.json").read_text())
        settings["stage"]["unet"]["attention"]["heads"] = count
        (folder / "stage.json").write_text(json.dumps(settings))

    return change


def of_whole_numbers(folder):
    params, _ = tree.load_tree(folder / "model.safetensors")
    params["head"]["bias"] = params["head"]["bias"].astype(np.int32)
    tree.save_tree(folder / "model.safetensors", params, {})


def with_a_hostile_key(folder):
    params, _ = tree.load_tree(folder / "model.safetensors")
    tree.save_tree(folder / "model.safetensors", {**params, "\x1b[2J\x07" + "x" * 10**6: np.zeros(3)}, {})


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (nested, "stage.json is not JSON with settings: it is nested too deeply"),
        (with_size(patch=0), "patch of EfficientUNetConfig is 0, it takes only whole numbers from 1 to 64"),
        (with_size(blocks=[10**6]), "blocks of EfficientUNetConfig is (1000000,), it takes only whole numbers from 0"),
        (with_heads(3), "attention at level 0: 3 heads do not divide a width of 8"),
        (of_whole_numbers, "1 of another type (head/bias holds I32): only F16, BF16, F32, F64 are read"),
        (with_a_hostile_key, r"1 unexpected (\x1b[2J\x07xxx"),
        (without_a_key, "missing (head/bias, head/kernel)"),
        (with_another_key, "unexpected (spare/kernel)"),
        (of_another_preset, "of another shape"),
        (cut_short, "truncated or damaged"),
        (with_unknown_settings, "stage.json"),
    ],
)
def test_weights(change, culprit, standin, tmp_path, command):
    folder, out = damaged(standin, tmp_path / "weights", change), tmp_path / "out"
    one_line(command(sample, "a red circle", "--weights", folder, "--out", out), culprit)
    assert not out.exists()


def test_full_disk_while_saving_a_picture(standin, tmp_path, command, monkeypatch):
    real = Image.Image.save

    def half(self, file, **options):
        real(self, file, **options)
        Path(file).write_bytes(Path(file).read_bytes()[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(Image.Image, "save", half)
    done = command(sample, "a red circle", "--up-to", 64, "--weights", standin, "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: ") and "No space left" in done.err
    assert list((tmp_path / "out").iterdir()) == []


def photos(folder: Path) -> Path:
    """Eight captioned images; then one that is damaged, one without a caption, and one that is not there."""
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (64, 64), (30 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a dark red square")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "broken.txt").write_text("a damaged square")
    Image.new("RGB", (64, 64)).save(folder / "unnamed.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "gone.txt").write_text("a lost square")
    return folder


@pytest.fixture
def training(standin, tmp_path, small_presets):
    """Arguments that train the base for two steps."""
    text, data = standin / "text", photos(tmp_path / "photos")
    settings = {"text": text, "data": f"folder:{data}", "batch": 8, "steps": 2, "sample-every": 0}
    settings |= {"ema-decay": 0.995}  # as in test_training.py, whose compiled program is the same then
    settings |= {"out": tmp_path / "run", "data-dir": tmp_path / "data"}
    return ["imagen.base64", *(part for name, value in settings.items() for part in (f"--{name}", value))]


def test_bad_pictures_are_skipped_or_under_strict_an_error(training, tmp_path, command):
    done = command(train, *training)
    assert done.code == 0, done.err
    warned = [line for line in done.err.splitlines() if line.startswith("warning: skipped")]
    assert len(warned) == 3 and all(name in "".join(warned) for name in ("broken.png", "unnamed.png", "gone.png"))
    assert "skipped 3 (2 unreadable, 1 no caption) of 11 examples" in done.out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()

    done = command(train, *training, "--out", tmp_path / "strict", "--strict")
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ") and any(name in last for name in ("broken", "unnamed", "gone")), done.err
    assert not (tmp_path / "strict" / "model" / "model.safetensors").exists()

    # The folder of a finished run, with other settings: its checkpoint is of another model.
    done = command(train, *training, "--learning-rate", "0.5")
    assert done.code == 2
    assert "saved with other settings" in done.err.splitlines()[-1] and "learning_rate" in done.err
    done = command(train, *training, "--batch", 16)
    assert done.code == 2 and "data.batch was 8 and is 16 here" in done.err.splitlines()[-1]


def test_training_arguments(standin, tmp_path, command):
    out = "--out", tmp_path / "run"
    for arguments, culprit in (
        (("imagen.base65",), "base65"),
        (("imagen.sr256", "--preset", "2b"), "--preset 2b"),
        (("imagen.sr256", "--data", "paintings"), "paintings"),
        (("imagen.sr256", "--data", "folder:/nowhere"), "/nowhere"),
        (("imagen.base64", "--text", "/nowhere"), "/nowhere"),
        (("imagen.sr256", "--init", "/nowhere"), "/nowhere"),
        (("imagen.sr256", "--steps", 0), "--steps 0"),
        (("imagen.sr256", "--batch", 0), "--batch 0"),
        (("imagen.sr256", "--batch", 6, "--accumulate", 4), "a batch of 6 does not divide"),
        (("imagen.sr256", "--seed", -1), "error: --seed -1: must"),
        (("imagen.sr256", "--workers", -1), "--workers -1"),
        (("imagen.sr256", "--limit", -1), "--limit -1"),
        (("imagen.base64", "--text-length", 0), "--text-length 0"),
        (("imagen.sr256", "--crop", 512), "--crop 512"),
        (("imagen.sr256", "--text-dropout", 0.2), "--text-dropout 0.2: --preset tiny reads no text"),
        (("imagen.base64", "--max-aug-level", 0.5), "--max-aug-level 0.5: --preset tiny is no super-resolution"),
        (("imagen.base64", "--text-dropout", 2), "error: --text-dropout 2.0: must be a fraction"),
        (("imagen.base64", "--embeddings", "/nowhere"), "/nowhere"),
        (("imagen.base64", "--text", "none"), "--text none"),
        (("imagen.base64", "--logsnr", -60, -40), "--logsnr -60 -40"),
        (("imagen.sr256", "--learning-rate", "nan"), "error: --learning-rate nan: must"),
        (("imagen.sr256", "--preset", "paper", "--crop", 20), "20 pixels"),
        (("imagen.base64", "--logsnr", 1, -1), "low < high"),
        (("imagen.base64", "--logsnr", -1, 1, "--logsnr-fraction", 2), "fraction"),
    ):
        one_line(command(train, *arguments, *out, "--data-dir", tmp_path / "data", "--examples", 8), culprit)
        assert list(tmp_path.iterdir()) == []
    one_line(command(train, "t5", *out, "--data-dir", tmp_path / "data", "--steps", 0), "--steps 0")
    one_line(command(benchmark, "imagen.sr256", "--preset", "paper", "--crop", 20), "20 pixels")
    one_line(command(benchmark, "imagen.sr256", "--preset", "tiny", "--crop", 512), "larger than the images")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").touch()
    done = command(train, "imagen.sr256", *out, "--data-dir", tmp_path / "data", "--examples", 8)
    one_line(done, "run: a file, name a folder")
    assert not (tmp_path / "data").exists()


def test_as_a_process(standin, tmp_path):
    """The exit code and the line as a shell sees them."""
    arguments = ["a red circle", "--weights", str(standin), "--out", str(tmp_path / "out"), "--steps", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sample", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr == "error: steps must be at least 1, not 0\n"
    assert not (tmp_path / "out").exists()
