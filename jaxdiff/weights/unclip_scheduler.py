"""diffusers' UnCLIPScheduler (Karlo, Kandinsky's priors) ⇄ a noise schedule, the prediction and sampling settings.

It is DDPM on the cosine table. Its steps are those of `Linspace`, and each ends where the next one begins.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import Schedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import NoThreshold, StaticThreshold, Thresholding
from jaxdiff.diffusion.time_grid import Linspace
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.weights import hub, sizes
from jaxdiff.weights.latent_unet import open_settings
from jaxdiff.weights.schedulers import Scheduler

NAME = "UnCLIPScheduler"
PREDICTIONS = {"epsilon": Prediction.EPSILON, "sample": Prediction.X0}
VARIANCES: dict[str, float | None] = {"fixed_small_log": 0.0, "learned_range": None}
"""γ of `DDPM`."""
FIXED: dict[str, tuple] = {
    "beta_schedule": ("squaredcos_cap_v2", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", *PREDICTIONS),
    "clip_sample": (True, True, False),
}
"""For each setting: diffusers' default, then the supported values."""
READ: dict[str, Any] = {"num_train_timesteps": 1000, "variance_type": "fixed_small_log", "clip_sample_range": 1.0}


def read(path: Path, learned: bool = False) -> Scheduler:
    """Read a scheduler_config.json. learned: whether the network predicts the variance.

    Raises FileNotFoundError, or ValueError that names the file and the unsupported setting.
    """
    return from_values(path, hub.read_json(path, "scheduler"), learned)


def from_values(path: Path, values: Mapping[str, Any], learned: bool = False) -> Scheduler:
    """`read` for the content of a file. path: its name in messages."""
    config = open_settings(values, path, NAME, FIXED, READ)
    config.require("variance_type", ("learned_range",) if learned else ("fixed_small_log",))
    limit = config.values["clip_sample_range"]
    if type(limit) not in (int, float) or not 0.0 < limit <= 1e9:
        raise config.error("clip_sample_range", limit, "a number above 0 and up to 1e9")
    threshold: Thresholding = NoThreshold()
    if config.flag("clip_sample", True):
        threshold = StaticThreshold(float(limit))
    sampling = {
        "sampler": DDPM(VARIANCES[config.values["variance_type"]]),
        "spacing": Linspace(),
        "thresholding": threshold,
        "keep_eps": False,
        "scaled_start": False,
    }
    schedule = TabulatedSchedule.cosine(config.size("num_train_timesteps", None, 2, sizes.STEPS.most))
    return Scheduler(schedule, PREDICTIONS[config.values.get("prediction_type", "epsilon")], sampling)


def described(schedule: Schedule, prediction: Prediction, sampling: SamplingConfig) -> dict[str, Any]:
    """The inverse of `read`: the settings of a scheduler_config.json. ValueError if UnCLIPScheduler cannot express one.

    Of the sampling only sampler, spacing, thresholding and the kind of start are described.
    """
    names = {value: name for name, value in PREDICTIONS.items()}
    variances = {value: name for name, value in VARIANCES.items()}
    sampler, threshold = sampling.sampler, sampling.thresholding
    steps = schedule.steps if isinstance(schedule, TabulatedSchedule) else 0
    for name, fits, value in (
        ("schedule", steps > 1 and schedule == TabulatedSchedule.cosine(steps), schedule),
        ("prediction", prediction in names, prediction),
        ("sampler", isinstance(sampler, DDPM) and sampler.gamma in variances, sampler),
        ("spacing", sampling.spacing == Linspace(), sampling.spacing),
        ("thresholding", isinstance(threshold, NoThreshold | StaticThreshold), threshold),
        ("keep_eps", not sampling.keep_eps, True),
        ("scaled_start", not sampling.scaled_start, True),
    ):
        if not fits:
            raise ValueError(f"diffusers' {NAME} has no {name} = {value}")
    assert isinstance(sampler, DDPM)  # see above
    clipped = isinstance(threshold, StaticThreshold)
    return {
        "_class_name": NAME,
        "num_train_timesteps": steps,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": names[prediction],
        "variance_type": variances[sampler.gamma],
        "clip_sample": clipped,
        "clip_sample_range": threshold.limit if isinstance(threshold, StaticThreshold) else 1.0,
    }
