"""Kandinsky 2.2's folders: the images of diffusers' two pipelines from the same noise, written back, and refused."""

import itertools
import json
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_unclip
from small_stable_diffusion import difference, drawn, to_torch, torch_text

import jaxdiff
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.thresholding import StaticThreshold
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.systems import kandinsky as presets
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.text.clip_tokenizer import clip_tokenizer
from jaxdiff.weights import autoencoder, kandinsky, unclip_prior, unclip_unet

STEPS = 5
WIDTH = small_unclip.EMBEDDING
PROMPTS = ["a red cat!", "two blue stars left of a green heart"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}


@pytest.fixture(scope="module")
def theirs():
    """diffusers' pipelines of the prior and of the decoder."""
    torch, diffusers = small_unclip.torch_and_diffusers()
    transformers = pytest.importorskip("transformers")
    prior = diffusers.PriorTransformer(**small_unclip.SMALL["prior"] | {"num_embeddings": 77})
    tensors = small_unclip.tensors_of(small_unclip.shapes_of(prior))
    prior.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=WIDTH)
    first = diffusers.KandinskyV22PriorPipeline(
        prior=prior.eval(),
        image_encoder=drawn(transformers.CLIPVisionModelWithProjection(vision).eval()),
        text_encoder=torch_text("gelu", WIDTH, WIDTH),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        image_processor=None,
    )
    scheduler = diffusers.DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=True, clip_sample_range=2.0)
    second = diffusers.KandinskyV22Pipeline(
        unet=small_unclip.theirs("image decoder"), movq=small_unclip.theirs("movq"), scheduler=scheduler
    )
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    return first, second


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory):
    paths = [tmp_path_factory.mktemp(name) for name in ("prior", "decoder")]
    for pipeline, path in zip(theirs, paths):
        pipeline.save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def boxes(folders):
    return kandinsky.load(*folders)


def feed(monkeypatch, pipeline, keys):
    """Makes diffusers' pipeline draw our noise."""
    import torch

    numbers = itertools.count()

    def noise_of(keys, shape):
        if len(shape) == 2:
            return torch.tensor(np.asarray(noise.normal_like(keys, tuple(shape[1:]))))
        return to_torch(noise.normal_like(keys, (*shape[2:], shape[1])))

    def start(shape, **_):
        return noise_of(noise.fold(keys, 0), shape)

    def step(shape, **_):
        return noise_of(noise.fold(noise.fold(keys, 1), next(numbers)), shape)

    for owner, function in ((pipeline, start), (pipeline.scheduler, step)):
        monkeypatch.setattr(f"{type(owner).__module__}.randn_tensor", function)


def test_images_of_diffusers(theirs, boxes, monkeypatch):
    """Embeddings of the prior, then latents and images with the null embedding of an empty image."""
    import torch

    few = lambda trained: replace(trained, sampling=replace(trained.sampling, steps=STEPS))  # noqa: E731
    keys = noise.sample_keys(jax.random.key(0), jnp.arange(len(PROMPTS)))
    encoder, first, second = boxes.text_encoder, noise.fold(keys, 0), noise.fold(keys, 1)
    texts = {"text": encoder.encode(PROMPTS), "negative": encoder.encode([""] * len(PROMPTS))}
    prior = few(boxes.prior)
    embedding = prior.generate(SampleRequest(first, (1, 1), **texts))
    feed(monkeypatch, theirs[0], first)
    wanted = theirs[0](PROMPTS, num_inference_steps=STEPS, guidance_scale=4.0)
    bound = 1e-3 * wanted.image_embeds.abs().max().item()
    np.testing.assert_allclose(embedding[:, 0, 0], wanted.image_embeds.numpy(), atol=bound)
    null = boxes.decoder.params["text"]["null"]
    np.testing.assert_allclose(null, wanted.negative_image_embeds[0].numpy(), atol=1e-5)
    given = {"image_embedding": embedding[:, 0]}
    latents = few(boxes.decoder).generate(SampleRequest(second, (16, 16), given=given))
    images = boxes.autoencoder.decode(latents, SampleRequest(second, (128, 128)))
    feed(monkeypatch, theirs[1], second)
    settings = {"height": 128, "width": 128, "num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np"}
    embeddings = torch.tensor(np.asarray(embedding[:, 0, 0])), wanted.negative_image_embeds
    found = difference(images, theirs[1](*embeddings, **settings).images)
    print(f"KandinskyV22Pipeline: {found:.1e} of 255")
    assert found < 2.0


def test_what_is_read(boxes, tmp_path):
    sampling = boxes.decoder.sampling
    assert sampling.sampler == DDPM(None) and sampling.thresholding == StaticThreshold(2.0)
    assert sampling == presets.SAMPLING_DECODER and boxes.prior.sampling == presets.SAMPLING_PRIOR
    schedule = np.asarray(boxes.decoder.model.schedule.alpha_bar)
    np.testing.assert_allclose(schedule, presets.DECODER.schedule.alpha_bar, rtol=1e-9)
    assert boxes.decoder.conditions == ("image_embedding",) and boxes.decoder.reads is None
    assert boxes.autoencoder.consumes == boxes.decoder.produces and boxes.autoencoder.side == 128
    assert boxes.decoder.model.guided and boxes.autoencoder.factor == 8


