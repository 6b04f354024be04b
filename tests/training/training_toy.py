"""A tiny denoising stage and a resumable stream for it; run as a script, a training process that tests can kill.

python training_toy.py OUT STEPS HANG_AT     # waits forever when batch HANG_AT is asked for (-1: never)
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.single_optimizer import SingleOptimizer

FEATURES = 8


@dataclass(frozen=True)
class Toy(SingleOptimizer):
    """A two-layer denoiser. `draws`: noise from the step's key; otherwise it is in the batch."""

    width: int = 16
    draws: bool = True

    def init(self, key: Any) -> Any:
        first, second = jax.random.split(key)
        return {
            "first": {
                "kernel": 0.3 * jax.random.normal(first, (FEATURES, self.width)),
                "bias": jnp.zeros(self.width),
            },
            "second": {"kernel": jax.random.normal(second, (self.width, FEATURES)) / self.width**0.5},
        }, ()

    def loss(self, params: Any, extra: Any, frozen: Any, batch: Any, key: Any, step: Any) -> Any:
        noise = jax.random.normal(key, batch["x"].shape) if self.draws else batch["noise"]
        hidden = jnp.tanh((batch["x"] + noise) @ params["first"]["kernel"] + params["first"]["bias"])
        error = (hidden @ params["second"]["kernel"] - noise) ** 2
        return jnp.mean(error), ({"largest_error": jnp.mean(jnp.max(error, axis=-1))}, extra)

    def batch_spec(self, batch_size: int, side: int) -> Any:
        row = jax.ShapeDtypeStruct((batch_size, FEATURES), jnp.float32)
        return {"x": row, "noise": row}


@dataclass
class Stream:
    """Batch i is drawn with seed i; those in `bad` hold a NaN."""

    rows: int = 16
    bad: frozenset[int] = frozenset()
    length: int | None = None
    before: Any = None  # called with the index before a batch is made
    index: int = field(default=0)

    def __next__(self) -> dict[str, np.ndarray]:
        if self.before is not None:
            self.before(self.index)
        if self.index == self.length:
            raise StopIteration
        rng = np.random.default_rng(self.index)
        x, noise = rng.normal(size=(2, self.rows, FEATURES)).astype(np.float32)
        if self.index in self.bad:
            x[0, 0] = np.nan
        self.index += 1
        return {"x": x, "noise": noise, "caption": np.array(["a caption"] * self.rows)}

    def get_state(self) -> dict[str, int]:
        return {"index": self.index}

    def set_state(self, state: dict[str, int]) -> None:
        self.index = state["index"]


def hang_at(index: int) -> Any:
    return lambda asked: time.sleep(1000) if asked == index else None


def config(**changes: Any) -> Any:
    """Short runs that log every step."""
    from jaxdiff.training.loop import TrainConfig
    from jaxdiff.training.optimizer import OptimizerConfig

    optimizer = OptimizerConfig(learning_rate=1e-2, warmup=5, total=200)
    return TrainConfig(
        **({"optimizer": optimizer, "steps": 20, "log_every": 1, "save_every": 5, "progress": False} | changes)
    )


if __name__ == "__main__":
    from jaxdiff.training.loop import Layout, train
    from jaxdiff.training.mesh import make_mesh

    out, steps, hang = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    mesh = make_mesh(devices=jax.devices()[:1])
    train(Toy(), Stream(before=hang_at(hang)), config(steps=steps), out, layout=Layout(mesh))
