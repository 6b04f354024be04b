"""Judge pictures against true ones by every number there is: FID, KID, CMMD, precision and recall, CLIP score, IS.

    python -m experiments.evaluate                                            # the shipped cascade on held-out `shapes`
    python -m experiments.evaluate --weights runs/cascade --up-to 256 --n 1000 --out runs/judged
    python -m experiments.evaluate --pictures drawn --data folder:photos --fit crop --inception inception.safetensors
    python -m experiments.evaluate --keep-reference runs/reference            # then --reference runs/reference/*.npz

Draws the first n captions of the data split (or takes a folder of pictures), looks at them and at the split's pictures
in one pass with all networks, and prints a table; OUT/scores.json has every number with the line that says how it came
about. Run again with the same folder, it goes on where it was. The shipped cascade takes about four minutes at 64
pixels on 2 CPU cores. Networks that are not public are named in their numbers: FD-shapes is the Fréchet distance
of a classifier of `shapes` that the package ships; only Inception's is called FID.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.cli import run
from experiments.imagen import pictures as files
from experiments.imagen.drawing import Bars, Drawing, mesh_of, spread, with_dtype, with_samplings
from experiments.imagen.evaluate import upto
from experiments.imagen.png_metadata import Metadata
from experiments.judging import (
    CROP_THEM,
    Bench,
    Cropped,
    Judges,
    OfFolder,
    OfSource,
    PictureSet,
    captions_of,
    embedded,
    loaded,
    observe,
    open_folder,
    without_captions,
)
from jaxdiff.core import json_files
from jaxdiff.core.files import usable, write_json
from jaxdiff.core.trees import digest_of
from jaxdiff.data import sources, zipped
from jaxdiff.data.example import Source
from jaxdiff.data.images import Unreadable
from jaxdiff.data.shapes_caption import Stated, caption
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.attributes import matches
from jaxdiff.evaluation.metrics import MetricSettings as Scoring
from jaxdiff.evaluation.metrics import Observed, Score, caption_metrics, keep, kept, metrics_of, require_alike, seen_by
from jaxdiff.evaluation.resize import Fit
from jaxdiff.evaluation.statistics import Origin
from jaxdiff.systems.pipeline import Pipeline, SampleOptions
from jaxdiff.weights.imagen import SHIPPED, load, trained
from jaxdiff.weights.settings import to_json

JUDGES, DRAWING, SETTINGS = Judges(), Drawing(), Scoring()


@dataclasses.dataclass(frozen=True)
class Run:
    """What to judge."""

    out: Path = Path("runs/evaluate")
    """Folder for scores.json, the pictures that are drawn and what the networks saw."""
    pictures: Path | None = None
    """A folder or zip of pictures to judge, in place of a cascade's."""
    convert: bool = False
    """Take grayscale and transparent pictures too, as RGB on white."""
    fit: Literal["squeeze", "crop"] | None = None
    """What networks see of pictures, of both sets: each whole, squeezed into their square (as pytorch-fid and clean-fid
    do; the two sets must be of one size), or its centred square, brought to the judged pictures' shortest side as in
    training. Left out: squeeze of --pictures, crop of a cascade's drawings."""
    weights: Path = SHIPPED
    """Folder of the cascade that draws."""
    up_to: int | None = None
    """The resolution that is judged; left out: the base's."""
    data: str = "shapes"
    """The true pictures: shapes | emoji | rainbow | folder:PATH (or a zip) | tfds:NAME | records:PATH"""
    split: str | None = None
    """Left out: held_out of shapes, test of rainbow, train of other sets."""
    reference: tuple[Path, ...] = ()
    """Kept statistics of the true pictures, in place of looking at them: .npz of --keep-reference, one for each
    network; mu and sigma (.npz) or features (.npz, .npy) of other programs."""
    keep_reference: Path | None = None
    """A folder to keep what the networks saw in the true pictures, for --reference."""
    n: int = 512
    """Pictures that are drawn."""
    true_n: int = 0
    """True pictures to compare with, from the first; 0: all of the split."""
    examples: int = 20_000
    """Of the shapes set: how many pictures its training split has."""
    held_out: int = 1_000
    """And how many its held-out split."""
    seed: int = 0
    """Of the noise of what is drawn, and of subsets."""
    batch: int = 64
    """Pictures looked at at once."""
    judges: Judges = JUDGES
    score: Scoring = SETTINGS
    drawing: Drawing = DRAWING
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


