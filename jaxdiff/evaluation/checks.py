"""Checks common to all metrics: features must be rows of finite numbers, of one network."""

import numpy as np


def require_features(metric: str, *arrays: np.ndarray) -> None:
    """ValueError, with the metric's name, unless each array is (n d), not empty and finite, and all widths are
    equal."""
    for features in arrays:
        if features.ndim != 2 or not features.shape[1]:
            raise ValueError(f"{metric} of features of shape {features.shape}: rows of numbers are wanted")
        if not len(features):
            raise ValueError(f"{metric} of no images")
        finite = np.isfinite(features).all(1)
        if not finite.all():
            count, first = int((~finite).sum()), int(np.argmin(finite))
            raise ValueError(f"{metric} of features that are not finite: {count} rows, the first is row {first}")
    widths = sorted({features.shape[1] for features in arrays})
    if len(widths) > 1:
        raise ValueError(f"{metric} of features of width {' and '.join(map(str, widths))}: of different networks")
