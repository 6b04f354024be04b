"""Whole DeepFloyd IFs: folders of pipelines and hub ids, and what is asked of the hub."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_if
from huggingface_hub.errors import LocalEntryNotFoundError

from jaxdiff.core import trees
from jaxdiff.diffusion.time_grid import Leading
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.cleaning import clean_caption
from jaxdiff.text.precomputed import embed_captions
from jaxdiff.weights import hub, imagen, stages


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The small cascade, and the folder of its stages."""
    pipeline, folder = small_if.cascade(), tmp_path_factory.mktemp("if")
    imagen.export(pipeline, folder)
    return pipeline, folder


def assert_same(found, wanted, bound=0.0):
    assert len(found.boxes) == len(wanted.boxes)
    pairs = [(a.params, b.params) for a, b in zip(found.boxes, wanted.boxes)]
    for a, b in zip(found.boxes, wanted.boxes):
        assert (a.model, a.sampling) == (b.model, b.sampling)
    for a, b in [*pairs, (found.text_encoder.params, wanted.text_encoder.params)]:
        a, b = trees.flatten(a), trees.flatten(b)
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=bound, atol=bound * 1e-2, err_msg=name)


def test_a_folder_of_stages(exported):
    model, folder = exported
    found = imagen.load(folder)
    assert_same(found, model)
    encoder = found.text_encoder
    assert encoder.padding_is_read and encoder.length == 77 and encoder.prepare is clean_caption
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    both = {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    both |= {"scheduler/scheduler_config.json"}
    base = {"text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"}
    base |= {"tokenizer/tokenizer_config.json"}
    larger = {"image_noising_scheduler/scheduler_config.json"}
    assert names == {f"base64/{name}" for name in both | base} | {f"sr256/{name}" for name in both | larger}


def test_stages_by_their_own_folders(exported):
    model, folder = exported
    assert_same(imagen.load([folder / "base64", str(folder / "sr256")]), model)
    alone = imagen.load(folder / "base64")
    assert_same(alone, Pipeline(model.text_encoder, model.generator))
    lower = imagen.load(folder / "base64", clean=False).text_encoder.prepare
    assert lower(" A  <b>RED</b> Circle ") == "a  <b>red</b> circle"


def test_half_precision_and_variants(exported, tmp_path):
    """Files of the variant fp16, of all parts, in either compute type."""
    model, folder = exported
    imagen.export(model, tmp_path, "float16")
    for path in tmp_path.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert_same(imagen.load(tmp_path, variant="fp16"), model, 2**-10)
    found = imagen.load(tmp_path, variant="fp16", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves([m.params for m in found.boxes])} == {jnp.dtype("bfloat16")}
    assert found.generator.model.unet.execution.dtype == found.text_encoder.config.dtype == "bfloat16"
    with pytest.raises(FileNotFoundError, match="fp16"):
        imagen.load(folder, variant="fp16")


def test_what_diffusers_pipelines_save(exported, tmp_path):
    """The same, but for the spacing of the steps: diffusers writes its own where a file had none."""
    torch = pytest.importorskip("torch", reason="diffusers' pipelines are PyTorch's")
    diffusers = pytest.importorskip("diffusers", reason="IF's pipelines are diffusers'")
    model, folder = exported
    models = [replace(each, sampling=replace(each.sampling, spacing=Leading())) for each in model.boxes]
    wanted = replace(model, generator=models[0], decoders=tuple(models[1:]))
    base = diffusers.IFPipeline.from_pretrained(folder / "base64")
    larger = diffusers.IFSuperResolutionPipeline.from_pretrained(folder / "sr256")
    for half in (False, True):
        options = {"variant": "fp16", "max_shard_size": "500KB"} if half else {}
        stages = tmp_path / f"I{half}", tmp_path / f"II{half}"
        for pipeline, stage in zip((base, larger), stages):
            pipeline.save_pretrained(stage, **options)
        assert len(list(stages[0].rglob("*.safetensors"))) > (4 if half else 1)
        assert_same(imagen.load(stages, variant="fp16" if half else None), wanted, 2**-10 if half else 0.0)
        base.to(dtype=torch.float16), larger.to(dtype=torch.float16)


def test_placed_by_the_caller(exported):
    placed = []

    def place(array):
        placed.append(array.shape)
        return jnp.asarray(array)

    model, folder = exported
    assert_same(imagen.load(folder, place=place), model)
    parts = [*(m.params for m in model.boxes), model.text_encoder.params]
    assert len(placed) == sum(len(jax.tree.leaves(part)) for part in parts)


def test_a_pipeline_beside_a_stage_that_was_trained_here(exported, tmp_path):
    model, folder = exported
    shutil.copytree(folder / "base64", tmp_path / "base64")
    stages.save_model(model.decoders[0], tmp_path / "sr256")
    assert_same(imagen.load(tmp_path), model)
    (tmp_path / "sr256").rename(tmp_path / "sr1024")
    with pytest.raises(ValueError, match="holds sr1024 without the stage before it"):
        imagen.load(tmp_path)


# The hub


@pytest.fixture
def asked(exported, monkeypatch):
    """The hub holds the small cascade as IF's XL and M; what was asked of it."""
    calls = []

    def download(hub_id, revision, allow_patterns):
        calls.append((hub_id, revision, {name.partition("/")[0] for name in allow_patterns if "safetensors" in name}))
        return str(exported[1] / ("base64" if "IF-I-" in hub_id else "sr256"))

    monkeypatch.setattr(hub, "snapshot_download", download)
    return calls


def test_stage_one_brings_its_stage_two(exported, asked):
    assert_same(imagen.load("DeepFloyd/IF-I-XL-v1.0"), exported[0])
    assert asked == [
        ("DeepFloyd/IF-I-XL-v1.0", None, {"unet"}),
        ("DeepFloyd/IF-II-L-v1.0", None, {"unet"}),
        ("DeepFloyd/IF-I-XL-v1.0", None, {"text_encoder"}),
    ]
    asked.clear()
    for size in ("M", "L"):
        imagen.load(f"DeepFloyd/IF-I-{size}-v1.0@refs/pr/2", text=embedded())
    assert asked == [
        (f"DeepFloyd/IF-{stage}-{size}-v1.0", revision, {"unet"})
        for size in ("M", "L")
        for stage, revision in (("I", "refs/pr/2"), ("II", None))
    ]


def embedded():
    return embed_captions(small_if.text_encoder(), small_if.CAPTIONS)


def test_stages_that_are_named(asked):
    """Only those; and the text encoder alone without any of them."""
    alone = imagen.load(["some/IF-I-small"])
    assert len(alone.boxes) == 1 and {hub_id for hub_id, *_ in asked} == {"some/IF-I-small"}
    asked.clear()
    assert len(imagen.load(["DeepFloyd/IF-I-XL-v1.0", "some/IF-II-small@v2"], text=embedded()).boxes) == 2
    assert asked == [("DeepFloyd/IF-I-XL-v1.0", None, {"unet"}), ("some/IF-II-small", "v2", {"unet"})]
    asked.clear()
    imagen.load_text("DeepFloyd/IF-I-XL-v1.0")
    assert asked == [("DeepFloyd/IF-I-XL-v1.0", None, {"text_encoder"})]
    with pytest.raises(ValueError, match="no weights given"):
        imagen.load([])


def test_offline(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError("cannot find the files\nand more lines")

    monkeypatch.setattr(hub, "snapshot_download", download)
    for load in (imagen.load, imagen.load_text):
        with pytest.raises(ValueError, match=r"DeepFloyd/IF-I-XL-v1\.0 is not a directory, and could not be") as error:
            load("DeepFloyd/IF-I-XL-v1.0")
        assert "\n" not in str(error.value)
