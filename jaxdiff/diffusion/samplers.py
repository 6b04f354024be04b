"""Samplers: integrate from noise to image along a time grid.

A sampler is a frozen dataclass with functions of its carry, which holds only the current state, no trajectory:

    carry = sampler.init(x)                                    # x ~ N(0, 1), the noise at t = 1
    carry = integrate(sampler, denoise, carry, grid, keys, start, stop)
    image = sampler.image(carry)                               # sampler.replace(carry, image) sets another image

`denoise(x, point)` is the network with guidance and thresholding: it maps x (b, …) and the grid point at which x is
noised (scalars) to x₀ and ε. Below, x = α x₀ + σ ε, λ is the log-SNR, i the current point of the grid and n = i + 1 the
next. All samplers but DDIM and PLMS use only x₀. After thresholding x₀, ε is either re-derived from it
(`parameterization.from_x0`, which makes DDIM consistent with the others) or remains the network's (as in diffusers'
DDIM).

The grid ends at the schedule's last, clipped log-SNR, where σ is 5e-5 of the image's range by default (0.002 with EDM),
or at a table's first entry; the state there is the image. State and coefficients are float32 (float64 if x is),
whatever the network's compute type.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdiff.diffusion import noise
from jaxdiff.diffusion.parameterization import Denoised, DenoisedWithVariance, Prediction, denoised, target
from jaxdiff.diffusion.time_grid import TimeGrid

Denoise = Callable[[Float[Array, "b *s"], TimeGrid], Denoised | DenoisedWithVariance]
Carry = Any
Index = Int[Array, ""] | int


@runtime_checkable
class Sampler(Protocol):
    """The interface of samplers."""

    def init(self, x: Float[Array, "b *s"]) -> Carry: ...

    def step(self, i: Index, carry: Carry, denoise: Denoise, grid: TimeGrid, keys: Key[Array, " b"]) -> Carry: ...

    def image(self, carry: Carry) -> Float[Array, "b *s"]: ...

    def replace(self, carry: Carry, x: Float[Array, "b *s"]) -> Carry: ...

    def evaluations(self, steps: int) -> int:
        """Network evaluations for `steps` steps."""
        ...


def integrate(
    sampler: Sampler,
    denoise: Denoise,
    carry: Carry,
    grid: TimeGrid,
    keys: Key[Array, " b"],
    start: Index,
    stop: Index,
    keep: Callable[[Float[Array, "b *s"], TimeGrid], Float[Array, "b *s"]] | None = None,
) -> Carry:
    """Run steps start … stop−1 of the grid's k. Both may be traced, so that chunks of a run reuse one compiled program;
    the result does not depend on the chunks. keys (b,): one per sample; each step folds in its number. keep(x, point):
    restores the known part of the image (inpainting) after each step, at the grid point where the step ends, and in the
    states within a step that the network sees."""

    step = partial(sampler.step, denoise=denoise, grid=grid, keys=keys)
    if keep is None:
        return jax.lax.fori_loop(start, stop, step, carry)

    def step_and_keep(i: Index, state: Carry) -> Carry:
        def denoise_kept(x: Array, point: TimeGrid) -> Denoised | DenoisedWithVariance:
            return denoise(jnp.where(point.t == grid.t[i], x, keep(x, point)), point)

        state = step(i, state, denoise=denoise_kept)
        return sampler.replace(state, keep(sampler.image(state), _at(grid, i + 1)))

    return jax.lax.fori_loop(start, stop, step_and_keep, carry)


class _SingleStep:
    """Base of samplers whose carry is x and that evaluate the network once per step."""

    def init(self, x: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def image(self, carry: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        return carry

    def replace(self, carry: Float[Array, "b *s"], x: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
        return x.astype(carry.dtype)

    def evaluations(self, steps: int) -> int:
        return steps


@dataclasses.dataclass(frozen=True)
class DDPM(_SingleStep):
    """Ancestral sampling with Imagen's interpolated variance.

    x_n = (α_i/α_n)(σ_n²/σ_i²) x + c α_n x₀ + s z, c = 1 − e^(λ_i − λ_n), z ~ N(0, 1),
    s² = (c σ_n²)^(1−γ) (c σ_i²)^γ: γ = 0 is the lower bound (the posterior of a known x₀), γ = 1 the upper bound. None
    uses the network's learned γ, one per value (arXiv 2102.09672, Eq. 15). The last step adds no noise.
    """

    gamma: float | None = 0.0

    def __post_init__(self):
        if self.gamma is not None and not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"DDPM's gamma must lie in [0, 1], not {self.gamma}")

    def step(
        self, i: Index, carry: Float[Array, "b *s"], denoise: Denoise, grid: TimeGrid, keys: Key[Array, " b"]
    ) -> Float[Array, "b *s"]:
        x, here, there = carry, _at(grid, i), _at(grid, i + 1)
        estimate = _cast(denoise(x, here), x)
        gamma: float | Array
        if self.gamma is not None:
            gamma = self.gamma
        elif isinstance(estimate, DenoisedWithVariance):
            gamma = estimate.gamma
        else:
            raise ValueError("DDPM without a gamma needs a network that predicts the variance")
        kept = (here.alpha / there.alpha) * (there.sigma / here.sigma) ** 2
        mean = kept * x + _new_noise(here, there) * there.alpha * estimate.x0
        deviation = jnp.where(i + 1 < _steps(grid), ancestral_deviation(here, there, gamma), 0.0)
        return mean + deviation * noise.normal_like(noise.fold(keys, i), x.shape[1:], x.dtype)


@dataclasses.dataclass(frozen=True)
class DDIM(_SingleStep):
    """DDIM (arXiv 2010.02502, Eq. 12): x_n = α_n x₀ + √(σ_n² − s²) ε + s z, s² = η² c σ_n², c = 1 − e^(λ_i − λ_n).

    η = 0 is deterministic, η = 1 as random as DDPM at its lower bound. η = 1 is also ancestral Euler (k-diffusion's and
    diffusers' "Euler a"): with u = σ/α its noise in x/α has the variance u_n² (u_i² − u_n²)/u_i² = c σ_n²/α_n².
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"DDIM's eta must lie in [0, 1], not {self.eta}")

    def step(
        self, i: Index, carry: Float[Array, "b *s"], denoise: Denoise, grid: TimeGrid, keys: Key[Array, " b"]
    ) -> Float[Array, "b *s"]:
        x, here, there = carry, _at(grid, i), _at(grid, i + 1)
        estimate = _cast(denoise(x, here), x)
        x0, eps = estimate.x0, estimate.eps
        if self.eta == 0.0:
            return there.alpha * x0 + there.sigma * eps
        random = self.eta**2 * _new_noise(here, there)
        z = noise.normal_like(noise.fold(keys, i), x.shape[1:], x.dtype)
        return there.alpha * x0 + there.sigma * (jnp.sqrt(1.0 - random) * eps + jnp.sqrt(random) * z)


