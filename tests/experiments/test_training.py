"""Two steps of training on images and captions of one's own, and on emoji; on shapes, test_quickstart.py trains."""

import dataclasses
import io
import json
import shutil
import tarfile
import warnings

import jax
import numpy as np
import pytest
import small_cascade
from PIL import Image

from experiments import convert, embed, export, train
from experiments.options.training import DataOptions
from experiments.recipes import emoji as emoji_run
from experiments.table import TASKS
from experiments.tasks import initial, spaces, text_embeddings
from experiments.tasks.diffusion import DiffusionOptions, Settings
from experiments.tasks.noise_levels import NoiseLevels
from experiments.tasks.samples import Samples
from experiments.tasks.text_embeddings import TextOptions
from jaxdiff.core.trees import check_tree, flatten
from jaxdiff.data import emoji, sources
from jaxdiff.diffusion.time_samplers import LogSNRRange
from jaxdiff.models.representations import EmbeddingConditioner
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.training import metrics
from jaxdiff.training.state import abstract_params
from jaxdiff.weights.imagen import load
from jaxdiff.weights.runs import TextSource, save_text_source
from jaxdiff.weights.stages import load_model, read_settings, save_model, save_settings
from jaxdiff.weights.t5 import load_text_encoder

pytestmark = pytest.mark.usefixtures("small_presets")


