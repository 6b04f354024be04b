"""Settings ⇄ JSON: everything that a preset can say comes back equal, and nothing else is read."""

import json
from dataclasses import replace

import pytest

from jaxdiff.core.products import ImageSpec, LatentSpec
from jaxdiff.diffusion import losses, parameterization, samplers, schedules, thresholding, time_grid, time_samplers
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.conditioners import Enlargement, LowResConditioner, NullText, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.models.tiles import Tiles
from jaxdiff.nets.activation_sharding import ActivationSharding
from jaxdiff.nets.blocks import Activation
from jaxdiff.nets.conditioning import MaskedText, WholeText
from jaxdiff.nets.execution import ExecutionConfig
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig
from jaxdiff.systems import deepfloyd, imagen, imagen_tiny
from jaxdiff.weights.settings import VERSION, check_version, from_json, to_json

PRESETS = {
    name: value
    for system in (imagen, imagen_tiny, deepfloyd)
    for name, value in vars(system).items()
    if isinstance(value, DiffusionModel | SamplingConfig | time_grid.Respaced)
}
MODEL = DiffusionModel()
OTHERS = [
    *(replace(MODEL, prediction=prediction) for prediction in parameterization.Prediction),
    replace(MODEL, schedule=schedules.CosineSchedule(shift=1.5, clip=15.0)),
    replace(MODEL, schedule=schedules.LinearBetaSchedule()),
    replace(MODEL, schedule=schedules.EDM()),
    replace(MODEL, schedule=schedules.RectifiedFlow()),
    replace(MODEL, schedule=schedules.TabulatedSchedule.linear(50)),
    *(
        replace(MODEL, time_sampler=sampler)
        for sampler in (
            time_samplers.UniformTimes(),
            time_samplers.LogSNRRange(-5.0, 0.0, 0.5, rest=time_samplers.LogSNRRange(-9.0, 2.0)),
            time_samplers.LogNormalTimes(-0.4, 1.0),
            time_samplers.LogitNormalTimes(0.5, 1.5),
        )
    ),
    *(
        replace(MODEL, weighting=weighting)
        for weighting in (
            losses.UniformWeighting(),
            losses.MinSNR(3.0),
            losses.PowerSNR(0.7),
            losses.SigmoidWeighting(2.0),
        )
    ),
    replace(MODEL, product=LatentSpec(), side=8),
    replace(MODEL, product=ImageSpec(1, 2)),
    MODEL.reading(77, 768),
    replace(MODEL, conditioners=(TextConditioner(6, 4, 0.2, NullText.EMPTY),)),
    replace(MODEL, conditioners=(LowResConditioner(2), TextConditioner())),
    replace(MODEL, conditioners=(TextConditioner(), LowResConditioner(8, schedules.TabulatedSchedule.cosine(20), 0.5))),
    replace(MODEL, conditioners=(TextConditioner(), LowResConditioner(enlargement=Enlargement.BILINEAR, channels=1))),
    *(
        replace(MODEL, unet=replace(MODEL.unet, **settings))
        for settings in (
            {"attention": AttentionConfig((True,) * 4, (False, True) * 2, 32, 4, 2, group_text=True)},
            {"conditioning": ConditioningConfig(96, None, 64)},
            {"conditioning": ConditioningConfig(96, MaskedText(64, pool=False))},
            {"conditioning": ConditioningConfig(96, WholeText(64, pool_heads=4))},
            {"execution": ExecutionConfig("bfloat16")},
            {"learned_variance": False, "activation": Activation.GELU, "norm_groups": 16, "residual_scale": 0.7},
        )
    ),
    SamplingConfig(samplers.DDPM(None), keep_eps=True, clean_known=True),
    SamplingConfig(samplers.DDPM(0.3), spacing=time_grid.Karras(5.0)),
    SamplingConfig(samplers.DDIM(0.5), spacing=time_grid.UniformLogSNR(-5.0, 6.0)),
    SamplingConfig(samplers.DPMSolverPP2M(), guidance=Guidance(4.0, (-2.0, 3.0), 0.7)),
    SamplingConfig(samplers.Heun(True), thresholding=thresholding.DynamicThreshold(0.9, 1.5)),
    SamplingConfig(samplers.PLMS(parameterization.Prediction.V), spacing=time_grid.Leading(1, to_first_entry=True)),
    SamplingConfig(spacing=time_grid.TabulatedKarras(time_grid.Linspace(rounded=False)), scaled_start=True),
    SamplingConfig(spacing=time_grid.TabulatedKarras(rounded=True, to_first_entry=True)),
    SamplingConfig(samplers.Euler(), thresholding=thresholding.NoThreshold(), tiles=Tiles(128, 16), aug_level=0.2),
]


