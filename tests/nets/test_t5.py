"""T5 against transformers' PyTorch T5, and what must hold without it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nets import t5
from jaxdiff.weights import t5 as weights

WITHOUT_TORCH = "the independent T5 is PyTorch's"
SMALL = t5.T5Config(vocab=90, d_model=48, d_kv=8, d_ff=56, layers=2, decoder_layers=2, heads=3, max_distance=20)
GENERATIONS = {
    "v1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def tokens(rows, columns, lengths, seed=0):
    ids = np.random.default_rng(seed).integers(3, SMALL.vocab, (rows, columns), dtype=np.int32)
    return ids, np.arange(columns) < np.array(lengths)[:, None]


IDS, WRITTEN = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
"""A caption's ids and mask, as shapes."""


@functools.cache
def params_of(config):
    """Random parameters by numpy: nothing to compile, and no norm's scale is one."""
    shapes = jax.eval_shape(t5.T5(config).init, jax.random.key(0), IDS, WRITTEN, IDS)["params"]
    rng = np.random.default_rng(0)

    def leaf(like):
        noise = rng.normal(size=like.shape)
        return jnp.asarray(1 + 0.2 * noise if noise.ndim == 1 else noise * like.shape[0] ** -0.5, jnp.float32)

    return jax.tree.map(leaf, shapes)


