"""What a safetensors file holds, by the names and shapes of its tensors: a family of Stable Diffusion, or what else.

Recognition needs no metadata. Only the prediction (ε or v) cannot be told from shapes: see `family_of`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from jaxdiff.core.messages import plain
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.weights import sizes
from jaxdiff.weights.single_file_families import FAMILIES, Family
from jaxdiff.weights.tree import TYPES, Unread

UNET, EMA, CONTROLNET = "model.diffusion_model.", "model_ema.", "control_model."
VAE = ("first_stage_model.", "vae.")
V, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors that say that the prediction is v, and that the schedule ends in pure noise."""

_STEPS_OF_SD_2_BASE = 875_000
"""Training steps of the published checkpoint 512-base-ema, by which diffusers knows it."""
_V_ARCHITECTURE, _EPSILON_ARCHITECTURE = "stable-diffusion-v2-768-v", "stable-diffusion-v2-512"


class Signature(NamedTuple):
    """What tells the U-Nets apart, whatever their width. context: width of the text. vector: width of the added vector,
    or 0. classes: number of classes, or 0."""

    in_channels: int
    context: int
    vector: int
    classes: int


def family_of(
    tensors: Mapping[str, Unread],
    metadata: Mapping[str, str],
    where: str,
    prediction: Prediction | None = None,
    families: tuple[Family, ...] = FAMILIES,
) -> Family:
    """The family of a single file, with its prediction. ValueError that says what the file is, if it is not one.

    prediction: if None, it is what the file says: its metadata ("modelspec.prediction_type", then
    "modelspec.architecture"), a tensor "v_pred", or the training step of the published 512-pixel base; else v for
    Stable Diffusion 2, as in diffusers, and ε for all others. The shapes are the same: a file of Stable Diffusion 2
    that was trained on ε and does not say so needs `prediction`. A tensor "ztsnr" sets "rescale_betas_zero_snr".
    """
    has_unet, has_control = (any(name.startswith(prefix) for name in tensors) for prefix in (UNET, CONTROLNET))
    if has_control or not has_unet or f"{UNET}input_blocks.0.0.weight" not in tensors:
        raise ValueError(f"{where} is not a single file of Stable Diffusion: it holds {describe(tensors)}")
    found = _signature(tensors)
    fits = [family for family in families if _signature_of(family) == found]
    if not fits or any(name.startswith("edm_") for name in tensors):
        raise ValueError(f"{where} is not a supported model of Stable Diffusion: it holds {_unknown(tensors, found)}")
    wanted = prediction or _stated(tensors, metadata) or fits[0].prediction
    fitting = next((family for family in fits if family.prediction is wanted), None)
    family = fits[0].with_prediction(wanted) if fitting is None else fitting
    if ZERO_SNR not in tensors:
        return family
    return replace(family, scheduler=family.scheduler | {"rescale_betas_zero_snr": True})


def markers(family: Family) -> tuple[str, ...]:
    """The names of empty tensors that state what is unusual in a family's training, as in ComfyUI."""
    usual = any(
        family.prediction is other.prediction for other in FAMILIES if other.architecture == family.architecture
    )
    unusual = () if usual or family.prediction is not Prediction.V else (V,)
    return (*unusual, ZERO_SNR) if family.scheduler.get("rescale_betas_zero_snr") else unusual


def describe(tensors: Mapping[str, Unread]) -> str:
    """What a file holds, for messages."""
    if not tensors:
        return "no tensors"
    for pattern, kind in KINDS:
        if any(pattern.search(name) for name in tensors):
            return kind
    names = sorted(tensors)
    return f"{len(names)} tensors of an unknown kind ({sizes.names(names)})"


