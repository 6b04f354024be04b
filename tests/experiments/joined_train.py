"""`experiments.train` with the small presets of these tests, as a script for several processes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from small_cascade import STAGES, WIDTH

from experiments import train
from experiments.cli import run
from experiments.options import names
from experiments.table import TASKS
from experiments.tasks.diffusion import Preset
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.training.loop import Diverged

if __name__ == "__main__":
    sampling = SamplingConfig(names.SAMPLERS["ddim"], steps=2)
    for name, stage in STAGES.items():
        TASKS[f"imagen.{name}"].presets["tiny"] = Preset(stage, sampling, (24, WIDTH))
    run(train.commands(), stopped_by=(Diverged,))
