"""Statistics and features of other programs, as a reference: how they came about, their files do not say.

mu, sigma (.npz)            pytorch-fid --save-stats, clean-fid, the reference batches of guided diffusion and EDM
feats (.npz), (n d) (.npy)  features, such as clean-fid keeps for KID
"""

import hashlib
from pathlib import Path

import numpy as np

from jaxdiff.evaluation.checks import require_features
from jaxdiff.evaluation.statistics import UNKNOWN, Moments, Origin, reason_of

FEATURES = "feats"
MEAN, COVARIANCE = "mu", "sigma"


def read(path: Path) -> tuple[Origin, Moments | np.ndarray]:
    """A mean with its covariance, or else features (n d); nothing pickled is read. In the origin everything is unknown
    but the file, the network too. FileNotFoundError, or ValueError for a file of something else, and for numbers that
    can be neither."""
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
        mean, covariance = (each.astype(np.float64) for each in arrays)
        _require_moments(mean, covariance)
        return origin, Moments(mean, covariance)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _arrays(path: Path) -> tuple[np.ndarray, ...]:
    """Features alone, or a mean and a covariance."""
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            return (opened,)
        with opened as kept:
            for wanted in ((FEATURES,), (MEAN, COVARIANCE)):
                if set(wanted) <= set(kept.files):
                    return tuple(kept[name] for name in wanted)
            has = ", ".join(kept.files) or "nothing"
    except FileNotFoundError:
        raise
    except Exception as error:  # of zipfile and numpy, in many types
        raise ValueError(f"{path}: neither statistics nor features (.npz, .npy): {reason_of(error)}") from error
    raise ValueError(f"{path}: no statistics: has {has}, but neither {MEAN} and {COVARIANCE} nor {FEATURES}")


def _require_moments(mean: np.ndarray, covariance: np.ndarray) -> None:
    """ValueError unless they can be a mean and a covariance, to the precision of float32."""
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{MEAN} of shape {mean.shape} and {COVARIANCE} of shape {covariance.shape}")
    for name, each in ((MEAN, mean), (COVARIANCE, covariance)):
        if not np.isfinite(each).all():
            raise ValueError(f"{name} has numbers that are not finite")
    slack = 1e-4 * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > slack:
        raise ValueError(f"{COVARIANCE} is not symmetric")
    if (least := np.linalg.eigvalsh(covariance)[0]) < -slack:
        raise ValueError(f"{COVARIANCE} is no covariance: it has an eigenvalue of {least:.3g}")
