"""unCLIP's boxes: the ranked prior against a direct computation, the decoder's condition, and a pipeline of both."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import small_clip

from jaxdiff.core.products import EmbeddingSpec, check_product
from jaxdiff.diffusion import noise
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.thresholding import NoThreshold, StaticThreshold
from jaxdiff.models.conditioners import TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.embedding_boxes import EmbeddingDecoder, RankedPrior
from jaxdiff.models.image_embeddings import CLIPImageEncoder
from jaxdiff.models.representations import EmbeddingConditioner, Form
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.systems.pipeline import After, SampleOptions
from jaxdiff.systems.unclip import unclip
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.precomputed import PrecomputedTextEncoder

E, LENGTH, WIDTH, NORM = 40, small.LENGTH, small.WIDTH, math.sqrt(40)
PRIOR = DiffusionModel(
    PriorConfig(embedding=E, text_width=WIDTH, text_length=LENGTH, width=16, layers=1, heads=2),
    side=1,
    product=EmbeddingSpec(E, NORM),
    conditioners=(TextConditioner(WIDTH, LENGTH, pooled=E, pooled_norm=NORM),),
    prediction=Prediction.X0,
)
DECODER = DiffusionModel(
    unet=replace(small.UNET, conditioning=replace(small.UNET.conditioning, vector_tokens=4)),
    side=8,
    conditioners=(TextConditioner(WIDTH, LENGTH, dropout=0.5), EmbeddingConditioner(E, dropout=0.1, norm=NORM)),
)
KEYS = noise.sample_keys(jax.random.key(0), jnp.arange(3))
RNG = np.random.default_rng(0)
TEXT = TextEmbedding(
    jnp.asarray(RNG.normal(size=(3, LENGTH, WIDTH)), jnp.float32),
    jnp.arange(LENGTH) < jnp.asarray([4, 2, 3])[:, None],
    jnp.asarray(RNG.normal(size=(3, E)), jnp.float32),
)
IMAGE = CLIPImageEncoder(replace(small_clip.OPENAI, text=None), {"image": small_clip.init(small_clip.OPENAI)["image"]})
prior = RankedPrior(PRIOR, small.random_params(PRIOR), SamplingConfig(DDPM(), 4, thresholding=NoThreshold()))
decoder = EmbeddingDecoder(
    DECODER, small.random_params(DECODER), SamplingConfig(DDIM(), 2, guidance=Guidance(2.0)), image_encoder=IMAGE
)


def request(rows=slice(None), **settings):
    return SampleRequest(KEYS[rows], (1, 1), jax.tree.map(lambda a: a[rows], TEXT), **settings)


def test_the_better_of_two():
    """Each caption gets the candidate with the larger dot product with its embedding, at the data's length."""
    plain, rows = TrainedModel(prior.model, prior.params, prior.sampling), np.arange(9) % 3
    asked = replace(request(rows), keys=noise.sample_keys(jax.random.key(5), jnp.arange(9)))
    candidates = [plain.generate(replace(asked, keys=noise.fold(asked.keys, n)))[:, 0, 0] for n in range(2)]
    scores = np.stack([(z * TEXT.pooled[rows]).sum(-1) for z in candidates])
    assert 0 < scores.argmax(0).sum() < 9, "both candidates win somewhere, or this tests nothing"
    found = prior.generate(asked)
    check_product(EmbeddingSpec(E, NORM), found)
    for i, best in enumerate(scores.argmax(0)):
        wanted = candidates[best][i]
        np.testing.assert_allclose(found[i, 0, 0], wanted * NORM / jnp.linalg.norm(wanted), rtol=2e-4, atol=1e-5)


def test_a_caption_does_not_depend_on_the_batch():
    np.testing.assert_allclose(prior.generate(request(slice(1, 2)))[0], prior.generate(request())[1], atol=1e-4)


def test_more_candidates_are_nearer():
    score = lambda n: float((replace(prior, candidates=n).generate(request())[:, 0, 0] * TEXT.pooled).sum())  # noqa: E731
    assert score(8) > score(1)


def test_progress_counts_all_candidates():
    seen = []
    prior.generate(request(progress=seen.append))
    assert seen == sorted(seen) and seen[-1] == prior.steps == 8


def images_of(embedding, text=TEXT, keys=KEYS):
    given = None if embedding is None else jnp.broadcast_to(embedding, (3, E))[:, None, None]
    return decoder.decode(given, SampleRequest(keys, (8, 8), text))


def test_the_embedding_and_the_caption_condition_the_decoder():
    z = jnp.asarray(RNG.normal(size=E), jnp.float32)
    first = images_of(z)
    assert first.shape == (3, 8, 8, 3)
    assert np.abs(images_of(-z) - first).max() > 1e-2 < np.abs(images_of(z, None) - first).max()
    with pytest.raises(ValueError, match="needs them"):
        images_of(None)


