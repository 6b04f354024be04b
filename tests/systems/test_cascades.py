"""The cascade: stages that fit together, pictures that depend on nothing but their own number, and clear refusals.

The networks are formulas in which everything that a stage is given leaves its trace.
"""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import LENGTH, TEXT, Formula

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.thresholding import NoThreshold
from jaxdiff.models.diffusion import DiffusionModel, enlarge
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.systems.pipeline import Cascade, TrainedModel, sample, stages
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


def model(resolution, low_resolution=None, reads_text=True):
    texts = {"pool_text": reads_text, "self_attention": (reads_text,)}
    unet = Formula(low_res=low_resolution is not None, **texts)
    unet = replace(unet, output=larger_formula if low_resolution else base_formula)
    stage = DiffusionModel(unet, resolution, low_resolution, prediction=Prediction.X0, text_length=LENGTH)
    return TrainedModel(stage, {}, LARGER if low_resolution else SAMPLING)


@pytest.fixture(scope="module")
def encoder():
    config = T5Config(vocab=384, d_model=TEXT["text_width"], d_kv=4, d_ff=8, layers=1, decoder_layers=0, heads=2)
    ids = jnp.zeros((1, LENGTH), int)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids == 0)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return T5TextEncoder(config, params, byte_tokenizer(), LENGTH)


@pytest.fixture(scope="module")
def cascade(encoder):
    return Cascade(encoder, model(8), (model(16, 8), model(32, 16)))


@pytest.fixture(scope="module")
def together(cascade):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # long prompts are cut
        return sample(cascade, PROMPTS, seed=3)


pytestmark = pytest.mark.filterwarnings("ignore:.*longer than")


def test_every_stage_is_drawn(cascade, together):
    assert list(together) == [8, 16, 32] == list(cascade.resolutions)
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
    close(sample(cascade, PROMPTS, seed=3, batch=2, up_to=16), slice(None))  # the last batch is filled up
    close(sample(cascade, PROMPTS[:2], seed=3, up_to=16), slice(0, 2))
    close(dict(stages(cascade, PROMPTS[3:], seed=3, first=3, up_to=16)), slice(3, 5))
    other = sample(cascade, PROMPTS, seed=4, up_to=8)[8]
    assert np.abs(other - together[8]).max((1, 2, 3)).min() > 0.05


def test_pictures_of_one_prompt_differ_in_noise_alone(cascade, together):
    pictures = sample(cascade, PROMPTS[:2], seed=3, per_prompt=2, up_to=8)[8]
    assert pictures.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(pictures[0], together[8][0], atol=1e-3)
    assert np.abs(pictures[0] - pictures[1]).max() > 0.05
    middles = pictures.mean((1, 2, 3))
    assert abs(middles[0] - middles[1]) < abs(middles[0] - middles[2])


def test_up_to_and_after(cascade, together):
    parts = dict(stages(cascade, PROMPTS, seed=3, up_to=16))
    assert list(parts) == [8, 16]
    rest = dict(stages(cascade, PROMPTS, seed=3, after=(16, parts[16])))
    assert list(rest) == [32]
    np.testing.assert_allclose(rest[32], together[32], atol=1e-3)


def test_other_shapes(cascade):
    drawn = sample(cascade, ["red"], size=(4, 12), up_to=8)
    assert [pictures.shape for pictures in drawn.values()] == [(1, 4, 12, 3)]
    start = np.zeros((1, 6, 10, 3), np.float32)
    drawn = dict(stages(cascade, ["red"], after=(16, start)))
    assert [pictures.shape for pictures in drawn.values()] == [(1, 12, 20, 3)]


def test_a_prompt_without_text(cascade, together):
    """An empty prompt is the null text, whose guidance leads nowhere; it is drawn with a warning."""
    with pytest.warns(UserWarning, match="an empty prompt is drawn without text"):
        blank = sample(cascade, [""], seed=3, up_to=8)[8]
    with pytest.warns(UserWarning, match="an empty prompt is drawn without text"):
        sample(cascade, ["", " "], up_to=8)
    unguided = (replace(SAMPLING, guidance=Guidance()),) * 3
    with pytest.warns(UserWarning):
        np.testing.assert_allclose(sample(cascade, [""], seed=3, up_to=8, samplings=unguided)[8], blank, atol=1e-3)
    assert np.abs(blank - together[8][:1]).max() > 0.05


