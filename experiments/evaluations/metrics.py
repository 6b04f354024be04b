"""Every metric of images against true ones: FID, KID, CMMD, precision and recall, CLIP score, IS.

    python -m experiments.evaluate metrics                                  # the shipped cascade on held-out `shapes`
    python -m experiments.evaluate metrics --weights runs/cascade --up-to 256 --n 1000 --out runs/scores
    python -m experiments.evaluate metrics --images FOLDER --data folder:photos --fit crop --inception FILE
    python -m experiments.evaluate metrics --keep-reference runs/reference  # then --reference runs/reference/*.npz

Samples the first n captions of the data split (or reads a folder of images), computes the features of these and of the
split's images by all networks in one pass, and prints a table. OUT/scores.json has every number with its protocol.
Started again with the same folder, it resumes. The shipped cascade takes about four minutes at 64 pixels on 2 CPU
cores. Metrics of other networks are named after them: FD-shapes is the Fréchet distance of the shipped classifier of
`shapes`; only that of Inception is called FID.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.options.metric_networks import MetricNetworks, Networks, loaded
from experiments.options.sampling import SamplingOptions, mesh_of, spread, with_samplings
from experiments.options.weights import WeightsOptions
from experiments.tasks.task import Task
from jaxdiff.core import json_files
from jaxdiff.core.files import usable, write_json
from jaxdiff.core.trees import digest_of
from jaxdiff.data import grids, sources, zipped
from jaxdiff.data.example import Source
from jaxdiff.data.images import Unreadable
from jaxdiff.data.png_metadata import Metadata
from jaxdiff.data.shapes_caption import Stated, caption
from jaxdiff.data.shapes_scene import scene
from jaxdiff.evaluation.attributes import matches
from jaxdiff.evaluation.features import pooled_text
from jaxdiff.evaluation.image_sets import (
    CROP_THEM,
    CroppedImages,
    ImageFiles,
    ImageSet,
    SourceImages,
    captions_of,
    open_folder,
    without_captions,
)
from jaxdiff.evaluation.metrics import (
    MetricSettings,
    Observed,
    Score,
    caption_metrics,
    keep,
    kept,
    metrics_of,
    require_alike,
    seen_by,
)
from jaxdiff.evaluation.observe import observe
from jaxdiff.evaluation.resize import Fit
from jaxdiff.evaluation.statistics import Origin
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.bars import Bars
from jaxdiff.systems.pipeline import Pipeline, SampleOptions, up_to
from jaxdiff.weights.settings import to_json


@dataclasses.dataclass(frozen=True)
class Settings:
    """Images, reference and networks."""

    out: Path = Path("runs/evaluate")
    """Folder for scores.json, sampled images and cached features."""
    images: Path | None = None
    """A folder or zip of images to measure; default: samples of a pipeline."""
    convert: bool = False
    """Also accept grayscale and transparent images, converted to RGB on white."""
    fit: Literal["squeeze", "crop"] | None = None
    """Preprocessing of both datasets: squeeze full images to the network's square (as pytorch-fid and clean-fid do;
    requires equal sizes), or crop the centre, resized to the measured images' shortest side as in training. Default:
    squeeze for --images, crop for a pipeline."""
    up_to: int | None = None
    """Resolution to measure; default: the base's."""
    data: str = "shapes"
    """The true images: shapes | emoji | rainbow | folder:PATH (or a zip) | hf:PATH | tfds:NAME | records:PATH"""
    split: str | None = None
    """Split of the data; default: held_out of shapes, test of rainbow, train of other datasets."""
    reference: tuple[Path, ...] = ()
    """Saved statistics of the true images, instead of computing them: .npz of --keep-reference, one per network; mu and
    sigma (.npz) or features (.npz, .npy) of other programs."""
    keep_reference: Path | None = None
    """Save the statistics of the true images to this folder, for --reference."""
    n: int = 512
    """Number of images to sample."""
    true_n: int = 0
    """Number of true images, from the first; 0: all of the split."""
    examples: int = 20_000
    """Images in the training split of `shapes`."""
    held_out: int = 1_000
    """Images in the held-out split of `shapes`."""
    seed: int = 0
    """Seed of the sampling noise and of random subsets."""
    batch: int = 64
    """Batch size of the networks."""
    networks: MetricNetworks = MetricNetworks()
    score: MetricSettings = MetricSettings()
    pipeline: WeightsOptions = WeightsOptions()
    sampling: SamplingOptions = SamplingOptions()
    data_dir: Path = Path("runs/data")
    """Folder of prepared datasets."""