def test_presets_are_public(tmp_path):
    """The networks of the public settings."""
    path = tmp_path / "config.json"
    read = {name: json.loads(small_unclip.public(name).to_json_string()) for name in ("image decoder", "movq")}
    assert unclip_unet.read_image_decoder(read["image decoder"], path).unet == presets.DECODER.unet
    assert autoencoder.from_values(read["movq"], path).config == presets.MOVQ
    values = small_unclip.PRIORS["Kandinsky 2.2"]
    assert unclip_prior.read_config(values, path) == presets.PRIOR.unet


def test_written_for_diffusers(boxes, theirs, tmp_path):
    import diffusers
    import torch

    kandinsky.export_decoder(boxes.decoder, boxes.autoencoder, tmp_path)
    opened = diffusers.KandinskyV22Pipeline.from_pretrained(tmp_path)
    for name in ("unet", "movq"):
        state = getattr(opened, name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in getattr(theirs[1], name).state_dict().items())
    assert opened.scheduler.config["clip_sample_range"] == 2.0
    assert opened.scheduler.config["variance_type"] == "learned_range"
    again = kandinsky.load_decoder(tmp_path)
    assert again.model == boxes.decoder.model and again.sampling == boxes.decoder.sampling
    assert not again.params["text"]["null"].any()
    restored = kandinsky.with_null(again, boxes.decoder.params["text"]["null"])
    jax.tree.map(np.testing.assert_array_equal, restored.params, boxes.decoder.params)


def copied(folders, tmp_path, number, name, **change):
    """The folders' files, with other settings in one."""
    copies = [shutil.copytree(path, tmp_path / str(i), copy_function=os.link) for i, path in enumerate(folders)]
    path = copies[number] / name
    values = json.loads(path.read_text()) | change
    path.unlink()
    path.write_text(json.dumps(values))
    return copies


@pytest.mark.parametrize(
    ("number", "name", "change", "message"),
    [
        (0, "model_index.json", {"_class_name": "KandinskyPriorPipeline"}, "only 'KandinskyV22PriorPipeline'"),
        (1, "model_index.json", {"_class_name": "UnCLIPPipeline"}, "only 'KandinskyV22Pipeline'"),
        (1, "unet/config.json", {"sample_size": 12}, "12 latents is not a multiple"),
        (1, "unet/config.json", {"addition_embed_type": "image_hint"}, "addition_embed_type = 'image_hint'"),
        (1, "unet/config.json", {"encoder_hid_dim": 14}, "of another shape"),
        (1, "scheduler/scheduler_config.json", {"clip_sample_range": 0}, "clip_sample_range = 0"),
        (1, "movq/config.json", {"latent_channels": 5}, "of another shape"),
    ],
)
def test_refused_folders(number, name, change, message, folders, tmp_path):
    copies = copied(folders, tmp_path, number, name, **change)
    with pytest.raises(ValueError, match=message) as error:
        kandinsky.load(*copies)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("number", "name"), [(0, "image_encoder"), (0, "scheduler"), (1, "movq"), (1, "unet")])
def test_missing_folders(number, name, folders, tmp_path):
    copies = copied(folders, tmp_path, number, "model_index.json")
    (copies[number] / name).rename(copies[number] / "elsewhere")
    with pytest.raises((FileNotFoundError, ValueError), match=name) as error:
        kandinsky.load(*copies)
    assert "\n" not in str(error.value)


def test_boxes_that_are_not_kandinskys(boxes, tmp_path):
    """Refused before anything is written."""
    decoder, movq = boxes.decoder, boxes.autoencoder
    slow = replace(decoder, sampling=replace(decoder.sampling, sampler=DDIM(0.5)))
    other = replace(decoder, params={name: value for name, value in decoder.params.items() if name != "stem"})
    for box, autoencoders, message in (
        (boxes.prior, movq, "no decoder with unet = PriorConfig"),
        (slow, movq, "no sampler = DDIM"),
        (other, movq, r"the decoder to export does not fit the settings: 2 missing \(stem"),
        (decoder, replace(movq, quantized=True), "decodes latents as they are"),
        (decoder, replace(movq, scale=0.5), "decodes latents as they are"),
    ):
        with pytest.raises(ValueError, match=message):
            kandinsky.export_decoder(box, autoencoders, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="a null embedding of width 3: the decoder reads those of 12"):
        kandinsky.with_null(decoder, jnp.zeros(3))


def test_folders_are_a_pipeline(folders):
    pipeline = jaxdiff.from_pretrained(folders)
    prior, decoder = (replace(box, sampling=replace(box.sampling, steps=2)) for box in pipeline.boxes[:2])
    short = replace(pipeline, generator=prior, decoders=(decoder, pipeline.decoders[1]))
    embeddings, latents, images = short.sample(PROMPTS, SampleOptions(seed=3))
    assert embeddings.shape == (2, 1, 1, WIDTH) and latents.shape == (2, 16, 16, 4) and images.shape == (2, 128, 128, 3)
    assert pipeline.decoders[0].encode(jnp.asarray(images[:, :40, :40])).shape == embeddings.shape
    with pytest.raises(ValueError, match=r"is the prior of Kandinsky 2\.2: name it and the folder of the decoder"):
        jaxdiff.from_pretrained(folders[0])
