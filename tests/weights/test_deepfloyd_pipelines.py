"""DeepFloyd IF as diffusers draws it: the same images from the same noise, whole pipelines, real captions.

diffusers' pipelines open the small cascade that was exported, and are handed the noise of ours. Both draw with DDIM.
"""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_if

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.diffusion.time_grid import Leading, Respaced
from jaxdiff.systems.init_image import InitImage
from jaxdiff.systems.pipeline import SampleOptions
from jaxdiff.weights import imagen

torch = pytest.importorskip("torch", reason="diffusers' IF is PyTorch's")
diffusers = pytest.importorskip("diffusers", reason="IF is compared with diffusers'")

CAPTIONS = small_if.CAPTIONS
COUNT, SEED, STEPS = len(CAPTIONS), 3, 4
GUIDANCE = 7.0, 4.0
LEVEL = 250
SIDES = 16, 64
MEAN, MOST = 0.1, 2.0
"""Bounds of the difference, in steps of 255."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("if")
    imagen.export(small_if.cascade(), folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    loaded = imagen.load(folder)
    for model, weight in zip(loaded.boxes, GUIDANCE):
        assert model.sampling.guidance.weight == weight and model.sampling.clean_known
    assert loaded.decoders[0].sampling.aug_level == LEVEL / 1000
    return loaded


@pytest.fixture(scope="module")
def parts(folder):
    """The modules of diffusers' two pipelines, which all its other pipelines of IF are made of too."""
    base = diffusers.IFPipeline.from_pretrained(folder / "base64")
    text = {"text_encoder": base.text_encoder, "tokenizer": base.tokenizer}
    larger = diffusers.IFSuperResolutionPipeline.from_pretrained(folder / "sr256", **text)
    for pipeline in (base, larger):
        # DDIM has no learned variance; its setting decides whether a pipeline hands it over.
        settings = {**pipeline.scheduler.config, "variance_type": "fixed_small"}
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(settings)
    return base.components, larger.components


def tensor(pictures):
    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(pictures), -1, 1)))


def noise_of(number, use):
    """Ours of a stage: 0 is where it begins, 2 is on its low-resolution input."""
    keys = noise.fold(noise.sample_keys(jax.random.key(SEED), jnp.arange(COUNT)), number)
    return tensor(noise.normal_like(noise.fold(keys, use), (SIDES[number], SIDES[number], 3)))


@pytest.fixture
def theirs(parts, monkeypatch):
    """Draws with a class of diffusers' from our noise; (b h w 3)."""

    def draw(kind, number, **inputs):
        noises = [noise_of(number, use) for use in ((0, 2) if number else (0,))]

        def randn_tensor(shape, **_):
            drawn = noises.pop(0)
            assert tuple(shape) == drawn.shape
            return drawn

        monkeypatch.setattr(sys.modules[kind.__module__], "randn_tensor", randn_tensor)
        pipeline = kind(**parts[number], **({} if number else {"requires_safety_checker": False}))
        pipeline.set_progress_bar_config(disable=True)
        inputs |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE[number], "output_type": "pt"}
        inputs |= {"noise_level": LEVEL} if number else {}
        pictures = pipeline(prompt=CAPTIONS, **inputs).images
        assert not noises
        return np.moveaxis(pictures.clamp(-1, 1).numpy(), 1, -1)

    return draw


def sampled(ours, sampling, **options):
    """The products of ours, all of whose boxes sample in another way."""
    first, *others = (replace(box, sampling=replace(box.sampling, **sampling)) for box in ours.boxes)
    return replace(ours, generator=first, decoders=tuple(others)).sample(CAPTIONS, SampleOptions(seed=SEED, **options))


def drawn(ours, clean_known=True, **options):
    ddim = {"sampler": DDIM(), "steps": STEPS, "spacing": Leading(), "keep_eps": True}
    return sampled(ours, ddim | {"clean_known": clean_known}, **options)


def assert_same(found, wanted):
    """Nearly every value within a hundredth of a step of 255, and images that differ from one another."""
    for ours, theirs in zip(found, wanted, strict=True):
        difference = 127.5 * np.abs(ours - theirs)
        print(f"{ours.shape[1]}: mean {difference.mean():.4f}, most {difference.max():.3f} of 255")
        assert difference.mean() < MEAN and difference.max() < MOST
        assert theirs.std() > 0.2 and np.abs(np.diff(theirs, axis=0)).mean() > 0.1


@pytest.mark.parametrize("negative", [pytest.param("", marks=pytest.mark.slow), "a Blue star"])
def test_text_to_image(ours, theirs, negative):
    told = {"negative_prompt": [negative] * COUNT} if negative else {}
    base = theirs(diffusers.IFPipeline, 0, **told)
    larger = theirs(diffusers.IFSuperResolutionPipeline, 1, image=tensor(base), **told)
    assert_same(drawn(ours, negative=negative), (base, larger))


@pytest.fixture(scope="module")
def init():
    """Smooth bands, to be redrawn in the middle; half of the steps, not the nearer three quarters."""
    x, y = np.meshgrid(np.linspace(-2, 2, 64), np.linspace(-3, 3, 64))
    image = np.stack([np.sin(x + y), np.cos(2 * x), np.tanh(y)], -1).astype("f4")
    mask = np.zeros((64, 64), bool)
    mask[12:44, 20:56] = True
    return InitImage(image, (0.7, 0.7), mask)


