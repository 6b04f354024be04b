"""CLIP score (arXiv 2104.08718, equation 1): agreement of images and captions by cosines of CLIP embeddings."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features
from jaxdiff.evaluation.retrieval import l2_normalize

WEIGHT = 2.5


class CLIPScore(NamedTuple):
    """Means over pairs: `score` = 2.5 · max(cosine, 0), and the plain cosine, which the curves of Imagen and Stable
    Diffusion show."""

    score: float
    cosine: float


def clip_score(text: Float[np.ndarray, "n d"], image: Float[np.ndarray, "m e"]) -> CLIPScore:
    """The score of embeddings of any length; row i of both arrays is one pair. ValueError for no pairs, different
    numbers of captions and images, and embeddings that differ in width, are not finite, or have length 0."""
    if not len(text):
        raise ValueError("a CLIP score of no pairs")
    if len(text) != len(image):
        raise ValueError(f"a CLIP score of {len(text)} captions and {len(image)} images")
    require_features("a CLIP score", text, image)
    cosines = (l2_normalize(text) * l2_normalize(image)).sum(1)
    return CLIPScore(float(WEIGHT * np.maximum(cosines, 0).mean()), float(cosines.mean()))
