"""DeepFloyd IF's settings: what is not supported is named in one line, what is left out is as in diffusers."""

import inspect
import json
import re
from dataclasses import replace

import pytest
import small_if
from small import executed

from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold, NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Leading, Linspace, Trailing
from jaxdiff.systems import deepfloyd as presets
from jaxdiff.weights import deepfloyd
from jaxdiff.weights.deepfloyd_pipeline import read_scheduler

NETWORKS = small_if.NETWORKS
BASE, SR = (deepfloyd._hub_config(network) for network in NETWORKS)
MISSHAPEN = ["x", [1], {"a": 1}, 7.5, -1, 12345678901]
"""Of a wrong type, or a wrong number, for whatever setting."""


def refused(read, path, values, name, value):
    """The message about a setting, which must be one line that tells the file, the name and the value."""
    path.write_text(json.dumps(values | {name: value}))
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{path}: "), (name, value, message)
    return message


def read(path, values):
    path.write_text(json.dumps(values))
    return deepfloyd.read_config(path)


def test_every_setting_of_diffusers_is_known():
    pytest.importorskip("torch", reason="without PyTorch diffusers has no classes")
    from diffusers import UNet2DConditionModel

    theirs = inspect.signature(UNet2DConditionModel.__init__).parameters
    assert {*deepfloyd.FIXED, *deepfloyd.READ} == set(theirs) - {"self"}
    ours = deepfloyd.READ | {name: default for name, (default, *_) in deepfloyd.FIXED.items()}
    for name, parameter in theirs.items():
        if name in ours and name not in ("down_block_types", "up_block_types"):
            default = parameter.default
            assert ours[name] == (list(default) if isinstance(default, tuple) else default), name


@pytest.mark.parametrize("name", deepfloyd.FIXED)
def test_settings_of_one_value(name, tmp_path):
    for value in MISSHAPEN:
        message = refused(deepfloyd.read_config, tmp_path / "config.json", BASE, name, value)
        assert f"{name} = {value!r} is not supported, only " in message
    default, *allowed = deepfloyd.FIXED[name]
    left_out = {key: value for key, value in BASE.items() if key != name}
    for values in (left_out, left_out | {name: None}):
        if default in allowed:
            assert read(tmp_path / "config.json", values) == NETWORKS[0]
        else:
            message = refused(deepfloyd.read_config, tmp_path / "config.json", values, "act_fn", "gelu")
            assert f"{name} = {default!r} is not supported" in message


READ = [name for name in deepfloyd.READ if name not in ("sample_size", "dropout")]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("given", [BASE, SR], ids=["stage I", "stage II"])
def test_settings_that_are_read(name, given, tmp_path):
    good = (7.5, 12345678901) if name == "resnet_out_scale_factor" else ()  # though the middle's is another
    for value in (value for value in MISSHAPEN if value not in good):
        message = refused(deepfloyd.read_config, tmp_path / "config.json", given, name, value)
        assert f"{name} = {value!r} is not supported, only " in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name = 'UNet2DModel' is not supported"),
        ({"_class_name": None}, "_class_name = None is not supported"),
        ({"wavelets": 1, "axes": 2}, "unknown settings of UNet2DConditionModel: axes, wavelets"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types = .* only 2 of ResnetDownsampleBlock2D and"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"]}, "down_block_types = .* only 2 of"),
        ({"down_block_types": [["a"], 5]}, "down_block_types = .* only 2 of"),
        ({"down_block_types": None}, "down_block_types = None is not supported"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2}, "up_block_types = .* mirror"),
        ({"mid_block_type": None}, "mid_block_type = 'UNetMidBlock2DCrossAttn' is not supported"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention = True is not supported"),
        ({"in_channels": 6}, "in_channels = 6 is not supported, only 3"),
        ({"class_embed_type": "timestep"}, "in_channels = 3 is not supported, only 6"),
        ({"block_out_channels": [32, 48]}, r"block_out_channels = \[32, 48\] is not supported, only multiples of the"),
        ({"block_out_channels": [30, 60]}, r"block_out_channels = \[30, 60\] .* that one of 32"),
        ({"block_out_channels": [32, True]}, r"block_out_channels = \[32, True\] is not supported"),
        ({"block_out_channels": []}, r"block_out_channels = \[\] is not supported"),
        ({"layers_per_block": [1]}, r"layers_per_block = \[1\] .* one for each level"),
        ({"layers_per_block": 0}, "layers_per_block = 0 is not supported"),
        ({"layers_per_block": True}, "layers_per_block = True is not supported"),
        ({"attention_head_dim": 48}, "attention_head_dim = 48 is not supported, only a divisor of 64"),
        ({"attention_head_dim": [8, 8]}, r"attention_head_dim = \[8, 8\] is not supported"),
        ({"cross_attention_dim": 48}, "cross_attention_dim = 48 is not supported, only a multiple of 32"),
        ({"addition_embed_type_num_heads": 5}, "addition_embed_type_num_heads = 5 .* a divisor of 24"),
        ({"encoder_hid_dim": None}, "encoder_hid_dim = None is not supported"),
        ({"resnet_skip_time_act": True}, "time_embedding_act_fn = None is not supported, only 'gelu'"),
        ({"time_embedding_act_fn": "gelu"}, "time_embedding_act_fn = 'gelu' is not supported, only None"),
        ({"resnet_out_scale_factor": 2.0}, "mid_block_scale_factor = 1.0 is not supported, only 2.0"),
        ({"resnet_out_scale_factor": 0}, "resnet_out_scale_factor = 0 is not supported"),
        ({"resnet_out_scale_factor": True}, "resnet_out_scale_factor = True is not supported"),
        ({"layers_per_block": 10**6}, "layers_per_block = 1000000 is not supported, only whole numbers from 1 to 256"),
        ({"layers_per_block": [200, 200]}, "400 blocks in total: at most 256"),
        ({"block_out_channels": [32] * 10**6}, r"block_out_channels = \[32, 32, .*\] is not .* of at most 12"),
        ({"block_out_channels": [32, 2**30]}, r"block_out_channels = \[32, 1073741824\] is not supported"),
        ({"act_fn": "relu"}, "act_fn = 'relu' is not supported, only 'silu' or 'gelu'"),
        ({"out_channels": 4}, "out_channels = 4 is not supported, only 3 or 6"),
    ],
)
def test_settings_that_do_not_fit(values, message, tmp_path):
    (name, value), *others = values.items()
    told = refused(deepfloyd.read_config, tmp_path / "config.json", BASE | dict(others), name, value)
    assert re.search(message, told), told


