"""DALL·E 2 by commands, with very small networks."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image
from small_cascade import ADAM

import jaxdiff
from experiments import evaluate, export, sample, train
from experiments.table import TASKS
from experiments.tasks.noise_levels import NoiseLevels
from experiments.tasks.unclip import CLIPOptions
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.data.shapes_caption import caption as caption_of
from jaxdiff.data.shapes_scene import scene
from jaxdiff.models.conditioners import TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.embedding_boxes import EmbeddingDecoder, RankedPrior, embedding_of
from jaxdiff.models.representations import EmbeddingConditioner
from jaxdiff.nets.unet import AttentionConfig
from jaxdiff.systems import unclip_tiny
from jaxdiff.systems.pipeline import After, SampleOptions
from jaxdiff.training import metrics
from jaxdiff.weights import clip
from jaxdiff.weights.imagen import SHIPPED

PRIOR = dataclasses.replace(
    unclip_tiny.PRIOR_TINY, unet=dataclasses.replace(unclip_tiny.PRIOR_TINY.unet, width=16, layers=1, heads=2)
)
UNET = dataclasses.replace(
    small.UNET,
    multipliers=(1, 1),
    blocks=(1, 1),
    attention=AttentionConfig((False, True), (False, False), heads=2),
    conditioning=dataclasses.replace(small.UNET.conditioning, vector_tokens=4),
)
DECODER = DiffusionModel(
    UNET, 64, conditioners=(TextConditioner(dropout=0.5), EmbeddingConditioner(128, norm=unclip_tiny.NORM))
)
PLAIN = dataclasses.replace(
    small.UNET,
    attention=AttentionConfig((False,), (False,)),
    conditioning=dataclasses.replace(small.UNET.conditioning, text=None),
)
(low_res,) = unclip_tiny.SR_256_TINY.conditioners
UPSAMPLER = DiffusionModel(PLAIN, 128, conditioners=(dataclasses.replace(low_res, factor=2),))
MODELS = {"unclip.prior": PRIOR, "unclip.decoder": DECODER, "unclip.sr256": UPSAMPLER}


@pytest.fixture(scope="module", autouse=True)
def presets():
    """Very small ones in place of the tiny ones, with few steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name, model in MODELS.items():
            tiny = TASKS[name].preset("tiny")
            changes = {
                "model": model,
                "sampling": dataclasses.replace(tiny.sampling, steps=3),
                "optimizer": ADAM,
                "levels": NoiseLevels(),
            }
            patch.setitem(TASKS[name].presets, "tiny", dataclasses.replace(tiny, **changes))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = "--data", "shapes", "--examples", 12, "--held-out", 4, "--evaluate-n", 4
    return *data, "--data-dir", tmp_path_factory.mktemp("data"), "--batch", 4, "--log-every", 1


@pytest.fixture(scope="module")
def runs(presets, data, trained, tmp_path_factory):
    """A prior, a decoder and an upsampler after two steps each."""
    folder = tmp_path_factory.mktemp("unclip")
    for name in MODELS:
        skip = () if name == "unclip.sr256" else ("--clip-skip", 3)
        trained(name, *data, "--steps", 2, *skip, "--out", folder / name)
    return SimpleNamespace(**{name.partition(".")[2]: folder / name for name in MODELS})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images of one's own, of other sizes than the models'."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, size in (("a", (40, 50, 3)), ("b", (64, 64, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder / "a.png", folder / "b.png"


def test_training(runs, data):
    """Both log the held-out loss; the decoder has sample grids; the embeddings of all images are stored
    once for both."""
    for folder in (runs.prior, runs.decoder):
        lines = metrics.read(folder / "metrics.jsonl")
        assert {"loss", "held_out_loss", "held_out_loss_t0.06"} <= lines[-1].keys()
        source = json.loads((folder / "clip.json").read_text())
        assert source["source"] == str(SHIPPED / "clip") and source["skip_last"] == 3
        assert source.keys() == {"source", "text", "image", "skip_last"}
    assert (runs.decoder / "samples" / "0000002.png").is_file() and not (runs.prior / "samples").exists()
    stored = sorted((data[data.index("--data-dir") + 1] / "image-embeddings").glob("*.npy"))
    assert [np.load(path).shape for path in stored if path.name.startswith("12-")] == [(12, 1, 1, 128)]


