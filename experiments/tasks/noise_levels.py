"""The noise levels at which a diffusion model is trained: a part of the settings of a preset."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxdiff.diffusion.losses import PowerSNR
from jaxdiff.diffusion.time_samplers import LogSNRRange, TimeSampler, UniformTimes
from jaxdiff.models.diffusion import DiffusionModel


@dataclass(frozen=True)
class NoiseLevels:
    """A range of log-SNR (None: the model's own times), the fraction of the training in it, and the power of the SNR
    that weights the x0 error (None: the model's own weighting)."""

    logsnr: tuple[float, float] | None = None
    fraction: float = 1.0
    snr_power: float | None = None

    def applied(self, model: DiffusionModel) -> DiffusionModel:
        """The model, trained at these levels. ValueError if the range is outside of its schedule."""
        changes: dict[str, Any] = {}
        if self.logsnr is not None:
            changes["time_sampler"] = self._time_sampler(model, *self.logsnr)
        if self.snr_power is not None:
            weighting = model.weighting if isinstance(model.weighting, PowerSNR) else PowerSNR()
            changes["weighting"] = dataclasses.replace(weighting, power=self.snr_power)
        return dataclasses.replace(model, **changes)

    def _time_sampler(self, model: DiffusionModel, low: float, high: float) -> LogSNRRange:
        lowest, highest = float(model.schedule.logsnr(1.0)), float(model.schedule.logsnr(0.0))
        if not (low < highest and high > lowest):
            raise ValueError(f"--logsnr {low:g} {high:g}: the schedule's lie between {lowest:.3g} and {highest:.3g}")
        rest: TimeSampler = UniformTimes() if self.fraction == 1.0 else model.time_sampler
        return LogSNRRange(low, high, self.fraction, rest)