def test_settings_said_otherwise(tmp_path):
    """What a file may leave out, say as one number for all levels, or have for training alone."""
    path = tmp_path / "config.json"
    assert read(path, BASE) == NETWORKS[0] and read(path, SR) == NETWORKS[1]
    assert read(path, BASE | {"layers_per_block": 1, "dropout": 0.3, "_name_or_path": 3}) == NETWORKS[0]
    for name in ("time_embedding_act_fn", "class_embed_type", "mid_block_only_cross_attention", "dropout"):
        assert read(path, {key: value for key, value in BASE.items() if key != name}) == NETWORKS[0]
    wide = read(path, BASE | {"time_embedding_dim": None})
    conditioning = replace(NETWORKS[0].unet.conditioning, width=4 * 32)
    assert wide == NETWORKS[0]._replace(unet=replace(NETWORKS[0].unet, conditioning=conditioning))
    half = wide._replace(unet=executed(wide.unet, dtype="bfloat16"))
    assert deepfloyd.read_config(path, "bfloat16") == half
    assert read(path, BASE | {"encoder_hid_dim": 48}) == NETWORKS[0]._replace(text_width=48)
    once = {"resnet_skip_time_act": True, "time_embedding_act_fn": "gelu"}
    assert read(path, BASE | once) == NETWORKS[0]


@pytest.mark.parametrize("text", ["[]", "3", "{", "", "\x00"])
def test_files_that_are_no_settings(text, tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        deepfloyd.read_config(path)
    for read in (deepfloyd.read_config, lambda path: read_scheduler(path, True)):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not JSON with settings") as error:
            read(path)
        assert "\n" not in str(error.value)


# Schedulers

PUBLISHED = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.15.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.5,
    "thresholding": True,
    "trained_betas": None,
    "variance_type": "learned_range",
}
DEFAULTS = {"keep_eps": False, "scaled_start": False}


def scheduler(path, learned=True, **changes):
    path.write_text(json.dumps(PUBLISHED | changes))
    return read_scheduler(path, learned)


