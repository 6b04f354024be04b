"""`experiments.imagen.train` with the small presets of these tests, as a script for several processes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from small_cascade import STAGES

from experiments.cli import run
from experiments.imagen import presets, train
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.training.loop import Diverged

if __name__ == "__main__":
    presets.STAGES = {name: {"tiny": stage} for name, stage in STAGES.items()}
    presets.imagen_tiny.SAMPLING_BASE_TINY = SamplingConfig(presets.SAMPLERS["ddim"], steps=2)
    run(train.main, stopped_by=(Diverged,))
