"""experiments.train clip: a few steps of both losses, resumption, what transformers opens, retrieval and classes."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import evaluate, train
from experiments.cli import run
from experiments.table import TASKS
from jaxdiff.nets.clip import CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.training import metrics
from jaxdiff.weights import clip as weights

SMALL = CLIPConfig(
    TextTowerConfig(width=8, layers=1, heads=2, feed_forward=8, vocab=400, length=24, eos_id=1),
    ImageTowerConfig(width=8, layers=1, heads=2, feed_forward=8, resolution=64, patch=16),
    width=6,
)


@pytest.fixture(autouse=True, scope="module")
def small_preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS["clip"].presets, "tiny", SMALL)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def settings(data_dir):
    """Settings of a short run, on a command line."""
    return (
        "--data-dir", data_dir, "--examples", 200, "--held-out", 20, "--steps", 4, "--batch", 16, "--vocab", 400,
        "--save-every", 2, "--log-every", 1, "--evaluate-every", 0,
    )  # fmt: skip


@pytest.fixture
def trained(command, settings, tmp_path):
    def call(*more, out=tmp_path / "clip"):
        return command(train, "clip", *settings, "--out", out, *more)

    return call


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of a run with nothing but these settings; not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "clip"
    with pytest.raises(SystemExit) as stop:
        run(train.commands(), [str(argument) for argument in ("clip", *settings, "--out", out)])
    assert stop.value.code == 0
    return out


def check_run(out):
    lines = metrics.read(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"accuracy", "scale", "loss"} <= set(lines[0])
    encoder = weights.load_text_encoder(out / "model")
    config, _ = weights.load_image(out / "model")
    assert encoder.config.text.eos_id == encoder.tokenizer.eos_token_id == 1
    assert encoder.config.text.vocab == len(encoder.tokenizer) and config.image == SMALL.image


def test_a_run_leaves_a_clip(finished, command, tmp_path):
    check_run(finished)
    clip, file = ("--clip", finished / "model"), tmp_path / "scores.json"
    done = command(evaluate, "retrieval", *clip, "--n", 12, "--json", file)
    assert done.code == 0, done.err
    scores = json.loads(file.read_text())
    assert scores["images by caption, R@10"] >= scores["images by caption, R@1"] >= 0
    assert "captions by image, R@5" in done.out
    named = "--label", "kind", "--n", 10, "--prompts", "a {} and {x}", "{}"
    done = command(evaluate, "zero-shot", *clip, *named, "--json", file)
    assert done.code == 0, done.err
    assert 0 <= json.loads(file.read_text())["kind, of 6 classes"] <= 1


@pytest.mark.slow
def test_siglips_loss_and_muon(trained, tmp_path):
    done = trained("--loss", "sigmoid", "--optimizer", "muon", "--learning-rate", 4e-3)
    assert done.code == 0, done.err
    check_run(tmp_path / "clip")


def test_it_goes_on_where_it_was(finished, trained, tmp_path):
    shutil.copytree(finished, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")  # as if it had been stopped after its second step
    shutil.rmtree(tmp_path / "again" / "model")
    assert trained(out=tmp_path / "again").code == 0
    again, whole = (metrics.read(out / "metrics.jsonl") for out in (tmp_path / "again", finished))
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in whole]
    assert (tmp_path / "again" / "model" / "model.safetensors").is_file()


def test_it_begins_with_another_run(finished, trained, tmp_path):
    more = ("--init", finished, "--learning-rate", 1e-9, "--warmup", 0, "--loss", "sigmoid", "--steps", 1)
    assert trained(*more).code == 0
    (_, before), (_, after) = (weights.load(out / "model") for out in (finished, tmp_path / "clip"))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        np.testing.assert_allclose(old, new, atol=1e-6)
    done = trained("--init", tmp_path / "nowhere", out=tmp_path / "third")
    assert done.code == 2 and "nowhere" in done.err


def test_transformers_opens_it(finished):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's CLIP")
    from transformers import AutoTokenizer, CLIPModel

    folder = finished / "model"
    model, words = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = words(["a large red circle"], padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = model.get_text_features(input_ids=ids)
    theirs = getattr(theirs, "pooler_output", theirs).numpy()
    ours = np.asarray(weights.load_text_encoder(folder).encode(["a large red circle"]).pooled)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more, culprit",
    [
        (("--batch", 1), "--batch 1"),
        (("--data", "nothing"), "'nothing'"),
        (("--patch", 60), "resolution 64 is not a multiple"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_settings(trained, more, culprit, tmp_path):
    done = trained(*more)
    assert done.code == 2 and culprit in done.err and done.err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "clip" / "model").exists()


@pytest.mark.parametrize(
    "more, culprit",
    [
        (("retrieval", "--n", 0), "--n 0"),
        (("zero-shot", "--label", "weight"), "--label weight: shapes has kind"),
        (("zero-shot", "--prompts", "a circle"), "--prompts"),
        (("retrieval", "--clip", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_bad_questions(finished, command, more, culprit):
    named = () if "--clip" in more else ("--clip", finished / "model")
    done = command(evaluate, *more, *named)
    assert done.code == 2 and culprit in done.err, done.err


@pytest.mark.slow
def test_pairs_of_ones_own(trained, command, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(20):
        Image.new("RGB", (64, 64), (12 * i, 0, 0)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"a red square of the number {i}")
    assert trained("--data", f"folder:{photos}").code == 0
    done = command(
        evaluate, "retrieval", "--clip", tmp_path / "clip" / "model", "--data", f"folder:{photos}", "--n", 8
    )  # fmt: skip
    assert done.code == 0 and "R@10" in done.out
    (photos / "5.png").write_bytes(b"no image")
    damaged = command(evaluate, "retrieval", "--clip", tmp_path / "clip" / "model", "--data", f"folder:{photos}")
    assert damaged.code == 2 and damaged.err.strip().splitlines()[-1].startswith("error: ") and "5.png" in damaged.err
    (photos / "3.txt").unlink()
    lacking = command(evaluate, "retrieval", "--clip", tmp_path / "clip" / "model", "--data", f"folder:{photos}")
    assert lacking.code == 2 and "3.png" in lacking.err