@pytest.mark.parametrize("skip", [0, 3])
def test_the_batches_of_training(skip, runs, data, tmp_path):
    """The prior learns CLIP's embedding of each image at its length, from the caption's; computed here anew. The
    captions' states are those after CLIP's three blocks, or before them."""
    task = TASKS["unclip.prior"]
    options = dataclasses.replace(
        task.settings,
        out=tmp_path,
        clip=CLIPOptions(clip_skip=skip),
        run=dataclasses.replace(task.settings.run, batch=4, evaluate_every=0),
        dataset=dataclasses.replace(
            task.settings.dataset, examples=12, held_out=4, data_dir=data[data.index("--data-dir") + 1]
        ),
    )
    work = task.prepare(options, SimpleNamespace(processes=1, mesh=None))
    batch = next(work.batches)
    assert batch["image"].shape == (4, 1, 1, 128) and {"index", "caption"}.isdisjoint(batch)
    np.testing.assert_allclose(np.linalg.norm(batch["image"], axis=-1), unclip_tiny.NORM, rtol=1e-3)
    assert work.model.unet.text_length == 24 and work.model.text.pooled_norm == unclip_tiny.NORM
    encoder = dataclasses.replace(clip.load_text_encoder(SHIPPED / "clip"), padding_is_read=False)
    if skip:
        table, norm = (encoder.params["text"][name] for name in ("tokens", "norm"))
        captions = [caption_of(scene("train", i), "train", i).text for i in range(12)]
        wanted = encoder.encode(captions)
        for text, pooled in zip(batch["text"], batch["text_pooled"]):
            row = int(np.abs(np.asarray(wanted.pooled) - pooled).max(1).argmin())
            np.testing.assert_allclose(pooled, wanted.pooled[row], rtol=1e-4, atol=1e-4)
            x = table["embedding"][wanted.ids[row]] + encoder.params["text"]["positions"]
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
            states = jnp.where(wanted.mask[row][:, None], x * norm["scale"] + norm["bias"], 0.0)
            np.testing.assert_allclose(text, states, rtol=2e-3, atol=2e-3)
        return
    counts = batch["text_mask"].sum(1)
    states = encoder.params["text"]["projection"]["kernel"]
    last = batch["text"][np.arange(4), counts - 1].astype(np.float32)
    np.testing.assert_allclose(batch["text_pooled"], last @ np.asarray(states), rtol=1e-3, atol=1e-3)


def test_the_runs_are_a_pipeline(runs, command, tmp_path):
    places = runs.prior, runs.decoder, runs.sr256
    pipeline = jaxdiff.from_pretrained(places)
    assert pipeline.sides == (1, 64, 128)
    prior, decoder, _ = pipeline.boxes
    assert isinstance(prior, RankedPrior) and prior.candidates == 2 and isinstance(decoder, EmbeddingDecoder)
    embeddings, small_images, large = pipeline.sample(["a red circle", ""], SampleOptions(seed=3))
    assert (
        embeddings.shape == (2, 1, 1, 128) and small_images.shape == (2, 64, 64, 3) and large.shape == (2, 128, 128, 3)
    )
    done = command(sample, "a red circle", "--weights", *places, "--steps", "2,,", "--out", tmp_path / "images")
    assert done.code == 0 and "1 images at 128 pixels" in done.out, done.err
    (path,) = (tmp_path / "images").glob("0000*.png")
    stages = json.loads(Image.open(path).text["jaxdiff"])["settings"]["stages"]
    assert [stage["steps"] for stage in stages] == [2, 3, 3]
    short = command(sample, "a", "--weights", *places, "--up-to", 64, "--out", tmp_path / "short")
    assert short.code == 0 and "1 images at 64 pixels" in short.out, short.err


def test_evaluation(runs, command, tmp_path):
    flags = "--n", 2, "--objects", 1, "--json", tmp_path / "scores.json"
    done = command(evaluate, "attributes", "--weights", runs.prior, runs.decoder, *flags)
    assert done.code == 0, done.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert "attribute_accuracy_64" in scores and len(scores["made_by"]["stages"]) == 2