def there_and_back(settings):
    return from_json(json.loads(json.dumps(to_json(settings))), "file")


def test_there_are_presets():
    assert {"BASE_64_2B", "SR_256", "SR_1024", "BASE_64_TINY", "SAMPLING_SR_TINY"} <= PRESETS.keys()
    assert {"IF_I_M", "IF_I_L", "IF_I_XL", "IF_II_M", "IF_II_L", "SAMPLING_I", "SAMPLING_II"} <= PRESETS.keys()


def test_how_something_is_computed_is_no_part_of_it():
    """Of the network's execution the compute type alone is kept, and nothing else is read."""
    how = ExecutionConfig("bfloat16", "blocks", True, ActivationSharding(("data",)))
    told = to_json(replace(MODEL, unet=replace(MODEL.unet, execution=how)))
    assert told["unet"]["execution"] == {"class": "nets.Execution", "dtype": "bfloat16"}
    told["unet"]["execution"] |= {"remat": "outputs", "scan": True, "sharding": 3}
    assert from_json(told, "file").unet.execution == ExecutionConfig("bfloat16")


@pytest.mark.parametrize("settings", [*PRESETS.values(), *OTHERS], ids=[*PRESETS, *map(str, range(len(OTHERS)))])
def test_round_trip(settings):
    back = there_and_back(settings)
    assert back == settings and hash(back) == hash(settings) and type(back) is type(settings)


def changed(**changes):
    return to_json(MODEL) | changes


def network(group=None, **changes):
    """The model with other settings of its network, or of one group of them."""
    unet = to_json(MODEL.unet)
    (unet if group is None else unet[group]).update(changes)
    return changed(unet=unet)


def conditioned(conditioner, **changes):
    return changed(conditioners=[to_json(conditioner) | changes])


