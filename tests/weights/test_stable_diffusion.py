"""Stable Diffusion's pipelines against diffusers', from the same noise: every task, sampler and family, very small.

    python -m pytest -m "slow or not slow" tests/weights/test_stable_diffusion.py

prints the largest differences (`-rA`). diffusers encodes images to samples of the autoencoder's distribution; here it
takes the mean, as ours does.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import small_stable_diffusion as small

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.conditioners import NullText
from jaxdiff.systems.init_image import InitImage
from jaxdiff.systems.pipeline import INPUT, After, SampleOptions
from jaxdiff.weights import stable_diffusion

PROMPT, NEGATIVE, COUNT, STEPS = "a red cat!", "ugly, low quality", 2, 5
HEIGHT, WIDTH = 64, 128
LATENTS = HEIGHT // 8, WIDTH // 8
RNG = np.random.default_rng(0)
IMAGE = np.clip(RNG.normal(size=(HEIGHT, WIDTH, 3)) * 0.3 + np.linspace(-0.8, 0.8, WIDTH)[:, None], -1, 1).astype("f4")
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[5:43, 20:93] = True  # edges that are no multiples of the stride
CLOSE = 0.02
"""Mean absolute difference of images, in 1/255 of their range."""

SLOW = pytest.mark.slow


def load(family, kind, folder, **change):
    """diffusers' pipeline, and ours of the folder that it wrote."""
    theirs = small.torch_pipeline(family, kind, **change)
    theirs.save_pretrained(folder)
    return SimpleNamespace(theirs=theirs, folder=folder, ours=stable_diffusion.load(folder))


def in_class(theirs, kind, sampler=None):
    """The same networks in another pipeline of diffusers."""
    import diffusers

    given = {"requires_safety_checker": False} if "XL" not in kind else {}
    other = getattr(diffusers, kind)(**theirs.components, **given)
    other.set_progress_bar_config(disable=True)
    if sampler is not None:
        prediction = theirs.scheduler.config["prediction_type"]
        other.scheduler = small.scheduler(sampler, prediction_type=prediction)
    return other


def options(**given):
    return SampleOptions(per_prompt=COUNT, size=LATENTS, **given)


def image_of(theirs, monkeypatch, *, negative=NEGATIVE, **given):
    """diffusers' images, from our noise."""
    first = STEPS - int(STEPS * given.get("strength", 1.0))
    small.feed(monkeypatch, theirs, small.keys_of(COUNT), first)
    given |= {"num_images_per_prompt": COUNT, "num_inference_steps": STEPS, "output_type": "np"}
    return theirs(PROMPT, negative_prompt=negative, **given).images


def compare(ours, theirs, monkeypatch, init=None, **given):
    """One task. init: for image to image and inpainting."""
    given["guidance_scale"] = ours.generator.sampling.guidance.weight
    negative = given.get("negative", NEGATIVE) or ""
    images = ours.sample([PROMPT], options(init=init, negative=negative))[-1]
    if init is None:
        given |= {"height": HEIGHT, "width": WIDTH}
    else:
        [strength] = init.strengths
        given |= {"strength": strength, "image": (init.image + 1) / 2}
        if init.mask is not None:
            given |= {"mask_image": init.mask.astype("f4"), "height": HEIGHT, "width": WIDTH}
    found = small.difference(images, image_of(theirs, monkeypatch, **given))
    check(found, theirs)


def check(found, theirs):
    print(f"{type(theirs).__name__}, {type(theirs.scheduler).__name__}: {found:.1e} of 255")
    assert found < CLOSE


