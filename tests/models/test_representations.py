"""Conditioners of a class, of image embeddings and of a semantic map: dropout, null conditions, effect, errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import loss_of, random_params

from jaxdiff.core.products import LatentSpec
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.diffusion.thresholding import NoThreshold
from jaxdiff.models.conditioner import SampleInputs
from jaxdiff.models.conditioners import TextConditioner, without_dropout
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.representations import ClassConditioner, EmbeddingConditioner, Form, SemanticMapConditioner
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.nets.latent_unet import LatentUNetConfig
from jaxdiff.systems.pipeline import Pipeline, SampleOptions
from jaxdiff.weights.settings import TABLE

COUNT, SIZE, WIDTH = 400, (2, 4), 6
KEYS = noise.sample_keys(jax.random.key(3), jnp.arange(COUNT))
RNG = np.random.default_rng(0)
CASES = {
    "class": (ClassConditioner(5, dropout=0.25), RNG.integers(0, 5, COUNT)),
    "vector": (EmbeddingConditioner(WIDTH, dropout=0.25), RNG.normal(size=(COUNT, WIDTH))),
    "tokens": (EmbeddingConditioner(WIDTH, 3, Form.TOKENS, dropout=0.25), RNG.normal(size=(COUNT, 3, WIDTH))),
    "map": (SemanticMapConditioner(4, stride=4, dropout=0.25), RNG.integers(0, 4, (COUNT, 8, 16))),
    "detailed map": (SemanticMapConditioner(4, 4, 2, dropout=0.25), RNG.integers(0, 4, (COUNT, 8, 16))),
}


def rows(conditioning):
    """All fields of a conditioning, one row for each example."""
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(conditioning)], axis=1)


@pytest.mark.parametrize("name", CASES)
def test_dropped_examples_have_the_null_condition(name):
    """A quarter of them; the others are seen as in sampling. Without the condition, both branches have the null one."""
    conditioner, values = CASES[name]
    batch = {conditioner.entry: values}
    trained = rows(conditioner.training(batch, KEYS, SIZE))
    one, null = map(rows, conditioner.sampling(SampleInputs(given=jax.tree.map(jnp.asarray, batch)), KEYS, SIZE))
    dropped = (trained == null).all(1)
    assert 60 < dropped.sum() < 140
    np.testing.assert_array_equal(trained[~dropped], one[~dropped])
    assert not (one == null).all(1).any()
    for branch in conditioner.sampling(SampleInputs(), KEYS, SIZE):
        np.testing.assert_array_equal(rows(branch), null)
    np.testing.assert_array_equal(rows(without_dropout(conditioner).training(batch, KEYS, SIZE)), one)
    (spec,) = conditioner.batch_spec(2, 2).values()
    assert spec.dtype == (jnp.float32 if "embedding" in conditioner.entry else jnp.int32)
    shapes = jax.tree.map(lambda leaf: leaf.shape[1:], conditioner.training(batch, KEYS, SIZE))
    assert jax.tree.map(lambda leaf: leaf.shape[1:], conditioner.example(SIZE)) == shapes
    with pytest.raises(ValueError, match=f"a batch of this model needs {conditioner.entry}"):
        conditioner.training({}, KEYS, SIZE)


def test_a_class_selects_an_entry_of_a_table():
    given = ClassConditioner(3, dropout=0.0).training({"label": np.asarray([2, 0])}, KEYS[:2], SIZE)
    np.testing.assert_array_equal(given.vector, [[0, 0, 1, 0], [1, 0, 0, 0]])


def test_a_map_is_seen_in_shares():
    """By latent, and in the order of its pixels; the last channel says that there is a map."""
    values = np.arange(2 * 4).reshape(1, 2, 4) % 3  # [[0 1 2 0] [1 2 0 1]]
    keys, size = KEYS[:1], (1, 2)
    coarse = SemanticMapConditioner(3, stride=2, dropout=0.0).training({"semantic_map": values}, keys, size)
    np.testing.assert_allclose(coarse.concat[0, 0], [[0.25, 0.5, 0.25, 1], [0.5, 0.25, 0.25, 1]])
    fine = SemanticMapConditioner(3, stride=2, detail=2, dropout=0.0).training({"semantic_map": values}, keys, size)
    pixels = np.asarray(fine.concat)[0, 0, :, :-1].reshape(2, 2, 2, 3).argmax(-1)
    np.testing.assert_array_equal(pixels, [[[0, 1], [1, 2]], [[2, 0], [0, 1]]])


def model_of(*conditioners, tokens=False):
    layers = (1,) if tokens else (0,)
    unet = LatentUNetConfig(8, (1,), (1,), layers, int(tokens), (2,), (False,), norm_groups=4)
    return DiffusionModel(unet=unet, side=4, product=LatentSpec(3, 4), conditioners=conditioners)


def sampled(model, params, given, guidance=1.0, count=2):
    sampling = SamplingConfig(DDIM(), 2, guidance=Guidance(guidance), thresholding=NoThreshold())
    keys = noise.sample_keys(jax.random.key(0), jnp.zeros(count, int))
    request = SampleRequest(keys, (4, 4), given=given)
    return np.asarray(TrainedModel(model, params, sampling).generate(request))


@pytest.mark.parametrize("name", CASES)
def test_effect(name):
    """Samples from equal noise differ only by their conditions; guidance pushes them away from those without one."""
    conditioner, values = CASES[name]
    model = model_of(conditioner, tokens=name == "tokens")
    values = RNG.integers(0, 4, (COUNT, 16, 16)) if "map" in name else values
    one, other = values[0], next(value for value in values[1:] if np.any(value != values[0]))
    params = random_params(model)
    samples = sampled(model, params, {conditioner.entry: np.stack([one, other])})
    largest = np.abs(samples).max()
    assert np.abs(samples[0] - samples[1]).max() > 1e-3 * largest
    np.testing.assert_allclose(
        sampled(model, params, {conditioner.entry: np.stack([one, one])})[1], samples[0], 1e-3, 1e-5 * largest
    )
    without, guided = (
        sampled(model, params, {}),
        sampled(model, params, {conditioner.entry: np.stack([one, other])}, 3.0),
    )
    np.testing.assert_allclose(without[0], without[1], 1e-3, 1e-5 * largest)
    assert np.abs(guided - samples).max() > 1e-3 * largest
    loss, _ = loss_of(
        model, params, {"image": jnp.asarray(samples), conditioner.entry: np.stack([one, other])}, jax.random.key(0)
    )
    assert np.isfinite(loss)


def test_several_conditions_of_a_pipeline():
    """One row for each sample of the call; rows are independent of the batches. Text and embedding share the tokens."""
    label, embedding = ClassConditioner(5), EmbeddingConditioner(WIDTH, 2, Form.TOKENS)
    model = model_of(TextConditioner(WIDTH, 3), label, embedding, tokens=True)
    trained = TrainedModel(model, random_params(model), SamplingConfig(DDIM(), 2, thresholding=NoThreshold()))
    pipeline = Pipeline(None, replace(trained, model=replace(model, conditioners=(label, embedding))))
    given = {"label": np.asarray([0, 1, 2]), "image_embedding": RNG.normal(size=(3, 2, WIDTH)).astype("f4")}
    (whole,) = pipeline.sample(["a", "b", "c"], SampleOptions(given=given))
    (parts,) = pipeline.sample(["a", "b", "c"], SampleOptions(given=given, batch=2))
    np.testing.assert_allclose(whole, parts, rtol=1e-3, atol=1e-5 * np.abs(whole).max())
    for wrong, message in (
        ({"caption": np.zeros(3)}, "caption is given, but the generator reads label, image_embedding"),
        ({"label": np.zeros(2, int)}, "label is given for 2 samples, not 3"),
        ({"label": np.zeros(3)}, "label is float.*: classes are whole numbers"),
        ({"label": np.asarray([0, 1, 5])}, "label has the class 5: there are 5, from 0"),
        ({"image_embedding": np.zeros((3, 2, 4))}, "image_embedding has the shape 3×2×4, not 3×2×6"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.sample(["a", "b", "c"], SampleOptions(given=wrong))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassConditioner(0), "0 classes: at least 1"),
        (lambda: ClassConditioner(3, dropout=1.5), "dropout 1.5: must be a fraction of the classes"),
        (lambda: EmbeddingConditioner(4, 2), "2 embeddings as a vector: only one can be added"),
        (lambda: EmbeddingConditioner(0), "1 embeddings of width 0"),
        (lambda: SemanticMapConditioner(3, 8, 3), "detail 3: must divide the stride 8"),
        (lambda: SemanticMapConditioner(0), "0 classes"),
        (lambda: model_of(EmbeddingConditioner(6, 2, Form.TOKENS)), "if and only if it reads text"),
        (lambda: model_of(ClassConditioner(3), tokens=True), "if and only if it reads text"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_round_trip():
    for conditioner, _ in CASES.values():
        assert TABLE.from_json(TABLE.to_json(conditioner), "") == conditioner
