"""Metrics of a CLIP: text-to-image and image-to-text retrieval, and zero-shot classification."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxdiff.evaluation.checks import require_features


class Recall(NamedTuple):
    """R@k, the fraction of queries whose match is among the k nearest, by k. image: images retrieved by captions; text:
    captions retrieved by images."""

    image: dict[int, float]
    text: dict[int, float]


def retrieval(
    text: Float[np.ndarray, "n d"], image: Float[np.ndarray, "m e"], ks: Sequence[int] = (1, 5, 10), chunk: int = 1024
) -> Recall:
    """Recall of embeddings of any length; row i of both arrays is one pair. Ties count against the match. ValueError
    for no pairs, a k below 1, and embeddings that differ in width, are not finite, or have length 0."""
    if not len(text) or len(text) != len(image) or min(ks, default=0) < 1:
        raise ValueError(f"retrieval of {len(text)} captions and {len(image)} images at {tuple(ks)}")
    require_features("retrieval", text, image)
    text, image = l2_normalize(text), l2_normalize(image)
    recall_at = lambda ranks: {k: float((ranks < k).mean()) for k in ks}  # noqa: E731
    return Recall(recall_at(_ranks(text, image, chunk)), recall_at(_ranks(image, text, chunk)))


def zero_shot(image: Float[np.ndarray, "n d"], classes: Float[np.ndarray, "c t e"]) -> Int[np.ndarray, " n"]:
    """The class of each image: the nearest mean of a class's `t` normalised prompts (CLIP, 3.1.4).

    ValueError for no images, classes or prompts, and for embeddings that differ in width, are not finite, or have
    length 0.
    """
    require_features("zero-shot classes", image, classes.reshape(-1, classes.shape[-1]))
    means = l2_normalize(l2_normalize(classes).mean(1))
    return (l2_normalize(image) @ means.T).argmax(1)


def l2_normalize(x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """Normalise to length 1, in float64. ValueError for a vector of length 0."""
    x = np.asarray(x, np.float64)
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"{int((lengths == 0).sum())} embeddings of length 0, which have no direction")
    return x / lengths


def _ranks(queries: np.ndarray, answers: np.ndarray, chunk: int) -> np.ndarray:
    """The number of other answers that are at least as near as the right one."""
    ranks = []
    for start in range(0, len(queries), chunk):
        cosines = queries[start : start + chunk] @ answers.T
        own = np.take_along_axis(cosines, np.arange(start, start + len(cosines))[:, None], 1)
        ranks.append((cosines >= own).sum(1) - 1)
    return np.concatenate(ranks)
