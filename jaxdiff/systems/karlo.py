"""Karlo v1-alpha, the public unCLIP of Kakao Brain: presets of its models and their sampling.

Caption → CLIP (ViT-L/14) → prior → CLIP image embedding. Parameter counts are tested.
"""

from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import StaticThreshold
from jaxdiff.diffusion.time_grid import Linspace
from jaxdiff.models.conditioners import NullText, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.prior import PriorConfig

CLIP_L = 77, 768
"""Length and width of the text tower's states; the embeddings have the same width."""


def prior_model(network: PriorConfig, dropout: float = 0.2) -> DiffusionModel:
    """A prior with Karlo's conventions: 1000 cosine steps, x₀ prediction of standardized embeddings, the empty caption
    as null text. dropout: of captions in training."""
    text = TextConditioner(network.text_width, network.text_length, dropout, NullText.EMPTY, pooled=network.embedding)
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
