"""The autoregressive prior of DALL·E 2 on disk: the run of a transformer (`weights/dalle.py`), and how its embeddings
are coded.

DIR/model/                        the transformer
DIR/checkpoints/                  of a run
DIR/embedding_codes.json          version; the embeddings; the width of the text encoder's states
DIR/embedding_codes.safetensors   the arrays of `EmbeddingCodes`
"""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core import json_files
from jaxdiff.core.files import write_json
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.models.prior_codes import EmbeddingCodes, TrainedPriorCodes
from jaxdiff.weights import dalle, runs, tree
from jaxdiff.weights.settings import VERSION, check_version, from_json, to_json

SETTINGS, ARRAYS = "embedding_codes.json", "embedding_codes.safetensors"


class Coding(NamedTuple):
    """embeddings: what is coded, at its length. text_width: of the text encoder's states."""

    codes: EmbeddingCodes
    embeddings: EmbeddingSpec
    text_width: int


def is_stored(folder: Path) -> bool:
    """Whether the folder is that of an autoregressive prior."""
    return (folder / SETTINGS).is_file()


def save_coding(coding: Coding, folder: Path) -> None:
    """Writes both files; the settings are the last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tree.saving(folder / SETTINGS):
        tree.save_tree(folder / ARRAYS, coding.codes._asdict(), {"format": "jaxdiff"})
        content = {"version": VERSION, "embeddings": to_json(coding.embeddings), "text_width": coding.text_width}
        write_json(folder / SETTINGS, content)


def load_coding(folder: Path) -> Coding:
    """ValueError for damaged files; FileNotFoundError without arrays."""
    path = folder / SETTINGS
    data = json_files.read_object(path)
    check_version(data, str(path))
    width = data.get("text_width")
    if data.keys() != {"version", "embeddings", "text_width"} or type(width) is not int or width < 1:
        raise ValueError(f"{path}: not the settings of coded embeddings")
    embeddings = from_json(data["embeddings"], str(path))
    if not isinstance(embeddings, EmbeddingSpec):
        raise ValueError(f"{path}: not the settings of coded embeddings")
    arrays, _ = tree.load_tree(folder / ARRAYS)
    if arrays.keys() != set(EmbeddingCodes._fields) or not all(
        isinstance(each, np.ndarray) and each.dtype == np.float32 and np.isfinite(each).all()
        for each in arrays.values()
    ):
        raise ValueError(f"{folder / ARRAYS}: not the arrays of coded embeddings")
    count, buckets = len(np.atleast_1d(arrays["components"])), arrays["dots"].size
    shapes = {
        "mean": (embeddings.width,),
        "components": (count, embeddings.width),
        "low": (count,),
        "high": (count,),
        "dots": (buckets,),
        "dot_low": (),
        "dot_high": (),
    }
    if wrong := [name for name, shape in shapes.items() if arrays[name].shape != shape]:
        found = ", ".join(f"{name} {arrays[name].shape}" for name in wrong)
        raise ValueError(f"{folder / ARRAYS}: {found} do not fit {count} components of {embeddings}")
    codes = EmbeddingCodes(**{name: jnp.asarray(each) for name, each in arrays.items()})
    return Coding(codes, embeddings, width)


def load(folder: Path) -> TrainedPriorCodes:
    """The prior of a run or of an exported folder. Raises FileNotFoundError or ValueError."""
    coding, transformer = load_coding(folder), dalle.load_generator(folder)
    length = transformer.model.network.text_length - len(coding.codes.components)
    try:
        return TrainedPriorCodes(transformer, coding.codes, coding.embeddings, length, coding.text_width)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def save(prior: TrainedPriorCodes, folder: Path, dtype: str = "float32") -> None:
    """The inverse of `load`."""
    dalle.save(prior.transformer, folder / runs.MODEL, dtype)
    save_coding(Coding(prior.codes, prior.embeddings, prior.text_width), folder)
