"""GPU report: draws many examples of `shapes` at 64 pixels with all cores but two.

    python -m experiments.recipes.gpu_examples OUT COUNT TWO_OBJECTS FIRST

Writes OUT/images.npy (n 64 64 3, uint8), OUT/ids.npy and OUT/mask.npy (n 24), what the shipped text encoder reads of
their captions, and then OUT/examples.json. FIRST is the number of the first scene, TWO_OBJECTS the fraction of the
scenes with two objects. 16 cores draw 400,000 in about 20 s.
"""

import itertools
import json
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxdiff.data.files import replacing
from jaxdiff.data.shapes_caption import caption
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.text.tokenizer import load_tokenizer, tokenize
from jaxdiff.weights.imagen import SHIPPED

IMAGES, IDS, MASK, DONE = "images.npy", "ids.npy", "mask.npy", "examples.json"
LENGTH = 24


def main(out: Path, count: int, two_objects: float, first: int) -> None:
    """Draws the examples; examples.json is there when all are."""
    for name, shape, dtype in (
        (IMAGES, (64, 64, 3), np.uint8),
        (IDS, (LENGTH,), np.int32),
        (MASK, (LENGTH,), np.bool_),
    ):
        np.lib.format.open_memmap(out / name, "w+", dtype, (count, *shape)).flush()
    workers = max(1, (os.cpu_count() or 1) - 2)
    edges = np.linspace(0, count, 4 * workers + 1).astype(int).tolist()
    pieces = [range(a, b) for a, b in itertools.pairwise(edges)]
    words = load_tokenizer(SHIPPED / "text")
    # This process has no other threads, so that a fork is safe, and needs no imports.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(partial(_draw, out, words, two_objects, first), pieces, chunksize=1)
    with replacing(out / DONE) as temporary:
        temporary.write_text(json.dumps({"examples": count, "two_objects": two_objects, "first": first}) + "\n")


def _draw(out: Path, words: PreTrainedTokenizerBase, two_objects: float, first: int, piece: range) -> None:
    images, ids, mask = (np.load(out / name, mmap_mode="r+") for name in (IMAGES, IDS, MASK))
    texts = []
    for place in piece:
        index = first + place
        drawn = scene("train", index, 2 if place % 100 < round(100 * two_objects) else 1)
        images[place] = draw(drawn, 64)
        texts.append(caption(drawn, "train", index).text)
    ids[piece.start : piece.stop], mask[piece.start : piece.stop] = tokenize(words, texts, LENGTH)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
