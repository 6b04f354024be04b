"""A cascade of the right resolutions with very small networks, which compile in seconds."""

import dataclasses

from experiments.options.training import PresetOptimizer
from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.conditioning import MaskedText
from jaxdiff.nets.t5 import T5Config
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, EfficientUNetConfig

LENGTH, WIDTH = 16, 8
"""Of the embeddings that the base reads."""
NET = EfficientUNetConfig(
    channels=8,
    multipliers=(1,),
    blocks=(1,),
    attention=AttentionConfig((True,), (False,), heads=2),
    conditioning=ConditioningConfig(16, MaskedText(WIDTH)),
    patch=8,
)
PLAIN = dataclasses.replace(
    NET, attention=AttentionConfig((False,), (False,)), conditioning=ConditioningConfig(16, text=None), patch=16
)
BASE = DiffusionModel(NET, conditioners=(TextConditioner(WIDTH, LENGTH),), prediction=Prediction.X0)
SR_256 = DiffusionModel(
    PLAIN, side=256, conditioners=(LowResConditioner(max_level=0.3),), prediction=Prediction.X0, residual=True
)
SR_1024 = dataclasses.replace(SR_256, side=1024)
STAGES = {"base64": BASE, "sr256": SR_256, "sr1024": SR_1024}
T5 = T5Config(d_model=WIDTH, d_kv=4, d_ff=16, layers=1, decoder_layers=1, heads=2, tied=True)

ADAM = PresetOptimizer("adam", 1e-3)
"""Of very small presets, in place of Muon, whose program takes longer to compile."""
