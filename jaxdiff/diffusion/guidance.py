"""Classifier-free guidance, in Imagen's convention: ε̃ = w ε(z, c) + (1 − w) ε(z).

w = 1 is off (exactly the conditional prediction), w = 0 is exactly the unconditional prediction, w > 1 guides. In the
convention (1 + w) ε(z, c) − w ε(z), where 0 is off, w is smaller by one. The rule is affine, so it applies equally to
ε, x₀, v and velocity; only `rescale` depends on the choice. The caller evaluates both branches as one doubled batch.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdiff.diffusion.numbers import Number, is_plain, pytree_of_numbers

_LARGEST = float(jnp.finfo(jnp.float32).max) / 2  # w and 1 − w are float32


def guide(cond: Float[Array, "b *s"], uncond: Float[Array, "b *s"], weight: Number) -> Float[Array, "b *s"]:
    """w cond + (1 − w) uncond; w is a number or one per sample (b,)."""
    weight = _per_sample(weight, cond)
    return weight * cond + (1.0 - weight) * uncond


@pytree_of_numbers
@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance weight, interval and rescaling.

    weight    w above; 1 is off.
    interval  (low, high) in log-SNR: outside it w is 1 (arXiv 2404.07724, whose noise level s is λ = −2 log s).
              None: everywhere.
    rescale   φ in [0, 1] (arXiv 2305.08891, Eq. 15–16): interpolates to the guided prediction scaled to the standard
              deviation of the conditional one over the sample's own axes. 0 is off.

    A pytree whose numbers are leaves, so that `jax.jit` can trace them; the presence of an interval is part of its
    structure. Arrays may hold one number per sample (b,). With plain numbers it is hashable, and a number out of range
    raises ValueError.
    """

    weight: Number = 1.0
    interval: tuple[Number, Number] | None = None
    rescale: Number = 0.0

    def __post_init__(self):
        if is_plain(self.weight) and not abs(self.weight) <= _LARGEST:
            raise ValueError(f"the guidance weight must be finite, not {self.weight}")
        ends = self.interval if isinstance(self.interval, tuple) else ()
        if ends and all(map(is_plain, ends)) and not ends[0] <= ends[1]:
            raise ValueError(f"the guidance interval is (low, high) in log-SNR with low <= high, not {self.interval}")
        if is_plain(self.rescale) and not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"the guidance rescale must lie in [0, 1], not {self.rescale}")

    @property
    def on(self) -> bool:
        """False if the conditional prediction suffices, so that no doubled batch is needed. True for an array, whose
        value may be traced."""
        return not is_plain(self.weight) or self.weight != 1.0

    def apply(
        self,
        cond: Float[Array, "b *s"],
        uncond: Float[Array, "b *s"],
        logsnr: Float[Array, "..."],
        weights: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b *s"]:
        """The guided prediction. logsnr: a scalar or (b,). weights: one per sample, instead of `weight`."""
        guided = guide(cond, uncond, jnp.where(self.inside(logsnr), self.weight if weights is None else weights, 1.0))
        if is_plain(self.rescale) and self.rescale == 0.0:
            return guided
        axes = tuple(range(1, cond.ndim))
        ratio = _deviation(cond, axes) / jnp.maximum(_deviation(guided, axes), 1e-12)
        return guided * (1.0 + _per_sample(self.rescale, guided) * (ratio - 1.0))

    def inside(self, logsnr: Float[Array, "*s"]) -> Bool[Array, "*s"]:
        """Whether the weight applies; elsewhere the unconditional prediction is not needed."""
        if self.interval is None:
            return jnp.ones(jnp.shape(logsnr), bool)
        return (logsnr >= self.interval[0]) & (logsnr <= self.interval[1])


def _per_sample(value: Number, x: Float[Array, "b *s"]) -> Array:
    """Reshape a number, or one per sample, to broadcast against x."""
    value = jnp.asarray(value, jnp.promote_types(x.dtype, jnp.float32))
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def _deviation(x: Float[Array, "b *s"], axes: tuple[int, ...]) -> Float[Array, "b ..."]:
    return jnp.std(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=axes, keepdims=True)
