"""Names of single files ⇄ those of diffusers and transformers, at the full public sizes, against diffusers' converters.

The tensors of the full sizes have shapes only (PyTorch's meta device).
"""

import inspect
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxdiff.weights import lazy, single_file, single_file_families, single_file_kinds, single_file_names

torch = pytest.importorskip("torch", reason="diffusers' converters are PyTorch's")
diffusers = pytest.importorskip("diffusers", reason="names are compared with diffusers'")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("diffusers.loaders.single_file_utils")

FAMILIES = single_file_families.FAMILIES
every = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
networks = pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES if f.unet["in_channels"] in (4, 7) and f is not single_file_families.SD_2_BASE],
    ids=lambda family: family.architecture,
)
"""Without those of the same names."""
TYPES = {
    "stable-diffusion-v1": "v1",
    "stable-diffusion-v1-inpainting": "inpainting",
    "stable-diffusion-v2-768-v": "v2",
    "stable-diffusion-v2-512": "v2",
    "stable-diffusion-v2-inpainting": "inpainting_v2",
    "stable-diffusion-x4-upscaler": "upscale",
    "stable-diffusion-xl-v1-base": "xl_base",
    "stable-diffusion-xl-v1-inpainting": "xl_inpaint",
    "stable-diffusion-xl-v1-refiner": "xl_refiner",
}
"""diffusers' names of the families."""
EXTRAS = (
    *("betas", "alphas_cumprod", "model_ema.decay", "model_ema.num_updates", "denoiser.sigmas", "logvar"),
    "cond_stage_model.logit_scale",
)


class Shape:
    """A tensor that must not be read."""

    dtype = "F32"

    def __init__(self, shape):
        self.shape = tuple(shape)

    def read(self, types=()):
        raise AssertionError("a tensor was read")


def built(family):
    """The models of a family, of PyTorch, on the current device."""
    models = {
        "unet": diffusers.UNet2DConditionModel.from_config(family.unet),
        "vae": diffusers.AutoencoderKL.from_config(family.vae),
    }
    for name, encoder in family.text_encoders.items():
        kind = getattr(transformers, encoder.config["architectures"][0])
        models[name] = kind(transformers.CLIPTextConfig(**encoder.config))
    return models


def hub_names(state):
    """CLIP's names as the published files have them: transformers 5.6 left out the prefix."""
    bare = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(bare) else name: tensor for name, tensor in state.items()}


@cache
def states(family):
    """The tensors of each component, without values."""
    with torch.device("meta"):
        models = built(family)
    found = {name: dict(model.state_dict()) for name, model in models.items()}
    return {name: hub_names(state) if "text" in name else state for name, state in found.items()}


@cache
def single(family):
    """All names and shapes of a single file as we write it."""
    components = {n: {k: Shape(t.shape) for k, t in state.items()} for n, state in states(family).items()}
    return single_file.join(components, family)


def converted(tensors, family, ema=False, width=None):
    """The components as diffusers' converters make them of a single file. width: of OpenCLIP, if not the family's."""
    result = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), family.unet, extract_ema=ema),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), family.vae),
    }
    for name, encoder in family.text_encoders.items():
        if encoder.layout is single_file_families.TextLayout.TRANSFORMERS:
            result[name] = theirs.convert_ldm_clip_checkpoint(tensors)
        else:
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=width or encoder.config["hidden_size"]))
            result[name] = theirs.convert_open_clip_checkpoint(model, tensors, encoder.prefix)
    return result


def shapes(components):
    return {name: {k: tuple(t.shape) for k, t in state.items()} for name, state in components.items()}


@every
def test_diffusers_reads_our_names(family):
    """Nothing is missing, left over or of another shape, and diffusers recognises the family."""
    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in single(family).items()}
    assert shapes(converted(tensors, family)) == shapes(states(family))
    assert theirs.infer_diffusers_model_type(tensors) == TYPES[family.architecture]


@every
def test_our_names_come_back(family):
    where = Path("model.safetensors")
    opened = single_file.split(single(family) | {name: Shape(()) for name in EXTRAS}, family, where)
    assert shapes(opened.components) == shapes(states(family))
    assert opened.ignored == tuple(sorted(EXTRAS))


@every
def test_the_family_is_recognised(family):
    """Names and shapes are enough, but for the prediction."""
    names = single(family)
    assert single_file_kinds.family_of(names, {}, "file", family.prediction) is family
    assert single_file_kinds.family_of(names, single_file.described(family), "file") is family
    if family is not single_file_families.SD_2_BASE:
        assert single_file_kinds.family_of(names, {}, "file") is family


