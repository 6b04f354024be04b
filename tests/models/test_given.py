"""An image to begin with: image to image and inpainting, with every sampler, in one stage and in a cascade."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import BASE, LENGTH, TEXT, Formula, random_params

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, PLMS, DPMSolverPP2M, Heun
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Leading, UniformLogSNR, time_grid
from jaxdiff.models import sampling as sampling_module
from jaxdiff.models.conditioners import LowResConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.models.start import InitProduct, first_step
from jaxdiff.systems.init_image import InitImage
from jaxdiff.systems.pipeline import After, Pipeline, SampleOptions
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.precomputed import PrecomputedTextEncoder

KEY, COUNT, SIDE = jax.random.key(1), 4, 8
SAMPLERS = [DDIM(), DDPM(), DPMSolverPP2M(), Heun()]
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (COUNT, SIDE, SIDE, 3)).astype("f4")
MASK = np.zeros((COUNT, SIDE, SIDE, 1), "f4")
MASK[:, 2:6, 3:] = 1.0
EMBEDDED = TextEmbedding(jnp.asarray(RNG.normal(size=(COUNT, LENGTH, 6)), jnp.float32), jnp.ones((COUNT, LENGTH), bool))


def grey(x, time, text, mask):
    """A network that sees a flat image in whatever it is given, of the text's brightness."""
    return 0 * x + 0.5 * jnp.tanh(text.sum((1, 2)))[:, None, None, None]


GREY = DiffusionModel(unet=Formula(output=grey), side=SIDE, conditioners=(TEXT,), prediction=Prediction.X0)
WANTED = 0.5 * np.tanh(np.asarray(EMBEDDED.tokens).sum((1, 2)))[:, None, None, None]


def drawn(init, sampling, model=GREY, params=None, rows=slice(None), progress=None):
    keys = noise.sample_keys(KEY, jnp.arange(COUNT))[rows]
    text = jax.tree.map(lambda a: a[rows], EMBEDDED)
    if init is not None:
        init = InitProduct(init.value[rows], init.strength, None if init.mask is None else init.mask[rows])
    request = SampleRequest(keys, (SIDE, SIDE), text, init=init, progress=progress)
    return np.asarray(TrainedModel(model, params or {}, sampling).generate(request))


def given(strength, mask=None):
    return InitProduct(jnp.asarray(IMAGE), strength, None if mask is None else jnp.asarray(mask))


def sampling_of(sampler, steps=8, **settings):
    return SamplingConfig(sampler, steps, thresholding=NoThreshold(), **settings)


def seen(stage=GREY):
    """A stage that writes down what its network is given, and those images and times."""
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
    """The noisiest point of Imagen's schedule has hardly a trace of the image, and the network sees none of it."""
    afresh = drawn(None, sampling_of(sampler))
    np.testing.assert_allclose(drawn(given(1.0), sampling_of(sampler)), afresh, atol=2e-3)
    np.testing.assert_allclose(afresh, np.broadcast_to(WANTED, afresh.shape), atol=2e-2)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_start(scaled):
    """Unit noise, or that noise as the first point has it."""
    stage, calls = seen(replace(GREY, schedule=TabulatedSchedule.scaled_linear()))
    spacing = Leading(1)
    drawn(None, sampling_of(DDIM(), 3, spacing=spacing, scaled_start=scaled), stage)
    jax.effects_barrier()
    sigma = float(time_grid(stage.schedule, 3, spacing).sigma[0])
    assert sigma < 0.97
    eps = np.asarray(noise.normal_like(noise.fold(noise.sample_keys(KEY, jnp.arange(COUNT)), 0), (SIDE, SIDE, 3)))
    np.testing.assert_allclose(calls[0][0], (sigma if scaled else 1.0) * eps, atol=1e-5)


def test_known_pixels_are_clean_where_a_grid_ends_with_noise():
    table = replace(GREY, schedule=TabulatedSchedule.scaled_linear())
    found = drawn(given(1.0, MASK), sampling_of(DDIM(), 3, spacing=Leading(1, to_first_entry=True)), table)
    kept = np.broadcast_to(MASK == 0, found.shape)
    np.testing.assert_allclose(found[kept], IMAGE[kept], atol=1e-6)


def keeper(x, time, text, mask):
    """A network of small strength: what is left of the image in x, a little smoothed."""
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
    [*((sampler, False) for sampler in (*SAMPLERS, PLMS())), (DDPM(), True)],
    ids=[*(type(sampler).__name__ for sampler in SAMPLERS), "PLMS", "a real network"],
)
def test_the_same_in_chunks_and_in_other_batches(sampler, real, monkeypatch):
    stage, params = (BASE, random_params(BASE)) if real else (replace(GREY, unet=Formula(output=keeper)), {})
    sampling = SamplingConfig(sampler, 6, guidance=Guidance(2.0), thresholding=StaticThreshold())
    picture, done = given(0.7, MASK), []
    together = drawn(picture, sampling, stage, params)
    assert together.std() > 0.1 and np.isfinite(together).all()
    monkeypatch.setattr(sampling_module, "CHUNK", 3)
    chunked = drawn(picture, sampling, stage, params, progress=done.append)
    np.testing.assert_array_equal(chunked, together)
    assert done == [5, 6]  # of six steps, four are drawn: 2 to 5
    np.testing.assert_allclose(drawn(picture, sampling, stage, params, rows=slice(2, 4)), together[2:], atol=1e-3)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, 0.12, float("nan")])
