"""scheduler_config.json: each setting is read or refused by name; published files are read; export is the inverse."""

import inspect
import json
import math
from dataclasses import replace

import pytest

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM, PLMS, DPMSolverPP2M, Euler, Heun
from jaxdiff.diffusion.schedules import CosineSchedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Leading, Linspace, Respaced, TabulatedKarras, Trailing, UniformTime
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.weights import schedulers

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LATENT = TabulatedSchedule.scaled_linear()
PNDM, DDIM_, DDPM_ = "PNDMScheduler", "DDIMScheduler", "DDPMScheduler"
EULER, ANCESTRAL, SOLVER = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"
PLAIN = {"thresholding": NoThreshold(), "keep_eps": False, "scaled_start": False}


def read(path, kind, learned=False, **settings):
    file = path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": kind, "skip_prk_steps": True} | settings))
    return schedulers.read(file, learned)


def sampling(path, kind, learned=False, **settings):
    return read(path, kind, learned, **settings).sampling


# Settings of the files that Stable Diffusion's repositories have, with those that their class ignores.
SD_1 = BETAS | {"num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
SD_2 = SD_1 | {"prediction_type": "v_prediction", "trained_betas": None, "_diffusers_version": "0.8.0"}
SDXL = SD_1 | {
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "trained_betas": None,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
TURBO = SDXL | {"timestep_spacing": "trailing", "sigma_max": None, "sigma_min": None, "timestep_type": "discrete"}
DPM = SD_1 | {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
    "predict_x0": True,
    "timestep_spacing": "leading",
}
PUBLISHED = {
    "SD 1.x": (PNDM, SD_1, Prediction.EPSILON, {"sampler": PLMS(), "spacing": Leading(1, to_first_entry=True)}),
    "SD 2.1": (
        *(DDIM_, SD_2, Prediction.V),
        {"sampler": DDIM(), "spacing": Leading(1, to_first_entry=True), "keep_eps": True},
    ),
    "SDXL": (EULER, SDXL, Prediction.EPSILON, {"sampler": Euler(), "spacing": Leading(1)}),
    "SDXL turbo": (
        *(ANCESTRAL, TURBO, Prediction.EPSILON),
        {"sampler": DDIM(1.0), "spacing": Trailing(), "scaled_start": True},
    ),
    "DPM++": (
        *(SOLVER, DPM, Prediction.EPSILON),
        {"sampler": DPMSolverPP2M(), "spacing": Leading(1, skip_cleanest=True)},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name, tmp_path):
    kind, settings, prediction, wanted = PUBLISHED[name]
    assert read(tmp_path, kind, **settings) == (LATENT, prediction, PLAIN | wanted)


def test_betas(tmp_path):
    of = lambda **settings: read(tmp_path, DDPM_, **settings).schedule  # noqa: E731
    assert of() == TabulatedSchedule.linear()
    assert of(beta_end=0.03, num_train_timesteps=50) == TabulatedSchedule.linear(50, beta_end=0.03)
    assert of(beta_schedule="squaredcos_cap_v2", beta_start=7) == TabulatedSchedule.cosine()
    assert of(**BETAS) == LATENT
    assert of(**BETAS, rescale_betas_zero_snr=True) == LATENT.zero_terminal_snr()
    of_euler = read(tmp_path, EULER, **BETAS, rescale_betas_zero_snr=True).schedule
    assert of_euler == LATENT.zero_terminal_snr(2.0**-24)


def test_samplers_and_spacings(tmp_path):
    karras, first = {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}
    fields = lambda *given, **settings: [sampling(tmp_path, given[0], **settings)[name] for name in given[1:]]  # noqa: E731
    assert fields(EULER, "spacing", "scaled_start") == [Linspace(rounded=False), True]
    assert fields(EULER, "spacing", "scaled_start", **karras) == [TabulatedKarras(Linspace(rounded=False)), True]
    wanted = [TabulatedKarras(Leading(3)), False]
    spaced = {"timestep_spacing": "leading", "steps_offset": 3}
    assert fields(EULER, "spacing", "scaled_start", **karras, **spaced) == wanted
    assert fields(ANCESTRAL, "spacing") == [Linspace(rounded=False)]
    assert fields(ANCESTRAL, "spacing", "scaled_start", timestep_spacing="leading") == [Leading(), False]
    assert fields(SOLVER, "spacing", "scaled_start") == [Linspace(skip_cleanest=True), False]
    assert fields(SOLVER, "spacing", timestep_spacing="trailing", steps_offset=1) == [Trailing()]
    assert fields(SOLVER, "spacing", **karras) == [TabulatedKarras(rounded=True)]
    assert fields(SOLVER, "sampler", lower_order_final=False) == [DPMSolverPP2M()]
    assert fields(SOLVER, "sampler", **first, lower_order_final=False) == [DPMSolverPP2M(False)]
    wanted = [DPMSolverPP2M(), TabulatedKarras(rounded=True, to_first_entry=True)]
    assert fields(SOLVER, "sampler", "spacing", **first, **karras, euler_at_final=True) == wanted
    assert fields(SOLVER, "sampler", lambda_min_clipped=-6.0, solver_type="bh2") == [DPMSolverPP2M()]
    assert fields(PNDM, "sampler", "spacing", set_alpha_to_one=True) == [PLMS(), Leading()]
    assert fields(PNDM, "sampler", prediction_type="v_prediction") == [PLMS(Prediction.V)]
    assert fields(DDIM_, "spacing", timestep_spacing="linspace") == [Linspace()]
    assert sampling(tmp_path, DDPM_, True, variance_type="learned_range")["sampler"] == DDPM(None)
    for kind, threshold in ((DDPM_, StaticThreshold()), (DDIM_, StaticThreshold()), (EULER, NoThreshold())):
        assert fields(kind, "thresholding") == [threshold]
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3}
    for kind, threshold in ((DDIM_, DynamicThreshold(0.9, 3.0)), (SOLVER, DynamicThreshold(0.9, 3.0))):
        assert fields(kind, "thresholding", **dynamic) == [threshold]
    for kind in (DDPM_, DDIM_):
        assert fields(kind, "thresholding", clip_sample_range=2.0) == [StaticThreshold(2.0)]
    assert fields(EULER, "thresholding", **dynamic) == [NoThreshold()]  # not a setting of this class


def test_every_setting_of_diffusers_is_known():
    pytest.importorskip("torch", reason="without PyTorch diffusers has no classes")
    import diffusers

    for kind, settings in schedulers.SETTINGS.items():
        parameters = dict(inspect.signature(getattr(diffusers, kind).__init__).parameters)
        assert parameters.pop("self") and parameters.keys() == settings.keys(), kind
        for name, parameter in parameters.items():
            assert settings[name][0] == parameter.default, (kind, name)


MISSHAPEN = ["x", [1], {"a": 1}, 7.5, -1, 12345678901]


@pytest.mark.parametrize("kind", schedulers.SETTINGS)
def test_misshapen_settings(kind, tmp_path):
    """Refused in one line that names the file, the setting and its value."""
    for name in schedulers.SETTINGS[kind]:
        for value in MISSHAPEN:
            given = BETAS | (
                {"thresholding": True} if name in ("dynamic_thresholding_ratio", "sample_max_value") else {}
            )
            if name in ("sample_max_value", "clip_sample_range") and value == 7.5:
                continue  # a good one
            with pytest.raises(ValueError) as error:
                read(tmp_path, kind, **given | {name: value})
            message = str(error.value)
            assert "\n" not in message and message.startswith(f"{tmp_path / 'scheduler_config.json'}: ")
            assert f"{name} = {value!r} is not supported, only " in message


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("LMSDiscreteScheduler", {}, "_class_name = 'LMSDiscreteScheduler' is not supported, only 'PNDMScheduler' or"),
        (None, {}, "_class_name = None is not supported"),
        (DDIM_, {"eta": 0.5, "wavelets": 1}, "unknown settings of DDIMScheduler: eta, wavelets"),
        (DDIM_, {"trained_betas": [0.1, 0.2]}, "trained_betas = .* is not supported, only None"),
        (DDIM_, {"prediction_type": "sample"}, "prediction_type = 'sample' .* only 'epsilon' or 'v_prediction'"),
        (DDIM_, {"clip_sample": 1}, "clip_sample = 1 is not supported, only true or false"),
        (DDIM_, {"steps_offset": 1000}, "steps_offset = 1000 is not supported, only a whole number from 0 to 999"),
        (DDIM_, {"beta_start": 0.03}, "beta_start = 0.03 is not supported, only a number up to beta_end 0.02"),
        (DDPM_, {"variance_type": "learned_range"}, "variance_type = 'learned_range' is not supported"),
        (PNDM, {"skip_prk_steps": None}, "skip_prk_steps = False is not supported, only True"),
        (EULER, {"use_beta_sigmas": True}, "use_beta_sigmas = True is not supported, only False"),
        (EULER, {"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min' is not supported, only 'zero'"),
        (EULER, {"sigma_min": 0.1}, "sigma_min = 0.1 is not supported, only None"),
        (EULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True does not fit these betas: "),
        (SOLVER, {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver\\+\\+' is not supported"),
        (SOLVER, {"solver_order": 3}, "solver_order = 3 is not supported, only 2"),
        (SOLVER, {"lambda_min_clipped": -5.0}, "lambda_min_clipped = -5.0 is not supported, only numbers up to -5.06"),
        (SOLVER, {"final_sigmas_type": "sigma_min"}, "lower_order_final = True is not supported, only False with"),
        (
            *(SOLVER, {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}),
            "use_karras_sigmas = True is not supported, only False with beta_schedule squaredcos_cap_v2",
        ),
    ],
)
def test_what_is_refused(kind, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, kind, **settings)
    assert "\n" not in str(error.value) and str(tmp_path / "scheduler_config.json") in str(error.value)


def config(sampler, spacing, threshold=None, **fields):
    return SamplingConfig(sampler, spacing=spacing, thresholding=threshold or NoThreshold(), **fields)


KARRAS = TabulatedKarras(Linspace(rounded=False))
EXPORTED = [
    config(PLMS(), Leading(1, to_first_entry=True)),
    config(DDIM(), Leading(1)),
    config(DDIM(), Trailing(to_first_entry=True), StaticThreshold(), keep_eps=True),
    config(DDPM(1.0), Linspace(), DynamicThreshold(0.9, 2.0)),
    config(DDPM(0.0), Leading(), StaticThreshold(2.0)),
    config(Euler(), Leading(1)),
    config(Euler(), KARRAS, scaled_start=True),
    config(Euler(), TabulatedKarras(Leading(2))),
    config(DDIM(1.0), Trailing(), scaled_start=True),
    config(DPMSolverPP2M(), Leading(1, skip_cleanest=True)),
    config(DPMSolverPP2M(), TabulatedKarras(rounded=True)),
    config(DPMSolverPP2M(False), Linspace(skip_cleanest=True, to_first_entry=True)),
]
NAMES = ("sampler", "spacing", "thresholding", "scaled_start")


@pytest.mark.parametrize("wanted", EXPORTED, ids=lambda each: f"{each.sampler} {each.spacing}")
def test_what_is_described_is_read_back(wanted, tmp_path):
    values = schedulers.described(LATENT, Prediction.EPSILON, wanted)
    found = read(tmp_path, values.pop("_class_name"), **values)
    assert found[:2] == (LATENT, Prediction.EPSILON)
    assert [found.sampling[name] for name in NAMES] == [getattr(wanted, name) for name in NAMES]


@pytest.mark.parametrize(
    "schedule",
    [
        TabulatedSchedule.linear(),
        TabulatedSchedule.linear(37, 0.0012345678, 0.0345),
        TabulatedSchedule.scaled_linear(100, 0.001, 0.01),
        TabulatedSchedule.cosine(50),
        LATENT.zero_terminal_snr(),
        TabulatedSchedule.cosine().zero_terminal_snr(),
    ],
    ids=lambda schedule: str(schedule.alpha_bar[-1]),
)
@pytest.mark.parametrize("prediction", schedulers.PREDICTIONS.values())
def test_schedules_are_read_back(schedule, prediction, tmp_path):
    values = schedulers.described(schedule, prediction, config(DDIM(), Leading()))
    assert read(tmp_path, values.pop("_class_name"), **values)[:2] == (schedule, prediction)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": Heun()}, "no sampler = Heun"),
        ({"sampler": DDIM(0.5)}, r"no sampler = DDIM\(eta=0.5\)"),
        ({"sampler": DDPM(None)}, r"no sampler = DDPM\(gamma=None\)"),
        ({"thresholding": StaticThreshold()}, "no sampler = .* with keep_eps = False"),
        ({"spacing": UniformTime()}, r"no spacing = UniformTime\(\)"),
        ({"spacing": Respaced((2, 3))}, "no spacing = Respaced"),
        ({"spacing": Linspace(rounded=False)}, r"no spacing = Linspace\(rounded=False.* in DDIMScheduler"),
        ({"spacing": TabulatedKarras()}, "no spacing = TabulatedKarras.* in DDIMScheduler"),
        ({"scaled_start": True}, "no scaled_start = True in DDIMScheduler"),
        ({"sampler": Euler(), "scaled_start": True}, "no scaled_start = True in EulerDiscreteScheduler"),
        ({"sampler": Euler(), "thresholding": StaticThreshold()}, "no thresholding = StaticThreshold"),
        ({"sampler": DPMSolverPP2M(False), "spacing": Leading(skip_cleanest=True)}, "no sampler = DPMSolverPP2M"),
        ({"sampler": DPMSolverPP2M()}, "no spacing = Leading"),
        ({"sampler": Euler(), "spacing": Leading(to_first_entry=True)}, "no spacing = Leading"),
        ({"sampler": PLMS(Prediction.V)}, "no sampler = PLMS"),
    ],
)
def test_what_diffusers_does_not_have(changes, message):
    sampling = replace(config(DDIM(), Leading()), **changes)
    with pytest.raises(ValueError, match=f"diffusers has {message}") as error:
        schedulers.described(LATENT, Prediction.EPSILON, sampling)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "schedule", [CosineSchedule(), TabulatedSchedule.cosine(offset=0.01), TabulatedSchedule(LATENT.alpha_bar, 40.0)]
)
def test_schedules_that_diffusers_does_not_have(schedule):
    with pytest.raises(ValueError, match="diffusers has no schedule = "):
        schedulers.described(schedule, Prediction.EPSILON, config(DDIM(), Leading()))
    with pytest.raises(ValueError, match=r"no prediction = Prediction\.X0"):
        schedulers.described(LATENT, Prediction.X0, config(DDIM(), Leading()))
