"""What both implementations read: prompts, sizes, noise, images. All of it is drawn by jaxdiff from one seed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verifications.rows import LIMITS, Limits
from jaxdiff.diffusion import noise

TIMES = 5
"""Noise levels at which a network is compared."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a comparison. size: height and width in pixels of the first image; None: the model's own."""

    prompts: tuple[str, ...]
    negative: str = ""
    seed: int = 0
    steps: int = 4
    size: tuple[int, int] | None = None
    dtype: str = "float32"
    variant: str | None = None

    @property
    def limits(self) -> Limits:
        return LIMITS[self.dtype]

    def keys(self, box: int) -> jax.Array:
        """The keys of a box's samples, one per prompt, as in a pipeline."""
        samples = noise.sample_keys(jax.random.key(self.seed), jnp.arange(len(self.prompts)))
        return noise.fold(samples, box)

    def start(self, box: int, size: tuple[int, int], channels: int) -> jax.Array:
        """The noise from which a box starts."""
        return noise.normal_like(noise.fold(self.keys(box), 0), (*size, channels))

    def on_low_res(self, box: int, size: tuple[int, int], channels: int) -> jax.Array:
        """The noise on the input of super-resolution."""
        return noise.normal_like(noise.fold(self.keys(box), 2), (*size, channels))

    def of_steps(self, box: int, size: tuple[int, int], channels: int) -> Iterator[jax.Array]:
        """The noise that a sampler adds at each of its steps."""
        for step in count():
            yield noise.normal_like(noise.fold(noise.fold(self.keys(box), 1), step), (*size, channels))


def entries(schedule: Any) -> list[int]:
    """The entries of a table at which a network is compared, the noisiest first."""
    return np.linspace(schedule.steps - 1, 0, TIMES).round().astype(int).tolist()


def picture(height: int, width: int) -> np.ndarray:
    """A colourful image with smooth areas and edges (1 h w 3), in [-1, 1]."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 5 * y), np.cos(12 * y - 3 * x), np.sin(20 * x * y)], -1)
    disc = (x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06
    return np.where(disc[..., None], (0.8, -0.6, 0.1), 0.9 * waves)[None].astype(np.float32)
