"""What the sections of the GPU report share: deadline, records, medians, and random parameters."""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff.weights.imagen import SHIPPED


@dataclass(frozen=True)
class Context:
    """One section's run. deadline: in seconds since 1970. tiny: a rehearsal on small sizes. weights: a cascade's
    folder."""

    name: str
    out: Path
    deadline: float
    tiny: bool
    weights: Path = SHIPPED
    training: Any = None

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def record(self, **result: Any) -> None:
        """Appends a result to the section's file and prints it."""
        with (self.out / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(" ".join(f"{name}={value}" for name, value in result.items()), flush=True)

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Calls `measure`. One that fails, for want of memory say, is recorded, and the section goes on."""
        if self.left() <= 0:
            self.record(not_measured=what, why="no time was left")
            return
        try:
            measure()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            self.record(not_measured=what, why=f"{type(error).__name__}: {lines[0][:300]}")


def median_seconds(call: Callable[[], Any], count: int) -> float:
    """The median time of `count` calls after two that are not counted, results awaited."""
    seconds = []
    for number in range(count + 2):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        if number > 1:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Parameters none of which is 0, so that every path of a network counts; kernels keep the size of their input."""
    rng = np.random.default_rng(seed)

    def values(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(leaf.shape, dtype=np.float32)
        if "scale" in name or "'var'" in name:
            return 1 + 0.1 * np.abs(x)
        return x * (math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1)

    return jax.tree_util.tree_map_with_path(values, shapes)
