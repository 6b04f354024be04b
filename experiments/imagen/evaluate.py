"""Score a cascade on `shapes`: does it draw what captions say, and does its super-resolution beat bicubic?

    python -m experiments.imagen.evaluate --n 100 --json runs/scores.json

Attribute accuracy: n held-out captions of one object and n of two are drawn through all stages, and the exact reader of
`jaxdiff.evaluation.attributes` looks at every picture; right is one in which everything that its caption states is read
back equal. The two kinds are scored apart (`--objects 1` or `2` draws one of them alone): two objects are far harder,
and an average would hide it. PSNR (dB, of 8-bit pictures, the mean over pictures): held-out true pictures, made small
by Pillow's antialiased BICUBIC, are enlarged by each super-resolution stage at augmentation level 0 and guidance 1, and
by the same filter for comparison. The shipped cascade takes about 20 minutes on 2 CPU cores at n = 100, nearly all of
it at 1024 (`--up-to 256`: 4 minutes; one kind alone: half as long); its scores are in jaxdiff/weights/tiny/README.md.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from experiments.cli import run
from experiments.imagen.drawing import Bars, Drawing, mesh_of, spread, with_boxes, with_dtype, with_samplings
from jaxdiff.core.files import usable_file, write_json
from jaxdiff.data import images
from jaxdiff.data.shapes_caption import Caption, Stated, caption, held_out_captions
from jaxdiff.data.shapes_draw import draw
from jaxdiff.data.shapes_scene import scene
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.evaluation.attributes import Verdict, matches
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.pipeline import After, Pipeline, SampleOptions
from jaxdiff.weights.imagen import SHIPPED, load, trained
from jaxdiff.weights.settings import to_json

OBJECTS = {"1": (1,), "2": (2,), "both": (1, 2)}
KINDS = {1: "", 2: "_two_objects"}
"""What the names of scores end in, by the number of objects that the captions name."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What to score."""

    weights: Path = SHIPPED
    """Folder of the cascade."""
    n: int = 100
    """Held-out captions to draw of each kind: so many of one object, and so many of two; 0: none."""
    objects: Literal["1", "2", "both"] = "both"
    """Draw captions of one object, of two, or both; each kind has its own scores."""
    psnr_256: int = 64
    """True pictures for the PSNR of 64→256; 0: none."""
    psnr_1024: int = 12
    """True pictures for the PSNR of 256→1024; 0: none."""
    up_to: int | None = None
    """Leave out the stages above this resolution (64 | 256 | 1024)."""
    seed: int = 0
    """Of the noise."""
    batch: int = 16
    """Pictures drawn at once by the base; super-resolution takes a sixteenth of it, at least one."""
    json: Path | None = None
    """A file for the scores."""
    drawing: Drawing = Drawing()


def main(settings: Run) -> None:
    """Score a cascade on held-out captions and pictures of `shapes`."""
    mesh = mesh_of(settings.drawing.mesh)
    model = upto(with_dtype(load(settings.weights), settings.drawing.dtype), settings.up_to)
    model = with_samplings(model, settings.drawing)
    if min(settings.n, settings.psnr_256, settings.psnr_1024) < 0:
        raise ValueError("--n, --psnr-256 and --psnr-1024 cannot be negative")
    if settings.json is not None:
        usable_file(settings.json)
    with spread(model, mesh) as placed:
        scores = _scores(settings, placed)
    for name, value in scores.items():
        if not name.startswith("wrong"):
            print(f"{name:37} {_readable(value)}")
    if settings.json is not None:
        write_json(settings.json, {**scores, "made_by": _made_by(settings, model)})


def _scores(settings: Run, model: Pipeline) -> dict:
    scores = {}
    if settings.n:
        captions = {objects: held_out_captions(settings.n, objects) for objects in OBJECTS[settings.objects]}
        scores |= attribute_scores(model, captions, settings.seed, settings.batch)
    for resolution, count in ((256, settings.psnr_256), (1024, settings.psnr_1024)):
        if count and resolution in model.sides[1:]:
            scores |= psnr_scores(model, resolution, count, settings.seed, settings.batch)
    return scores


def upto(model: Pipeline, resolution: int | None) -> Pipeline:
    """The cascade without the stages above a resolution."""
    if resolution is None:
        return model
    if resolution not in model.sides:
        raise ValueError(f"no stage draws {resolution} pixels, only {', '.join(map(str, model.sides))}")
    return dataclasses.replace(model, decoders=model.decoders[: model.sides.index(resolution)])


