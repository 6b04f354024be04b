"""All numbers that can be had of drawn pictures and true ones, each with the line that says how it came about.

An `Observed` is what one network saw in a set of pictures; `judge` compares two of them. A number that cannot be had
(too few pictures, no logits) is there all the same, with the reason in place of its value.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxdiff.data.files import replacing
from jaxdiff.evaluation import fid
from jaxdiff.evaluation.clip_score import clip_score
from jaxdiff.evaluation.cmmd import cmmd
from jaxdiff.evaluation.inception_score import inception_score
from jaxdiff.evaluation.kid import kid
from jaxdiff.evaluation.precision_recall import precision_recall
from jaxdiff.evaluation.statistics import Origin, Statistics, add, empty, load, save

BLOCK = 4096
INCEPTION = "inception-2015-12-05"


@dataclass(frozen=True, eq=False)
class Observed:
    """What one network saw in a set. `features` is None where only the sums were kept, `logits` where the network only
    embeds, as CLIP does."""

    origin: Origin
    statistics: Statistics
    features: Float[np.ndarray, "n d"] | None = None
    logits: Float[np.ndarray, "n c"] | None = None


@dataclass(frozen=True)
class Score:
    """A number, or the reason why there is none. `protocol`: one line without which it can be compared with nothing."""

    name: str
    value: float | None
    protocol: str
    error: float | None = None
    """Its standard error, or as is customary the deviation over splits."""
    missing: str | None = None


@dataclass(frozen=True)
class Settings:
    """force: Fréchet distances of fewer pictures than features, which then say so. kid_subsets, kid_size (at most; of
    what there is, half): of KID. neighbours: of precision and recall. splits: of the Inception score.
    """

    force: bool = False
    kid_subsets: int = 100
    kid_size: int = 1000
    neighbours: int = 3
    splits: int = 10

    def __post_init__(self):
        for name, least in (("kid_subsets", 1), ("kid_size", 2), ("neighbours", 1), ("splits", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least {least}")


def observed(origin: Origin, features: np.ndarray, logits: np.ndarray | None = None) -> Observed:
    statistics = empty(features.shape[1])
    for start in range(0, len(features), BLOCK):
        statistics = add(statistics, features[start : start + BLOCK])
    return Observed(origin, statistics, features, logits)


def keep(path: Path, reference: Observed) -> None:
    """As .npz, for later comparisons; the features beside it where they are known."""
    beside = path.with_suffix(".features.npy")
    beside.unlink(missing_ok=True)  # of older statistics
    save(path, reference.statistics, reference.origin)
    if reference.features is not None:
        with replacing(beside) as temporary, temporary.open("wb") as file:
            np.save(file, reference.features)


def kept(path: Path) -> Observed:
    """The inverse of `keep`; without the second file, the sums alone. FileNotFoundError, or ValueError for files that
    are damaged, or of different pictures."""
    statistics, origin = load(path)
    beside = path.with_suffix(".features.npy")
    if not beside.is_file():
        return Observed(origin, statistics)
    try:
        features = np.load(beside, allow_pickle=False)
    except Exception as error:  # of numpy, in several types
        raise ValueError(f"{beside}: no features of ours; make them anew, or delete the file") from error
    shape = statistics.count, len(statistics.total)
    if features.shape != shape or not np.allclose(features.sum(0, dtype=np.float64), statistics.total, rtol=1e-6):
        raise ValueError(f"{beside}: features of other pictures than those of {path}")
    return Observed(origin, statistics, features)


def judge(drawn: Observed, true: Observed, settings: Settings = Settings(), seed: int = 0) -> list[Score]:
    """Every number that this network gives; `seed` is that of subsets and splits.

    ValueError where the two sets were seen by different networks, or came to their size in different ways.
    """
    for name in ("extractor", "resize"):
        ours, theirs = getattr(drawn.origin, name), getattr(true.origin, name)
        if ours != theirs:
            raise ValueError(f"{true.origin.pictures}: {name} is {theirs}, and {ours} of {drawn.origin.pictures}")
    name = _name(drawn.origin.extractor)
    write = _Writer(drawn, true, settings)
    scores = [
        write(f"{'FID' if name == INCEPTION else f'FD-{name}'}", lambda: (_distance(drawn, true, settings), None))
    ]
    if drawn.features is not None:
        scores.append(
            write(
                "FID∞" if name == INCEPTION else f"FD-{name}, limit",
                lambda: _limit(drawn, true, settings, seed),
                f"{fid.SIZES} sizes from {fid.smallest(*drawn.features.shape, settings.force)}",
            )
        )
    suffix = "" if name == INCEPTION else f"-{name}"
    if drawn.logits is None:
        return [*scores, write(f"CMMD{suffix}", lambda: (cmmd(*_both(drawn, true)), None))]
    subsets = f"{settings.kid_subsets} subsets of {_size(drawn, true, settings)}"
    scores.append(write(f"KID{suffix} × 1000", lambda: _kid(drawn, true, settings, seed), subsets))
    splits = f"{settings.splits} splits"
    scores.append(write(f"IS{suffix}", lambda: _inception_score(drawn, settings, seed), splits))
    near = functools.cache(lambda: precision_recall(*_both(true, drawn), settings.neighbours))
    scores.append(write(f"precision{suffix}", lambda: (near().precision, None), f"k {settings.neighbours}"))
    return [*scores, write(f"recall{suffix}", lambda: (near().recall, None), f"k {settings.neighbours}")]


def judge_captions(captions: Sequence[str], text: np.ndarray, drawn: Observed) -> list[Score]:
    """CLIP score, of the captions' embeddings beside those of the pictures. ValueError where they are not as many."""
    found = clip_score(text, drawn.features)
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()[:12]
    name, protocol = _name(drawn.origin.extractor), f"n {len(text)}, captions {digest}, {drawn.origin}"
    return [Score(f"score-{name}, w 2.5", found.score, protocol), Score(f"cosine-{name}", found.cosine, protocol)]


