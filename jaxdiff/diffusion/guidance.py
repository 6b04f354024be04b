"""Classifier-free guidance, in Imagen's convention: ε̃ = w ε(z, c) + (1 − w) ε(z).

w = 1 is off (exactly the conditional prediction), w = 0 exactly the unconditional one, w > 1 guides. Code that writes
(1 + w) ε(z, c) − w ε(z), or where 0 means off, has a w smaller by one. The rule is affine, so it may be applied to ε,
x₀, v or velocity alike; only `rescale` depends on which. Both branches are one doubled batch, which the caller makes.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdiff.diffusion.numbers import Number, is_plain, pytree_of_numbers

_LARGEST = float(jnp.finfo(jnp.float32).max) / 2  # w and 1 − w are float32


def guide(cond: Float[Array, "b *s"], uncond: Float[Array, "b *s"], weight: Number) -> Float[Array, "b *s"]:
    """w cond + (1 − w) uncond, with w a number or one for each sample (b,)."""
    weight = _of_samples(weight, cond)
    return weight * cond + (1.0 - weight) * uncond


@pytree_of_numbers
@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly, and where, the text guides.

    weight    w above; 1 is off.
    interval  (low, high) in log-SNR: outside it w is 1 (arXiv 2404.07724, whose noise level s is λ = −2 log s).
              None: everywhere.
    rescale   φ in [0, 1] (arXiv 2305.08891, Eq. 15–16): the guided prediction, scaled to the standard deviation that
              the conditional one has over the sample's own axes, is mixed in with φ. 0 is off.

    A pytree whose numbers are leaves, so that `jax.jit` may trace them; whether there is an interval is its structure.
    Arrays may hold a number for each sample (b,). With plain numbers it is hashable, and ValueError names one that is
    out of range.
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
        """False where the conditional prediction alone will do, so that the caller needs no doubled batch. True of an
        array: its value may not be known yet."""
        return not is_plain(self.weight) or self.weight != 1.0

    def apply(
        self,
        cond: Float[Array, "b *s"],
        uncond: Float[Array, "b *s"],
        logsnr: Float[Array, "..."],
        weights: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b *s"]:
        """The guided prediction at this log-SNR, a scalar or (b,); `weights`: the samples' own, in place of the one."""
        guided = guide(cond, uncond, jnp.where(self.inside(logsnr), self.weight if weights is None else weights, 1.0))
        if is_plain(self.rescale) and self.rescale == 0.0:
            return guided
        axes = tuple(range(1, cond.ndim))
        ratio = _deviation(cond, axes) / jnp.maximum(_deviation(guided, axes), 1e-12)
        return guided * (1.0 + _of_samples(self.rescale, guided) * (ratio - 1.0))

    def inside(self, logsnr: Float[Array, "*s"]) -> Bool[Array, "*s"]:
        """Where the weight counts; elsewhere the unconditional prediction need not be computed."""
        if self.interval is None:
            return jnp.ones(jnp.shape(logsnr), bool)
        return (logsnr >= self.interval[0]) & (logsnr <= self.interval[1])


def _of_samples(value: Number, x: Float[Array, "b *s"]) -> Array:
    """A number, or one for each sample, so that it multiplies x."""
    value = jnp.asarray(value, jnp.promote_types(x.dtype, jnp.float32))
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def _deviation(x: Float[Array, "b *s"], axes: tuple[int, ...]) -> Float[Array, "b ..."]:
    return jnp.std(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=axes, keepdims=True)
