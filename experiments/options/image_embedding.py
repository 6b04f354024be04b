"""Sampling from CLIP's embedding of your own images (DALL·E 2, arXiv 2204.06125, 3).

    python -m experiments.sample --weights runs/prior runs/decoder --variation-of photo.png --per-prompt 4
    python -m experiments.sample --weights runs/prior runs/decoder --interpolate a.png b.png --points 6
    python -m experiments.sample --weights runs/prior runs/decoder --variation-of a.png --text-diff "a cat" "a lion"

The prior does not run, so `--weights runs/decoder` suffices. A prompt is the decoder's caption; it is optional. The
paper also keeps the noise that DDIM inverts an image to; here every image has its own noise.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.options.init_image import read
from jaxdiff.models.embedding_boxes import EmbeddingDecoder
from jaxdiff.models.image_embeddings import slerp, text_diff
from jaxdiff.systems.pipeline import INPUT, After, Pipeline


@dataclass(frozen=True)
class ImageEmbeddingOptions:
    """Your own images, as CLIP embeddings that a DALL·E 2 decodes."""

    variation_of: Path | None = None
    """Sample other images with the embedding of this one; --per-prompt of them."""
    interpolate: tuple[Path, Path] | None = None
    """Sample along the arc between the embeddings of two images."""
    text_diff: tuple[str, str] | None = None
    """A description of --variation-of and another one: moves its embedding along their difference."""
    text_diff_fraction: float = 0.5
    """Fraction of the angle to that difference for the last image, above 0 and up to 1; the paper's are 0.25 to 0.5."""
    points: int = 8
    """Number of images along --interpolate or --text-diff, both ends included."""

    @property
    def given(self) -> bool:
        return self.variation_of is not None or self.interpolate is not None

    @property
    def count(self) -> int:
        """The number of embeddings."""
        return 1 if self.interpolate is None and self.text_diff is None else self.points

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions to embed beside the prompts."""
        return self.text_diff or ()

    @property
    def shown(self) -> dict[str, object]:
        """For the metadata of images; nothing where no image is given."""
        used = {"variation_of", "interpolate"} if self.given else set()
        if self.count > 1:
            used |= {"points"}
        if self.text_diff is not None:
            used |= {"text_diff", "text_diff_fraction"}
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name in used}
        return {name: _named(value) for name, value in values.items() if value is not None}

    def check(self, enlarges: bool) -> None:
        """ValueError for conflicting settings or unreadable images, before weights are read. enlarges: whether
        --enlarge is given."""
        if self.variation_of is not None and self.interpolate is not None:
            raise ValueError("--variation-of and --interpolate: one of them at a time")
        if self.text_diff is not None and self.variation_of is None:
            raise ValueError("--text-diff is for an image to move: give one with --variation-of")
        if enlarges and self.given:
            raise ValueError("--enlarge starts from an image, --variation-of and --interpolate from embeddings")
        if self.points < 2:
            raise ValueError(f"--points {self.points}: at least both ends")
        if not 0 < self.text_diff_fraction <= 1:
            raise ValueError(f"--text-diff-fraction {self.text_diff_fraction}: above 0 and up to 1")
        for path in (self.variation_of, *(self.interpolate or ())):
            if path is not None:
                read(path)

    def prompts(self, given: list[str]) -> list[str]:
        """The prompt for each embedding. ValueError for several prompts."""
        if len(given) > 1:
            raise ValueError(f"{len(given)} prompts: with --variation-of or --interpolate give one, or none")
        return (given or [""]) * self.count

    def after(self, model: Pipeline, samples: int) -> After | None:
        """`samples` of each embedding in turn as the product to start from; None if no image is given. ValueError for
        weights that decode no embeddings, or that need an image and have none."""
        box = next((n for n, each in enumerate(model.boxes) if isinstance(each, EmbeddingDecoder)), None)
        if not self.given:
            if box == 0:
                raise ValueError(
                    "these weights decode embeddings of images: name the run of a prior before them in --weights, or "
                    "an image with --variation-of"
                )
            return None
        if box is None:
            flag = "--interpolate" if self.variation_of is None else "--variation-of"
            raise ValueError(f"{flag}: these weights decode no image embeddings, those of a DALL·E 2 do")
        decoder = model.boxes[box]
        assert isinstance(decoder, EmbeddingDecoder)
        rows = np.asarray(self._embeddings(model, decoder), np.float32)[:, None, None]
        return After(box - 1 if box else INPUT, np.repeat(rows, samples, axis=0))

    def _embeddings(self, model: Pipeline, decoder: EmbeddingDecoder) -> jnp.ndarray:
        """The embeddings (n e) as the decoder reads them."""
        seen = [decoder.encode(jnp.asarray(read(path))[None])[0, 0] for path in self._paths]
        if self.interpolate is not None:
            return slerp(seen[0], seen[1], jnp.linspace(0.0, 1.0, self.points))
        if self.text_diff is None:
            return seen[0]
        assert model.text_encoder is not None  # a decoder of this kind reads text
        pooled = model.text_encoder.encode(list(self.text_diff)).pooled
        if pooled is None or pooled.shape[-1] != seen[0].shape[-1]:
            width = "none" if pooled is None else f"some of width {pooled.shape[-1]}"
            raise ValueError(
                f"--text-diff: captions need embeddings of width {seen[0].shape[-1]}, their encoder gives {width}"
            )
        fractions = jnp.linspace(0.0, self.text_diff_fraction, self.points)
        try:
            return text_diff(seen[0], pooled[:1], pooled[1:], fractions)
        except ValueError as error:
            raise ValueError(f"--text-diff {' '.join(map(repr, self.text_diff))}: {error}") from error

    @property
    def _paths(self) -> tuple[Path, ...]:
        if self.interpolate is not None:
            return self.interpolate
        return () if self.variation_of is None else (self.variation_of,)


def _named(value: object) -> object:
    """Paths by their names."""
    if isinstance(value, tuple):
        return [_named(each) for each in value]
    return value.name if isinstance(value, Path) else value
