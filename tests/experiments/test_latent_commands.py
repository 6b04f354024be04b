"""A latent diffusion system by commands: its autoencoder, the model in its latents, a LoRA and a ControlNet of it."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_cascade import ADAM

import jaxdiff
from experiments import evaluate, sample, train
from experiments.evaluations.attributes import attribute_scores
from experiments.table import TASKS
from jaxdiff.core.products import LatentSpec
from jaxdiff.data.shapes_caption import held_out_captions
from jaxdiff.models.autoencoder_training import AutoencoderModel
from jaxdiff.models.conditioners import TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.autoencoder import AutoencoderConfig, VQBottleneck
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.systems.stable_diffusion import SCHEDULE
from jaxdiff.training import metrics
from jaxdiff.weights.latent_runs import load_autoencoder

AUTOENCODER = AutoencoderModel(
    AutoencoderConfig(channels=(8, 8), blocks=1, latent_channels=2, norm_groups=4), side=32, adversary=None
)
VQ = dataclasses.replace(
    AUTOENCODER, network=dataclasses.replace(AUTOENCODER.network, latent_channels=3, bottleneck=VQBottleneck(16, 3))
)
UNET = DiffusionModel(
    LatentUNetConfig(
        channels=8, multipliers=(1,), blocks=(1,), transformer_layers=(1,), heads=(1,), cross_only=(False,),
        norm_groups=4,
    ),
    side=16,
    product=LatentSpec(2, 2),
    conditioners=(TextConditioner(),),
    schedule=SCHEDULE,
)  # fmt: skip


@pytest.fixture(scope="module")
def presets():
    """Very small ones in place of the tiny ones."""
    unet = TASKS["sd.unet"]
    small = dataclasses.replace(unet.preset("tiny"), model=UNET, optimizer=ADAM)
    sampling = dataclasses.replace(small.sampling, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        autoencoder = TASKS["sd.autoencoder"]
        changed = dataclasses.replace(autoencoder.preset("tiny"), model=AUTOENCODER, optimizer=ADAM)
        patch.setitem(autoencoder.presets, "tiny", changed)
        patch.setitem(autoencoder.presets, "vq", dataclasses.replace(changed, model=VQ))
        patch.setitem(unet.presets, "tiny", dataclasses.replace(small, sampling=sampling))
        yield


@pytest.fixture(scope="module")
def runs(presets, standin, trained, tmp_path_factory):
    """An autoencoder, and a model in its latents, after two steps each."""
    folder = tmp_path_factory.mktemp("latent")
    data = "--data", "shapes", "--examples", 12, "--held-out", 4, "--evaluate-n", 4, "--data-dir", folder / "data"
    short = *data, "--steps", 2, "--batch", 4, "--log-every", 1
    printed = trained("sd.autoencoder", *short, "--out", folder / "autoencoder")
    text = "--text", standin / "text", "--text-length", 6
    trained("sd.unet", *short, *text, "--autoencoder", folder / "autoencoder", "--out", folder / "unet")
    return SimpleNamespace(folder=folder, short=short, printed=printed)


def test_an_autoencoder_is_trained_and_scored(runs, command):
    lines = metrics.read(runs.folder / "autoencoder" / "metrics.jsonl")
    assert {"loss", "psnr", "kl", "held_out_loss", "held_out_psnr"} <= lines[-1].keys()
    model = runs.folder / "autoencoder" / "model"
    scale = json.loads((model / "config.json").read_text())["scaling_factor"]
    assert 0 < scale < 1e4 and f"{scale:.5f}" in runs.printed
    assert (runs.folder / "autoencoder" / "samples" / "0000002.png").is_file()
    path = runs.folder / "scores.json"
    settings = "--n", 3, "--json", path, "--data-dir", runs.folder / "data"
    done = command(evaluate, "reconstruction", "--autoencoder", runs.folder / "autoencoder", *settings)
    assert done.code == 0, done.err
    scores = json.loads(path.read_text())
    assert 0 < scores["psnr"] < 40 and -1 <= scores["ssim"] <= 1 and scores["made_by"]["n"] == 3
    assert "no Fréchet distance of classifier-shapes: 3 images for 64 features" in done.out


@pytest.mark.slow
def test_an_averaged_codebook(runs, command, tmp_path):
    """It is a part of the saved autoencoder, and another run continues from it."""
    data = *runs.short, "--preset", "vq", "--codebook", "ema"
    done = command(train, "sd.autoencoder", *data, "--out", tmp_path / "first")
    assert done.code == 0, done.err
    first = load_autoencoder(tmp_path / "first")
    assert first.params["codebook"].shape == (16, 3)
    still = "--init", tmp_path / "first", "--learning-rate", 1e-9, "--steps", 1
    done = command(train, "sd.autoencoder", *data, *still, "--out", tmp_path / "second")
    assert done.code == 0, done.err
    # Averages with a decay of 0.99 move an entry by at most a hundredth of its way, or it restarts.
    moved = np.abs(load_autoencoder(tmp_path / "second").params["codebook"] - first.params["codebook"]).max(1)
    assert np.median(moved) < 0.1 * np.abs(first.params["codebook"]).mean()


def test_latents_are_stored_once(runs, command):
    (stored,) = (runs.folder / "data" / "latents").glob("12-32-*.npy")
    latents = np.load(stored)
    assert latents.shape == (12, 16, 16, 2) and latents.dtype == np.float16 and np.isfinite(latents).all()
    # The scale makes the variance of sampled codes 1; these are their means, and this encoder is hardly trained.
    assert 0.2 < latents.astype(np.float32).std() < 1.2


def test_a_run_is_a_pipeline(runs, command):
    pipeline = jaxdiff.from_pretrained(runs.folder / "unet")
    latents, images = pipeline.sample(["a red circle", ""], SampleOptions(seed=1))
    assert latents.shape == (2, 16, 16, 2) and images.shape == (2, 32, 32, 3)
    settings = "--weights", runs.folder / "unet", "--seed", 1, "--size", "16x24", "--sampler", "dpmpp-2m-karras"
    done = command(sample, "a red circle", *settings, "--out", runs.folder / "images")
    assert done.code == 0, done.err
    (path,) = (runs.folder / "images").glob("0000*.png")
    assert Image.open(path).size == (24, 16)
    done = command(
        sample, "a red circle", "--weights", runs.folder / "unet", "--size", "17", "--out", runs.folder / "x"
    )
    assert done.code == 2 and "--size 17: not a multiple of 2 pixels" in done.err
    other = "--vae", runs.folder / "autoencoder", "--out", runs.folder / "x"
    done = command(sample, "a red circle", "--weights", runs.folder / "unet", *other)
    assert done.code == 2 and "names its own autoencoder" in done.err and done.err.count("\n") == 1


def test_a_lora_of_a_run(runs, command):
    """In two layouts; the base stays as it is."""
    folder, base = runs.folder, ("--weights", runs.folder / "unet")
    before = (folder / "unet" / "model" / "model.safetensors").read_bytes()
    done = command(train, "sd.lora", *runs.short, *base, "--rank", 2, "--out", folder / "lora")
    assert done.code == 0, done.err
    assert (folder / "unet" / "model" / "model.safetensors").read_bytes() == before
    written = {path.name for path in (folder / "lora").glob("*.safetensors")}
    assert written == {"lora.safetensors", "lora-kohya.safetensors"}
    files = {}
    for name, lora in (("none", ()), ("half", ("--lora", f"{folder / 'lora'}/lora.safetensors=0.5"))):
        done = command(sample, "a red circle", *base, *lora, "--out", folder / f"lora-{name}")
        assert done.code == 0, done.err
        (path,) = (folder / f"lora-{name}").glob("0000*.png")
        files[name] = np.asarray(Image.open(path))
    assert files["none"].shape == files["half"].shape == (32, 32, 3)


def test_images_of_a_run_are_scored(runs):
    """Its images, not its latents."""
    pipeline = jaxdiff.from_pretrained(runs.folder / "unet")
    generator = dataclasses.replace(pipeline.generator, model=dataclasses.replace(pipeline.generator.model, side=32))
    decoder = dataclasses.replace(pipeline.decoders[0], side=64)
    larger = dataclasses.replace(pipeline, generator=generator, decoders=(decoder,))
    scores = attribute_scores(larger, {1: held_out_captions(2, 1)}, seed=0, batch=2)
    assert 0 <= scores["attribute_accuracy_64"] <= 1 and "attribute_accuracy_32" not in scores


@pytest.mark.slow
def test_a_controlnet_of_a_run(runs, command):
    """Its samples have their hints above them."""
    folder, base = runs.folder, ("--weights", runs.folder / "unet")
    done = command(train, "sd.controlnet", *runs.short, *base, "--out", folder / "control")
    assert done.code == 0, done.err
    assert (folder / "control" / "samples" / "0000002.png").is_file()
    assert (folder / "control" / "model" / "config.json").is_file()
    hint = next((folder / "images").glob("0000*.png"))
    given = "--control", folder / "control" / "model", "--hint", hint, "--edges", "--size", "16x24"
    done = command(sample, "a red circle", *base, *given, "--out", folder / "controlled")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sd.unet", "--text-length", 6), "--autoencoder is missing"),
        (("sd.unet", "--autoencoder", "{unet}/model"), "no autoencoder"),
        (("sd.unet", "--autoencoder", "{ae}", "--buckets"), "--buckets and --crop are for models of images"),
        (("sd.autoencoder", "--discriminator-start", 5), "this preset has no discriminator"),
        (("sd.autoencoder", "--codebook", "ema"), "--codebook ema: this preset has no codebook"),
        (("sd.autoencoder", "--side", 15), "not a multiple of the stride 2"),
        (("sd.lora",), "--weights is missing"),
        (("sd.lora", "--weights", "{unet}", "--rank", 0), "--rank 0: at least 1"),
    ],
)
def test_refused(runs, command, arguments, message, tmp_path):
    places = {"unet": runs.folder / "unet", "ae": runs.folder / "autoencoder"}
    given = [each.format(**places) if isinstance(each, str) else each for each in arguments]
    done = command(train, *given, *runs.short, "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run" / "checkpoints").exists()
