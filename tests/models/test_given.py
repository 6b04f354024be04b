"""A picture to begin with: image to image and inpainting, with every sampler, in one stage and in a cascade."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import BASE, LENGTH, Formula, random_params

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Heun
from jaxdiff.diffusion.thresholding import NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import UniformLogSNR, time_grid
from jaxdiff.models.diffusion import DiffusionModel, null_text
from jaxdiff.models.sampling import Given, SamplingConfig, draw, first_step
from jaxdiff.systems.pipeline import Cascade, Picture, TrainedModel, stages
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.precomputed import PrecomputedTextEncoder

KEY, COUNT, SIDE = jax.random.key(1), 4, 8
SAMPLERS = [DDIM(), DDPM(), DPMSolverPP2M(), Heun()]
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (COUNT, SIDE, SIDE, 3)).astype("f4")
MASK = np.zeros((COUNT, SIDE, SIDE, 1), "f4")
MASK[:, 2:6, 3:] = 1.0
TEXT = TextEmbedding(jnp.asarray(RNG.normal(size=(COUNT, LENGTH, 6)), jnp.float32), jnp.ones((COUNT, LENGTH), bool))


def grey(x, time, text, mask):
    """A network that sees a flat picture in whatever it is given, of the text's brightness."""
    return 0 * x + 0.5 * jnp.tanh(text.sum((1, 2)))[:, None, None, None]


GREY = DiffusionModel(unet=Formula(output=grey), resolution=SIDE, prediction=Prediction.X0, text_length=LENGTH)
WANTED = 0.5 * np.tanh(np.asarray(TEXT.tokens).sum((1, 2)))[:, None, None, None]


def drawn(given, sampling, stage=GREY, params=None, rows=slice(None), **options):
    keys = noise.sample_keys(KEY, jnp.arange(COUNT))[rows]
    text = jax.tree.map(lambda a: a[rows], TEXT)
    if given is not None:
        given = Given(given.image[rows], given.strength, None if given.mask is None else given.mask[rows])
    null = null_text(stage, len(keys))
    return np.asarray(draw(stage, params or {}, sampling, text, null, keys, (SIDE, SIDE), given=given, **options))


def given(strength, mask=None):
    return Given(jnp.asarray(IMAGE), strength, None if mask is None else jnp.asarray(mask))


def sampling_of(sampler, steps=8, **settings):
    return SamplingConfig(sampler, steps, thresholding=NoThreshold(), **settings)


