"""A tiny DALL·E 1 that trains on a laptop: codes of 4×4 pixels."""

from jaxdiff.models.dvae import Annealed, DVAEModel
from jaxdiff.nets.dvae import DVAEConfig

DVAE_TINY = DVAEModel(
    DVAEConfig(codes=512, hidden=32, multipliers=(1, 2, 4), blocks=1, code_width=64),
    side=64,
    temperature=Annealed(1.0, 1.0 / 16.0, 3_000),
    kl_weight=Annealed(0.0, 6.6, 500),
)
"""64×64 images ⇄ 16×16 codes."""
