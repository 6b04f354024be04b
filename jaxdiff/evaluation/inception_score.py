"""The Inception score (arXiv 1606.03498, section 4): are images of something, and of many things?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.checks import require_features

SPLIT_SEED = 2020
"""torch-fidelity's."""


class InceptionScore(NamedTuple):
    """The mean over splits and its standard deviation, as it is published."""

    value: float
    deviation: float


def inception_score(
    logits: Float[np.ndarray, "n c"], splits: int = 10, seed: int | None = SPLIT_SEED
) -> InceptionScore:
    """exp of the mean KL divergence of the classes of an image from those of its split; from 1 to the classes' number.

    Splits are torch-fidelity's: images are shuffled by numpy's RandomState(seed), its own seed being 2020, and split
    i of s holds those from i n // s to (i + 1) n // s. None: in the order that they have, as the first programs did;
    each split may then hold other captions. ValueError for fewer images than splits.
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
        # Where no image of the split has a class to rounding, nothing is added: 0 · log 0.
        mean = np.log(np.maximum(classes.mean(0), np.finfo(np.float64).tiny))
        values.append(np.exp((classes * (part - mean)).sum(1).mean()))
    return InceptionScore(float(np.mean(values)), float(np.std(values)))