def seen(stage=GREY):
    """A stage that writes down what its network is given, and those pictures and times."""
    calls = []

    def record(x, time, *rest):
        jax.debug.callback(lambda x, time: calls.append((np.asarray(x), float(time[0]))), x, time, ordered=True)
        return grey(x, time, *rest)

    return replace(stage, unet=Formula(output=record)), calls


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.26])
def test_drawing_begins_from_the_noised_picture(strength):
    """At the point where the first of the steps that are left begins; with the whole strength that is noise alone."""
    stage, calls = seen()
    spacing = UniformLogSNR(-6.0, 6.0)
    drawn(given(strength), sampling_of(DDIM(), spacing=spacing), stage)
    jax.effects_barrier()
    left = int(8 * strength)
    points = time_grid(stage.schedule, 8, spacing)
    assert [time for _, time in calls] == pytest.approx([1000 * float(t) for t in points.t[8 - left : 8]], abs=1e-2)
    alpha, sigma = float(points.alpha[8 - left]), float(points.sigma[8 - left])
    eps = np.asarray(noise.normal_like(noise.fold(noise.sample_keys(KEY, jnp.arange(COUNT)), 0), (SIDE, SIDE, 3)))
    np.testing.assert_allclose(calls[0][0], alpha * IMAGE + sigma * eps, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_strength_one_is_drawn_afresh(sampler):
    """The noisiest point of Imagen's schedule has hardly a trace of the picture, and the network sees none of it."""
    afresh = drawn(None, sampling_of(sampler))
    np.testing.assert_allclose(drawn(given(1.0), sampling_of(sampler)), afresh, atol=2e-3)
    np.testing.assert_allclose(afresh, np.broadcast_to(WANTED, afresh.shape), atol=2e-2)


def keeper(x, time, text, mask):
    """A network of small strength: what is left of the picture in x, a little smoothed."""
    return 0.9 * jnp.clip(x, -1.0, 1.0) + 0.1 * grey(x, time, text, mask)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_small_strength_stays_near_the_picture(sampler):
    stage = replace(GREY, unet=Formula(output=keeper))
    distance = [
        np.abs(drawn(given(strength), sampling_of(sampler, 20), stage) - IMAGE).mean() for strength in (0.05, 0.3, 1.0)
    ]
    assert distance[0] < 0.15 and distance[0] < 0.5 * distance[1] and distance[1] < distance[2]


@pytest.mark.parametrize("clean_known", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_what_a_mask_keeps(sampler, clean_known):
    """Comes out as it was; the rest is drawn."""
    for strength in (1.0, 0.5):
        found = drawn(given(strength, MASK), sampling_of(sampler, clean_known=clean_known))
        kept = np.broadcast_to(MASK == 0, found.shape)
        np.testing.assert_allclose(found[kept], IMAGE[kept], atol=1e-6 if clean_known else 5e-4)
        assert np.abs(found - IMAGE)[~kept].mean() > 0.2
        if strength == 1.0:
            np.testing.assert_allclose(found[~kept], np.broadcast_to(WANTED, found.shape)[~kept], atol=2e-2)


@pytest.mark.parametrize("clean_known", [False, True])
def test_the_network_sees_what_is_known(clean_known):
    """At every step: noised as the rest is, always with the same noise, or as it is."""
    stage, calls = seen()
    drawn(given(1.0, MASK), sampling_of(DDPM(), 4, clean_known=clean_known), stage)
    jax.effects_barrier()
    assert len(calls) == 4
    kept = np.broadcast_to(MASK == 0, IMAGE.shape)
    eps = np.asarray(noise.normal_like(noise.fold(noise.sample_keys(KEY, jnp.arange(COUNT)), 0), (SIDE, SIDE, 3)))
    for x, time in calls:
        t = jnp.asarray(time / 1000)
        noised = float(stage.schedule.alpha(t)) * IMAGE + float(stage.schedule.sigma(t)) * eps
        np.testing.assert_allclose(x[kept], (IMAGE if clean_known else noised)[kept], atol=1e-5)
        assert np.abs(x - noised)[~kept].mean() > 0.05 or time > 990


@pytest.mark.parametrize(
    ("sampler", "real"),
    [*((sampler, False) for sampler in SAMPLERS), (DDPM(), True)],
    ids=[*(type(sampler).__name__ for sampler in SAMPLERS), "a real network"],
)
def test_the_same_in_chunks_and_in_other_batches(sampler, real):
    stage, params = (BASE, random_params(BASE)) if real else (replace(GREY, unet=Formula(output=keeper)), {})
    sampling = SamplingConfig(sampler, 6, guidance=Guidance(2.0), thresholding=StaticThreshold())
    picture, done = given(0.7, MASK), []
    together = drawn(picture, sampling, stage, params)
    assert together.std() > 0.1 and np.isfinite(together).all()
    chunked = drawn(picture, sampling, stage, params, progress=done.append, chunk=3)
    np.testing.assert_array_equal(chunked, together)
    assert done == [5, 6]  # of six steps, four are drawn: 2 to 5
    np.testing.assert_allclose(drawn(picture, sampling, stage, params, rows=slice(2, 4)), together[2:], atol=1e-3)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, 0.12, float("nan")])
def test_strengths_that_leave_nothing_to_draw(strength):
    with pytest.raises(ValueError, match=f"strength {strength} leaves no step of 8 to draw, or lies above 1") as error:
        drawn(given(strength), sampling_of(DDIM()))
    assert "\n" not in str(error.value)
    assert first_step(0.13, 8) == 7 and first_step(0.7, 10) == 3 and first_step(1.0, 8) == 0


# In a cascade


def enlarging(x, time, text, mask, low_res, level):
    return 0.5 * low_res + 0.5 * grey(x, time, text, mask)


def model(side, low_resolution=None):
    unet = Formula(low_res=low_resolution is not None, output=enlarging if low_resolution else grey)
    stage = DiffusionModel(unet, side, low_resolution, prediction=Prediction.X0, text_length=LENGTH)
    return TrainedModel(stage, {}, sampling_of(DDIM()))


PROMPTS = ("red", "a b", "blue", "c")
CASCADE = Cascade(PrecomputedTextEncoder(PROMPTS, TEXT), model(8), (model(16, 8), model(32, 16)))