@pytest.fixture
def photos(tmp_path):
    """Eight images with captions, and one without."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (64, 64), (25 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a dark red square number {i}" if i else "")
    return folder


ENLARGE = "imagen.sr256", "--text", "none", "--crop", 64
SHORT = "--steps", 2, "--batch", 8, "--ema-decay", 0.995, "--sample-every", 0


def test_pictures_and_captions_of_ones_own(standin, tmp_path, command):
    """Tar shards, converted; their embeddings stored; a base trained on both."""
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for i in range(9):
            picture = io.BytesIO()
            Image.new("RGB", (80, 64), (25 * i, 0, 0)).save(picture, "jpeg")
            for name, content in ((f"{i}.jpg", picture.getvalue()), (f"{i}.txt", f"red number {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    records, embeddings = tmp_path / "records", tmp_path / "embeddings"
    done = command(convert, tmp_path / "shard.tar", "--out", records)
    assert done.code == 0 and "9 images" in done.out, done.err
    source = "--data", f"records:{records}"
    text = "--text-encoder", standin / "text", "--length", 16
    done = command(embed, *source, *text, "--out", embeddings)
    assert done.code == 0 and "9 embeddings" in done.out, done.err
    arguments = (
        "imagen.base64",
        *source,
        "--embeddings",
        embeddings,
        "--logsnr",
        -5.5,
        0,
    )
    done = command(train, *arguments, *SHORT, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    model = load_model(tmp_path / "run" / "model")
    assert (model.model.time_sampler.low, model.model.time_sampler.high) == (-5.5, 0.0)
    assert model.reads == (16, small_cascade.WIDTH)  # of the embeddings, whatever the preset is meant for

    # The encoder, where it is named too, must be the one that made them, and the model knows which that was.
    wrong = dataclasses.replace(load_text_encoder(standin / "text", 16), length=15)
    done = command(train, *arguments, *SHORT, "--out", tmp_path / "run", "--text", standin / "text")
    assert done.code == 0, done.err
    folder = tmp_path / "other"
    shutil.copytree(embeddings, folder)
    sidecar = folder / "embeddings.json"
    sidecar.write_text(sidecar.read_text().replace(model.text_fingerprint, wrong.fingerprint))
    changed = (*arguments[:-4], folder, *arguments[-3:])
    done = command(train, *changed, *SHORT, "--out", tmp_path / "run", "--text", standin / "text")
    assert done.code == 2 and "but the model needs" in done.err
    done = command(train, *arguments, *SHORT, "--out", tmp_path / "run", "--text-length", 15)
    assert done.code == 2 and "16 tokens a caption, not of --text-length 15" in done.err


def test_log_snrs_to_train_at(tmp_path):
    """`--logsnr` replaces where the preset trains, or, in part, stands before it; the noise schedule stays."""
    task, options = TASKS["imagen.base64"], DiffusionOptions(logsnr=(-5.0, 0.0))
    run = Settings(tmp_path, diffusion=options)
    preset, changed = task.preset("tiny").model, task.trained_model(run)
    assert changed.time_sampler == LogSNRRange(-5.0, 0.0) and changed.schedule == preset.schedule
    partly = task.trained_model(dataclasses.replace(run, diffusion=dataclasses.replace(options, logsnr_fraction=0.75)))
    assert partly.time_sampler == LogSNRRange(-5.0, 0.0, 0.75, rest=preset.time_sampler)
    assert options.levels(NoiseLevels()) == NoiseLevels((-5.0, 0.0), 1.0, None)
    levels = NoiseLevels((-9.0, 0.0), 0.75, 0.0)
    assert DiffusionOptions().levels(levels) == levels
    assert DiffusionOptions(snr_power=0.5).levels(levels) == dataclasses.replace(levels, snr_power=0.5)
    assert DiffusionOptions(logsnr_fraction=0.5).levels(levels) == dataclasses.replace(levels, fraction=0.5)


def test_parameters_to_begin_with(standin, photos, tmp_path, command, capsys):
    """From a run's folder, finished or not, or the model/ in it; what was learned does not depend on how. Parameters of
    another condition are new."""
    arguments = *ENLARGE, *SHORT, "--data", f"folder:{photos}", "--data-dir", tmp_path / "data"
    assert command(train, *arguments, "--dtype", "bfloat16", "--out", tmp_path / "first").code == 0
    model = load_model(tmp_path / "first" / "model")
    assert (model.model.unet.execution.dtype, model.model.unet.execution.remat) == ("float32", "none")
    found = []
    for init in (tmp_path / "first", tmp_path / "first" / "model"):
        found.append(initial.initial(init, model.model))
    jax.tree.map(np.testing.assert_array_equal, *found, model.params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    with pytest.raises(ValueError, match="does not fit the settings"):
        initial.initial(init, load_model(standin / "base64").model)
    more = dataclasses.replace(model.model, conditioners=(*model.model.conditioners, EmbeddingConditioner(6)))
    for init in (tmp_path / "first", tmp_path / "first" / "model"):
        begun, kept = initial.initial(init, more), flatten(found[0])
        check_tree(begun, abstract_params(more), "here")
        begun = flatten(begun)
        new = begun.keys() - kept.keys()
        assert f"{len(new)} parameters are new and begin at random ({min(new)}" in capsys.readouterr().out
        assert all(np.array_equal(begun[name], leaf) for name, leaf in kept.items())


def test_another_text_encoder_is_warned_of(standin, tmp_path):
    """A run that was trained with another one, whose place is named if it is known."""
    model, sampling, _ = read_settings(standin / "base64")
    own, run = "0123456789abcdef", tmp_path / "run"
    save_settings(TrainedModel(model, {}, sampling, own), run / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for place, fingerprint in ((run, own), (run, None), (standin / "base64", "another")):
            initial.warn_of_other_text(place, fingerprint)
    for place in (run, run / "model"):
        with pytest.warns(UserWarning, match=rf"--init {place} was trained with another text encoder \(its own\)"):
            initial.warn_of_other_text(place, "another")
    save_text_source(run, TextSource(str(standin / "text"), 16, "float32", own))
    with pytest.warns(UserWarning, match=rf"\({standin / 'text'}\)"):
        initial.warn_of_other_text(run, "another")
    with pytest.raises(FileNotFoundError, match=f"--init {tmp_path / 'no'}: no such folder"):
        initial.initial(tmp_path / "no", None)


def test_pictures_alone_teach_super_resolution_that_can_read(photos, tmp_path, command, monkeypatch):
    """Its sample grids pair each enlarged image with that image's own caption, where there are captions."""
    plain, base = small_cascade.SR_256, small_cascade.BASE
    reading = dataclasses.replace(
        plain,
        unet=dataclasses.replace(plain.unet, conditioning=base.unet.conditioning),
        conditioners=(*base.conditioners, *plain.conditioners),
    )
    task = TASKS["imagen.sr256"]
    monkeypatch.setitem(task.presets, "tiny", dataclasses.replace(task.preset("tiny"), model=reading))
    (photos / "3.png").write_bytes(b"no image")
    arguments = *ENLARGE, *SHORT, "--data", f"folder:{photos}", "--data-dir", tmp_path / "data"
    done = command(train, *arguments, "--out", tmp_path / "alone")
    assert done.code == 0, done.err

    data = DataOptions((f"folder:{photos}",))
    source = sources.open(data.spec(), reading.side, "train", data.data_dir)
    rows = {i: (np.full((16, small_cascade.WIDTH), i, np.float16), np.arange(16) < 3, b"") for i in range(9)}
    with pytest.warns(UserWarning, match=r"3\.png"):
        samples = Samples(TrainedModel(reading, {}, task.preset("tiny").sampling), source, rows, tmp_path)
    shades = np.round((np.asarray(samples._low_res)[:, 0, 0, 0] + 1) * 127.5 / 25).astype(int)
    assert 3 not in shades
    assert samples._captions == [f"a dark red square number {i}" if i else "" for i in shades]
    assert samples._text.tokens[:, 0, 0].tolist() == shades.tolist()


