"""The Inception score (arXiv 1606.03498, section 4): are pictures of something, and of many things?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class InceptionScore(NamedTuple):
    """The mean over splits and its standard deviation, as it is published."""

    value: float
    deviation: float


def inception_score(logits: Float[np.ndarray, "n c"], splits: int = 10, seed: int = 0) -> InceptionScore:
    """exp of the mean KL divergence of the classes of a picture from those of its split; from 1 to the classes' number.

    Pictures are shuffled with `seed` first: split as they were drawn, each part may hold other captions. ValueError for
    fewer pictures than splits.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"an Inception score of {splits} splits, but there are {len(logits)} pictures")
    logits = logits.astype(np.float64)[np.random.default_rng(seed).permutation(len(logits))]
    logs = logits - logits.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    values = []
    for part in np.array_split(logs, splits):
        classes = np.exp(part)
        values.append(np.exp((classes * (part - np.log(classes.mean(0)))).sum(1).mean()))
    return InceptionScore(float(np.mean(values)), float(np.std(values)))