def main(settings: Settings, tasks: Mapping[str, Task]) -> None:
    """FID, KID, CMMD, precision and recall, CLIP score, IS of a pipeline, a folder or a zip, in one pass."""
    if settings.n < 2 or settings.true_n < 0 or settings.true_n == 1 or settings.batch < 1:
        raise ValueError(f"--n {settings.n}, --true-n {settings.true_n}, --batch {settings.batch}: too few")
    spec, mesh = sources.parse(settings.data), mesh_of(settings.sampling.mesh)
    if isinstance(spec, sources.Shapes):
        spec = sources.Shapes(settings.examples, settings.held_out)
    split = settings.split or {sources.Shapes: "held_out", sources.Rainbow: "test"}.get(type(spec), "train")
    if settings.reference and settings.keep_reference is not None:
        raise ValueError("--keep-reference and --reference: give one of them; --reference replaces the true images")
    networks = loaded(settings.networks)
    fit = Fit(settings.fit or ("squeeze" if settings.images else "crop"))
    if settings.images:
        shown = _fitted(open_folder(settings.images, settings.convert, fit=fit), fit)
        width, height = _size(shown)
    else:
        model = _model(settings, tasks)
        width = height = model.sides[-1]
    references = _references(settings, networks, fit, f"{width}x{height}")
    true_set = None if references else _true_set(settings, spec, split, fit, (width, height))
    usable(settings.out)
    if not settings.images:
        shown = _fitted(_sampled(settings, model, spec, split), fit)
    look = {"cache": settings.out / "seen", "batch": settings.batch, "mesh": mesh}
    seen = observe(shown, networks.extractors, seed=None if settings.images else settings.seed, **look)
    true = {each.origin.extractor: each for each in references}
    if true_set is not None:
        true = observe(true_set, networks.extractors, **look)
    if settings.keep_reference is not None:
        for name, each in true.items():
            keep(usable(settings.keep_reference) / f"{name.replace(' ', '-')}.npz", each)
    scores = []
    for name, each in true.items():
        scores += metrics_of(seen[name], each, settings.score, settings.seed)
    scores += _of_captions(shown, networks, seen, settings.networks.before)
    if isinstance(spec, sources.Shapes):
        scores += _attributes(shown, split, settings.held_out, next(iter(seen.values())))
    write_json(settings.out / "scores.json", {"scores": [dataclasses.asdict(score) for score in scores]})
    print(table(scores, settings))


def table(scores: Sequence[Score], settings: Settings) -> str:
    """The scores with their protocols, one screen."""
    lines = []
    for score in scores:
        error = f" ± {score.error:.3g}" if score.error is not None else ""
        error += f" (subsets ± {score.deviation:.3g})" if score.deviation is not None else ""
        value = f"{score.value:.4g}{error}" if score.value is not None else f"none: {score.missing}"
        lines.append(f"{score.name:22} {value:16} {score.protocol if score.value is not None else ''}".rstrip())
    if settings.networks.inception is None:
        lines.append(
            f"{'FID':22} none: give Inception's weights with --inception (experiments.export inception converts them)"
        )
    return "\n".join([*lines, f"{settings.out / 'scores.json'}: all of it"])


def _references(settings: Settings, networks: Networks, fit: Fit, size: str) -> list[Observed]:
    """Load --reference. ValueError, before any sampling, if it is of other networks or of another preprocessing."""
    networks = {str(extractor): extractor for extractor in networks.extractors}
    references = []
    for path in settings.reference:
        each = kept(path)
        if each.origin.protocol_unknown:
            each = seen_by(each, [(name, extractor.width) for name, extractor in networks.items()])
        name = each.origin.extractor
        if name not in networks:
            raise ValueError(f"--reference {path}: seen by {name}, and the networks are {', '.join(networks)}")
        if any(other.origin.extractor == name for other in references):
            raise ValueError(f"--reference: two files of {name}; give one per network")
        measured = Origin("the measured images", "", name, networks[name].resize.value, fit=fit.value, size=size)
        try:
            require_alike(measured, each.origin)
        except ValueError as error:
            raise ValueError(f"--reference {path}: {error}; recompute it, or use the same settings") from error
        references.append(each)
    return references


def _fitted(shown: ImageFiles, fit: Fit) -> ImageSet:
    return shown if fit is Fit.SQUEEZE else CroppedImages(shown, shown.shortest or min(_size(shown)))


def _size(shown: ImageSet) -> tuple[int, int]:
    """Width and height of the first image."""
    height, width = shown[0].shape[:2]
    return width, height


def _source(settings: Settings, spec: sources.DataSpec, side: int, split: str) -> Source:
    if isinstance(spec, sources.Folder) and zipped.is_zip(spec.path):
        return zipped.read(spec.path)
    return sources.open(spec, side, split, settings.data_dir)


def _true_set(settings: Settings, spec: sources.DataSpec, split: str, fit: Fit, size: tuple[int, int]) -> ImageSet:
    """The true images, preprocessed and checked like the measured ones of this width and height. ValueError for images
    of another size, unless both are cropped."""
    uncropped: ImageSet
    if isinstance(spec, sources.Folder):
        if split != "train":
            raise ValueError(f"{settings.data} has only the split 'train', not {split!r}")
        uncropped = open_folder(spec.path, settings.convert, settings.true_n, fit)
    else:
        source = _source(settings, spec, min(size), split)
        uncropped = SourceImages(f"{settings.data}/{split}", source, settings.true_n, settings.convert)
    if fit is Fit.CROP:
        return CroppedImages(uncropped, min(size))
    if (true_size := _first_size(uncropped)) not in (None, size):
        sizes = " and ".join(f"{width}x{height}" for width, height in (size, true_size))
        raise ValueError(f"the measured images and {uncropped.name} are of different size: {sizes}; {CROP_THEM}")
    return uncropped


