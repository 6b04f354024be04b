"""A sampler with the time steps and the start that belong to it, as people compare samplers."""

from dataclasses import replace
from typing import NamedTuple

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import PLMS, Sampler
from jaxdiff.diffusion.time_grid import Spacing


class Solver(NamedTuple):
    """scaled_start: begin with σ ε instead of unit noise ε (`models.sampling.SamplingConfig`)."""

    sampler: Sampler
    spacing: Spacing
    scaled_start: bool = False

    def of(self, prediction: Prediction) -> "Solver":
        """The solver for a model with this prediction, which PLMS extrapolates."""
        if not isinstance(self.sampler, PLMS):
            return self
        return self._replace(sampler=replace(self.sampler, extrapolated=prediction))
