"""Images of two implementations side by side, with their difference."""

import numpy as np
from PIL import Image

from jaxdiff.data import grids

FACTOR = 16
"""By which differences are multiplied, so that they can be seen."""


def side_by_side(ours: np.ndarray, theirs: np.ndarray, name: str, prompts: tuple[str, ...]) -> Image.Image:
    """Rows of ours, theirs, and the absolute difference times `FACTOR` on black. Images (b h w 3) in [-1, 1].

    name: of the other implementation.
    """
    side = max(128, *ours.shape[1:3])
    difference = np.clip(FACTOR * np.abs(ours - theirs) - 1.0, -1.0, 1.0)
    images = [each for row in zip(ours, theirs, difference) for each in row]
    captions = [
        caption
        for prompt in prompts
        for caption in (f"jaxdiff: {prompt}", f"{name}: {prompt}", f"{FACTOR} times the difference")
    ]
    return grids.grid(images, captions, side, 3)
