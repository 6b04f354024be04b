"""Sample images from captions with a trained pipeline.

    python -m experiments.sample "a small blue star at the top" "a green heart left of a pink cross" --up-to 256
    python -m experiments.sample --prompts captions.txt --per-prompt 4 --steps 50,8,8 --guidance 5,1,1
    python -m experiments.sample "a red mug" --weights runs/base64 --sr runs/sr256

Writes one PNG per image and grid.png (grid-2.png, … beyond 64 images). An image file is named by its number and the
first words of its prompt; it contains prompt, seed and all settings as JSON in a PNG text chunk named `jaxdiff`. With
the shipped cascade on 2 CPU cores an image takes about 1 s to 256 pixels and under 20 s to 1024, plus about 30 s of
compilation the first time. `--size 96x64` samples other sizes than 64, in multiples of the stride; every stage enlarges
them fourfold. `--weights` accepts training runs, finished or not.

    python -m experiments.sample "a photo of a red panda" --weights DeepFloyd/IF-I-XL-v1.0 --dtype bfloat16
    python -m experiments.sample "a watercolour" --weights runs/IF-I runs/IF-II --image photo.jpg --strength 0.6
    python -m experiments.sample "a straw hat" --weights runs/IF-I runs/IF-II --image photo.jpg --mask hat.png
    python -m experiments.sample --weights runs/IF-I runs/IF-II --enlarge small.png --tile 256

DeepFloyd IF is loaded from a hub id or from folders saved by diffusers, one per stage. The text encoder runs first and
is freed before the generators are loaded; `--embeddings FILE` stores the embeddings, so later runs skip it.

    python -m experiments.sample "a red circle" --weights runs/prior runs/decoder --sr runs/upsampler256
    python -m experiments.sample --weights runs/prior runs/decoder --variation-of photo.png --per-prompt 4

DALL·E 2 also starts from embeddings of your own images, without its prior: variations, interpolations and moves along
a difference of captions (`experiments/options/image_embedding.py`).

On a host with several devices `--mesh data=-1` distributes images over them, and `--mesh tensor=-1` splits each large
image by rows.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from experiments.cli import Command, run
from experiments.options import texts
from experiments.options.candidates import CandidateOptions
from experiments.options.hints import HintOptions
from experiments.options.image_embedding import ImageEmbeddingOptions
from experiments.options.init_image import Enlarged, InitImageOptions, enlarged
from experiments.options.sampling import (
    SamplingOptions,
    box_of,
    mesh_of,
    size_of,
    spread,
    warn_of_few_steps,
    with_samplings,
)
from experiments.options.upscaler import UpscalerOptions, enlarged_by, factor_of
from experiments.options.weights import WeightsOptions
from experiments.output.folder import folder_for_images
from experiments.output.names import Named, save_all
from experiments.table import TASKS
from experiments.tasks.task import Task
from jaxdiff.core.files import usable
from jaxdiff.core.products import EmbeddingSpec
from jaxdiff.data import grids
from jaxdiff.data.png_metadata import Metadata
from jaxdiff.data.shapes_caption import WORDS, unknown_words
from jaxdiff.models.autoregressive import TrainedAutoregressive
from jaxdiff.models.prior_codes import TrainedPriorCodes
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.models.token_sampling import TokenSampling
from jaxdiff.systems.bars import Bars
from jaxdiff.systems.pipeline import Batch, Pipeline, SampleOptions
from jaxdiff.text.precomputed import PrecomputedTextEncoder, embed_captions
from jaxdiff.weights import captions as captions_file
from jaxdiff.weights.imagen import SHIPPED
from jaxdiff.weights.settings import to_json

OUT = Path("runs/sample")
PAGE = 64
"""Images per page of the grid."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Prompts and output."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts; an empty one samples without text."""
    prompts: Path | None = None
    """A file with further prompts, one per line ended by a line feed (UTF-8, or the encoding of a byte order mark);
    empty lines are skipped."""
    out: Path | None = None
    """Folder for the images; default: runs/sample, or the first of runs/sample-2, … without images."""
    overwrite: bool = False
    """Allow a folder that already contains images."""
    grid: bool = True
    """Also write grid.png."""
    seed: int = 0
    """Random seed: the same seed, prompts and settings give the same images."""
    per_prompt: int = 1
    """Images per prompt."""
    negative: str = ""
    """Negative prompt for guidance."""
    up_to: int | None = None
    """Stop at this resolution (64 | 256 | 1024); default: the last stage's."""
    size: str = ""
    """Size of the base's images, for latent diffusion of the images: SIDE or HEIGHTxWIDTH in pixels, multiples of the
    stride."""
    batch: int = 16
    """Batch size of the base; super-resolution uses a sixteenth of it, at least 1."""
    embeddings: Path | None = None
    """A .safetensors file with the embeddings of the prompts and the negative prompt: written if missing, otherwise
    read instead of loading the text encoder."""
    pipeline: WeightsOptions = WeightsOptions()
    init: InitImageOptions = InitImageOptions()
    seen: ImageEmbeddingOptions = ImageEmbeddingOptions()
    hints: HintOptions = HintOptions()
    upscaling: UpscalerOptions = UpscalerOptions()
    ranking: CandidateOptions = CandidateOptions()
    sampling: SamplingOptions = SamplingOptions()


