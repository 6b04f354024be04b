"""Shared parts of the GPU report's sections: deadline, records, medians, random parameters."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff.core import json_files
from jaxdiff.core.messages import reason
from jaxdiff.weights.imagen import SHIPPED


@dataclass(frozen=True)
class Context:
    """A run of a section. deadline: in seconds since 1970. tiny: a test run on small sizes. weights: folder of a
    cascade."""

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
        """Append a result to the section's file and print it."""
        record(self.out, self.name, result)
        print(" ".join(f"{name}={value}" for name, value in result.items()), flush=True)

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Call `measure`. An error, such as out of memory, is recorded and does not end the section."""
        if self.left() <= 0:
            self.record(not_measured=what, why="no time was left")
            return
        try:
            measure()
        except Exception as error:
            self.record(not_measured=what, why=f"{type(error).__name__}: {reason(error, 300)}")


def record(out: Path, name: str, result: dict[str, Any]) -> None:
    """Append a result of the section `name`, on its own line even after a line truncated by a killed process."""
    with (out / f"{name}.jsonl").open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            cut_short = file.read(1) != b"\n"
            file.write(b"\n" * cut_short)
        file.write(json.dumps(result).encode() + b"\n")


def recorded(out: Path, name: str) -> list[dict[str, Any]]:
    """The results of a section; a truncated line becomes an error."""
    try:
        lines = (out / f"{name}.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [_row(line) for line in lines]


def _row(line: bytes) -> dict[str, Any]:
    try:
        return json_files.parse_object(line, "a result")
    except ValueError:
        return {"error": "a result was cut short"}


def median_seconds(call: Callable[[], Any], count: int) -> float:
    """The median time in seconds of `count` blocking calls after two warm-up calls."""
    seconds = []
    for number in range(count + 2):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        if number > 1:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Non-zero random parameters, so that every path of a network contributes; kernels preserve the input's scale."""
    rng = np.random.default_rng(seed)

    def values(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(leaf.shape, dtype=np.float32)
        if "scale" in name or "'var'" in name:
            return 1 + 0.1 * np.abs(x)
        return x * (math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1)

    return jax.tree_util.tree_map_with_path(values, shapes)