def test_a_model_reads_what_its_text_encoder_gives(standin, tmp_path):
    """Of any width, and as many tokens as are asked for; a network that learns without text keeps its preset's."""
    base, task = small_cascade.BASE, TASKS["imagen.base64"]
    for length in (None, 12):
        options = TextOptions(str(standin / "text"), length)
        encoder, _ = text_embeddings.find(options, DataOptions(), task.preset("tiny"), base)
        assert base.reading(encoder.length, encoder.width).text.shape == (length or 24, small_cascade.WIDTH)
    assert task.model("300m", task.settings.compute).text.shape == (128, 4096)


def test_an_interrupted_run_goes_on_bit_for_bit(standin, photos, tmp_path, command, monkeypatch):
    """Grain's stream, stored embeddings and a stage of Imagen: the losses are those of a run that was left alone."""
    arguments = "imagen.base64", "--data", f"folder:{photos}", "--text", standin / "text"
    arguments += *SHORT, "--steps", 4, "--log-every", 1, "--save-every", 2, "--data-dir", tmp_path / "data"
    assert command(train, *arguments, "--out", tmp_path / "whole").code == 0

    class Torn:
        """A stream that ends the process, as far as it can, when its fourth batch is asked for."""

        def __init__(self, stream):
            self._stream, self._left = stream, 3
            self.get_state, self.set_state = stream.get_state, stream.set_state
            self.skipped, self.buckets, self.varying_shapes = stream.skipped, None, None

        def __next__(self):
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
            return next(self._stream)

    with monkeypatch.context() as patched:
        real = spaces.batches
        patched.setattr(spaces, "batches", lambda *given: Torn(real(*given)))
        assert command(train, *arguments, "--out", tmp_path / "torn").code == 130
    assert [line["step"] for line in metrics.read(tmp_path / "torn" / "metrics.jsonl")][-1] == 2
    assert command(train, *arguments, "--out", tmp_path / "torn").code == 0
    whole, torn = (
        [(line["step"], line["loss"]) for line in metrics.read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "torn")
    )
    assert whole == torn and len(whole) == 4


def test_stages_become_a_cascade(standin, tmp_path, command):
    out = tmp_path / "out"
    stages = [part for stage in ("base64", "sr256", "sr1024") for part in (f"--{stage}", standin / stage)]
    done = command(export, "imagen", "--text", standin / "text", *stages, "--dtype", "float16", "--out", out)
    assert done.code == 0 and "samples 64, 256, 1024 pixels" in done.out, done.err
    found, given = load(out), load(standin)
    for a, b in zip(found.boxes, given.boxes, strict=True):
        assert (a.model, a.sampling) == (b.model, b.sampling)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a.params, b.params)
    sizes = [(folder / "base64" / "model.safetensors").stat().st_size for folder in (out, standin)]
    assert sizes[0] < 0.6 * sizes[1]

    # A shorter cascade over a longer one would be read as the longer one; one with a gap is none.
    done = command(export, "imagen", "--text", standin / "text", *stages[:2], "--out", out)
    assert done.code == 2 and "holds sr256 and sr1024 of another cascade" in done.err
    base = tmp_path / "base"
    save_model(dataclasses.replace(load_model(standin / "base64"), text_fingerprint="0123456789abcdef"), base)
    done = command(export, "imagen", "--text", standin / "text", "--base64", base, "--out", tmp_path / "wrong")
    assert done.code == 2 and "trained with the text encoder 0123456789abcdef" in done.err
    assert not (tmp_path / "wrong").exists()
    # The same encoder computed in bfloat16 is another one.
    half = load_text_encoder(standin / "text", 16, "bfloat16")
    save_model(dataclasses.replace(load_model(standin / "base64"), text_fingerprint=half.fingerprint), base)
    arguments = "--text", standin / "text", "--base64", base, "--out", tmp_path / "half"
    done = command(export, "imagen", *arguments)
    assert done.code == 2 and "in float32 is" in done.err and not (tmp_path / "half").exists()
    done = command(export, "imagen", *arguments, "--text-dtype", "bfloat16")
    assert done.code == 0, done.err
    gap = *stages[:2], *stages[4:]
    done = command(export, "imagen", "--text", standin / "text", *gap, "--out", tmp_path / "gap")
    assert done.code == 2 and "enlarges 256 pixels" in done.err and not (tmp_path / "gap").exists()