@dataclass(frozen=True)
class _Writer:
    """Makes a score of what a function returns (a value and its error), or of the reason why it cannot."""

    drawn: Observed
    true: Observed
    settings: Settings

    def __call__(self, name: str, value: Callable[[], tuple[float, float | None]], how: str = "") -> Score:
        drawn, true = self.drawn, self.true
        least, width = min(drawn.statistics.count, true.statistics.count), len(true.statistics.total)
        told = [f"n {drawn.statistics.count} against {true.statistics.count}", how, str(drawn.origin)]
        if name.startswith(("FID", "FD")) and least <= width and self.settings.force:
            told.insert(1, f"FORCED: fewer than the {width} features")
        protocol = f"{', '.join(filter(None, told))}; reference {true.origin.shown}"
        try:
            number, error = value()
            return Score(name, float(number), protocol, error)
        except ValueError as reason:
            return Score(name, None, protocol, missing=str(reason))


def _name(extractor: str) -> str:
    """`classifier-shapes 0123…` → `shapes`."""
    return extractor.partition(" ")[0].removeprefix("classifier-")


def _both(a: Observed, b: Observed) -> tuple[np.ndarray, np.ndarray]:
    if a.features is None or b.features is None:
        raise ValueError("the reference keeps sums alone, no features")
    return a.features, b.features


def _distance(drawn: Observed, true: Observed, settings: Settings) -> float:
    return fid.distance(drawn.statistics, true.statistics, settings.force)


def _limit(drawn: Observed, true: Observed, settings: Settings, seed: int) -> tuple[float, None]:
    return fid.limit(drawn.features, true.statistics, seed=seed, force=settings.force).value, None


def _size(drawn: Observed, true: Observed, settings: Settings) -> int:
    return min(settings.kid_size, drawn.statistics.count // 2, true.statistics.count // 2)


def _kid(drawn: Observed, true: Observed, settings: Settings, seed: int) -> tuple[float, float | None]:
    found = kid(*_both(drawn, true), settings.kid_subsets, _size(drawn, true, settings), seed)
    return 1000 * found.value, None if found.error is None else 1000 * found.error


def _inception_score(drawn: Observed, settings: Settings, seed: int) -> tuple[float, float]:
    found = inception_score(drawn.logits, settings.splits, seed)
    return found.value, found.deviation
