"""Grids: ends, spacing, and what the clipped ends do to it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import EDM, CosineSchedule, RectifiedFlow, TabulatedSchedule
from jaxdiff.diffusion.time_grid import (
    Karras,
    Leading,
    Linspace,
    Respaced,
    TabulatedKarras,
    Trailing,
    UniformLogSNR,
    UniformTime,
    time_grid,
    time_grid_of,
)

SPACINGS = [UniformTime(), UniformLogSNR(), Karras()]


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize(
    "schedule", [CosineSchedule(), EDM(), RectifiedFlow(), TabulatedSchedule.scaled_linear()], ids=str
)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_steps_fall_strictly_to_the_clean_end(schedule, spacing, steps):
    points = time_grid(schedule, steps, spacing)
    assert all(values.shape == (steps + 1,) for values in points)
    assert np.all(np.diff(points.logsnr) > 0) and np.all(np.diff(points.t) < 0)
    assert points.t[-1] == 0.0 and points.logsnr[-1] == schedule.logsnr(0.0)
    assert np.all(np.isfinite(points.logsnr)) and np.all(points.alpha > 0) and np.all(points.sigma > 0)
    np.testing.assert_allclose(points.alpha, schedule.alpha(points.t))


def test_even_times():
    np.testing.assert_allclose(time_grid(CosineSchedule(), 4).t, [1.0, 0.75, 0.5, 0.25, 0.0])


def test_even_log_snr():
    points = time_grid(CosineSchedule(), 5, UniformLogSNR(-8.0, 8.0))
    np.testing.assert_allclose(points.logsnr, [-8.0, -4.0, 0.0, 4.0, 8.0, 20.0], atol=1e-4)


def test_karras_levels_on_another_schedule():
    points = time_grid(CosineSchedule(), 10, Karras())
    levels = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 10) ** 7
    np.testing.assert_allclose((points.sigma / points.alpha)[:-1], levels, rtol=1e-3)


def test_karras_on_edm_is_edm():
    np.testing.assert_allclose(time_grid(EDM(), 10, Karras()).t, time_grid(EDM(), 10).t, atol=1e-5)


def test_explicit_values_may_end_without_noise():
    points = time_grid_of(jnp.array([1.0, 0.0]), jnp.array([0.6, 1.0]), jnp.array([0.8, 0.0]))
    np.testing.assert_allclose(points.logsnr, [2 * np.log(0.75), np.inf], rtol=1e-6)


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, not {steps}"):
        time_grid(CosineSchedule(), steps)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="low < high"):
        UniformLogSNR(3.0, -3.0)
    with pytest.raises(ValueError, match="rho"):
        Karras(rho=0.0)


# Through the entries of a table


def entries(spacing, steps, table=1000):
    """Those that a grid steps through, after which the clean end must come."""
    schedule = TabulatedSchedule.cosine(table)
    points = time_grid(schedule, steps, spacing)
    assert points.t.shape == (steps + 1,) and points.t[-1] == 0.0 and np.all(np.diff(points.t) < 0)
    return [int(entry) for entry in schedule.network_time(points.t[:-1])]


def test_leading_entries():
    assert entries(Leading(), 4) == [750, 500, 250, 0]
    assert entries(Leading(), 3) == [666, 333, 0]
    assert entries(Leading(), 1) == [0]
    assert entries(Leading(), 1000) == list(range(999, -1, -1))
    assert entries(Leading(), 3, table=8) == [4, 2, 0]


def test_leading_entries_with_an_offset():
    assert entries(Leading(1), 4) == [751, 501, 251, 1]
    assert entries(Leading(7), 1) == [7]
    for steps, offset in ((1000, 1), (4, 250), (1, 1000)):
        with pytest.raises(ValueError, match=f"{steps} leading steps with an offset of {offset} end beyond 1000"):
            time_grid(TabulatedSchedule.cosine(), steps, Leading(offset))
    with pytest.raises(ValueError, match="an offset of at least 0, not -1"):
        Leading(-1)


def test_trailing_and_linspace_entries():
    """The last entry is always drawn; one step is the noisiest entry of the former, the cleanest of the latter."""
    assert entries(Trailing(), 4) == [999, 749, 499, 249]
    assert entries(Trailing(), 3) == [999, 666, 332]
    assert entries(Trailing(), 1) == [999] and entries(Linspace(), 1) == [0]
    assert entries(Linspace(), 4) == [999, 666, 333, 0]
    assert entries(Linspace(), 3) == [999, 500, 0]  # 499.5 rounds to the even one
    for spacing in (Trailing(), Linspace()):
        assert entries(spacing, 1000) == list(range(999, -1, -1))
        assert entries(spacing, 8, table=8) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("table", [37, 1000])
def test_entries_of_diffusers(table):
    """Every number of steps. For some (61 of 1000) diffusers' trailing steps have one more, at -1: not a step."""
    pytest.importorskip("torch", reason="diffusers' schedulers are PyTorch's")
    diffusers = pytest.importorskip("diffusers", reason="compared with diffusers' schedulers")
    schedule = TabulatedSchedule.cosine(table)
    for name, spacing in (("leading", Leading()), ("leading", Leading(1)), ("trailing", Trailing())):
        settings = {"timestep_spacing": name, "steps_offset": getattr(spacing, "offset", 0)}
        for kind in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
            assert_steps(kind(table, **settings), schedule, spacing)
    assert_steps(diffusers.DDIMScheduler(table, timestep_spacing="linspace"), schedule, Linspace())