def test_images_of_an_image(runs, images, command, tmp_path):
    """Variations, with the prior or without it: the same embedding, and so the same images."""
    for name, places in (("both", (runs.prior, runs.decoder)), ("decoder", (runs.decoder,))):
        flags = "--variation-of", images[0], "--per-prompt", 2, "--out", tmp_path / name
        done = command(sample, "--weights", *places, *flags)
        assert done.code == 0 and "2 images at 64 pixels" in done.out, done.err
    both, alone = (sorted((tmp_path / name).glob("0*.png")) for name in ("both", "decoder"))
    first, second = (np.asarray(Image.open(path)) for path in both)
    assert (first != second).any()
    values = json.loads(Image.open(both[0]).text["jaxdiff"])["settings"]
    assert values["variation_of"] == "a.png" and {"text_diff", "points"}.isdisjoint(values)
    # The number of the box is part of the noise's key.
    assert len(alone) == 2
    pipeline = jaxdiff.from_pretrained(runs.decoder)
    decoder = pipeline.generator
    image = np.asarray(Image.open(images[0]).convert("RGB"), np.float32) / 127.5 - 1
    rows = np.repeat(np.asarray(decoder.encode(jnp.asarray(image[None]))), 2, axis=0)
    (wanted,) = pipeline.sample(["", ""], SampleOptions(after=After(-1, rows)))
    found = np.stack([np.asarray(Image.open(path), np.float32) for path in alone])
    assert np.abs(127.5 * (wanted + 1) - found).max() < 2


def test_interpolation_and_text_diff(runs, images, command, tmp_path):
    flags = "--weights", runs.prior, runs.decoder, "--points", 3
    done = command(sample, *flags, "--interpolate", *images, "--per-prompt", 2, "--out", tmp_path / "arc")
    assert done.code == 0 and "6 images at 64 pixels" in done.out, done.err
    text = "--variation-of", images[0], "--text-diff", "a red circle", "a blue star"
    done = command(sample, "a star", *flags, *text, "--text-diff-fraction", 0.3, "--out", tmp_path / "moved")
    assert done.code == 0 and "3 images at 64 pixels" in done.out, done.err
    path = sorted((tmp_path / "moved").glob("0002*.png"))[0]
    values = json.loads(Image.open(path).text["jaxdiff"])["settings"]
    assert values["text_diff"] == ["a red circle", "a blue star"] and values["text_diff_fraction"] == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variation-of", "{a}", "--interpolate", "{a}", "{b}"), "one of them at a time"),
        (("a", "--text-diff", "a", "b"), "give one with --variation-of"),
        (("--variation-of", "{a}", "--enlarge", "{a}"), "--enlarge starts from an image"),
        (("--variation-of", "{a}", "--points", 1), "--points 1: at least both ends"),
        (("--variation-of", "{a}", "--text-diff-fraction", 0), "above 0 and up to 1"),
        (("a", "b", "--variation-of", "{a}"), "2 prompts: with --variation-of or --interpolate give one"),
        (("--variation-of", "nowhere.png"), "nowhere.png"),
        (("--variation-of", "{a}", "--text-diff", "a star", "a star"), "have the same embedding"),
        (("a", "--size", "64"), "no grid of 64×64"),
    ],
)
def test_sampling_refused(arguments, message, runs, images, command, tmp_path):
    given = [str(each).format(a=images[0], b=images[1]) for each in arguments]
    done = command(sample, *given, "--weights", runs.prior, runs.decoder, "--out", tmp_path / "images")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err


def test_weights_refused(runs, images, standin, command, tmp_path):
    out = "--out", tmp_path / "images"
    done = command(sample, "a", "--weights", runs.decoder, *out)
    assert done.code == 2 and "name the run of a prior before them" in done.err, done.err
    done = command(sample, "--weights", standin, "--variation-of", images[0], *out)
    assert done.code == 2 and "these weights decode no image embeddings" in done.err, done.err
    done = command(sample, "a", "--weights", runs.prior, *out)
    assert done.code == 2 and "the last stage samples embeddings of width 128" in done.err, done.err
    done = command(sample, "a", "--lora", "x.safetensors", "--weights", runs.prior, runs.decoder, *out)
    assert done.code == 2 and "LoRAs and ControlNets are for a Stable Diffusion" in done.err, done.err
    done = command(sample, "a", "--weights", runs.decoder, runs.prior, *out)
    assert done.code == 2 and "after the 64 stage only super-resolution can follow" in done.err, done.err


