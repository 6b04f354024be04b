"""Precomputed caption embeddings in one safetensors file; sampling from it needs no text encoder."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core import json_files
from jaxdiff.core.messages import reason
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.precomputed import PrecomputedTextEncoder
from jaxdiff.weights import tree


def save(path: str | Path, embedded: PrecomputedTextEncoder) -> None:
    """Writes captions and embeddings (float32) atomically. OSError if writing fails."""
    metadata = {"captions": json.dumps(embedded.captions), "made_by": embedded.made_by}
    metadata |= {"whole": json.dumps(embedded.padding_is_read)}  # the older name of `padding_is_read`
    arrays = zip(("embeddings", "mask", "pooled", "ids"), embedded.embedding)
    tensors = {name: np.asarray(array) for name, array in arrays if array is not None}
    tree.save_tree(path, tensors, {"format": "jaxdiff captions"} | metadata)


def load(path: str | Path) -> PrecomputedTextEncoder:
    """The inverse of `save`. Raises FileNotFoundError, or ValueError if it is not such a file."""
    params, metadata = tree.load_tree(path)
    try:
        captions, padding_is_read = (
            json_files.parse(metadata[name], str(path), "captions", tree.LARGEST_HEADER)
            for name in ("captions", "whole")
        )
        embedding = TextEmbedding(params["embeddings"], params["mask"], params.get("pooled"), params.get("ids"))
        fits = _fits(embedding) and isinstance(captions, list) and len(captions) == len(embedding.tokens)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of embedded captions ({reason(error)})") from error
    if not fits or not isinstance(padding_is_read, bool) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{path}: not a file of embedded captions")
    embedding = jax.tree.map(lambda a: a.astype(np.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, embedding)
    return PrecomputedTextEncoder(tuple(captions), embedding, padding_is_read, metadata.get("made_by", ""))


def _fits(embedding: TextEmbedding) -> bool:
    tokens, mask, pooled, ids = embedding
    fits = tokens.ndim == 3 and jnp.issubdtype(tokens.dtype, jnp.floating)
    fits = fits and mask.shape == tokens.shape[:2] and mask.dtype == bool
    if pooled is not None:
        fits = fits and pooled.ndim == 2 and len(pooled) == len(tokens) and jnp.issubdtype(pooled.dtype, jnp.floating)
    if ids is not None:
        fits = fits and ids.shape == mask.shape and jnp.issubdtype(ids.dtype, jnp.integer)
    return fits
