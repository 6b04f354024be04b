"""Write DALL·E 2 as one folder.

    python -m experiments.export unclip --weights runs/prior runs/decoder runs/upsampler256 --out runs/unclip

The folder has CLIP's towers with the tokenizer, the prior, the decoder and the upsamplers; every command takes it as
`--weights`. Takes seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxdiff.weights import unclip


@dataclass(frozen=True)
class Settings:
    """Runs, and the folder to write."""

    weights: tuple[Path, ...] = (Path("runs/prior"), Path("runs/decoder"))
    """Runs of unclip.prior and unclip.decoder, and of upsamplers in the order of their sizes."""
    out: Path = Path("runs/unclip")
    """Folder to write."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored parameters. 16-bit types halve the files; parameters are loaded as float32."""


def main(settings: Settings) -> None:
    """Export DALL·E 2 from its runs."""
    if not unclip.is_unclip(settings.weights[0]):
        raise FileNotFoundError(f"{settings.weights[0]}: no run of unclip.prior")
    if settings.out.resolve() in [place.resolve() for place in settings.weights]:
        raise ValueError(f"--out {settings.out}: is among --weights, choose another folder")
    pipeline = unclip.load(settings.weights)
    unclip.export(pipeline, settings.out, settings.dtype)
    sides = ", ".join(map(str, pipeline.image_boxes))
    print(f"{settings.out}: a DALL·E 2 that samples {sides} pixels, for --weights of every command")
