"""A tiny DALL·E 1 that trains on a laptop: codes of 4×4 pixels."""

from jaxdiff.core.products import TokenSpec
from jaxdiff.models.autoregressive import AutoregressiveModel
from jaxdiff.models.dvae import Annealed, DVAEModel
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.nets.autoregressive import AutoregressiveConfig
from jaxdiff.nets.dvae import DVAEConfig
from jaxdiff.nets.sparse_attention import Pattern

DVAE_TINY = DVAEModel(
    DVAEConfig(codes=512, hidden=32, multipliers=(1, 2, 4), blocks=1, code_width=64, residual_gain=0.5),
    side=64,
    temperature=Annealed(1.0, 1.0 / 16.0, 2_000),
    kl_weight=Annealed(2.0, 1.0, 2_000),
    least_scale=0.1,
)
"""64×64 images ⇄ 16×16 codes."""
TRANSFORMER_TINY = AutoregressiveModel(
    AutoregressiveConfig(
        vocab=512,
        text_length=24,
        codes=512,
        rows=16,
        columns=16,
        width=128,
        heads=4,
        patterns=(Pattern.ROW, Pattern.COLUMN, Pattern.ROW, Pattern.ROW),
        kernel=5,
    ),
    product=TokenSpec(512, 4),
)
"""0.9 M parameters without the embeddings."""
SAMPLING_TINY = TokenSampling(top_p=0.97, guidance=1.5)
