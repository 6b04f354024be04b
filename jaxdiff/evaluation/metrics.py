"""All metrics of sampled and true images, each with a one-line protocol.

An `Observed` holds one network's outputs for an image dataset; `metrics_of` compares two of them. A metric that cannot
be computed (too few images, no logits) is included with the reason in place of its value.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.core.files import replacing
from jaxdiff.evaluation import fid, foreign
from jaxdiff.evaluation.checks import require_features
from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.cmmd import cmmd
from jaxdiff.evaluation.features import INCEPTION
from jaxdiff.evaluation.inception_score import SPLIT_SEED, inception_score
from jaxdiff.evaluation.kid import kid
from jaxdiff.evaluation.precision_recall import precision_recall
from jaxdiff.evaluation.statistics import Gaussian, Origin, Statistics, add, empty, is_ours, load, save

BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Observed:
    """One network's outputs for an image dataset. `features` is None if only statistics were stored, `logits` is None
    for a network without classes, such as CLIP. The number of images is None for a mean and covariance of other
    programs."""

    origin: Origin
    statistics: Gaussian
    features: Float[np.ndarray, "n d"] | None = None
    logits: Float[np.ndarray, "n c"] | None = None


@dataclass(frozen=True)
class Score:
    """A value, or the reason why it is missing. protocol: one line with everything needed to compare it."""

    name: str
    value: float | None
    protocol: str
    error: float | None = None
    """The standard error; for the Inception score, by convention, the deviation over splits."""
    deviation: float | None = None
    """For KID: the deviation over subsets, which other programs publish instead of the standard error."""
    missing: str | None = None


@dataclass(frozen=True)
class MetricSettings:
    """force: allow Fréchet distances of fewer images than features; the protocol records it. kid_subsets, kid_size: of
    KID (the size is at most half of the images). neighbours: of precision and recall. splits: of the Inception score.
    split_seed: seed of its shuffle, by default torch-fidelity's; None: not shuffled.
    """

    force: bool = False
    kid_subsets: int = 100
    kid_size: int = 1000
    neighbours: int = 3
    splits: int = 10
    split_seed: int | None = SPLIT_SEED

    def __post_init__(self):
        for name, least in (("kid_subsets", 1), ("kid_size", 2), ("neighbours", 1), ("splits", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least {least}")


def observed(origin: Origin, features: np.ndarray, logits: np.ndarray | None = None) -> Observed:
    """An `Observed` with its statistics. ValueError, naming the dataset, for no images or non-finite features."""
    try:
        require_features("statistics", features)
    except ValueError as error:
        raise ValueError(f"{origin.images}, {origin.extractor}: {error}") from error
    statistics = empty(features.shape[1])
    for start in range(0, len(features), BLOCK):
        statistics = add(statistics, features[start : start + BLOCK])
    return Observed(origin, statistics, features, logits)


def keep(path: Path, reference: Observed) -> None:
    """Store a reference as .npz, with its features, if any, in a second file. ValueError for a reference of another
    program."""
    if not isinstance(reference.statistics, Statistics):
        raise ValueError(f"{reference.origin.images}: of another program, and already stored")
    beside = path.with_suffix(".features.npy")
    beside.unlink(missing_ok=True)  # from older statistics
    save(path, reference.statistics, reference.origin)
    if reference.features is not None:
        with replacing(beside) as temporary, temporary.open("wb") as file:
            np.save(file, reference.features)


def kept(path: Path) -> Observed:
    """The inverse of `keep`; statistics only, if the second file is missing. Also reads files of other programs
    (`foreign`), whose network is unknown; `seen_by` assigns one. FileNotFoundError, or ValueError for files that are
    damaged or belong to different images."""
    if not is_ours(path):
        origin, content = foreign.read(path)
        return observed(origin, content) if isinstance(content, np.ndarray) else Observed(origin, content)
    statistics, origin = load(path)
    beside = path.with_suffix(".features.npy")
    if not beside.is_file():
        return Observed(origin, statistics)
    try:
        features = np.load(beside, allow_pickle=False)
    except Exception as error:  # numpy raises several types
        raise ValueError(f"{beside}: not features of jaxdiff; compute them again, or delete the file") from error
    shape = statistics.count, len(statistics.mean)
    if features.dtype.kind != "f" or features.shape != shape or not _has_mean(features, statistics.mean):
        raise ValueError(f"{beside}: features of other images than those of {path}")
    return Observed(origin, statistics, features)


def seen_by(reference: Observed, networks: Sequence[tuple[str, int]]) -> Observed:
    """Assign a reference of another program to the network (name, width) with the same feature width; Inception is
    preferred among several. ValueError if none or several others match."""
    width = len(reference.statistics.mean)
    fitting = [name for name, features in networks if features == width]
    if len(fitting) > 1:
        fitting = [name for name in fitting if name.startswith(INCEPTION)] or fitting
    if len(fitting) != 1:
        what = ", ".join(f"{name} ({features})" for name, features in networks)
        raise ValueError(
            f"{reference.origin.images}: {width} features, which {len(fitting) or 'none'} of the networks have: {what}"
        )
    return dataclasses.replace(reference, origin=dataclasses.replace(reference.origin, extractor=fitting[0]))


ALIKE = ("extractor", "fit", "size", "resize")
"""Fields of the origins that must be equal for a comparison."""


def require_alike(sampled: Origin, true: Origin, names: Sequence[str] = ALIKE) -> None:
    """ValueError if the networks differ, or the way images were resized for them. A reference of another program is
    assumed to have been resized in the same way."""
    for name in names:
        ours, theirs = getattr(sampled, name), getattr(true, name)
        if ours != theirs and not (true.protocol_unknown and name != "extractor"):
            raise ValueError(f"{true.images}: {name} is {theirs}, and {ours} of {sampled.images}")


def metrics_of(
    sampled: Observed, true: Observed, settings: MetricSettings = MetricSettings(), seed: int = 0
) -> list[Score]:
    """All metrics of this network; `seed` selects the subsets of KID and of the limit.

    ValueError if the networks or the resizing differ.
    """
    require_alike(sampled.origin, true.origin)
    distance, limit, suffix = _names(sampled.origin.extractor)
    write = _Writer(sampled, true, settings)
    scores = [write(distance, lambda: _Value(_distance(sampled, true, settings)))]
    if sampled.features is not None:
        count, width = sampled.features.shape
        sizes = f"{fid.SIZES} sizes from {fid.smallest(count, width, settings.force)}"
        scores.append(write(limit, lambda: _Value(_limit(sampled, true, settings, seed)), sizes))
    if sampled.logits is None:
        return [*scores, write(f"CMMD{suffix}", lambda: _Value(cmmd(*_both(sampled, true))))]
    subsets = f"{settings.kid_subsets} subsets of {_size(sampled, true, settings)}"
    scores.append(write(f"KID{suffix} × 1000", lambda: _kid(sampled, true, settings, seed), subsets))
    order = "not shuffled" if settings.split_seed is None else f"shuffled by {settings.split_seed}"
    splits = f"{settings.splits} splits, {order}"
    # The logits come from the last layer, whichever layer the distance uses.
    score = "IS" if distance.startswith("FID") else f"IS{suffix}"
    scores.append(write(score, lambda: _inception_score(sampled, settings), splits))
    near = functools.cache(lambda: precision_recall(*_both(true, sampled), settings.neighbours))
    scores.append(write(f"precision{suffix}", lambda: _Value(near().precision), f"k {settings.neighbours}"))
    return [*scores, write(f"recall{suffix}", lambda: _Value(near().recall), f"k {settings.neighbours}")]


def caption_metrics(captions: Sequence[str], text: np.ndarray, sampled: Observed, prefix: str = "") -> list[Score]:
    """CLIP score of caption embeddings and image embeddings. prefix: the prefix of the embedded captions, for the
    protocol. ValueError if their numbers differ."""
    assert sampled.features is not None  # only a reference may lack features
    result = clip_score(text, sampled.features)
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()[:12]
    before = f"prefix {prefix!r}" if prefix else "no prefix"
    name, protocol = _name(sampled.origin.extractor), f"n {len(text)}, captions {digest}, {before}, {sampled.origin}"
    return [Score(f"score-{name}, w 2.5", result.score, protocol), Score(f"cosine-{name}", result.cosine, protocol)]


class _Value(NamedTuple):
    number: float
    error: float | None = None
    deviation: float | None = None


@dataclass(frozen=True)
class _Writer:
    """Makes a `Score` from a function's result or its ValueError."""

    sampled: Observed
    true: Observed
    settings: MetricSettings

    def __call__(self, name: str, value: Callable[[], _Value], how: str = "") -> Score:
        sampled, true = self.sampled, self.true
        least, width = fid.fewest(sampled.statistics, true.statistics), len(true.statistics.mean)
        known = "an unknown number" if true.statistics.count is None else str(true.statistics.count)
        details = [f"n {sampled.statistics.count} against {known}", how, str(sampled.origin)]
        if name.startswith(("FID", "FD")) and least is not None and least <= width and self.settings.force:
            details.insert(1, f"FORCED: fewer than the {width} features")
        protocol = f"{', '.join(filter(None, details))}; reference {true.origin.shown}"
        try:
            result = value()
            if not np.isfinite(result.number):
                raise ValueError(f"the result is {result.number}: the features are too large")
            return Score(name, float(result.number), protocol, result.error, result.deviation)
        except ValueError as reason:
            return Score(name, None, protocol, missing=str(reason))


