"""The text encoder of a stage and the embeddings of its captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from experiments.options.training import DataOptions
from jaxdiff.data.embeddings import Embeddings, open_embeddings, store_embeddings
from jaxdiff.data.example import Source, captions
from jaxdiff.models.diffusion import DiffusionModel
from jaxdiff.text.encoder import TextEncoder
from jaxdiff.weights.imagen import SHIPPED
from jaxdiff.weights.t5 import load_text_encoder

if TYPE_CHECKING:
    from experiments.tasks.diffusion import Preset

KNOWN = ("shapes", "rainbow")
"""Datasets whose vocabulary the shipped text encoder knows."""
CHOICES = (
    "a public T5 with --text google/flan-t5-base (width 768, 0.5 GB, Apache-2.0), "
    "one pre-trained on these captions with --text runs/t5/encoder (python -m experiments.train t5 --data {data} "
    "--out runs/t5), or embeddings stored before with --embeddings FOLDER (python -m experiments.embed --data {data} "
    "--text-encoder google/flan-t5-xxl --out FOLDER)"
)


@dataclass(frozen=True)
class TextOptions:
    """The frozen text encoder."""

    text: str | None = None
    """Directory or hub id of a text encoder in the transformers layout, of any width; the paper uses T5-XXL, 4096 wide
    (google/flan-t5-xxl). Default: the shipped one for `shapes` and `rainbow`, none with --embeddings. `none`: train
    super-resolution without text."""
    text_length: int | None = None
    """Tokens per caption; default: 24 for the tiny presets, 128 for the others, or the length of --embeddings."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and compute type of the text encoder; bfloat16 halves its memory."""
    embeddings: Path | None = None
    """A folder written by experiments.embed, instead of loading a text encoder. Default: embed the captions once and
    store them below --data-dir."""

    @property
    def source(self) -> str:
        """Location of the text encoder."""
        return self.text or str(SHIPPED / "text")


def find(
    options: TextOptions, data: DataOptions, preset: "Preset", model: DiffusionModel
) -> tuple[TextEncoder | None, Embeddings | None]:
    """The encoder, if named or needed, and the named embeddings; (None, None) for a model without text.

    ValueError if neither is named and the shipped encoder does not know the dataset's words, and for embeddings of
    another length or another encoder than requested.
    """
    if options.text_length is not None and options.text_length < 1:
        raise ValueError(f"--text-length {options.text_length}: must be at least 1")
    if model.text is None:
        return None, None
    if options.text == "none":
        if model.low_res is None:
            raise ValueError("--text none: only super-resolution can do without text")
        return None, None
    if options.embeddings is None:
        if options.text is None and not set(data.data) <= set(KNOWN):
            raise ValueError(
                f"--data {data.shown}: its captions need a text encoder, and the shipped one knows the words of "
                f"{' and '.join(KNOWN)} alone: name {CHOICES.format(data=data.shown)}"
            )
        return load_text_encoder(options.source, options.text_length or preset.reads[0], options.text_dtype), None
    embeddings = open_embeddings(options.embeddings)
    if options.text_length not in (None, embeddings.length):
        raise ValueError(
            f"{embeddings.path}: embeddings of {embeddings.length} tokens a caption, not of --text-length "
            f"{options.text_length}: store them again with that length"
        )
    if options.text is None:
        return None, embeddings
    encoder = load_text_encoder(options.text, embeddings.length, options.text_dtype, place=np.asarray)
    return encoder, open_embeddings(options.embeddings, encoder.fingerprint)


def stored(data: DataOptions, source: Source, of: int, encoder: TextEncoder, prefix: str = "") -> Embeddings:
    """The stored embeddings of the source's captions, computed if missing. prefix: of the folder's name, for splits
    other than training. of: size of the dataset, of which the source may be a subset."""
    fingerprint = encoder.fingerprint
    name = "".join(c if c.isalnum() else "-" for c in data.shown)
    limited = f"-of-{of}" if len(source) < of else ""
    path = data.data_dir / "embeddings" / f"{prefix}{name}-{len(source)}{limited}-{fingerprint}"
    if (path / "embeddings.json").is_file():
        try:
            return open_embeddings(path, fingerprint)
        except (ValueError, FileNotFoundError):  # unfinished, or a damaged part was deleted: continue
            pass
    with tqdm(total=len(source), desc="embed captions", unit="caption") as bar:
        return store_embeddings(captions(source), encoder.encode, path, encoder=fingerprint, progress=bar.update)
