"""Captions embedded once, in one safetensors file: what draws from it needs no text encoder."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxdiff.core import json_files
from jaxdiff.core.messages import reason
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.t5 import EmbeddedCaptions
from jaxdiff.weights import tree


def save(path: str | Path, embedded: EmbeddedCaptions) -> None:
    """Writes captions and embeddings (float32); the file appears whole or not at all (OSError)."""
    told = {"captions": json.dumps(embedded.captions), "whole": json.dumps(embedded.whole), "made_by": embedded.made_by}
    tensors = {"embeddings": np.asarray(embedded.embedding.tokens), "mask": np.asarray(embedded.embedding.mask)}
    tree.save_tree(path, tensors, {"format": "jaxdiff captions"} | told)


def load(path: str | Path) -> EmbeddedCaptions:
    """The inverse of `save`. FileNotFoundError, or ValueError in one line for any other file."""
    params, told = tree.load_tree(path)
    try:
        captions, whole = (
            json_files.parse(told[name], str(path), "captions", tree.LARGEST_HEADER) for name in ("captions", "whole")
        )
        text, mask = params["embeddings"], params["mask"]
        fits = text.ndim == 3 and mask.shape == text.shape[:2] and len(captions) == len(text)
        fits = fits and jnp.issubdtype(text.dtype, jnp.floating) and mask.dtype == bool and isinstance(captions, list)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of embedded captions ({reason(error)})") from error
    if not fits or not isinstance(whole, bool) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{path}: not a file of embedded captions")
    return EmbeddedCaptions(
        tuple(captions), TextEmbedding(text.astype(np.float32), mask), whole, told.get("made_by", "")
    )
