"""Judge pictures against true ones by every number there is: FID, KID, CMMD, precision and recall, CLIP score, IS.

    python -m experiments.evaluate                                            # the shipped cascade on held-out `shapes`
    python -m experiments.evaluate --weights runs/cascade --up-to 256 --n 1000 --out runs/judged
    python -m experiments.evaluate --pictures runs/sample --data folder:photos --inception runs/inception.safetensors
    python -m experiments.evaluate --keep-reference runs/reference            # then --reference runs/reference/*.npz

Draws the first n captions of the data split (or takes a folder of pictures), looks at them and at the split's pictures
in one pass with all networks, and prints a table; OUT/scores.json has every number with the line that says how it came
about. Run again with the same folder, it goes on where it was. The shipped cascade takes about four minutes at 64
pixels on 2 CPU cores. Networks that are not public are named in their numbers: FD-shapes is the Fréchet distance
of a classifier of `shapes` that the package ships; only Inception's is called FID.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.cli import run
from experiments.imagen import pictures as files
from experiments.imagen.drawing import Bars, Drawing, mesh_of, parts, samplings, spread, with_dtype
from experiments.imagen.evaluate import upto
from experiments.judging import (
    Bench,
    Judges,
    OfFolder,
    OfSource,
    PictureSet,
    captions_of,
    embedded,
    loaded,
    observe,
    open_folder,
)
from jaxdiff.core import json_files
from jaxdiff.data import sources
from jaxdiff.data.embeddings import fingerprint
from jaxdiff.data.files import usable, write_json
from jaxdiff.data.shapes_caption import Stated, caption
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.attributes import matches
from jaxdiff.evaluation.features import digest_of
from jaxdiff.evaluation.judges import Observed, Score, judge, judge_captions, keep, kept
from jaxdiff.evaluation.judges import Settings as Scoring
from jaxdiff.systems import cascade
from jaxdiff.weights.imagen import SHIPPED, load
from jaxdiff.weights.settings import to_json

JUDGES, DRAWING, SETTINGS = Judges(), Drawing(), Scoring()


@dataclasses.dataclass(frozen=True)
class Run:
    """What to judge."""

    out: Path = Path("runs/evaluate")
    """Folder for scores.json, the pictures that are drawn and what the networks saw."""
    pictures: Path | None = None
    """A folder of pictures to judge, in place of a cascade's."""
    convert: bool = False
    """Take grayscale and transparent pictures too, as RGB on white."""
    weights: Path = SHIPPED
    """Folder of the cascade that draws."""
    up_to: int | None = None
    """The resolution that is judged; left out: the base's."""
    data: str = "shapes"
    """The true pictures: shapes | emoji | rainbow | folder:PATH | tfds:NAME | records:PATH"""
    split: str | None = None
    """Left out: held_out of shapes, test of rainbow, train of other sets."""
    reference: tuple[Path, ...] = ()
    """Kept statistics of the true pictures (.npz, one for each network), in place of looking at them."""
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
    bench = loaded(settings.judges)
    references = [kept(path) for path in settings.reference]
    _check(references, bench)
    usable(settings.out)
    shown = open_folder(settings.pictures, settings.convert) if settings.pictures else _drawn(settings, spec, split)
    look = {"cache": settings.out / "seen", "batch": settings.batch, "mesh": mesh}
    seen = observe(shown, bench.extractors, seed=None if settings.pictures else settings.seed, **look)
    true = {each.origin.extractor: each for each in references}
    if not references:
        side = len(shown[0])
        source = sources.open(spec, side, split, settings.data_dir)
        true = observe(OfSource(f"{settings.data}/{split}", source, settings.true_n, side), bench.extractors, **look)
    if settings.keep_reference is not None:
        for name, each in true.items():
            keep(usable(settings.keep_reference) / f"{name.replace(' ', '-')}.npz", each)
    scores = []
    for name, each in true.items():
        scores += judge(seen[name], each, settings.score, settings.seed)
    scores += _of_captions(shown, bench, seen)
    if isinstance(spec, sources.Shapes):
        scores += _attributes(shown, split, settings.held_out, next(iter(seen.values())))
    write_json(settings.out / "scores.json", {"scores": [dataclasses.asdict(score) for score in scores]})
    print(table(scores, settings))


def table(scores: Sequence[Score], settings: Run) -> str:
    """One screen: what was measured, then how."""
    lines = []
    for score in scores:
        error = f" ± {score.error:.3g}" if score.error is not None else ""
        value = f"{score.value:.4g}{error}" if score.value is not None else f"none: {score.missing}"
        lines.append(f"{score.name:22} {value:16} {score.protocol if score.value is not None else ''}".rstrip())
    if settings.judges.inception is None:
        lines.append(
            f"{'FID':22} none: no weights of Inception; experiments.inception converts them, --inception names them"
        )
    return "\n".join([*lines, f"{settings.out / 'scores.json'}: all of it"])


