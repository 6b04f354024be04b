"""Captions embedded before, in their encoder's place: it need not be in memory when images are sampled."""

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
    """The embeddings of some captions, each of which stands once.

    padding_is_read: as of the encoder that made them. made_by: its fingerprint, or another text that identifies it;
    where that is empty, `fingerprint` is a digest of captions and embeddings.
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
        """ValueError also for a caption that was not embedded before."""
        captions = caption_list(captions)
        rows = {caption: row for row, caption in enumerate(self.captions)}
        missing = [caption for caption in captions if caption not in rows]
        if missing:
            raise ValueError(f"no embedding of {quoted(missing[0], 200)} among those of {len(rows)} captions")
        chosen = np.array([rows[caption] for caption in captions], int)
        return jax.tree.map(lambda array: jnp.asarray(array[chosen]), self.embedding)


def embed_captions(encoder: TextEncoder, captions: Sequence[str], made_by: str | None = None) -> PrecomputedTextEncoder:
    """Embeds each caption once, and the empty one. `made_by` spares the encoder's fingerprint, for which all of its
    parameters are read."""
    distinct = tuple(dict.fromkeys(["", *caption_list(captions)]))
    # On the host, so that nothing of it stays on the encoder's devices.
    embedding = jax.tree.map(np.asarray, encoder.encode(distinct))
    made_by = encoder.fingerprint if made_by is None else made_by
    return PrecomputedTextEncoder(distinct, embedding, encoder.padding_is_read, made_by)
