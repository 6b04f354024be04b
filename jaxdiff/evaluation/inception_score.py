"""The Inception score (arXiv 1606.03498, section 4): class confidence per image and class diversity."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features

SPLIT_SEED = 2020
"""The default of torch-fidelity."""


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits, the form that is published."""

    value: float
    deviation: float


def inception_score(
    logits: Float[np.ndarray, "n c"], splits: int = 10, seed: int | None = SPLIT_SEED
) -> InceptionScore:
    """exp of the mean KL divergence of an image's class distribution from that of its split; from 1 to the number of
    classes.

    Splits follow torch-fidelity: images are shuffled by numpy's RandomState(seed), whose default is 2020, and split i
    of s holds images i n // s to (i + 1) n // s. seed None: not shuffled, as in the first programs; splits may then
    differ in their captions. ValueError for fewer images than splits.
    """
    require_features("an Inception score", logits)
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"an Inception score of {splits} splits, but there are {count} images")
    logits = logits.astype(np.float64)
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(count)]
    logs = logits - logits.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    values = []
    for i in range(splits):
        part = logs[i * count // splits : (i + 1) * count // splits]
        classes = np.exp(part)
        # A class with probability 0 in the whole split contributes nothing: 0 · log 0.
        mean = np.log(np.maximum(classes.mean(0), np.finfo(np.float64).tiny))
        values.append(np.exp((classes * (part - mean)).sum(1).mean()))
    return InceptionScore(float(np.mean(values)), float(np.std(values)))
