"""DeepFloyd IF's steps: its respacings, and DDPM step by step as diffusers' scheduler takes it."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.parameterization import DenoisedWithVariance, Prediction, denoised
from jaxdiff.diffusion.samplers import DDIM, DDPM, integrate
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Leading, Respaced, Trailing, time_grid
from jaxdiff.systems import deepfloyd as presets
from jaxdiff.weights.deepfloyd_pipeline import read_scheduler

NAMES = ("fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super40", "super100")


@pytest.mark.parametrize("name", NAMES)
def test_named_respacings(name):
    """Those that diffusers lists. Its fast27 begins at 999, where IF's own code puts 997 in its place."""
    timesteps = pytest.importorskip("diffusers.pipelines.deepfloyd_if.timesteps", reason="compared with diffusers'")
    respacing = getattr(presets, name.upper())
    wanted = list(getattr(timesteps, f"{name}_timesteps"))
    if name == "fast27":
        assert wanted[0] == 999
        wanted[0] = 997
    assert respacing.entries(1000)[::-1] == wanted
    points = time_grid(TabulatedSchedule.cosine(), respacing.steps, respacing)
    np.testing.assert_array_equal(TabulatedSchedule.cosine().network_time(points.t), [*wanted, -1])


def test_ends_of_the_respacings():
    """Counted in their names; by hand where a part is short."""
    for name in NAMES:
        respacing = getattr(presets, name.upper())
        found = respacing.entries(1000)
        assert len(found) == respacing.steps == int(name.lstrip(string.ascii_letters)), name
        assert found[0] == 0 and found[-1] == (997 if name == "fast27" else 999) and found == sorted(set(found))
    assert presets.FAST27.entries(1000)[:11] == [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200]
    assert presets.FAST27.entries(1000)[-7:] == [400, 500, 599, 600, 799, 800, 997]
    assert presets.SMART27.entries(1000)[11:16] == [286, 428, 429, 572, 714]
    assert presets.SUPER27.entries(1000)[:9] == [0, 100, 200, 300, 400, 500, 600, 700, 799]


VARIANCES = {
    "fixed_small": DDPM(0.0),
    "fixed_small_log": DDPM(0.0),
    "fixed_large": DDPM(1.0),
    "learned_range": DDPM(None),
}
THRESHOLDS = {
    DynamicThreshold(0.95, 1.5): {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5},
    DynamicThreshold(0.995, 1.0): {"thresholding": True},
    StaticThreshold(): {},
    NoThreshold(): {"clip_sample": False},
}
SHAPE = (2, 6, 4, 3)


def scheduler_of(folder, **settings):
    """diffusers' scheduler, and how we read what it writes."""
    diffusers = pytest.importorskip("diffusers", reason="compared with diffusers' scheduler")
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", **settings)
    scheduler.save_pretrained(folder)
    return scheduler, read_scheduler(folder / "scheduler_config.json", learned=True)


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: f"{type(t).__name__}{getattr(t, 'cap', '')}")
@pytest.mark.parametrize("variance", VARIANCES)
def test_schedulers_are_read(tmp_path, variance, threshold):
    pytest.importorskip("torch", reason="diffusers' schedulers are PyTorch's")
    _, (schedule, given) = scheduler_of(tmp_path, variance_type=variance, **THRESHOLDS[threshold])
    assert schedule == TabulatedSchedule.cosine() and given == {
        "sampler": VARIANCES[variance],
        "thresholding": threshold,
        "spacing": Leading(),  # diffusers writes it, the published files do not have it
        "keep_eps": False,
        "scaled_start": False,
    }


@pytest.mark.parametrize(
    "spacing", [Leading(), Trailing(), presets.SMART27, Respaced((3, 4), offset=2)], ids=lambda s: repr(s)[:12]
)
@pytest.mark.parametrize("variance", VARIANCES)
def test_steps_of_ddpm(tmp_path, variance, spacing, monkeypatch):
    """Each from the same state, with the same random output of a network and the same noise."""
    torch = pytest.importorskip("torch", reason="diffusers' schedulers are PyTorch's")
    settings = THRESHOLDS[DynamicThreshold(0.95, 1.5)] | {"variance_type": variance}
    plain = {Leading: "leading", Trailing: "trailing"}.get(type(spacing))
    scheduler, (schedule, given) = scheduler_of(tmp_path, **settings, **({"timestep_spacing": plain} if plain else {}))
    assert given["sampler"] == VARIANCES[variance] and given["spacing"] == (spacing if plain else Leading())
    steps = getattr(spacing, "steps", 10)
    if plain:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=spacing.entries(1000)[::-1])
    points, keys = time_grid(schedule, steps, spacing), noise.sample_keys(jax.random.key(0), jnp.arange(2))
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(steps, *SHAPE)).astype("f4"), rng.uniform(-1, 1, (steps, *SHAPE)).astype("f4")

    @jax.jit
    def step(x, i):
        def denoise(x, point):
            output, spread = (jnp.asarray(values)[i] for values in outputs)
            found = denoised(Prediction.EPSILON, output, x, point.alpha, point.sigma)
            return DenoisedWithVariance(given["thresholding"].apply(found.x0), found.eps, 0.5 * (spread + 1))

        return integrate(given["sampler"], denoise, x, points, keys, i, i + 1)

    def there(array):
        return torch.tensor(np.ascontiguousarray(np.moveaxis(array, -1, 1)))

    x = np.asarray(noise.normal_like(keys, SHAPE[1:]))
    for i, t in enumerate(scheduler.timesteps):
        drawn = there(noise.normal_like(noise.fold(keys, i), SHAPE[1:]))
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, drawn=drawn, **_: drawn)
        assert schedule.network_time(points.t[i]) == int(t)
        output = torch.cat([there(values[i]) for values in outputs], 1)
        output = output if variance == "learned_range" else output[:, :3]
        wanted = scheduler.step(output, t, there(x)).prev_sample.numpy()
        x = np.asarray(step(x, i))
        if i == steps - 1 and t > 0:  # unless the last entry is 0, diffusers leaves noise in the finished image
            break
        # The clean end of ours has a log-SNR of 20, which is 1 part in 22026 of noise.
        np.testing.assert_allclose(np.moveaxis(x, -1, 1), wanted, atol=2e-4, rtol=2e-4, err_msg=f"step {i}")
    assert np.abs(x).max() <= 1.001


def test_ddim_schedulers_are_read(tmp_path):
    """diffusers' DDIM keeps the network's own ε when it has thresholded x₀."""
    pytest.importorskip("torch", reason="diffusers' schedulers are PyTorch's")
    diffusers = pytest.importorskip("diffusers", reason="compared with diffusers' scheduler")
    diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50).save_pretrained(tmp_path)
    schedule, given = read_scheduler(tmp_path / "scheduler_config.json", learned=True)
    assert schedule == TabulatedSchedule.cosine(50)
    wanted = {"sampler": DDIM(), "keep_eps": True, "thresholding": StaticThreshold(), "spacing": Leading()}
    assert given == wanted | {"scaled_start": False}
