"""Captions to embeddings: zeros where nothing is said, and the same whatever the batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text import t5
from jaxdiff.text.encoder import BLOCK
from jaxdiff.text.tokenizer import byte_tokenizer

CONFIG = T5Config(vocab=384, d_model=16, d_kv=8, d_ff=24, layers=1, decoder_layers=0, heads=2)
LENGTH = 12


@pytest.fixture(scope="module")
def encoder():
    ids = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(T5Encoder(CONFIG).init)(jax.random.key(0), ids, ids == 0)["params"]
    return t5.T5TextEncoder(CONFIG, params, byte_tokenizer(), LENGTH)


def test_embeds_what_the_network_says(encoder):
    got = encoder.encode(["red", "a star"])
    assert got.tokens.shape == (2, LENGTH, CONFIG.d_model) and got.tokens.dtype == jnp.float32
    np.testing.assert_array_equal(got.mask.sum(1), [4, 7])
    ids = jnp.array([[byte + 3 for byte in b"a star"] + [1]], jnp.int32)
    expected = jax.jit(T5Encoder(CONFIG).apply)({"params": encoder.params}, ids, ids > 0)
    np.testing.assert_allclose(got.tokens[1, :7], expected[0], atol=1e-5)
    assert (np.asarray(got.tokens)[~np.asarray(got.mask)] == 0).all()
    assert (np.abs(np.asarray(got.tokens)[np.asarray(got.mask)]).max(-1) > 0.1).all()


def test_a_blank_caption_is_the_null_text(encoder):
    got = encoder.encode(["", "red", "  \n"])
    for i in (0, 2):
        assert not got.mask[i].any() and not np.asarray(got.tokens[i]).any()
    assert got.mask[1].any()


def test_batches_change_nothing_and_reuse_the_program(encoder):
    captions = [f"star {i}" for i in range(BLOCK + 6)]
    together = encoder.encode(captions)
    assert together.tokens.shape[0] == len(captions)
    for i in (0, 37, BLOCK - 1, BLOCK, BLOCK + 5):
        np.testing.assert_allclose(encoder.encode(captions[i : i + 1]).tokens[0], together.tokens[i], atol=1e-5)
    encoder.encode(captions[:8])
    compiled = t5._states._cache_size()
    for count in (5, 6, 7, 8):
        encoder.encode(captions[:count])
    assert t5._states._cache_size() == compiled


def test_empty_list_and_bare_string(encoder):
    assert encoder.encode([]).tokens.shape == (0, LENGTH, CONFIG.d_model)
    with pytest.raises(ValueError, match="list of strings"):
        encoder.encode("a star")


def test_the_fingerprint_tells_encoders_apart():
    config = T5Config(vocab=384, d_model=8, d_kv=4, d_ff=8, layers=1, heads=2)
    encoder = t5.T5TextEncoder(config, {"shared": np.zeros((3, 2), np.float32)}, byte_tokenizer(), 16)
    other_tokenizer = byte_tokenizer()
    other_tokenizer.add_tokens("star")
    changed = [
        {"length": 32},
        {"config": replace(config, heads=4)},
        {"params": {"shared": np.ones((3, 2), np.float32)}},
        {"params": {"shared": jnp.zeros((3, 2), jnp.bfloat16)}},
        {"params": {"other": np.zeros((3, 2), np.float32)}},
        {"tokenizer": other_tokenizer},
        {"padding_is_read": True},
        {"prepare": str.lower},
    ]
    assert len({encoder.fingerprint, *(replace(encoder, **settings).fingerprint for settings in changed)}) == 9
    # Stored embeddings and stage.json name encoders by it: it has to stay what it is.
    assert encoder.fingerprint == "0de699146a136aff"
    assert encoder.fingerprint == replace(encoder, params={"shared": jnp.zeros((3, 2))}).fingerprint
    without_decoder = replace(config, decoder_layers=0, remat=True)  # neither changes an embedding
    assert encoder.fingerprint == replace(encoder, config=without_decoder).fingerprint


def test_over_long_prompt_warns(encoder):
    with pytest.warns(UserWarning, match="lost: 'circle'"):
        assert encoder.encode(["a red circle"]).mask.all()
