"""One attention function for every network: it picks the kernel, the networks only say what attends to what."""

import enum
import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Kernel(enum.Enum):
    """Which implementation computes attention. AUTO is right unless kernels are being compared."""

    AUTO = "auto"
    XLA = "xla"
    CUDNN = "cudnn"
    TOKAMAX = "tokamax"


LONG_SEQUENCE = 4096
"""From here on a TPU gains from a flash kernel; below, XLA's fused softmax is as fast (maxdiffusion's threshold)."""


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s n h"],
    v: Float[Array, "b s n h"],
    *,
    mask: Bool[Array, "b #n #t s"] | None = None,
    bias: Float[Array, "#b n t s"] | None = None,
    scale: float | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> Float[Array, "b t n h"]:
    """Scaled dot-product attention; the softmax is float32 whatever the inputs' dtype.

    `mask` is True where a query may look. `scale` defaults to 1/√h (T5 uses 1).
    """
    chosen = _pick(q, k, bias) if kernel is Kernel.AUTO else kernel
    if chosen is Kernel.TOKAMAX:
        import tokamax

        return tokamax.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)
    implementation = "cudnn" if chosen is Kernel.CUDNN else "xla"
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale, implementation=implementation)


def _pick(q: Array, k: Array, bias: Array | None) -> Kernel:
    platform = jax.default_backend()
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        # The gradient of a bias (T5's relative positions) needs even lengths in cuDNN.
        if bias is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0):
            return Kernel.CUDNN
    if platform == "tpu" and min(q.shape[1], k.shape[1]) >= LONG_SEQUENCE and importlib.util.find_spec("tokamax"):
        return Kernel.TOKAMAX
    return Kernel.XLA
