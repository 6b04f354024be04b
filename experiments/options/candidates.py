"""Candidates: several samples for each image, of which CLIP keeps the best (DALL·E 1, arXiv 2102.12092, 2.6)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxdiff.data.images import to_uint8
from jaxdiff.evaluation import features
from jaxdiff.evaluation.retrieval import l2_normalize
from jaxdiff.systems.pipeline import Batch
from jaxdiff.weights import clip
from jaxdiff.weights.imagen import SHIPPED

Score = Callable[[Sequence[str], np.ndarray], np.ndarray]
"""The agreement (n) of prompts with images (n h w 3) in [-1, 1]."""


@dataclass(frozen=True)
class CandidateOptions:
    """Several samples for each image, ranked by CLIP."""

    candidates: int = 1
    """Samples for each image, of which the one that CLIP finds closest to the prompt is kept."""
    rank_by: str = ""
    """The CLIP: OUT/model of experiments.train clip, or a directory or hub id. Default: the shipped one of `shapes`."""

    def check(self) -> None:
        """ValueError for conflicting settings, before weights are read."""
        if self.candidates < 1:
            raise ValueError(f"--candidates {self.candidates}: at least 1")
        if self.rank_by and self.candidates == 1:
            raise ValueError(f"--rank-by {self.rank_by}: one candidate needs no ranking, use --candidates")

    def load(self) -> "Ranking":
        """The candidates, with CLIP loaded if there are several."""
        if self.candidates == 1:
            return SINGLE
        return Ranking(self.candidates, cosines(self.rank_by or str(SHIPPED / "clip")))

    @property
    def shown(self) -> dict[str, object]:
        """For the metadata of images; nothing for a single candidate."""
        return {} if self.candidates == 1 else {"candidates": self.candidates, "rank_by": self.rank_by or None}


@dataclass(frozen=True)
class Ranking:
    """candidates: samples for each image. score: keeps the best of them; None for a single one."""

    candidates: int = 1
    score: Score | None = None

    def best(self, batches: Iterable[Batch], prompts: Sequence[str], per_prompt: int = 1) -> Iterable[Batch]:
        """Batches of the best of each `candidates` successive samples. per_prompt: images kept for each prompt."""
        return batches if self.score is None else self._ranked(self.score, batches, prompts, per_prompt)

    def _ranked(
        self, score: Score, batches: Iterable[Batch], prompts: Sequence[str], per_prompt: int
    ) -> Iterator[Batch]:
        count, kept = self.candidates, 0
        waiting: list[tuple[np.ndarray, ...]] = []
        for batch in batches:
            waiting.append(batch.products)
            products = [np.concatenate(parts) for parts in zip(*waiting)]
            groups = len(products[-1]) // count
            if groups:
                ready = [each[: groups * count] for each in products]
                texts = [prompts[(kept + i // count) // per_prompt] for i in range(groups * count)]
                chosen = score(texts, ready[-1]).reshape(groups, count).argmax(1) + count * np.arange(groups)
                yield Batch(kept, tuple(each[chosen] for each in ready))
                kept += groups
            waiting = [tuple(each[groups * count :] for each in products)]


SINGLE = Ranking()


def cosines(directory: str) -> Score:
    """The cosine of CLIP's embeddings."""
    text, image = clip.load_text_encoder(directory), features.clip_image(*clip.load_image(directory))

    def score(prompts: Sequence[str], images: np.ndarray) -> np.ndarray:
        pooled = text.encode(list(prompts)).pooled
        assert pooled is not None  # CLIP's text tower has one
        seen = [out["features"] for out in features.extract(image, list(to_uint8(images)), min(64, len(images)))]
        return (l2_normalize(np.asarray(pooled)) * l2_normalize(np.concatenate(seen))).sum(1)

    return score