def _check(references: Sequence[Observed], bench: Bench) -> None:
    """Before minutes of drawing: kept statistics are those of the networks at hand."""
    known = {str(extractor): extractor.resize.value for extractor in bench.extractors}
    for each in references:
        if each.origin.extractor not in known:
            have = ", ".join(known)
            raise ValueError(
                f"--reference {each.origin.pictures}: seen by {each.origin.extractor}, and the judges are {have}"
            )
        if sum(other.origin.extractor == each.origin.extractor for other in references) > 1:
            raise ValueError(f"--reference: two of {each.origin.extractor}, and pictures are compared with one set")
        if each.origin.resize != known[each.origin.extractor]:
            raise ValueError(f"--reference {each.origin.pictures}: resized {each.origin.resize}, the judges otherwise")


def _drawn(settings: Run, spec: sources.DataSpec, split: str) -> OfFolder:
    """The cascade's pictures of the split's first captions, one file each, those that are there already left alone."""
    model = with_dtype(load(settings.weights), settings.drawing.dtype)
    model = upto(model, settings.up_to or model.resolutions[0])
    chosen = samplings(model.models, settings.drawing)
    resolution = model.resolutions[-1]
    source = sources.open(spec, resolution, split, settings.data_dir)
    captions = list(captions_of(OfSource(split, source, settings.n)))
    if None in captions:
        raise ValueError(f"{settings.data}: example {captions.index(None)} has no caption to draw")
    # By what the weights are, not where: a folder may have got others since.
    made_of = {"weights": ", ".join(digest_of(each.params) for each in model.models), "resolution": resolution}
    made_of |= {"stages": [to_json(each.stage) for each in model.models], "dtype": settings.drawing.dtype}
    made_of |= {"text": fingerprint(model.text)}
    made_of |= {"seed": settings.seed, "data": settings.data, "split": split, "samplings": list(map(to_json, chosen))}
    folder = settings.out / "drawn"
    _same_run(folder, made_of)
    paths = [folder / f"{number:06d}.png" for number in range(len(captions))]
    pieces = [piece for piece in parts(len(captions)) if not all(paths[i].is_file() for i in piece)]
    with Bars(len(pieces)) as bars, spread(model, mesh_of(settings.drawing.mesh)) as model:
        for piece in pieces:
            texts = captions[piece.start : piece.stop]
            options = {"seed": settings.seed, "first": piece.start, "samplings": chosen, "progress": bars}
            found = dict(cascade.stages(model, texts, batch=32, **options))[resolution]
            for number, picture, text in zip(piece, found, texts):
                files.save_png(paths[number], picture, {"prompt": text})
    return OfFolder(f"{settings.weights.name} at {resolution}", tuple(paths), tuple(captions), "png")


def _same_run(folder: Path, made_of: dict) -> None:
    """ValueError where the folder has the pictures of other settings."""
    note = usable(folder) / "made_of.json"
    if not note.is_file():
        write_json(note, made_of)
    elif json_files.parse(note.read_bytes(), str(note)) != json.loads(json.dumps(made_of)):
        raise ValueError(f"{folder}: has pictures drawn with other settings; name another --out, or delete it")


def _of_captions(shown: PictureSet, bench: Bench, seen: dict[str, Observed]) -> list[Score]:
    """CLIP scores of the pictures that have captions."""
    if bench.clip is None:
        return []
    captions = list(captions_of(shown))
    if None in captions:
        missing = f"picture {captions.index(None)} has no caption"
        return [Score(f"score-{bench.clip.name}", None, "", missing=missing)]
    return judge_captions(captions, embedded(bench.text, captions), seen[str(bench.clip)])


def _attributes(shown: PictureSet, split: str, count: int, seen: Observed) -> list[Score]:
    """The exact reader's verdict on what captions of `shapes` state: of a cascade's drawings, or of a folder whose
    captions are some of the first `count` of the split."""
    name = "attributes right"
    if min(shown[0].shape[:2]) < 64 or shown[0].shape[0] != shown[0].shape[1]:
        return [Score(name, None, "", missing="the reader needs squares of 64 pixels or more")]
    said = (caption(scene(split, number), split, number) for number in range(max(count, len(shown))))
    stated: dict[str | None, Stated] = {each.text: each.stated for each in said}
    captions = list(captions_of(shown))
    if unknown := [text for text in captions if text not in stated]:
        return [Score(name, None, "", missing=f"{len(unknown)} captions are none of the set, such as {unknown[0]!r}")]
    right = [matches(shown[i], stated[text]).right for i, text in enumerate(captions)]
    return [Score(name, float(np.mean(right)), f"n {len(right)}, exact reader, {seen.origin.shown}")]


if __name__ == "__main__":
    run(main)
