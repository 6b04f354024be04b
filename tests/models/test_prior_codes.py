"""Embeddings as codes: principal components in closed form, buckets, dot products; sampling of an embedding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.products import EmbeddingSpec, TokenSpec
from jaxdiff.diffusion import noise
from jaxdiff.models import prior_codes
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.prior_codes import TrainedPriorCodes
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.nets.autoregressive import AutoregressiveConfig
from jaxdiff.nets.sparse_attention import Pattern
from jaxdiff.text.encoder import TextEmbedding

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(200, 6)) * [3.0, 0.1, 2.0, 1.0, 0.5, 0.2] + 0.5, jnp.float32)
TEXTS = IMAGES + jnp.asarray(RNG.normal(size=(200, 6)), jnp.float32)
CODES = prior_codes.fit(IMAGES, TEXTS, 4, 16)


def test_principal_components_of_a_known_ellipsoid():
    """Points at ± the axes of a rotated ellipsoid: mean, axes and their order are known exactly."""
    axes, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    lengths = np.array([1.0, 4.0, 0.5, 3.0, 2.0])
    points = np.concatenate([axes * lengths[:, None], -axes * lengths[:, None]]) + 7.0
    mean, found = prior_codes.principal_components(jnp.asarray(points, jnp.float32), 3)
    np.testing.assert_allclose(mean, 7.0, atol=1e-5)
    wanted = axes[[1, 3, 4]]
    wanted *= np.sign([each[np.abs(each).argmax()] for each in wanted])[:, None]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_components_are_those_of_the_svd():
    x = np.asarray(IMAGES, np.float64)
    _, values, vectors = np.linalg.svd(x - x.mean(0))
    assert (np.diff(values) < 0).all()
    np.testing.assert_allclose(np.abs(np.asarray(CODES.components) @ vectors[:4].T), np.eye(4), atol=1e-4)


def test_an_embedding_returns_within_half_a_bucket():
    """Of each component; what the components leave out is lost."""
    codes = prior_codes.encode(CODES, IMAGES)
    assert codes.shape == (200, 4) and codes.dtype == jnp.int32
    assert codes.min() == 0 and codes.max() == 15  # the range is that of the data
    again = prior_codes.decode(CODES, codes)
    project = lambda x: (np.asarray(x) - CODES.mean) @ np.asarray(CODES.components).T  # noqa: E731
    assert (np.abs(project(again) - project(IMAGES)) <= 0.501 * (CODES.high - CODES.low) / 16).all()
    np.testing.assert_array_equal(prior_codes.encode(CODES, again), codes)
    fine = prior_codes.fit(IMAGES, TEXTS, 6, 2**16)
    np.testing.assert_allclose(prior_codes.decode(fine, prior_codes.encode(fine, IMAGES)), IMAGES, atol=1e-3)
    beyond = prior_codes.encode(CODES, 100.0 * IMAGES)
    assert beyond.min() >= 0 and beyond.max() <= 15


def test_dot_products():
    """Buckets rise with the dot product; those drawn are of the upper half of the pairs, in its proportions."""
    dots = np.asarray((IMAGES * TEXTS).sum(-1))
    buckets = np.asarray(prior_codes.encode_dot(CODES, IMAGES, TEXTS))
    order = np.argsort(dots)
    assert (np.diff(buckets[order]) >= 0).all() and buckets[order[-1]] == 15
    np.testing.assert_allclose(CODES.dots, np.bincount(buckets, minlength=16) / 200, atol=1e-6)
    drawn = np.asarray(prior_codes.high_dots(CODES, noise.sample_keys(KEY, jnp.arange(20_000))))
    wanted = np.bincount(buckets[order[100:]], minlength=16) / 100
    found = np.bincount(drawn, minlength=16) / 20_000
    assert (found[wanted == 0] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=0.015)


NETWORK = AutoregressiveConfig(
    vocab=11 + 16, text_length=3 + 4, codes=16, rows=1, columns=5, width=16, heads=2, patterns=(Pattern.FULL,) * 2,
    kernel=1,
)  # fmt: skip
MODEL = AutoregressiveModel(NETWORK, TokenSpec(16, 1), text_weight=0.0)
PARAMS = jax.tree.map(
    lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32), jax.eval_shape(lambda: MODEL.init(KEY)[0])
)
PRIOR = TrainedPriorCodes(
    TrainedAutoregressive(MODEL, PARAMS, TokenSampling(guidance=2.0)), CODES, EmbeddingSpec(6), 3, 9
)
IDS, MASK = jnp.asarray([[1, 2, 3], [4, 5, 0]]), jnp.asarray([[True] * 3, [True, True, False]])


def request(rows=slice(None), **change):
    text = TextEmbedding(jnp.zeros((2, 3, 9)), MASK, TEXTS[:2], IDS)
    keys = noise.sample_keys(KEY, jnp.arange(2))[rows]
    return replace(SampleRequest(keys, (1, 1), jax.tree.map(lambda a: a[rows], text)), **change)


def test_sampling():
    """Embeddings at centres of buckets, which depend on the caption and not on the batch."""
    assert PRIOR.produces == EmbeddingSpec(6) and PRIOR.reads == (3, 9) and PRIOR.side == 1
    found = PRIOR.generate(request())
    assert found.shape == (2, 1, 1, 6)
    np.testing.assert_allclose(PRIOR.generate(request(slice(1, 2)))[0], found[1], atol=1e-5)
    again = prior_codes.decode(CODES, prior_codes.encode(CODES, found[:, 0, 0]))
    np.testing.assert_allclose(again, found[:, 0, 0], atol=1e-4)
    other = TextEmbedding(jnp.zeros((2, 3, 9)), MASK, TEXTS[2:4], IDS)
    assert np.abs(PRIOR.generate(request(text=other)) - found).max() > 0.01  # the embedding of the caption is read
    assert np.isfinite(PRIOR.generate(request(text=None))).all()


def test_training_batch():
    """The sequence and its prefix by hand; the model's loss takes them."""
    batch = prior_codes.training_batch(CODES, IDS, MASK, IMAGES[:2], TEXTS[:2], 11)
    text, image = (np.asarray(prior_codes.encode(CODES, x)) for x in (TEXTS[:2], IMAGES[:2]))
    np.testing.assert_array_equal(batch["ids"], np.concatenate([IDS, 11 + text], 1))
    np.testing.assert_array_equal(batch["text_mask"], np.concatenate([MASK, np.ones((2, 4), bool)], 1))
    dots = np.asarray(prior_codes.encode_dot(CODES, IMAGES[:2], TEXTS[:2]))
    np.testing.assert_array_equal(batch["image"], np.concatenate([dots[:, None], image], 1)[:, None])
    spec = MODEL.batch_spec(2, 5)
    assert {name: each.shape for name, each in batch.items()} == {name: each.shape for name, each in spec.items()}
    loss, _ = jax.jit(MODEL.loss)(PARAMS, (), (), batch, KEY, jnp.int32(0))
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: prior_codes.fit(IMAGES, TEXTS, 7, 16), "7 components"),
        (lambda: prior_codes.fit(IMAGES, TEXTS, 4, 1), "in 1 buckets"),
        (lambda: replace(PRIOR, text_length=4), "these codes need"),
        (lambda: PRIOR.check((2, 1)), "the size 1×1, not 2×1"),
        (
            lambda: PRIOR.generate(request(text=TextEmbedding(jnp.zeros((2, 3, 9)), MASK, None, IDS))),
            "gives not both",
        ),
    ],
)
def test_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run()
