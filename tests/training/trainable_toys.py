"""Three tiny trainables, one for each thing that a loss may hold beside parameters of one optimizer.

`Adversarial`: two optimizers in one step. `Quantized`: an EMA codebook in `extra`. `Student`: a frozen teacher.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from training_toy import FEATURES, Toy

from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.training.optimizer import SGD, AdamW, Decay, OptimizerConfig, Optimizers

WIDTH = 16
CODES = 16
DECAY = 0.9


def steady(kind: Any, learning_rate: float, clip: float | None = None) -> OptimizerConfig:
    """A constant rate."""
    return OptimizerConfig(kind, learning_rate=learning_rate, warmup=0, decay=Decay.CONSTANT, clip=clip)


@dataclass(frozen=True)
class Adversarial:
    """An autoencoder whose images a discriminator tells from real ones; each half of the loss moves its own half."""

    def init(self, key: Any) -> Any:
        first, second, third = jax.random.split(key, 3)
        generator = {
            "encoder": 0.3 * jax.random.normal(first, (FEATURES, WIDTH)),
            "decoder": 0.3 * jax.random.normal(second, (WIDTH, FEATURES)),
        }
        return {"generator": generator, "discriminator": {"kernel": jax.random.normal(third, (FEATURES, WIDTH))}}, ()

    def generated(self, params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["encoder"]) @ params["decoder"]

    def judged(self, params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["kernel"]).sum(-1)

    def generator_loss(self, generator: Any, discriminator: Any, x: Any) -> Any:
        made = self.generated(generator, x)
        return jnp.mean((made - x) ** 2) + 0.1 * jnp.mean(jax.nn.softplus(-self.judged(discriminator, made)))

    def discriminator_loss(self, generator: Any, discriminator: Any, x: Any) -> Any:
        real, made = self.judged(discriminator, x), self.judged(discriminator, self.generated(generator, x))
        return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(made))

    def loss(self, params: Any, extra: Any, frozen: Any, batch: Any, key: Any, step: Any) -> Any:
        generator, discriminator = params["generator"], params["discriminator"]
        of_generator = self.generator_loss(generator, jax.lax.stop_gradient(discriminator), batch["x"])
        of_discriminator = self.discriminator_loss(jax.lax.stop_gradient(generator), discriminator, batch["x"])
        return of_generator + of_discriminator, ({"discriminator": of_discriminator}, extra)

    def labels(self, params: Any) -> Any:
        return {half: jax.tree.map(lambda _, half=half: half, tree) for half, tree in params.items()}

    def cast(self, params: Any) -> Any:
        return params

    def batch_spec(self, batch_size: int, side: int) -> Any:
        return Toy().batch_spec(batch_size, side)


@dataclass(frozen=True)
class Quantized:
    """VQ with the codebook of exponential averages (arXiv 1711.00937, appendix A.1). `fixed`: the encoder stays."""

    fixed: bool = False

    def init(self, key: Any) -> Any:
        first, second, third = jax.random.split(key, 3)
        params = {
            "encoder": {"kernel": 0.3 * jax.random.normal(first, (FEATURES, WIDTH))},
            "decoder": {"kernel": 0.3 * jax.random.normal(second, (WIDTH, FEATURES))},
        }
        codes = jax.random.normal(third, (CODES, WIDTH))
        return params, {"counts": jnp.ones(CODES), "sums": codes, "batches": jnp.int32(0)}

    def loss(self, params: Any, extra: Any, frozen: Any, batch: Any, key: Any, step: Any) -> Any:
        z, codes = batch["x"] @ params["encoder"]["kernel"], extra["sums"] / extra["counts"][:, None]
        chosen = ((z[:, None] - codes) ** 2).sum(-1).argmin(-1)
        quantized = z + jax.lax.stop_gradient(codes[chosen] - z)
        error = jnp.mean((quantized @ params["decoder"]["kernel"] - batch["x"]) ** 2)
        commitment = jnp.mean((z - jax.lax.stop_gradient(codes[chosen])) ** 2)
        taken = jax.nn.one_hot(chosen, CODES)
        extra = {
            "counts": DECAY * extra["counts"] + (1 - DECAY) * taken.sum(0),
            "sums": DECAY * extra["sums"] + (1 - DECAY) * taken.T @ jax.lax.stop_gradient(z),
            "batches": extra["batches"] + 1,
        }
        return error + 0.25 * commitment, ({"commitment": commitment}, extra)

    def labels(self, params: Any) -> Any:
        return {"encoder": {"kernel": "none" if self.fixed else "all"}, "decoder": {"kernel": "all"}}

    def cast(self, params: Any) -> Any:
        return params

    def batch_spec(self, batch_size: int, side: int) -> Any:
        return Toy().batch_spec(batch_size, side)


@dataclass(frozen=True)
class Student(SingleOptimizer):
    """Learns to do as its teacher, which is frozen."""

    def init(self, key: Any) -> Any:
        return {"student": 0.3 * jax.random.normal(key, (FEATURES, WIDTH))}, ()

    def loss(self, params: Any, extra: Any, frozen: Any, batch: Any, key: Any, step: Any) -> Any:
        wanted = jnp.tanh(batch["x"] @ frozen["teacher"])
        return jnp.mean((batch["x"] @ params["student"] - wanted) ** 2), ({"seen": 1.0 * step}, extra)

    def batch_spec(self, batch_size: int, side: int) -> Any:
        return Toy().batch_spec(batch_size, side)


@dataclass(frozen=True)
class Counting(SingleOptimizer):
    """A loss that is always finite, beside a sum of the data that need not be."""

    def init(self, key: Any) -> Any:
        return {"w": jnp.ones(4)}, {"sum": jnp.zeros(())}

    def loss(self, params: Any, extra: Any, frozen: Any, batch: Any, key: Any, step: Any) -> Any:
        return jnp.mean(params["w"] ** 2), ({}, {"sum": extra["sum"] + batch["x"].sum()})

    def batch_spec(self, batch_size: int, side: int) -> Any:
        return Toy().batch_spec(batch_size, side)


@dataclass(frozen=True)
class Case:
    """A toy, its optimizers and what it reads."""

    trainable: Any
    optimizer: Optimizers
    frozen: Any = ()

    def __hash__(self) -> int:
        return hash(self.trainable)


TEACHER = {"teacher": np.random.default_rng(7).normal(size=(FEATURES, WIDTH)).astype(np.float32)}
HALVES = {"generator": steady(AdamW(), 1e-2, clip=1.0), "discriminator": steady(SGD(), 0.05, clip=0.1)}
CASES = {
    "adversarial": Case(Adversarial(), HALVES),
    "quantized": Case(Quantized(), steady(AdamW(), 1e-2)),
    "student": Case(Student(), steady(AdamW(), 1e-2), TEACHER),
}