@dataclasses.dataclass(frozen=True)
class Euler(_SingleStep):
    """Euler's rule for the probability-flow ODE in x/α over σ/α (EDM's Algorithm 1 without its correction).

    x_n = (σ_n/σ_i) x + (α_n − σ_n α_i/σ_i) x₀: DDIM(η = 0) with the ε that x and x₀ imply.
    """

    def step(
        self, i: Index, carry: Float[Array, "b *s"], denoise: Denoise, grid: TimeGrid, keys: Key[Array, " b"]
    ) -> Float[Array, "b *s"]:
        here, there = _at(grid, i), _at(grid, i + 1)
        return _first_order(carry, _cast(denoise(carry, here), carry).x0, here, there)


@dataclasses.dataclass(frozen=True)
class Heun(_SingleStep):
    """Second order, two evaluations per step: an Euler step x', then a correction with x₀ at x'.

    x_n = x' + α_n q (x₀(x', t_n) − x₀(x, t_i)), where with ρ = (σ_n/α_n)/(σ_i/α_i) < 1
    in_sigma=False: q = (1 − ρ)/2, the trapezoid rule for x₀, with the ODE's linear part exact; stable on any grid.
    in_sigma=True:  q = (1/ρ − 1)/2, the trapezoid rule in σ/α (EDM, arXiv 2206.00364, Algorithm 1; diffusers' Heun). It
                    overshoots if σ/α falls by a large factor, so use `Karras` spacing.
    The last step, to the clean end, is an Euler step.
    """

    in_sigma: bool = False

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1

    def step(
        self, i: Index, carry: Float[Array, "b *s"], denoise: Denoise, grid: TimeGrid, keys: Key[Array, " b"]
    ) -> Float[Array, "b *s"]:
        here, there = _at(grid, i), _at(grid, i + 1)
        ratio = (there.sigma / there.alpha) / (here.sigma / here.alpha)
        q = 0.5 * (1.0 / jnp.where(ratio > 0.0, ratio, 1.0) - 1.0) if self.in_sigma else 0.5 * (1.0 - ratio)

        def stage(j, state):
            x, before = state
            x0 = _cast(denoise(x, _at(grid, i + j)), x).x0
            corrected = x + there.alpha * q * (x0 - before)
            return jnp.where(j == 0, _first_order(x, x0, here, there), corrected), x0

        # A loop over one or two stages, so that the network is compiled only once.
        stages = jnp.where(i + 1 < _steps(grid), 2, 1)
        return jax.lax.fori_loop(0, stages, stage, (carry, jnp.zeros_like(carry)))[0]


