"""Sample captions through all three stages with the tiny cascade that ships with the package.

    python -m experiments.quickstart                                # 16 held-out captions
    python -m experiments.quickstart "a large red circle on white"  # your own
    python -m experiments.quickstart --train                        # train the whole cascade first, T5 included

Writes runs/quickstart/: grid.png (every caption at 64 and 256 pixels, two of them at 1024), images/ (one PNG each) and
report.json (fraction of images with all stated attributes, by an exact reader, separately for captions of one object
and of two; seconds). Takes at most 3 minutes on 2 CPU cores, including compilation; `--train` takes at most 25 more.
Its target: the right colours for at least 80 % of the captions of one object, and both super-resolution stages better
than bicubic. A full run on 2 cores of an AMD EPYC (jax 0.10.2, 2026-11-23) took 23 min 47 s: 31.8 dB against 31.0 at
256, 38.0 against 37.6 at 1024, and the right colours for eleven of the twelve captions of one object (81 % of 64 such)
and for none of the four of two. Positions, and which object has which colour, take longer to learn.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from PIL import Image

from experiments.cli import run
from experiments.evaluations.attributes import KINDS, Tally
from experiments.evaluations.psnr import psnr_scores
from experiments.output.names import Named, save_all
from experiments.quickstart_train import Training, train_cascade
from jaxdiff.core.files import usable, write_json
from jaxdiff.data import grids
from jaxdiff.data.png_metadata import Metadata
from jaxdiff.data.shapes_caption import Caption, held_out_captions
from jaxdiff.systems.bars import Bars
from jaxdiff.systems.pipeline import After, Pipeline, SampleOptions
from jaxdiff.training.lock import locked
from jaxdiff.training.loop import Diverged
from jaxdiff.weights.imagen import SHIPPED, load

ONE_OBJECT, TWO_OBJECTS = 12, 4
LARGE = 2
"""Number of captions, from the first, that are sampled beyond 256 pixels."""
NAMES = {1: "One object", 2: "Two objects"}
Sampled = dict[int, np.ndarray]
"""Images by resolution."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Captions and output."""

    caption: tyro.conf.Positional[tuple[str, ...]] = ()
    """Captions; default: 16 held-out ones."""
    out: Path = Path("runs/quickstart")
    """Folder for the results."""
    weights: Path = SHIPPED
    """Folder of the cascade."""
    seed: int = 0
    """Seed of the noise (and of training)."""
    train: bool = False
    """Train a new cascade from scratch into --out, and sample from it."""
    training: Training = Training()


def main(settings: Run) -> None:
    """Sample captions through all three stages; with --train, train the cascade first."""
    begun = time.perf_counter()
    out, seconds = settings.out, {}
    weights = settings.weights
    if settings.train:
        with locked(usable(out)):
            weights = train_cascade(settings.training, out, settings.seed)
        seconds["training"] = time.perf_counter() - begun
    captions = [] if settings.caption else chosen_captions()
    texts = list(settings.caption) or [c.text for c in captions]
    loading = time.perf_counter()
    model = load(weights)
    seconds["load"] = time.perf_counter() - loading
    sampled, spent = sample(model, texts, settings.seed, out)
    tallies = tallied(captions, sampled)
    report = scores(tallies)
    if settings.train and settings.training.psnr_images:
        report |= super_resolution_scores(model, settings.training.psnr_images)
    seconds |= spent | {"total": time.perf_counter() - begun}
    report |= {"seconds": {name: round(value, 2) for name, value in seconds.items()}}
    provenance = {"weights": str(weights), "seed": settings.seed, "jax": jax.__version__, "captions": texts}
    attempt(
        lambda: save_all(out / "images", named(texts, sampled, settings.seed, weights)),
        lambda: grids.write(out / "grid.png", sheet(texts, sampled, notes(tallies))),
        lambda: write_json(out / "report.json", {**report, **provenance, "device": jax.devices()[0].device_kind}),
    )
    for name, value in report.items():
        if isinstance(value, float):
            print(f"{name:37} {value:.3g}")
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"{took}\n{out / 'grid.png'}: {len(texts)} captions; report.json and images/ beside it")


def chosen_captions() -> list[Caption]:
    """Twelve held-out captions of one object, then four of two."""
    return held_out_captions(ONE_OBJECT, objects=1) + held_out_captions(TWO_OBJECTS, objects=2)


def sample(model: Pipeline, texts: Sequence[str], seed: int, out: Path) -> tuple[Sampled, dict[str, float]]:
    """Sample all captions up to 256 pixels and the first two beyond. Also the seconds per stage, with compilation."""
    last = max(1, sum(side <= 256 for side in model.sides)) - 1
    with Bars(model) as bars:
        batches = model.batches(texts, SampleOptions(seed=seed, last=last), bars)
        usable(out)  # not earlier, so that bad settings create no folder
        bars.resume()
        products = [np.concatenate(each) for each in zip(*(batch.products for batch in batches))]
        if last + 1 < len(model.boxes):
            after = After(last, products[-1][:LARGE])
            products += model.sample(texts[:LARGE], SampleOptions(seed=seed, after=after), bars)
    sampled = dict(zip(model.sides, products, strict=True))
    return sampled, {str(side): bars.seconds(box) for box, side in enumerate(sampled)}


