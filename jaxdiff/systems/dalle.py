"""DALL·E 1 (arXiv 2102.12092): a transformer over text tokens and image codes, and the discrete VAE of the codes."""

from jaxdiff.models.autoregressive import AutoregressiveModel, TrainedAutoregressive
from jaxdiff.models.dvae import DVAEModel, TrainedDVAE
from jaxdiff.models.vq_codes import VQCodes
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import TextEncoder

DVAE = DVAEModel()
"""The published dVAE: 8192 codes of 8×8 pixels, 97.6 M parameters."""
TRANSFORMER = AutoregressiveModel()
"""The paper's transformer over 256 text tokens and 32×32 codes: 12 B parameters. Its weights were never published."""


def dalle(text_encoder: TextEncoder, transformer: TrainedAutoregressive, decoder: TrainedDVAE | VQCodes) -> Pipeline:
    """Token ids of captions (`text/bpe.py`), the transformer, and the decoder of its codes.

    ValueError if text length, number of codes or sides do not fit.
    """
    return Pipeline(text_encoder, transformer, (decoder,))