def numbered(family):
    """A single file as published, with what is not used, of small tensors: each has its own values.

    q, k and v of OpenCLIP are three rows.
    """
    names = list(single(family))
    for encoder in family.text_encoders.values():
        if encoder.layout is single_file_families.TextLayout.TRANSFORMERS:
            names.append(f"{encoder.prefix}text_model.embeddings.position_ids")
            continue
        names += [f"{encoder.prefix}{name}" for name in ("logit_scale", "text_projection") if not encoder.projected]
        last = f"{encoder.prefix}transformer.resblocks.{encoder.config['num_hidden_layers'] - 1}."
        one_more = f"{encoder.prefix}transformer.resblocks.{encoder.config['num_hidden_layers']}."
        names += [one_more + n.removeprefix(last) for n in names if n.startswith(last)] if encoder.drop_last else []
    names += [key for name in names if (key := averaged(name))]
    result = {}
    for i, name in enumerate([*names, *EXTRAS]):
        rank = len(single(family)[name].shape) if name in single(family) else 2 if "proj" in name else 1
        three = 3 if "in_proj" in name else 1
        rank = 1 if name.endswith("bias") else rank
        result[name] = np.arange(three, dtype=np.float32).reshape(three, *[1] * (rank - 1)) + 4 * i
    return result


def averaged(name):
    """The name of a U-Net's tensor in the average of training."""
    _, unet, rest = name.partition("model.diffusion_model.")
    return f"model_ema.diffusion_model{rest}".replace(".", "").replace("model_ema", "model_ema.") if unet else ""


@networks
@pytest.mark.parametrize("ema", [False, True])
def test_each_tensor_lands_where_diffusers_puts_it(family, ema):
    """With all that published files hold beside the components; `ema` takes the averages of the U-Net."""
    values = numbered(family)
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    wanted = converted(tensors, family, ema, width=1)
    for name, encoder in family.text_encoders.items():
        dropped = ("position_ids", f"encoder.layers.{encoder.config['num_hidden_layers']}.")
        wanted[name] = {k: v for k, v in wanted[name].items() if not any(other in k for other in dropped)}
        if not encoder.projected:
            wanted[name].pop("text_projection.weight", None)
    held = {name: lazy.held(value) for name, value in values.items()}
    opened = single_file.split(held, family, Path("model.safetensors"), ema=ema)
    found = {name: {k: t.read() for k, t in state.items()} for name, state in opened.components.items()}
    assert shapes(found) == shapes(wanted)
    for name, state in found.items():
        assert {k: v.tolist() for k, v in state.items()} == {k: v.tolist() for k, v in wanted[name].items()}
    used = sum(len(state) for state in states(family).values())
    joint = sum(2 * name.endswith(("in_proj_weight", "in_proj_bias")) for name in single(family))
    assert len(opened.ignored) == len(values) - (used - joint)


CONTROLLED = [single_file_families.SD_1, single_file_families.SD_2_V, single_file_families.SDXL]


@pytest.mark.parametrize("family", CONTROLLED, ids=lambda family: family.architecture)
def test_controlnets(family):
    """The configuration fits diffusers' class, which finds all its tensors under our names."""
    config = single_file_families.controlnet(family)
    with torch.device("meta"):
        model = diffusers.ControlNetModel.from_config(config)
    state = {name: Shape(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = single_file.join_controlnet(config, state)
    assert all(name.startswith("control_model.") for name in ours)
    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in ours.items()}
    found = theirs.convert_controlnet_checkpoint(tensors, config)
    if family is single_file_families.SDXL:  # diffusers' converter leaves out the added embedding
        found |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("add_embedding.")}
    assert {k: tuple(t.shape) for k, t in found.items()} == {k: t.shape for k, t in state.items()}
    inner = {name.removeprefix("control_model."): tensor for name, tensor in ours.items()}
    back = single_file_names.renamed(inner, single_file_names.controlnet(config), "file")
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in state.items()}


_SD = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4]}
_SD_1 = _SD | {"attention_resolutions": [4, 2, 1], "num_heads": 8, "transformer_depth": 1, "context_dim": 768}
_TWO = {"num_head_channels": 64, "use_linear_in_transformer": True}
_SD_2 = _SD | _TWO | {"attention_resolutions": [4, 2, 1], "transformer_depth": 1, "context_dim": 1024}
_XL = _SD | _TWO | {"channel_mult": [1, 2, 4], "attention_resolutions": [4, 2], "context_dim": 2048}
_XL |= {"transformer_depth": [1, 2, 10], "num_classes": "sequential", "adm_in_channels": 2816}


