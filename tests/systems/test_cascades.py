"""The cascade: stages that fit together, images that depend on nothing but their own number, and clear refusals.

The networks are formulas in which everything that a stage is given leaves its trace.
"""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import LENGTH, TEXT, WIDTH, Formula

from jaxdiff.core.products import ImageSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.thresholding import NoThreshold
from jaxdiff.models.conditioners import LowResConditioner, enlarge
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig
from jaxdiff.systems.pipeline import After, Pipeline, SampleOptions
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.text.tokenizer import byte_tokenizer

PROMPTS = ["red", "blue", "a b", "c", "green"]


def base_formula(x, time, text, mask):
    """Bands of the first text numbers over a trace of the noise."""
    bands = jnp.tanh(text[:, :1, :1] + text[:, :1, 1:2] * mask[:, :1, None])[..., None]
    return 0.5 * bands + 0.3 * jnp.tanh(x)


def larger_formula(x, time, text, mask, low_res, level):
    return 0.8 * low_res + 0.1 * jnp.tanh(x) + 0.1 * jnp.tanh(text[:, :1, :1])[..., None]


SAMPLING = SamplingConfig(DDPM(), 2, guidance=Guidance(2.0), thresholding=NoThreshold())
LARGER = replace(SAMPLING, sampler=DDIM())


def model(side, enlarges=False, reads_text=True):
    unet = Formula(output=larger_formula if enlarges else base_formula)
    if not reads_text:
        silent = lambda x, time, text, mask, low_res, level: 0.8 * low_res + 0.1 * jnp.tanh(x)  # noqa: E731
        attention, conditioning = AttentionConfig((False,), (False,)), ConditioningConfig(16, None)
        unet = Formula(attention=attention, conditioning=conditioning, output=silent)
    conditioners = (*((TEXT,) if reads_text else ()), *((LowResConditioner(factor=2),) if enlarges else ()))
    stage = DiffusionModel(unet, side, conditioners=conditioners, prediction=Prediction.X0)
    return TrainedModel(stage, {}, LARGER if enlarges else SAMPLING)


def sample(pipeline, prompts=None, progress=None, sampling=None, **options):
    """Products by the side of the box that made them, with another way of sampling for all boxes where it is given."""
    if sampling is not None:
        first, *others = (replace(box, sampling=sampling) for box in pipeline.boxes)
        pipeline = replace(pipeline, generator=first, decoders=tuple(others))
    begin = options["after"].box + 1 if options.get("after") is not None else 0
    found = pipeline.sample(PROMPTS if prompts is None else prompts, SampleOptions(**options), progress)
    return dict(zip(pipeline.sides[begin:], found))


@pytest.fixture(scope="module")
def encoder():
    config = T5Config(vocab=384, d_model=WIDTH, d_kv=4, d_ff=8, layers=1, decoder_layers=0, heads=2)
    ids = jnp.zeros((1, LENGTH), int)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids == 0)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return T5TextEncoder(config, params, byte_tokenizer(), LENGTH)


@pytest.fixture(scope="module")
def cascade(encoder):
    return Pipeline(encoder, model(8), (model(16, True), model(32, True)))


@pytest.fixture(scope="module")
def together(cascade):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # long prompts are cut
        return sample(cascade, PROMPTS, seed=3)


pytestmark = pytest.mark.filterwarnings("ignore:.*longer than")