@pytest.fixture(scope="module")
def one_level(tmp_path_factory):
    return load("one level", "StableDiffusionPipeline", tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("sampler", small.SCHEDULERS)
def test_text_to_image(one_level, sampler, monkeypatch):
    theirs = in_class(one_level.theirs, "StableDiffusionPipeline", sampler)
    ours = small.sampled_as(one_level.ours, theirs, STEPS)
    compare(ours, theirs, monkeypatch)


def test_guidance_rescale(one_level, monkeypatch):
    """And no negative prompt: the empty one."""
    theirs = in_class(one_level.theirs, "StableDiffusionPipeline", "DDIM")
    ours = small.sampled_as(one_level.ours, theirs, STEPS)
    compare(ours, theirs, monkeypatch, negative=None)
    rescaled = replace(ours.generator.sampling, guidance=Guidance(7.5, rescale=0.7))
    ours = replace(ours, generator=replace(ours.generator, sampling=rescaled))
    compare(ours, theirs, monkeypatch, negative=None, guidance_rescale=0.7)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image(one_level, strength, monkeypatch):
    theirs = in_class(one_level.theirs, "StableDiffusionImg2ImgPipeline", "DDIM")
    ours = small.sampled_as(one_level.ours, theirs, STEPS)
    compare(ours, theirs, monkeypatch, InitImage(IMAGE, (strength,)))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_a_plain_network(one_level, strength, monkeypatch):
    theirs = in_class(one_level.theirs, "StableDiffusionInpaintPipeline", "DDIM")
    ours = small.sampled_as(one_level.ours, theirs, STEPS)
    compare(ours, theirs, monkeypatch, InitImage(IMAGE, (strength,), MASK))


def test_inpainting_by_its_network(tmp_path, monkeypatch):
    case = load("one level", "StableDiffusionInpaintPipeline", tmp_path, in_channels=9)
    ours = small.sampled_as(case.ours, case.theirs, STEPS)
    for strength in (1.0, 0.6):
        compare(ours, case.theirs, monkeypatch, InitImage(IMAGE, (strength,), MASK))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return load("SDXL", "StableDiffusionXLPipeline", tmp_path_factory.mktemp("xl"), sampler="Euler")


@pytest.mark.parametrize("negative", [NEGATIVE, None], ids=["negative", "zeros"])
def test_xl(xl, negative, monkeypatch):
    """Two text encoders and the sizes. Without a negative prompt zeros are null, not the empty prompt."""
    ours = small.sampled_as(xl.ours, xl.theirs, STEPS)
    assert ours.generator.sampling.guidance == Guidance(5.0)
    compare(ours, xl.theirs, monkeypatch, negative=negative)


def test_xl_whose_null_text_is_the_empty_prompt(xl, tmp_path, monkeypatch):
    """As the index says. With the same program: only the text differs."""
    theirs = in_class(xl.theirs, "StableDiffusionXLPipeline")
    theirs.register_to_config(force_zeros_for_empty_prompt=False)
    theirs.save_config(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    source = replace(stable_diffusion.open_source(xl.folder), index=index)
    generator = stable_diffusion.load_generator(source)
    assert generator.model.text.null is NullText.EMPTY
    ours = small.sampled_as(replace(xl.ours, generator=generator), theirs, STEPS)
    compare(ours, theirs, monkeypatch, negative=None)


def test_version_1(tmp_path, monkeypatch):
    """All four levels, as the folder says: PLMS."""
    case = load("SD 1", "StableDiffusionPipeline", tmp_path, sampler="PLMS")
    ours = small.sampled_as(case.ours, case.theirs, STEPS)
    assert ours.generator.sampling == replace(case.ours.generator.sampling, steps=STEPS)
    compare(ours, case.theirs, monkeypatch)


def test_upscaling(tmp_path, monkeypatch):
    """From an image, by a network that predicts v and reads the level of its noise."""
    case = load("upscaler", "StableDiffusionUpscalePipeline", tmp_path)
    ours = small.sampled_as(case.ours, case.theirs, STEPS)
    image = np.stack([IMAGE, IMAGE[::-1]])[:, 24:40:2, ::8]
    images = ours.sample([PROMPT, NEGATIVE], SampleOptions(after=After(INPUT, image), negative=NEGATIVE))
    assert [each.shape for each in images] == [(2, 8, 16, 4), (2, 32, 64, 3)]
    small.feed(monkeypatch, case.theirs, small.keys_of(2))
    settings = {"num_inference_steps": STEPS, "guidance_scale": 9.0, "output_type": "np"}
    prompts = {"prompt": [PROMPT, NEGATIVE], "negative_prompt": [NEGATIVE] * 2}
    wanted = case.theirs(**prompts, image=(image + 1) / 2, noise_level=20, **settings).images
    check(small.difference(images[-1], wanted), case.theirs)
