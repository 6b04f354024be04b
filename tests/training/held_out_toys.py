"""A toy that says the losses of single examples, its held-out examples, and a script of several processes.

    python held_out_toys.py OUT ROWS [PROCESS]

PROCESS is told to stop in the first evaluation, after its second batch of ROWS.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from training_toy import FEATURES, Toy, config

EXAMPLES = 37


@dataclass(frozen=True)
class ByExample(Toy):
    """The toy's loss of every example, with noise of its own; of even and odd ones apart too."""

    def held_out_losses(self, params: Any, extra: Any, frozen: Any, batch: Any, numbers: Any, key: Any) -> Any:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.maximum(numbers, 0))
        noise = jax.vmap(lambda key: jax.random.normal(key, (FEATURES,)))(keys)
        hidden = jnp.tanh((batch["x"] + noise) @ params["first"]["kernel"] + params["first"]["bias"])
        losses = ((hidden @ params["second"]["kernel"] - noise) ** 2).mean(-1)
        counted = {
            "held_out_loss": numbers >= 0,
            "held_out_loss_odd": (numbers >= 0) & (numbers % 2 == 1),
            "held_out_loss_none": numbers < -1,
        }
        return {name: (jnp.where(of, losses, 0.0).sum(), of.sum()) for name, of in counted.items()}


def examples() -> dict[str, np.ndarray]:
    x = np.random.default_rng(99).normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    return {"x": x, "caption": np.array([f"caption {i}" for i in range(EXAMPLES)])}


def batches(rows: int, process: int = 0, processes: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """This process's share, as `data.pipeline` gives it: every so many, the last batch short."""
    own = {name: value[process::processes] for name, value in examples().items()}
    for start in range(0, len(own["x"]), rows):
        yield {name: value[start : start + rows] for name, value in own.items()}


def with_a_signal(given: Iterator[dict[str, np.ndarray]], mine: bool) -> Iterator[dict[str, np.ndarray]]:
    for number, batch in enumerate(given):
        if mine and number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # jax looks once a second whether there was a signal
        yield batch


if __name__ == "__main__":
    import joined_toy
    import processes

    from jaxdiff.training.loop import Hooks, train

    count = processes.join()
    index = jax.process_index()
    settings = config(steps=6, evaluate_every=4)
    held_out = lambda: batches(int(sys.argv[2]), index, count)  # noqa: E731
    told = sys.argv[3:]
    hooks = Hooks(held_out=(lambda: with_a_signal(held_out(), told == [str(index)])) if told else held_out)
    train(ByExample(), joined_toy.Share(process=index, count=count), settings, Path(sys.argv[1]), hooks=hooks)
