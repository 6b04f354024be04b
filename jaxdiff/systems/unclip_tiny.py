"""Presets of a tiny DALL·E 2 that trains on a laptop, on the shipped CLIP of `shapes`."""

import math
from dataclasses import replace
from typing import cast

from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion.degradation import BSRDegradation, GaussianBlur
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import CosineSchedule
from jaxdiff.diffusion.thresholding import NoThreshold
from jaxdiff.models.autoregressive import AutoregressiveModel
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.prior_codes import coded
from jaxdiff.models.representations import EmbeddingConditioner
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.nets.autoregressive import AutoregressiveConfig
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.nets.sparse_attention import Pattern
from jaxdiff.nets.unet import EfficientUNetConfig
from jaxdiff.systems.imagen_tiny import BASE_64_TINY, SAMPLING_BASE_TINY
from jaxdiff.systems.imagen_tiny import SR_256_TINY as _SR_256_TINY

WIDTH = 128
"""Of the shipped CLIP's embeddings; its states have the same width."""
NORM = math.sqrt(WIDTH)

PRIOR_TINY = DiffusionModel(
    unet=PriorConfig(embedding=WIDTH, text_width=WIDTH, text_length=24, width=128, layers=6, heads=4),
    side=1,
    product=EmbeddingSpec(WIDTH, NORM),
    conditioners=(TextConditioner(pooled=WIDTH, pooled_norm=NORM),),
    schedule=CosineSchedule(),
    prediction=Prediction.X0,
)
"""1.3 M parameters."""

PRIOR_CODES_TINY = coded(
    AutoregressiveModel(
        AutoregressiveConfig(width=128, heads=4, patterns=(Pattern.FULL,) * 6, kernel=1), text_weight=0.0
    ),
    text_length=24,
    vocab=381,
    components=32,
    buckets=64,
)
"""The autoregressive prior: 32 principal components in 64 buckets; 1.2 M parameters without the embeddings."""
SAMPLING_PRIOR_CODES_TINY = TokenSampling(top_p=0.95)

_UNET = cast(EfficientUNetConfig, BASE_64_TINY.unet)
DECODER_TINY = replace(
    BASE_64_TINY,
    unet=replace(_UNET, conditioning=replace(_UNET.conditioning, vector_tokens=4)),
    conditioners=(TextConditioner(dropout=0.5), EmbeddingConditioner(WIDTH, dropout=0.1, norm=NORM)),
)
"""The tiny Imagen's base model, conditioned on an image embedding: it learns faster, as the embedding states most of
what the image shows."""

SR_256_TINY = replace(_SR_256_TINY, conditioners=(LowResConditioner(max_level=0.3, degradation=GaussianBlur()),))
SR_1024_TINY = replace(
    _SR_256_TINY, side=1024, conditioners=(LowResConditioner(max_level=0.3, degradation=BSRDegradation()),)
)
"""The tiny Imagen's, with the degradations; besides them, noise on the input is kept."""

SAMPLING_PRIOR_TINY = SamplingConfig(sampler=DDPM(), steps=32, thresholding=NoThreshold())
SAMPLING_DECODER_TINY = replace(SAMPLING_BASE_TINY, guidance=Guidance(2.0, (-20.0, -1.0)))
