"""CLIP score (arXiv 2104.08718, equation 1): how well images fit their captions, by cosines of CLIP's embeddings."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features
from jaxdiff.evaluation.retrieval import l2_normalize

WEIGHT = 2.5


class CLIPScore(NamedTuple):
    """Means over pairs: `score` = 2.5 · max(cosine, 0), and the cosine as it is, which Imagen's and Stable Diffusion's
    curves have."""

    score: float
    cosine: float


def clip_score(text: Float[np.ndarray, "n d"], image: Float[np.ndarray, "m e"]) -> CLIPScore:
    """Of embeddings of any length, the caption and the image of a pair in the same row. ValueError without pairs, for
    captions and images that are not as many, and for embeddings of different width, not finite, or of length 0."""
    if not len(text):
        raise ValueError("a CLIP score of no pairs")
    if len(text) != len(image):
        raise ValueError(f"a CLIP score of {len(text)} captions and {len(image)} images")
    require_features("a CLIP score", text, image)
    cosines = (l2_normalize(text) * l2_normalize(image)).sum(1)
    return CLIPScore(float(WEIGHT * np.maximum(cosines, 0).mean()), float(cosines.mean()))