def tallied(captions: Sequence[Caption], sampled: Sampled) -> dict[int, Tally]:
    """Verdicts on the images, by the number of objects in the captions."""
    tallies: dict[int, Tally] = {}
    for objects in sorted({len(c.stated.objects) for c in captions}):
        tally = tallies[objects] = Tally()
        for resolution, images in sampled.items():
            numbers = [i for i, c in enumerate(captions[: len(images)]) if len(c.stated.objects) == objects]
            if numbers:
                tally.add(resolution, [images[i] for i in numbers], [captions[i] for i in numbers])
    return tallies


def scores(tallies: Mapping[int, Tally]) -> dict:
    """Fractions of images with all attributes right and with the colours right, separately for captions of one object
    and of two; the wrong attributes."""
    values: dict = {}
    for objects, tally in tallies.items():
        for r in tally.verdicts:
            values[f"attribute_accuracy_{r}{KINDS[objects]}"] = tally.accuracy(r)
            values[f"colour_accuracy_{r}{KINDS[objects]}"] = float(tally.attributes(r)["colour"])
    resolutions = sorted({r for tally in tallies.values() for r in tally.verdicts})
    wrong = {str(r): _wrong(tallies, r) for r in resolutions}
    return values | ({"wrong": wrong} if wrong else {})


def _wrong(tallies: Mapping[int, Tally], resolution: int) -> dict[str, list[str]]:
    having = [tally for tally in tallies.values() if resolution in tally.verdicts]
    return {text: names for tally in having for text, names in tally.wrong(resolution).items()}


def notes(tallies: Mapping[int, Tally]) -> list[str]:
    """One line per kind of caption: the number of right images at each resolution."""
    lines = []
    for objects, tally in tallies.items():
        each = ["{} of {} at {}".format(*tally.counts(r), r) for r in sorted(tally.verdicts)]
        lines.append(f"{NAMES[objects]}: all stated attributes are right in {', '.join(each)} pixels")
    return lines


def super_resolution_scores(model: Pipeline, count: int) -> dict:
    """PSNR of every super-resolution stage and of bicubic on `count` true images, a quarter as many above 256."""
    counts = {r: count if r <= 256 else max(1, count // 4) for r in model.sides[1:]}
    return {name: score for r, n in counts.items() for name, score in psnr_scores(model, r, n).items()}


def named(texts: Sequence[str], sampled: Sampled, seed: int, weights: Path) -> Iterator[Named]:
    """The single images with their file names and metadata."""
    for resolution, images in sampled.items():
        for i, image in enumerate(images):
            values = {"number": i, "resolution": resolution, "weights": str(weights)}
            yield Named(f"{i:02d}", texts[i], image, Metadata(texts[i], seed, values), f"-{resolution}.png")


def attempt(*steps: Callable[[], object]) -> None:
    """Run all steps, even if some fail, so that as much as possible is saved; then raise the first OSError."""
    failed: list[OSError] = []
    for step in steps:
        try:
            step()
        except OSError as error:
            failed.append(error)
    if failed:
        raise failed[0]


# The sheet has four cells per row: the small image with its caption below, the middle one to its right. Large images
# have their own column.

SMALL, MIDDLE, COLUMNS, GAP, FONT = 128, 256, 4, 16, 14


def sheet(texts: Sequence[str], sampled: Sampled, notes: Sequence[str] = ()) -> Image.Image:
    """All images on one page, with lines of text below them."""
    small, middle, *rest = [*sampled.values(), []] if len(sampled) == 1 else sampled.values()
    large = rest[-1] if rest else []
    columns = min(COLUMNS, len(texts))
    rows = -(-len(texts) // columns)
    cell = SMALL + grids.GAP + MIDDLE + GAP
    height = rows * (MIDDLE + GAP) + GAP
    below = 3 * FONT
    side = max(2 * MIDDLE, (height - GAP) // LARGE - GAP - below)
    height = max(height, len(large) * (side + below + GAP) + GAP)
    width = columns * cell + GAP + (side + GAP if len(large) else 0)
    written = [line for note in notes for line in grids.wrapped(note, width - 2 * GAP, FONT).split("\n")]
    page = Image.new("RGB", (width, height + len(written) * (FONT + 4) + (GAP if written else 0)), "white")
    for i, line in enumerate(written):
        grids.write_text(page, line, (GAP, height + i * (FONT + 4)), FONT)
    for i, text in enumerate(texts):
        x, y = GAP + i % columns * cell, GAP + i // columns * (MIDDLE + GAP)
        grids.paste(page, grids.scaled(small[i], SMALL), (x, y))
        if len(middle):
            grids.paste(page, grids.scaled(middle[i], MIDDLE), (x + SMALL + grids.GAP, y))
        words = grids.wrapped(text or "(no text)", SMALL, FONT, lines=(MIDDLE - SMALL) // (FONT + 4))
        grids.write_text(page, words, (x, y + SMALL + 4), FONT)
    for i, image in enumerate(large):
        x, y = columns * cell + GAP, GAP + i * (side + below + GAP)
        grids.paste(page, grids.scaled(image, side), (x, y))
        words = grids.wrapped(texts[i] or "(no text)", side, FONT, lines=below // FONT)
        grids.write_text(page, words, (x, y + side + 4), FONT)
    return page


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))