def seen(init, side):
    """The image at a side, and its mask there (b h w c), as diffusers takes them: it resizes neither."""
    size = side, side
    image = jnp.clip(jax.image.resize(init.image, (*size, 3), "cubic"), -1, 1)
    mask = (
        None if init.mask is None else jax.image.resize(init.mask[..., None].astype("f4"), (*size, 1), "linear") >= 0.5
    )
    return [None if each is None else np.repeat(np.float32(each)[None], COUNT, 0) for each in (image, mask)]


@pytest.mark.slow
def test_image_to_image(ours, theirs, init):
    init = replace(init, mask=None)
    given = [tensor(seen(init, side)[0]) for side in SIDES]
    base = theirs(diffusers.IFImg2ImgPipeline, 0, image=given[0], strength=0.7)
    inputs = {"image": tensor(base), "original_image": given[1], "strength": 0.7}
    larger = theirs(diffusers.IFImg2ImgSuperResolutionPipeline, 1, **inputs)
    assert_same(drawn(ours, init=init), (base, larger))


@pytest.mark.slow
def test_inpainting(ours, theirs, init):
    """IF puts what is known back as it is; noised to each step's level, what is kept comes out the same."""
    given = [seen(init, side) for side in SIDES]
    images, masks = ([tensor(each[i]) for each in given] for i in (0, 1))
    base = theirs(diffusers.IFInpaintingPipeline, 0, image=images[0], mask_image=masks[0], strength=0.7)
    inputs = {"original_image": images[1], "mask_image": masks[1], "strength": 0.7}
    larger = theirs(diffusers.IFInpaintingSuperResolutionPipeline, 1, image=tensor(base), **inputs)
    found = drawn(ours, init=init)
    assert_same(found, (base, larger))
    kept = [np.broadcast_to(mask == 0, clean.shape) for (_, mask), clean in zip(given, found)]
    for clean, (image, _), where in zip(found, given, kept):
        assert 0.5 < where.mean() < 0.9
        np.testing.assert_allclose(clean[where], image[where], atol=1e-6)
    (noised,) = drawn(ours, clean_known=False, init=init, last=0)
    np.testing.assert_allclose(noised[kept[0]], given[0][0][kept[0]], atol=1e-3)
    assert np.abs(found[0] - noised)[~kept[0]].mean() > 0.01


@pytest.mark.slow
def test_ddpm_with_the_variance_that_the_network_has_learned(folder, ours, monkeypatch):
    """As a pipeline draws that was never told otherwise, its thresholding and guidance too; of a respacing."""
    spacing = Respaced((2, 1, 2))
    base = diffusers.IFPipeline.from_pretrained(folder / "base64")
    base.set_progress_bar_config(disable=True)
    assert base.scheduler.config.variance_type == "learned_range"
    noises = [noise_of(0, 0)]
    monkeypatch.setattr(sys.modules[diffusers.IFPipeline.__module__], "randn_tensor", lambda shape, **_: noises[0])
    keys = noise.fold(noise.fold(noise.sample_keys(jax.random.key(SEED), jnp.arange(COUNT)), 0), 1)
    steps = iter([tensor(noise.normal_like(noise.fold(keys, i), (16, 16, 3))) for i in range(spacing.steps)])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: next(steps))
    timesteps = spacing.entries(1000)[::-1]
    pictures = base(CAPTIONS, timesteps=timesteps, guidance_scale=GUIDANCE[0], output_type="pt").images
    found = sampled(ours, {"steps": spacing.steps, "spacing": spacing}, last=0)
    assert_same(found, [np.moveaxis(pictures.clamp(-1, 1).numpy(), 1, -1)])


MESSY = ["  A PINK Cross &amp; two  stars ", "a red circle: https://example.org/a.png 50x60", "", "a blue HEART"]


@pytest.mark.parametrize("clean", [True, False])
def test_captions(folder, ours, parts, clean):
    """Cleaned, or put in lower case alone; padding and the empty caption are encoded like anything else."""
    pipeline = diffusers.IFPipeline(**parts[0], requires_safety_checker=False)
    with torch.no_grad():
        wanted, negative = pipeline.encode_prompt(MESSY, True, clean_caption=clean)
    encoder = ours.text_encoder if clean else imagen.load_text(folder, clean=False)
    found = encoder.encode(MESSY)
    assert found.tokens.shape == (4, 77, 24) and found.mask.all()
    np.testing.assert_allclose(found.tokens, wanted, atol=2e-5)
    np.testing.assert_allclose(encoder.encode(["", " \n"]).tokens, negative[:2], atol=2e-5)
    np.testing.assert_allclose(found.tokens[2], negative[0], atol=2e-5)
    assert (np.abs(np.asarray(found.tokens)).max(-1) > 0.1).all()
    other = imagen.load_text(folder, clean=not clean)
    differ = np.abs(other.encode(MESSY).tokens - found.tokens).max((1, 2)) > 0.1
    assert list(differ) == [True, True, False, False]