def test_every_stage_is_drawn(cascade, together):
    assert list(together) == [8, 16, 32] == list(cascade.sides)
    for side, pictures in together.items():
        assert pictures.shape == (5, side, side, 3) and pictures.dtype == np.float32
        assert np.abs(pictures).max() <= 1 and np.isfinite(pictures).all()
        assert np.abs(np.diff(pictures, axis=0)).max((1, 2, 3)).min() > 0.05
    smaller = together[16].reshape(5, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.corrcoef(smaller.ravel(), together[8].ravel())[0, 1] > 0.9


def test_a_picture_does_not_depend_on_what_is_drawn_with_it(cascade, together):
    def close(found, rows):
        for side in found:
            np.testing.assert_allclose(found[side], together[side][rows], atol=1e-3)

    close(sample(cascade, PROMPTS, seed=3, batch=1), slice(None))
    close(sample(cascade, PROMPTS, seed=3, batch=2, last=1), slice(None))  # the last batch is filled up
    close(sample(cascade, PROMPTS[:2], seed=3, last=1), slice(0, 2))
    close(sample(cascade, PROMPTS[3:], seed=3, first=3, last=1), slice(3, 5))
    other = sample(cascade, PROMPTS, seed=4, last=0)[8]
    assert np.abs(other - together[8]).max((1, 2, 3)).min() > 0.05


def test_pictures_of_one_prompt_differ_in_noise_alone(cascade, together):
    pictures = sample(cascade, PROMPTS[:2], seed=3, per_prompt=2, batch=2, last=0)[8]
    assert pictures.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(pictures[0], together[8][0], atol=1e-3)
    assert np.abs(pictures[0] - pictures[1]).max() > 0.05
    middles = pictures.mean((1, 2, 3))
    assert abs(middles[0] - middles[1]) < abs(middles[0] - middles[2])


def test_up_to_and_after(cascade, together):
    parts = sample(cascade, PROMPTS, seed=3, last=1)
    assert list(parts) == [8, 16]
    rest = sample(cascade, PROMPTS, seed=3, after=After(1, parts[16]))
    assert list(rest) == [32]
    np.testing.assert_allclose(rest[32], together[32], atol=1e-3)


def test_other_shapes(cascade):
    drawn = sample(cascade, ["red"], size=(4, 12), last=0)
    assert [pictures.shape for pictures in drawn.values()] == [(1, 4, 12, 3)]
    drawn = sample(cascade, ["red"], after=After(1, np.zeros((1, 6, 10, 3), np.float32)))
    assert [pictures.shape for pictures in drawn.values()] == [(1, 12, 20, 3)]


def test_a_prompt_without_text(cascade, together):
    """An empty prompt is the null text, whose guidance leads nowhere; it is drawn with a warning."""
    with pytest.warns(UserWarning, match="an empty prompt is sampled without text"):
        blank = sample(cascade, [""], seed=3, last=0)[8]
    with pytest.warns(UserWarning, match="an empty prompt is sampled without text"):
        sample(cascade, ["", " "], last=0)
    unguided = replace(SAMPLING, guidance=Guidance())
    with pytest.warns(UserWarning):
        np.testing.assert_allclose(sample(cascade, [""], seed=3, last=0, sampling=unguided)[8], blank, atol=1e-3)
    assert np.abs(blank - together[8][:1]).max() > 0.05


def test_negative_prompt(cascade, together):
    plain = sample(cascade, PROMPTS, seed=3, last=0, negative="  ")[8]
    np.testing.assert_allclose(plain, together[8], atol=1e-3)
    away = sample(cascade, PROMPTS, seed=3, last=0, negative="blue")[8]
    assert np.abs(away[0] - plain[0]).max() > 0.02
    # Led away from itself, a prompt is drawn as without guidance.
    unguided = replace(SAMPLING, guidance=Guidance())
    alone = sample(cascade, PROMPTS, seed=3, last=0, sampling=unguided)[8]
    np.testing.assert_allclose(away[1], alone[1], atol=1e-3)
    assert np.abs(away[0] - alone[0]).max() > 0.02


def test_stages_that_read_no_text(encoder):
    """Another text encoder than the one of training does not matter to them, nor does none."""
    silent = model(16, True, reads_text=False)
    assert silent.reads is None
    pictures = sample(Pipeline(encoder, model(8), (silent,)), ["red"], seed=3)
    wanted = enlarge(jnp.asarray(pictures[8]), (16, 16))
    assert np.corrcoef(pictures[16].ravel(), np.ravel(wanted))[0, 1] > 0.7
    with pytest.raises(ValueError, match="the 8 stage reads text, and there is no text encoder"):
        Pipeline(None, model(8), (silent,))


def test_progress(cascade):
    calls = []
    sample(cascade, PROMPTS, lambda *call: calls.append(call), seed=3, batch=8)
    for number in range(3):
        done = [call[1] for call in calls if call[0] == number]
        (total,) = {call[2] for call in calls if call[0] == number}
        assert done == sorted(set(done)) and done[-1] == total
    assert {call[0]: call[2] for call in calls} == {0: 10, 1: 12, 2: 10}  # samples, of filled batches, × 2 steps


@pytest.mark.parametrize("batch", [1, 2])
def test_progress_of_several_batches(cascade, batch):
    calls = []
    sample(cascade, PROMPTS, lambda *call: calls.append(call), seed=3, batch=batch)
    for number in range(3):
        done = [call[1] for call in calls if call[0] == number]
        assert done == sorted(set(done)) and done[-1] == {call[2] for call in calls if call[0] == number}.pop()


def test_batches_come_one_by_one(cascade, together):
    """The caller has the images of a batch before the next one begins."""
    calls = []
    batches = cascade.batches(PROMPTS, SampleOptions(seed=3, batch=2), lambda *call: calls.append(call))
    batch = next(batches)
    assert batch.first == 0 and [len(product) for product in batch.products] == [2, 2, 2]
    assert [call for call in calls if call[0] == 0] == [(0, 4, 12)]  # of three batches of two, two steps each
    np.testing.assert_allclose(batch.products[2], together[32][:2], atol=1e-3)
    assert [batch.first for batch in batches] == [2, 4]


def test_stages_must_fit(encoder):
    with pytest.raises(ValueError, match="the 32 stage enlarges 16 pixels, but the stage before it produces 8"):
        Pipeline(encoder, model(8), (model(32, True),))
    with pytest.raises(ValueError, match="the 16 stage samples from text, but after the 8 stage only"):
        Pipeline(encoder, model(8), (model(16),))
    grey = replace(model(8), model=replace(model(8).model, product=ImageSpec(channels=1)))
    with pytest.raises(ValueError, match="16 stage decodes images of 3 channels, the one before it produces"):
        Pipeline(encoder, grey, (model(16, True),))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"last": 3}, "no box 3: this pipeline has 3"),
        ({"after": After(3, np.zeros((1, 12, 12, 3), np.float32))}, "no box 3"),
        ({"prompts": []}, "nothing to sample: 0 prompts"),
        ({"per_prompt": 0}, "nothing to sample"),
        ({"batch": 0}, "batches of 0"),
        ({"prompts": "red"}, "a list of strings, not one string"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"size": (8, 9)}, "9 pixels is not a multiple of the network's stride 2"),
        (
            {"after": After(0, np.zeros((1, 8, 8, 3), np.float32)), "last": 0},
            "nothing to sample: starting after 8 pixels",
        ),
        ({"after": After(0, np.zeros((2, 8, 8, 3), np.float32))}, "`after` has 2 products, for 1 samples"),
        (
            {"after": After(0, np.zeros((1, 8, 8, 4), np.float32))},
            "1×8×8×4, which is not a batch of images of 3 channels",
        ),
        ({"sampling": replace(LARGER, tiles=Tiles(9, 4)), "last": 0}, "a tile of 9 pixels is not"),
        ({"sampling": replace(LARGER, tiles=Tiles(8, 3)), "last": 0}, "a tile overlap of 3 pixels"),
        ({"sampling": replace(LARGER, aug_level=1.0), "size": (8, 8), "last": 5}, "no box 5"),
    ],
)
def test_refused_before_anything_is_sampled(cascade, options, match):
    def never(*call):
        raise AssertionError("it was sampled")

    with pytest.raises(ValueError, match=match) as error:
        sample(cascade, progress=never, **{"prompts": ["red"]} | options)
    assert "\n" not in str(error.value)


def test_what_is_not_finite_is_no_picture(encoder):
    broken = replace(model(8).model.unet, output=lambda x, *rest: x / 0.0)
    lost = replace(model(8), model=replace(model(8).model, unet=broken))
    with pytest.raises(ValueError, match="the 8 stage produced values that are not finite"):
        sample(Pipeline(encoder, lost), ["red"])
