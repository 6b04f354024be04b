"""Settings ⇄ JSON: everything that a preset can say comes back equal, and nothing else is read."""

import json
from dataclasses import replace

import pytest

from jaxdiff.diffusion import losses, parameterization, samplers, schedules, thresholding, time_grid, time_samplers
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.models.tiles import Tiles
from jaxdiff.systems import imagen
from jaxdiff.weights.settings import VERSION, check_version, from_json, to_json

PRESETS = {name: value for name, value in vars(imagen).items() if isinstance(value, DiffusionModel | SamplingConfig)}
STAGE = DiffusionModel()
OTHERS = [
    *(replace(STAGE, prediction=prediction) for prediction in parameterization.Prediction),
    replace(STAGE, schedule=schedules.CosineSchedule(shift=1.5, clip=15.0)),
    replace(STAGE, schedule=schedules.LinearBetaSchedule()),
    replace(STAGE, schedule=schedules.EDM()),
    replace(STAGE, schedule=schedules.RectifiedFlow()),
    replace(STAGE, schedule=schedules.TabulatedSchedule.linear(50)),
    *(
        replace(STAGE, time_sampler=sampler)
        for sampler in (
            time_samplers.UniformTimes(),
            time_samplers.LogSNRRange(-5.0, 0.0, 0.5, rest=time_samplers.LogSNRRange(-9.0, 2.0)),
            time_samplers.LogNormalTimes(-0.4, 1.0),
            time_samplers.LogitNormalTimes(0.5, 1.5),
        )
    ),
    *(
        replace(STAGE, weighting=weighting)
        for weighting in (
            losses.UniformWeighting(),
            losses.MinSNR(3.0),
            losses.PowerSNR(0.7),
            losses.SigmoidWeighting(2.0),
        )
    ),
    SamplingConfig(samplers.DDPM(0.3), spacing=time_grid.Karras(5.0)),
    SamplingConfig(samplers.DDIM(0.5), spacing=time_grid.UniformLogSNR(-5.0, 6.0)),
    SamplingConfig(samplers.DPMSolverPP2M(), guidance=Guidance(4.0, (-2.0, 3.0), 0.7)),
    SamplingConfig(samplers.Heun(True), thresholding=thresholding.DynamicThreshold(0.9, 1.5)),
    SamplingConfig(samplers.Euler(), thresholding=thresholding.NoThreshold(), tiles=Tiles(128, 16), aug_level=0.2),
]


def there_and_back(settings):
    return from_json(json.loads(json.dumps(to_json(settings))), "file")


def test_there_are_presets():
    assert {"BASE_64_2B", "SR_256", "SR_1024", "BASE_64_TINY", "SAMPLING_SR_TINY"} <= PRESETS.keys()


@pytest.mark.parametrize("settings", [*PRESETS.values(), *OTHERS], ids=[*PRESETS, *map(str, range(len(OTHERS)))])
def test_round_trip(settings):
    back = there_and_back(settings)
    assert back == settings and hash(back) == hash(settings) and type(back) is type(settings)


def changed(**changes):
    return to_json(STAGE) | changes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(**{"class": "Popen"}), "unknown class of settings 'Popen'"),
        (changed(**{"class": None}), "unknown class of settings None"),
        (changed(**{"class": ["Stage"]}), "unknown class of settings ['Stage']"),
        ({"resolution": 64}, "unknown class of settings None"),
        (
            changed(schedule={"class": "diffusion.CosineSchedule", "slope": 1}),
            "settings of diffusion.CosineSchedule that this version does not know",
        ),
        (changed(colour=3), "settings of imagen.Stage that this version does not know"),
        (changed(prediction={"class": "diffusion.Prediction", "member": "MAGIC"}), "MAGIC"),
        (changed(prediction={"class": "diffusion.Prediction"}), "member"),
        (changed(resolution=63), "63"),
        (changed(resolution="64"), "resolution of DiffusionModel is '64'"),
        (changed(low_resolution=0), "low_resolution"),
        (changed(unet=5), "unet of DiffusionModel is 5"),
        (changed(unet=None), "unet of DiffusionModel is None"),
        (changed(time_sampler=None), "time_sampler of DiffusionModel is None"),
        (
            changed(time_sampler={"class": "diffusion.LogSNRRange", "low": 1.0, "high": -1.0}),
            "a range of log-SNRs has low < high",
        ),
        (changed(schedule=None), "schedule of DiffusionModel is None"),
        (to_json(SamplingConfig()) | {"steps": 6.5}, "steps of SamplingConfig is 6.5"),
        (to_json(SamplingConfig()) | {"sampler": 5}, "sampler of SamplingConfig is 5"),
        (changed(text_dropout=7.0), "text_dropout"),
        (to_json(Guidance()) | {"weight": True}, "weight of Guidance is True, it takes only numbers"),
        (to_json(Guidance()) | {"weight": "3"}, "weight of Guidance is '3'"),
        (to_json(thresholding.DynamicThreshold()) | {"cap": True}, "cap of DynamicThreshold is True"),
        (
            to_json(SamplingConfig()) | {"steps": 0},
            "steps of SamplingConfig is 0, it takes only whole numbers from 1 to",
        ),
    ],
)
def test_refused_in_one_line(data, message):
    with pytest.raises(ValueError) as error:
        from_json(data, "some/stage.json")
    text = str(error.value)
    assert text.startswith("some/stage.json: ") and message in text and "\n" not in text


def test_files_of_another_version():
    check_version({"version": VERSION}, "a.json")
    for data, found in (({}, "1"), ({"version": 3}, "3"), ({"version": None}, "None"), ({"version": "2"}, "'2'")):
        with pytest.raises(ValueError, match=f"^a.json has version {found}, and version 2 is read here"):
            check_version(data, "a.json")
