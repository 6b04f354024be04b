"""Write trained models, or public ones, in another format.

    python -m experiments.export imagen --base64 runs/base64 --sr256 runs/sr256 --out runs/cascade
    python -m experiments.export sd --weights v1-5.safetensors --lora style.safetensors --out styled.safetensors
    python -m experiments.export dalle --weights runs/dalle --out runs/dalle-folder
    python -m experiments.export unclip --weights runs/prior runs/decoder --out runs/unclip
    python -m experiments.export inception --source pt_inception-2015-12-05-6726825d.pth --out inception.safetensors

The docstrings of `experiments/exports/` describe inputs and outputs.
"""

from experiments.cli import Command, run
from experiments.exports import dalle, imagen, inception, stable_diffusion, unclip


def commands() -> dict[str, Command]:
    """One command per format."""
    return {
        "imagen": Command(imagen.main, imagen.Settings(), (imagen.main.__doc__ or "").strip()),
        "sd": Command(
            stable_diffusion.main, stable_diffusion.Settings(), (stable_diffusion.main.__doc__ or "").strip()
        ),
        "dalle": Command(dalle.main, dalle.Settings(), (dalle.main.__doc__ or "").strip()),
        "dvae": Command(dalle.convert_dvae, dalle.DVAESettings(), (dalle.convert_dvae.__doc__ or "").strip()),
        "min-dalle": Command(
            dalle.convert_min_dalle, dalle.MinDalleSettings(), (dalle.convert_min_dalle.__doc__ or "").strip()
        ),
        "unclip": Command(unclip.main, unclip.Settings(), (unclip.main.__doc__ or "").strip()),
        "inception": Command(inception.main, inception.Settings(), (inception.main.__doc__ or "").strip()),
    }


if __name__ == "__main__":
    run(commands())
