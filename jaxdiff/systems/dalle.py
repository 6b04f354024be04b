"""DALL·E 1 (arXiv 2102.12092): a discrete VAE, and a transformer over text tokens and its codes."""

from jaxdiff.models.autoregressive import AutoregressiveModel
from jaxdiff.models.dvae import DVAEModel

DVAE = DVAEModel()
"""The published dVAE: 8192 codes of 8×8 pixels, 97.6 M parameters."""
TRANSFORMER = AutoregressiveModel()
"""The paper's transformer over 256 text tokens and 32×32 codes: 12 B parameters. Its weights were never published."""
