"""The transformer of DALL·E 1 against a reference with dense masks; its cache, loops, and causality."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

from jaxdiff.nets.autoregressive import AutoregressiveConfig, Cache, periods, published_patterns
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.nets.sparse_attention import Pattern, dense_mask, in_blocks

CONFIG = AutoregressiveConfig(
    vocab=11, text_length=3, codes=7, rows=5, columns=3, width=8, heads=2, patterns=published_patterns(6), kernel=3,
    feed_forward=2,
)  # fmt: skip
RNG = np.random.default_rng(0)
TEXT = jnp.asarray(RNG.integers(0, 11, (2, 3)))
MASK = jnp.asarray([[True, True, False], [True, True, True]])
CODES = jnp.asarray(RNG.integers(0, 7, (2, 5, 3)))


def random_params():
    """Ten times larger than initialized, so that attention is not uniform."""
    params = CONFIG.module().init(jax.random.key(0), TEXT, MASK, CODES)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * RNG.normal(size=leaf.shape), jnp.float32), params)


PARAMS = random_params()


@partial(jax.jit, static_argnums=0)
def run(config, params, text, mask, codes):
    return config.module().apply({"params": params}, text, mask, codes)


def reference(params, text, mask, codes):
    """Written again, with one dense mask for each layer."""
    params = jax.tree.map(np.asarray, params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    rows = []
    for ids, kept, grid in zip(*map(np.asarray, (text, mask, codes))):
        sequence = [params["start"]]
        for i in range(3):
            token = params["text_embedding"]["embedding"][ids[i]] if kept[i] else params["pad"][i]
            sequence.append(token + params["text_position"][i])
        for i, code in enumerate(grid.ravel()):
            position = params["row"][i // 3] + params["column"][i % 3]
            sequence.append(params["code_embedding"]["embedding"][code] + position)
        x = np.stack(sequence)
        for number, pattern in enumerate(CONFIG.patterns):
            p = params[f"layer_{number}"]
            y = norm(x, p["attention_norm"])
            q, k, v = (dense(y, p[name]).reshape(-1, 2, 4) for name in "qkv")
            logits = np.einsum("ind,jnd->nij", q, k) / 2
            logits = np.where(dense_mask(CONFIG.grid, pattern), logits, -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + dense(np.einsum("nij,jnd->ind", weights, v).reshape(-1, 8), p["out"])
            y = dense(norm(x, p["feed_forward_norm"]), p["up"])
            x = x + dense(y * 0.5 * (1 + np.asarray(erf(y / np.sqrt(2)))), p["down"])
        x = norm(x, params["norm"])
        rows.append((dense(x[:3], params["text_head"]), dense(x[3:-1], params["code_head"])))
    return [np.stack(each) for each in zip(*rows)]


def test_reference():
    assert any(in_blocks(CONFIG.grid, pattern) for pattern in CONFIG.patterns)
    for ours, wanted in zip(run(CONFIG, PARAMS, TEXT, MASK, CODES), reference(PARAMS, TEXT, MASK, CODES)):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_cached_logits():
    """One token at a time, from the cache: the logits of complete sequences."""
    module, variables = CONFIG.module(), {"params": PARAMS}
    wanted = run(CONFIG, PARAMS, TEXT, MASK, CODES).codes
    logits, cache = jax.jit(partial(module.apply, method="prefill"))(variables, TEXT, MASK)
    step, found = jax.jit(partial(module.apply, method="step")), [logits]
    flat = CODES.reshape(2, -1)
    for number in range(CONFIG.grid.tokens - 1):
        logits, cache = step(variables, flat[:, number], jnp.int32(number), Cache(*cache))
        found.append(logits)
    np.testing.assert_allclose(np.stack(found, 1), wanted, atol=1e-5)


@pytest.mark.parametrize("execution", [ExecutionConfig(remat="blocks"), ExecutionConfig(remat="outputs", scan=True)])
def test_execution(execution):
    """Loops and rematerialization change neither the logits nor the gradients, nor the names of the parameters."""
    changed = replace(CONFIG, execution=execution)

    def both(config):
        def loss(params):
            logits = run(config, params, TEXT, MASK, CODES)
            return (logits.codes**2).sum() + (logits.text**2).sum()

        return jax.jit(jax.value_and_grad(loss))(PARAMS)

    (value, slopes), (wanted, expected) = both(changed), both(CONFIG)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), slopes, expected)
    shapes = jax.eval_shape(changed.module().init, jax.random.key(0), TEXT, MASK, CODES)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, PARAMS)


def test_causality():
    """A token changes no logits before it; padding is not read by its id, but by its place."""
    before = run(CONFIG, PARAMS, TEXT, MASK, CODES)
    for number in (0, 4, 14):
        changed = CODES.reshape(2, -1).at[:, number].add(1) % 7
        after = run(CONFIG, PARAMS, TEXT, MASK, changed.reshape(2, 5, 3))
        np.testing.assert_allclose(after.codes[:, : number + 1], before.codes[:, : number + 1], atol=1e-6)
        if number < 13:
            assert np.abs(after.codes[:, number + 1] - before.codes[:, number + 1]).max() > 1e-3
        np.testing.assert_allclose(after.text, before.text, atol=1e-6)
    after = run(CONFIG, PARAMS, TEXT.at[0, 2].add(1), MASK, CODES)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_half_precision():
    half = replace(CONFIG, execution=ExecutionConfig("bfloat16"))
    for ours, wanted in zip(run(half, PARAMS, TEXT, MASK, CODES), run(CONFIG, PARAMS, TEXT, MASK, CODES)):
        assert ours.dtype == jnp.float32 and np.abs(ours - wanted).max() < 0.05 * np.abs(wanted).max()


def test_loops():
    R, C, V = Pattern.ROW, Pattern.COLUMN, Pattern.CONV
    loops = periods((R, C, R, R, R, C, R, R, R, C, V))
    assert [(patterns, len(names)) for patterns, names in loops] == [((R, C, R, R), 2), ((R,), 1), ((C,), 1), ((V,), 1)]
    assert loops[0][1][1] == ["layer_4", "layer_5", "layer_6", "layer_7"]
    assert periods((R,) * 5) == [((R,), [[f"layer_{i}"] for i in range(5)])]


def test_published():
    """64 layers and 12 billion parameters; patterns as in B.1, counted from 1."""
    config = AutoregressiveConfig()
    columns = [i for i, pattern in enumerate(config.patterns, 1) if pattern is Pattern.COLUMN]
    assert columns == [i for i in range(1, 64) if (i - 2) % 4 == 0] and config.patterns[-1] is Pattern.CONV
    ids = jnp.zeros((1, 256), int), jnp.ones((1, 256), bool), jnp.zeros((1, 32, 32), int)
    shapes = jax.eval_shape(config.module().init, jax.random.key(0), *ids)
    assert 12.0e9 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 12.5e9


@pytest.mark.parametrize(("change", "message"), [({"patterns": ()}, "one layer"), ({"heads": 3}, "do not divide"),
                                                 ({"rows": 0}, "a prefix and a grid")])  # fmt: skip
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
