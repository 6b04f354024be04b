"""Stable Diffusion's pipelines against diffusers', from the same noise: every task, with very small networks.

The differences are printed (`pytest -rA`). diffusers encodes an image to a sample of the autoencoder's distribution;
here it takes the mean, as ours does. The public topologies are in `test_stable_diffusion_families.py`.
"""

from dataclasses import replace

import numpy as np
import pytest
import small_stable_diffusion as small
from small_stable_diffusion import ONE_LEVEL, compare, image_to_image, inpainting

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.conditioners import NullText

PLAIN, IMAGE, INPAINT = (f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))


@pytest.fixture(scope="module")
def one_level(tmp_path_factory):
    return small.pair(tmp_path_factory.mktemp("one"), "SD 1", **ONE_LEVEL)


@pytest.mark.parametrize("sampler", [name for name in small.SCHEDULERS if name != "Euler"])  # `test_xl` has that
def test_text_to_image(one_level, sampler, monkeypatch):
    compare(monkeypatch, *one_level.in_class(PLAIN, sampler))


def test_all_of_the_text_is_read(one_level):
    """Else both could agree by ignoring it."""
    _, ours = one_level.in_class(PLAIN)

    def sample(prompt, negative):
        return ours.sample([prompt], small.options(negative=negative))[-1]

    wanted = sample(small.PROMPT, small.NEGATIVE)
    for other in (sample("a blue dog", small.NEGATIVE), sample(small.PROMPT, "")):
        assert np.abs(other - wanted).mean() * 255 > 1


def test_guidance_rescale(one_level, monkeypatch):
    """And no negative prompt: the empty one."""
    theirs, ours = one_level.in_class(PLAIN)
    compare(monkeypatch, theirs, ours, negative=None)
    rescaled = replace(ours.generator.sampling, guidance=Guidance(7.5, rescale=0.7))
    ours = replace(ours, generator=replace(ours.generator, sampling=rescaled))
    compare(monkeypatch, theirs, ours, negative=None, guidance_rescale=0.7)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image(one_level, strength, monkeypatch):
    compare(monkeypatch, *one_level.in_class(IMAGE), image_to_image(strength))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_a_plain_network(one_level, strength, monkeypatch):
    compare(monkeypatch, *one_level.in_class(INPAINT), inpainting(strength))


def test_inpainting_by_its_network(tmp_path, monkeypatch):
    """Which reads the mask; the known pixels are not restored after each step."""
    pair = small.pair(tmp_path, "SD 1", INPAINT, in_channels=9, **ONE_LEVEL)
    for strength in (1.0, 0.6):
        compare(monkeypatch, *pair.in_class(INPAINT), inpainting(strength))


def test_upscaling(tmp_path, monkeypatch):
    """From an image, by a network that predicts v and reads the level of its noise."""
    pair = small.pair(tmp_path, "upscaler", "StableDiffusionUpscalePipeline", **ONE_LEVEL)
    small.compare_upscaling(monkeypatch, pair.theirs, small.sampled_as(pair.ours, pair.theirs, small.STEPS))


def test_xl(tmp_path, monkeypatch):
    """Two text encoders and the sizes. Without a negative prompt zeros are null, not the empty prompt."""
    pair = small.pair(tmp_path, "SDXL", "StableDiffusionXLPipeline", sampler="Euler", **ONE_LEVEL)
    theirs, ours = pair.in_class("StableDiffusionXLPipeline")
    assert ours.generator.sampling.guidance == Guidance(5.0) and ours.generator.model.text.null is NullText.ZEROS
    for negative in (small.NEGATIVE, None):
        compare(monkeypatch, theirs, ours, negative=negative)


SAMPLERS = pytest.mark.parametrize("sampler", small.SCHEDULERS)


@pytest.mark.slow
@SAMPLERS
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_sampler_in_every_task(one_level, sampler, prediction, monkeypatch):
    for kind, init in ((PLAIN, None), (IMAGE, image_to_image), (INPAINT, inpainting)):
        theirs, _ = one_level.in_class(kind, sampler)
        theirs.scheduler.register_to_config(prediction_type=prediction)
        ours = small.sampled_as(one_level.ours, theirs, small.STEPS)
        # diffusers' PLMS that begins in the middle skips an entry, see `PLMS`.
        for strength in (1.0,) if sampler == "PLMS" else (1.0, 0.6):
            compare(monkeypatch, theirs, ours, init and init(strength))
