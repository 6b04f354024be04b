"""DALL·E 2's presets: their sizes against the paper's, and how they fit one another and the shipped CLIP."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.core.trees import flatten
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.degradation import GaussianBlur
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.models.autoregressive import AutoregressiveModel
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.embedding_boxes import EmbeddingDecoder, RankedPrior, embedding_of
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.nets.conditioning import Conditioning
from jaxdiff.systems import unclip, unclip_tiny
from jaxdiff.systems.pipeline import check_order
from jaxdiff.weights.imagen import SHIPPED
from jaxdiff.weights.unclip import load_clip

MILLIONS = {
    "PRIOR": (1150, 1250),
    "PRIOR_CODES": (950, 1000),
    "DECODER": (2200, 2350),
    "SR_256": (690, 740),
    "SR_1024": (270, 310),
}


def params_of(model, reads):
    if isinstance(model, AutoregressiveModel):  # reads token ids
        return jax.eval_shape(model.init, jax.random.key(0))[0]
    return jax.eval_shape(model.reading(*reads).init, jax.random.key(0))[0]


@pytest.mark.parametrize("name", MILLIONS)
def test_the_papers_sizes(name):
    """1 B, 1 B, 3.5 B with its text transformer of 1.2 B, 700 M and 300 M."""
    shapes = params_of(getattr(unclip, name), unclip.CLIP_H)
    least, most = MILLIONS[name]
    assert least < sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 < most


def boxes_of(prior, decoder, *others):
    sampling = unclip.SAMPLING_PRIOR
    return [
        RankedPrior(prior, {}, sampling),
        EmbeddingDecoder(decoder, {}, sampling),
        *(TrainedModel(model, {}, sampling) for model in others),
    ]


def test_presets_fit():
    check_order(boxes_of(unclip.PRIOR, unclip.DECODER, unclip.SR_256, unclip.SR_1024))
    check_order(
        boxes_of(unclip_tiny.PRIOR_TINY, unclip_tiny.DECODER_TINY, unclip_tiny.SR_256_TINY, unclip_tiny.SR_1024_TINY)
    )
    assert unclip.PRIOR.product == EmbeddingSpec(1024, 17.2) == embedding_of(unclip.DECODER).product
    assert (unclip.DECODER.text.dropout, embedding_of(unclip.DECODER).dropout) == (0.5, 0.1)
    assert unclip.DECODER.unet.learned_variance and unclip.SAMPLING_DECODER.sampler == DDPM(None)


def test_the_tiny_presets_are_for_the_shipped_clip():
    clip = load_clip(SHIPPED / "clip")
    prior, decoder = unclip_tiny.PRIOR_TINY, unclip_tiny.DECODER_TINY
    assert (clip.text.length, clip.text.width) == (prior.unet.text_length, prior.unet.text_width)
    assert clip.image.width == prior.product.width == prior.unet.embedding == embedding_of(decoder).width
    assert clip.image.encode(jnp.zeros((1, 64, 64, 3))).shape == (1, unclip_tiny.WIDTH)


def test_normalized_embeddings():
    spec = EmbeddingSpec(4, 2.0)
    given = np.asarray([[3.0, 0, 4, 0], [0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(spec.normalized(given), [[1.2, 0, 1.6, 0], [0, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(spec.normalized(jnp.asarray(given)), spec.normalized(given), rtol=1e-6)
    assert EmbeddingSpec(4).normalized(given) is given
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be above 0"):
            EmbeddingSpec(4, wrong)


def test_the_pooled_vector_has_its_length_in_training_and_sampling():
    text = TextConditioner(2, 1, dropout=0.0, pooled=3, pooled_norm=5.0)
    pooled = jnp.asarray([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    batch = {"text": jnp.ones((2, 1, 2)), "text_mask": jnp.ones((2, 1), bool), "text_pooled": pooled}
    keys = noise.sample_keys(jax.random.key(0), jnp.arange(2))
    found = text.training(batch, keys, (1, 1)).vector
    np.testing.assert_allclose(found, [[5 / 3, 10 / 3, 10 / 3], [0, 0, 0]], rtol=1e-6)
    assert not text.example((1, 1)).vector.any()
    with pytest.raises(ValueError, match="pooled_norm is for networks"):
        TextConditioner(2, 1, pooled_norm=5.0)


def test_the_degradation_is_of_training_alone():
    low_res = LowResConditioner(factor=2, max_level=0.0, degradation=GaussianBlur())
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3)), jnp.float32)
    keys = noise.sample_keys(jax.random.key(0), jnp.arange(2))
    trained = low_res.training({"low_res": image}, keys, (12, 12)).concat
    blurred = GaussianBlur().apply(image, keys)
    plain = replace(low_res, degradation=None)
    np.testing.assert_allclose(trained, plain.training({"low_res": blurred}, keys, (12, 12)).concat, atol=1e-6)
    assert np.abs(trained - plain.training({"low_res": image}, keys, (12, 12)).concat).max() > 0.05
    level = jnp.zeros(2)
    np.testing.assert_array_equal(
        low_res.seen(image, level, keys, (12, 12)).concat, plain.seen(image, level, keys, (12, 12)).concat
    )


def test_the_embeddings_tokens():
    """Four tokens behind the caption's, of their width, are parameters of the tiny decoder; they need the vector."""
    unet = unclip_tiny.DECODER_TINY.unet
    shapes = flatten(params_of(unclip_tiny.DECODER_TINY, (24, 128)))
    assert shapes["vector_tokens/kernel"].shape == (128, 4 * 128)
    plain = replace(unet, conditioning=replace(unet.conditioning, vector_tokens=0))
    without = flatten(params_of(replace(unclip_tiny.DECODER_TINY, unet=plain), (24, 128)))
    assert shapes.keys() - without.keys() == {"vector_tokens/kernel", "vector_tokens/bias"}
    x, tokens = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 24, 128))
    with pytest.raises(ValueError, match="needs tokens and a vector"):
        jax.eval_shape(unet.module().init, jax.random.key(0), x, jnp.zeros(1), Conditioning(tokens))
