"""The encoder–decoder as a generator of codes: sampling with its cache against sampling without one; its loss."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.products import TokenSpec
from jaxdiff.diffusion import noise
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.start import InitProduct
from jaxdiff.models.token_sampling import TokenSampling, drawn
from jaxdiff.nets.encoder_decoder import EncoderDecoderConfig
from jaxdiff.text.encoder import TextEmbedding

KEY = jax.random.key(0)
NETWORK = EncoderDecoderConfig(
    vocab=11, text_length=4, codes=7, entries=9, start=7, rows=3, columns=3, width=16, heads=2, encoder_layers=1,
    decoder_layers=2, feed_forward=8,
)  # fmt: skip
MODEL = AutoregressiveModel(NETWORK, TokenSpec(7, 8), text_weight=0.0, null=(0, 2))
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda leaf: jnp.asarray(0.4 * RNG.normal(size=leaf.shape), jnp.float32), jax.eval_shape(lambda: MODEL.init(KEY)[0])
)
IDS = jnp.asarray(RNG.integers(0, 11, (3, 4)))
MASK = jnp.asarray([[True, True, False, False], [True] * 4, [True, True, True, False]])
NULL = jnp.broadcast_to(jnp.asarray([0, 2, 5, 5]), (3, 4)), jnp.broadcast_to(jnp.arange(4) < 2, (3, 4))
APPLY = jax.jit(partial(NETWORK.module().apply, {"params": PARAMS}))


def request(text=True, **change):
    embedding = TextEmbedding(jnp.zeros((3, 4, 0)), MASK, None, IDS) if text else None
    return SampleRequest(noise.sample_keys(KEY, jnp.arange(3)), (3, 3), embedding, **change)


def uncached(sampling, known=None):
    """Codes one by one, each from the logits of a complete grid."""
    keys, codes = noise.sample_keys(KEY, jnp.arange(3)), jnp.zeros((3, 9), jnp.int32)
    for number in range(9):
        logits, other = (APPLY(*text, codes.reshape(-1, 3, 3)).codes[:, number] for text in ((IDS, MASK), NULL))
        code = drawn(other + sampling.guidance * (logits - other), noise.fold(keys, number), sampling)
        codes = codes.at[:, number].set(code if known is None or number >= known.shape[1] else known[:, number])
    return np.asarray(codes).reshape(-1, 3, 3)


@pytest.mark.parametrize("sampling", [TokenSampling(), TokenSampling(0.9, 4, 0.9, 16.0)])
def test_sampling(sampling):
    box = TrainedAutoregressive(MODEL, PARAMS, sampling)
    codes = box.generate(request())
    np.testing.assert_array_equal(codes, uncached(sampling))
    assert codes.dtype == jnp.int32 and len(np.unique(codes)) > 2 and box.reads == (4, 0)
    seen = []
    np.testing.assert_array_equal(box.generate(request(progress=seen.append)), codes)
    assert seen == [1, 2, 3]


def test_completion():
    given, mask = jnp.asarray(RNG.integers(0, 7, (3, 3, 3))), jnp.zeros((3, 3, 3, 1)).at[:, 1:].set(1.0)
    codes = TrainedAutoregressive(MODEL, PARAMS).generate(request(init=InitProduct(given, mask=mask)))
    np.testing.assert_array_equal(codes, uncached(TokenSampling(), given[:, 0]))


def test_without_text():
    """No text, and the unconditional branch, are the ids of `null`."""
    box = TrainedAutoregressive(MODEL, PARAMS)
    empty = TextEmbedding(jnp.zeros((3, 4, 0)), NULL[1], None, NULL[0])
    wanted = box.generate(replace(request(), text=empty))
    np.testing.assert_array_equal(box.generate(request(text=False)), wanted)
    np.testing.assert_array_equal(replace(box, sampling=TokenSampling(guidance=0.0)).generate(request()), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.999])
def test_the_loss_by_hand(dropout):
    """The codes' cross-entropy; a caption that is left out is the ids of `null`."""
    codes = jnp.asarray(RNG.integers(0, 7, (3, 3, 3)))
    batch = {"ids": IDS, "text_mask": MASK, "image": codes}
    model = replace(MODEL, dropout=dropout)
    loss, (metrics, _) = jax.jit(model.loss)(PARAMS, (), (), batch, KEY, jnp.int32(0))
    logits = APPLY(*(NULL if dropout else (IDS, MASK)), codes).codes
    each = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(codes).reshape(3, 9, 1), -1)
    assert float(loss) == pytest.approx(each.mean(), rel=1e-5)
    assert metrics.keys() == {"code_loss", "code_accuracy"}
    scores = jax.jit(model.held_out_losses)(PARAMS, (), (), batch, jnp.asarray([0, -1, 2]), KEY)
    assert scores["held_out_loss"][1] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_weight": 0.1}, "predicts no text"),
        ({"null": (11,)}, "null"),
        ({"null": (1,) * 5}, "up to 4 ids below 11"),
        ({"product": TokenSpec(8, 8)}, "a transformer of 7 codes"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MODEL, **change)
