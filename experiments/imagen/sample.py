"""Draw pictures from captions with a trained cascade.

    python -m experiments.imagen.sample "a small blue star at the top" "a green heart left of a pink cross" --up-to 256
    python -m experiments.imagen.sample --prompts captions.txt --per-prompt 4 --steps 50,8,8 --guidance 5,1,1

Writes one PNG for each picture and grid.png. The file of a picture is named by its number and the first words of its
prompt, and holds prompt, seed and all settings as JSON in a PNG text called `jaxdiff`. With the shipped cascade on 2
CPU cores a picture takes about a second to 256 pixels and under 20 to 1024, after some 30 of compilation the first
time. `--size 96x64` draws other sizes than 64: multiples of the stride, every stage enlarging them fourfold.

    python -m experiments.imagen.sample "a photo of a red panda" --weights DeepFloyd/IF-I-XL-v1.0 --dtype bfloat16
    python -m experiments.imagen.sample "a watercolour" --weights runs/IF-I runs/IF-II --image photo.jpg --strength 0.6
    python -m experiments.imagen.sample "a straw hat" --weights runs/IF-I runs/IF-II --image photo.jpg --mask hat.png
    python -m experiments.imagen.sample --weights runs/IF-I runs/IF-II --enlarge small.png --tile 256

DeepFloyd IF from a hub id or from folders that diffusers saves, one for each stage. The text encoder runs first and has
left before the generators are loaded; with `--embeddings FILE` it runs once for all times.

On a host of several devices `--mesh data=-1` gives each its own pictures, and `--mesh tensor=-1` each large picture to
all of them, by its rows.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from experiments import texts
from experiments.cli import run
from experiments.imagen import pictures
from experiments.imagen.drawing import (
    Bars,
    Drawing,
    box_of,
    mesh_of,
    size_of,
    spread,
    with_dtype,
    with_samplings,
)
from experiments.imagen.names import Named, save_all
from experiments.imagen.own_pictures import Enlarged, OwnPictures, enlarged
from experiments.imagen.png_metadata import Metadata
from jaxdiff.core.files import usable
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.systems.pipeline import Batch, Pipeline, SampleOptions
from jaxdiff.text.precomputed import PrecomputedTextEncoder, embed_captions
from jaxdiff.weights import captions as captions_file
from jaxdiff.weights.imagen import SHIPPED, load, load_text, trained
from jaxdiff.weights.settings import to_json


@dataclasses.dataclass(frozen=True)
class Run:
    """What to draw, and where to."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Captions to draw; an empty one is drawn without text."""
    prompts: Path | None = None
    """A file with further captions, one on each line, which a line feed ends (UTF-8, or what its byte order mark says);
    empty lines are left out."""
    out: Path = Path("runs/sample")
    """Folder for the pictures."""
    seed: int = 0
    """Of the noise: the same seed, prompts and settings draw the same pictures."""
    per_prompt: int = 1
    """Pictures for each prompt."""
    negative: str = ""
    """A negative prompt: what guidance leads away from."""
    up_to: int | None = None
    """Stop at this resolution (64 | 256 | 1024); the last stage's when left out."""
    size: str = ""
    """Of the base's pictures: SIDE or HEIGHTxWIDTH in pixels, multiples of the stride."""
    batch: int = 16
    """Pictures drawn at once by the base; super-resolution takes a sixteenth of it, at least one."""
    weights: tuple[str, ...] = (str(SHIPPED),)
    """Folder of the cascade; or DeepFloyd IF's pipelines, a folder or hub id (id@revision) for each stage. A published
    stage I brings its stage II."""
    variant: str | None = None
    """Which files of a pipeline to read: fp16, for those with this in their name."""
    clean: bool = True
    """Clean captions for DeepFloyd IF as those that it was trained with."""
    embeddings: Path | None = None
    """A .safetensors file for what the text encoder says of the prompts and the negative one: written where it is
    missing, otherwise read, and then no text encoder is loaded."""
    own: OwnPictures = OwnPictures()
    drawing: Drawing = Drawing()


def main(settings: Run) -> None:
    """Draw pictures from captions with a trained cascade."""
    prompts = prompts_of(settings)
    _check(settings)
    mesh = mesh_of(settings.drawing.mesh)
    loaded = with_dtype(_loaded(settings, prompts), settings.drawing.dtype)
    with spread(with_samplings(loaded, settings.drawing), mesh) as model, Bars(model) as bars:
        enlarging = enlarged(settings.own, model)
        options = _options(settings, model, enlarging, settings.per_prompt * len(prompts))
        batches = model.batches(prompts, options, bars)
        output = _Output(settings, model, prompts, enlarging)
        usable(settings.out)  # only now: bad settings leave no folder behind
        for batch in batches:
            if not output.save(batch):
                break
    output.write_sheet()


def _check(settings: Run) -> None:
    """ValueError for settings that do not go together, before weights are read."""
    if settings.per_prompt < 1:
        raise ValueError(f"nothing to draw: {settings.per_prompt} of each prompt")
    settings.own.check()
    if settings.own.enlarge is not None and settings.size:
        raise ValueError("--size is for what is drawn from text or --image; --enlarge has the size of its picture")
    if settings.embeddings is not None and settings.embeddings.suffix != ".safetensors":
        raise ValueError(f"--embeddings {settings.embeddings}: the file has to end in .safetensors")


