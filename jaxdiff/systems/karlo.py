"""Karlo v1-alpha, the public unCLIP of Kakao Brain: presets of its models and their sampling.

Caption → CLIP (ViT-L/14) → prior → CLIP image embedding → decoder → 64×64 image → upsampler → 256×256. Parameter counts
are tested.
"""

from dataclasses import fields
from typing import Any

from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import StaticThreshold
from jaxdiff.diffusion.time_grid import Linspace
from jaxdiff.models.conditioners import LowResConditioner, NullText, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.representations import EmbeddingConditioner, Form
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.experts import ExpertsConfig
from jaxdiff.nets.image_readers import TextWithImage
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig

CLIP_L = 77, 768
"""Length and width of the text tower's states; the embeddings have the same width."""


def prior_model(network: PriorConfig, dropout: float = 0.2) -> DiffusionModel:
    """A prior with Karlo's conventions: 1000 cosine steps, x₀ prediction of standardized embeddings, the empty caption
    as null text, padding masked. dropout: of captions in training."""
    null, pooled = NullText.EMPTY_MASKED, network.embedding
    text = TextConditioner(network.text_width, network.text_length, dropout, null, pooled=pooled)
    return DiffusionModel(
        unet=network,
        side=1,
        product=EmbeddingSpec(network.embedding),
        conditioners=(text,),
        schedule=TabulatedSchedule.cosine(),
        prediction=Prediction.X0,
    )


PRIOR = prior_model(PriorConfig())
"""1 B parameters."""
SAMPLING_PRIOR = SamplingConfig(
    sampler=DDPM(0.0),
    steps=25,
    spacing=Linspace(),
    guidance=Guidance(4.0),
    thresholding=StaticThreshold(5.0),
)


def _unet(attention: AttentionConfig, **settings: Any) -> UNetConfig:
    shared: dict[str, Any] = {"channels": 320, "multipliers": (1, 2, 3, 4), "blocks": (3, 3, 3, 3), "norm_groups": 32}
    return UNetConfig(attention=attention, **shared, **settings)


def decoder_model(network: UNetConfig, side: int, length: int, width: int) -> DiffusionModel:
    """A decoder with Karlo's conventions: it reads a caption of `length` tokens and the embedding of an image, both of
    `width`, and its null condition is the empty caption and a learned embedding."""
    return DiffusionModel(
        unet=network,
        side=side,
        # The image's embedding is the last token (`nets/image_readers.py`).
        conditioners=(
            TextConditioner(width, length, 0.3, NullText.EMPTY_MASKED, pooled=width),
            EmbeddingConditioner(width, form=Form.TOKENS, dropout=0.1),
        ),
        schedule=TabulatedSchedule.cosine(),
    )


_ATTENTION = AttentionConfig((False, True, True, True), (False,) * 4, normalize_text=False)
DECODER = decoder_model(
    _unet(_ATTENTION, conditioning=ConditioningConfig(1280, TextWithImage(), frequencies=320), learned_variance=True),
    64,
    *CLIP_L,
)
"""0.9 B parameters."""
SAMPLING_DECODER = SamplingConfig(
    sampler=DDPM(None),
    steps=25,
    spacing=Linspace(),
    guidance=Guidance(8.0),
    thresholding=StaticThreshold(),
)

UPSAMPLER_FIRST = _unet(
    AttentionConfig((False,) * 4, (False,) * 4),
    conditioning=ConditioningConfig(1280, None, frequencies=320),
    scale_shift=False,
)
"""One of two equal networks: the other is for the last step."""


def experts_of(network: UNetConfig) -> ExpertsConfig:
    """The network twice, the second one for entry 0 of the table: the last step with the spacing `Linspace`."""
    return ExpertsConfig(**{each.name: getattr(network, each.name) for each in fields(network)})


def upsampler_model(network: UNetConfig, side: int, factor: int = 4) -> DiffusionModel:
    """An upsampler with Karlo's conventions: no text, and an input without noise that is enlarged by cubics."""
    return DiffusionModel(
        unet=experts_of(network),
        side=side,
        conditioners=(LowResConditioner(factor, None),),
        schedule=TabulatedSchedule.cosine(),
    )


UPSAMPLER = upsampler_model(UPSAMPLER_FIRST, 256)
"""Twice 0.7 B parameters."""
SAMPLING_UPSAMPLER = SamplingConfig(
    sampler=DDPM(0.0),
    steps=7,
    spacing=Linspace(),
    thresholding=StaticThreshold(),
)
