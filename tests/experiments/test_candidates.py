"""Candidates ranked by a score."""

import numpy as np
import pytest

from experiments import sample
from experiments.options.candidates import CandidateOptions, Ranking
from jaxdiff.systems.pipeline import Batch


def brightness(prompts, images):
    """Prompts say how bright an image should be."""
    return -np.abs(images.mean((1, 2, 3)) - [float(prompt) for prompt in prompts])


def batches(sizes, values):
    first = 0
    for size in sizes:
        image = np.broadcast_to(np.asarray(values[first : first + size])[:, None, None, None], (size, 2, 2, 3))
        yield Batch(first, (np.arange(first, first + size), image))
        first += size


@pytest.mark.parametrize("sizes", [[12], [5, 5, 2], [1] * 12])
def test_the_best_of_each_group(sizes):
    """Two prompts, two images of each, three candidates for an image; groups may span batches of any size."""
    values = [0.1, 0.5, 0.9, 0.4, 0.2, 0.3, 0.0, 0.8, 1.0, 0.7, 0.6, 0.95]
    found = list(Ranking(3, brightness).best(batches(sizes, values), ["0.5", "1.0"], 2))
    numbers = np.concatenate([batch.products[0] for batch in found])
    assert numbers.tolist() == [1, 3, 8, 11]
    assert [batch.first for batch in found] == np.cumsum([0, *(len(b.products[0]) for b in found)])[:-1].tolist()


def test_a_single_candidate_needs_no_score():
    image = np.zeros((2, 2, 2, 3))
    assert [*Ranking().best([Batch(0, (image,))], ["a", "b"])] == [Batch(0, (image,))]


@pytest.mark.parametrize(
    ("options", "message"),
    [(CandidateOptions(0), "--candidates 0: at least 1"), (CandidateOptions(1, "clip"), "needs no ranking")],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        options.check()


def test_sample_keeps_the_best(command, tmp_path):
    """The kept image is one of the candidates: that with the highest cosine of the shipped CLIP."""
    given = "a large red circle", "--up-to", "64", "--steps", "2", "--seed", "5"
    done = command(sample, *given, "--per-prompt", 3, "--out", tmp_path / "all")
    assert done.code == 0, done.err
    done = command(sample, *given, "--candidates", 3, "--out", tmp_path / "best")
    assert done.code == 0, done.err
    from PIL import Image

    from experiments.options.candidates import cosines
    from jaxdiff.weights.imagen import SHIPPED

    read = lambda path: np.asarray(Image.open(path), np.float32) / 127.5 - 1  # noqa: E731
    images = np.stack([read(path) for path in sorted((tmp_path / "all").glob("00*.png"))])
    (kept,) = (tmp_path / "best").glob("00*.png")
    chosen = cosines(str(SHIPPED / "clip"))(["a large red circle"] * 3, images).argmax()
    np.testing.assert_array_equal(read(kept), images[chosen])
