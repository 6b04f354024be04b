"""Captions to embeddings: zeros where nothing is said, and the same whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text import t5
from jaxdiff.text.tokenizer import byte_tokenizer

CONFIG = T5Config(vocab=384, d_model=16, d_kv=8, d_ff=24, layers=1, decoder_layers=0, heads=2)
LENGTH = 12


@pytest.fixture(scope="module")
def encoder():
    ids = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(T5Encoder(CONFIG).init)(jax.random.key(0), ids, ids == 0)["params"]
    return t5.T5TextEncoder(CONFIG, params, byte_tokenizer(), LENGTH)


def test_embeds_what_the_network_says(encoder):
    got = t5.encode(encoder, ["red", "a star"])
    assert got.tokens.shape == (2, LENGTH, CONFIG.d_model) and got.tokens.dtype == jnp.float32
    np.testing.assert_array_equal(got.mask.sum(1), [4, 7])
    ids = jnp.array([[byte + 3 for byte in b"a star"] + [1]], jnp.int32)
    expected = jax.jit(T5Encoder(CONFIG).apply)({"params": encoder.params}, ids, ids > 0)
    np.testing.assert_allclose(got.tokens[1, :7], expected[0], atol=1e-5)
    assert (np.asarray(got.tokens)[~np.asarray(got.mask)] == 0).all()
    assert (np.abs(np.asarray(got.tokens)[np.asarray(got.mask)]).max(-1) > 0.1).all()


def test_a_blank_caption_is_the_null_text(encoder):
    got = t5.encode(encoder, ["", "red", "  \n"])
    null = t5.null_text(encoder, 1)
    for i in (0, 2):
        np.testing.assert_array_equal(got.tokens[i], null.tokens[0])
        np.testing.assert_array_equal(got.mask[i], null.mask[0])
    assert not null.mask.any() and not null.tokens.any()
    assert got.mask[1].any()


def test_batches_change_nothing_and_reuse_the_program(encoder):
    captions = [f"star {i}" for i in range(t5.BLOCK + 6)]
    together = t5.encode(encoder, captions)
    assert together.tokens.shape[0] == len(captions)
    for i in (0, 37, t5.BLOCK - 1, t5.BLOCK, t5.BLOCK + 5):
        np.testing.assert_allclose(t5.encode(encoder, captions[i : i + 1]).tokens[0], together.tokens[i], atol=1e-5)
    t5.encode(encoder, captions[:8])
    compiled = t5._embed._cache_size()
    for count in (5, 6, 7, 8):
        t5.encode(encoder, captions[:count])
    assert t5._embed._cache_size() == compiled


def test_empty_list_and_bare_string(encoder):
    assert t5.encode(encoder, []).tokens.shape == (0, LENGTH, CONFIG.d_model)
    with pytest.raises(ValueError, match="list of strings"):
        t5.encode(encoder, "a star")


def test_over_long_prompt_warns(encoder):
    with pytest.warns(UserWarning, match="lost: 'circle'"):
        assert t5.encode(encoder, ["a red circle"]).mask.all()