@pytest.fixture(scope="module", params=GENERATIONS)
def pair(request, tmp_path_factory):
    """A PyTorch T5 with random weights, and ours loaded from what it saved."""
    torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=SMALL.vocab,
        d_model=SMALL.d_model,
        d_kv=SMALL.d_kv,
        d_ff=SMALL.d_ff,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=SMALL.heads,
        relative_attention_max_distance=SMALL.max_distance,
        decoder_start_token_id=0,
        **GENERATIONS[request.param],
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    if request.param == "v1.1":  # transformers 5 ties every new model, and unties where a checkpoint says so
        model.lm_head.weight = torch.nn.Parameter(torch.randn(SMALL.vocab, SMALL.d_model) * SMALL.d_model**-0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            if "relative_attention_bias" in name:
                parameter *= 8
    directory = tmp_path_factory.mktemp("t5")
    model.save_pretrained(directory)
    config, params = weights.load(directory)
    assert config.tied == config.scale_logits == (not config.gated) == (request.param == "v1.0")
    return torch, model, config, params


def test_encoder_equals_transformers(pair):
    torch, model, config, params = pair
    ids, mask = tokens(4, 40, [40, 23, 2, 1])
    with torch.no_grad():
        expected = model.encoder(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    got = jax.jit(t5.T5Encoder(config).apply)({"params": t5.encoder_params(params)}, ids, mask)
    assert got.dtype == jnp.float32
    assert np.abs(got - expected)[mask].max() <= 2e-5
    assert np.abs(expected[mask]).max() > 0.5


def test_decoder_equals_transformers(pair):
    torch, model, config, params = pair
    ids, mask = tokens(3, 33, [33, 12, 3])
    said, said_mask = tokens(3, 30, [30, 9, 17], seed=1)
    said[:, 0] = config.decoder_start_id
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            decoder_input_ids=torch.tensor(said),
            decoder_attention_mask=torch.tensor(said_mask),
        ).logits.numpy()
    apply = jax.jit(t5.T5(config).apply, static_argnames="method")
    encoded = apply({"params": params}, ids, mask, method="encode")
    got = apply({"params": params}, said, encoded, mask, said_mask, method="decode")
    assert np.abs(got - expected)[said_mask].max() <= 2e-5
    forced = apply({"params": params}, ids, mask, said)  # causal: padding at the end needs no mask
    assert np.abs(forced - expected)[said_mask].max() <= 2e-5


@pytest.mark.parametrize("buckets, distance", [(32, 128), (32, 20), (8, 16), (64, 512)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_transformers(buckets, distance, bidirectional):
    torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = np.arange(-700, 701)
    expected = T5Attention._relative_position_bucket(torch.tensor(relative), bidirectional, buckets, distance).numpy()
    got = t5.relative_buckets(relative, bidirectional, buckets, distance)
    np.testing.assert_array_equal(got, expected)
    assert set(got) <= set(range(buckets))


def test_buckets_in_closed_form():
    near = t5.relative_buckets(np.arange(-7, 8), True, 32, 128)
    np.testing.assert_array_equal(near, [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23])
    # Beyond 8 the distance doubles every two of the eight logarithmic buckets up to 128.
    far = t5.relative_buckets(-np.array([8, 16, 32, 64, 127, 128, 10_000]), True, 32, 128)
    np.testing.assert_array_equal(far, [8, 10, 12, 14, 15, 15, 15])
    assert (t5.relative_buckets(np.arange(0, 9), False, 32, 128) == 0).all()


def test_padding_and_neighbours_change_nothing():
    params = {"params": t5.encoder_params(params_of(SMALL))}
    encode = jax.jit(t5.T5Encoder(SMALL).apply)
    ids, mask = tokens(3, 16, [16, 9, 4])
    full = np.asarray(encode(params, ids, mask))
    other = np.where(mask, ids, 7).astype(np.int32)
    np.testing.assert_array_equal(full[mask], np.asarray(encode(params, other, mask))[mask])
    alone = encode(params, ids[1:2, :9], mask[1:2, :9])
    np.testing.assert_allclose(full[1, :9], alone[0], atol=1e-5)
    assert np.isfinite(encode(params, ids, np.zeros_like(mask))).all()
    changed = ids.copy()
    changed[:, 0] = 5
    assert (np.abs(full - encode(params, changed, mask))[:, 1:][mask[:, 1:]].max(-1) > 1e-4).all()  # all attend to all


def test_decoder_does_not_look_ahead():
    params = {"params": params_of(SMALL)}
    decode = jax.jit(t5.T5(SMALL).apply)
    ids, mask = tokens(2, 10, [10, 6])
    said, _ = tokens(2, 12, [12, 12], seed=2)
    base = np.asarray(decode(params, ids, mask, said))
    changed = said.copy()
    changed[:, 7] = 4
    after = np.asarray(decode(params, ids, mask, changed))
    np.testing.assert_array_equal(base[:, :7], after[:, :7])
    assert (np.abs(base - after)[:, 7:].max(-1) > 1e-4).all()
    changed = ids.copy()
    changed[:, 2] = 4
    assert (np.abs(base - decode(params, changed, mask, said)).max(-1) > 1e-4).all()  # cross-attention


def test_shift_right():
    np.testing.assert_array_equal(t5.shift_right(jnp.array([[5, 6, 1], [7, 1, 0]]), 2), [[2, 5, 6], [2, 7, 1]])


def test_remat_changes_nothing_and_bfloat16_little():
    ids, mask = map(jnp.asarray, tokens(2, 12, [12, 7]))
    plain = replace(SMALL, layers=1, decoder_layers=1)
    params = params_of(plain)

    def mean(config, params):
        logits = t5.T5(config).apply({"params": params}, ids, mask, ids)
        return jnp.mean(jax.nn.logsumexp(logits, -1)), logits

    gradient = jax.jit(jax.grad(mean, argnums=1, has_aux=True), static_argnums=0)
    found, logits = gradient(plain, params)
    same, again = gradient(replace(plain, remat=True), params)
    np.testing.assert_allclose(logits, again, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, same)
    _, half = jax.jit(mean, static_argnums=0)(replace(plain, dtype="bfloat16"), params)
    assert half.dtype == jnp.float32
    error = np.abs(half - logits).max() / np.abs(logits).max()
    assert 1e-6 < error < 0.05


@pytest.mark.parametrize(
    "config, whole, encoder",
    [
        # Sizes of the published checkpoints.
        (t5.SMALL_V1_0, 60_506_624, 35_330_816),
        (t5.SMALL, 76_961_152, 35_332_800),
        pytest.param(t5.BASE, 247_577_856, 109_628_544, marks=pytest.mark.slow),
        pytest.param(t5.XL, 2_849_757_184, 1_223_527_424, marks=pytest.mark.slow),
        (t5.XXL, 11_135_332_352, 4_762_310_656),
        (t5.BYT5_SMALL, 299_637_760, 217_657_472),
    ],
)
def test_sizes(config, whole, encoder):
    params = jax.eval_shape(t5.T5(config).init, jax.random.key(0), IDS, WRITTEN, IDS)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == whole
    assert sum(leaf.size for leaf in jax.tree.leaves(t5.encoder_params(params))) == encoder


@pytest.mark.parametrize("config", [t5.SMALL_V1_0, t5.BYT5_SMALL], ids=["v1.0", "ByT5"])
def test_the_encoder_alone_has_the_encoders_parameters(config):
    config = replace(config, layers=2, decoder_layers=1)
    whole = jax.eval_shape(t5.T5(config).init, jax.random.key(0), IDS, WRITTEN, IDS)["params"]
    alone = jax.eval_shape(t5.T5Encoder(config).init, jax.random.key(0), IDS, WRITTEN)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, alone) == jax.tree.map(
        lambda leaf: leaf.shape, t5.encoder_params(whole)
    )
