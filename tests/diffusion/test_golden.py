"""The sums that diffusers' own scheduler tests assert, reached through our grids, tables and samplers.

Every one of them starts from x = (0, 1, …, 767)/768 laid out as `_start` does, asks a "network" x·n/(n + 1) of the
integer (or fractional) timestep n, takes ten steps, and asserts the sum or the mean of |x|. β is linear from 1e-4 to
0.02 unless said otherwise. Beside each number stands the configuration that its test has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import noise, samplers, thresholding, time_grid
from jaxdiff.diffusion.parameterization import Prediction, denoised, noised
from jaxdiff.diffusion.schedules import EDM, TabulatedSchedule

STEPS = 10
UNTHRESHOLDED = thresholding.NoThreshold()


def _layout(values):
    """(4, 3, 8, 8), the batch axis varying fastest."""
    return jnp.asarray(values.reshape(3, 8, 8, 4).transpose(3, 0, 1, 2), jnp.float32)


def _start():
    return _layout(np.arange(768) / 768)


def _network(x, timestep):
    return x * timestep / (timestep + 1.0)


def _keys(x):
    return noise.sample_keys(jax.random.key(0), jnp.arange(x.shape[0]))


def _run(sampler, grid, schedule, x, prediction=Prediction.EPSILON, threshold=UNTHRESHOLDED):
    """The network sees the timestep of the point's t; ε stays its own when x₀ is thresholded, as in diffusers."""

    def denoise(x, point):
        output = _network(x, schedule.network_time(point.t))
        found = denoised(prediction, output, x, point.alpha, point.sigma)
        return found._replace(x0=threshold.apply(found.x0))

    steps = grid.t.shape[0] - 1
    final = jax.jit(lambda x: samplers.integrate(sampler, denoise, sampler.init(x), grid, _keys(x), 0, steps))(x)
    return float(jnp.sum(jnp.abs(sampler.image(final))))


def _run_shrinking(sampler, grid, schedule, x, prediction=Prediction.EPSILON):
    """As `_run`, with the quirk of diffusers' Euler and Heun tests: what `scale_model_input` returns replaces the
    sample itself, so that, in their scaling y = x/α, the state shrinks by α before every evaluation.

    Before step i that makes x into α x, and y is what the network sees. For Heun's second evaluation y shrinks as well,
    but only to find the derivative there.
    """

    @jax.jit
    def step(x, i):
        def denoise(x, point):
            first, alpha, sigma = point.t == grid.t[i], point.alpha, point.sigma
            shrunk = jnp.where(first, x, alpha * x)
            output = _network(shrunk / alpha, schedule.network_time(point.t))
            eps = denoised(prediction, output, shrunk, alpha, sigma).eps
            return denoised(Prediction.EPSILON, eps, x, alpha, sigma)

        return samplers.integrate(sampler, denoise, grid.alpha[i] * x, grid, _keys(x), i, i + 1)

    for i in range(grid.t.shape[0] - 1):
        x = step(x, jnp.asarray(i))
    return float(jnp.sum(jnp.abs(x)))


def _leading(schedule, last):
    """Timesteps 900, 800, …, 0, then `last` (−1: the clean end, ᾱ = 1)."""
    timesteps = np.append(np.arange(0, 1000, 100)[::-1], last)
    return time_grid.time_grid_at(schedule, schedule.time(jnp.asarray(timesteps, jnp.float32)))


def _of_ratios(schedule, timesteps, ratios, last):
    """A grid of explicit σ/α at (fractional) timesteps, and the `last` one."""
    ratios = np.append(ratios, last)
    alpha = 1.0 / np.sqrt(1.0 + ratios**2)
    t = np.append(np.asarray(schedule.time(jnp.asarray(timesteps, jnp.float32))), 0.0)
    return time_grid.time_grid_of(*(jnp.asarray(v, jnp.float32) for v in (t, alpha, alpha * ratios)))


