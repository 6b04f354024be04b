"""Numbers of guidance, thresholding and augmentation that jax traces: one program for all values, the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.augmentation import augment
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.noise import sample_keys
from jaxdiff.diffusion.numbers import is_plain
from jaxdiff.diffusion.schedules import CosineSchedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold

COND, UNCOND = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 3)) * jnp.array([0.1, 1.0, 8.0]).reshape(3, 1, 1, 1)
LOGSNR = jnp.array([-3.0, 0.0, 4.0])
RANDOM = np.random.default_rng(0)


def guided(guidance):
    return guidance.apply(COND, UNCOND, LOGSNR)


def guided_by_weights(guidance):
    return guidance.apply(COND, UNCOND, LOGSNR, jnp.array([0.5, 1.0, 6.0]))


def thresholded(thresholding):
    return thresholding.apply(COND)


def augmented(level):
    levels = jnp.full(3, level, jnp.float32)
    return augment(COND, levels, sample_keys(jax.random.key(1), jnp.arange(3)), TabulatedSchedule.cosine())


def _guidance(with_interval):
    low, high = sorted(RANDOM.uniform(-6.0, 6.0, 2).tolist())
    interval = (low, high) if with_interval else None
    return Guidance(RANDOM.uniform(-1.0, 12.0), interval, RANDOM.choice([0.0, RANDOM.uniform()]).item())


def _dynamic(with_cap):
    return DynamicThreshold(RANDOM.uniform(0.5, 1.0), RANDOM.uniform(1.0, 4.0) if with_cap else None)


@pytest.mark.parametrize(
    "function,values",
    [
        (guided, lambda: _guidance(False)),
        (guided, lambda: _guidance(True)),
        (guided_by_weights, lambda: _guidance(True)),
        (thresholded, lambda: _dynamic(False)),
        (thresholded, lambda: _dynamic(True)),
        (augmented, lambda: RANDOM.uniform()),
    ],
    ids=["guidance", "interval", "weights", "dynamic", "cap", "augmentation"],
)
def test_one_program_for_all_values_and_the_results_of_plain_numbers(function, values):
    traces = []

    @jax.jit
    def traced(value):
        traces.append(value)
        return function(value)

    chosen = [values() for _ in range(100)]
    results = [traced(value) for value in chosen]
    assert len(traces) == 1
    for value, result in list(zip(chosen, results))[::25]:
        plain = jax.jit(lambda value=value: function(value))()
        np.testing.assert_allclose(result, plain, rtol=1e-6, atol=1e-6 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize("interval", [None, (-20.0, 3.0)])
def test_the_numbers_at_which_plain_ones_take_a_shorter_way(interval):
    """Weight 1 and rescale 0: exactly the conditional prediction, and exactly that without a rescale."""
    traced = jax.jit(guided)
    np.testing.assert_array_equal(traced(Guidance(1.0, interval)), COND)
    np.testing.assert_array_equal(traced(Guidance(1.0, interval, 0.7)), COND)
    np.testing.assert_array_equal(traced(Guidance(3.0, interval)), jax.jit(lambda: guided(Guidance(3.0, interval)))())


@pytest.mark.parametrize("percentile", [0.0, 0.25, 0.5, 0.9925, 0.995, 1.0])
def test_a_traced_percentile_is_numpys(percentile):
    """At order statistics and between them; `values` counts up, so that a percentile is its own position."""
    values = np.arange(201.0, dtype=np.float32)
    x0 = jnp.asarray(RANDOM.permutation(values).reshape(1, 201))
    scale = max(np.quantile(values, percentile), 1.0)
    got = jax.jit(lambda p: DynamicThreshold(p).apply(x0))(jnp.float32(percentile))
    np.testing.assert_allclose(got, np.clip(x0, -scale, scale) / scale, rtol=1e-6)


def test_a_traced_percentile_of_millions():
    """3 · 1024² values, whose positions float32 knows to a quarter: 0 and then 0, 1, …, 19999. The fraction itself, in
    float32, is 0.015 of a position off."""
    count = 3 * 1024**2
    x0 = jnp.concatenate([jnp.zeros(count - 20_000), jnp.arange(20_000.0)]).reshape(1, -1)
    scale = 0.995 * (count - 1) - (count - 20_000)
    got = jax.jit(lambda thresholding: thresholding.apply(x0)[0, -20_000:])(DynamicThreshold())
    np.testing.assert_allclose(got, np.minimum(np.arange(20_000) / scale, 1.0), rtol=5e-6)


def test_a_number_for_each_sample():
    guidance = Guidance(jnp.array([0.0, 2.0, 5.0]), (jnp.array([-9.0, 1.0, -9.0]), jnp.array([9.0, 9.0, 3.0])), 0.5)
    plain = [Guidance(0.0, (-9.0, 9.0), 0.5), Guidance(2.0, (1.0, 9.0), 0.5), Guidance(5.0, (-9.0, 3.0), 0.5)]
    rescaled = Guidance(3.0, rescale=jnp.array([0.0, 0.5, 1.0]))
    dynamic = DynamicThreshold(jnp.array([0.6, 0.9, 1.0]), jnp.array([4.0, 1.5, 3.0]))
    for i, (percentile, cap) in enumerate([(0.6, 4.0), (0.9, 1.5), (1.0, 3.0)]):
        np.testing.assert_array_equal(guided(guidance)[i], guided(plain[i])[i])
        np.testing.assert_array_equal(guided(rescaled)[i], guided(Guidance(3.0, rescale=0.5 * i))[i])
        each = DynamicThreshold(percentile, cap).apply(COND[i : i + 1])[0]
        np.testing.assert_allclose(dynamic.apply(COND)[i], each, rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_weight():
    """d/dw Σ (w c + (1 − w) u) = Σ (c − u), inside the interval."""
    slope = jax.grad(lambda guidance: guided(guidance).sum())(Guidance(3.0, (-5.0, 1.0)))
    assert float(slope.weight) == pytest.approx(float((COND - UNCOND)[:2].sum()), rel=1e-4)


def test_leaves_and_structure():
    assert jax.tree.leaves(Guidance(2.0, (-1.0, 3.0), 0.5)) == [2.0, -1.0, 3.0, 0.5]
    assert jax.tree.leaves(Guidance(2.0)) == [2.0, 0.0]
    assert jax.tree.leaves(DynamicThreshold(0.9, 1.5)) == [0.9, 1.5] and jax.tree.leaves(DynamicThreshold()) == [0.995]
    assert jax.tree.leaves(NoThreshold()) == [] and jax.tree.leaves(StaticThreshold()) == [1.0]
    structures = [jax.tree.structure(each) for each in (NoThreshold(), StaticThreshold(), DynamicThreshold())]
    assert not any(a == b for i, a in enumerate(structures) for b in structures[:i])
    assert structures[0] == jax.tree.structure(NoThreshold())
    assert [str(path[0]) for path, _ in jax.tree.leaves_with_path(Guidance(2.0))] == [".weight", ".rescale"]
    for settings in (Guidance(2.0, (-1.0, 3.0), 0.5), Guidance(), DynamicThreshold(0.9, 1.5), StaticThreshold()):
        back = jax.tree.unflatten(jax.tree.structure(settings), jax.tree.leaves(settings))
        assert back == settings and hash(back) == hash(settings)


def test_on_is_known_of_plain_numbers_alone():
    assert not Guidance(1.0).on and Guidance(1.5).on
    assert Guidance(jnp.float32(1.0)).on is True
    assert jax.jit(lambda guidance: jnp.asarray(guidance.on))(Guidance(1.0))


@pytest.mark.parametrize("placeholder", [None, object()], ids=["none", "object"])
def test_placeholders_are_not_checked(placeholder):
    """jax builds pytrees from them too."""
    for settings in (Guidance(2.0, (-1.0, 3.0), 0.5), DynamicThreshold(0.9, 1.5)):
        found = jax.tree.map(lambda _: placeholder, settings)
        assert type(found) is type(settings) and set(vars(found).values()) <= {placeholder, (placeholder, placeholder)}
    assert not is_plain(placeholder) and not is_plain(jnp.float32(1.0)) and is_plain(1.0) and is_plain(1)


def test_arrays_may_be_given_and_plain_numbers_beside_them_are_checked():
    weight = jnp.float32(2.0)
    assert Guidance(weight, (weight, -5.0)).weight is weight and DynamicThreshold(weight).percentile is weight
    with pytest.raises(ValueError, match="rescale"):
        Guidance(weight, rescale=2.0)
    with pytest.raises(ValueError, match="cap"):
        DynamicThreshold(weight, cap=-1.0)


def test_a_continuous_level_is_traced_too():
    level, schedule = jnp.float32(0.3), CosineSchedule()
    np.testing.assert_array_equal(jax.jit(schedule.level_time)(level), schedule.level_time(level))