def _first_size(shown: ImageSet) -> tuple[int, int] | None:
    """Width and height of the first image; None if it is unreadable."""
    try:
        return _size(shown)
    except (Unreadable, OSError):
        return None


def _model(settings: Settings, tasks: Mapping[str, Task]) -> Pipeline:
    model = settings.pipeline.load(tasks, settings.sampling.dtype)
    return up_to(model, settings.up_to or min(model.image_boxes))


def _sampled(settings: Settings, model: Pipeline, spec: sources.DataSpec, split: str) -> ImageFiles:
    """Sample the split's first captions to one file each, skipping existing files."""
    model = with_samplings(model, settings.sampling)
    resolution = model.sides[-1]
    source = _source(settings, spec, resolution, split)
    captions = list(captions_of(SourceImages(split, source, settings.n)))
    if None in captions:
        raise ValueError(f"{settings.data}: example {captions.index(None)} has no caption to sample from")
    # Weights are identified by digests, not by paths, as the contents of a folder may change.
    models = [box for box in model.boxes if isinstance(box, TrainedModel)]
    digests = ", ".join(digest_of(getattr(box, "params", ())) for box in model.boxes)
    provenance = {"weights": digests, "resolution": resolution, "dtype": settings.sampling.dtype}
    provenance |= {"stages": [to_json(each.model) for each in models]}
    provenance |= {"samplings": [to_json(each.sampling) for each in models]}
    provenance |= {"text": None if model.text_encoder is None else model.text_encoder.fingerprint}
    provenance |= {"seed": settings.seed, "data": settings.data, "split": split}
    folder = settings.out / "images"
    _same_run(folder, provenance)
    paths = [folder / f"{number:06d}.png" for number in range(len(captions))]
    pieces = list(_runs(number for number, path in enumerate(paths) if not path.is_file()))
    with spread(model, mesh_of(settings.sampling.mesh)) as placed, Bars(placed, len(pieces)) as bars:
        for piece in pieces:
            options = SampleOptions(seed=settings.seed, first=piece.start, batch=32)
            for first, products in placed.batches(captions[piece.start : piece.stop], options, bars):
                for number, image in enumerate(products[-1], piece.start + first):
                    values = {"number": number, "resolution": resolution, "data": settings.data, "split": split}
                    grids.save_png(paths[number], image, Metadata(captions[number], settings.seed, values))
    name = " + ".join(Path(place).name for place in settings.pipeline.names)
    return ImageFiles(f"{name} at {resolution}", tuple(paths), tuple(captions), "png")


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Group ascending numbers into ranges without gaps."""
    for _, pairs in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        each = [number for _, number in pairs]
        yield range(each[0], each[-1] + 1)


def _same_run(folder: Path, provenance: dict) -> None:
    """ValueError if the folder has images sampled with other settings."""
    note = usable(folder) / "made_of.json"
    if not note.is_file():
        write_json(note, provenance)
    elif json_files.parse(note.read_bytes(), str(note)) != json.loads(json.dumps(provenance)):
        raise ValueError(f"{folder}: has images sampled with other settings; name another --out, or delete it")


def _of_captions(shown: ImageSet, networks: Networks, seen: dict[str, Observed], prefix: str) -> list[Score]:
    """CLIP scores of the images that have captions."""
    if networks.clip is None:
        return []
    captions = list(captions_of(shown))
    if missing := without_captions(captions):
        return [Score(f"score-{networks.clip.name}", None, "", missing=missing)]
    text = pooled_text(networks.text, [prefix + caption for caption in captions])
    return caption_metrics(captions, text, seen[str(networks.clip)], prefix)


def _attributes(shown: ImageSet, split: str, count: int, seen: Observed) -> list[Score]:
    """Attribute accuracy by the exact reader on captions of `shapes`: for a pipeline's images, or a folder whose
    captions are among the first `count` of the split. One score for captions of one object, one for those of two."""
    name = "attributes right"
    if min(shown[0].shape[:2]) < 64 or shown[0].shape[0] != shown[0].shape[1]:
        return [Score(name, None, "", missing="the reader needs squares of 64 pixels or more")]
    known = (caption(scene(split, number), split, number) for number in range(max(count, len(shown))))
    stated: dict[str | None, Stated] = {each.text: each.stated for each in known}
    captions = list(captions_of(shown))
    if missing := without_captions(captions):
        return [Score(name, None, "", missing=missing)]
    if unknown := [text for text in captions if text not in stated]:
        return [Score(name, None, "", missing=f"{len(unknown)} captions are not in the split, such as {unknown[0]!r}")]
    right: dict[int, list[bool]] = {}
    for number, text in enumerate(captions):
        right.setdefault(len(stated[text].objects), []).append(matches(shown[number], stated[text]).right)
    scores = []
    for objects, each in sorted(right.items()):
        name = f"attributes, {objects} object{'s' if objects > 1 else ''}"
        scores.append(Score(name, float(np.mean(each)), f"n {len(each)}, exact reader, {seen.origin.shown}"))
    return scores
