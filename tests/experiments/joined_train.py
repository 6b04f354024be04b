"""`experiments.imagen.train` with the small presets of these tests, as a script for several processes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from small_cascade import STAGES  # noqa: E402

from experiments.cli import run  # noqa: E402
from experiments.imagen import presets, train  # noqa: E402
from jaxdiff.systems.imagen_drawing import Sampling  # noqa: E402
from jaxdiff.training.loop import Diverged  # noqa: E402

if __name__ == "__main__":
    presets.STAGES = {name: {"tiny": stage} for name, stage in STAGES.items()}
    presets.presets.SAMPLING_BASE_TINY = Sampling(presets.SAMPLERS["ddim"], steps=2)
    run(train.main, stopped_by=(Diverged,))
