"""Draws an image with the tiny cascade's stages, random weights and two steps each, and prints the peak memory.

python draw_1024.py SIDE TILE [last]      # SIDE 1024 or 512 pixels; TILE 0 for none; last: the last stage alone
"""

import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small import random_params

from jaxdiff.diffusion import noise
from jaxdiff.models.sampling import SampleRequest, SamplingConfig, TrainedModel
from jaxdiff.models.tiles import Tiles
from jaxdiff.systems import imagen_tiny


def main(side: int, tile: int, last: bool = False) -> None:
    tiles = Tiles(tile, tile // 8) if tile else None
    base = SamplingConfig(sampler=imagen_tiny.SAMPLING_BASE_TINY.sampler, steps=2)
    large = SamplingConfig(sampler=imagen_tiny.SAMPLING_SR_TINY.sampler, steps=2)
    stages = (imagen_tiny.BASE_64_TINY, base), (imagen_tiny.SR_256_TINY, large), (imagen_tiny.SR_1024_TINY, large)
    picture, keys = None, noise.sample_keys(jax.random.key(0), jnp.arange(1))
    if last:
        picture = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, side // 4, side // 4, 3)), jnp.float32)
    for factor, (model, sampling) in list(zip((16, 4, 1), stages))[2 if last else 0 :]:
        if tile and factor == 1:
            sampling = SamplingConfig(sampler=large.sampler, steps=2, tiles=tiles)
        model = model.reading(24, 128)
        params = jax.tree.map(jnp.asarray, random_params(model))
        request = SampleRequest(keys, (side // factor,) * 2)
        picture = TrainedModel(model, params, sampling).decode(picture, request)
    picture = np.asarray(picture)
    assert picture.shape == (1, side, side, 3) and np.isfinite(picture).all() and picture.std() > 0.01
    print("peak", peak())


def peak() -> int:
    """Bytes, of this program alone (VmHWM) where the system tells: ru_maxrss begins at the size of its parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "last" in sys.argv[3:])