def test_an_exported_folder(runs, command, tmp_path):
    """It samples what the runs do, without them and without their CLIP; upsamplers can follow."""
    out = tmp_path / "folder"
    done = command(export, "unclip", "--weights", runs.prior, runs.decoder, "--out", out)
    assert done.code == 0 and "64 pixels" in done.out, done.err
    moved = tmp_path / "moved"
    out.rename(moved)
    options = SampleOptions(seed=1)
    wanted = jaxdiff.from_pretrained((runs.prior, runs.decoder)).sample(["a green heart"], options)
    pipeline = jaxdiff.from_pretrained(moved)
    assert pipeline.text_encoder.skip_last == 3
    for found, expected in zip(pipeline.sample(["a green heart"], options), wanted, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert jaxdiff.from_pretrained((moved, runs.sr256)).sides == (1, 64, 128)
    again = dataclasses.replace(pipeline, generator=dataclasses.replace(pipeline.generator, candidates=5))
    jaxdiff.save_pretrained(again, moved, "float16")
    assert jaxdiff.from_pretrained(moved).generator.candidates == 5
    done = command(export, "unclip", "--weights", runs.sr256, "--out", tmp_path / "other")
    assert done.code == 2 and "no run of unclip.prior" in done.err
    with pytest.raises(ValueError, match="not a prior, a decoder of embeddings and upsamplers"):
        alone = jaxdiff.from_pretrained(runs.prior)
        jaxdiff.save_pretrained(alone, tmp_path / "alone")


def test_another_clip(runs, tmp_path):
    """A CLIP that was trained again, or one of another run, is refused before anything is sampled."""
    other, copy = tmp_path / "clip", tmp_path / "decoder"
    shutil.copytree(SHIPPED / "clip", other)
    config, params = clip.load(other)
    params["image"]["projection"]["kernel"] = params["image"]["projection"]["kernel"] + 0.1
    clip.export(config, params, other)
    shutil.copytree(runs.decoder, copy)
    source = json.loads((copy / "clip.json").read_text())
    (copy / "clip.json").write_text(json.dumps(source | {"source": str(other)}))
    with pytest.raises(ValueError, match="not the CLIP of the training"):
        jaxdiff.from_pretrained(copy)
    (copy / "clip.json").write_text(json.dumps(source | {"image": "0" * 16}))
    with pytest.raises(ValueError, match="were trained with different CLIPs"):
        jaxdiff.from_pretrained((runs.prior, copy))
    (copy / "clip.json").write_text(json.dumps(source | {"source": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match="is no longer there"):
        jaxdiff.from_pretrained(copy)
    (copy / "clip.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say where a CLIP is"):
        jaxdiff.from_pretrained(copy)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unclip.prior", ("--clip-model", "nowhere"), "nowhere"),
        ("unclip.decoder", ("--clip-skip", 4), "has 3 blocks"),
        ("unclip.prior", ("--crop", 8), "this model is trained on whole images"),
        ("unclip.decoder", ("--buckets",), "CLIP reads whole square images"),
        ("unclip.decoder", ("--data", "rainbow"), "the shipped CLIP knows `shapes` alone"),
        ("unclip.prior", ("--max-aug-level", 0.5), "is no super-resolution"),
    ],
)
def test_training_refused(name, arguments, message, data, command, tmp_path):
    done = command(train, name, *data, "--steps", 1, *arguments, "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_clip_of_another_width(tmp_path):
    """The models follow it: the prior's embeddings and captions, and the decoder's condition."""
    folder = tmp_path / "clip"
    shutil.copytree(SHIPPED / "clip", folder)
    config, params = clip.load(folder)
    for tower in ("text", "image"):
        kernel = params[tower]["projection"]["kernel"]
        params[tower]["projection"]["kernel"] = kernel[:, :96]
    clip.export(dataclasses.replace(config, width=96), params, folder)
    models = []
    for name in ("unclip.prior", "unclip.decoder"):
        task = TASKS[name]
        settings = dataclasses.replace(task.settings, clip=CLIPOptions(str(folder)))
        models.append(task.space(settings, task.trained_model(settings)).model)
    prior, decoder = models
    assert prior.product == EmbeddingSpec(96, 96**0.5) == embedding_of(decoder).product
    assert (prior.text.pooled, prior.text.pooled_norm, prior.unet.embedding) == (96, 96**0.5, 96)
    assert prior.unet.text_width == 128
