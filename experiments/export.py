"""Write trained models, or public ones, in another format.

    python -m experiments.export imagen --base64 runs/base64 --sr256 runs/sr256 --out runs/cascade
    python -m experiments.export sd --weights v1-5.safetensors --lora style.safetensors --out styled.safetensors
    python -m experiments.export dalle --weights runs/dalle --out runs/dalle-folder
    python -m experiments.export unclip --weights runs/prior runs/decoder --out runs/unclip
    python -m experiments.export inception --source pt_inception-2015-12-05-6726825d.pth --out inception.safetensors

The docstrings of `experiments/exports/` describe inputs and outputs.
"""

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.cli import Command, run
from experiments.exports import dalle, imagen, inception, stable_diffusion, unclip
from experiments.options import settings_file
from experiments.options.weights import unfinished


def commands() -> dict[str, Command]:
    """One command per format."""
    formats: dict[str, tuple[Callable[[Any], None], Any]] = {
        "imagen": (imagen.main, imagen.Settings()),
        "sd": (stable_diffusion.main, stable_diffusion.Settings()),
        "dalle": (dalle.main, dalle.Settings()),
        "dvae": (dalle.convert_dvae, dalle.DVAESettings()),
        "min-dalle": (dalle.convert_min_dalle, dalle.MinDalleSettings()),
        "unclip": (unclip.main, unclip.Settings()),
        "inception": (inception.main, inception.Settings()),
    }
    return {
        name: Command(_beside_runs(main), settings, (main.__doc__ or "").strip())
        for name, (main, settings) in formats.items()
    }


def _beside_runs(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """The command; it refuses to write into a training run, and says which of the given runs are not finished."""

    def checked(settings: Any) -> None:
        if (settings.out / settings_file.NAME).is_file():
            raise ValueError(f"--out {settings.out}: a training run, choose another folder")
        given = (getattr(settings, field.name) for field in fields(settings) if field.name != "out")
        for value in given:
            places = value if isinstance(value, tuple) else (value,)
            for line in (unfinished(place) for place in places if isinstance(place, Path)):
                if line is not None:
                    print(line, file=sys.stderr)
        main(settings)

    return checked


if __name__ == "__main__":
    run(commands())
