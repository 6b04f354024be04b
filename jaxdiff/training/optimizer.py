"""Optimizer settings: Adam(W), Adafactor, Muon or SGD, gradient clipping, and the learning rate schedule.

Defaults are Imagen's (appendix F.1): learning rate 1e-4, 10,000 steps of warm-up, cosine decay over 2.5 M steps. The
paper prints `end_value=2500000` for the schedule, which would raise the rate to 2.5 million; 0 is meant.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxdiff.training.muon import scale_by_muon


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay; without decay, plain Adam as in Imagen's F.2 and F.3.

    decay_all: False disables decay for parameters with fewer than two axes (gains, biases), as in CLIP.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_all: bool = True

    def __post_init__(self) -> None:
        _check_rule(self, "b1", "b2")

    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        decayed = None if self.decay_all else lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        return optax.adamw(
            learning_rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=decayed
        )


@dataclass(frozen=True)
class Adafactor:
    """Adafactor with optax's defaults, as in Imagen's F.1: second moments of matrices as a row and a column."""

    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_rule(self, "decay_rate")

    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        # With a learning rate, optax applies the decay unscaled: 0.01 would remove 1 % of every parameter per step.
        unscaled = optax.adafactor(
            None,
            decay_rate=self.decay_rate,
            clipping_threshold=self.clipping_threshold,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            weight_decay_rate=self.weight_decay or None,
        )
        return optax.chain(unscaled, optax.scale_by_learning_rate(learning_rate, flip_sign=False))


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan 2024; scaled as in arXiv 2502.16982): orthogonalised momentum for matrices, Adam for the rest.

    Convolution kernels are treated as matrices (all input axes, output channels). rms: the RMS of an update, close to
    Adam's, so that both share one learning rate. adam_for: name components of parameters that Adam updates; customarily
    the first and the last layer and embedding tables. decay_all: False disables decay for all parameters that Adam
    updates, including gains and biases.
    """

    momentum: float = 0.95
    rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    adam_for: tuple[str, ...] = ("embedding", "stem", "head")
    decay_all: bool = True

    def __post_init__(self) -> None:
        _check_rule(self, "momentum", "b1", "b2")

    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        matrices = optax.chain(
            scale_by_muon(self.momentum, self.rms),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
        others = optax.adamw(
            learning_rate,
            b1=self.b1,
            b2=self.b2,
            weight_decay=self.weight_decay if self.decay_all else 0.0,
            nesterov=True,
        )
        return optax.partition({True: matrices, False: others}, self._are_matrices)

    def _are_matrices(self, params: optax.Params) -> optax.Params:
        def is_matrix(path, leaf):
            name = jax.tree_util.keystr(path)
            return leaf.ndim > 1 and not any(part in name for part in self.adam_for)

        return jax.tree_util.tree_map_with_path(is_matrix, params)


@dataclass(frozen=True)
class SGD:
    """Plain gradient descent with momentum, as a baseline."""

    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check_rule(self, "momentum")

    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.sgd(learning_rate, momentum=self.momentum or None)


def _check_rule(rule: Any, *averages: str) -> None:
    """ValueError for a weight decay that is negative or not finite, or a moment decay outside [0, 1)."""
    for name in averages:
        if not 0 <= getattr(rule, name) < 1:
            raise ValueError(f"{name} {getattr(rule, name)}: must be at least 0 and below 1")
    weight_decay = getattr(rule, "weight_decay", 0.0)
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay {weight_decay}: must be finite and 0 or more")


class Decay(enum.Enum):
    """The learning rate after the warm-up: one of these, or a `StableDecay`."""

    COSINE = "cosine"  # falls to 0 at `total`
    CONSTANT = "constant"  # endless; `total` is unused


@dataclass(frozen=True)
class StableDecay:
    """Warmup-stable-decay (MiniCPM, arXiv 2404.06395; arXiv 2405.18392): the full rate until the last `fraction` of
    `total`, then linear decay to 0 at `total`.

    Before the decay, the rates equal those of a constant schedule and of any other `total`, so a run may still become
    longer or shorter, or start to decay (`training.resume`). Raises ValueError for a fraction outside (0, 1].
    """

    fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction {self.fraction}: must be above 0 and at most 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer settings. Counts are updates: a skipped step does not advance the schedule.

    Raises ValueError for an invalid setting; the message begins with the name of the field.
    """

    kind: AdamW | Adafactor | Muon | SGD = AdamW()
    learning_rate: float = 1e-4
    warmup: int = 10_000  # updates from 0 to `learning_rate`
    total: int = 2_500_000  # the update at which the learning rate reaches 0
    decay: Decay | StableDecay = Decay.COSINE
    clip: float | None = 1.0  # maximum global gradient norm, after averaging over the batch

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate {self.learning_rate}: must be finite and above 0")
        if self.warmup < 0:
            raise ValueError(f"warmup {self.warmup}: must be 0 or more updates")
        if self.decay is not Decay.CONSTANT and self.total <= self.warmup:
            raise ValueError(f"total {self.total}: must exceed warmup {self.warmup}: the rate falls in between")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip {self.clip}: must be above 0, or None for no clipping")

    @property
    def end(self) -> int | float:
        """The update after which the learning rate is 0; infinite if never."""
        return math.inf if self.decay is Decay.CONSTANT else self.total

    @property
    def stable_until(self) -> int | float:
        """The last update up to which the rates do not depend on `total` or the decay."""
        if isinstance(self.decay, StableDecay):
            falling = max(1, round(self.decay.fraction * self.total))
            return max(self.warmup, self.total - falling)
        return math.inf if self.decay is Decay.CONSTANT else 0


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the number of updates made."""
    rate = config.learning_rate
    schedules, boundaries = [], []
    if config.warmup:
        schedules, boundaries = [optax.linear_schedule(0.0, rate, config.warmup)], [config.warmup]
    if config.decay is Decay.COSINE:
        schedules.append(optax.cosine_decay_schedule(rate, config.total - config.warmup, alpha=0.0))
    else:
        schedules.append(optax.constant_schedule(rate))
    if isinstance(config.decay, StableDecay):
        start = int(config.stable_until)
        schedules.append(optax.linear_schedule(rate, 0.0, config.total - start))
        boundaries.append(start)
    return schedules[0] if len(schedules) == 1 else optax.join_schedules(schedules, boundaries)


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then the update rule."""
    update = config.kind.transform(schedule(config))
    return update if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), update)


Optimizers = OptimizerConfig | Mapping[str, OptimizerConfig]
"""One for all arrays, or one per label of a model with several optimizers."""

STAYS = "none"
"""The label of arrays that no optimizer updates."""


def labelled_optimizer(config: Optimizers, labels: Any) -> optax.GradientTransformation:
    """Updates each array with the optimizer of its label. labels: a tree like the parameters, with a string per array.

    Every optimizer clips by the norm of its own arrays. Raises ValueError if the labels do not match `config`.
    """
    names = set(jax.tree.leaves(labels)) - {STAYS}
    if isinstance(config, OptimizerConfig):
        if len(names) > 1:
            raise ValueError(f"one optimizer for arrays labelled {_listed(names)}: give one for each label")
        if STAYS not in jax.tree.leaves(labels):
            return optimizer(config)
        config = dict.fromkeys(names, config)
    if set(config) != names:
        raise ValueError(f"optimizers for {_listed(config)}, and arrays labelled {_listed(names)}: give one for each")
    rules = {name: optimizer(each) for name, each in config.items()}
    return optax.multi_transform({**rules, STAYS: optax.set_to_zero()}, labels)


def learning_rates(config: Optimizers, updates: Any) -> dict[str, Any]:
    """The learning rates after this many updates, by metric name: `learning_rate`, or `learning_rate_LABEL` per
    label."""
    if isinstance(config, OptimizerConfig):
        return {"learning_rate": schedule(config)(updates)}
    return {f"learning_rate_{label}": schedule(each)(updates) for label, each in config.items()}


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
