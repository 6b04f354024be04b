"""Classifier-free guidance, in Imagen's convention: ε̃ = w ε(z, c) + (1 − w) ε(z).

w = 1 is off (exactly the conditional prediction), w = 0 exactly the unconditional one, w > 1 guides. Code that writes
(1 + w) ε(z, c) − w ε(z), or where 0 means off, has a w smaller by one. The rule is affine, so it may be applied to ε,
x₀, v or velocity alike; only `rescale` depends on which. Both branches are one doubled batch, which the caller makes.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_LARGEST = float(jnp.finfo(jnp.float32).max) / 2  # w and 1 − w are float32


def guide(
    cond: Float[Array, "b *s"], uncond: Float[Array, "b *s"], weight: Float[Array, "..."] | float
) -> Float[Array, "b *s"]:
    """w cond + (1 − w) uncond, with w a number or one for each sample (b,)."""
    weight = jnp.asarray(weight, jnp.promote_types(cond.dtype, jnp.float32))
    weight = weight.reshape(weight.shape + (1,) * (cond.ndim - weight.ndim)) if weight.ndim else weight
    return weight * cond + (1.0 - weight) * uncond


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly, and where, the text guides.

    weight    w above; 1 is off.
    interval  (low, high) in log-SNR: outside it w is 1 (arXiv 2404.07724, whose noise level s is λ = −2 log s).
              None: everywhere.
    rescale   φ in [0, 1] (arXiv 2305.08891, Eq. 15–16): the guided prediction, scaled to the standard deviation that
              the conditional one has over the sample's own axes, is mixed in with φ. 0 is off.
    """

    weight: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def __post_init__(self):
        if not abs(self.weight) <= _LARGEST:
            raise ValueError(f"the guidance weight must be finite, not {self.weight}")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"the guidance interval is (low, high) in log-SNR with low <= high, not {self.interval}")
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"the guidance rescale must lie in [0, 1], not {self.rescale}")

    @property
    def on(self) -> bool:
        """False where the conditional prediction alone will do, so that the caller needs no doubled batch."""
        return self.weight != 1.0

    def apply(
        self,
        cond: Float[Array, "b *s"],
        uncond: Float[Array, "b *s"],
        logsnr: Float[Array, "..."],
        weights: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b *s"]:
        """The guided prediction at this log-SNR, a scalar or (b,); `weights`: the samples' own, in place of the one."""
        guided = guide(cond, uncond, jnp.where(self.inside(logsnr), self.weight if weights is None else weights, 1.0))
        if self.rescale == 0.0:
            return guided
        axes = tuple(range(1, cond.ndim))
        ratio = _deviation(cond, axes) / jnp.maximum(_deviation(guided, axes), 1e-12)
        return guided * (1.0 + self.rescale * (ratio - 1.0))

    def inside(self, logsnr: Float[Array, "*s"]) -> Bool[Array, "*s"]:
        """Where the weight counts; elsewhere the unconditional prediction need not be computed."""
        if self.interval is None:
            return jnp.ones(jnp.shape(logsnr), bool)
        return (logsnr >= self.interval[0]) & (logsnr <= self.interval[1])


def _deviation(x: Float[Array, "b *s"], axes: tuple[int, ...]) -> Float[Array, "b ..."]:
    return jnp.std(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=axes, keepdims=True)
