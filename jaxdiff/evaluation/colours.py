"""The dominant colour of an image on white, by name: a coarse metric for artwork that has no exact attributes."""

import numpy as np
from jaxtyping import Float, Int

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 45, 40),
    "orange": (245, 130, 30),
    "yellow": (252, 205, 50),
    "green": (75, 165, 75),
    "cyan": (90, 205, 225),
    "blue": (35, 110, 205),
    "purple": (130, 70, 170),
    "pink": (245, 145, 180),
    "brown": (125, 80, 65),
    "grey": (145, 150, 155),
    "black": (40, 40, 40),
    "white": (250, 250, 250),
}
LEAST = 0.01
"""An image with a smaller fraction of foreground is white."""


def dominant(image: Float[np.ndarray, "h w 3"]) -> str:
    """The name of the colour nearest to most foreground pixels, which are those not nearest to white; `image` in
    [-1, 1]."""
    pixels = np.clip((image.reshape(-1, 3) + 1) * 127.5, 0, 255)
    votes = dict(zip(COLOURS, np.bincount(nearest(pixels), minlength=len(COLOURS)), strict=True))
    del votes["white"]
    return max(votes, key=votes.__getitem__) if sum(votes.values()) >= LEAST * len(pixels) else "white"


def nearest(pixels: Float[np.ndarray, "n 3"]) -> Int[np.ndarray, " n"]:
    """Index in COLOURS of each pixel (0…255), by distance in brightness and two colour differences.

    Brightness counts half: shading must not turn yellow into orange, nor blue into black.
    """
    transform = np.array([[0.15, 0.29, 0.06], [0.5, -0.5, 0.0], [0.25, 0.25, -0.5]])
    palette = np.array(list(COLOURS.values()), float)
    distance = ((pixels @ transform.T)[:, None, :] - (palette @ transform.T)[None]) ** 2
    return distance.sum(-1).argmin(1)
