"""Very small networks and stages for the tests: compiled in seconds, or formulas that compile in no time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.unet import EfficientUNetConfig

TEXT = {"text_width": 6, "context_width": 8}
LENGTH = 4
_ONE_LEVEL = {
    "channels": 8,
    "multipliers": (1,),
    "blocks": (1,),
    "self_attention": (True,),
    "cross_attention": (False,),
    "heads": 2,
    "feed_forward": 0,
    "time_width": 16,
    **TEXT,
}

BASE = DiffusionModel(unet=EfficientUNetConfig(low_res=False, **_ONE_LEVEL), resolution=8, text_length=LENGTH)
SR = DiffusionModel(
    unet=EfficientUNetConfig(low_res=True, **_ONE_LEVEL), resolution=16, low_resolution=4, text_length=LENGTH
)


@dataclass(frozen=True)
class Formula(EfficientUNetConfig):
    """A network that is a function: `output(x, time, text, mask)`, or with `low_res, aug_level` behind them."""

    channels: int = 8
    multipliers: tuple[int, ...] = (1,)
    blocks: tuple[int, ...] = (1,)
    self_attention: tuple[bool, ...] = (True,)
    cross_attention: tuple[bool, ...] = (False,)
    text_width: int = 6
    low_res: bool = False
    output: Callable | None = None

    def module(self):
        return _Applied(self.output)


@dataclass(frozen=True)
class _Applied:
    output: Callable

    def init(self, key, *inputs):
        return {"params": {}}

    def apply(self, variables, *inputs):
        return self.output(*inputs)


def random_params(stage: DiffusionModel, seed: int = 0) -> dict:
    """Parameters none of which is 0, so that every path counts; drawn by numpy, since compiling `init` takes long."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if leaf.ndim > 1:
            values /= math.sqrt(math.prod(leaf.shape[:-1]))
        else:
            values = 0.2 * values + (path[-1].key == "scale")
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(stage.init, jax.random.key(0))[0])


def loss_of(trainable: Any, params: Any, batch: Any, key: Any) -> tuple[Any, dict]:
    """Loss and metrics of a trainable that has no extra and reads nothing frozen."""
    loss, (metrics, extra) = trainable.loss(params, (), (), batch, key, jnp.int32(0))
    assert extra == ()
    return loss, metrics
