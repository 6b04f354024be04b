"""Schedules: ends, monotony, closed forms, the tables, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.losses import MinSNR, UniformWeighting, diffusion_loss
from jaxdiff.diffusion.parameterization import Prediction, target
from jaxdiff.diffusion.schedules import (
    EDM,
    CosineSchedule,
    LinearBetaSchedule,
    RectifiedFlow,
    Schedule,
    TabulatedSchedule,
    time_of,
)

SCHEDULES = [
    CosineSchedule(),
    CosineSchedule.shifted(256),
    LinearBetaSchedule(),
    EDM(),
    RectifiedFlow(),
    RectifiedFlow(shift=-1.0),
    TabulatedSchedule.linear(),
    TabulatedSchedule.scaled_linear(),
    TabulatedSchedule.cosine(),
]
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{type(s).__name__}{SCHEDULES.index(s)}")


@every
def test_falls_from_clean_to_noise_within_the_clip(schedule):
    assert isinstance(schedule, Schedule)
    t = jnp.linspace(0.0, 1.0, 1001)
    logsnr, alpha, sigma = schedule.logsnr(t), schedule.alpha(t), schedule.sigma(t)
    assert np.all(np.diff(logsnr) <= 0) and np.all(np.diff(logsnr[5:-5]) < 0)
    assert np.all(np.diff(alpha) <= 0) and np.all(np.diff(sigma) >= 0)
    assert np.all(np.abs(logsnr) <= 20.0) and np.all(alpha > 0) and np.all(sigma > 0)
    assert alpha[0] > 0.999 and sigma[0] < 0.0021 and alpha[-1] < 0.07 and sigma[-1] > 0.997
    np.testing.assert_allclose(2 * (jnp.log(alpha) - jnp.log(sigma)), logsnr, atol=1e-4)


@every
def test_sum_of_squares_or_of_values_is_one(schedule):
    t = jnp.linspace(0.0, 1.0, 101)
    power = 1 if isinstance(schedule, RectifiedFlow) else 2
    np.testing.assert_allclose(schedule.alpha(t) ** power + schedule.sigma(t) ** power, 1.0, atol=2e-6)


@every
def test_clip_is_a_setting(schedule):
    clipped = type(schedule)(**{**{f: getattr(schedule, f) for f in schedule.__dataclass_fields__}, "clip": 3.0})
    ends = clipped.logsnr(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(ends, [3.0, -3.0])
    inside = jnp.abs(schedule.logsnr(jnp.linspace(0, 1, 101))) < 3.0
    t = jnp.linspace(0, 1, 101)[inside]
    np.testing.assert_array_equal(clipped.logsnr(t), schedule.logsnr(t))


def test_cosine_is_a_quarter_turn():
    t = jnp.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(CosineSchedule().alpha(t), np.cos(np.pi * np.asarray(t) / 2), atol=1e-6)
    np.testing.assert_allclose(CosineSchedule().sigma(t), np.sin(np.pi * np.asarray(t) / 2), atol=1e-6)


def test_shift_is_that_of_the_resolution():
    """Averaging 256 → 64 pixels multiplies the SNR by 16; the shift takes that back."""
    t = jnp.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(
        CosineSchedule.shifted(256).logsnr(t) + np.log(16.0), CosineSchedule().logsnr(t), atol=1e-5
    )
    assert CosineSchedule.shifted(64) == CosineSchedule()


@pytest.mark.parametrize("start,end", [(1e-4, 0.02), (1e-3, 0.01)])
def test_continuous_linear_is_the_table_at_its_entries(start, end):
    continuous, table = LinearBetaSchedule(start, end), TabulatedSchedule.linear(1000, start, end)
    t = (jnp.arange(1000) + 1.0) / 1000
    np.testing.assert_allclose(continuous.logsnr(t), table.logsnr(t), atol=1e-3)
    np.testing.assert_allclose(continuous.alpha(t) ** 2, np.asarray(table.alpha_bar), atol=2e-4)


def test_edm_noise_levels_are_those_of_its_equation():
    t = jnp.linspace(0.0, 1.0, 11)
    s = (0.002 ** (1 / 7) + np.linspace(0, 1, 11) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    np.testing.assert_allclose(EDM().sigma(t) / EDM().alpha(t), s, rtol=1e-4)


def test_rectified_flow_is_a_straight_path():
    t = jnp.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(RectifiedFlow().alpha(t), 1.0 - t, atol=1e-6)
    scale = 3.0  # Stable Diffusion 3 moves t to s t/(1 + (s − 1) t)
    moved = scale * t / (1 + (scale - 1) * t)
    np.testing.assert_allclose(RectifiedFlow(shift=-2 * np.log(scale)).sigma(t), moved, atol=1e-6)


@pytest.mark.parametrize("table", SCHEDULES[-3:], ids=["linear", "scaled", "cosine"])
def test_discrete_entries_and_timesteps(table):
    timesteps = jnp.arange(0.0, 1000.0)
    t = table.time(timesteps)
    np.testing.assert_allclose(table.network_time(t), timesteps, atol=1e-3)
    kept = np.asarray(table.alpha_bar) > 1e-8  # beyond lies the clip
    np.testing.assert_allclose((table.alpha(t) ** 2)[kept], np.asarray(table.alpha_bar)[kept], rtol=1e-3)
    between = table.alpha(table.time(timesteps[:-1] + 0.5))
    assert np.all(between < table.alpha(t)[:-1]) and np.all(between > table.alpha(t)[1:])


@pytest.mark.parametrize("table", SCHEDULES[-3:], ids=["linear", "scaled", "cosine"])
def test_networks_are_told_whole_entries(table):
    """Bit-equal to the integers that they were trained with, from times as grids and training have them."""
    timesteps = np.arange(1000.0)
    np.testing.assert_array_equal(table.network_time(table.time(jnp.asarray(timesteps, jnp.float32))), timesteps)
    np.testing.assert_array_equal(jax.jit(lambda i: table.network_time(table.time(i)))(timesteps), timesteps)
    within = table.entry_time(jnp.asarray((timesteps + 0.5) / 1000, jnp.float32))
    np.testing.assert_array_equal(table.network_time(within), timesteps)
    np.testing.assert_allclose(table.network_time(table.time(jnp.asarray([0.5, 20.25]))), [0.5, 20.25], atol=1e-3)
    assert table.network_time(jnp.zeros(())) == -1.0


def test_levels_of_noise():
    """A share of a table's entries; for a continuous schedule it is the time itself."""
    table = TabulatedSchedule.cosine()
    found = table.network_time(table.level_time(jnp.asarray([0.0, 0.25, 0.2504, 0.999, 1.0])))
    np.testing.assert_array_equal(found, [0, 250, 250, 999, 999])
    small = TabulatedSchedule.cosine(8)
    np.testing.assert_array_equal(small.network_time(small.level_time(jnp.asarray([0.0, 0.5, 1.0]))), [0, 4, 7])
    level = jnp.linspace(0.0, 1.0, 11)
    for schedule in (CosineSchedule(), LinearBetaSchedule(), EDM(), RectifiedFlow()):
        np.testing.assert_array_equal(schedule.level_time(level), level)
        np.testing.assert_allclose(schedule.network_time(level), 1000.0 * level)