def test_schedulers(tmp_path):
    path = tmp_path / "scheduler_config.json"
    assert scheduler(path) == (
        TabulatedSchedule.cosine(),
        {"sampler": DDPM(None), "thresholding": DynamicThreshold(0.95, 1.5)} | DEFAULTS,
    )
    fixed = {"variance_type": "fixed_large", "thresholding": False, "num_train_timesteps": 50}
    assert scheduler(path, False, **fixed) == (
        TabulatedSchedule.cosine(50),
        {"sampler": DDPM(1.0), "thresholding": StaticThreshold()} | DEFAULTS,
    )
    ddim = scheduler(path, False, _class_name="DDIMScheduler", thresholding=False, clip_sample=False)[1]
    assert ddim == DEFAULTS | {"sampler": DDIM(), "keep_eps": True, "thresholding": NoThreshold()}
    assert scheduler(path, sample_max_value=1)[1]["thresholding"] == DynamicThreshold(0.95, 1.0)
    # What is left out is diffusers' own.
    path.write_text(json.dumps({"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}))
    assert read_scheduler(path, True) == (
        TabulatedSchedule.cosine(),
        {"sampler": DDPM(0.0), "thresholding": StaticThreshold()} | DEFAULTS,
    )


def test_where_the_steps_lie(tmp_path):
    """What the published files do not say is left to the presets; what a file says is done."""
    path = tmp_path / "scheduler_config.json"
    for name, spacing in (("leading", Leading()), ("trailing", Trailing()), ("linspace", Linspace())):
        assert scheduler(path, timestep_spacing=name)[1]["spacing"] == spacing
    assert scheduler(path, timestep_spacing="leading", steps_offset=1)[1]["spacing"] == Leading(1)
    assert scheduler(path, steps_offset=3)[1]["spacing"] == Leading(3)
    assert scheduler(path, timestep_spacing="trailing", steps_offset=1)[1]["spacing"] == Trailing()
    for settings in ({}, {"timestep_spacing": None}, {"steps_offset": 0}):
        assert "spacing" not in scheduler(path, **settings)[1]


@pytest.mark.parametrize(
    ("changes", "learned", "message"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, True, "_class_name = 'DPMSolverMultistepScheduler' is not"),
        ({"beta_schedule": None}, True, "beta_schedule = 'linear' is not supported"),
        ({"variance_type": "learned"}, True, "variance_type = 'learned' is not supported"),
        ({"variance_type": "learned_range"}, False, "variance_type = 'learned_range' is not supported, only 'fixed_"),
        ({"prediction_type": "v_prediction"}, True, "prediction_type = 'v_prediction' is not supported"),
        ({"steps_offset": 1000}, True, "steps_offset = 1000 is not supported, only a whole number from 0 to 999"),
        (
            {"timestep_spacing": "karras"},
            True,
            "timestep_spacing = 'karras' is not .* 'leading' or 'trailing' or 'lins",
        ),
        ({"clip_sample_range": 2.0}, True, "clip_sample_range = 2.0 is not supported, only 1.0"),
        ({"set_alpha_to_one": False}, True, "set_alpha_to_one = False is not supported, only True"),
        ({"num_train_timesteps": 2**16 + 1}, True, "num_train_timesteps = 65537 is not supported"),
        ({"rescale_betas_zero_snr": True}, True, "rescale_betas_zero_snr = True is not supported"),
        ({"num_train_timesteps": 1}, True, "num_train_timesteps = 1 is not supported"),
        ({"num_train_timesteps": True}, True, "num_train_timesteps = True is not supported"),
        ({"thresholding": 1}, True, "thresholding = 1 is not supported, only true or false"),
        ({"dynamic_thresholding_ratio": "0.95"}, True, "dynamic_thresholding_ratio = '0.95' is not supported"),
        ({"dynamic_thresholding_ratio": 0}, True, "dynamic_thresholding_ratio = 0 is not supported"),
        ({"sample_max_value": True}, True, "sample_max_value = True is not supported"),
        ({"sample_max_value": float("nan")}, True, "sample_max_value = nan is not supported"),
        ({"eta": 2}, True, "unknown settings of DDPMScheduler: eta"),
    ],
)
def test_schedulers_that_are_not_supported(changes, learned, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        scheduler(tmp_path / "scheduler_config.json", learned, **changes)
    assert "\n" not in str(error.value) and "scheduler_config.json: " in str(error.value)


@pytest.mark.parametrize("name", ["resnet_out_scale_factor", "block_out_channels", "layers_per_block", "in_channels"])
def test_a_null_where_something_has_to_be(name, tmp_path):
    path = tmp_path / "config.json"
    network = deepfloyd.Network(presets.IF_I_M.unet, presets.T5_XXL[1], False)
    path.write_text(json.dumps(deepfloyd._hub_config(network) | {name: None}))
    with pytest.raises(ValueError, match=f"{name} = None is not supported, only "):
        deepfloyd.read_config(path)


def test_what_a_solver_left_in_the_published_files(tmp_path):
    left = {"lambda_min_clipped": -5.1, "solver_order": 2, "algorithm_type": "dpmsolver++"}
    path = tmp_path / "scheduler_config.json"
    assert scheduler(path, True, **left) == scheduler(path, True)