class Tally:
    """Verdicts on the pictures of each stage, in the order of the captions."""

    def __init__(self):
        self.verdicts: dict[int, list[tuple[str, Verdict]]] = {}

    def add(self, resolution: int, drawn: Sequence[np.ndarray], captions: Sequence[Caption]) -> None:
        found = self.verdicts.setdefault(resolution, [])
        found += [(c.text, verdict(picture, c.stated)) for picture, c in zip(drawn, captions)]

    def counts(self, resolution: int) -> tuple[int, int]:
        """How many pictures are right, of how many."""
        verdicts = self.verdicts[resolution]
        return sum(v.right for _, v in verdicts), len(verdicts)

    def accuracy(self, resolution: int) -> float:
        """The fraction of right pictures."""
        right, total = self.counts(resolution)
        return right / total

    def attributes(self, resolution: int) -> dict[str, float]:
        """For each attribute, the share of pictures that have it right among those whose captions state it."""
        checks = [v.checks for _, v in self.verdicts[resolution]]
        names = sorted({name for check in checks for name in check})
        return {name: statistics.mean(check[name] for check in checks if name in check) for name in names}

    def wrong(self, resolution: int) -> dict[str, list[str]]:
        """The captions that were not drawn right, and what is wrong with each."""
        verdicts = self.verdicts[resolution]
        return {text: [name for name, right in v.checks.items() if not right] for text, v in verdicts if not v.right}


def verdict(picture: np.ndarray, stated: Stated) -> Verdict:
    """On the picture as a file would hold it: 8 bits."""
    return matches(images.to_uint8(picture), stated)


def attribute_scores(model: Pipeline, captions: Mapping[int, Sequence[Caption]], seed: int, batch: int) -> dict:
    """attribute_accuracy_R, attributes_R, wrong_R of captions of one object for each resolution R, the same names with
    _two_objects behind them of two; seconds_per_picture through all stages.

    `captions`: by the number of objects. The noise of each kind starts at number 0, whether the other is drawn or not.
    """
    tallies = {objects: Tally() for objects in captions}
    options = SampleOptions(seed=seed, batch=batch)
    with Bars(model, len(captions)) as bars:
        for objects, each in captions.items():
            batches = model.batches([c.text for c in each], options, bars)
            bars.resume()
            for first, products in batches:
                for resolution, found in zip(model.sides, products):
                    tallies[objects].add(resolution, found, each[first : first + len(found)])
                bars.resume()
    scores: dict = {}
    for objects, tally in tallies.items():
        scores |= {f"attribute_accuracy_{r}{KINDS[objects]}": tally.accuracy(r) for r in model.sides}
        scores |= {f"attributes_{r}{KINDS[objects]}": tally.attributes(r) for r in model.sides}
        scores |= {f"wrong_{r}{KINDS[objects]}": tally.wrong(r) for r in model.sides}
    count = sum(map(len, captions.values()))
    seconds = {str(r): bars.per_picture(box, count) for box, r in enumerate(model.sides)}
    return scores | {"seconds_per_picture": sum(seconds.values()), "seconds_per_picture_of_stage": seconds}


def psnr_scores(model: Pipeline, resolution: int, count: int, seed: int = 0, batch: int = 16) -> dict:
    """psnr_R and psnr_R_bicubic of the stage that draws this resolution, over `count` held-out true pictures."""
    box = model.sides.index(resolution)
    model = with_boxes(model, [_plain(each) for each in trained(model)])
    texts, small = zip(*(small_picture(resolution, model.sides[box - 1], index) for index in range(count)))
    after = After(box - 1, images.to_float(np.stack(small)))
    ours, bicubic = [], []
    with Bars(model) as bars:
        options = SampleOptions(seed=seed, last=box, batch=batch, after=after)
        for first, (found,) in model.batches(texts, options, bars):
            for index, picture in enumerate(found, first):
                large = true_picture(resolution, index)
                ours.append(psnr(large, images.to_uint8(picture)))
                bicubic.append(psnr(large, images.resize(small[index], resolution)))
    return {f"psnr_{resolution}": statistics.mean(ours), f"psnr_{resolution}_bicubic": statistics.mean(bicubic)}


def _plain(model: TrainedModel) -> TrainedModel:
    """The model without augmentation and guidance."""
    return dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, aug_level=0.0, guidance=Guidance()))


def true_picture(resolution: int, index: int) -> np.ndarray:
    """A held-out true picture (uint8)."""
    return draw(scene("held_out", index), resolution)


def small_picture(resolution: int, lower: int, index: int) -> tuple[str, np.ndarray]:
    """Its caption, and the picture made small by Pillow's antialiased BICUBIC."""
    text = caption(scene("held_out", index), "held_out", index).text
    return text, images.resize(true_picture(resolution, index), lower)


def psnr(true: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures in dB; at most that of half a grey level."""
    error = np.mean((true.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 0.25)))


def _made_by(settings: Run, model: Pipeline) -> dict:
    """What the scores depend on, for the file."""
    told = {name: getattr(settings, name) for name in ("n", "objects", "psnr_256", "psnr_1024", "seed", "batch")}
    told["dtype"] = settings.drawing.dtype
    stages = [to_json(each.sampling) for each in trained(model)]
    return {**told, "weights": str(settings.weights), "stages": stages, "device": jax.devices()[0].device_kind}


def _readable(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.3g}" for name, number in value.items())
    return f"{value:.4g}"


if __name__ == "__main__":
    run(main)
