"""Karlo's folder: the images of diffusers' UnCLIPPipeline from the same noise, written back, and what is refused."""

import json
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_karlo
import small_unclip
from small_stable_diffusion import difference, to_torch

import jaxdiff
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.systems import karlo as presets
from jaxdiff.systems.pipeline import After, SampleOptions
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.weights import karlo
from jaxdiff.weights.karlo import Loading


@pytest.fixture(scope="module")
def theirs():
    return small_karlo.pipeline()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("karlo")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def boxes(folder):
    return karlo.load(folder)


def sampled(text, negative, prior, decoder, upsampler):
    """The large images, of few steps."""
    texts, keys = {"text": text, "negative": negative}, small_karlo.keys()
    few = [
        replace(trained, sampling=replace(trained.sampling, steps=steps))
        for trained, steps in zip((prior, decoder, upsampler), small_karlo.STEPS.values())
    ]
    embedding = few[0].generate(SampleRequest(noise.fold(keys, 0), (1, 1), **texts))
    given = {"image_embedding": embedding[:, 0]}
    small = few[1].generate(SampleRequest(noise.fold(keys, 1), (16, 16), **texts, given=given))
    return few[2].decode(small, SampleRequest(noise.fold(keys, 2), (32, 32)))


def test_images_of_diffusers(theirs, boxes, monkeypatch):
    """From captions to 32×32, with both networks of the upsampler and guidance in prior and decoder.

    diffusers has 1 − ᾱ in float32, which is off by a thousandth at the first entry, where each box ends.
    """
    encoder, prompts = boxes.text_encoder, small_karlo.PROMPTS
    images = sampled(encoder.encode(prompts), encoder.encode([""] * len(prompts)), *boxes[1:4])
    small_karlo.feed(monkeypatch, theirs)
    wanted = small_karlo.images_of(theirs)
    found = difference(images, wanted)
    print(f"UnCLIPPipeline: {found:.1e} of 255")
    assert found < 2.0


def test_kept_images(tmp_path):
    """The same from the folders of the kept files and embedded captions, without diffusers."""
    small_karlo.write(tmp_path)
    kept = small_karlo.kept()
    negative, text = (
        TextEmbedding(*(jnp.asarray(half) for half in halves))
        for halves in zip(*(np.split(kept[name], 2) for name in ("tokens", "mask", "pooled")))
    )
    prior = karlo.load_prior(tmp_path / "prior", tmp_path / "prior_scheduler")
    decoder = karlo.load_decoder(tmp_path)
    images = sampled(text, negative, prior, decoder, karlo.load_upsampler(tmp_path, decoder.side))
    found = difference(images, kept["images"])
    print(f"kept: {found:.1e} of 255")
    assert found < 2.0


def test_enlarged_images():
    """Without noise, as PyTorch's bicubic with antialiasing does it."""
    torch, _ = small_unclip.torch_and_diffusers()
    low = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 4, 3)), jnp.float32)
    seen = presets.UPSAMPLER.low_res.seen(
        low, jnp.zeros(2), noise.sample_keys(jax.random.key(0), jnp.arange(2)), (32, 16)
    )
    settings = {"size": [32, 16], "mode": "bicubic", "align_corners": False, "antialias": True}
    wanted = torch.nn.functional.interpolate(to_torch(low), **settings).numpy()
    assert seen.aug_level is None
    np.testing.assert_allclose(np.moveaxis(np.asarray(seen.concat), -1, 1), wanted, atol=1e-5)


def test_what_is_read(boxes, folder):
    assert karlo.is_karlo(folder) and not karlo.is_karlo(folder / "prior")
    assert boxes.prior.sampling == replace(presets.SAMPLING_PRIOR)
    assert boxes.decoder.sampling == presets.SAMPLING_DECODER and boxes.upsampler.sampling == presets.SAMPLING_UPSAMPLER
    assert boxes.decoder.conditions == ("image_embedding",) and boxes.decoder.reads == boxes.prior.reads == (77, 12)
    assert (boxes.decoder.side, boxes.upsampler.side, boxes.upsampler.factor) == (16, 32, 2)
    assert boxes.prior.reads_empty and boxes.decoder.reads_empty and not boxes.decoder.reads_padding
    assert not boxes.upsampler.model.guided and not boxes.text_encoder.padding_is_read


def test_written_for_diffusers(boxes, theirs, tmp_path):
    """All components come back, for both libraries."""
    import diffusers
    import torch

    karlo.export(boxes, tmp_path)
    again = karlo.load(tmp_path)
    for ours, others in zip(boxes[1:4], again[1:4]):
        ours, others = (getattr(box, "prior", box) for box in (ours, others))
        assert ours.model == others.model and ours.sampling == others.sampling
        jax.tree.map(np.testing.assert_array_equal, ours.params, others.params)
    assert again.text_encoder.fingerprint == boxes.text_encoder.fingerprint
    # This version opens no folder of Karlo's as a pipeline, not even its own, but each component.
    assert json.loads((tmp_path / "model_index.json").read_text()).keys() >= theirs.components.keys()
    for name, component in theirs.components.items():
        if isinstance(component, torch.nn.Module):
            state = type(component).from_pretrained(tmp_path / name).state_dict()
            assert all(torch.equal(value, state[key]) for key, value in component.state_dict().items()), name
    for name, values in small_karlo.SETTINGS.items():
        config = diffusers.UnCLIPScheduler.from_pretrained(tmp_path / f"{name}_scheduler").config
        assert {key: config[key] for key in values} == values
    sides = {"decoder": 16, "super_res_first": 32, "super_res_last": 32}
    for name, side in sides.items():
        assert json.loads((tmp_path / name / "config.json").read_text())["sample_size"] == side


