"""DALL·E 1 (arXiv 2102.12092): a transformer over text tokens and image codes, and the discrete VAE of the codes.

dalle-mini and dalle-mega are the same system with other boxes: an encoder–decoder, and a VQGAN with 16384 codes of
16×16 pixels.
"""

from jaxdiff.core.products import TokenSpec
from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.dvae import DVAEModel, TrainedDVAE
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.nets import encoder_decoder
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder

DVAE = DVAEModel()
"""The published dVAE: 8192 codes of 8×8 pixels, 97.6 M parameters."""
TRANSFORMER = AutoregressiveModel()
"""The paper's transformer over 256 text tokens and 32×32 codes: 12 B parameters. Its weights were never published."""
DALLE_MINI, DALLE_MEGA = (
    AutoregressiveModel(network, TokenSpec(16384, 16), text_weight=0.0, null=(0, 2))
    for network in (encoder_decoder.MINI, encoder_decoder.MEGA)
)
"""dalle-mini (0.4 B parameters) and dalle-mega (2.6 B): 64 text tokens, 16×16 codes. A missing caption is the start and
the end token of an empty one."""
SAMPLING_MINI = TokenSampling(top_k=256, guidance=16.0)
"""Sampling of both, as in min-dalle; guidance is its super-conditioning factor. dalle-mini's own examples have 10."""


def dalle(text_encoder: TextEncoder, transformer: TrainedAutoregressive, decoder: TrainedDVAE | VQCodes) -> Pipeline:
    """Token ids of captions (`text/bpe.py`), the transformer, and the decoder of its codes.

    ValueError if text length, number of codes or sides do not fit.
    """
    return Pipeline(text_encoder, transformer, (decoder,))
