"""A cascade of the right resolutions with very small networks, which compile in seconds."""

import dataclasses

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.t5 import T5Config
from jaxdiff.nets.unet import EfficientUNetConfig

WIDTH = 8
NET = EfficientUNetConfig(
    channels=8,
    multipliers=(1,),
    blocks=(1,),
    self_attention=(True,),
    cross_attention=(False,),
    heads=2,
    feed_forward=0,
    time_width=16,
    text_width=WIDTH,
    context_width=WIDTH,
    patch=8,
    low_res=False,
)
PLAIN = dataclasses.replace(NET, self_attention=(False,), pool_text=False, patch=16, low_res=True)
BASE = DiffusionModel(NET, resolution=64, prediction=Prediction.X0, text_length=16)
SR_256 = DiffusionModel(
    PLAIN, resolution=256, low_resolution=64, prediction=Prediction.X0, residual=True, max_aug_level=0.3, text_length=16
)
SR_1024 = dataclasses.replace(SR_256, resolution=1024, low_resolution=256)
STAGES = {"base64": BASE, "sr256": SR_256, "sr1024": SR_1024}
T5 = T5Config(d_model=WIDTH, d_kv=4, d_ff=16, layers=1, decoder_layers=1, heads=2, tied=True)