def assert_steps(scheduler, schedule, spacing):
    for steps in {1, 2, 3, 7, 24, 30, 36, 48, 50, 61, 96, 100, 103, 999, schedule.steps - 1}:
        if steps < schedule.steps:
            scheduler.set_timesteps(steps)
            wanted = [entry for entry in scheduler.timesteps.tolist() if entry >= 0]
            assert spacing.entries(schedule.steps, steps)[::-1].tolist() == wanted, (spacing, steps)


def test_entries_without_the_cleanest():
    """One more, of which the cleanest is left out, as in diffusers' DPM-Solver."""
    assert entries(Leading(1, skip_cleanest=True), 4) == [801, 601, 401, 201]
    assert entries(Leading(1, skip_cleanest=True), 1) == [501]
    assert entries(Linspace(skip_cleanest=True), 4) == [999, 749, 500, 250]
    assert entries(Linspace(skip_cleanest=True), 1) == [999]
    for steps, spacing in ((1000, Leading(skip_cleanest=True)), (499, Leading(2, skip_cleanest=True))):
        with pytest.raises(ValueError, match=f"{steps} leading steps with an offset of {spacing.offset} end beyond"):
            time_grid(TabulatedSchedule.cosine(), steps, spacing)


def test_entries_between():
    """σ/α is interpolated linearly, where the schedule interpolates log ᾱ; at entries the two agree."""
    schedule = TabulatedSchedule.scaled_linear()
    points = time_grid(schedule, 3, Linspace(rounded=False))
    np.testing.assert_allclose(schedule.network_time(points.t), [999, 499.5, 0, -1], atol=1e-4)
    at = lambda entry: np.exp(-0.5 * schedule.logsnr(schedule.time(float(entry))))  # noqa: E731
    ratios = [at(999), (at(499) + at(500)) / 2, at(0), np.exp(-10)]
    np.testing.assert_allclose(points.sigma / points.alpha, ratios, rtol=1e-5)
    np.testing.assert_allclose(points.alpha**2 + points.sigma**2, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "spacing", [Leading(1, to_first_entry=True), Trailing(True), Linspace(to_first_entry=True)], ids=str
)
def test_grids_that_end_at_the_first_entry(spacing):
    schedule = TabulatedSchedule.scaled_linear()
    for each in (spacing, TabulatedKarras(to_first_entry=True)):
        points = time_grid(schedule, 4, each)
        assert schedule.network_time(points.t[-1]) == 0
        assert points.sigma[-1] == pytest.approx(0.00085**0.5, rel=1e-4)


def test_karras_between_entries():
    """σ/α are those of the formula; the network's times lie near them, or are the nearest entries."""
    schedule = TabulatedSchedule.scaled_linear()
    table = np.asarray(schedule.alpha_bar)
    ratios = np.sqrt((1 - table) / table)
    for spacing, last, first in (
        (TabulatedKarras(rounded=True), 0, 999),
        (TabulatedKarras(Leading(1)), 1, 801),
        (TabulatedKarras(Trailing(), rho=5.0), 199, 999),
    ):
        points = time_grid(schedule, 5, spacing)
        wanted = np.linspace(*(ratios[[first, last]] ** (1 / spacing.rho)), 5) ** spacing.rho
        np.testing.assert_allclose((points.sigma / points.alpha)[:-1], wanted, rtol=1e-5)
        seen = np.asarray(schedule.network_time(points.t[:-1]))
        np.testing.assert_allclose(np.interp(seen, np.arange(1000), ratios), wanted, rtol=5e-3)
        assert np.all(seen == seen.round()) == spacing.rounded and seen[0] == first and seen[-1] == last
    with pytest.raises(ValueError, match="to_first_entry is a setting of TabulatedKarras itself"):
        TabulatedKarras(Leading(to_first_entry=True))
    with pytest.raises(ValueError, match="a finite rho above 0, not 0"):
        TabulatedKarras(rho=0.0)


def test_respaced_entries():
    """Each part from its first entry to its last, and one entry of a part is its first."""
    assert entries(Respaced((4,)), 4) == [999, 666, 333, 0]
    assert entries(Respaced((3, 2)), 5) == [999, 500, 499, 250, 0]  # 249.5 rounds to the even one
    assert entries(Respaced((1, 1)), 2) == [500, 0]
    assert entries(Respaced((2, 1, 1)), 4, table=8) == [6, 3, 2, 0]  # parts of 3, 3 and 2 entries
    assert entries(Respaced((3, 2), offset=2), 5) == [997, 500, 499, 250, 0]
    assert Respaced((3, 2)).steps == 5
    assert entries(Respaced((1000,)), 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize(
    "spacing", [Leading(), Trailing(), Linspace(), Linspace(False), TabulatedKarras(), Respaced((2, 3))]
)
def test_a_table_is_needed(spacing):
    with pytest.raises(ValueError, match="the table of a discrete schedule, not Cosine"):
        time_grid(CosineSchedule(), 5, spacing)
    with pytest.raises(ValueError, match="5 steps, but the schedule has 4"):
        time_grid(TabulatedSchedule.cosine(4), 5, spacing)


def test_steps_that_no_respacing_has():
    for steps in (4, 6):
        with pytest.raises(ValueError, match=f"this respacing has 5 steps, not {steps}"):
            time_grid(TabulatedSchedule.cosine(), steps, Respaced((2, 3)))
    with pytest.raises(ValueError, match="cannot take 7 entries out of 5"):
        time_grid(TabulatedSchedule.cosine(10), 8, Respaced((1, 7)))
    for counts, offset in (((), 0), ((2, 0), 0), ((2, -1), 0), ((2, 2), -1)):
        with pytest.raises(ValueError, match="counts of at least 1 and an offset of at least 0"):
            Respaced(counts, offset)