def unknown_settings(config):
    """Those that diffusers' class does not have."""
    kind = getattr(diffusers, config["_class_name"])
    return set(config) - set(inspect.signature(kind.__init__).parameters) - {"_class_name"}


def test_diffusers_knows_all_settings():
    for family in FAMILIES:
        for config in (family.unet, family.vae, single_file_families.controlnet(family)):
            assert not unknown_settings(config)


YAML = {
    "stable-diffusion-v1": (_SD_1, 0.18215, 512),
    "stable-diffusion-v1-inpainting": (_SD_1 | {"in_channels": 9}, 0.18215, 512),
    "stable-diffusion-v2-768-v": (_SD_2, 0.18215, 768),
    "stable-diffusion-v2-512": (_SD_2, 0.18215, 512),
    "stable-diffusion-v2-inpainting": (_SD_2 | {"in_channels": 9}, 0.18215, 512),
    "stable-diffusion-x4-upscaler": (
        _SD_2
        | {"in_channels": 7, "model_channels": 256, "attention_resolutions": [2, 4, 8], "channel_mult": [1, 2, 2, 4]}
        | {"num_heads": 8, "disable_self_attentions": [True, True, True, False], "num_classes": 1000},
        0.08333,
        512,
    ),
    "stable-diffusion-xl-v1-base": (_XL, 0.13025, 1024),
    "stable-diffusion-xl-v1-inpainting": (_XL | {"in_channels": 9}, 0.13025, 1024),
    "stable-diffusion-xl-v1-refiner": (
        _XL
        | {"model_channels": 384, "channel_mult": [1, 2, 4, 4], "transformer_depth": 4, "context_dim": [1280] * 4}
        | {"adm_in_channels": 2560},
        0.13025,
        1024,
    ),
}
"""Settings of the U-Net, scale of the latents and image size, as in the YAML files of CompVis and Stability."""


@every
def test_configurations_are_those_that_diffusers_infers(family):
    """From the original YAML files."""
    unet, scale, size = YAML[family.architecture]
    upscaler = family is single_file_families.X4_UPSCALER
    levels = [1, 2, 4] if upscaler else [1, 2, 4, 4]
    vae = {"ch": 128, "ch_mult": levels, "in_channels": 3, "out_ch": 3, "z_channels": 4, "num_res_blocks": 2}
    params = {
        "unet_config": {"params": unet},
        "first_stage_config": {"params": {"ddconfig": vae}},
        "scale_factor": scale,
    }
    original = {"model": {"params": params}}
    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in single(family).items()}
    found = theirs.create_unet_diffusers_config_from_ldm(original, tensors)
    found["sample_size"] = size // 2 ** (len(levels) - 1)  # diffusers has one size for both of version 2
    assert found == {name: family.unet[name] for name in found}
    found = theirs.create_vae_diffusers_config_from_ldm(original, tensors)
    found["sample_size"] = 256 if upscaler else size
    assert found == {name: family.vae[name] for name in found}
    assert family.image_size == size


MILLIONS = {
    "stable-diffusion-v1": {"unet": 859.521, "vae": 83.654, "text_encoder": 123.060},
    "stable-diffusion-v2-512": {"unet": 865.911, "vae": 83.654, "text_encoder": 340.388},
    "stable-diffusion-xl-v1-base": {"unet": 2567.464, "vae": 83.654, "text_encoder": 123.06, "text_encoder_2": 694.66},
}


@pytest.mark.parametrize("architecture", MILLIONS)
def test_published_numbers_of_parameters(architecture):
    family = next(family for family in FAMILIES if family.architecture == architecture)
    counts = {name: sum(t.numel() for t in state.values()) / 1e6 for name, state in states(family).items()}
    assert counts == pytest.approx(MILLIONS[architecture], abs=1e-3)


@every
def test_schedulers(family):
    """diffusers knows each setting, and the noise is that of the YAML files ("linear" there is linear in √β)."""
    ends = (1e-4, 2e-2) if family is single_file_families.X4_UPSCALER else (8.5e-4, 1.2e-2)
    for config in filter(None, (family.scheduler, family.low_res_scheduler)):
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        # The published files have these too where the class does not read them.
        ignored = {"skip_prk_steps", "set_alpha_to_one", "clip_sample", "sample_max_value"}
        assert unknown_settings(config) <= ignored
        np.testing.assert_allclose(scheduler.betas.numpy(), np.linspace(*np.sqrt(ends), 1000) ** 2, rtol=1e-4)