def test_bfloat16(folder):
    boxes = karlo.load(folder, Loading("bfloat16"))
    for box in (boxes.prior, boxes.decoder, boxes.upsampler):
        assert box.model.unet.execution.dtype == "bfloat16"
        assert {leaf.dtype for leaf in jax.tree.leaves(box.params)} == {jnp.dtype(jnp.bfloat16)}


def rewritten(folder, tmp_path, name, **change):
    """A folder of the same files with other settings in one of them."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=os.link)
    path = copy / name
    values = json.loads(path.read_text()) | change
    path.unlink()
    path.write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model_index.json", {"_class_name": "IFPipeline"}, "_class_name = 'IFPipeline' .* only 'UnCLIPPipeline'"),
        ("decoder/config.json", {"sample_size": 12}, "decoder/config.json: .* 12 pixels is not a multiple"),
        ("decoder/config.json", {"sample_size": None}, "sample_size = None"),
        ("super_res_first/config.json", {"sample_size": 40}, "sample_size = 40 .* multiples of the decoder's 16"),
        ("super_res_last/config.json", {"layers_per_block": 2}, "missing"),
        ("decoder_scheduler/scheduler_config.json", {"variance_type": "fixed_small_log"}, "only 'learned_range'"),
        ("prior/config.json", {"embedding_dim": 14}, "of another shape"),
    ],
)
def test_refused_folders(name, change, message, folder, tmp_path):
    copy = rewritten(folder, tmp_path, name, **change)
    with pytest.raises(ValueError, match=message) as error:
        karlo.load(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["prior", "prior_scheduler", "text_proj", "super_res_last", "text_encoder"])
def test_missing_folders(name, folder, tmp_path):
    copy = rewritten(folder, tmp_path, "model_index.json")
    (copy / name).rename(copy / "elsewhere")
    with pytest.raises((FileNotFoundError, ValueError), match=f"{name}|elsewhere") as error:
        karlo.load(copy)
    assert "\n" not in str(error.value)


def test_boxes_that_are_not_karlos(boxes, tmp_path):
    """Refused before anything is written."""
    decoder, upsampler = boxes.decoder, boxes.upsampler

    def changed(trained, **change):
        return replace(trained, model=replace(trained.model, **change))

    late = changed(upsampler, unet=replace(upsampler.model.unet, boundary=50.0))
    text = changed(decoder, conditioners=(replace(decoder.model.text, pooled=None), *decoder.model.conditioners[1:]))
    slow = replace(decoder, sampling=replace(decoder.sampling, sampler=DDIM()))
    for change, message in (
        ({"decoder": text}, "UnCLIPPipeline has no decoder with conditioners"),
        ({"decoder": slow}, "UnCLIPScheduler has no sampler = DDIM"),
        ({"upsampler": late}, "boundary of 0"),
        ({"upsampler": decoder}, "no upsampler with unet = UNetConfig"),
        ({"decoder": replace(decoder, params=upsampler.params)}, "the decoder to export does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            karlo.export(boxes._replace(**change), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    louder = replace(decoder, sampling=replace(decoder.sampling, guidance=Guidance(3.0)))
    karlo.export(boxes._replace(decoder=louder), tmp_path / "y")  # the files have no guidance


def test_a_folder_is_a_pipeline(folder, boxes, tmp_path):
    """From the prior's embedding to the large image, by `from_pretrained`, and back."""
    pipeline = jaxdiff.from_pretrained(folder)
    prior, decoder, upsampler = (replace(box, sampling=replace(box.sampling, steps=2)) for box in pipeline.boxes)
    short = replace(pipeline, generator=prior, decoders=(decoder, upsampler))
    embeddings, small, large = short.sample(small_karlo.PROMPTS, SampleOptions(seed=3))
    assert embeddings.shape == (2, 1, 1, small_unclip.EMBEDDING)
    assert small.shape == (2, 16, 16, 3) and large.shape == (2, 32, 32, 3)
    options = SampleOptions(seed=3, after=After(0, embeddings[::-1].copy()))
    again, _ = short.sample(small_karlo.PROMPTS, options)
    assert np.abs(again - small).mean() > 1e-3  # it reads the embedding
    jaxdiff.save_pretrained(pipeline, tmp_path)
    other = karlo.load(tmp_path)
    assert other.decoder.model.unet == boxes.decoder.model.unet
    with pytest.raises(ValueError, match="diffusers' UnCLIPPipeline is CLIP's text tower, a prior"):
        jaxdiff.save_pretrained(replace(pipeline, decoders=pipeline.decoders[:1]), tmp_path / "x")
    with pytest.raises(ValueError, match="Karlo is one folder"):
        jaxdiff.from_pretrained([folder, folder])


def test_variations_need_the_image_tower(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    image = jax.random.uniform(jax.random.key(0), (1, 40, 40, 3), minval=-1.0)
    with pytest.raises(ValueError, match="without CLIP's image tower"):
        karlo.load(folder).pipeline().decoders[0].encode(image)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=small_unclip.EMBEDDING)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(copy / "image_encoder")
    pipeline = jaxdiff.from_pretrained(copy)
    embedding = pipeline.decoders[0].encode(image)
    assert embedding.shape == (1, 1, 1, small_unclip.EMBEDDING)
    jaxdiff.save_pretrained(pipeline, tmp_path / "saved")
    again = jaxdiff.from_pretrained(tmp_path / "saved").decoders[0].encode(image)
    np.testing.assert_allclose(again, embedding, atol=1e-6)
