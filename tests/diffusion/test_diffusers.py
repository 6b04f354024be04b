"""Samplers, spacings and starts against the loops of diffusers' schedulers under Stable Diffusion's settings.

Both integrate the same nonlinear function of (x, timestep), from the same noise and with the same noise in each step.
The clip of the log-SNR is set wide, so that the clean end is ᾱ = 1 as in diffusers. Errors are fractions of the range
of the result.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import noise, samplers
from jaxdiff.diffusion.parameterization import Prediction, denoised, noised
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.time_grid import Leading, Linspace, Spacing, TabulatedKarras, TimeGrid, Trailing, time_grid

torch = pytest.importorskip("torch", reason="diffusers' schedulers are PyTorch's")
diffusers = pytest.importorskip("diffusers", reason="compared with diffusers' schedulers")

SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULE = TabulatedSchedule(TabulatedSchedule.scaled_linear().alpha_bar, clip=40.0)
MOST = 50
KEYS = noise.sample_keys(jax.random.key(0), jnp.arange(2))
SHAPE = (5, 7)
PREDICTIONS = {"epsilon": Prediction.EPSILON, "v_prediction": Prediction.V}


class Case(NamedTuple):
    """A scheduler of diffusers, and its equivalent."""

    kind: str
    settings: dict
    sampler: samplers.Sampler
    spacing: Spacing
    scaled_start: bool = False


def solver(spacing, karras=False, **more):
    return "DPMSolverMultistepScheduler", {"timestep_spacing": spacing, "use_karras_sigmas": karras} | more


def euler(spacing, karras=False):
    return "EulerDiscreteScheduler", {"timestep_spacing": spacing, "use_karras_sigmas": karras}


def ancestral(spacing):
    return "EulerAncestralDiscreteScheduler", {"timestep_spacing": spacing}


def ddim(spacing, to_one=False):
    return "DDIMScheduler", {"timestep_spacing": spacing, "set_alpha_to_one": to_one, "clip_sample": False}


def plms(spacing, to_one=False):
    return "PNDMScheduler", {"timestep_spacing": spacing, "set_alpha_to_one": to_one, "skip_prk_steps": True}


FIRST = {"final_sigmas_type": "sigma_min"}
EULER, ANCESTRAL, SOLVER = samplers.Euler(), samplers.DDIM(eta=1.0), samplers.DPMSolverPP2M()
CASES = {
    "DDIM": Case(*ddim("leading"), samplers.DDIM(), Leading(1, to_first_entry=True)),
    "DDIM, set_alpha_to_one": Case(*ddim("leading", True), samplers.DDIM(), Leading(1)),
    "DDIM trailing": Case(*ddim("trailing", True), samplers.DDIM(), Trailing()),
    "DDIM linspace": Case(*ddim("linspace"), samplers.DDIM(), Linspace(to_first_entry=True)),
    "PLMS": Case(*plms("leading"), samplers.PLMS(), Leading(1, to_first_entry=True)),
    "PLMS, set_alpha_to_one": Case(*plms("leading", True), samplers.PLMS(), Leading(1)),
    "PLMS trailing": Case(*plms("trailing"), samplers.PLMS(), Trailing(to_first_entry=True)),
    "PLMS linspace": Case(*plms("linspace"), samplers.PLMS(), Linspace(to_first_entry=True)),
    "Euler": Case(*euler("leading"), EULER, Leading(1)),
    "Euler trailing": Case(*euler("trailing"), EULER, Trailing(), True),
    "Euler linspace": Case(*euler("linspace"), EULER, Linspace(rounded=False), True),
    "Euler Karras": Case(*euler("leading", True), EULER, TabulatedKarras(Leading(1))),
    "Euler Karras trailing": Case(*euler("trailing", True), EULER, TabulatedKarras(Trailing()), True),
    "Euler Karras linspace": Case(*euler("linspace", True), EULER, TabulatedKarras(Linspace(rounded=False)), True),
    "Euler a": Case(*ancestral("leading"), ANCESTRAL, Leading(1)),
    "Euler a trailing": Case(*ancestral("trailing"), ANCESTRAL, Trailing(), True),
    "Euler a linspace": Case(*ancestral("linspace"), ANCESTRAL, Linspace(rounded=False), True),
    "DPM++ 2M": Case(*solver("leading"), SOLVER, Leading(1, skip_cleanest=True)),
    "DPM++ 2M trailing": Case(*solver("trailing"), SOLVER, Trailing()),
    "DPM++ 2M linspace": Case(*solver("linspace"), SOLVER, Linspace(skip_cleanest=True)),
    "DPM++ 2M to the first entry": Case(
        *solver("leading", **FIRST, lower_order_final=False),
        samplers.DPMSolverPP2M(False),
        Leading(1, skip_cleanest=True, to_first_entry=True),
    ),
    "DPM++ 2M Karras": Case(*solver("leading", True), SOLVER, TabulatedKarras(rounded=True)),
    "DPM++ 2M Karras to the first entry": Case(
        *solver("leading", True, **FIRST, euler_at_final=True),
        SOLVER,
        TabulatedKarras(rounded=True, to_first_entry=True),
    ),
    "DDPM": Case("DDPMScheduler", {"clip_sample": False}, samplers.DDPM(0.0), Leading(1)),
}


def network(x, timestep, numbers):
    """A function of x and the timestep, in numpy, torch or jax."""
    return x * timestep / (timestep + 100.0) + 0.2 * numbers.sin(3.0 * x + 0.01 * timestep)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def integrated(sampler, prediction, schedule, x, grid, start):
    def denoise(x, point):
        output = network(x, schedule.network_time(point.t), jnp)
        return denoised(prediction, output, x, point.alpha, point.sigma)

    return sampler.image(samplers.integrate(sampler, denoise, sampler.init(x), grid, KEYS, start, MOST))


@functools.cache
def random_numbers():
    drawn = jax.vmap(lambda i: noise.normal_like(noise.fold(KEYS, i), SHAPE))(jnp.arange(MOST + 1))
    return np.array(drawn)  # the last of them is the start's


def ours(case, prediction, steps, skipped=0, image=None, schedule=SCHEDULE):
    """The result of the last steps − skipped steps, run as the last of MOST, so that all share one program."""
    grid = time_grid(schedule, steps, case.spacing)
    x = jnp.asarray(random_numbers()[MOST])
    if image is not None:
        x = noised(jnp.asarray(image), x, grid.alpha[skipped], grid.sigma[skipped])
    elif case.scaled_start:
        x = grid.sigma[0] * x
    padded = TimeGrid(*(jnp.asarray(np.pad(np.asarray(v), (MOST - steps, 0), mode="edge")) for v in grid))
    return np.asarray(integrated(case.sampler, prediction, schedule, x, padded, MOST - steps + skipped))


def theirs(case, prediction, steps, monkeypatch, skipped=0, image=None, **settings):
    scheduler = getattr(diffusers, case.kind)(**SETTINGS | case.settings | {"prediction_type": prediction} | settings)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if case.kind == "PNDMScheduler" and skipped:  # see `samplers.PLMS`: the second evaluation is repeated here as well
        timesteps = timesteps[1:][skipped:]
        timesteps = torch.cat([timesteps[:2], timesteps[1:]])
    elif skipped:
        timesteps = timesteps[skipped:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
    eps = torch.tensor(random_numbers()[MOST])
    if image is None:
        x = eps * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(torch.tensor(image), eps, timesteps[:1])
    drawn = iter(random_numbers()[MOST - steps + skipped :])
    module = type(scheduler).__module__
    if "ancestral" in module or "ddpm" in module:
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.tensor(next(drawn)))
    for timestep in timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep.float(), torch)
        x = scheduler.step(output, timestep, x).prev_sample
    return x.numpy()


def error(found, wanted):
    assert np.isfinite(wanted).all() and np.ptp(wanted) > 0.05
    return np.abs(found - wanted).max() / np.ptp(wanted)


IMAGE = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype("f4")
UNEVEN = {
    # Steps of diffusers' DDIM and PNDM are 1000 // k entries long, here they end where the next one begins.
    "DDIM trailing": (30,),
    "PLMS trailing": (30,),
    "DDIM linspace": (5, 20, 30, 50),
    "PLMS linspace": (5, 20, 30, 50),
}


def case_of(name, prediction):
    case = CASES[name]
    is_plms = isinstance(case.sampler, samplers.PLMS)
    return case._replace(sampler=samplers.PLMS(PREDICTIONS[prediction])) if is_plms else case


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CASES)
def test_loops_of_diffusers(name, prediction, monkeypatch):
    """5, 20, 30 and 50 steps, and the last 13 of 20 from a noised image."""
    case = case_of(name, prediction)
    for steps in (5, 20, 30, 50):
        if steps not in UNEVEN.get(name, ()):
            found = ours(case, PREDICTIONS[prediction], steps)
            assert error(found, theirs(case, prediction, steps, monkeypatch)) < 1e-5, steps
    if 20 not in UNEVEN.get(name, ()):
        found = ours(case, PREDICTIONS[prediction], 20, 7, IMAGE)
        assert error(found, theirs(case, prediction, 20, monkeypatch, 7, IMAGE)) < 1e-5


@pytest.mark.parametrize("name", UNEVEN)
def test_steps_of_diffusers_that_do_not_fit_together(name, monkeypatch):
    """The size of the difference: an entry at a time for trailing, more for linspace."""
    limit = 2e-3 if "trailing" in name else 6e-3
    difference = error(ours(CASES[name], Prediction.EPSILON, 30), theirs(CASES[name], "epsilon", 30, monkeypatch))
    assert 3e-4 < difference < limit


@pytest.mark.parametrize("name", ["DDIM, set_alpha_to_one", "Euler", "DPM++ 2M Karras"])
def test_the_default_clip_is_close(name, monkeypatch):
    """The clean end of a schedule clipped at a log-SNR of 20 has σ = 4.5e-5."""
    found = ours(CASES[name], Prediction.EPSILON, 20, schedule=TabulatedSchedule.scaled_linear())
    assert error(found, theirs(CASES[name], "epsilon", 20, monkeypatch)) < 5e-5


ZERO = {
    "DDIM trailing": 0.0,
    "DDPM trailing": 0.0,
    "Euler trailing": 2.0**-24,
    "Euler": 2.0**-24,
    "Euler Karras trailing": 2.0**-24,
    "Euler a trailing": 2.0**-24,
    "DPM++ 2M trailing": 2.0**-24,
    "DPM++ 2M Karras": 2.0**-24,
}
"""ᾱ of the last entry in each class of diffusers."""


@pytest.mark.parametrize("clip", [20.0, 40.0])
@pytest.mark.parametrize("name", ZERO)
def test_zero_terminal_snr(name, clip, monkeypatch):
    """v-prediction from pure noise. With the default clip the last α is 4.5e-5 instead of 0, as is the last σ."""
    settings = {"clip_sample": False, "timestep_spacing": "trailing"}
    case = CASES.get(name) or Case("DDPMScheduler", settings, samplers.DDPM(0.0), Trailing())
    schedule = TabulatedSchedule(SCHEDULE.alpha_bar, clip).zero_terminal_snr(ZERO[name])
    wanted = theirs(case, "v_prediction", 20, monkeypatch, rescale_betas_zero_snr=True)
    difference = error(ours(case, Prediction.V, 20, schedule=schedule), wanted)
    assert difference < (2e-5 if clip == 40.0 else 1e-4)