def test_published_ends_of_the_tables():
    """ᾱ_999: DDPM's 4.0358e-05, Stable Diffusion's 0.0047 (scaled linear)."""
    assert TabulatedSchedule.linear().alpha_bar[-1] == pytest.approx(4.0358e-05, rel=1e-3)
    assert TabulatedSchedule.scaled_linear().alpha_bar[-1] == pytest.approx(0.00466, rel=2e-3)
    assert TabulatedSchedule.cosine().alpha_bar[499] == pytest.approx(
        np.cos((0.508 / 1.008) * np.pi / 2) ** 2, rel=1e-3
    )


@every
def test_inverse(schedule):
    t = jnp.linspace(0.02, 0.98, 49)
    np.testing.assert_allclose(time_of(schedule, schedule.logsnr(t)), t, atol=2e-5)
    np.testing.assert_array_equal(time_of(schedule, jnp.array([25.0, -25.0])), [0.0, 1.0])


def test_entries_of_times():
    """The entry whose step holds t, half open; a continuous schedule keeps t."""
    t = jnp.asarray([0.0, 0.1, 0.25, 0.3, 0.5, 0.99, 1.0])
    np.testing.assert_array_equal(TabulatedSchedule.linear(4).entry_time(t), [0.25, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0])
    for schedule in (CosineSchedule(), LinearBetaSchedule(), EDM(), RectifiedFlow()):
        np.testing.assert_array_equal(schedule.entry_time(t), t)


