"""The samplers against exact scores: order, moments, independence of chunks and batches, memory, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdiff.diffusion import noise, samplers, time_grid
from jaxdiff.diffusion.parameterization import Denoised, Prediction, from_x0
from jaxdiff.diffusion.schedules import (
    EDM,
    CosineSchedule,
    LinearBetaSchedule,
    RectifiedFlow,
    TabulatedSchedule,
    time_of,
)

DETERMINISTIC = [
    samplers.DDIM(),
    samplers.Euler(),
    samplers.Heun(),
    samplers.Heun(in_sigma=True),
    samplers.DPMSolverPP2M(),
    samplers.DPMSolverPP2M(lower_order_final=False),
    samplers.PLMS(),
]
RANDOM = [samplers.DDPM(), samplers.DDPM(gamma=0.3), samplers.DDIM(eta=1.0)]
ORDERS = [1, 1, 2, 2, 2, 2, 2]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Data with an exactly known score: coordinates drawn independently, from N(means[k], deviations[k]²) with
    probability weights[k]."""

    means: tuple[float, ...] = (-1.2, 0.3, 1.5)
    deviations: tuple[float, ...] = (0.3, 0.2, 0.5)
    weights: tuple[float, ...] = (0.5, 0.2, 0.3)

    @property
    def mean(self) -> float:
        return sum(w * m for w, m in zip(self.weights, self.means))

    @property
    def variance(self) -> float:
        second = sum(w * (m**2 + s**2) for w, m, s in zip(self.weights, self.means, self.deviations))
        return second - self.mean**2

    def x0(self, x, alpha, sigma):
        """E[x₀ | x] for x = α x₀ + σ ε: each component's linear estimate, weighted by its posterior probability."""
        x = x[..., None]
        means, deviations, weights = (jnp.asarray(v, x.dtype) for v in (self.means, self.deviations, self.weights))
        variance = alpha**2 * deviations**2 + sigma**2
        log_posterior = jnp.log(weights) - 0.5 * jnp.log(variance) - 0.5 * (x - alpha * means) ** 2 / variance
        estimate = means + alpha * deviations**2 / variance * (x - alpha * means)
        return jnp.sum(jax.nn.softmax(log_posterior, axis=-1) * estimate, axis=-1)

    def denoise(self, x, point):
        """What samplers ask for."""
        return from_x0(self.x0(x, point.alpha, point.sigma), x, point.alpha, point.sigma)


_grid = jax.jit(time_grid.time_grid, static_argnums=(0, 1, 2))


def _keys(b, seed=0):
    return noise.sample_keys(jax.random.key(seed), jnp.arange(b))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(sampler, denoise, x, grid, keys, start, stop):
    return samplers.integrate(sampler, denoise, x, grid, keys, start, stop)


def _draw(sampler, denoise, x, grid, keys=None):
    keys = _keys(x.shape[0]) if keys is None else keys
    final = _sample(sampler, denoise, sampler.init(x), grid, keys, 0, grid.t.shape[0] - 1)
    return sampler.image(final)


def _draw_few(sampler, denoise, x, grid, most):
    """`_draw` as the last steps of `most`, so that grids of all sizes share one compiled program."""
    first = most + 1 - len(grid.t)
    longer = time_grid.TimeGrid(*(jnp.asarray(np.pad(np.asarray(v), (first, 0), mode="edge")) for v in grid))
    return sampler.image(_sample(sampler, denoise, sampler.init(x), longer, _keys(len(x)), first, most))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _even_grid(schedule, steps, low=-6.0, high=6.0):
    """Even log-SNR between two moderate ends, so that the error has a clean power of the step."""
    return time_grid.time_grid_at(schedule, time_of(schedule, jnp.linspace(low, high, steps + 1)))


COUNTS = np.array([20, 40, 80, 160])


@functools.cache
def _even_grids(schedule):
    """In float64: the starting points, grids of COUNTS steps, and what 5000 steps of Heun make of the points."""
    x = jnp.linspace(-2.0, 2.0, 33)[None]
    exact = _draw(samplers.Heun(), Mixture().denoise, x, _even_grid(schedule, 5000))
    return x, [_even_grid(schedule, int(count)) for count in COUNTS], exact


@pytest.mark.parametrize("schedule", [CosineSchedule(), RectifiedFlow()], ids=["cosine", "flow"])
@pytest.mark.parametrize("sampler,order", [*zip(DETERMINISTIC, ORDERS), (samplers.PLMS(Prediction.V), 1)], ids=str)
def test_order_of_convergence_on_a_mixture(sampler, order, schedule):
    """The error falls with the power of the step size that each method is known for, over 20 … 180 steps."""
    with jax.enable_x64(True):
        x, grids, exact = _even_grids(schedule)
        drawn = [_draw_few(sampler, Mixture().denoise, x, grid, COUNTS[-1]) for grid in grids]
    errors = [np.sqrt(np.mean((np.asarray(found) - np.asarray(exact)) ** 2)) for found in drawn]
    slope = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
    assert order - 0.15 < slope < order + 0.4
    assert errors[-1] < 0.02 if order == 1 else errors[-1] < 1e-3


