"""Schedules against their closed forms; settings that make no sense are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxdiff.training.muon import QUINTIC, orthogonal
from jaxdiff.training.optimizer import (
    SGD,
    Adafactor,
    AdamW,
    Decay,
    Muon,
    OptimizerConfig,
    StableDecay,
    optimizer,
    schedule,
)


def test_default_schedule_warms_up_and_ends_at_zero():
    # Imagen F.1 prints end_value=2500000, which would end at a learning rate of 2.5 million.
    rate = schedule(OptimizerConfig())
    assert float(rate(0)) == 0.0
    assert float(rate(5_000)) == pytest.approx(0.5e-4, rel=1e-5)
    assert float(rate(10_000)) == pytest.approx(1e-4, rel=1e-5)
    assert float(rate((2_500_000 + 10_000) // 2)) == pytest.approx(0.5e-4, rel=1e-4)
    assert float(rate(2_500_000)) == pytest.approx(0.0, abs=1e-12)
    assert float(rate(3_000_000)) == pytest.approx(0.0, abs=1e-12)


def test_schedule_without_warmup_starts_at_the_full_rate():
    assert float(schedule(OptimizerConfig(warmup=0, total=10))(0)) == pytest.approx(1e-4)


def test_constant_schedule_stays():
    rate = schedule(OptimizerConfig(warmup=10, decay=Decay.CONSTANT))
    assert [float(rate(n)) for n in (0, 5, 10, 10**7)] == pytest.approx([0, 0.5e-4, 1e-4, 1e-4])


def test_stable_decay_falls_along_a_line_at_the_end():
    config = OptimizerConfig(warmup=10, total=100, decay=StableDecay(0.2))
    assert (config.stable_until, config.end) == (80, 100)
    rate = schedule(config)
    assert [float(rate(n)) for n in (0, 5, 10, 80, 85, 90, 100, 10**6)] == pytest.approx(
        [0, 0.5e-4, 1e-4, 1e-4, 0.75e-4, 0.5e-4, 0, 0], rel=1e-5, abs=1e-12
    )
    constant = schedule(OptimizerConfig(warmup=10, decay=Decay.CONSTANT))
    assert all(rate(n) == constant(n) for n in range(81))  # to the bit: until then it may be changed for it


@pytest.mark.parametrize(
    ("warmup", "total", "fraction", "start"),
    [(0, 10, 1.0, 0), (9, 10, 0.5, 9), (0, 3, 0.01, 2), (0, 1, 0.2, 0), (5, 10, 1.0, 5)],
)
def test_stable_decay_begins_after_the_warmup_and_takes_an_update_at_least(warmup, total, fraction, start):
    config = OptimizerConfig(learning_rate=1.0, warmup=warmup, total=total, decay=StableDecay(fraction))
    assert config.stable_until == start
    rate = schedule(config)
    assert float(rate(start)) == 1.0 and float(rate(total)) == 0.0
    assert [float(rate(n)) for n in range(start, total)] == pytest.approx(
        [1 - n / (total - start) for n in range(total - start)]
    )


@pytest.mark.parametrize(
    "kind", [AdamW(), AdamW(weight_decay=0.1), Muon(rms=2.0), Adafactor(), Adafactor(weight_decay=0.01)]
)
def test_each_kind_minimises_a_quadratic(kind):
    transform = optimizer(OptimizerConfig(kind=kind, learning_rate=0.05, warmup=0, total=300))
    params = {"kernel": jnp.full((4, 4), 2.0)}
    state = transform.init(params)

    @jax.jit
    def update(params, state):
        grads = jax.tree.map(lambda p: 2 * p, params)
        updates, state = transform.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(300):
        params, state = update(params, state)
    assert float(jnp.max(jnp.abs(params["kernel"]))) < 0.05


@pytest.mark.parametrize("kind", [AdamW(weight_decay=0.1), Adafactor(weight_decay=0.1), Muon(weight_decay=0.1)])
def test_weight_decay_moves_every_parameter_by_the_learning_rates_share(kind):
    """Matrices and the rest alike, and less where the rate is lower."""
    transform = optimizer(OptimizerConfig(kind=kind, learning_rate=0.5, warmup=2, total=10))
    params = {"conv": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "head": {"kernel": jnp.ones((4, 4))}}
    zeros, state = jax.tree.map(jnp.zeros_like, params), transform.init(params)
    for rate in (0.0, 0.25, 0.5):
        updates, state = transform.update(zeros, state, params)
        jax.tree.map(lambda u, rate=rate: np.testing.assert_allclose(u, -rate * 0.1, rtol=1e-6), updates)


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate nan"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate 0.0"),
        (lambda: OptimizerConfig(warmup=-1), "warmup -1"),
        (lambda: OptimizerConfig(warmup=100, total=100), "total 100"),
        (lambda: OptimizerConfig(warmup=100, total=100, decay=StableDecay()), "total 100"),
        (lambda: OptimizerConfig(clip=0.0), "clip 0.0"),
        (lambda: StableDecay(0.0), "fraction 0.0"),
        (lambda: StableDecay(1.5), "fraction 1.5"),
        (lambda: AdamW(b1=1.0), "b1 1.0"),
        (lambda: AdamW(b2=-0.1), "b2 -0.1"),
        (lambda: AdamW(weight_decay=float("inf")), "weight_decay inf"),
        (lambda: Adafactor(weight_decay=-1.0), "weight_decay -1.0"),
        (lambda: Muon(momentum=2.0), "momentum 2.0"),
        (lambda: SGD(momentum=float("nan")), "momentum nan"),
    ],
)
def test_bad_settings_are_named(make, culprit):
    """The message begins with the name of the field, so that a command can say its flag."""
    with pytest.raises(ValueError, match=f"^{culprit}: must "):
        make()


@pytest.mark.parametrize("shape", [(72, 16), (16, 72), (24, 24), (1, 8), (8, 1)])
def test_orthogonal_equals_the_usual_form(shape):
    matrix = jax.random.normal(jax.random.key(0), shape)
    for x in (matrix, matrix.at[: shape[0] // 2].set(0.0), 1e-6 * matrix, jnp.zeros(shape)):
        expected = np.asarray(x, np.float64) / (np.linalg.norm(x) + 1e-8)
        for a, b, c in QUINTIC:
            gram = expected @ expected.T
            expected = a * expected + (b * gram + c * gram @ gram) @ expected
        assert np.allclose(orthogonal(x), expected, atol=2e-4)


def test_muon_equals_that_of_optax_but_for_the_first_updates():
    """optax corrects the bias of the two terms of Nesterov's momentum apart, which are not normalised here."""
    params = {"wide": jnp.ones((8, 40)), "tall": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}
    rule = Muon(weight_decay=0.1)
    theirs = optax.contrib.muon(
        0.1,
        weight_decay=0.1,
        adam_b2=0.99,
        adam_weight_decay=0.1,
        consistent_rms=rule.rms,
        muon_weight_dimension_numbers={
            "wide": optax.contrib.MuonDimensionNumbers(0, 1),
            "tall": optax.contrib.MuonDimensionNumbers((0, 1, 2), 3),
            "bias": None,
        },
    )
    rules = (rule.transform(lambda updates: 0.1), theirs)
    states = [rule.init(params) for rule in rules]
    for step in range(100):
        keys = dict(zip(params, jax.random.split(jax.random.key(step), len(params)), strict=True))
        grads = {name: jax.random.normal(keys[name], leaf.shape) for name, leaf in params.items()}
        ours, theirs = [jax.jit(rule.update)(grads, state, params) for rule, state in zip(rules, states, strict=True)]
        states = [ours[1], theirs[1]]
    for mine, optaxs in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True):
        assert jnp.allclose(mine, optaxs, atol=1e-2 * float(jnp.abs(optaxs).max()))


def test_muon_makes_matrices_orthogonal_and_leaves_the_named_layers_to_adam():
    params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}, "head": {"kernel": jnp.ones((8, 4))}}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    config = OptimizerConfig(kind=Muon(), learning_rate=0.1, warmup=0, decay=Decay.CONSTANT, clip=None)
    transform = optimizer(config)
    updates, _ = transform.update(grads, transform.init(params), params)
    before, after = (
        jnp.linalg.svd(tree["conv"]["kernel"].reshape(72, 16), compute_uv=False) for tree in (grads, updates)
    )
    assert before.max() > 2 * before.min()
    assert after.max() < 1.8 * after.min()  # Newton-Schulz brings them to between 0.7 and 1.2
    # Adam's first step (here with Nesterov's momentum) has one length and the direction of the sign.
    for name, leaf in (("head", "kernel"), ("conv", "bias")):
        steps = updates[name][leaf] / jnp.sign(grads[name][leaf])
        assert jnp.allclose(steps, steps.ravel()[0], rtol=1e-3) and float(steps.ravel()[0]) < 0
