"""experiments.clip: a few steps of both losses, resumption, what transformers opens, retrieval and classes."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.clip import evaluate, train
from jaxdiff.nets.clip import CLIPConfig, ImageTowerConfig, TextTowerConfig
from jaxdiff.text.clip import encode
from jaxdiff.training import metrics
from jaxdiff.weights import clip as weights

SMALL = CLIPConfig(
    TextTowerConfig(width=8, layers=1, heads=2, feed_forward=8, vocab=400, length=24, eos_id=1),
    ImageTowerConfig(width=8, layers=1, heads=2, feed_forward=8, resolution=64, patch=16),
    width=6,
)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", SMALL)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def trained(command, data_dir, tmp_path):
    def call(*more, out=tmp_path / "clip", steps=4):
        return command(
            train.main, "--out", out, "--data-dir", data_dir, "--examples", 200, "--held-out", 20, "--steps", steps,
            "--batch", 16, "--vocab", 400, "--save-every", 2, "--log-every", 1, *more
        )  # fmt: skip

    return call


@pytest.mark.parametrize("loss, optimizer", [("contrastive", "adam"), ("sigmoid", "muon")])
def test_a_run_leaves_a_clip(trained, command, tmp_path, loss, optimizer):
    done = trained("--loss", loss, "--optimizer", optimizer)
    assert done.code == 0, done.err
    lines = metrics.read(tmp_path / "clip" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"accuracy", "scale", "loss"} <= set(lines[0])
    encoder = weights.load_text_encoder(tmp_path / "clip" / "model")
    config, _ = weights.load_image(tmp_path / "clip" / "model")
    assert encoder.config.text.eos_id == encoder.tokenizer.eos_token_id == 1
    assert encoder.config.text.vocab == len(encoder.tokenizer) and config.image == SMALL.image

    judged = command(
        evaluate.main, "--weights", tmp_path / "clip" / "model", "--n", 12, "--label", "kind", "--label-n", 10,
        "--json", tmp_path / "scores.json", "--prompts", "a {} and {x}", "{}",
    )  # fmt: skip
    assert judged.code == 0, judged.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["pictures by caption, R@10"] >= scores["pictures by caption, R@1"] >= 0
    assert 0 <= scores["kind, of 6 classes"] <= 1 and "captions by picture, R@5" in judged.out


def test_it_goes_on_where_it_was(trained, tmp_path):
    assert trained().code == 0
    whole = metrics.read(tmp_path / "clip" / "metrics.jsonl")
    assert trained(out=tmp_path / "again").code == 0
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")  # as if it had been stopped after its second step
    assert trained(out=tmp_path / "again").code == 0
    again = metrics.read(tmp_path / "again" / "metrics.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]


def test_it_begins_with_another_run(trained, tmp_path):
    assert trained().code == 0
    more = ("--init", tmp_path / "clip", "--learning-rate", 1e-9, "--warmup", 0, "--loss", "sigmoid")
    assert trained(*more, out=tmp_path / "more", steps=1).code == 0
    (_, before), (_, after) = (weights.load(tmp_path / name / "model") for name in ("clip", "more"))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        np.testing.assert_allclose(old, new, atol=1e-6)
    done = trained("--init", tmp_path / "nowhere", out=tmp_path / "third")
    assert done.code == 2 and "nowhere" in done.err


def test_transformers_opens_it(trained, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's CLIP")
    from transformers import AutoTokenizer, CLIPModel

    assert trained().code == 0
    folder = tmp_path / "clip" / "model"
    model, words = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = words(["a large red circle"], padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = model.get_text_features(input_ids=ids)
    theirs = getattr(theirs, "pooler_output", theirs).numpy()
    ours = np.asarray(encode(weights.load_text_encoder(folder), ["a large red circle"]).embedding)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more, culprit",
    [
        (("--batch", 1), "batch 1"),
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
        (("--n", 0), "nothing to judge"),
        (("--label", "weight"), "--label weight: shapes has kind"),
        (("--prompts", "a circle"), "--prompts"),
        (("--weights", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_bad_questions(trained, command, more, culprit, tmp_path):
    named = () if "--weights" in more else ("--weights", tmp_path / "clip" / "model")
    if named and "--n" not in more and "--prompts" not in more:
        assert trained(steps=1).code == 0
    done = command(evaluate.main, *named, *more)
    assert done.code == 2 and culprit in done.err, done.err


def test_pairs_of_ones_own(trained, command, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(20):
        Image.new("RGB", (64, 64), (12 * i, 0, 0)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"a red square of the number {i}")
    assert trained("--data", f"folder:{photos}").code == 0
    done = command(
        evaluate.main, "--weights", tmp_path / "clip" / "model", "--data", f"folder:{photos}", "--n", 8
    )  # fmt: skip
    assert done.code == 0 and "R@10" in done.out
    (photos / "5.png").write_bytes(b"no picture")
    damaged = command(evaluate.main, "--weights", tmp_path / "clip" / "model", "--data", f"folder:{photos}")
    assert damaged.code == 2 and damaged.err.strip().splitlines()[-1].startswith("error: ") and "5.png" in damaged.err
    (photos / "3.txt").unlink()
    lacking = command(evaluate.main, "--weights", tmp_path / "clip" / "model", "--data", f"folder:{photos}")
    assert lacking.code == 2 and "3.png" in lacking.err
