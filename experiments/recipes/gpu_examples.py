"""GPU report: rasterise many examples of `shapes` at 64 pixels with all cores but two.

    python -m experiments.recipes.gpu_examples --out OUT --weights WEIGHTS --count 400000

Writes OUT/images.npy (n 64 64 3, uint8), OUT/ids.npy and OUT/mask.npy (n l; the captions tokenized for the text encoder
of WEIGHTS), then OUT/examples.json. 16 cores rasterise 400,000 in about 20 s.
"""

import dataclasses
import itertools
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np

from experiments.cli import run
from jaxdiff.core.files import write_json
from jaxdiff.data.shapes_caption import caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.text.tokenizer import PreTrainedTokenizerBase, load_tokenizer, tokenize
from jaxdiff.weights.imagen import SHIPPED
from jaxdiff.weights.stages import read_settings

IMAGES, IDS, MASK, DONE = "images.npy", "ids.npy", "mask.npy", "examples.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Number and kind of examples."""

    out: Path
    """An existing folder."""
    weights: Path = SHIPPED
    """The cascade whose tokenizer is used."""
    count: int = 400_000
    """Number of examples."""
    two_objects: float = 0.6
    """Fraction of them with two objects."""
    first: int = 0
    """Index of the first scene of `shapes`."""


def main(settings: Settings) -> None:
    """Rasterise examples of `shapes` at 64 pixels with all cores but two; examples.json is written last."""
    try:
        draw_all(settings)
    except Exception as error:  # the training section waits for this file
        write_json(settings.out / DONE, {"error": f"{type(error).__name__}: {error}"})
        raise


def draw_all(settings: Settings) -> None:
    out, length = settings.out, read_settings(settings.weights / "base64")[0].text.shape[0]
    for name, shape, dtype in (
        (IMAGES, (64, 64, 3), np.uint8),
        (IDS, (length,), np.int32),
        (MASK, (length,), np.bool_),
    ):
        np.lib.format.open_memmap(out / name, "w+", dtype, (settings.count, *shape)).flush()
    workers = max(1, (os.cpu_count() or 1) - 2)
    edges = np.linspace(0, settings.count, 4 * workers + 1).astype(int).tolist()
    pieces = [range(a, b) for a, b in itertools.pairwise(edges)]
    words = load_tokenizer(settings.weights / "text")
    # This process has no other threads, so a fork is safe; it also avoids repeated imports.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(partial(_draw, settings, words), pieces, chunksize=1)
    summary = {"examples": settings.count, "two_objects": settings.two_objects, "first": settings.first}
    write_json(out / DONE, summary)


def _draw(settings: Settings, words: PreTrainedTokenizerBase, piece: range) -> None:
    images, ids, mask = (np.load(settings.out / name, mmap_mode="r+") for name in (IMAGES, IDS, MASK))
    texts = []
    for place in piece:
        index = settings.first + place
        example = scene("train", index, 2 if place % 100 < round(100 * settings.two_objects) else 1)
        images[place] = draw(example, 64)
        texts.append(caption(example, "train", index).text)
    tokens = tokenize(words, texts, ids.shape[1])
    ids[piece.start : piece.stop], mask[piece.start : piece.stop] = tokens.ids, tokens.mask


if __name__ == "__main__":
    run(main)