@pytest.fixture(scope="module")
def picture():
    """32×24: smooth, and to be drawn in a rectangle of whole pixels at 8."""
    x, y = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-2, 2, 32))
    mask = np.zeros((32, 24), bool)
    mask[8:20, 12:] = True
    return Picture(np.stack([np.sin(x), np.cos(y), np.tanh(x * y)], -1).astype("f4"), (1.0, 0.5, 0.25), mask)


def drawing(picture, **options):
    return stages(CASCADE, PROMPTS, picture=picture, size=(8, 6), seed=3, **options)


def test_each_stage_sees_the_picture_at_its_size(picture):
    """Kept there, and drawn where the mask has each stage's own pixels."""
    found = dict(drawing(picture))
    assert [pictures.shape for pictures in found.values()] == [(4, 8, 6, 3), (4, 16, 12, 3), (4, 32, 24, 3)]
    means = picture.image.reshape(8, 4, 6, 4, 3).mean((1, 3))
    for side, pictures in found.items():
        kept = ~picture.mask[:: 32 // side, :: 32 // side]
        known = np.asarray(picture.given(0, 1, pictures.shape[1:3]).image[0])
        np.testing.assert_allclose(pictures[:, kept], np.broadcast_to(known[kept], pictures[:, kept].shape), atol=5e-4)
        assert np.abs(pictures[:, ~kept] - known[~kept]).mean() > 0.1
        assert np.abs(np.diff(pictures[:, ~kept], axis=0)).max() > 0.05
    assert np.abs(found[8] - means)[:, ~picture.mask[::4, ::4]].max() < 0.1
    seen = picture.given(1, 4, (16, 12))
    assert seen.strength == 0.5 and seen.image.shape == (4, 16, 12, 3) and seen.mask.shape == (4, 16, 12, 1)
    np.testing.assert_array_equal(seen.mask[0, ..., 0], picture.mask[::2, ::2])
    np.testing.assert_array_equal(picture.given(2, 1, (32, 24)).image[0], picture.image)


def test_pictures_of_a_cascade_do_not_depend_on_their_batch(picture):
    together = dict(drawing(picture))
    for side, pictures in drawing(picture, batch=3):
        np.testing.assert_allclose(pictures, together[side], atol=1e-3)
    reports = []
    for side, pictures in drawing(picture, progress=lambda *report: reports.append(report)):
        np.testing.assert_allclose(pictures, together[side], atol=1e-6)
        assert reports[-1] == (side, reports[-1][2], reports[-1][2])


def test_without_a_mask_and_from_a_later_stage(picture):
    """The largest stage alone: at strength one it draws what it would without the picture."""
    plain = replace(picture, mask=None, strengths=(1.0, 0.5, 1.0))
    start = np.broadcast_to(np.asarray(picture.given(0, 4, (16, 12)).image), (4, 16, 12, 3))
    found = dict(stages(CASCADE, PROMPTS, picture=plain, after=(16, start), seed=3))
    assert list(found) == [32]
    other = dict(stages(CASCADE, PROMPTS, after=(16, start), seed=3))
    np.testing.assert_allclose(found[32], other[32], atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"strengths": (1.0,)}, "1 strengths for 3 stages: give one for each"),
        ({"strengths": (1.0, 1.0, 1.0, 1.0)}, "4 strengths for 3 stages"),
        ({"strengths": (1.0, 0.1, 1.0)}, "strength 0.1 leaves no step of 8"),
        ({"strengths": (1.0, 1.0, 1.5)}, "strength 1.5 leaves no step of 8 to draw, or lies above 1"),
        ({"mask": np.zeros((24, 32), bool)}, "a mask of 24×32 pixels for a picture of 32×24"),
        ({"mask": np.zeros((32, 24, 1), bool)}, "a mask of 32×24×1 pixels for a picture of 32×24"),
        ({"image": np.zeros((32, 24, 4), "f4")}, "a picture to begin with is of h×w×3 values, not of 32×24×4"),
        ({"image": np.zeros((32, 24), "f4")}, "a picture to begin with is of h×w×3 values, not of 32×24"),
    ],
)
def test_refused_before_anything_is_drawn(picture, changes, match):
    def never(*call):
        raise AssertionError("it was drawn")

    with pytest.raises(ValueError, match=match) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        stages(CASCADE, PROMPTS, picture=replace(picture, **changes), size=(8, 6), progress=never)
    assert "\n" not in str(error.value)