PRODUCT, ATTENTION, LOW_RES = (to_json(settings) for settings in (ImageSpec(), AttentionConfig(), LowResConditioner()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(**{"class": "Popen"}), "unknown class of settings 'Popen'"),
        (changed(**{"class": None}), "unknown class of settings None"),
        (changed(**{"class": ["models.Diffusion"]}), "unknown class of settings ['models.Diffusion']"),
        ({"side": 64}, "unknown class of settings None"),
        (
            changed(schedule={"class": "diffusion.CosineSchedule", "slope": 1}),
            "settings of diffusion.CosineSchedule that this version does not know",
        ),
        (changed(colour=3), "settings of models.Diffusion that this version does not know"),
        (changed(prediction={"class": "diffusion.Prediction", "member": "MAGIC"}), "MAGIC"),
        (changed(prediction={"class": "diffusion.Prediction"}), "member"),
        (changed(side=63), "a side of 63 pixels is not a multiple of the network's stride 8"),
        (changed(side="64"), "side of DiffusionModel is '64'"),
        (changed(side=None), "side of DiffusionModel is None"),
        (changed(resolution=64), "settings of models.Diffusion that this version does not know"),
        (changed(product=None), "product of DiffusionModel is None"),
        (changed(product=3), "product of DiffusionModel is 3"),
        (changed(product=ATTENTION), "product of DiffusionModel is AttentionConfig("),
        (changed(product={"class": "core.Codes"}), "unknown class of settings 'core.Codes'"),
        (changed(product={"class": "core.Token"}), "product of DiffusionModel is TokenSpec("),
        (changed(product=PRODUCT | {"channels": 0}), "channels of ImageSpec is 0, it takes only whole numbers from 1"),
        (changed(product=PRODUCT | {"stride": 2**40}), "stride of ImageSpec is 1099511627776, it takes only whole"),
        (changed(conditioners=None), "conditioners of DiffusionModel is None"),
        (changed(conditioners=LOW_RES), "conditioners of DiffusionModel is LowResConditioner("),
        (changed(conditioners=[None]), "conditioners of DiffusionModel is (None,)"),
        (changed(conditioners=[PRODUCT]), "conditioners of DiffusionModel is (ImageSpec("),
        (changed(conditioners=[]), "a network has a conditioner with tokens if and only if it reads text"),
        (changed(conditioners=[LOW_RES]), "a network has a conditioner with tokens if and only if it reads text"),
        (changed(conditioners=[LOW_RES] * 2), "two conditioners of the same type"),
        (changed(residual=True), "residual is for super-resolution models that predict x0"),
        (changed(conditioners=[to_json(TextConditioner()), LOW_RES | {"factor": 5}]), "not a multiple of the factor 5"),
        (conditioned(LowResConditioner(), factor=0), "factor of LowResConditioner is 0, it takes only whole numbers"),
        (conditioned(LowResConditioner(), channels=None), "channels of LowResConditioner is None"),
        (conditioned(LowResConditioner(), max_level=1.5), "max_level 1.5: must lie in [0, 1]"),
        (conditioned(LowResConditioner(), max_level=True), "max_level of LowResConditioner is True, it takes only"),
        (conditioned(LowResConditioner(), augmentation="noise"), "augmentation of LowResConditioner is 'noise'"),
        (conditioned(LowResConditioner(), augmentation=PRODUCT), "augmentation of LowResConditioner is ImageSpec("),
        (conditioned(LowResConditioner(), enlargement="CUBIC"), "enlargement of LowResConditioner is 'CUBIC'"),
        (
            conditioned(TextConditioner(), dropout=7.0),
            "dropout 7.0: must be a fraction of the captions, between 0 and 1",
        ),
        (conditioned(TextConditioner(), dropout=None), "dropout of TextConditioner is None"),
        (conditioned(TextConditioner(), null=None), "null of TextConditioner is None"),
        (conditioned(TextConditioner(), null={"class": "models.NullText", "member": "ONES"}), "ONES"),
        (conditioned(TextConditioner(), width=0), "width of TextConditioner is 0, it takes only whole numbers from 1"),
        (conditioned(TextConditioner(), length=2**20), "length of TextConditioner is 1048576, it takes only whole"),
        (conditioned(TextConditioner(), tokens=3), "settings of models.TextConditioner that this version does not"),
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
        (network(attention=None), "attention of UNetConfig is None"),
        (network(attention=PRODUCT), "attention of UNetConfig is ImageSpec("),
        (network(conditioning=None), "conditioning of UNetConfig is None"),
        (network(execution=None), "execution of UNetConfig is None"),
        (network(channels_last=1), "settings of nets.UNet that this version does not know"),
        (network("attention", self_attention=[True]), "must have one entry per level"),
        (network("attention", self_attention=[1] * 4), "self_attention of AttentionConfig is (1, 1, 1, 1)"),
        (network("attention", group_text="yes"), "group_text of AttentionConfig is 'yes'"),
        (network("attention", heads=7), "attention at level 1: 7 heads do not divide a width of 1024"),
        (network("conditioning", width=None), "width of ConditioningConfig is None"),
        (network("conditioning", text="MaskedText"), "text of ConditioningConfig is 'MaskedText'"),
        (network("conditioning", text=PRODUCT), "text of ConditioningConfig is ImageSpec("),
        (network("conditioning", text=to_json(MaskedText(pool_heads=3))), "pool_heads: 3 heads do not divide a width"),
        (network("conditioning", text=to_json(MaskedText()) | {"pool": 1}), "pool of MaskedText is 1"),
        (network("execution", dtype="float16"), "dtype of ExecutionConfig is 'float16'"),
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
        with pytest.raises(ValueError, match=f"^a.json has version {found}, but only version 2 is supported"):
            check_version(data, "a.json")