_MODEL, _HALF = r"^(model\.diffusion_model\.)?", r"(en|de)coder\."
KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.(hada_w1_a|lokr_w1(_a)?|oft_blocks|dora_scale)$", "a LyCORIS or DoRA adapter, which changes a model"),
        (r"^lora_(unet|te\d?)_", "a LoRA with kohya's names, which changes a model"),
        (r"\.lora_[AB](\.\w+)?\.weight$", "a LoRA with PEFT's names, which changes a model"),
        (r"(\.|_)lora(\.|_)(up|down|linear_layer)", "a LoRA with diffusers' names, which changes a model"),
        (r"^lora_controlnet$", "a Control-LoRA, which changes a model"),
        (r"^(control_model\.|zero_convs\.|input_hint_block\.)", "a ControlNet: read it with open_controlnet"),
        (
            r"^controlnet_(down_blocks|cond_embedding)\.",
            "a ControlNet in diffusers' layout: read it with open_controlnet",
        ),
        (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
        (r"^(adapter\.)?body\.\d+\.(resnets\.\d+\.)?block1\.", "a T2I-Adapter"),
        (r"motion_modules\.", "a motion module of AnimateDiff"),
        (r"^(emb_params|string_to_param\.?.*|clip_[lg])$", "an embedding of textual inversion"),
        (_MODEL + r"joint_blocks\.", "a model of Stable Diffusion 3"),
        (_MODEL + r"double_blocks\.", "a model of FLUX or its kind"),
        (r"(\.|^)clip_txt_mapper\.|channelwise\.0\.weight$", "a model of Stable Cascade"),
        (
            r"^transformer_blocks\.\d+\.(attn|ff_context|norm1_context)\b",
            "a diffusion transformer in diffusers' layout",
        ),
        (r"^model\.diffusion_model\.input_blocks\.", "a U-Net of Stable Diffusion"),
        (r"^model\.diffusion_model\.", "a diffusion network that is not Stable Diffusion's U-Net"),
        (r"^model_ema\.diffusion_model", "averaged (EMA) weights alone: use the file that has all weights"),
        (
            r"^input_blocks\.",
            "a U-Net alone, without the prefix model.diffusion_model. and without the other components",
        ),
        (r"^(down|mid|up)_blocks?\.", "a U-Net in diffusers' layout: pass the folder of the pipeline"),
        (rf"^{_HALF}(down_blocks|up_blocks|mid_block)\.", "an autoencoder in diffusers' layout: pass it as vae="),
        (rf"^((first_stage_model|vae)\.)?{_HALF}(down|up|mid|conv_in)\.", "an autoencoder alone: pass it as vae="),
        (rf"^{_HALF}(layers\.)?\d+\.", "a small autoencoder for previews (TAESD)"),
        (r"(^|\.)resblocks\.", "a CLIP alone, with OpenCLIP's names"),
        (r"(^|\.)encoder\.layers\.\d+\.self_attn\.", "a text encoder alone, in the layout of transformers"),
        (r"^encoder\.block\.\d+\.layer\.", "a T5 encoder alone"),
        (r"/", "parameters in the layout of jaxdiff: pass their folder"),
    )
)
"""What a name shows, the first that fits any tensor."""


def _signature(tensors: Mapping[str, Unread]) -> Signature:
    first = _shape(tensors, "input_blocks.0.0.weight")
    keys = (name for name in tensors if name.startswith(UNET) and name.endswith(".attn2.to_k.weight"))
    context = next((tensors[name].shape for name in keys), ())
    vector, classes = _shape(tensors, "label_emb.0.0.weight"), _shape(tensors, "label_emb.weight")
    return Signature(_at(first, 1), _at(context, 1), _at(vector, 1), _at(classes, 0))


def _shape(tensors: Mapping[str, Unread], name: str) -> tuple[int, ...]:
    tensor = tensors.get(UNET + name)
    return () if tensor is None else tuple(tensor.shape)


def _at(shape: tuple[int, ...], axis: int) -> int:
    return shape[axis] if axis < len(shape) else 0


def _signature_of(family: Family) -> Signature:
    config = family.unet
    vector = config["projection_class_embeddings_input_dim"] or 0
    in_channels, context = config["in_channels"], config["cross_attention_dim"]
    return Signature(in_channels, context, vector, config["num_class_embeds"] or 0)


def _unknown(tensors: Mapping[str, Unread], found: Signature) -> str:
    if "edm_mean" in tensors:
        return "Playground 2.5, whose noise schedule is EDM's"
    if any(name.startswith("edm_") for name in tensors):
        return "CosXL or its kind, whose noise schedule is EDM's"
    if found.context == 1024 and found.in_channels == 5:
        return "a depth-to-image model of Stable Diffusion 2"
    if found.context == 1024 and found.vector:
        return "Stable unCLIP, which also reads an image"
    if found.context == 768 and found.in_channels == 8:
        return "InstructPix2Pix"
    given = f"{found.in_channels} input channels and text of width {found.context}"
    return f"a U-Net of {given}" + (f", with a vector of {found.vector}" if found.vector else "")


def _stated(tensors: Mapping[str, Unread], metadata: Mapping[str, str]) -> Prediction | None:
    """The prediction that the file itself states."""
    named = {"epsilon": Prediction.EPSILON, "v": Prediction.V, "v_prediction": Prediction.V}
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    by_architecture = {_V_ARCHITECTURE: Prediction.V, _EPSILON_ARCHITECTURE: Prediction.EPSILON}
    stated = named.get(metadata.get("modelspec.prediction_type", "")) or by_architecture.get(architecture)
    if stated is None and V in tensors:
        stated = Prediction.V
    step = tensors.get("global_step")
    if stated is None and step is not None and tuple(step.shape) in ((), (1,)) and step.dtype in TYPES:
        stated = Prediction.EPSILON if step.read(TYPES).item() == _STEPS_OF_SD_2_BASE else None
    return stated


def missing(what: str, prefix: str, where: str) -> ValueError:
    """The error for a file without a component."""
    advice = ": pass vae=, a file with one" if what == "autoencoder" else ""
    return ValueError(f"{plain(where, 400)} holds no {what} ({prefix}…){advice}")
