"""DALL·E 1 by commands."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from small_cascade import ADAM

import jaxdiff
from experiments import export, sample, train
from experiments.table import TASKS
from jaxdiff.core.products import TokenSpec
from jaxdiff.models.autoregressive import AutoregressiveModel
from jaxdiff.models.dvae import Annealed, DVAEModel
from jaxdiff.nets.autoregressive import AutoregressiveConfig
from jaxdiff.nets.dvae import DVAEConfig
from jaxdiff.nets.sparse_attention import Pattern
from jaxdiff.systems.init_image import InitImage
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.text.bpe import train_bpe
from jaxdiff.training import metrics
from jaxdiff.weights import dalle, dvae

DVAE = DVAEModel(
    DVAEConfig(codes=10, hidden=8, multipliers=(1, 2), blocks=1, code_width=4),
    side=32,
    temperature=Annealed(1.0, 0.1, 100),
    kl_weight=Annealed(0.0, 1.0, 100),
)


TRANSFORMER = AutoregressiveModel(
    AutoregressiveConfig(
        vocab=280,
        text_length=6,
        codes=10,
        rows=16,
        columns=16,
        width=8,
        heads=2,
        patterns=(Pattern.ROW, Pattern.COLUMN),
    ),
    TokenSpec(10, 2),
)


@pytest.fixture(scope="module", autouse=True)
def presets():
    """Very small ones in place of the tiny ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, model in (("dalle.dvae", DVAE), ("dalle.transformer", TRANSFORMER)):
            presets = TASKS[name].presets
            patch.setitem(presets, "tiny", dataclasses.replace(presets["tiny"], model=model, optimizer=ADAM))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = "--data", "shapes", "--examples", 12, "--held-out", 4, "--evaluate-n", 4
    return *data, "--data-dir", tmp_path_factory.mktemp("data"), "--batch", 4, "--log-every", 1


@pytest.fixture(scope="module")
def runs(presets, data, trained, tmp_path_factory):
    """A dVAE, and a transformer of its codes, after two steps each."""
    folder = tmp_path_factory.mktemp("dalle")
    for name, *given in (("dalle.dvae",), ("dalle.transformer", "--codes", folder / "dalle.dvae")):
        trained(name, *given, *data, "--steps", 2, "--out", folder / name)
    return SimpleNamespace(dvae=folder / "dalle.dvae", transformer=folder / "dalle.transformer")


def test_a_dvae_is_trained(data, command, tmp_path):
    """It logs its scores, writes reconstructions and a dVAE, and another run continues from it."""
    flags = "--kl-steps", 2, "--kl-weight", 0.5, "--temperature", 0.5, "--temperature-steps", 1
    done = command(train, "dalle.dvae", *data, "--steps", 2, *flags, "--out", tmp_path / "first")
    assert done.code == 0, done.err
    lines = metrics.read(tmp_path / "first" / "metrics.jsonl")
    assert {"loss", "psnr", "kl", "codes_used", "held_out_loss", "held_out_psnr"} <= lines[-1].keys()
    assert lines[-1]["temperature"] == 0.5 and lines[0]["temperature"] == 1.0
    assert (tmp_path / "first" / "samples" / "0000002.png").is_file()
    first = dvae.load(tmp_path / "first" / "model")
    assert first.config == DVAE.network and "10 codes" in done.out
    again = "--init", tmp_path / "first", "--learning-rate", 1e-9, "--steps", 1, "--out", tmp_path / "second"
    done = command(train, "dalle.dvae", *data, *again)
    assert done.code == 0, done.err
    second = dvae.load(tmp_path / "second" / "model")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first.params, second.params)


def test_codes_are_stored_once(runs, data):
    stored = sorted((data[data.index("--data-dir") + 1] / "codes").glob("*.npy"))
    assert len(stored) == 2  # training images, held-out images
    for path in stored:
        codes = np.load(path)
        assert codes.dtype == np.int32 and codes.shape[1:] == (16, 16) and 0 <= codes.min() <= codes.max() < 10


def test_a_run_is_a_pipeline(runs, command, tmp_path):
    """It is sampled by the command and from Python, with the settings of tokens."""
    lines = metrics.read(runs.transformer / "metrics.jsonl")
    assert {"loss", "text_loss", "code_loss", "code_accuracy", "held_out_loss"} <= lines[-1].keys()
    assert (runs.transformer / "samples" / "0000002.png").is_file()
    pipeline = jaxdiff.from_pretrained(runs.transformer)
    assert pipeline.sides == (16, 32) and pipeline.text_encoder.width == 0
    codes, images = pipeline.sample(["a red circle", ""], SampleOptions(seed=3))
    assert codes.dtype == np.int32 and codes.shape == (2, 16, 16) and images.shape == (2, 32, 32, 3)
    flags = "--temperature", 0.5, "--top-k", 3, "--top-p", 0.9, "--guidance", 2
    done = command(sample, "a red circle", "--weights", runs.transformer, *flags, "--out", tmp_path / "images")
    assert done.code == 0, done.err
    (path,) = (tmp_path / "images").glob("0000*.png")
    values = json.loads(Image.open(path).text["jaxdiff"])
    assert values["settings"]["stages"][0] | {"class": ""} == {
        "class": "", "temperature": 0.5, "top_k": 3, "top_p": 0.9, "guidance": 2.0
    }  # fmt: skip