def command(tasks: Mapping[str, Task] = TASKS) -> Command:
    """The command. tasks: the models whose runs can be sampled."""
    return Command(partial(main, tasks=tasks), Run(), (main.__doc__ or "").strip())


def main(settings: Run, tasks: Mapping[str, Task]) -> None:
    """Sample images from captions with a trained pipeline."""
    prompts = prompts_of(settings)
    _check(settings)
    mesh = mesh_of(settings.sampling.mesh)
    out = folder_for_images(settings.out, OUT, settings.overwrite)
    upscaler, ranking = settings.upscaling.load(settings.sampling.dtype), settings.ranking.load()
    pipeline = _pipeline(settings, prompts, tasks)
    with spread(with_samplings(pipeline, settings.sampling), mesh) as model, Bars(model) as bars:
        enlarging = enlarged(settings.init, model)
        samples = settings.per_prompt * ranking.candidates
        options = dataclasses.replace(_options(settings, model, enlarging, samples * len(prompts)), per_prompt=samples)
        batches = ranking.best(model.batches(prompts, options, bars), prompts, settings.per_prompt)
        options = dataclasses.replace(options, per_prompt=settings.per_prompt)
        output = _Output(settings, out, model, prompts, enlarging, factor_of(upscaler))
        if upscaler is not None:
            batches = enlarged_by(upscaler, batches, prompts, options)
        warn_of_few_steps(pipeline, model)
        usable(out)  # not earlier, so that bad settings create no folder
        for batch in batches:
            if not output.save(batch):
                break
    output.finish()


def _check(settings: Run) -> None:
    """ValueError for conflicting settings, before weights are read."""
    if settings.per_prompt < 1:
        raise ValueError(f"--per-prompt {settings.per_prompt}: at least one image of each prompt")
    settings.ranking.check()
    settings.init.check()
    settings.seen.check(enlarges=settings.init.enlarge is not None)
    settings.hints.check(settings.pipeline.control)
    if settings.init.enlarge is not None and settings.size:
        raise ValueError("--size is for what is sampled from text or --image; --enlarge has the size of its image")
    if settings.embeddings is not None and settings.embeddings.suffix != ".safetensors":
        raise ValueError(f"--embeddings {settings.embeddings}: the file has to end in .safetensors")