def test_strengths_that_leave_nothing_to_draw(strength):
    with pytest.raises(ValueError, match=f"strength {strength} leaves no step of 8, or is above 1") as error:
        drawn(given(strength), sampling_of(DDIM()))
    assert "\n" not in str(error.value)
    assert first_step(0.13, 8) == 7 and first_step(0.7, 10) == 3 and first_step(1.0, 8) == 0


# In a cascade


def enlarging(x, time, text, mask, low_res, level):
    return 0.5 * low_res + 0.5 * grey(x, time, text, mask)


def model(side, enlarges=False):
    unet = Formula(output=enlarging if enlarges else grey)
    lower = (LowResConditioner(factor=2),) if enlarges else ()
    return TrainedModel(
        DiffusionModel(unet, side, conditioners=(TEXT, *lower), prediction=Prediction.X0), {}, sampling_of(DDIM())
    )


PROMPTS = ("red", "a b", "blue", "c")
CASCADE = Pipeline(PrecomputedTextEncoder(PROMPTS, EMBEDDED), model(8), (model(16, True), model(32, True)))


@pytest.fixture(scope="module")
def picture():
    """32×24: smooth, and to be drawn in a rectangle of whole pixels at 8."""
    x, y = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-2, 2, 32))
    mask = np.zeros((32, 24), bool)
    mask[8:20, 12:] = True
    return InitImage(np.stack([np.sin(x), np.cos(y), np.tanh(x * y)], -1).astype("f4"), (1.0, 0.5, 0.25), mask)


def drawing(init, progress=None, **options):
    options = {"size": (8, 6)} | options
    return CASCADE.sample(PROMPTS, SampleOptions(init=init, seed=3, **options), progress)


def resized(init, size):
    return np.clip(np.asarray(jax.image.resize(jnp.asarray(init.image), (*size, 3), "cubic")), -1, 1)


def test_each_stage_sees_the_picture_at_its_size(picture):
    """Kept there, and sampled where the mask has each stage's own pixels."""
    found = drawing(picture)
    assert [images.shape for images in found] == [(4, 8, 6, 3), (4, 16, 12, 3), (4, 32, 24, 3)]
    means = picture.image.reshape(8, 4, 6, 4, 3).mean((1, 3))
    for images in found:
        step = 32 // images.shape[1]
        kept, known = ~picture.mask[::step, ::step], resized(picture, images.shape[1:3])
        np.testing.assert_allclose(images[:, kept], np.broadcast_to(known[kept], images[:, kept].shape), atol=5e-4)
        assert np.abs(images[:, ~kept] - known[~kept]).mean() > 0.1
        assert np.abs(np.diff(images[:, ~kept], axis=0)).max() > 0.05
    assert np.abs(found[0] - means)[:, ~picture.mask[::4, ::4]].max() < 0.1


def test_images_of_a_pipeline_do_not_depend_on_their_batch(picture):
    together = drawing(picture)
    for images, wanted in zip(drawing(picture, batch=3), together):
        np.testing.assert_allclose(images, wanted, atol=1e-3)
    reports = []
    for images, wanted in zip(drawing(picture, lambda *report: reports.append(report)), together):
        np.testing.assert_allclose(images, wanted, atol=1e-6)
    for number in range(3):
        last = [report for report in reports if report[0] == number][-1]
        assert last[1] == last[2]


def test_without_a_mask_and_from_a_later_stage(picture):
    """The largest stage alone: at strength one it samples what it would without the image."""
    plain = replace(picture, mask=None, strengths=(1.0, 0.5, 1.0))
    start = After(1, np.broadcast_to(resized(picture, (16, 12)), (4, 16, 12, 3)))
    (found,) = drawing(plain, after=start)
    (other,) = drawing(None, after=start)
    np.testing.assert_allclose(found, other, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"strengths": (1.0,)}, "1 strengths for 3 stages: give one for each"),
        ({"strengths": (1.0, 1.0, 1.0, 1.0)}, "4 strengths for 3 stages"),
        ({"strengths": (1.0, 0.1, 1.0)}, "strength 0.1 leaves no step of 8"),
        ({"strengths": (1.0, 1.0, 1.5)}, "strength 1.5 leaves no step of 8, or is above 1"),
        ({"mask": np.zeros((24, 32), bool)}, "a mask of 24×32 pixels for an image of 32×24"),
        ({"mask": np.zeros((32, 24, 1), bool)}, "a mask of 32×24×1 pixels for an image of 32×24"),
        ({"image": np.zeros((32, 24, 4), "f4")}, "an init_image has the shape h×w×3, not 32×24×4"),
        ({"image": np.zeros((32, 24), "f4")}, "an init_image has the shape h×w×3, not 32×24"),
    ],
)
def test_refused_before_anything_is_sampled(picture, changes, match):
    def never(*call):
        raise AssertionError("it was sampled")

    options = SampleOptions(init=replace(picture, **changes), size=(8, 6))
    with pytest.raises(ValueError, match=match) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        CASCADE.batches(PROMPTS, options, never)
    assert "\n" not in str(error.value)