def test_completion(runs, command, tmp_path):
    """Codes under the mask are sampled, the others are those of the image."""
    pipeline = jaxdiff.from_pretrained(runs.transformer)
    rng = np.random.default_rng(0)
    image, mask = rng.uniform(-1, 1, (32, 32, 3)).astype("f4"), np.zeros((32, 32), bool)
    mask[16:] = True
    codes, _ = pipeline.sample(["a red circle"], SampleOptions(init=InitImage(image, (1.0,), mask)))
    wanted = pipeline.decoders[0].encode(jax.numpy.asarray(image)[None])
    np.testing.assert_array_equal(codes[:, :8], wanted[:, :8])
    assert (codes[:, 8:] != np.asarray(wanted[:, 8:])).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_export(runs, command, tmp_path, dtype):
    """The folder samples what the run samples, wherever it is moved; Python writes the same."""
    done = command(export, "dalle", "--weights", runs.transformer, "--dtype", dtype, "--out", tmp_path / "folder")
    assert done.code == 0, done.err
    (tmp_path / "folder").rename(tmp_path / "moved")
    before, after = (jaxdiff.from_pretrained(each) for each in (runs.transformer, tmp_path / "moved"))
    tolerance = 0 if dtype == "float32" else 1e-3
    for ours, theirs in zip(before.boxes, after.boxes):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), ours.params, theirs.params)
    if dtype == "float32":
        np.testing.assert_array_equal(before.sample(["a circle"])[0], after.sample(["a circle"])[0])
        jaxdiff.save_pretrained(after, tmp_path / "again")
        names = [
            sorted(str(path.relative_to(f)) for path in f.rglob("*")) for f in (tmp_path / "moved", tmp_path / "again")
        ]
        assert names[0] == names[1]


def test_export_refused(runs, command, tmp_path):
    for given, message in (
        (("dalle", "--weights", tmp_path), "no run of dalle.transformer"),
        (("dalle", "--weights", runs.transformer, "--out", runs.transformer), "choose another folder"),
        (("dvae", "--encoder", tmp_path / "encoder.pkl"), "encoder.pkl: no such file"),
    ):
        done = command(export, *given)
        assert done.code == 2 and message in done.err, done.err


def test_another_run_continues(runs, data, command, tmp_path):
    given = "--codes", runs.dvae, "--init", runs.transformer, "--learning-rate", 1e-9, "--steps", 1
    done = command(train, "dalle.transformer", *data, *given, "--out", tmp_path / "second")
    assert done.code == 0, done.err
    first, second = (jaxdiff.from_pretrained(folder) for folder in (runs.transformer, tmp_path / "second"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first.generator.params, second.generator.params
    )
    assert first.text_encoder.fingerprint == second.text_encoder.fingerprint


def test_replaced_parts(runs, tmp_path):
    """A run whose dVAE or tokenizer is another one is refused."""
    copy = tmp_path / "copy"
    shutil.copytree(runs.transformer, copy)
    record = json.loads((copy / dalle.CODES).read_text())
    (copy / dalle.CODES).write_text(json.dumps(record | {"fingerprint": "another"}))
    with pytest.raises(ValueError, match="not the dVAE of the training"):
        dalle.load(copy)
    train_bpe(["other words"], 270).save_pretrained(str(copy / dalle.TOKENIZER))
    with pytest.raises(ValueError, match="not the tokenizer of the training"):
        dalle.load(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--codes is missing"),
        (("--codes", "nowhere"), "nowhere"),
        (("--codes", "{dvae}", "--text-length", 0), "--text-length 0: at least 1"),
        (("--codes", "{dvae}", "--vocab", 100), "--vocab 100: at least 258"),
        (("--codes", "{dvae}", "--text-dropout", 1.0), "--text-dropout 1: a fraction"),
    ],
)
def test_transformer_refused(arguments, message, runs, data, command, tmp_path):
    given = [each.format(dvae=runs.dvae) if isinstance(each, str) else each for each in arguments]
    done = command(train, "dalle.transformer", *data, "--steps", 1, *given, "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 5), "--steps: this model samples tokens, and has no such setting"),
        (("--top-k", -1), "--top-k: top_k -1"),
        (("--size", "64"), "samples 16×16 codes, not 32×32"),
        (("--size", "33"), "--size 33: not a multiple of 2"),
    ],
)
def test_sampling_refused(arguments, message, runs, command, tmp_path):
    done = command(sample, "a", "--weights", runs.transformer, *arguments, "--out", tmp_path / "images")
    assert done.code == 2 and message in done.err, done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kl-steps", 0), "--kl-steps 0: at least 1"),
        (("--temperature", 0.0), "a temperature must be above 0"),
        (("--side", 33), "not a multiple of the stride 2"),
        (("--init", "nowhere"), "no dVAE here"),
    ],
)
def test_refused(arguments, message, data, command, tmp_path):
    done = command(train, "dalle.dvae", *data, "--steps", 1, *arguments, "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run" / "checkpoints").exists()