def _options(settings: Run, model: Pipeline, enlarging: Enlarged | None, count: int) -> SampleOptions:
    size = size_of(settings.size, model) or settings.init.size(model)
    last = box_of(model, settings.up_to)
    box = model.boxes[-1 if last is None else last]
    if isinstance(box.produces, EmbeddingSpec):
        raise ValueError(f"the last stage samples {box.produces}, no images: name the run of a decoder after it")
    return SampleOptions(
        seed=settings.seed,
        negative=settings.negative,
        size=size,
        last=last,
        batch=settings.batch,
        init=settings.init.begin(model),
        after=settings.seen.after(model, count // settings.seen.count) if enlarging is None else enlarging.after(count),
        hints=settings.hints.load(model, size),
    )


def prompts_of(settings: Run) -> list[str]:
    """The prompts of the command line, then those of the file. ValueError if there are none."""
    prompts = list(settings.prompt)
    for text in (*prompts, settings.negative):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {text!r} is not UTF-8") from error
    if settings.prompts is not None:
        prompts += texts.lines(settings.prompts)
    if settings.seen.given:
        return settings.seen.prompts(prompts)
    if not prompts and settings.init.enlarge is not None:
        return [""]
    if not prompts:
        raise ValueError("nothing to sample: give prompts as arguments, or a file of them with --prompts")
    return prompts


def _pipeline(settings: Run, prompts: list[str], tasks: Mapping[str, Task]) -> Pipeline:
    """The pipeline with the prompts' embeddings instead of its text encoder, which is freed."""
    weights, dtype = settings.pipeline, settings.sampling.dtype
    if (own := weights.own(tasks)) is not None:
        return own
    _warn_of_unknown_words(settings, prompts)
    return weights.load(tasks, dtype, _embedded(settings, [*prompts, settings.negative, *settings.seen.captions]))


def _warn_of_unknown_words(settings: Run, prompts: Sequence[str]) -> None:
    """Warn once about words that the shipped cascade does not know."""
    if settings.pipeline.weights != (str(SHIPPED),) or settings.pipeline.text is not None:
        return
    if unknown := unknown_words([*prompts, settings.negative]):
        known = ", ".join(sorted(WORDS))
        warnings.warn(
            f"the shipped cascade has never seen {', '.join(map(repr, unknown[:8]))}: it was trained on `shapes` "
            f"alone, whose words are {known}; name other weights with --weights",
            stacklevel=2,
        )


def _embedded(settings: Run, captions: list[str]) -> PrecomputedTextEncoder:
    weights, dtype = settings.pipeline, settings.sampling.dtype
    values = {"weights": weights.weights[:1], "clean": weights.clean, "dtype": dtype, "variant": weights.variant}
    values |= {name: given for name, given in weights.read.items() if name in ("chunks", "prompt_weights", "lora")}
    made_by = json.dumps(values | ({} if weights.text is None else {"text": weights.text}))
    if settings.embeddings is not None and settings.embeddings.exists():
        kept = captions_file.load(settings.embeddings)
        lacking = [caption for caption in captions if caption not in kept.captions]
        if kept.made_by != made_by:
            other = f"was made by {kept.made_by}, not by {made_by}"
            raise ValueError(f"{settings.embeddings} {other}: remove it, or choose another")
        if lacking:
            raise ValueError(f"{settings.embeddings} has no embedding of {lacking[0]!r}: remove it, or choose another")
        return kept
    embedded = embed_captions(weights.load_text(dtype), captions, made_by)
    if settings.embeddings is not None:
        captions_file.save(settings.embeddings, embedded)
    return embedded


class _Output:
    """The files of the images, and the grid of all of them."""

    def __init__(
        self,
        settings: Run,
        out: Path,
        model: Pipeline,
        prompts: list[str],
        enlarging: Enlarged | None,
        factor: int = 1,
    ):
        self._settings, self._out, self._prompts, self._enlarging = settings, out, prompts, enlarging
        self._up_to = settings.up_to or model.sides[-1]
        self._resolution = self._up_to * factor
        sampled = TrainedModel | TrainedAutoregressive | TrainedPriorCodes
        self._samplings = [box.sampling for box in model.boxes if isinstance(box, sampled)]
        self._images: list[Image.Image] = []
        self._failure: OSError | None = None

    def save(self, batch: Batch) -> bool:
        """Save the last product of a batch; False if it failed and sampling should stop."""
        images = batch.products[-1]
        if self._enlarging is not None:
            images = self._enlarging.cut(images)
        if self._settings.grid:
            self._images += [grids.scaled(each, 128 if max(each.shape) <= 128 else 256) for each in images]
        try:
            save_all(self._out, self._named(batch.first, images))
        except OSError as error:  # the grid may still have room
            self._failure = error
        return self._failure is None

    def finish(self) -> None:
        """Write the pages of the grid. OSError if this or an earlier save failed."""
        for first in range(0, len(self._images), PAGE):
            page = self._images[first : first + PAGE]
            captions = [self._prompt(number) or "(no text)" for number in range(first, first + len(page))]
            per_prompt = self._settings.per_prompt
            columns = per_prompt if 1 < per_prompt <= 16 else min(8 if len(page) > 16 else 4, len(page))
            name = "grid.png" if not first else f"grid-{first // PAGE + 1}.png"
            try:
                grids.write(self._out / name, grids.sheet(page, captions, max(self._images[0].size), columns))
            except OSError as error:
                self._failure = self._failure or error
        if self._failure is not None:
            raise self._failure
        count = self._settings.per_prompt * len(self._prompts)
        pages = -(-len(self._images) // PAGE)
        grid = {0: "no grid", 1: "grid.png beside them"}.get(pages, f"grid.png to grid-{pages}.png beside them")
        print(f"{self._out}: {count} images at {self._resolution} pixels, {grid}")

    def _prompt(self, number: int) -> str:
        return self._prompts[number // self._settings.per_prompt].strip()

    def _named(self, first: int, images: np.ndarray) -> Iterator[Named]:
        """The images with their file names and metadata, numbered from `first`."""
        for number, image in enumerate(images, first):
            prompt = self._prompts[number // self._settings.per_prompt]
            metadata = _metadata(self._settings, self._samplings, prompt, number, self._up_to)
            yield Named(f"{number:04d}", prompt, image, metadata)


def _metadata(
    settings: Run, samplings: Sequence[SamplingConfig | TokenSampling], prompt: str, number: int, resolution: int
) -> Metadata:
    """The metadata of a PNG, sufficient to reproduce it."""
    weights = settings.pipeline
    values = {
        "number": number,
        "per_prompt": settings.per_prompt,
        "negative": settings.negative,
        "up_to": resolution,
        "size": settings.size or None,
        "dtype": settings.sampling.dtype,
        "weights": weights.names,
        "text": weights.text,
        "variant": weights.variant,
        "clean": weights.clean,
        **weights.read,
        "embeddings": settings.embeddings and settings.embeddings.name,
        **{name: getattr(value, "name", value) for name, value in vars(settings.init).items() if value},
        **settings.seen.shown,
        **settings.hints.shown,
        **settings.ranking.shown,
        **({"upscaler": settings.upscaling.upscaler} if settings.upscaling.upscaler else {}),
        "stages": [to_json(sampling) for sampling in samplings],
    }
    return Metadata(prompt, settings.seed, values)


if __name__ == "__main__":
    run(command())
