"""The encoder–decoder of dalle-mini: its cache, loops, causality and sizes.

`tests/weights/test_dalle_mini.py` compares it with PyTorch's layers.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nets.encoder_decoder import MEGA, MINI, EncoderDecoderConfig
from jaxdiff.nets.execution import ExecutionConfig

CONFIG = EncoderDecoderConfig(
    vocab=11, text_length=5, codes=7, entries=10, start=8, rows=3, columns=4, width=12, heads=3, encoder_layers=2,
    decoder_layers=3, feed_forward=10,
)  # fmt: skip
RNG = np.random.default_rng(0)
TEXT = jnp.asarray(RNG.integers(0, 11, (2, 5)))
MASK = jnp.asarray([[True, True, False, False, False], [True] * 5])
CODES = jnp.asarray(RNG.integers(0, 7, (2, 3, 4)))
PARAMS = jax.tree.map(
    lambda leaf: jnp.asarray(0.4 * RNG.normal(size=leaf.shape), jnp.float32),
    jax.eval_shape(lambda: CONFIG.module().init(jax.random.key(0), TEXT, MASK, CODES)["params"]),
)


@partial(jax.jit, static_argnums=0)
def run(config, params, text, mask, codes):
    return config.module().apply({"params": params}, text, mask, codes)


def test_cache():
    """Code by code, the logits are those of the complete sequence."""
    apply = partial(CONFIG.module().apply, {"params": PARAMS})
    step = jax.jit(partial(apply, method="step"))
    wanted, codes = run(CONFIG, PARAMS, TEXT, MASK, CODES).codes, CODES.reshape(2, -1)
    logits, cache = jax.jit(partial(apply, method="prefill"))(TEXT, MASK)
    for number in range(12):
        np.testing.assert_allclose(logits, wanted[:, number], atol=1e-5)
        logits, cache = step(codes[:, number], jnp.int32(number), cache)
    assert np.isfinite(logits).all()


def test_causality_and_padding():
    """A code changes the logits after it alone; the ids of padding change nothing."""
    before = run(CONFIG, PARAMS, TEXT, MASK, CODES).codes
    changed = run(CONFIG, PARAMS, TEXT, MASK, CODES.at[:, 1, 2].add(1)).codes
    np.testing.assert_array_equal(changed[:, :7], before[:, :7])
    assert (jnp.abs(changed - before)[:, 7:].max((0, 2)) > 1e-4).all()
    np.testing.assert_array_equal(run(CONFIG, PARAMS, jnp.where(MASK, TEXT, 3), MASK, CODES).codes, before)
    assert (run(CONFIG, PARAMS, TEXT.at[0, 1].add(-1), MASK, CODES).codes[0, 0] != before[0, 0]).all()


@pytest.mark.parametrize("change", [{"scan": True}, {"remat": "blocks"}, {"scan": True, "remat": "outputs"}])
def test_execution(change):
    """Loops and rematerialization change neither logits nor gradients, nor the parameters' names."""
    other = replace(CONFIG, execution=ExecutionConfig(**change))

    def loss(config, params):
        return (run(config, params, TEXT, MASK, CODES).codes ** 2).mean()

    wanted, got = (jax.jit(jax.value_and_grad(partial(loss, each)))(PARAMS) for each in (CONFIG, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, wanted)
    shapes = jax.eval_shape(lambda: other.module().init(jax.random.key(0), TEXT, MASK, CODES)["params"])
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, PARAMS)


def test_half_precision():
    logits = run(replace(CONFIG, execution=ExecutionConfig("bfloat16")), PARAMS, TEXT, MASK, CODES).codes
    wanted = run(CONFIG, PARAMS, TEXT, MASK, CODES).codes
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wanted, atol=0.1 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(("config", "millions"), [(MINI, 437.8), (MEGA, 2587.5)])
def test_sizes(config, millions):
    """Sums by hand: embeddings, positions, norms and layers."""
    d, f, n, m = config.width, config.feed_forward, config.encoder_layers, config.decoder_layers
    gated = 3 * d * f + d + f
    tables = (config.vocab + 64 + 2 * config.entries + 256) * d
    count = tables + n * (4 * d * d + 3 * d + gated) + m * (8 * d * d + 6 * d + gated) + 6 * d
    spec = jnp.zeros((1, 64), int), jnp.ones((1, 64), bool), jnp.zeros((1, 16, 16), int)
    shapes = jax.eval_shape(lambda: config.module().init(jax.random.key(0), *spec)["params"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "5 heads do not divide a width of 12"),
        ({"decoder_layers": 0}, "at least one layer"),
        ({"start": 10}, "do not fit 10 entries"),
        ({"codes": 11}, "do not fit 10 entries"),
        ({"rows": 0}, "at least 1"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