def _options(settings: Run, model: Pipeline, enlarging: Enlarged | None, count: int) -> SampleOptions:
    return SampleOptions(
        seed=settings.seed,
        per_prompt=settings.per_prompt,
        negative=settings.negative,
        size=size_of(settings.size) or settings.own.size(model),
        last=box_of(model, settings.up_to),
        batch=settings.batch,
        init=settings.own.begin(model),
        after=None if enlarging is None else enlarging.after(count),
    )


def prompts_of(settings: Run) -> list[str]:
    """The prompts of the command line, then those of the file. ValueError where there is none."""
    prompts = list(settings.prompt)
    for text in (*prompts, settings.negative):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {text!r} is not UTF-8") from error
    if settings.prompts is not None:
        prompts += texts.lines(settings.prompts)
    if not prompts and settings.own.enlarge is not None:
        return [""]
    if not prompts:
        raise ValueError("nothing to draw: give prompts as arguments, or a file of them with --prompts")
    return prompts


def _loaded(settings: Run, prompts: list[str]) -> Pipeline:
    """The cascade, with its text encoder gone again: what it says of the prompts is in its place."""
    options = {"dtype": settings.drawing.dtype, "variant": settings.variant, "clean": settings.clean}
    # Large weights take minutes to read; small ones are there before the bar is. Only for people who watch.
    with tqdm(desc="load", unit="B", unit_scale=True, delay=2, disable=None) as bar:

        def place(array: np.ndarray) -> jax.Array:
            bar.update(array.nbytes)
            return jnp.asarray(array)

        text = _embedded(settings, [*prompts, settings.negative], options | {"place": place})
        return load(settings.weights, text=text, place=place, **options)


def _embedded(settings: Run, captions: list[str], options: dict) -> PrecomputedTextEncoder:
    told = {"weights": settings.weights[:1], "clean": settings.clean, "dtype": settings.drawing.dtype}
    made_by = json.dumps(told | {"variant": settings.variant})
    if settings.embeddings is not None and settings.embeddings.exists():
        found = captions_file.load(settings.embeddings)
        lacking = [caption for caption in captions if caption not in found.captions]
        if found.made_by != made_by:
            other = f"was made by {found.made_by}, not by {made_by}"
            raise ValueError(f"{settings.embeddings} {other}: remove it, or choose another")
        if lacking:
            raise ValueError(f"{settings.embeddings} has no embedding of {lacking[0]!r}: remove it, or choose another")
        return found
    embedded = embed_captions(load_text(settings.weights, **options), captions, made_by)
    if settings.embeddings is not None:
        captions_file.save(settings.embeddings, embedded)
    return embedded


class _Output:
    """The files of the pictures that are drawn, and the sheet of all of them."""

    def __init__(self, settings: Run, model: Pipeline, prompts: list[str], enlarging: Enlarged | None):
        self._settings, self._prompts, self._enlarging = settings, prompts, enlarging
        self._resolution = settings.up_to or model.sides[-1]
        self._samplings = [box.sampling for box in trained(model)]
        self._images: list[Image.Image] = []
        self._failure: OSError | None = None

    def save(self, batch: Batch) -> bool:
        """Saves the last product of a batch; False where that failed and nothing more needs to be drawn."""
        drawn = batch.products[-1]
        if self._enlarging is not None:
            drawn = self._enlarging.cut(drawn)
        self._images += [pictures.scaled(each, 128 if max(each.shape) <= 128 else 256) for each in drawn]
        try:
            save_all(self._settings.out, self._named(batch.first, drawn))
        except OSError as error:  # the sheet may still have room
            self._failure = error
        return self._failure is None

    def write_sheet(self) -> None:
        """Writes grid.png. OSError where that, or saving a picture before, failed."""
        settings, images = self._settings, self._images
        captions = [prompt if prompt.strip() else "(no text)" for prompt in map(self._prompt, range(len(images)))]
        columns = settings.per_prompt if settings.per_prompt > 1 else min(4, len(images))
        try:
            pictures.write(settings.out / "grid.png", pictures.sheet(images, captions, max(images[0].size), columns))
        except OSError as error:
            self._failure = self._failure or error
        if self._failure is not None:
            raise self._failure
        drawn = f"{len(images)} pictures drawn at {self._resolution}"
        print(f"{settings.out / 'grid.png'}: {drawn}, one file each beside it")

    def _prompt(self, number: int) -> str:
        return self._prompts[number // self._settings.per_prompt]

    def _named(self, first: int, drawn: np.ndarray) -> Iterator[Named]:
        """The pictures from number `first` on, for their files."""
        for number, picture in enumerate(drawn, first):
            prompt = self._prompt(number)
            metadata = _metadata(self._settings, self._samplings, prompt, number, self._resolution)
            yield Named(f"{number:04d}", prompt, picture, metadata)


def _metadata(
    settings: Run, samplings: Sequence[SamplingConfig], prompt: str, number: int, resolution: int
) -> Metadata:
    """What the PNG says of itself: enough to draw it again."""
    told = {
        "number": number,
        "per_prompt": settings.per_prompt,
        "negative": settings.negative,
        "up_to": resolution,
        "size": settings.size or None,
        "dtype": settings.drawing.dtype,
        "weights": ["shipped" if place == str(SHIPPED) else place for place in settings.weights],
        "variant": settings.variant,
        "clean": settings.clean,
        "embeddings": settings.embeddings and settings.embeddings.name,
        **{name: getattr(value, "name", value) for name, value in vars(settings.own).items() if value},
        "stages": [to_json(sampling) for sampling in samplings],
    }
    return Metadata(prompt, settings.seed, told)


if __name__ == "__main__":
    run(main)
