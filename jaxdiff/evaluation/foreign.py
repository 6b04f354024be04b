"""Reference statistics and features of other programs, whose files do not record the protocol.

mu, sigma (.npz)            pytorch-fid --save-stats, clean-fid, the reference batches of guided diffusion and EDM
feats (.npz), (n d) (.npy)  features, such as clean-fid stores for KID
"""

import hashlib
from pathlib import Path

import numpy as np

from jaxdiff.core.messages import plain, reason
from jaxdiff.evaluation.checks import require_features
from jaxdiff.evaluation.statistics import UNKNOWN, Moments, Origin, checked_moments

FEATURES = "feats"
MEAN, COVARIANCE = "mu", "sigma"


def read(path: Path) -> tuple[Origin, Moments | np.ndarray]:
    """A mean with its covariance, or features (n d); pickles are not read. The origin records the file only; the
    network and the protocol are unknown. FileNotFoundError, or ValueError for other files and invalid numbers."""
    arrays = _arrays(path)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays)).hexdigest()[:12]
    origin = Origin(str(path), digest, UNKNOWN, UNKNOWN, path.suffix.lower().lstrip("."), fit=UNKNOWN)
    try:
        for each in arrays:
            if each.dtype.kind not in "fiu":
                raise ValueError(f"numbers of type {each.dtype}")
        if len(arrays) == 1:
            require_features("statistics", arrays[0])
            return origin, arrays[0]
        mean, covariance = arrays
        return origin, Moments(*checked_moments(mean, covariance, (MEAN, COVARIANCE)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _arrays(path: Path) -> tuple[np.ndarray, ...]:
    """(features,), or (mean, covariance)."""
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            return (opened,)
        with opened as kept:
            for wanted in ((FEATURES,), (MEAN, COVARIANCE)):
                if set(wanted) <= set(kept.files):
                    return tuple(kept[name] for name in wanted)
            has = ", ".join(plain(name) for name in kept.files[:8]) or "nothing"
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and numpy raise many types
        raise ValueError(f"{path}: neither statistics nor features (.npz, .npy): {reason(error)}") from error
    raise ValueError(f"{path}: no statistics: has {has}, but neither {MEAN} and {COVARIANCE} nor {FEATURES}")
