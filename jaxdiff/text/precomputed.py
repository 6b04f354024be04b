"""Precomputed caption embeddings as a text encoder, so that the real one need not be in memory during sampling."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.messages import quoted
from jaxdiff.core.settings import canonical
from jaxdiff.core.trees import update_digest
from jaxdiff.text.encoder import TextEmbedding, TextEncoder, caption_list


@dataclass(frozen=True, eq=False)
class PrecomputedTextEncoder:
    """The embeddings of a set of distinct captions.

    padding_is_read: that of the original encoder. made_by: its fingerprint, or another text that identifies it; if
    empty, `fingerprint` is a digest of captions and embeddings.
    """

    captions: tuple[str, ...]
    embedding: TextEmbedding
    padding_is_read: bool = False
    made_by: str = ""

    @property
    def width(self) -> int:
        return self.embedding.tokens.shape[2]

    @property
    def length(self) -> int:
        return self.embedding.tokens.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        if self.made_by:
            return self.made_by
        digest = hashlib.blake2b(canonical((self.captions, self.padding_is_read)), digest_size=8)
        update_digest(digest, self.embedding)
        return digest.hexdigest()

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """As `TextEncoder.encode`. ValueError also for a caption without a precomputed embedding."""
        captions = caption_list(captions)
        rows = {caption: row for row, caption in enumerate(self.captions)}
        missing = [caption for caption in captions if caption not in rows]
        if missing:
            raise ValueError(f"no embedding of {quoted(missing[0], 200)} among those of {len(rows)} captions")
        chosen = np.array([rows[caption] for caption in captions], int)
        return jax.tree.map(lambda array: jnp.asarray(array[chosen]), self.embedding)


def embed_captions(encoder: TextEncoder, captions: Sequence[str], made_by: str | None = None) -> PrecomputedTextEncoder:
    """Embeds each distinct caption, and the empty one. made_by: avoids computing the encoder's fingerprint, which reads
    all parameters."""
    distinct = tuple(dict.fromkeys(["", *caption_list(captions)]))
    # On the host, to free the encoder's devices.
    embedding = jax.tree.map(np.asarray, encoder.encode(distinct))
    made_by = encoder.fingerprint if made_by is None else made_by
    return PrecomputedTextEncoder(distinct, embedding, encoder.padding_is_read, made_by)
