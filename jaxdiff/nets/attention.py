"""One attention function for every network, which selects the kernel."""

import enum
import importlib.util
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Kernel(enum.Enum):
    """Implementation of attention. Use AUTO unless you compare kernels."""

    AUTO = "auto"
    XLA = "xla"
    CUDNN = "cudnn"
    TOKAMAX = "tokamax"


LONG_SEQUENCE = 4096
"""From this length on, a flash kernel is faster on a TPU than XLA's fused softmax (maxdiffusion's threshold)."""


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s n h"],
    v: Float[Array, "b s n h"],
    *,
    mask: Bool[Array, "#b #n #t s"] | None = None,
    bias: Float[Array, "#b n t s"] | None = None,
    scale: float | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> Float[Array, "b t n h"]:
    """Scaled dot-product attention; the softmax is in float32 for every input dtype.

    mask: True where a query attends to a key. scale: defaults to 1/√h (T5 uses 1).
    """
    chosen = _pick(q, k, mask, bias) if kernel is Kernel.AUTO else kernel
    if chosen is Kernel.TOKAMAX:
        import tokamax

        return tokamax.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)
    if chosen is Kernel.CUDNN:
        k, v, mask = _for_cudnn(q, k, v, mask)
    implementation: Literal["cudnn", "xla"] = "cudnn" if chosen is Kernel.CUDNN else "xla"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale, implementation=implementation)


def platform() -> str:
    """The platform that the traced program will run on: cpu, gpu or tpu.

    It is that of the current mesh (`jax.set_mesh`), which may differ from JAX's default: a CPU beside a GPU, or absent
    chips in ahead-of-time compilation. Without a mesh it is JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _pick(q: Array, k: Array, mask: Array | None, bias: Array | None) -> Kernel:
    target = platform()
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if target == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        # cuDNN's gradient needs even lengths, even without a mask. An odd number of keys can be padded under a mask.
        even = q.shape[1] % 2 == 0 and (k.shape[1] % 2 == 0 or bias is None)
        # On an H100, key masks were accurate to 0.4 %. A CLIP with per-query masks and 65 unmasked image tokens was off
        # by 16 % (jax 0.11.2); which of the two is the cause is unknown.
        if even and (mask is None or mask.shape[2] == 1):
            return Kernel.CUDNN
    if target == "tpu" and min(q.shape[1], k.shape[1]) >= LONG_SEQUENCE and importlib.util.find_spec("tokamax"):
        return Kernel.TOKAMAX
    return Kernel.XLA


def _for_cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array, Array | None]:
    """Keys, values and mask for cuDNN: the mask broadcast to every query, the number of keys even."""
    odd = k.shape[1] % 2
    if mask is None and not odd:
        return k, v, None
    if mask is None:
        mask = jnp.ones((1, 1, 1, k.shape[1]), bool)
    k, v = (jnp.pad(a, ((0, 0), (0, odd), (0, 0), (0, 0))) for a in (k, v))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, odd)))
    return k, v, jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
