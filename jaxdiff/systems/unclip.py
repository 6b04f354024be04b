"""DALL·E 2, unCLIP (arXiv 2204.06125): caption → CLIP → prior → image embedding → 64×64 diffusion decoder → upsamplers.

    pipeline = unclip(text_encoder, RankedPrior(…), EmbeddingDecoder(…), sr256, sr1024)

The presets are plain values with the figures of the paper's Table 3; `unclip_tiny.py` has models for a laptop. They
differ from the paper's in this: the decoder reads CLIP's states of the caption, not those of a transformer that is
trained with it; there is no dropout; the prior samples with DDPM, not analytic DPM. Widths of the conditioning are
conventions. The paper's weights are not public.
"""

from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.diffusion.degradation import BSRDegradation, Degradation, GaussianBlur
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DDIM, DDPM
from jaxdiff.diffusion.schedules import CosineSchedule, LinearBetaSchedule, TabulatedSchedule
from jaxdiff.diffusion.thresholding import NoThreshold, StaticThreshold
from jaxdiff.diffusion.time_grid import Respaced
from jaxdiff.models.autoregressive import AutoregressiveModel
from jaxdiff.models.boxes import Decoder, Generator
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.embedding_boxes import EmbeddingDecoder
from jaxdiff.models.prior_codes import coded
from jaxdiff.models.representations import EmbeddingConditioner
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.autoregressive import AutoregressiveConfig
from jaxdiff.nets.conditioning import MaskedText
from jaxdiff.nets.prior import PriorConfig
from jaxdiff.nets.sparse_attention import Pattern
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, UNetConfig
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder

CLIP_H = 256, 1024
"""Length and width of the states of the paper's CLIP; its embeddings are 1024 wide too."""
SCALE = 17.2
"""Length of the embeddings that the paper's prior is trained on."""


PRIOR = DiffusionModel(
    unet=PriorConfig(embedding=1024, text_width=1024, text_length=256, width=2048, layers=24, heads=32),
    side=1,
    product=EmbeddingSpec(1024, SCALE),
    conditioners=(TextConditioner(pooled=1024, pooled_norm=SCALE),),
    schedule=CosineSchedule(),
    prediction=Prediction.X0,
)
"""The diffusion prior (2.2): 1.2 B parameters. It predicts the clean embedding by its squared error.

Its training: 600 K updates of 4096 pairs, Adam at 1.1e-4 with β₂ = 0.96 and weight decay 0.06, EMA decay 0.9999."""

PRIOR_CODES = coded(
    AutoregressiveModel(
        AutoregressiveConfig(width=1664, heads=26, patterns=(Pattern.FULL,) * 24, kernel=1), text_weight=0.0
    ),
    text_length=256,
    vocab=49408,
    components=319,
    buckets=1024,
)
"""The autoregressive prior (2.2): 319 of 1024 principal components in 1024 buckets. One transformer of the width and
depth of the paper's latent decoder also reads the text, for which the paper has another of 24 layers.

Its training: 1 M updates of 4096 pairs, Adam at 1.6e-4 with β₂ = 0.91 and weight decay 0.04, EMA decay 0.999."""

DECODER = DiffusionModel(
    unet=UNetConfig(
        attention=AttentionConfig((False, True, True, True), head_channels=64),
        conditioning=ConditioningConfig(2048, MaskedText(2048), vector_tokens=4),
        learned_variance=True,
    ),
    side=64,
    conditioners=(TextConditioner(dropout=0.5), EmbeddingConditioner(1024, dropout=0.1, norm=SCALE)),
    schedule=TabulatedSchedule.cosine(),
)
"""The decoder (2.1). The embedding is added to the time embedding and projected to four tokens behind the caption's;
it is dropped (zero) in a tenth of the training, the caption in half of it. 2.3 B parameters; the paper's 3.5 B include
its text transformer.

Its training: 800 K updates of 2048 images, Adam at 1.2e-4 with β₂ = 0.999, EMA decay 0.9999, dropout 0.1."""


def _upsampler(
    unet: UNetConfig, side: int, schedule: CosineSchedule | LinearBetaSchedule, degradation: Degradation
) -> DiffusionModel:
    low_res = LowResConditioner(max_level=0.0, degradation=degradation)
    return DiffusionModel(unet=unet, side=side, conditioners=(low_res,), schedule=schedule)


def _unet(channels: int, multipliers: tuple[int, ...], blocks: int) -> UNetConfig:
    levels = len(multipliers)
    return UNetConfig(
        channels=channels,
        multipliers=multipliers,
        blocks=(blocks,) * levels,
        attention=AttentionConfig((False,) * levels, (False,) * levels),
        conditioning=ConditioningConfig(4 * channels, text=None),
    )


SR_256 = _upsampler(_unet(320, (1, 2, 3, 4), 3), 256, CosineSchedule(), GaussianBlur())
SR_1024 = _upsampler(_unet(192, (1, 1, 2, 2, 4, 4), 2), 1024, LinearBetaSchedule(), BSRDegradation())
"""64→256 and 256→1024: no attention, no text and no noise on their input, which is degraded in training; trained on
crops of a quarter of the side. 700 M and 300 M parameters in the paper.

Their training: 1 M updates of 1024 and of 512 images, Adam at 1.2e-4 and 1e-4, EMA decay 0.9999."""

SAMPLING_PRIOR = SamplingConfig(sampler=DDPM(), steps=64, thresholding=NoThreshold())
"""Not guided: guidance of the prior made FID worse."""
SAMPLING_DECODER = SamplingConfig(
    sampler=DDPM(None), steps=250, spacing=Respaced((250,)), guidance=Guidance(1.25), thresholding=StaticThreshold()
)
"""w = 1.25 gives the paper's best FID (10.39)."""
SAMPLING_SR_256 = SamplingConfig(sampler=DDIM(), steps=27, thresholding=StaticThreshold())
SAMPLING_SR_1024 = SamplingConfig(sampler=DDIM(), steps=15, thresholding=StaticThreshold())


def unclip(text_encoder: TextEncoder, prior: Generator, decoder: EmbeddingDecoder, *others: Decoder) -> Pipeline:
    """The system. text_encoder: CLIP's text tower, with masked padding. prior: a `RankedPrior`, the
    autoregressive `TrainedPriorCodes`, or a public one's `StandardizedPrior`. others: upsamplers, or the autoencoder of
    a decoder that produces latents.

    ValueError if models do not fit one another, for example in the width or length of their embeddings, or the text
    encoder.
    """
    return Pipeline(text_encoder, prior, (decoder, *others))