def _name(extractor: str) -> str:
    """`classifier-shapes 0123…` → `shapes`."""
    return extractor.partition(" ")[0].removeprefix("classifier-")


def _names(extractor: str) -> tuple[str, str, str]:
    """Names of the distance and of its limit, and the suffix of the other names (empty for FID's features)."""
    name = _name(extractor)
    if name.startswith(INCEPTION):
        suffix = name.removeprefix(INCEPTION)
        return f"FID{suffix}", f"FID∞{suffix}", suffix
    return f"FD-{name}", f"FD-{name}, limit", f"-{name}"


def _both(a: Observed, b: Observed) -> tuple[np.ndarray, np.ndarray]:
    if a.features is None or b.features is None:
        raise ValueError("the reference keeps sums alone, no features")
    return a.features, b.features


def _distance(sampled: Observed, true: Observed, settings: MetricSettings) -> float:
    return fid.distance(sampled.statistics, true.statistics, settings.force)


def _limit(sampled: Observed, true: Observed, settings: MetricSettings, seed: int) -> float:
    assert sampled.features is not None  # see `metrics_of`
    return fid.limit(sampled.features, true.statistics, seed=seed, force=settings.force).value


def _size(sampled: Observed, true: Observed, settings: MetricSettings) -> int:
    least = fid.fewest(sampled.statistics, true.statistics)
    return settings.kid_size if least is None else min(settings.kid_size, least // 2)


def _kid(sampled: Observed, true: Observed, settings: MetricSettings, seed: int) -> _Value:
    result = kid(*_both(sampled, true), settings.kid_subsets, _size(sampled, true, settings), seed)
    error = None if result.error is None else 1000 * result.error
    return _Value(1000 * result.value, error, 1000 * result.deviation)


def _inception_score(sampled: Observed, settings: MetricSettings) -> _Value:
    assert sampled.logits is not None  # see `metrics_of`
    result = inception_score(sampled.logits, settings.splits, settings.split_seed)
    return _Value(result.value, result.deviation)


def _has_mean(features: np.ndarray, mean: np.ndarray) -> bool:
    """Whether the features have this mean up to rounding; False for non-finite features."""
    apart = np.abs(features.mean(0, dtype=np.float64) - mean).max(initial=0)
    return bool(apart <= 1e-9 * np.abs(features).max(initial=0))