def main(settings: Run) -> None:
    """Judge pictures against true ones."""
    if settings.n < 2 or settings.true_n < 0 or settings.true_n == 1 or settings.batch < 1:
        raise ValueError(f"n {settings.n}, true_n {settings.true_n}, batch {settings.batch}: too few")
    spec, mesh = sources.parse(settings.data), mesh_of(settings.drawing.mesh)
    if isinstance(spec, sources.Shapes):
        spec = sources.Shapes(settings.examples, settings.held_out)
    split = settings.split or {sources.Shapes: "held_out", sources.Rainbow: "test"}.get(type(spec), "train")
    if settings.reference and settings.keep_reference is not None:
        raise ValueError("--keep-reference keeps what is looked at, and with --reference nothing true is")
    bench = loaded(settings.judges)
    fit = Fit(settings.fit or ("squeeze" if settings.pictures else "crop"))
    if settings.pictures:
        shown = _fitted(open_folder(settings.pictures, settings.convert, fit=fit), fit)
        width, height = _size(shown)
    else:
        model = _model(settings)
        width = height = model.sides[-1]
    references = _references(settings, bench, fit, f"{width}x{height}")
    true_set = None if references else _true_set(settings, spec, split, fit, (width, height))
    usable(settings.out)
    if not settings.pictures:
        shown = _fitted(_drawn(settings, model, spec, split), fit)
    look = {"cache": settings.out / "seen", "batch": settings.batch, "mesh": mesh}
    seen = observe(shown, bench.extractors, seed=None if settings.pictures else settings.seed, **look)
    true = {each.origin.extractor: each for each in references}
    if true_set is not None:
        true = observe(true_set, bench.extractors, **look)
    if settings.keep_reference is not None:
        for name, each in true.items():
            keep(usable(settings.keep_reference) / f"{name.replace(' ', '-')}.npz", each)
    scores = []
    for name, each in true.items():
        scores += metrics_of(seen[name], each, settings.score, settings.seed)
    scores += _of_captions(shown, bench, seen, settings.judges.before)
    if isinstance(spec, sources.Shapes):
        scores += _attributes(shown, split, settings.held_out, next(iter(seen.values())))
    write_json(settings.out / "scores.json", {"scores": [dataclasses.asdict(score) for score in scores]})
    print(table(scores, settings))


def table(scores: Sequence[Score], settings: Run) -> str:
    """One screen: what was measured, then how."""
    lines = []
    for score in scores:
        error = f" ± {score.error:.3g}" if score.error is not None else ""
        error += f" (subsets ± {score.deviation:.3g})" if score.deviation is not None else ""
        value = f"{score.value:.4g}{error}" if score.value is not None else f"none: {score.missing}"
        lines.append(f"{score.name:22} {value:16} {score.protocol if score.value is not None else ''}".rstrip())
    if settings.judges.inception is None:
        lines.append(
            f"{'FID':22} none: no weights of Inception; experiments.inception converts them, --inception names them"
        )
    return "\n".join([*lines, f"{settings.out / 'scores.json'}: all of it"])


def _references(settings: Run, bench: Bench, fit: Fit, size: str) -> list[Observed]:
    """Kept statistics, refused before minutes of drawing unless they are of the networks at hand and of pictures that
    came to them in the same way."""
    networks = {str(extractor): extractor for extractor in bench.extractors}
    found = []
    for path in settings.reference:
        each = kept(path)
        if each.origin.protocol_unknown:
            each = seen_by(each, [(name, extractor.width) for name, extractor in networks.items()])
        name = each.origin.extractor
        if name not in networks:
            raise ValueError(f"--reference {path}: seen by {name}, and the judges are {', '.join(networks)}")
        if any(other.origin.extractor == name for other in found):
            raise ValueError(f"--reference: two of {name}, and pictures are compared with one set")
        judged = Origin("the judged pictures", "", name, networks[name].resize.value, fit=fit.value, size=size)
        try:
            require_alike(judged, each.origin)
        except ValueError as error:
            raise ValueError(f"--reference {path}: {error}; look at the true pictures again, or judge alike") from error
        found.append(each)
    return found


def _fitted(shown: OfFolder, fit: Fit) -> PictureSet:
    return shown if fit is Fit.SQUEEZE else Cropped(shown, shown.shortest or min(_size(shown)))


def _size(shown: PictureSet) -> tuple[int, int]:
    """Width and height of the first picture."""
    height, width = shown[0].shape[:2]
    return width, height


def _source(settings: Run, spec: sources.DataSpec, side: int, split: str) -> Source:
    if isinstance(spec, sources.Folder) and zipped.is_zip(spec.path):
        return zipped.read(spec.path)
    return sources.open(spec, side, split, settings.data_dir)


def _true_set(settings: Run, spec: sources.DataSpec, split: str, fit: Fit, size: tuple[int, int]) -> PictureSet:
    """The true pictures, which go to the networks in the same way as the judged ones of this width and height, and are
    checked as they are. ValueError for pictures of another size, unless all are cropped."""
    whole: PictureSet
    if isinstance(spec, sources.Folder):
        if split != "train":
            raise ValueError(f"{settings.data} has only the split 'train', not {split!r}")
        whole = open_folder(spec.path, settings.convert, settings.true_n, fit)
    else:
        source = _source(settings, spec, min(size), split)
        whole = OfSource(f"{settings.data}/{split}", source, settings.true_n, settings.convert)
    if fit is Fit.CROP:
        return Cropped(whole, min(size))
    if (found := _first_size(whole)) not in (None, size):
        said = " and ".join(f"{width}x{height}" for width, height in (size, found))
        raise ValueError(f"the judged pictures and {whole.name} are of different size: {said}; {CROP_THEM}")
    return whole


