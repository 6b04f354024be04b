"""What all text encoders promise, and each kind against an independent computation: layers of CLIP against PyTorch's,
combinations by hand, embeddings that were computed before against their encoder."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_clip import CONFIGS, OPEN, OPENAI, fitted, init, tokenizer

from jaxdiff.nets.t5 import T5Config, T5Encoder
from jaxdiff.text.bulk import BulkEncoder
from jaxdiff.text.clip import CLIPTextEncoder, Pooling
from jaxdiff.text.combined import Axis, CombinedTextEncoder
from jaxdiff.text.encoder import TextEmbedding, TextEncoder
from jaxdiff.text.precomputed import PrecomputedTextEncoder, embed_captions
from jaxdiff.text.t5 import T5TextEncoder
from jaxdiff.text.tokenizer import byte_tokenizer
from jaxdiff.weights import clip

CAPTIONS = ["a red star", "", "on blue"]
T5 = T5Config(vocab=384, d_model=56, d_kv=8, d_ff=24, layers=1, decoder_layers=0, heads=2)
NARROW = replace(OPEN, text=replace(OPEN.text, width=32, heads=2))


def t5_encoder(scale=1.0):
    ids, rng = jnp.zeros((1, 2), jnp.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(T5Encoder(T5).init, jax.random.key(0), ids, ids == 0)["params"]
    params = jax.tree.map(lambda leaf: scale * rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return T5TextEncoder(T5, params, byte_tokenizer(), 14)


def clip_encoder(scale=1.0, config=OPENAI, **settings):
    config, words = fitted(config, 24)
    return CLIPTextEncoder(config, jax.tree.map(lambda leaf: scale * leaf, init(config)), words, **settings)


def precomputed(scale=1.0):
    return embed_captions(clip_encoder(scale, padding_is_read=False), CAPTIONS)


def combined(scale=1.0):
    pair = CombinedTextEncoder((clip_encoder(), clip_encoder(scale, NARROW)), Axis.FEATURES)
    return CombinedTextEncoder((pair, t5_encoder()), Axis.TOKENS)


MAKE = {"t5": t5_encoder, "clip": clip_encoder, "precomputed": precomputed, "combined": combined}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_protocol(make):
    encoder = make()
    assert isinstance(encoder, TextEncoder)
    found = encoder.encode(CAPTIONS)
    shape = (3, encoder.length)
    assert found.tokens.shape == (*shape, encoder.width) and found.tokens.dtype == jnp.float32
    assert found.mask.shape == shape and found.mask.dtype == bool and bool(found.mask.all()) is encoder.padding_is_read
    assert not np.asarray(found.tokens)[~np.asarray(found.mask)].any() and np.asarray(found.tokens)[0].std() > 0.1
    assert found.pooled is None or (found.pooled.ndim, len(found.pooled), found.pooled.dtype) == (2, 3, jnp.float32)
    assert found.ids is None or (found.ids.shape, found.ids.dtype) == (shape, jnp.int32)
    last = encoder.encode(CAPTIONS[2:])
    jax.tree.map(lambda one, three: np.testing.assert_allclose(one[0], three[2], atol=1e-5), last, found)
    none = encoder.encode([])
    assert jax.tree.map(lambda a: (0, *a.shape[1:], a.dtype), none) == jax.tree.map(
        lambda a: (0, *a.shape[1:], a.dtype), found
    )
    with pytest.raises(ValueError, match="captions must be a list of strings, not one string"):
        encoder.encode("a red star")


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_fingerprints_tell_weights_apart(make):
    assert re.fullmatch("[0-9a-f]{16}", make().fingerprint)
    assert make().fingerprint == make().fingerprint != make(1.01).fingerprint


def test_fingerprints_tell_settings_apart():
    encoder = clip_encoder()
    padded_otherwise = tokenizer("gelu")  # with "!" in place of the end
    changed = [
        {"skip_last": 1},
        {"final_norm": False},
        {"padding_is_read": False},
        {"pooling": Pooling.STATE},
        {"max_length": 8},
        {"tokenizer": padded_otherwise},
        {"config": replace(encoder.config, text=replace(encoder.config.text, activation="gelu"))},
    ]
    assert len({encoder.fingerprint, *(replace(encoder, **settings).fingerprint for settings in changed)}) == 8
    # The image tower is no part of it, nor is the length where it is the default.
    whole = replace(OPENAI, text=encoder.config.text, width=encoder.config.width)
    same = replace(encoder, config=whole, params=encoder.params | {"image": {"first": np.zeros(3)}}, max_length=12)
    assert same.fingerprint == encoder.fingerprint
    pairs = [
        CombinedTextEncoder((encoder, clip_encoder(2.0)), Axis.FEATURES),
        CombinedTextEncoder((encoder, clip_encoder(2.0)), Axis.TOKENS),
        CombinedTextEncoder((clip_encoder(2.0), encoder), Axis.TOKENS),
        CombinedTextEncoder((encoder,), Axis.TOKENS),
    ]
    assert len({encoder.fingerprint, *(pair.fingerprint for pair in pairs)}) == 5


@CONFIGS
def test_layers_of_clip_are_pytorchs(config, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers' CLIP is PyTorch's")
    from transformers import CLIPTextModelWithProjection

    config, words = fitted(config, 24)
    encoder = CLIPTextEncoder(config, init(config), words)
    clip.export(config, encoder.params, tmp_path)
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path)
    norm = next(module for name, module in model.named_modules() if name.endswith("final_layer_norm"))
    with torch.no_grad():
        ids = torch.tensor(np.asarray(encoder.tokenize(CAPTIONS).ids), dtype=torch.long)
        told = model(input_ids=ids, output_hidden_states=True)
        hidden = told.hidden_states
        expected = {(0, True): told.last_hidden_state, (1, True): norm(hidden[-2])}  # Stable Diffusion 1 and 2
        expected |= {(1, False): hidden[-2], (0, False): hidden[-1], (2, False): hidden[0]}  # SDXL, and the ends
    for (skip_last, final_norm), states in expected.items():
        found = replace(encoder, skip_last=skip_last, final_norm=final_norm).encode(CAPTIONS)
        for ours, theirs in ((found.tokens, states), (found.pooled, told.text_embeds)):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    state = replace(encoder, skip_last=1, pooling=Pooling.STATE).encode(CAPTIONS).pooled
    ends = np.asarray(ids == words.eos_token_id).argmax(1)
    np.testing.assert_allclose(state, told.last_hidden_state.numpy()[np.arange(3), ends], atol=1e-5)
    assert replace(encoder, pooling=Pooling.NONE).encode(CAPTIONS).pooled is None


def test_a_blank_caption_as_the_null_text():
    masked = clip_encoder(padding_is_read=False)
    null, plain = replace(masked, blank_is_null=True).encode([*CAPTIONS, " "]), masked.encode(CAPTIONS)
    for found, wanted in zip(null[:3], plain[:3], strict=True):
        np.testing.assert_array_equal(found[jnp.asarray([0, 2])], wanted[jnp.asarray([0, 2])])
        assert not found[jnp.asarray([1, 3])].any() and wanted[1].any()
    assert replace(masked, blank_is_null=True).fingerprint != masked.fingerprint
    with pytest.raises(ValueError, match="needs padding_is_read=False"):
        replace(masked, blank_is_null=True, padding_is_read=True)


@pytest.mark.parametrize("pooling", [Pooling.EMBEDDING, Pooling.STATE])
def test_the_pooled_vectors_of_stored_tokens(pooling):
    """They follow from the tokens alone, also in 16 bits; those of captions without tokens are zero."""
    encoder = clip_encoder(padding_is_read=False, pooling=pooling, blank_is_null=True)
    embedded = encoder.encode(CAPTIONS)
    assert embedded.pooled is not None
    stored, mask = np.asarray(embedded.tokens, np.float16), np.asarray(embedded.mask)
    found = encoder.pooled_of(stored, mask)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, embedded.pooled, atol=2e-2 * np.abs(embedded.pooled).max())
    exact = encoder.pooled_of(np.asarray(embedded.tokens), mask)
    np.testing.assert_allclose(exact, embedded.pooled, atol=1e-5 * np.abs(embedded.pooled).max())
    for change in ({"skip_last": 1}, {"final_norm": False}, {"blank_is_null": False, "padding_is_read": True}):
        with pytest.raises(ValueError, match="masked padding alone"):
            replace(encoder, **change).pooled_of(stored, mask)


def test_fewer_tokens_of_clip_are_the_first_ones():
    """The tower is causal: what a token becomes does not depend on the padding behind it."""
    encoder = clip_encoder()
    short = replace(encoder, padding_is_read=False, max_length=7)
    found, all_of_them = short.encode(CAPTIONS), encoder.encode(CAPTIONS)
    np.testing.assert_array_equal(found.mask.sum(1), [len(encoder.tokenizer(text)["input_ids"]) for text in CAPTIONS])
    read = np.asarray(found.mask)
    np.testing.assert_allclose(np.asarray(found.tokens)[read], np.asarray(all_of_them.tokens)[:, :7][read], atol=1e-5)
    np.testing.assert_allclose(found.pooled, all_of_them.pooled, atol=1e-5)
    rows, length = BulkEncoder(short, 2, (4,))(CAPTIONS)
    assert length == 7
    for row, tokens, mask in zip(rows, found.tokens, read, strict=True):
        np.testing.assert_allclose(row, np.asarray(tokens)[mask], atol=2e-3, rtol=1e-3)
    with pytest.warns(UserWarning, match="longer than 7 tokens cut short; lost: 'star star'"):
        assert short.encode(["star " * 7]).mask.all()


def test_clips_that_cannot_be():
    encoder = clip_encoder()
    for settings, message in (
        ({"skip_last": 3}, "skip_last 3: the tower has 2 blocks"),
        ({"skip_last": -1}, "skip_last -1"),
        ({"max_length": 13}, "max_length 13: the tower reads 1 to 12 tokens"),
        ({"max_length": 0}, "max_length 0"),
        ({"config": replace(OPENAI, text=None)}, "no text tower"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(encoder, **settings)


def test_encoders_side_by_side():
    """Stable Diffusion XL: the states of both, and the pooled vector of the second alone."""
    first = clip_encoder(skip_last=1, final_norm=False, pooling=Pooling.NONE)
    second = clip_encoder(config=NARROW, skip_last=1, final_norm=False)
    pair = CombinedTextEncoder((first, second), Axis.FEATURES)
    assert (pair.width, pair.length, pair.padding_is_read) == (48 + 32, 12, True)
    found, (a, b) = pair.encode(CAPTIONS), (each.encode(CAPTIONS) for each in (first, second))
    np.testing.assert_array_equal(found.tokens, np.concatenate([a.tokens, b.tokens], 2))
    np.testing.assert_array_equal(found.pooled, b.pooled)
    # Masked in one, read in the other: read.
    mixed = CombinedTextEncoder((first, replace(second, padding_is_read=False)), Axis.FEATURES)
    assert mixed.padding_is_read and mixed.encode(CAPTIONS).mask.all()
    with pytest.raises(ValueError, match="text encoders of 12 and 14 tokens cannot be combined along the features"):
        CombinedTextEncoder((first, t5_encoder()), Axis.FEATURES)
    with pytest.raises(ValueError, match="no text encoders"):
        CombinedTextEncoder((), Axis.FEATURES)


def test_encoders_one_behind_the_other():
    """Stable Diffusion 3: the pair of CLIPs, and T5's tokens behind; the narrower of the two is padded with zeros."""
    first, second, t5 = clip_encoder(), clip_encoder(config=NARROW), t5_encoder()
    pair = CombinedTextEncoder((first, second), Axis.FEATURES)
    for clips, narrower in ((pair, t5), (second, second)):  # T5 of width 56 is narrower than 80 and wider than 32
        encoder = CombinedTextEncoder((clips, t5), Axis.TOKENS)
        width = max(clips.width, 56)
        assert (encoder.width, encoder.length, encoder.padding_is_read) == (width, 12 + 14, False)
        found, a, b = (each.encode(CAPTIONS) for each in (encoder, clips, t5))
        np.testing.assert_array_equal(found.tokens[:, :12, : clips.width], a.tokens)
        np.testing.assert_array_equal(found.tokens[:, 12:, :56], b.tokens)
        padded = found.tokens[:, 12:] if narrower is t5 else found.tokens[:, :12]
        assert not padded[:, :, narrower.width :].any() and padded.shape[2] > narrower.width
        np.testing.assert_array_equal(found.mask, np.concatenate([a.mask, b.mask], 1))
        np.testing.assert_array_equal(found.pooled, a.pooled)
    np.testing.assert_array_equal(
        pair.encode(CAPTIONS).pooled, np.concatenate([each.encode(CAPTIONS).pooled for each in (first, second)], 1)
    )


@pytest.mark.parametrize("make", [t5_encoder, clip_encoder, combined])
def test_precomputed_embeddings_are_the_encoders(make):
    encoder = make()
    found = embed_captions(encoder, [*CAPTIONS[:1], *CAPTIONS])
    assert found.captions == ("", "a red star", "on blue")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found.embedding))
    for name in ("width", "length", "padding_is_read", "fingerprint"):
        assert getattr(found, name) == getattr(encoder, name)
    twice = [*CAPTIONS, "a red star"]
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5),
        found.encode(twice),
        encoder.encode(twice),
    )
    with pytest.raises(ValueError, match="no embedding of 'a dog' among those of 3 captions"):
        found.encode(["on blue", "a dog"])


def test_precomputed_embeddings_without_a_name():
    """They are told apart by what they are."""

    def made(caption="", value=1.0, **settings):
        embedding = TextEmbedding(np.full((1, 2, 3), value, np.float32), np.ones((1, 2), bool))
        return PrecomputedTextEncoder((caption,), embedding, **settings).fingerprint

    assert made() == made() and len({made(), made("a"), made(value=2.0), made(padding_is_read=True)}) == 4
    assert made(made_by="t5") == "t5" == embed_captions(t5_encoder(), [], "t5").fingerprint
