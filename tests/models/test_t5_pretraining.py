"""Span corruption loses nothing, its batches resume, and the loss is the cross-entropy that training brings down."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import loss_of

from jaxdiff.models.t5 import Corruption, T5Pretraining, corrupt, span_batches, span_counts, span_mask, target_length
from jaxdiff.nets.t5 import T5, T5Config, encoder_params
from jaxdiff.text.tokenizer import byte_tokenizer, train_tokenizer

CAPTIONS = [f"a {a} {b} on a {c} ground" for a in ("red", "blue") for b in ("star", "ring") for c in ("white", "green")]
PAPER = Corruption()
SENTINELS = list(range(999, 899, -1))
CONFIG = T5Config(vocab=400, d_model=32, d_kv=8, d_ff=48, layers=1, decoder_layers=1, heads=4)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS * 3, CONFIG.vocab)


def runs(mask):
    return int((np.diff(np.concatenate([[0], mask.astype(int)])) == 1).sum())


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13, 21, 100, 512])
def test_spans_have_the_counts(length):
    cut, spans = span_counts(length, PAPER)
    for seed in range(20):
        mask = span_mask(length, PAPER, np.random.default_rng(seed))
        assert (len(mask), mask.sum(), runs(mask)) == (length, cut, spans)
        assert not mask.all()
    if length >= 100:
        assert cut / length == pytest.approx(0.15, abs=0.005)
        assert cut / spans == pytest.approx(3.0, abs=0.1)


def test_other_densities_and_single_tokens():
    mask = span_mask(60, Corruption(density=0.5, mean_span=2.0), np.random.default_rng(0))
    assert (mask.sum(), runs(mask)) == (30, 15)
    assert span_mask(1, PAPER, np.random.default_rng(0)).tolist() == [False]
    with pytest.raises(ValueError, match="density"):
        Corruption(density=1.0)
    with pytest.raises(ValueError, match="mean_span"):
        Corruption(mean_span=0.5)


def test_every_position_is_cut_as_often_as_its_place_allows():
    rng = np.random.default_rng(0)
    share = np.mean([span_mask(12, PAPER, rng) for _ in range(4000)], 0)
    # One span of two in twelve: eleven places, and all but the end positions lie in two of them.
    np.testing.assert_allclose(share, [1 / 11] + [2 / 11] * 10 + [1 / 11], atol=0.025)


def test_the_example():
    ids, cut = np.arange(10, 18), np.array([0, 0, 1, 1, 0, 0, 0, 1], bool)
    inputs, targets = corrupt(ids, cut, SENTINELS, 1)
    np.testing.assert_array_equal(inputs, [10, 11, 999, 14, 15, 16, 998, 1])
    np.testing.assert_array_equal(targets, [999, 12, 13, 998, 17, 997, 1])


def restored(inputs, targets):
    """The caption, from what was left and what was cut."""
    spans, current = {}, None
    for token in targets:
        if token in SENTINELS:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    return [t for token in inputs for t in spans.get(int(token), [int(token)])]


@pytest.mark.parametrize("seed", range(30))
def test_inputs_and_targets_restore_the_caption(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 800, rng.integers(1, 120))
    corruption = Corruption(rng.uniform(0.05, 0.9), rng.uniform(1, 5))
    inputs, targets = corrupt(ids, span_mask(len(ids), corruption, rng), SENTINELS, 1)
    assert inputs[-1] == targets[-1] == 1
    assert restored(inputs[:-1], targets[:-1]) == ids.tolist()
    assert len(inputs) <= len(ids) + 1
    assert len(targets) <= target_length(max(len(ids) + 1, 3), corruption)


def test_too_few_sentinels():
    with pytest.raises(ValueError, match="2 spans need 3 sentinels; the tokenizer has 2"):
        corrupt(np.arange(5), np.array([1, 0, 1, 0, 0], bool), [9, 8], 1)


def test_batches(tokenizer):
    stream = span_batches(tokenizer, [*CAPTIONS, " "], batch=4, length=12, seed=3)
    first = next(stream)
    assert first["inputs"].shape == first["input_mask"].shape == (4, 12)
    assert first["targets"].shape == first["target_mask"].shape == (4, target_length(12, PAPER))
    assert first["inputs"].dtype == first["targets"].dtype == np.int32
    for ids, mask in ((first["inputs"], first["input_mask"]), (first["targets"], first["target_mask"])):
        assert (ids[~mask] == 0).all() and (ids[mask] != 0).all()
        assert (ids[np.arange(4), mask.sum(1) - 1] == tokenizer.eos_token_id).all()


def test_batches_visit_every_caption_once_an_epoch(tokenizer):
    stream = span_batches(tokenizer, CAPTIONS, batch=4, length=12, seed=3)
    sentinels = {f"<extra_id_{i}>": i for i in range(32)}

    def epoch():
        seen = []
        for _ in range(2):
            made = next(stream)
            for row, said in zip(made["inputs"], made["targets"], strict=True):
                spans, current = {}, None
                for word in tokenizer.convert_ids_to_tokens(said):
                    if word in sentinels:
                        current = spans.setdefault(word, [])
                    elif word not in ("</s>", "<pad>"):
                        current.append(word)
                words = [w for word in tokenizer.convert_ids_to_tokens(row) for w in spans.get(word, [word])]
                seen.append("".join(w for w in words if w not in ("</s>", "<pad>")).replace("▁", " ").strip())
        return seen

    one, two = epoch(), epoch()
    assert sorted(one) == sorted(two) == sorted(CAPTIONS)
    assert one != two


def test_batches_resume(tokenizer):
    stream = span_batches(tokenizer, CAPTIONS, batch=3, length=12, seed=0)
    for _ in range(4):
        next(stream)
    state = stream.get_state()
    expected = [next(stream) for _ in range(3)]
    again = span_batches(tokenizer, CAPTIONS, batch=3, length=12, seed=0)
    again.set_state(state)
    for one in expected:
        two = next(again)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    other = next(span_batches(tokenizer, CAPTIONS, batch=3, length=12, seed=1))
    first = next(span_batches(tokenizer, CAPTIONS, batch=3, length=12, seed=0))
    assert (other["inputs"] != first["inputs"]).any()


def test_batches_refuse():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="batch must be at least 1"):
        span_batches(tokenizer, CAPTIONS, 0, 12, 0)
    with pytest.raises(ValueError, match="no caption with words"):
        span_batches(tokenizer, ["", "  "], 2, 12, 0)
    with pytest.warns(UserWarning, match="lost"):
        span_batches(tokenizer, CAPTIONS, 2, 12, 0)


def test_loss_is_the_masked_cross_entropy(tokenizer):
    stage = T5Pretraining(CONFIG)
    params, _ = jax.jit(stage.init)(jax.random.key(0))
    batch = next(span_batches(tokenizer, CAPTIONS, batch=4, length=12, seed=0))
    loss, metrics = jax.jit(partial(loss_of, stage))(params, batch, jax.random.key(0))
    said = np.pad(batch["targets"][:, :-1], ((0, 0), (1, 0)))
    logits = jax.jit(T5(CONFIG).apply)({"params": params}, batch["inputs"], batch["input_mask"], said)
    logits, mask = np.asarray(logits, np.float64), batch["target_mask"]
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    expected = (np.log(np.exp(logits).sum(-1)) - chosen)[mask].mean()
    assert loss == pytest.approx(expected, abs=1e-4)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == batch["targets"])[mask].mean(), abs=1e-6)
    assert 0.5 * np.log(CONFIG.vocab) < loss < 2 * np.log(CONFIG.vocab)  # nothing is known at the start
    padding = batch | {"targets": np.where(mask, batch["targets"], 7).astype(np.int32)}
    assert jax.jit(partial(loss_of, stage))(params, padding, jax.random.key(1))[0] == loss


def test_training_fits_a_handful_of_captions(tokenizer):
    stage = T5Pretraining(CONFIG)
    params, _ = jax.jit(stage.init)(jax.random.key(0))
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(params, state, batch):
        (_, metrics), gradient = jax.value_and_grad(partial(loss_of, stage), has_aux=True)(
            params, batch, jax.random.key(0)
        )
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, metrics, gradient

    batch = next(span_batches(tokenizer, CAPTIONS, batch=8, length=12, seed=0))
    state, losses = optimizer.init(params), []
    for i in range(60):
        params, state, metrics, gradient = step(params, state, batch)
        losses.append(float(metrics["loss"]))
        if i == 0:
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
                assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)  # the loss reaches every parameter
    assert losses[-1] < 0.1 * losses[0]
    assert metrics["accuracy"] > 0.95
    assert encoder_params(params).keys() == {"shared", "encoder"}