def test_the_mean_of_several_runs(standin, tmp_path, command):
    base = load_model(standin / "base64")
    tripled = dataclasses.replace(base, params=jax.tree.map(lambda leaf: 3 * leaf, base.params))
    save_model(tripled, tmp_path / "tripled")
    arguments = "--text", standin / "text", "--base64", standin / "base64"
    done = command(export, "imagen", *arguments, tmp_path / "tripled", "--out", tmp_path / "mean")
    assert done.code == 0, done.err
    params = load_model(tmp_path / "mean" / "base64").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 2 * y, rtol=1e-6), params, base.params)
    done = command(export, "imagen", *arguments, standin / "sr256", "--out", tmp_path / "none")
    assert done.code == 2 and "cannot average models whose unet differs" in done.err
    assert not (tmp_path / "none").exists()
    others = tmp_path / "0123456789abcdef", tmp_path / "fedcba9876543210"
    for other in others:
        save_model(dataclasses.replace(base, text_fingerprint=other.name), other)
    done = command(export, "imagen", *arguments, *others, "--out", tmp_path / "none")
    assert done.code == 2 and "encoders 0123456789abcdef and fedcba9876543210" in done.err
    done = command(export, "imagen", "--text", standin / "text", "--base64", "--out", tmp_path / "none")
    assert done.code == 2 and "base64" in done.err


def test_a_text_encoder_of_ones_own(photos, tmp_path, command):
    arguments = "--data", f"folder:{photos}", "--out", tmp_path / "t5", "--vocab", 400, "--batch", 8, "--length", 16
    done = command(train, "t5", *arguments, "--steps", 2)
    assert done.code == 0 and "1 of 9 examples have no caption" in done.err, done.err
    assert load_text_encoder(tmp_path / "t5" / "encoder", 16).config.decoder_layers == 0
    done = command(train, "t5", *arguments, "--steps", 2, "--tokenizer", "bytes")
    assert done.code == 2 and "data.tokenizer was 'trained' and is 'bytes' here" in done.err


@pytest.mark.slow
def test_emoji(tmp_path, command):
    """The over-fitting experiment, on three made-up emoji."""
    squares = {"red square": "#ff0000", "green square": "#00ff00", "blue square": "#0000ff"}
    icons = {
        name.replace(" ", "-"): {"body": f'<path fill="{colour}" d="M16 16h96v96h-96z"/>'}
        for name, colour in squares.items()
    }
    codes = dict(zip(squares, ("1f7e5", "1f7e9", "1f7e6")))
    files = {
        f"{emoji.ARTWORK}/icons.json": {"width": 128, "height": 128, "icons": icons},
        f"{emoji.ARTWORK}/chars.json": {code: name.replace(" ", "-") for name, code in codes.items()},
        f"{emoji.ARTWORK}/package.json": {"version": "0"},
        f"{emoji.NAMES}/en/data.json": [
            {"label": name, "hexcode": code.upper(), "tags": [], "group": 8, "order": i}
            for i, (name, code) in enumerate(codes.items())
        ],
        f"{emoji.NAMES}/package.json": {"version": "0"},
    }
    for name, content in files.items():
        file = tmp_path / "data" / "npm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    short = "--steps", 2, "--text-steps", 2, "--batch", 8
    done = command(emoji_run.main, "--out", tmp_path / "out", "--data-dir", tmp_path / "data", *short)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dominant_colour_accuracy_64"] == 1 - len(report["wrong_64"]) / 3
    assert all(each["caption"].split()[0] == each["expected"] != each["sampled"] for each in report["wrong_64"])
    assert (tmp_path / "out" / "grid.png").is_file()