@pytest.mark.parametrize(
    "schedule",
    [
        CosineSchedule(),
        CosineSchedule.shifted(256),
        LinearBetaSchedule(),
        EDM(),
        RectifiedFlow(),
        TabulatedSchedule.scaled_linear(),
    ],
    ids=repr,
)
def test_closed_form_for_gaussian_data(schedule):
    """For data N(m, s²) the ODE carries x = α m + √(α² s² + σ²) z along at constant z, on every schedule."""
    data = Mixture((0.4,), (0.5,), (1.0,))
    grid = _grid(schedule, 200, time_grid.UniformLogSNR())
    z = jnp.linspace(-2.0, 2.0, 9)[None]

    def path(i):
        return grid.alpha[i] * 0.4 + jnp.sqrt(grid.alpha[i] ** 2 * 0.25 + grid.sigma[i] ** 2) * z

    for sampler in (samplers.DDIM(), samplers.Heun(), samplers.DPMSolverPP2M()):
        got = _draw(sampler, data.denoise, path(0), grid)
        tolerance = 0.03 if isinstance(sampler, samplers.DDIM) else 3e-3
        np.testing.assert_allclose(got, path(-1), atol=tolerance)


@functools.cache
def _exact(spacing):
    """33 starting points, and what 1000 steps of Heun make of them."""
    x = jnp.linspace(-2.0, 2.0, 33)[None]
    grid = _grid(CosineSchedule(), 1000, spacing)
    return x, np.asarray(_draw(samplers.Heun(), Mixture().denoise, x, grid))


@functools.cache
def _mean_error(sampler, steps, spacing):
    """Against 1000 steps of Heun on the same spacing."""
    (x, exact), grid = _exact(spacing), _grid(CosineSchedule(), steps, spacing)
    return float(np.abs(np.asarray(_draw_few(sampler, Mixture().denoise, x, grid, 64)) - exact).mean())


@pytest.mark.parametrize("sampler", [samplers.DDIM(), samplers.Heun(), samplers.DPMSolverPP2M()], ids=str)
def test_default_grid_from_clipped_end_to_clipped_end(sampler):
    """Between the ends of the clipped cosine, where the step in log-SNR is huge, every sampler still converges."""
    few, many = (_mean_error(sampler, steps, time_grid.UniformTime()) for steps in (16, 64))
    assert many < (0.03 if isinstance(sampler, samplers.DDIM) else 0.004)
    assert many < 0.35 * few


def test_what_the_docstrings_warn_of():
    """EDM's Heun needs EDM's spacing, where it is good; 2M must not extrapolate the last step to the clean end."""
    heun = samplers.Heun(in_sigma=True)
    assert _mean_error(heun, 32, time_grid.UniformTime()) > 0.5
    assert _mean_error(heun, 32, time_grid.Karras()) < 0.4 * _mean_error(samplers.Euler(), 64, time_grid.Karras())
    plain, extrapolated = samplers.DPMSolverPP2M(), samplers.DPMSolverPP2M(lower_order_final=False)
    assert _mean_error(extrapolated, 16, time_grid.UniformTime()) > 3 * _mean_error(plain, 16, time_grid.UniformTime())


@pytest.mark.parametrize(
    "sampler",
    [
        *RANDOM,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (samplers.DDPM(gamma=1.0), samplers.DDIM(eta=0.5))),
    ],
    ids=str,
)
def test_moments_of_random_samplers(sampler):
    """Mean, variance and the share of each component are the mixture's, within the error of 16384 draws."""
    data, schedule, b, d = Mixture(), CosineSchedule(), 512, 32
    keys = _keys(b)
    start = noise.normal_like(noise.fold(keys, 10**6), (d,))
    grid = _grid(schedule, 400)
    x = np.asarray(_draw(sampler, data.denoise, start, grid, keys))
    error = (data.variance / x.size) ** 0.5
    assert abs(x.mean() - data.mean) < 4 * error
    assert x.var() == pytest.approx(data.variance, rel=0.03)
    lowest = (x < -0.3).mean()  # between the first component and the others
    expected = data.weights[0] * 0.99865 + data.weights[1] * 0.00135 + data.weights[2] * 0.00016
    assert lowest == pytest.approx(expected, abs=4 * (0.25 / x.size) ** 0.5)


