"""Very small networks and stages for the tests: compiled in seconds, or formulas that compile in no time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.conditioners import LowResConditioner, TextConditioner
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.nets.conditioning import MaskedText
from jaxdiff.nets.unet import AttentionConfig, ConditioningConfig, EfficientUNetConfig, UNetConfig

LENGTH, WIDTH = 4, 6
"""Of the embeddings that these models read."""
UNET = EfficientUNetConfig(
    channels=8,
    multipliers=(1,),
    blocks=(1,),
    attention=AttentionConfig((True,), (False,), heads=2),
    conditioning=ConditioningConfig(16, MaskedText(8)),
)
TEXT = TextConditioner(WIDTH, LENGTH)

BASE = DiffusionModel(unet=UNET, side=8, conditioners=(TEXT,))
SR = DiffusionModel(unet=UNET, side=16, conditioners=(TEXT, LowResConditioner()))


@dataclass(frozen=True)
class Formula(EfficientUNetConfig):
    """A network that is a function: `output(x, time, text, mask)`, or with `low_res, aug_level` behind them."""

    channels: int = 8
    multipliers: tuple[int, ...] = (1,)
    blocks: tuple[int, ...] = (1,)
    attention: AttentionConfig = AttentionConfig((True,), (False,))
    output: Callable | None = None

    def module(self):
        return _Applied(self.output)


@dataclass(frozen=True)
class _Applied:
    output: Callable

    def init(self, key, *inputs):
        return {"params": {}}

    def apply(self, variables, x, time, given):
        lower = () if given.concat is None else (given.concat, given.aug_level)
        return self.output(x, time, given.tokens, given.token_mask, *lower)


def changed(model: DiffusionModel, kind: type, **settings: Any) -> DiffusionModel:
    """The model with other settings of its conditioner of that kind."""
    told = [replace(each, **settings) if isinstance(each, kind) else each for each in model.conditioners]
    return replace(model, conditioners=tuple(told))


def executed(unet: UNetConfig, **settings: Any) -> UNetConfig:
    """The network computed in another way."""
    return replace(unet, execution=replace(unet.execution, **settings))


def random_params(model: DiffusionModel, seed: int = 0) -> dict:
    """Parameters of a model, `filled`."""
    return filled(jax.eval_shape(model.init, jax.random.key(0))[0], seed)


def filled(shapes: dict, seed: int = 0) -> dict:
    """Parameters none of which is 0, so that every path counts; drawn by numpy, since compiling `init` takes long."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if leaf.ndim > 1:
            values /= math.sqrt(math.prod(leaf.shape[:-1]))
        else:
            values = 0.2 * values + (path[-1].key == "scale")
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def loss_of(trainable: Any, params: Any, batch: Any, key: Any) -> tuple[Any, dict]:
    """Loss and metrics of a trainable that has no extra and reads nothing frozen."""
    loss, (metrics, extra) = trainable.loss(params, (), (), batch, key, jnp.int32(0))
    assert extra == ()
    return loss, metrics