class Multistep(NamedTuple):
    """The state of a two-step method."""

    x: Float[Array, "b *s"]
    x0: Float[Array, "b *s"]  # of the previous step
    ready: Bool[Array, ""]  # whether there was a previous step


@dataclasses.dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2): second order with one evaluation per step.

    x_n = (σ_n/σ_i) x + α_n (1 − e^(−h)) D, h = (λ_n − λ_i)/2, D = x₀ + (h/2h')(x₀ − x₀'), where a prime marks the
    previous step. The first step uses D = x₀. So does the last, whose h to the clean end is too long to extrapolate,
    unless `lower_order_final` is False (for grids that end at a moderate σ).
    """

    lower_order_final: bool = True

    def init(self, x: Float[Array, "b *s"]) -> Multistep:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return Multistep(x, jnp.zeros_like(x), jnp.asarray(False))

    def image(self, carry: Multistep) -> Float[Array, "b *s"]:
        return carry.x

    def replace(self, carry: Multistep, x: Float[Array, "b *s"]) -> Multistep:
        return carry._replace(x=x.astype(carry.x.dtype))

    def evaluations(self, steps: int) -> int:
        return steps

    def step(self, i: Index, carry: Multistep, denoise: Denoise, grid: TimeGrid, keys: Key[Array, " b"]) -> Multistep:
        before, here, there = _at(grid, jnp.maximum(i - 1, 0)), _at(grid, i), _at(grid, i + 1)
        x0 = _cast(denoise(carry.x, here), carry.x).x0
        # Two points beyond the clip have the same log-SNR, so the slope is undefined.
        moved = here.logsnr > before.logsnr
        extrapolate = carry.ready & moved & (i > 0) & ((i + 1 < _steps(grid)) | (not self.lower_order_final))
        slope = 0.5 * (there.logsnr - here.logsnr) / jnp.where(extrapolate, here.logsnr - before.logsnr, 1.0)
        slope = jnp.where(extrapolate, slope, 0.0)
        return Multistep(_first_order(carry.x, x0 + slope * (x0 - carry.x0), here, there), x0, jnp.asarray(True))


class History(NamedTuple):
    """The state of `PLMS`."""

    x: Float[Array, "b *s"]
    outputs: tuple[Float[Array, "b *s"], ...]  # of the previous three steps, latest first
    filled: Int[Array, ""]  # number of them, up to 3


_ADAMS_BASHFORTH = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24
"""Weights of the outputs, latest first, by the number of previous ones."""


@dataclasses.dataclass(frozen=True)
class PLMS:
    """Pseudo linear multistep (PNDM, arXiv 2202.09778, Eq. 9 and 12, without its Runge–Kutta steps): DDIM's step with
    an ε extrapolated from four evaluations by Adams–Bashforth, whose weights are those of equal steps.

    The first step, also of a run that begins in the middle, evaluates the network at both of its ends and uses the
    mean; the next two extrapolate from two and three evaluations. A step that is both first and last is DDIM's.
    For tables of moderate noise, as Stable Diffusion's: unstable if σ/α falls by large factors (`UniformTime`).
    extrapolated: the quantity to extrapolate. diffusers extrapolates the network's output, so its v-prediction is
    `Prediction.V`, which is of first order only: a combination of v of several times is converted to ε at one.

    In diffusers' image-to-image pipelines the second evaluation skips an entry, so that the state is one entry noisier
    than the network's time in all later steps. Here it does not.
    """

    extrapolated: Prediction = Prediction.EPSILON

    def init(self, x: Float[Array, "b *s"]) -> History:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return History(x, tuple(jnp.zeros_like(x) for _ in range(3)), jnp.asarray(0))

    def image(self, carry: History) -> Float[Array, "b *s"]:
        return carry.x

    def replace(self, carry: History, x: Float[Array, "b *s"]) -> History:
        return carry._replace(x=x.astype(carry.x.dtype))

    def evaluations(self, steps: int) -> int:
        return steps + (steps > 1)

    def step(self, i: Index, carry: History, denoise: Denoise, grid: TimeGrid, keys: Key[Array, " b"]) -> History:
        here, there = _at(grid, i), _at(grid, i + 1)
        weights = jnp.asarray(_ADAMS_BASHFORTH, carry.x.dtype)[carry.filled]

        def stage(j, state):
            x, first = state
            point = _at(grid, i + j)
            estimate = _cast(denoise(x, point), x)
            output = target(self.extrapolated, estimate.x0, estimate.eps, point.alpha, point.sigma)
            extrapolated = sum(weight * each for weight, each in zip(weights, (output, *carry.outputs)))
            combined = jnp.where(j == 0, extrapolated, 0.5 * (first + output))
            eps = denoised(self.extrapolated, combined, carry.x, here.alpha, here.sigma).eps
            ratio = there.alpha / here.alpha
            return ratio * carry.x + (there.sigma - ratio * here.sigma) * eps, jnp.where(j == 0, output, first)

        # A loop over one or two stages, so that the network is compiled only once.
        stages = jnp.where((carry.filled == 0) & (i + 1 < _steps(grid)), 2, 1)
        x, output = jax.lax.fori_loop(0, stages, stage, (carry.x, jnp.zeros_like(carry.x)))
        return History(x, (output, *carry.outputs[:-1]), jnp.minimum(carry.filled + 1, 3))


def ancestral_deviation(here: TimeGrid, there: TimeGrid, gamma: float | Float[Array, "b *s"]) -> Float[Array, "..."]:
    """The standard deviation s of DDPM's noise for the step between two points of a grid."""
    return jnp.sqrt(_new_noise(here, there)) * there.sigma ** (1.0 - gamma) * here.sigma**gamma


def _first_order(
    x: Float[Array, "b *s"], x0: Float[Array, "b *s"], here: TimeGrid, there: TimeGrid
) -> Float[Array, "b *s"]:
    """The exact solution of the probability-flow ODE for a constant x₀."""
    step = -jnp.expm1(-0.5 * (there.logsnr - here.logsnr))
    return (there.sigma / here.sigma) * x + there.alpha * step * x0


def _new_noise(here: TimeGrid, there: TimeGrid) -> Float[Array, "..."]:
    """c = 1 − e^(λ_i − λ_n): the fraction of the noise variance at i that is absent at n."""
    return -jnp.expm1(here.logsnr - there.logsnr)


def _cast(estimate: Denoised | DenoisedWithVariance, x: Float[Array, "b *s"]) -> Denoised | DenoisedWithVariance:
    return jax.tree.map(lambda a: a.astype(x.dtype), estimate)


def _at(grid: TimeGrid, i: Index) -> TimeGrid:
    return TimeGrid(*(values[i] for values in grid))


def _steps(grid: TimeGrid) -> int:
    return grid.t.shape[0] - 1
