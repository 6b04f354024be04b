"""Convert FID's Inception-v3 from the public pickle to safetensors. Needs PyTorch, once.

    python -m experiments.export inception --source pt_inception-2015-12-05-6726825d.pth --out inception.safetensors

The file is in pytorch-fid's releases (github.com/mseitzer/pytorch-fid, fid_weights). PyTorch reads it with
`weights_only=True`, which executes no code of the pickle. Cost: seconds. Result: the same numbers, 95 MB.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

from jaxdiff.core.files import usable_file
from jaxdiff.weights import inception


@dataclass(frozen=True)
class Settings:
    """Input and output."""

    source: Path = Path("pt_inception-2015-12-05-6726825d.pth")
    """The public file, or another state dict with the same names."""
    out: Path = Path("runs/inception.safetensors")
    """The safetensors file to write."""


def main(settings: Settings) -> None:
    """Convert FID's Inception-v3 from the public pickle to safetensors."""
    source, out = settings.source, settings.out
    try:
        import torch
    except ImportError:
        raise ValueError("PyTorch reads the pickle, once: pip install torch, here or on any machine") from None
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    usable_file(out)
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(source, map_location="cpu", weights_only=True)
        tensors = {str(name): tensor.numpy() for name, tensor in state.items()}
    except Exception as error:  # pickle, zipfile and torch raise many types; torch's message advises unsafe loading
        raise ValueError(f"{source}: not a state dict of tensors only; no code in it was executed") from error
    print(f"{out}: {inception.write(out, tensors, str(source)):,} parameters")
