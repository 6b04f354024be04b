"""Time samplers: densities against closed forms, range, order, tables, and the numbers of the shipped presets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff.diffusion.schedules import (
    EDM,
    CosineSchedule,
    LinearBetaSchedule,
    RectifiedFlow,
    TabulatedSchedule,
    time_of,
)
from jaxdiff.diffusion.time_samplers import LogitNormalTimes, LogNormalTimes, LogSNRRange, TimeSampler, UniformTimes
from jaxdiff.systems import imagen_tiny

SCHEDULES = [CosineSchedule(-1.0), LinearBetaSchedule(), EDM(), RectifiedFlow(), TabulatedSchedule.cosine()]
RANGE = LogSNRRange(-2.5, 3.0)
MONOTONE = [UniformTimes(), RANGE, LogNormalTimes(), LogitNormalTimes(-0.5, 1.5)]
NESTED = LogSNRRange(-6.0, 2.0, 0.75, rest=LogSNRRange(-11.0, 4.0))
SAMPLERS = [*MONOTONE, NESTED, LogSNRRange(-2.0, 1.0, 0.3, rest=LogNormalTimes())]
U = (jnp.arange(40_000) + 0.5) / 40_000

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


def assert_density(values, distribution_function, bins):
    """The fraction of the values in each bin is that of the closed form, to the resolution of U."""
    fractions = np.histogram(values, bins)[0] / len(values)
    np.testing.assert_allclose(fractions, np.diff(distribution_function(bins)), atol=3e-4)


@each_schedule
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_times_lie_in_range_even_at_the_ends_and_rise(sampler, schedule):
    """They rise with the uniform number, but from a range to the rest."""
    assert isinstance(sampler, TimeSampler)
    below_1 = np.nextafter(np.float32(1), np.float32(0))
    u = jnp.asarray([0.0, 1e-38, 1e-7, *np.linspace(0.001, 0.999, 201), below_1, 1.0], jnp.float32)
    t = sampler.times(u, schedule)
    assert t.dtype == jnp.float32 and np.all((t >= 0) & (t <= 1))
    if sampler in MONOTONE:
        assert np.all(np.diff(t) >= -2e-7)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_float32_whatever_the_network_computes_in(sampler):
    assert sampler.times(jnp.zeros((2, 3), jnp.bfloat16), RectifiedFlow()).dtype == jnp.float32


def test_uniform_times_are_the_uniform_numbers():
    for schedule in SCHEDULES[:-1]:
        np.testing.assert_array_equal(UniformTimes().times(U, schedule), U)


@pytest.mark.parametrize("schedule", [EDM(), CosineSchedule(1.0)], ids=["edm", "cosine"])
def test_log_normal_noise(schedule):
    """log s = −λ/2 is normal, whatever the schedule, where it has that noise."""
    t = LogNormalTimes(-1.2, 1.2).times(U, schedule)
    log_s = -0.5 * schedule.logsnr(t)
    assert_density(log_s, stats.norm(-1.2, 1.2).cdf, np.linspace(-5.0, 3.0, 33))
    assert stats.norm(-1.2, 1.2).cdf(-6.0) > 2e-5  # some of it lies beyond the clean end of EDM, 0.002
    assert t[0] < 0.02


def test_log_normal_noise_has_a_closed_form_for_edm():
    """t = (s^(1/ρ) − s_min^(1/ρ))/(s_max^(1/ρ) − s_min^(1/ρ)) of log s = mean + std Φ⁻¹(u)."""
    u = np.linspace(0.001, 0.999, 999)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    wanted = (np.exp((-1.2 + 1.2 * stats.norm.ppf(u)) / 7) - low) / (high - low)
    np.testing.assert_allclose(LogNormalTimes().times(jnp.asarray(u, jnp.float32), EDM()), wanted, atol=2e-6)


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (0.5, 0.6), (-1.0, 1.5)])
def test_logit_normal_times(mean, std):
    """The density of Stable Diffusion 3, Eq. 19, integrated over bins; the median is sigmoid(mean)."""
    t = np.asarray(LogitNormalTimes(mean, std).times(U, RectifiedFlow()))
    bins = np.linspace(0.02, 0.98, 25)
    fine = np.linspace(bins[0], bins[-1], 24 * 200 + 1)
    logit = np.log(fine / (1 - fine))
    density = np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi) * fine * (1 - fine))
    panels = (density[1:] + density[:-1]) / 2 * np.diff(fine)
    fractions = np.histogram(t, bins)[0] / len(t)
    np.testing.assert_allclose(fractions, panels.reshape(24, 200).sum(axis=1), atol=3e-4)
    assert np.median(t) == pytest.approx(1 / (1 + np.exp(-mean)), abs=1e-4)


@each_schedule
def test_a_range_is_even_in_log_snr(schedule):
    logsnr = schedule.logsnr(RANGE.times(jnp.linspace(0.0, 1.0, 101), schedule))
    step = 0.0  # of a table: an entry may lie one below
    if isinstance(schedule, TabulatedSchedule):
        step = np.abs(np.diff(schedule.logsnr(jnp.arange(1, 1001) / 1000)))[100:900].max()
    wanted = np.linspace(3.0, -2.5, 101)
    assert np.all(logsnr <= wanted + 1e-3) and np.all(logsnr >= wanted - 1e-3 - step)


def test_a_fraction_in_the_range_and_the_rest_elsewhere():
    schedule, sampler = CosineSchedule(), LogSNRRange(-2.5, 3.0, 0.75)
    t = sampler.times(U, schedule)
    np.testing.assert_allclose(t[:30_000], RANGE.times(U[:30_000] / 0.75, schedule), atol=2e-6)
    np.testing.assert_allclose(t[30_000:], (U[30_000:] - 0.75) / 0.25, atol=2e-6)
    uniform_logsnr = stats.uniform(-2.5, 5.5).cdf

    def mixture(logsnr):  # cosine: t = (2/π) atan(e^(−λ/2)), whose distribution in λ falls with t
        return 0.75 * uniform_logsnr(logsnr) + 0.25 * (1.0 - 2 / np.pi * np.arctan(np.exp(-logsnr / 2)))

    assert_density(schedule.logsnr(t), mixture, np.linspace(-6.0, 6.0, 25))


def test_ranges_nest():
    """Three quarters by the outer range, the last quarter as the inner one alone would have it."""
    schedule = CosineSchedule(-2.5)
    t = NESTED.times(U, schedule)
    logsnr = schedule.logsnr(t)
    outer, inner = stats.uniform(-6.0, 8.0).cdf, stats.uniform(-11.0, 15.0).cdf
    assert_density(logsnr, lambda x: 0.75 * outer(x) + 0.25 * inner(x), np.linspace(-11.0, 4.0, 31))
    alone = NESTED.rest.times((U[30_000:] - 0.75) / 0.25, schedule)
    np.testing.assert_allclose(t[30_000:], alone, atol=2e-6)


def test_uniform_times_take_each_entry_equally_often():
    for steps in (10, 1000):
        table = TabulatedSchedule.linear(steps)
        timesteps = np.asarray(table.network_time(UniformTimes().times(U, table)))
        np.testing.assert_array_equal(np.bincount(timesteps.astype(int)), np.full(steps, len(U) // steps))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_table_is_trained_at_its_entries(sampler):
    table = TabulatedSchedule.cosine()
    timesteps = np.asarray(table.network_time(sampler.times(U[::37], table)))
    np.testing.assert_array_equal(timesteps, np.round(timesteps))
    assert timesteps.min() >= 0 and timesteps.max() <= 999


@pytest.mark.parametrize(
    "sampler,schedule,wanted",
    [
        (NESTED, CosineSchedule(-2.5), [0.1218445, 0.28039277, 0.5433676, 0.78080344, 0.062053643, 0.9562018]),
        (
            imagen_tiny.BASE_64_TINY.time_sampler,
            imagen_tiny.BASE_64_TINY.schedule,
            [0.057954296, 0.1963669, 0.53375685, 0.83948123, 0.9530957, 0.98653936],
        ),
        (
            imagen_tiny.BASE_32_TINY.time_sampler,
            imagen_tiny.BASE_32_TINY.schedule,
            [0.057954296, 0.1963669, 0.53375685, 0.83948123, 0.9530957, 0.98653936],
        ),
    ],
    ids=["base64", "BASE_64_TINY", "BASE_32_TINY"],
)
def test_the_times_that_shipped_weights_were_trained_at(sampler, schedule, wanted):
    """Bit for bit on the machine that wrote them; two compilers may differ in the last place."""
    u = (jnp.arange(1, 12, 2, dtype=jnp.float32) + 0.37) / 12
    for times in (sampler.times, jax.jit(sampler.times, static_argnums=1)):
        np.testing.assert_allclose(times(u, schedule), np.asarray(wanted, np.float32), atol=2e-7)


def test_a_static_value_under_jit():
    for sampler in SAMPLERS:
        assert hash(sampler) == hash(type(sampler)(**vars(sampler)))
    times = jax.jit(lambda sampler, u: sampler.times(u, CosineSchedule()), static_argnums=0)
    np.testing.assert_allclose(times(NESTED, U[::4000]), NESTED.times(U[::4000], CosineSchedule()), atol=1e-6)


def test_the_inverse_serves_infinite_log_snr():
    np.testing.assert_array_equal(time_of(CosineSchedule(), jnp.asarray([jnp.inf, -jnp.inf])), [0.0, 1.0])


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: LogSNRRange(1.0, -1.0), "low < high"),
        (lambda: LogSNRRange(-1.0, float("inf")), "low < high"),
        (lambda: LogSNRRange(-1.0, 1.0, fraction=0.0), "fraction"),
        (lambda: LogSNRRange(-1.0, 1.0, fraction=1.1), "fraction"),
        (lambda: LogNormalTimes(std=0.0), "std > 0"),
        (lambda: LogNormalTimes(mean=float("nan")), "finite mean"),
        (lambda: LogitNormalTimes(std=float("inf")), "std > 0"),
    ],
)
def test_settings_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