def _first_size(shown: PictureSet) -> tuple[int, int] | None:
    """None where it cannot be read."""
    try:
        return _size(shown)
    except (Unreadable, OSError):
        return None


def _model(settings: Run) -> Pipeline:
    model = with_dtype(load(settings.weights), settings.drawing.dtype)
    return upto(model, settings.up_to or model.sides[0])


def _drawn(settings: Run, model: Pipeline, spec: sources.DataSpec, split: str) -> OfFolder:
    """The cascade's pictures of the split's first captions, one file each, those that are there already left alone."""
    model = with_samplings(model, settings.drawing)
    resolution = model.sides[-1]
    source = _source(settings, spec, resolution, split)
    captions = list(captions_of(OfSource(split, source, settings.n)))
    if None in captions:
        raise ValueError(f"{settings.data}: example {captions.index(None)} has no caption to draw")
    # By what the weights are, not where: a folder may have got others since.
    models = trained(model)
    made_of = {"weights": ", ".join(digest_of(each.params) for each in models), "resolution": resolution}
    made_of |= {"stages": [to_json(each.model) for each in models], "dtype": settings.drawing.dtype}
    made_of |= {"text": model.text_encoder.fingerprint, "samplings": [to_json(each.sampling) for each in models]}
    made_of |= {"seed": settings.seed, "data": settings.data, "split": split}
    folder = settings.out / "drawn"
    _same_run(folder, made_of)
    paths = [folder / f"{number:06d}.png" for number in range(len(captions))]
    pieces = list(_runs(number for number, path in enumerate(paths) if not path.is_file()))
    with spread(model, mesh_of(settings.drawing.mesh)) as placed, Bars(placed, len(pieces)) as bars:
        for piece in pieces:
            options = SampleOptions(seed=settings.seed, first=piece.start, batch=32)
            for first, products in placed.batches(captions[piece.start : piece.stop], options, bars):
                for number, picture in enumerate(products[-1], piece.start + first):
                    told = {"number": number, "resolution": resolution, "data": settings.data, "split": split}
                    files.save_png(paths[number], picture, Metadata(captions[number], settings.seed, told))
    return OfFolder(f"{settings.weights.name} at {resolution}", tuple(paths), tuple(captions), "png")


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Numbers in ascending order as ranges without gaps."""
    for _, pairs in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        each = [number for _, number in pairs]
        yield range(each[0], each[-1] + 1)


def _same_run(folder: Path, made_of: dict) -> None:
    """ValueError where the folder has the pictures of other settings."""
    note = usable(folder) / "made_of.json"
    if not note.is_file():
        write_json(note, made_of)
    elif json_files.parse(note.read_bytes(), str(note)) != json.loads(json.dumps(made_of)):
        raise ValueError(f"{folder}: has pictures drawn with other settings; name another --out, or delete it")


def _of_captions(shown: PictureSet, bench: Bench, seen: dict[str, Observed], prefix: str) -> list[Score]:
    """CLIP scores of the pictures that have captions."""
    if bench.clip is None:
        return []
    captions = list(captions_of(shown))
    if missing := without_captions(captions):
        return [Score(f"score-{bench.clip.name}", None, "", missing=missing)]
    text = embedded(bench.text, [prefix + caption for caption in captions])
    return caption_metrics(captions, text, seen[str(bench.clip)], prefix)


def _attributes(shown: PictureSet, split: str, count: int, seen: Observed) -> list[Score]:
    """The exact reader's verdict on what captions of `shapes` state: of a cascade's drawings, or of a folder whose
    captions are some of the first `count` of the split. Captions of one object and of two have a score each."""
    name = "attributes right"
    if min(shown[0].shape[:2]) < 64 or shown[0].shape[0] != shown[0].shape[1]:
        return [Score(name, None, "", missing="the reader needs squares of 64 pixels or more")]
    said = (caption(scene(split, number), split, number) for number in range(max(count, len(shown))))
    stated: dict[str | None, Stated] = {each.text: each.stated for each in said}
    captions = list(captions_of(shown))
    if missing := without_captions(captions):
        return [Score(name, None, "", missing=missing)]
    if unknown := [text for text in captions if text not in stated]:
        return [Score(name, None, "", missing=f"{len(unknown)} captions are none of the set, such as {unknown[0]!r}")]
    right: dict[int, list[bool]] = {}
    for number, text in enumerate(captions):
        right.setdefault(len(stated[text].objects), []).append(matches(shown[number], stated[text]).right)
    scores = []
    for objects, each in sorted(right.items()):
        name = f"attributes, {objects} object{'s' if objects > 1 else ''}"
        scores.append(Score(name, float(np.mean(each)), f"n {len(each)}, exact reader, {seen.origin.shown}"))
    return scores


if __name__ == "__main__":
    run(main)
