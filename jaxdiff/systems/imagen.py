"""Imagen (arXiv 2205.11487): frozen T5 → 64×64 diffusion → super-resolution to 256 and 1024.

    pipeline = imagen(text_encoder, base, sr256, sr1024)      # trained models, see `weights.imagen.load`

The presets are plain values; `imagen_tiny.py` has a tiny cascade that trains on a laptop. A preset does not include the
length and width of the text embeddings (`DiffusionModel.reading`). Values that the paper does not give are conventions:
tokens per caption, sampling steps, the guidance of each model. Parameter counts are tested.
"""

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.samplers import DDPM
from jaxdiff.diffusion.schedules import LinearBetaSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.conditioning import MaskedText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, EfficientUNetConfig, UNetConfig
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder

T5_XXL = 128, 4096
"""Length and width of the paper's text embeddings; the length is a convention."""


BASE_64_2B = DiffusionModel(unet=UNetConfig())
"""The base model (F.1): 2.26 B parameters with the text projected to 2048 inside the network."""

BASE_64_500M = DiffusionModel(unet=UNetConfig(channels=256, conditioning=ConditioningConfig(1024, MaskedText(512))))
"""Half the width, as in NVIDIA NeMo's 500M configuration."""

BASE_64_300M = DiffusionModel(unet=UNetConfig(channels=192, conditioning=ConditioningConfig(768, MaskedText(512))))
"""The size of the paper's ablations (Fig. 4a). Its width is unpublished; this one gives about 300 M."""

SR_256 = DiffusionModel(unet=EfficientUNetConfig(), side=256, conditioners=(TextConditioner(), LowResConditioner()))
"""64→256 (F.2): the Efficient U-Net with self-attention to pixels and text at its 1024-channel level."""

SR_1024 = DiffusionModel(
    unet=EfficientUNetConfig(
        attention=AttentionConfig((False,) * 4, (False, False, False, True), heads=8, feed_forward=2),
        conditioning=ConditioningConfig(1024, MaskedText(1024, pool=False)),
    ),
    side=1024,
    conditioners=(TextConditioner(), LowResConditioner()),
    schedule=LinearBetaSchedule(),
)
"""256→1024 (F.3): no self-attention, explicit cross-attention, the linear schedule in continuous time.

The paper states 400 M parameters, but its configuration for this stage has F.2's channels and blocks and omits only the
attention, a small part of the parameters: it gives 478 to 536 M, depending on unpublished widths.
"""

SAMPLING_BASE = SamplingConfig(sampler=DDPM(), steps=256, guidance=Guidance(1.35), thresholding=DynamicThreshold())
"""w = 1.35 gives the paper's best FID (7.27)."""

SAMPLING_SR = SamplingConfig(sampler=DDPM(), steps=128, guidance=Guidance(8.0), thresholding=DynamicThreshold())
"""w = 8 at augmentation level 0: the super-resolution setting of the same figure."""


def imagen(text_encoder: TextEncoder, base: TrainedModel, *super_resolution: TrainedModel) -> Pipeline:
    """The system: text → T5 → 64×64 image → 256×256 → 1024×1024. Both decoders may also read the text.

    ValueError if models do not fit one another or the text encoder.
    """
    return Pipeline(text_encoder=text_encoder, generator=base, decoders=super_resolution)