def test_ancestral_variance_lies_between_its_bounds():
    """γ = 0 is the posterior variance β̃ of DDPM, γ = 1 β itself; between them the log interpolates."""
    table = TabulatedSchedule.linear()
    point = lambda i: time_grid.time_grid_at(table, table.time(jnp.asarray([float(i)])))  # noqa: E731
    bars = np.asarray(table.alpha_bar)
    for i in (1, 487, 999):
        beta = 1.0 - bars[i] / bars[i - 1]
        low, high, half = (samplers.ancestral_deviation(point(i), point(i - 1), g).item() ** 2 for g in (0.0, 1.0, 0.5))
        assert low == pytest.approx((1 - bars[i - 1]) / (1 - bars[i]) * beta, rel=2e-3)
        assert high == pytest.approx(beta, rel=2e-3)
        assert half == pytest.approx((low * high) ** 0.5, rel=1e-4)
    # The values that diffusers' DDPM test asserts of the lower bound.
    assert samplers.ancestral_deviation(point(487), point(486), 0.0).item() ** 2 == pytest.approx(0.00979, abs=1e-5)
    assert samplers.ancestral_deviation(point(999), point(998), 0.0).item() ** 2 == pytest.approx(0.02, abs=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_noise_of_a_ddim_step(eta):
    """With x₀ = ε = 0 a step leaves its own noise: η times DDPM's lower bound (arXiv 2010.02502, Eq. 16)."""
    grid = _grid(CosineSchedule(), 4)
    nothing = lambda x, point: Denoised(jnp.zeros_like(x), jnp.zeros_like(x))  # noqa: E731
    left = samplers.DDIM(eta=eta).step(1, jnp.ones((4, 50, 50)), nothing, grid, _keys(4))
    here, there = (time_grid.TimeGrid(*(values[i] for values in grid)) for i in (1, 2))
    expected = eta * samplers.ancestral_deviation(here, there, 0.0).item()
    assert float(jnp.std(left)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("sampler", DETERMINISTIC + RANDOM, ids=str)
def test_chunks_do_not_change_the_result(sampler):
    """One program, called for steps 0–10 or in chunks of 3, 1 and 6, gives the same bits."""
    grid, keys = _grid(CosineSchedule(), 10), _keys(2)
    x = noise.normal_like(noise.fold(keys, 99), (4, 4, 3))
    denoise = Mixture().denoise
    whole = _sample(sampler, denoise, sampler.init(x), grid, keys, 0, 10)
    carry = sampler.init(x)
    for start, stop in ((0, 3), (3, 4), (4, 10)):
        carry = _sample(sampler, denoise, carry, grid, keys, start, stop)
    np.testing.assert_array_equal(sampler.image(whole), sampler.image(carry))
    assert np.all(np.isfinite(sampler.image(whole)))


def test_a_run_begun_in_the_middle_has_no_step_before():
    """DPM-Solver++(2M), handed a fresh state at step 3, takes a first-order step, not extrapolating from zeros; PLMS
    evaluates the network at both ends."""
    grid, keys, denoise = _grid(CosineSchedule(), 10), _keys(2), Mixture().denoise
    x = noise.normal_like(keys, (5,))
    first = {
        s: s.image(_sample(s, denoise, s.init(x), grid, keys, 3, 4))
        for s in (samplers.DPMSolverPP2M(), samplers.Euler())
    }
    np.testing.assert_allclose(*first.values(), atol=1e-6)
    plms, (here, there) = samplers.PLMS(), (time_grid.TimeGrid(*(v[i] for v in grid)) for i in (3, 4))
    eps = denoise(x, here).eps
    ahead = there.alpha / here.alpha * x + (there.sigma - there.alpha / here.alpha * here.sigma) * eps
    mean = 0.5 * (eps + denoise(ahead, there).eps)
    corrected = there.alpha / here.alpha * x + (there.sigma - there.alpha / here.alpha * here.sigma) * mean
    found = plms.image(_sample(plms, denoise, plms.init(x), grid, keys, 3, 4))
    np.testing.assert_allclose(found, corrected, atol=1e-6)


@pytest.mark.parametrize("sampler", [samplers.DPMSolverPP2M(), samplers.PLMS(), samplers.DDPM(gamma=0.3)], ids=str)
def test_samples_do_not_depend_on_their_batch_or_mesh(sampler):
    """Sample i of a batch of eight, of a batch of one, and of a batch spread over eight devices."""
    grid, keys, denoise = _grid(CosineSchedule(), 10), _keys(8), Mixture().denoise
    x = noise.normal_like(noise.fold(keys, 99), (4, 4, 3))
    whole = _draw(sampler, denoise, x, grid, keys)
    for i in (0, 5):
        np.testing.assert_allclose(_draw(sampler, denoise, x[i : i + 1], grid, keys[i : i + 1])[0], whole[i], atol=1e-3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = [jax.device_put(v, NamedSharding(mesh, PartitionSpec("data"))) for v in (x, keys)]
    sharded = _draw(sampler, denoise, spread[0], grid, spread[1])
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, whole, atol=1e-3)


@pytest.mark.parametrize("sampler", [*DETERMINISTIC[2:5], samplers.DDPM()], ids=str)
def test_memory_does_not_grow_with_the_steps(sampler):
    """The compiler's own figure for temporaries: the same for 10 and for 1000 steps, and a few times the state."""
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)

    def temporaries(steps):
        grid = _grid(CosineSchedule(), steps)
        denoise = lambda x, point: from_x0(0.9 * x, x, 1.0, 0.5)  # noqa: E731
        draw = lambda x: sampler.image(  # noqa: E731
            samplers.integrate(sampler, denoise, sampler.init(x), grid, _keys(1), 0, steps)
        )
        return jax.jit(draw).lower(x).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(10), temporaries(1000)
    state = 64 * 64 * 3 * 4
    assert many < few + state / 2
    assert many < 12 * state


@pytest.mark.parametrize(
    "sampler", [samplers.DPMSolverPP2M(), samplers.Heun(), samplers.DDPM(), samplers.DDIM(1.0)], ids=str
)
def test_state_stays_float32_when_the_network_is_bfloat16(sampler):
    schedule, data = CosineSchedule(), Mixture()
    seen = []

    def denoise(x, point):
        seen.append((x.dtype, *{(value.dtype, value.shape) for value in point}))
        x0, eps = data.denoise(x, point)
        return Denoised(x0.astype(jnp.bfloat16), eps.astype(jnp.bfloat16))

    x = noise.normal_like(_keys(2), (4,), jnp.bfloat16)
    image = _draw(sampler, denoise, x, _grid(schedule, 8))
    assert image.dtype == jnp.float32
    assert set(seen) == {(jnp.dtype("float32"), (jnp.dtype("float32"), ()))}


def test_evaluations_are_counted_as_they_happen():
    for sampler in (samplers.DDPM(), *DETERMINISTIC[:5], DETERMINISTIC[-1]):
        calls = []

        def denoise(x, point, calls=calls):
            jax.debug.callback(lambda: calls.append(1))
            return from_x0(0.5 * x, x, 1.0, 1.0)

        jax.block_until_ready(_draw(sampler, denoise, jnp.ones((1, 2)), _grid(CosineSchedule(), 6)))
        jax.effects_barrier()
        assert len(calls) == sampler.evaluations(6)


@pytest.mark.parametrize("sampler", [samplers.PLMS(), samplers.Heun(), samplers.DPMSolverPP2M()], ids=str)
def test_the_network_sees_what_is_kept(sampler):
    """In the middle of a step, too; but the start of a run is the caller's."""
    grid, keys, seen = _even_grid(CosineSchedule(), 4), _keys(2), []

    def denoise(x, point):
        jax.debug.callback(lambda x, t: seen.append((float(t), float(x[0]))), x, point.t, ordered=True)
        return Denoised(0.5 * x, from_x0(0.5 * x, x, point.alpha, point.sigma).eps)

    def keep(x, point):
        return x.at[0].set(point.t + 7.0)

    carry = sampler.init(jnp.ones(2))
    carry = jax.jit(lambda carry: samplers.integrate(sampler, denoise, carry, grid, keys, 0, 4, keep))(carry)
    jax.effects_barrier()
    assert seen[0][1] == 1.0 and len(seen) == sampler.evaluations(4)
    assert all(value == pytest.approx(t + 7.0) for t, value in seen[1:])
    assert sampler.image(carry)[0] == pytest.approx(float(grid.t[-1]) + 7.0)


@pytest.mark.parametrize("make", [lambda: samplers.DDPM(gamma=1.5), lambda: samplers.DDIM(eta=-0.1)])
def test_settings_out_of_range_are_named(make):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        make()


def test_a_grid_that_begins_beyond_the_clip():
    """Its first points share one log-SNR, and DPM-Solver++(2M) divides by the distance between them."""
    schedule = CosineSchedule(clip=5.0)
    grid, keys = _grid(schedule, 24), _keys(2)
    assert grid.logsnr[0] == grid.logsnr[1]
    x = noise.normal_like(keys, (5,))
    for sampler in (*DETERMINISTIC[3:], *RANDOM[1:]):  # one of each formula
        carry = _sample(sampler, Mixture().denoise, sampler.init(x), grid, keys, 0, 24)
        assert np.all(np.isfinite(sampler.image(carry))), sampler
