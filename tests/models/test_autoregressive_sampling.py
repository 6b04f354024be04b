"""Drawing tokens against enumeration; sampling with a cache against sampling without one; training."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.core.products import TokenSpec
from jaxdiff.diffusion import noise
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.sampling import SampleRequest
from jaxdiff.models.start import InitProduct
from jaxdiff.models.token_sampling import TokenSampling, drawn, truncated
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.autoregressive import AutoregressiveConfig, published_patterns
from jaxdiff.nets.sparse_attention import Pattern
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import OptimizerConfig
from jaxdiff.training.state import init_state, placements_of
from jaxdiff.training.step import make_step

KEY = jax.random.key(0)
NETWORK = AutoregressiveConfig(
    vocab=11, text_length=3, codes=7, rows=4, columns=3, width=16, heads=2, patterns=published_patterns(3), kernel=3,
    feed_forward=2,
)  # fmt: skip
MODEL = AutoregressiveModel(NETWORK, TokenSpec(7, 8))
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda leaf: jnp.asarray(0.4 * RNG.normal(size=leaf.shape), jnp.float32), jax.jit(lambda: MODEL.init(KEY)[0])()
)
IDS = jnp.asarray(RNG.integers(0, 11, (4, 3)))
MASK = jnp.asarray([[True, True, False], [True, True, True], [True, False, False], [True, True, True]])


def request(rows=slice(None), text=True, **change):
    embedding = TextEmbedding(jnp.zeros((4, 3, 0)), MASK, None, IDS)
    keys = noise.sample_keys(KEY, jnp.arange(4))[rows]
    return SampleRequest(keys, (4, 3), jax.tree.map(lambda a: a[rows], embedding) if text else None, **change)


LOGITS = jnp.asarray([2.0, 1.0, 0.5, 0.5, -1.0, -3.0])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (TokenSampling(), range(6)),
        (TokenSampling(temperature=0.5), range(6)),
        (TokenSampling(top_k=3), (0, 1, 2)),  # of the two equal ones the first
        (TokenSampling(top_p=0.7), (0, 1)),
        (TokenSampling(temperature=2.0, top_k=4, top_p=0.8), (0, 1, 2)),
        (TokenSampling(top_p=1e-6), (0,)),
        (TokenSampling(temperature=0.0, top_k=3), (0,)),
    ],
)
def test_draws_have_the_enumerated_distribution(sampling, kept):
    """χ² of 100,000 draws against the probabilities by hand."""
    count, kept = 100_000, list(kept)
    logits = np.asarray(LOGITS, np.float64) / (sampling.temperature or 1.0)
    wanted = np.zeros(6)
    wanted[kept] = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    run = jax.jit(lambda keys, sampling: drawn(jnp.broadcast_to(LOGITS, (count, 6)), keys, sampling))
    counts = np.bincount(run(noise.sample_keys(KEY, jnp.arange(count)), sampling), minlength=6)
    assert not counts[wanted == 0].any()
    expected = count * wanted[kept]
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 20.6  # p = 0.001 of five degrees of freedom


def test_top_p_is_of_what_top_k_leaves():
    """The nucleus is measured on the distribution over the k likeliest."""
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    assert np.isfinite(truncated(logits, 2, 0.55)).tolist() == [[True, False, False, False]]
    assert np.isfinite(truncated(logits, 0, 0.55)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("top_k", [0, 1, 5, 9])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_truncation_against_its_definition(top_k, top_p):
    """Token by token, with equal logits, both zeros, −∞ and large ranges."""
    random = np.random.default_rng(0)
    logits = random.integers(-3, 4, (20, 9)) * random.choice([0.5, 1.0, 40.0], (20, 1))
    logits[0], logits[1, :4], logits[2, 3:] = 0.0, -0.0, -np.inf
    found = np.asarray(truncated(jnp.asarray(logits, jnp.float32), top_k, top_p))
    for row, result in zip(logits, found):
        order = np.argsort(-row, kind="stable")[: top_k or 9]
        likely = np.exp(row[order] - row.max())
        before = np.cumsum(likely / likely.sum()) - likely / likely.sum()
        kept = [token for rank, token in enumerate(order) if rank == 0 or before[rank] < top_p or top_p == 1.0]
        wanted = np.full(9, -np.inf)
        wanted[kept] = row[kept]
        np.testing.assert_array_equal(result, wanted)


def uncached(sampling, rows=slice(None), known=None):
    """Codes one by one, each from the logits of a complete sequence."""
    keys, ids, mask = noise.sample_keys(KEY, jnp.arange(4))[rows], IDS[rows], MASK[rows]
    apply = jax.jit(partial(NETWORK.module().apply, {"params": PARAMS}))
    codes = jnp.zeros((len(ids), 12), jnp.int32)
    for number in range(12):
        grid = codes.reshape(-1, 4, 3)
        logits = apply(ids, mask, grid).codes[:, number]
        if sampling.guidance != 1.0:
            other = apply(ids, jnp.zeros_like(mask), grid).codes[:, number]
            logits = other + sampling.guidance * (logits - other)
        code = drawn(logits, noise.fold(keys, number), sampling)
        if known is not None and number < known.shape[1]:
            code = known[:, number]
        codes = codes.at[:, number].set(code)
    return np.asarray(codes).reshape(-1, 4, 3)


@pytest.mark.parametrize("sampling", [TokenSampling(), TokenSampling(0.7, 4, 0.9, 3.0)])
def test_sampling(sampling):
    box = TrainedAutoregressive(MODEL, PARAMS, sampling)
    codes = box.generate(request())
    np.testing.assert_array_equal(codes, uncached(sampling))
    assert codes.dtype == jnp.int32 and len(np.unique(codes)) > 2
    # A sample does not depend on its batch, nor on progress reports.
    seen = []
    np.testing.assert_array_equal(box.generate(request(slice(1, 3), progress=seen.append)), codes[1:3])
    assert seen == [1, 2, 3, 4]


def test_completion():
    """The rows outside of the mask are kept, and the others are sampled after them."""
    given = jnp.asarray(RNG.integers(0, 7, (4, 4, 3)))
    mask = jnp.zeros((4, 4, 3, 1)).at[:, 2:].set(1.0)
    codes = TrainedAutoregressive(MODEL, PARAMS).generate(request(init=InitProduct(given, mask=mask)))
    np.testing.assert_array_equal(codes[:, :2], given[:, :2])
    np.testing.assert_array_equal(codes, uncached(TokenSampling(), known=given[:, :2].reshape(4, 6)))


def test_devices_share_a_batch():
    """Four samples on two devices: the same codes. Batches are filled up to a multiple of the devices."""
    box = TrainedAutoregressive(MODEL, PARAMS, TokenSampling(0.7, 4, 0.9, 3.0))
    mesh = make_mesh(2, devices=jax.devices()[:2])
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    shared = replace(box, params=params, sharding=ActivationSharding(("data",)))
    with jax.set_mesh(mesh):
        assert [shared.batch_size(wanted) for wanted in (1, 2, 3)] == [2, 2, 4]
        found = shared.generate(request())
    assert len(found.sharding.device_set) == 2 and found.sharding.shard_shape(found.shape) == (2, 4, 3)
    np.testing.assert_array_equal(found, box.generate(request()))


def test_without_text():
    """No text is padding alone; so is the unconditional branch, unless there is a negative prompt."""
    box = TrainedAutoregressive(MODEL, PARAMS, TokenSampling(guidance=0.0))
    plain = replace(box, sampling=TokenSampling())
    np.testing.assert_array_equal(box.generate(request()), plain.generate(request(text=False)))
    negative = TextEmbedding(jnp.zeros((4, 3, 0)), MASK[::-1], None, IDS[::-1])
    other = request(text=False)
    wanted = plain.generate(SampleRequest(other.keys, other.size, negative))
    np.testing.assert_array_equal(box.generate(request(negative=negative)), wanted)


def test_settings_compile_once():
    """New numbers compile nothing; switching guidance off does."""
    box = TrainedAutoregressive(MODEL, PARAMS, TokenSampling(0.9, 5, 0.9, 2.0))
    box.generate(request())
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    for value in (0.5, 0.75):
        replace(box, sampling=TokenSampling(value, 2, value, 1 + value)).generate(request())
    assert not [event for event in events if "backend_compile" in event]
    jax.clear_caches()
    replace(box, sampling=TokenSampling()).generate(request())
    assert [event for event in events if "backend_compile" in event]


def test_the_loss_by_hand():
    """1/8 of the text's and 7/8 of the codes' cross-entropy; padding is not predicted."""
    codes = jnp.asarray(RNG.integers(0, 7, (4, 4, 3)))
    batch = {"ids": IDS, "text_mask": MASK, "image": codes}
    model = replace(MODEL, dropout=0.0)
    loss, (metrics, _) = jax.jit(model.loss)(PARAMS, (), (), batch, KEY, jnp.int32(0))
    logits = NETWORK.module().apply({"params": PARAMS}, IDS, MASK, codes)
    text, code = (np.asarray(jax.nn.log_softmax(each)) for each in logits)
    text = -np.mean([text[i, j, IDS[i, j]] for i in range(4) for j in range(3) if MASK[i, j]])
    code = -np.mean([code[i, j, codes.reshape(4, -1)[i, j]] for i in range(4) for j in range(12)])
    assert float(loss) == pytest.approx(text / 8 + 7 * code / 8, rel=1e-5)
    assert float(metrics["text_loss"]) == pytest.approx(text, rel=1e-5)
    scores = jax.jit(model.held_out_losses)(PARAMS, (), (), batch, jnp.asarray([0, 1, 2, -1]), KEY)
    assert scores["held_out_loss"][1] == 3


def test_dropout_replaces_captions_by_padding():
    codes = jnp.asarray(RNG.integers(0, 7, (4, 4, 3)))
    batch = {"ids": IDS, "text_mask": MASK, "image": codes}
    model = replace(MODEL, dropout=0.999)
    _, (metrics, _) = jax.jit(model.loss)(PARAMS, (), (), batch, KEY, jnp.int32(0))
    bare = NETWORK.module().apply({"params": PARAMS}, IDS, jnp.zeros_like(MASK), codes).codes
    wanted = -np.take_along_axis(np.asarray(jax.nn.log_softmax(bare)), np.asarray(codes).reshape(4, -1, 1), -1).mean()
    assert float(metrics["code_loss"]) == pytest.approx(wanted, rel=1e-5) and metrics["text_loss"] == 0


def test_training_reads_the_text():
    """The first code is a word's number, each later one the code above it plus one: both are learned."""
    network = replace(NETWORK, patterns=(Pattern.ROW, Pattern.COLUMN), width=32, codes=7)
    model = AutoregressiveModel(network, TokenSpec(7, 8))

    def batch(seed):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 7, (32, 3))
        codes = (ids[:, None] + np.arange(4)[:, None]) % 7
        return {"ids": jnp.asarray(ids), "text_mask": jnp.ones((32, 3), bool), "image": jnp.asarray(codes)}

    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), OptimizerConfig(learning_rate=5e-3, warmup=10, total=200)
    state = init_state(model, optimizer, KEY, mesh)
    step = make_step(model, optimizer, placements_of(state))
    for number in range(200):
        state, _ = step(state, batch(number), KEY, ())
    scores = jax.jit(model.held_out_losses)(state.params, (), (), batch(1000), jnp.arange(32), KEY)
    assert scores["held_out_code_accuracy"][0] / 32 > 0.95


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: TrainedAutoregressive(MODEL, PARAMS).check((4, 4)), "samples 4×3 codes, not 4×4"),
        (lambda: replace(MODEL, product=TokenSpec(8, 8)), "a transformer of 7 codes for codes of 8 classes"),
        (lambda: replace(MODEL, dropout=1.0), "lie in"),
        (lambda: TokenSampling(temperature=-1.0), "temperature -1.0"),
        (lambda: TokenSampling(top_k=-1), "top_k -1"),
        (lambda: TokenSampling(top_p=0.0), "top_p 0.0"),
        (
            lambda: TrainedAutoregressive(MODEL, PARAMS).generate(
                replace(request(), text=TextEmbedding(jnp.zeros((4, 3, 0)), MASK))
            ),
            "reads token ids",
        ),
        (
            lambda: TrainedAutoregressive(MODEL, PARAMS).generate(request(init=InitProduct(jnp.zeros((4, 4, 3), int)))),
            "give a mask",
        ),
    ],
)
def test_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run()
