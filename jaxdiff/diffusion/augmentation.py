"""Noise-conditioning augmentation (Imagen, Sec. 2.4, Fig. A.32): the low-resolution input is noised to a known level.

Training samples one level per example, uniform in [0, 1]; in sampling the user sets it (0 gives the best FID, 0.1 to
0.3 the best-looking images). The level determines the time of a variance-preserving schedule. In training and in
sampling, pass the *noised* input and the level to the network.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.diffusion.noise import normal_like
from jaxdiff.diffusion.parameterization import noised
from jaxdiff.diffusion.schedules import Schedule


def augment(
    low_res: Float[Array, "b *s"], level: Float[Array, " b"], keys: Key[Array, " b"], schedule: Schedule
) -> Float[Array, "b *s"]:
    """α low_res + σ ε at the level's time, with each example's noise from its own key; exactly the input at t = 0."""
    t = schedule.level_time(level)
    eps = normal_like(keys, low_res.shape[1:])
    noisy = noised(low_res, eps, schedule.alpha(t), schedule.sigma(t)).astype(low_res.dtype)
    # At t = 0 the clipped schedule still has σ > 0.
    clean = (t == 0.0).reshape((-1,) + (1,) * (low_res.ndim - 1))
    return jnp.where(clean, low_res, noisy)
