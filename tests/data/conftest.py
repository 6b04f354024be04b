"""Small captioned sources for the tests of this folder."""

import dataclasses

import numpy as np
import pytest

from jaxdiff.data import pictures


@dataclasses.dataclass(frozen=True)
class Listed:
    """A source held in memory."""

    examples: tuple

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        if isinstance(self.examples[index], Exception):
            raise self.examples[index]
        return self.examples[index]


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random picture of low frequencies: shrinking it loses little."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 3) * x + rng.uniform(1, 3) * y + rng.uniform())) for _ in range(3)]
    return (127.5 + 127 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture(scope="session")
def listed():
    return Listed


@pytest.fixture(scope="session")
def source() -> Listed:
    """Eleven 32-pixel pictures with captions."""
    return make_source(11, 32, 32)


@pytest.fixture(scope="session")
def make():
    return make_source


def make_source(count: int, height: int, width: int) -> Listed:
    rng = np.random.default_rng(3)
    return Listed(
        tuple(
            {
                "image": pictures.encode_png(smooth(rng, height, width)),
                "caption": f"picture number {i}",
                "name": f"set/{i}.png",
            }
            for i in range(count)
        )
    )