@every
def test_float32_whatever_the_network_computes_in(schedule):
    for function in (schedule.logsnr, schedule.alpha, schedule.sigma, schedule.entry_time):
        assert function(jnp.linspace(0.0, 1.0, 5, dtype=jnp.bfloat16)).dtype == jnp.float32


@every
def test_a_static_value_under_jit(schedule):
    twice = jax.jit(lambda s, t: s.alpha(t), static_argnums=0)
    assert hash(schedule) == hash(type(schedule)(*(getattr(schedule, f) for f in schedule.__dataclass_fields__)))
    np.testing.assert_allclose(twice(schedule, jnp.array([0.3])), schedule.alpha(jnp.array([0.3])), rtol=1e-5)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: CosineSchedule(clip=0.0), "clip"),
        (lambda: CosineSchedule(shift=float("nan")), "shift must be finite"),
        (lambda: LinearBetaSchedule(beta_start=0.1, beta_end=0.01), "beta_start"),
        (lambda: EDM(sigma_min=1.0, sigma_max=0.5), "sigma_min"),
        (lambda: EDM(rho=0.0), "rho"),
        (lambda: TabulatedSchedule((0.5, 0.6)), "alpha_bar"),
        (lambda: TabulatedSchedule.linear(1), "at least 2 steps"),
    ],
)
def test_settings_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", [TabulatedSchedule.scaled_linear(), TabulatedSchedule.cosine(100)])
def test_zero_terminal_snr(table):
    """√ᾱ of the first entry and the ratios of differences are kept; the last entry is noise, within the clip."""
    rescaled = table.zero_terminal_snr()
    before, after = (np.sqrt(each.alpha_bar) for each in (table, rescaled))
    assert after[0] == pytest.approx(before[0], rel=1e-12) and after[-1] == pytest.approx(np.exp(-10), rel=1e-4)
    wanted = np.diff(before[:-1]) / (before[0] - before[-1]) * before[0]
    np.testing.assert_allclose(np.diff(after[:-1]), wanted, rtol=1e-6)
    assert rescaled.logsnr(1.0) == pytest.approx(-20.0, rel=1e-5)
    assert table.zero_terminal_snr(2.0**-24).alpha_bar[-1] == 2.0**-24
    with pytest.raises(ValueError, match="decreasing alpha_bar"):
        table.zero_terminal_snr(0.5)


def test_zero_terminal_snr_of_diffusers():
    pytest.importorskip("torch", reason="diffusers' schedulers are PyTorch's")
    diffusers = pytest.importorskip("diffusers", reason="compared with diffusers' schedulers")
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = diffusers.DDIMScheduler(**settings, rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    ours = TabulatedSchedule.scaled_linear().zero_terminal_snr().alpha_bar
    np.testing.assert_allclose(np.sqrt(ours[:-1]), np.sqrt(theirs[:-1]), rtol=1e-3, atol=1e-6)
    assert theirs[-1] == 0.0


def test_v_training_at_zero_terminal_snr():
    """At the last entry the target is −x₀ and every weighting's loss is finite."""
    schedule = TabulatedSchedule.scaled_linear().zero_terminal_snr()
    alpha, sigma = schedule.alpha(jnp.ones(2)), schedule.sigma(jnp.ones(2))
    x0, eps = jnp.asarray([[0.7, -1.0], [0.1, 0.2]]), jnp.asarray([[1.0, -2.0], [0.0, 0.5]])
    np.testing.assert_allclose(target(Prediction.V, x0, eps, alpha, sigma), -x0, atol=1e-4)
    for weighting in (UniformWeighting(), MinSNR(floor=1.0)):
        loss = diffusion_loss(jnp.zeros_like(x0), Prediction.V, x0, eps, alpha, sigma, weighting)
        np.testing.assert_allclose(loss, jnp.mean(x0**2, axis=1), rtol=1e-3)