def test_both_places_of_the_embedding_count():
    """The added vector and the four tokens: without either, the network computes something else."""
    z = jnp.asarray(RNG.normal(size=E), jnp.float32)
    for layer in ("vector", "vector_tokens"):
        params = decoder.params | {layer: jax.tree.map(jnp.zeros_like, decoder.params[layer])}
        changed = replace(decoder, params=params).decode(
            jnp.broadcast_to(z, (3, E))[:, None, None], SampleRequest(KEYS, (8, 8), TEXT)
        )
        assert np.abs(changed - images_of(z)).max() > 1e-3, layer
    assert decoder.params["vector_tokens"]["kernel"].shape == (E, 4 * 8)


def test_each_condition_is_dropped_by_itself():
    """A tenth of the embeddings and half of the captions, independently."""
    count = 4000
    keys = noise.sample_keys(jax.random.key(1), jnp.arange(count))
    text, embedding = DECODER.conditioners
    batch = {
        "text": jnp.ones((count, LENGTH, WIDTH)),
        "text_mask": jnp.ones((count, LENGTH), bool),
        "image_embedding": jnp.ones((count, E)),
    }
    caption = np.asarray(text.training(batch, keys, (8, 8)).token_mask.any(1))
    image = np.asarray((embedding.training(batch, keys, (8, 8)).vector != 0).any(1))
    assert abs(caption.mean() - 0.5) < 0.03 and abs(image.mean() - 0.9) < 0.02
    assert abs((caption & image).mean() - 0.45) < 0.03


def pipeline():
    captions = PrecomputedTextEncoder(("a", "b", ""), TEXT)
    return unclip(captions, prior, decoder)


def test_the_system():
    system = pipeline()
    assert system.sides == (1, 8) and system.image_boxes == {8: 1}
    embeddings, images = system.sample(["a", "b"], SampleOptions(seed=3, batch=2))
    assert embeddings.shape == (2, 1, 1, E) and images.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), NORM, rtol=1e-4)
    alone = system.sample(["b"], SampleOptions(seed=3, first=1))[1]
    np.testing.assert_allclose(alone[0], images[1], atol=2e-3)
    (again,) = system.sample(["a", "b"], SampleOptions(seed=3, after=After(0, embeddings)))
    np.testing.assert_allclose(again, images, atol=1e-4)


def test_a_batch_of_images_is_one_program():
    """The prior's products have one position, which must not make the decoder's batches small."""
    sizes = []

    class Watched(EmbeddingDecoder):
        def decode(self, product, request):
            sizes.append(len(request.keys))
            return super().decode(product, request)

    watched = Watched(*(getattr(decoder, name) for name in ("model", "params", "sampling")))
    unclip(pipeline().text_encoder, prior, watched).sample(["a"], SampleOptions(per_prompt=4, batch=4))
    assert sizes == [4]


def test_images_are_encoded_as_the_product():
    image = jnp.asarray(RNG.uniform(-1, 1, (2, 28, 28, 3)), jnp.float32)
    found = decoder.encode(image)
    check_product(decoder.consumes, found)
    raw = IMAGE.encode(image)
    np.testing.assert_allclose(found[:, 0, 0], NORM * raw / np.linalg.norm(raw, axis=-1, keepdims=True), rtol=1e-4)
    with pytest.raises(ValueError, match="without CLIP's image tower"):
        replace(decoder, image_encoder=None).encode(image)


def test_refused():
    other = replace(PRIOR, product=EmbeddingSpec(E), conditioners=(TextConditioner(WIDTH, LENGTH, pooled=E),))
    with pytest.raises(ValueError, match=r"decodes embeddings of width 40 and length 6.325, .* of width 40$"):
        unclip(pipeline().text_encoder, RankedPrior(other, {}, prior.sampling), decoder)
    with pytest.raises(ValueError, match="a prior produces embeddings, this model images"):
        RankedPrior(small.BASE, {}, prior.sampling)
    with pytest.raises(ValueError, match="candidates 0"):
        replace(prior, candidates=0)
    with pytest.raises(ValueError, match="conditioned on one embedding"):
        EmbeddingDecoder(small.BASE, {}, SamplingConfig(thresholding=StaticThreshold()))
    tokens = replace(DECODER, conditioners=(small.TEXT, EmbeddingConditioner(WIDTH, 2, Form.TOKENS)))
    with pytest.raises(ValueError, match="conditioned on one embedding"):
        EmbeddingDecoder(tokens, {}, prior.sampling)
    with pytest.raises(ValueError, match="reads embeddings of width 7, this CLIP gives 40"):
        narrow = replace(DECODER, conditioners=(small.TEXT, EmbeddingConditioner(7)))
        EmbeddingDecoder(narrow, {}, prior.sampling, image_encoder=IMAGE)
    with pytest.raises(ValueError, match="no grid of 2×2"):
        pipeline().sample(["a"], SampleOptions(size=(2, 2)))