def test_negative_prompt(cascade, together):
    plain = sample(cascade, PROMPTS, seed=3, up_to=8, negative="  ")[8]
    np.testing.assert_allclose(plain, together[8], atol=1e-3)
    away = sample(cascade, PROMPTS, seed=3, up_to=8, negative="blue")[8]
    assert np.abs(away[0] - plain[0]).max() > 0.02
    # Led away from itself, a prompt is drawn as without guidance.
    unguided = (replace(SAMPLING, guidance=Guidance()),) * 3
    alone = sample(cascade, PROMPTS, seed=3, up_to=8, samplings=unguided)[8]
    np.testing.assert_allclose(away[1], alone[1], atol=1e-3)
    assert np.abs(away[0] - alone[0]).max() > 0.02


def test_stages_that_read_no_text(encoder):
    """Their text is whatever: another length than the encoder's does not matter."""
    silent = model(16, 8, reads_text=False)
    silent = replace(silent, stage=replace(silent.stage, text_length=1))
    assert not silent.stage.unet.reads_text
    pictures = sample(Cascade(encoder, model(8), (silent,)), ["red"], seed=3)
    wanted = enlarge(jnp.asarray(pictures[8]), (16, 16))
    assert np.corrcoef(pictures[16].ravel(), np.ravel(wanted))[0, 1] > 0.7


def test_progress(cascade):
    calls = []
    sample(cascade, PROMPTS, seed=3, batch=8, progress=lambda *call: calls.append(call))
    for side in (8, 16, 32):
        done = [call[1] for call in calls if call[0] == side]
        (total,) = {call[2] for call in calls if call[0] == side}
        assert done == sorted(set(done)) and done[-1] == total
    assert {call[0]: call[2] for call in calls} == {8: 10, 16: 12, 32: 10}  # pictures, of filled batches, × 2 steps


def test_stages_are_drawn_one_by_one(cascade, together):
    """The caller has a stage's pictures before the next one begins."""
    calls = []
    drawing = stages(cascade, PROMPTS, seed=3, progress=lambda *call: calls.append(call))
    assert next(drawing)[0] == 8
    assert {call[0] for call in calls} == {8}


def test_stages_must_fit(encoder):
    with pytest.raises(ValueError, match="the 32 stage enlarges 16 pixels, but the stage before it draws 8"):
        Cascade(encoder, model(8), (model(32, 16),))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"up_to": 64}, "no stage draws 64 pixels; this cascade draws 8, 16, 32"),
        ({"after": (12, np.zeros((1, 12, 12, 3), np.float32))}, "no stage draws 12 pixels"),
        ({"prompts": []}, "nothing to draw: 0 prompts"),
        ({"per_prompt": 0}, "nothing to draw"),
        ({"batch": 0}, "batches of 0"),
        ({"prompts": "red"}, "a list of strings, not one string"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"samplings": (SAMPLING,)}, "1 samplings for 3 stages"),
        ({"size": (8, 9)}, "9 pixels is not a multiple of the network's stride 2"),
        ({"after": (8, np.zeros((1, 8, 8, 3), np.float32)), "up_to": 8}, "nothing to draw"),
        ({"after": (8, np.zeros((2, 8, 8, 3), np.float32))}, "2 pictures to go on from, for 1 to draw"),
        (
            {"samplings": (SAMPLING, SAMPLING, replace(SAMPLING, tiles=Tiles(9, 4)))},
            "a tile of 9 pixels is not",
        ),
        ({"samplings": (SAMPLING, SAMPLING, replace(SAMPLING, tiles=Tiles(8, 3)))}, "a tile overlap of 3 pixels"),
    ],
)
def test_refused_before_anything_is_drawn(cascade, options, match):
    def never(*call):
        raise AssertionError("it was drawn")

    options = {"prompts": ["red"], "progress": never} | options
    with pytest.raises(ValueError, match=match) as error:
        stages(cascade, options.pop("prompts"), **options)
    assert "\n" not in str(error.value)


def test_what_is_not_finite_is_no_picture(encoder):
    broken = replace(model(8).stage.unet, output=lambda x, *rest: x / 0.0)
    lost = replace(model(8), stage=replace(model(8).stage, unet=broken))
    with pytest.raises(ValueError, match="the 8 stage drew values that are not finite"):
        sample(Cascade(encoder, lost), ["red"])
