"""A prior is a diffusion model of embeddings: it learns a conditional distribution, by the common loss and sampler."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.products import EmbeddingSpec, check_product
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.losses import PowerSNR
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM
from jaxdiff.diffusion.schedules import CosineSchedule
from jaxdiff.diffusion.thresholding import NoThreshold
from jaxdiff.models.conditioners import TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import Muon, OptimizerConfig
from jaxdiff.training.state import init_state, placements_of
from jaxdiff.training.step import make_step

KEY = jax.random.key(0)
MODEL = DiffusionModel(
    PriorConfig(embedding=2, text_width=2, text_length=1, width=32, layers=2, heads=2),
    side=1,
    product=EmbeddingSpec(2),
    conditioners=(TextConditioner(2, 1, pooled=2),),
    schedule=CosineSchedule(),
    prediction=Prediction.X0,
    # Samples have the variance of the distribution only if x₀ is precise at low noise too.
    weighting=PowerSNR(1.0, -4.0, 5.0),
)
TURN = np.asarray([[0.6, -0.8], [0.8, 0.6]], np.float32)
SPREAD = 0.5


def captions_of(seed, count):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 2)), jnp.float32)


def batch(seed, count=256):
    """Image embeddings are normal around the turned text embedding."""
    caption = captions_of(seed, count)
    rest = SPREAD * np.random.default_rng(seed + 10_000).normal(size=(count, 2))
    image = jnp.asarray(caption @ TURN.T + rest, jnp.float32)[:, None, None]
    text = {"text": caption[:, None], "text_mask": jnp.ones((count, 1), bool), "text_pooled": caption}
    return text | {"image": image}


@pytest.fixture(scope="module")
def trained():
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), OptimizerConfig(Muon(), 3e-3, warmup=20, total=600)
    state = init_state(MODEL, optimizer, KEY, mesh)
    step = make_step(MODEL, optimizer, placements_of(state), ema_decay=0.98)
    for number in range(600):
        state, _ = step(state, batch(number), KEY, ())
    sampling = SamplingConfig(DDIM(), 64, guidance=Guidance(), thresholding=NoThreshold())
    return TrainedModel(MODEL, jax.device_get(state.ema), sampling)


def drawn(trained, caption, count):
    many = jnp.broadcast_to(jnp.asarray(caption, jnp.float32), (count, 2))
    text = TextEmbedding(many[:, None], jnp.ones((count, 1), bool), many)
    found = trained.generate(SampleRequest(noise.sample_keys(KEY, jnp.arange(count)), (1, 1), text))
    check_product(trained.produces, found)
    return np.asarray(found)[:, 0, 0]


@pytest.mark.parametrize("caption", [(1.0, 0.5), (-0.7, 1.2)])
def test_the_conditional_distribution(trained, caption):
    """Mean and covariance of samples against the analytic ones."""
    found = drawn(trained, caption, 2000)
    np.testing.assert_allclose(found.mean(0), TURN @ np.asarray(caption), atol=0.12)
    np.testing.assert_allclose(np.cov(found.T), SPREAD**2 * np.eye(2), atol=0.09)


def test_without_text(trained):
    """Dropped captions train the marginal distribution: its covariance is the identity plus the spread."""
    found = trained.generate(SampleRequest(noise.sample_keys(KEY, jnp.arange(2000)), (1, 1)))[:, 0, 0]
    np.testing.assert_allclose(np.asarray(found).mean(0), 0.0, atol=0.2)
    np.testing.assert_allclose(np.cov(found.T), (1 + SPREAD**2) * np.eye(2), atol=0.35)


def test_products():
    assert MODEL.product == EmbeddingSpec(2) and str(MODEL.product) == "embeddings of width 2"
    for wrong in ((3, 2), (3, 1, 1, 3), (3, 2, 1, 2)):
        with pytest.raises(ValueError, match="not a batch of embeddings of width 2"):
            check_product(MODEL.product, np.zeros(wrong))


def test_refused():
    with pytest.raises(ValueError, match="if and only if it reads text"):
        replace(MODEL, conditioners=())