def _table_ratios(schedule):
    table = np.asarray(schedule.alpha_bar)
    return np.sqrt((1.0 - table) / table)


def _interpolated(schedule, timesteps, last):
    """diffusers interpolates σ/α itself linearly between the entries of the table."""
    ratios = _table_ratios(schedule)
    return _of_ratios(schedule, timesteps, np.interp(timesteps, np.arange(len(ratios)), ratios), last)


def _karras(schedule, last, rounded=False):
    """ρ = 7 between the ends of the table; the timestep told is where the table's log(σ/α) has that value."""
    ratios = _table_ratios(schedule)
    low, high = ratios[0] ** (1 / 7), ratios[-1] ** (1 / 7)
    spread = np.linspace(high, low, STEPS) ** 7
    timesteps = np.interp(np.log(spread), np.log(ratios), np.arange(len(ratios)))
    return _of_ratios(schedule, timesteps.round() if rounded else timesteps, spread, last)


# clip_sample=True (x₀ clipped to [-1, 1], ε kept), timestep_spacing "leading", eta 0. The clip of the log-SNR is set
# wide, so that the clean end is ᾱ = 1 as there.
DDIM_CASES = {
    "epsilon": (1e-4, -1, Prediction.EPSILON, 172.0067),
    "v_prediction": (1e-4, -1, Prediction.V, 52.5302),
    "set_alpha_to_one=True, beta_start=0.01": (0.01, -1, Prediction.EPSILON, 149.8295),
    "set_alpha_to_one=False, beta_start=0.01": (0.01, 0, Prediction.EPSILON, 149.0784),
}


@pytest.mark.parametrize("case", DDIM_CASES)
def test_ddim(case):
    beta_start, last, prediction, expected = DDIM_CASES[case]
    schedule = TabulatedSchedule(TabulatedSchedule.linear(1000, beta_start).alpha_bar, clip=40.0)
    got = _run(
        samplers.DDIM(), _leading(schedule, last), schedule, _start(), prediction, thresholding.StaticThreshold()
    )
    assert got == pytest.approx(expected, abs=1e-2)


def test_ddim_from_a_noised_start():
    """As "epsilon", begun at the ninth of the ten timesteps (100) from x₀ noised there with the reversed ramp."""
    schedule = TabulatedSchedule(TabulatedSchedule.linear().alpha_bar, clip=40.0)
    grid = _leading(schedule, -1)
    grid = time_grid.TimeGrid(*(values[8:] for values in grid))
    ramp = _layout(np.arange(768)[::-1] / 768)
    x = noised(_start(), ramp, grid.alpha[0], grid.sigma[0])
    got = _run(samplers.DDIM(), grid, schedule, x, Prediction.EPSILON, thresholding.StaticThreshold())
    assert got == pytest.approx(354.5418, abs=1e-2)


# num_train_timesteps=1100, timestep_spacing "linspace" (1099 … 0 with fractions, σ/α interpolated), then σ = 0; no
# clipping; the start scaled by the largest σ/α in diffusers' scaling x/α, i.e. by σ in ours. Where its tests allow 0.01
# about a number smaller than that (they print 0.0002, 4.6934e-07 and 0.00015), what diffusers 0.42.1 itself computes in
# float64 stands here.
EULER_CASES = {
    "epsilon": (Prediction.EPSILON, False, 10.0807),
    "v_prediction": (Prediction.V, False, 2.41815e-10),
    "use_karras_sigmas=True": (Prediction.EPSILON, True, 124.52299),
}


@pytest.mark.parametrize("case", EULER_CASES)
@pytest.mark.parametrize("sampler", [samplers.Euler(), samplers.DDIM()], ids=["euler", "ddim"])
def test_euler(case, sampler):
    """DDIM(0) is the same integrator where x₀ is not thresholded."""
    prediction, karras, expected = EULER_CASES[case]
    schedule = TabulatedSchedule.linear(1100)
    grid = _karras(schedule, 0.0) if karras else _interpolated(schedule, np.linspace(1099, 0, STEPS), 0.0)
    got = _run_shrinking(sampler, grid, schedule, _start() * grid.sigma[0], prediction)
    assert got == pytest.approx(expected, rel=2e-3)


