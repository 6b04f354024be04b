"""Export a Stable Diffusion as a folder for diffusers or as a single file, with LoRAs merged.

    python -m experiments.export sd --weights v1-5.safetensors --out sd15/  # a folder of diffusers
    python -m experiments.export sd --weights sd15/ --lora style.safetensors=0.8 --out styled.safetensors

Needs the memory of the networks once. Steps and guidance are not part of either layout.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.options.weights import WeightsOptions
from jaxdiff.weights import pretrained
from jaxdiff.weights.stable_diffusion_export import Layout, export, is_latent_diffusion


@dataclass(frozen=True)
class Settings:
    """Weights and output."""

    out: Path = Path("runs/sd")
    """A folder, or a file named .safetensors for all networks in one."""
    overwrite: bool = False
    """Allow a file or folder that exists."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored parameters; 16-bit types halve the files."""
    pipeline: WeightsOptions = WeightsOptions()


def main(settings: Settings) -> None:
    """Export a Stable Diffusion, with LoRAs merged, as a folder for diffusers or as a single file."""
    out, single = settings.out, settings.out.suffix == ".safetensors"
    if not settings.overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise ValueError(f"--out {out}: exists; name another, or give --overwrite")
    pipeline = pretrained.load(settings.pipeline.places, settings.pipeline.options())
    if not is_latent_diffusion(pipeline):
        raise ValueError(f"--weights {' '.join(settings.pipeline.places)}: not a Stable Diffusion")
    export(pipeline, out, Layout.SINGLE_FILE if single else Layout.FOLDER, settings.dtype)
    print(
        f"{out}: {'all networks in one file' if single else 'a folder for diffusers'}, for --weights of every command"
    )
