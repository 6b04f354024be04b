"""Write DALL·E 1 as one folder, and convert OpenAI's published dVAE and min-dalle's files.

    python -m experiments.export dalle --weights runs/dalle --out runs/dalle-folder
    python -m experiments.export dvae --encoder encoder.pkl --decoder decoder.pkl --out runs/openai-dvae
    python -m experiments.export min-dalle --encoder encoder.pt --decoder decoder.pt --out runs/dalle-mega

The folder of `dalle` has the transformer, its tokenizer and the decoder of its codes; every command takes it as
`--weights`. OpenAI's two files are pickles (cdn.openai.com/dall-e); they are read without PyTorch, and nothing in them
is executed. `--codes runs/openai-dvae` of `experiments.train dalle.transformer` uses the result. Both take seconds.

min-dalle's files become a folder in dalle-mini's layout, for `--weights` of `experiments.sample`; its VQGAN, the
published one, is `--vae` there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxdiff.weights import dalle, dalle_mini, dvae, min_dalle


@dataclass(frozen=True)
class Settings:
    """A run, and the folder to write."""

    weights: Path = Path("runs/dalle")
    """Run of dalle.transformer, or a folder written by this command."""
    out: Path = Path("runs/dalle-folder")
    """Folder to write."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored parameters. 16-bit types halve the files; parameters are loaded as float32."""


def main(settings: Settings) -> None:
    """Export DALL·E 1 from a run."""
    if not dalle.is_run(settings.weights):
        raise FileNotFoundError(f"{settings.weights}: no run of dalle.transformer")
    if settings.out.resolve() == settings.weights.resolve():
        raise ValueError(f"--out {settings.out}: is --weights, choose another folder")
    dalle.export(dalle.load(settings.weights), settings.out, settings.dtype)
    print(f"{settings.out}: DALL·E 1, for --weights of every command")


@dataclass(frozen=True)
class DVAESettings:
    """OpenAI's files, and the folder to write."""

    encoder: Path = Path("encoder.pkl")
    """The pickled encoder."""
    decoder: Path = Path("decoder.pkl")
    """The pickled decoder."""
    out: Path = Path("runs/openai-dvae")
    """Folder to write."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored parameters."""


def convert_dvae(settings: DVAESettings) -> None:
    """Convert OpenAI's published dVAE from its two pickles."""
    converted = dvae.from_openai(settings.encoder, settings.decoder)
    dvae.save(converted, settings.out, settings.dtype)
    print(f"{settings.out}: a dVAE of stride {converted.factor} with {converted.config.codes} codes")


@dataclass(frozen=True)
class MinDalleSettings:
    """min-dalle's files, and the folder to write."""

    encoder: Path = Path("encoder.pt")
    """The encoder's tensors."""
    decoder: Path = Path("decoder.pt")
    """The decoder's tensors."""
    vocab: Path = Path("vocab.json")
    """The tokens with their numbers."""
    merges: Path = Path("merges.txt")
    """The pairs of tokens, the most frequent first."""
    out: Path = Path("runs/dalle-mega")
    """Folder to write."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored parameters."""


def convert_min_dalle(settings: MinDalleSettings) -> None:
    """Convert min-dalle's transformer to dalle-mini's layout."""
    network, params = min_dalle.load(settings.encoder, settings.decoder)
    text = min_dalle.load_text(settings.vocab, settings.merges, network)
    dalle_mini.save(settings.out, network, params, text, settings.dtype)
    print(f"{settings.out}: a transformer of width {network.width}; sample with --weights {settings.out} --vae VQGAN")