# As Euler's, whose grid it shares; the sums are small because the correction all but cancels the ramp.
HEUN_CASES = {
    "epsilon": (Prediction.EPSILON, False, 0.1233),
    "v_prediction": (Prediction.V, False, 4.92387e-07),
    "use_karras_sigmas=True": (Prediction.EPSILON, True, 0.000152598),
}


@pytest.mark.parametrize("case", HEUN_CASES)
def test_heun(case):
    prediction, karras, expected = HEUN_CASES[case]
    schedule = TabulatedSchedule.linear(1100)
    grid = _karras(schedule, 0.0) if karras else _interpolated(schedule, np.linspace(1099, 0, STEPS), 0.0)
    got = _run_shrinking(samplers.Heun(in_sigma=True), grid, schedule, _start() * grid.sigma[0], prediction)
    assert got == pytest.approx(expected, rel=2e-3)


# solver_order=2, algorithm_type "dpmsolver++", solver_type "midpoint", lower_order_final=False, final_sigmas_type
# "sigma_min" (the table's first σ), timestep_spacing "linspace" over 11 points, rounded, without the last.
DPM_CASES = {
    "epsilon": (Prediction.EPSILON, UNTHRESHOLDED, False, 0.3301),
    "thresholding=True, dynamic_thresholding_ratio=0.87, sample_max_value=0.5": (
        Prediction.EPSILON,
        thresholding.DynamicThreshold(percentile=0.87, cap=0.5),
        False,
        1.1364,
    ),
    "v_prediction": (Prediction.V, UNTHRESHOLDED, False, 0.2251),
    "v_prediction, use_karras_sigmas=True": (Prediction.V, UNTHRESHOLDED, True, 0.2096),
}


@pytest.mark.parametrize("case", DPM_CASES)
def test_dpm_solver(case):
    prediction, threshold, karras, expected = DPM_CASES[case]
    schedule = TabulatedSchedule.linear()
    last = _table_ratios(schedule)[0]
    spaced = np.linspace(999, 0, STEPS + 1).round()[:-1]
    grid = _karras(schedule, last, rounded=True) if karras else _interpolated(schedule, spaced, last)
    got = _run(samplers.DPMSolverPP2M(lower_order_final=False), grid, schedule, _start(), prediction, threshold)
    assert got / 768 == pytest.approx(expected, abs=1e-3)


def test_edm_euler():
    """sigma_min=0.002, sigma_max=80, ρ = 7, then σ = 0; EDM's preconditioning with sigma_data=0.5, the network told
    log(s)/4; the start scaled by √(80² + 1), i.e. by 1 in our scaling."""
    schedule = EDM()
    points = time_grid.time_grid(schedule, STEPS - 1)  # evenly spaced times are EDM's own noise levels
    grid = time_grid.time_grid_of(*(jnp.append(v, end) for v, end in zip(points[:3], (-1.0, 1.0, 0.0))))

    def denoise(x, point):
        s = point.sigma / point.alpha
        y, data = x * jnp.sqrt(1.0 + s**2), 0.5
        total = jnp.sqrt(s**2 + data**2)
        output = _network(y / total, jnp.log(s) / 4.0)
        x0 = (data / total) ** 2 * y + s * data / total * output
        return denoised(Prediction.X0, x0, x, point.alpha, point.sigma)

    x = jax.jit(lambda x: samplers.integrate(samplers.Euler(), denoise, x, grid, _keys(x), 0, STEPS))(_start())
    assert float(jnp.sum(jnp.abs(x))) == pytest.approx(34.1855, abs=1e-2)
