"""The table of settings classes for JSON files, and the version of those files."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.core import products
from jaxdiff.core.messages import quoted
from jaxdiff.core.settings import Table
from jaxdiff.diffusion import (
    degradation,
    guidance,
    losses,
    parameterization,
    samplers,
    schedules,
    thresholding,
    time_grid,
    time_samplers,
)
from jaxdiff.models import (
    autoregressive,
    conditioners,
    control,
    diffusion,
    representations,
    sampling,
    tiles,
    token_sampling,
)
from jaxdiff.nets import autoregressive as nets_autoregressive
from jaxdiff.nets import (
    blocks,
    classifier,
    conditioning,
    dvae,
    encoder_decoder,
    execution,
    experts,
    image_readers,
    latent_unet,
    prior,
    sparse_attention,
    unet,
)
from jaxdiff.nets import control as nets_control
from jaxdiff.weights import sizes

VERSION = 2
"""Version of stage.json and classifier.json. Version 1 had no version field and used bare class names."""


def _check_value(settings: Any, where: str) -> None:
    if isinstance(settings, unet.UNetConfig):
        sizes.check_network(settings, where)
    if isinstance(settings, diffusion.DiffusionModel):
        sizes.check_model(settings, where)


TABLE = Table(
    {
        "core.Image": products.ImageSpec,
        "core.Latent": products.LatentSpec,
        "core.Embedding": products.EmbeddingSpec,
        "core.Token": products.TokenSpec,
        "models.Diffusion": diffusion.DiffusionModel,
        "models.TextConditioner": conditioners.TextConditioner,
        "models.NullText": conditioners.NullText,
        "models.SizeConditioner": conditioners.SizeConditioner,
        "models.MaskConditioner": conditioners.MaskConditioner,
        "models.LowResConditioner": conditioners.LowResConditioner,
        "models.ClassConditioner": representations.ClassConditioner,
        "models.EmbeddingConditioner": representations.EmbeddingConditioner,
        "models.Form": representations.Form,
        "models.SemanticMapConditioner": representations.SemanticMapConditioner,
        "models.Enlargement": conditioners.Enlargement,
        "models.Autoregressive": autoregressive.AutoregressiveModel,
        "models.TokenSampling": token_sampling.TokenSampling,
        "models.Control": control.ControlModel,
        "models.Sampling": sampling.SamplingConfig,
        "models.Tiles": tiles.Tiles,
        "nets.UNet": unet.UNetConfig,
        "nets.EfficientUNet": unet.EfficientUNetConfig,
        "nets.Experts": experts.ExpertsConfig,
        "nets.LatentUNet": latent_unet.LatentUNetConfig,
        "nets.ControlNet": nets_control.ControlNetConfig,
        "nets.Attention": unet.AttentionConfig,
        "nets.Conditioning": unet.ConditioningConfig,
        "nets.Execution": execution.ExecutionConfig,
        "nets.MaskedText": conditioning.MaskedText,
        "nets.WholeText": conditioning.WholeText,
        "nets.TextWithImage": image_readers.TextWithImage,
        "nets.ImageTokens": image_readers.ImageTokens,
        "nets.Activation": blocks.Activation,
        "nets.Classifier": classifier.ClassifierConfig,
        "nets.Prior": prior.PriorConfig,
        "nets.Autoregressive": nets_autoregressive.AutoregressiveConfig,
        "nets.EncoderDecoder": encoder_decoder.EncoderDecoderConfig,
        "nets.Pattern": sparse_attention.Pattern,
        "nets.DVAE": dvae.DVAEConfig,
        "diffusion.CosineSchedule": schedules.CosineSchedule,
        "diffusion.LinearBetaSchedule": schedules.LinearBetaSchedule,
        "diffusion.EDM": schedules.EDM,
        "diffusion.RectifiedFlow": schedules.RectifiedFlow,
        "diffusion.TabulatedSchedule": schedules.TabulatedSchedule,
        "diffusion.UniformTimes": time_samplers.UniformTimes,
        "diffusion.LogSNRRange": time_samplers.LogSNRRange,
        "diffusion.LogNormalTimes": time_samplers.LogNormalTimes,
        "diffusion.LogitNormalTimes": time_samplers.LogitNormalTimes,
        "diffusion.Prediction": parameterization.Prediction,
        "diffusion.Guidance": guidance.Guidance,
        "diffusion.UniformWeighting": losses.UniformWeighting,
        "diffusion.MinSNR": losses.MinSNR,
        "diffusion.PowerSNR": losses.PowerSNR,
        "diffusion.SigmoidWeighting": losses.SigmoidWeighting,
        "diffusion.GaussianBlur": degradation.GaussianBlur,
        "diffusion.BSRDegradation": degradation.BSRDegradation,
        "diffusion.DDPM": samplers.DDPM,
        "diffusion.DDIM": samplers.DDIM,
        "diffusion.DPMSolverPP2M": samplers.DPMSolverPP2M,
        "diffusion.Heun": samplers.Heun,
        "diffusion.Euler": samplers.Euler,
        "diffusion.PLMS": samplers.PLMS,
        "diffusion.UniformTime": time_grid.UniformTime,
        "diffusion.UniformLogSNR": time_grid.UniformLogSNR,
        "diffusion.Karras": time_grid.Karras,
        "diffusion.Leading": time_grid.Leading,
        "diffusion.Trailing": time_grid.Trailing,
        "diffusion.Linspace": time_grid.Linspace,
        "diffusion.Respaced": time_grid.Respaced,
        "diffusion.TabulatedKarras": time_grid.TabulatedKarras,
        "diffusion.NoThreshold": thresholding.NoThreshold,
        "diffusion.StaticThreshold": thresholding.StaticThreshold,
        "diffusion.DynamicThreshold": thresholding.DynamicThreshold,
    },
    sizes.check,
    _check_value,
)

to_json, from_json = TABLE.to_json, TABLE.from_json


def check_version(data: Mapping[str, Any], where: str) -> None:
    """ValueError if `data` has another version."""
    version = data.get("version", 1)
    if version != VERSION:
        raise ValueError(f"{where} has version {quoted(version)}, but only version {VERSION} is supported: train again")
