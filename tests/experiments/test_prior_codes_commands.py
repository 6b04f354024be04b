"""The autoregressive prior of DALL·E 2 by commands, and on disk."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file
from small_cascade import ADAM

import jaxdiff
from experiments import train
from experiments.options.sampling import SamplingOptions, mesh_of, spread, with_samplings
from experiments.table import TASKS
from experiments.tasks import prior_codes as prior_task
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models import prior_codes
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.embedding_boxes import EmbeddingDecoder
from jaxdiff.models.image_embeddings import CLIPImageEncoder
from jaxdiff.models.prior_codes import TrainedPriorCodes
from jaxdiff.models.representations import EmbeddingConditioner
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.unet import AttentionConfig
from jaxdiff.systems import unclip_tiny
from jaxdiff.systems.pipeline import Pipeline, SampleOptions
from jaxdiff.training import metrics
from jaxdiff.weights import clip, embedding_codes
from jaxdiff.weights.imagen import SHIPPED
from jaxdiff.weights.unclip import load_clip


@pytest.fixture(scope="module", autouse=True)
def preset():
    """A very small network in place of the tiny one."""
    tiny = TASKS["unclip.autoregressive"].preset("tiny")
    network = dataclasses.replace(tiny.model.network, width=16, heads=2, patterns=tiny.model.network.patterns[:1])
    model = dataclasses.replace(tiny.model, network=network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            TASKS["unclip.autoregressive"].presets, "tiny", dataclasses.replace(tiny, model=model, optimizer=ADAM)
        )
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = "--data", "shapes", "--examples", 12, "--held-out", 4, "--evaluate-n", 4, "--batch", 4, "--log-every", 1
    return *data, "--data-dir", tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def run(preset, data, trained, tmp_path_factory):
    """A prior of five components after two steps."""
    folder = tmp_path_factory.mktemp("prior") / "run"
    codes = "--components", 5, "--buckets", 8
    trained("unclip.autoregressive", *data, *codes, "--steps", 2, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(run):
    """The prior, and an untrained decoder."""
    unet = dataclasses.replace(
        small.UNET,
        attention=AttentionConfig((False,), (False,)),
        conditioning=dataclasses.replace(small.UNET.conditioning, text=None),
    )
    model = DiffusionModel(unet, 16, conditioners=(EmbeddingConditioner(128, norm=unclip_tiny.NORM),))
    image = CLIPImageEncoder(*clip.load_image(SHIPPED / "clip"))
    decoder = EmbeddingDecoder(
        model, small.random_params(model, 0), SamplingConfig(steps=2, guidance=Guidance(1.0)), image_encoder=image
    )
    loaded = jaxdiff.from_pretrained(run)
    return Pipeline(loaded.text_encoder, loaded.generator, (decoder,))


def test_training(run):
    """It logs its losses, and keeps how embeddings are coded and which CLIP gave them."""
    lines = metrics.read(run / "metrics.jsonl")
    assert {"loss", "code_accuracy", "held_out_loss", "held_out_code_accuracy"} <= lines[-1].keys()
    assert json.loads((run / "clip.json").read_text())["source"] == str(SHIPPED / "clip")
    coding = embedding_codes.load_coding(run)
    assert coding.embeddings == EmbeddingSpec(128, unclip_tiny.NORM) and coding.text_width == 128
    assert coding.codes.components.shape == (5, 128) and coding.codes.buckets == 8
    assert not (run / "samples").exists()  # embeddings are no images


def test_the_batches_of_training(run, data, tmp_path):
    """Computed here anew: the codes of CLIP's embedding of the image, and the caption's ids and codes before them."""
    task = TASKS["unclip.autoregressive"]
    options = dataclasses.replace(
        task.settings,
        out=tmp_path,
        run=dataclasses.replace(task.settings.run, batch=4, evaluate_every=0),
        codes=dataclasses.replace(task.settings.codes, components=5, buckets=8),
        dataset=dataclasses.replace(task.settings.dataset, examples=12, held_out=4, data_dir=data[-1]),
    )
    work = task.prepare(options, SimpleNamespace(processes=1, mesh=None))
    batch = next(work.batches)
    shapes = {name: each.shape for name, each in work.model.batch_spec(4, 0).items()}
    assert {name: each.shape for name, each in batch.items()} == shapes
    (path,) = (data[-1] / "image-embeddings").glob("12-*.npy")
    codes, spec, _ = embedding_codes.load_coding(run)
    every = prior_codes.encode(codes, jnp.asarray(spec.normalized(np.load(path)[:, 0, 0].astype(np.float32))))
    assert all((np.asarray(every) == row).all(1).any() for row in batch["image"][:, 0, 1:])
    vocab = work.model.network.vocab - 8
    assert (batch["ids"][:, :24] < vocab).all() and (batch["ids"][:, 24:] >= vocab).all()
    assert batch["text_mask"][:, 24:].all()


def test_a_resumed_run_keeps_its_codes(run):
    """They are read, not computed again; those of another CLIP are refused."""
    settings = dataclasses.replace(TASKS["unclip.autoregressive"].settings, out=run)
    towers = load_clip(SHIPPED / "clip")
    coding = prior_task._kept(settings, towers)
    assert coding.codes.components.shape == (5, 128)
    changed = jax.tree.map(lambda leaf: 1.01 * leaf, towers.image.params)
    other = dataclasses.replace(towers, image=dataclasses.replace(towers.image, params=changed))
    with pytest.raises(ValueError, match="its codes are of another CLIP's embeddings"):
        prior_task._kept(settings, other)


def test_a_run_that_begins_with_another_keeps_its_codes(run, data, command, tmp_path):
    before = (run / "embedding_codes.safetensors").read_bytes()
    done = command(train, "unclip.autoregressive", *data, "--steps", 3, "--init", run, "--out", tmp_path / "next")
    assert done.code == 0, done.err
    assert (tmp_path / "next" / "embedding_codes.safetensors").read_bytes() == before


def test_out_and_back(pipeline, tmp_path):
    """A pipeline with this prior as one folder: the same embeddings and images."""
    prior = pipeline.generator
    assert isinstance(prior, TrainedPriorCodes) and pipeline.sides == (1, 16)
    options = SampleOptions(seed=3)
    embeddings, images = pipeline.sample(["a red circle", ""], options)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), unclip_tiny.NORM, rtol=1e-5)
    jaxdiff.save_pretrained(pipeline, tmp_path / "out")
    again = jaxdiff.from_pretrained(tmp_path / "out")
    assert isinstance(again.generator, TrainedPriorCodes)
    for one, other in zip(again.sample(["a red circle", ""], options), (embeddings, images)):
        np.testing.assert_allclose(one, other, atol=1e-5)
    half = jaxdiff.from_pretrained(tmp_path / "out", dtype="bfloat16")
    assert half.generator.transformer.model.network.execution.dtype == "bfloat16"


def test_token_settings(pipeline):
    """They are the prior's; the others are the decoder's."""
    changed = with_samplings(pipeline, SamplingOptions(temperature=0.0, top_k=3, steps="1"))
    assert changed.generator.sampling == dataclasses.replace(pipeline.generator.sampling, temperature=0.0, top_k=3)
    assert changed.decoders[0].sampling.steps == 1 and pipeline.decoders[0].sampling.steps == 2
    with pytest.raises(ValueError, match="--top-k"):
        with_samplings(pipeline, SamplingOptions(top_k=-1))


def test_a_mesh(pipeline):
    """The transformer's batches are spread too."""
    with spread(pipeline, mesh_of("data=-1")) as placed:
        assert [placed.generator.batch_size(3), placed.decoders[0].batch_size(3)] == [8, 8]
        (leaf, *_) = jax.tree.leaves(placed.generator.transformer.params)
        assert len(leaf.sharding.device_set) == 8
    assert pipeline.generator.batch_size(3) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--components", 13), "--components 13: 12 embeddings of width 128 have at most 12"),
        (("--components", 0), "--components 0: at least 1"),
        (("--buckets", 1), "--buckets 1: at least 2"),
        (("--text-dropout", 1), "--text-dropout 1: a fraction"),
        (("--data", "rainbow"), "the shipped CLIP knows `shapes` alone"),
    ],
)
def test_refused(given, message, data, command, tmp_path):
    done = command(train, "unclip.autoregressive", *data, "--steps", 2, *given, "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def _settings(folder, **changes):
    path = folder / "embedding_codes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _arrays(folder, **changes):
    path = folder / "embedding_codes.safetensors"
    save_file(load_file(path) | changes, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _settings(folder, text_width=0), "not the settings of coded embeddings"),
        (lambda folder: _settings(folder, version=10**6), "version"),
        (lambda folder: _arrays(folder, low=np.zeros(4, np.float32)), "low (4,) do not fit 5 components"),
        (lambda folder: _arrays(folder, low=np.full(5, np.nan, np.float32)), "not the arrays of coded embeddings"),
        (
            lambda folder: _arrays(folder, components=np.zeros((), np.float32)),
            "components (), low (5,), high (5,) do not fit",
        ),
        (lambda folder: _arrays(folder, dots=np.zeros(9, np.float32)), "these codes need"),
    ],
)
def test_a_damaged_folder(damage, message, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(ValueError) as error:
        jaxdiff.from_pretrained(tmp_path / "run")
    assert message in str(error.value) and str(tmp_path) in str(error.value)
