"""Draw pictures from captions with a trained cascade.

    python -m experiments.imagen.sample "a small blue star at the top" "a green heart left of a pink cross" --up-to 256
    python -m experiments.imagen.sample --prompts captions.txt --per-prompt 4 --steps 50,8,8 --guidance 5,1,1

Writes one PNG for each picture, with its prompt, seed and all settings as PNG text, and grid.png. With the shipped
cascade on 2 CPU cores a picture takes about a second to 256 pixels and under 20 to 1024, after some 30 of compilation
the first time. `--size 96x64` draws other sizes than 64: multiples of the stride, every stage enlarging them fourfold.
"""

import dataclasses
import json
import re
from collections import deque
from pathlib import Path

import numpy as np
import tyro

from experiments.cli import run
from experiments.imagen import pictures
from experiments.imagen.drawing import Bars, Drawing, parts, samplings, size_of, usable, with_dtype
from jaxdiff.systems import cascade
from jaxdiff.systems.cascade import Cascade
from jaxdiff.systems.imagen import Sampling
from jaxdiff.weights.imagen import SHIPPED, load
from jaxdiff.weights.settings import to_json


@dataclasses.dataclass(frozen=True)
class Run:
    """What to draw, and where to."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Captions to draw; an empty one is drawn without text."""
    prompts: Path | None = None
    """A file with further captions, one on each line; empty lines are left out."""
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
    weights: Path = SHIPPED
    """Folder of the cascade."""
    drawing: Drawing = Drawing()


def main(settings: Run) -> None:
    """Draw pictures from captions with a trained cascade."""
    prompts = prompts_of(settings)
    model = with_dtype(load(settings.weights), settings.drawing.dtype)
    chosen = samplings(model.models, settings.drawing)
    if settings.per_prompt < 1:
        raise ValueError(f"nothing to draw: {settings.per_prompt} of each prompt")
    prompts = [prompt for prompt in prompts for _ in range(settings.per_prompt)]
    pieces = parts(len(prompts))
    images, captions = [], []
    with Bars(len(pieces)) as bars:
        for piece in pieces:
            resolution, drawn = _last(settings, model, chosen, prompts[piece.start : piece.stop], piece.start, bars)
            for number, picture in enumerate(drawn, piece.start):
                prompt = prompts[number]
                information = _information(settings, chosen, prompt, number, resolution)
                pictures.save_png(settings.out / f"{number:04d}{_slug(prompt)}.png", picture, information)
                images.append(pictures.scaled(picture, 128 if max(picture.shape) <= 128 else 256))
                captions.append(prompt if prompt.strip() else "(no text)")
    columns = settings.per_prompt if settings.per_prompt > 1 else min(4, len(images))
    pictures.write(settings.out / "grid.png", pictures.sheet(images, captions, max(images[0].size), columns))
    print(f"{settings.out / 'grid.png'}: {len(images)} pictures drawn at {resolution}, one file each beside it")


def prompts_of(settings: Run) -> list[str]:
    """The prompts of the command line, then those of the file. ValueError where there is none."""
    prompts = list(settings.prompt)
    if settings.prompts is not None:
        try:
            lines = settings.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{settings.prompts}: not UTF-8 ({error})") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("nothing to draw: give prompts as arguments, or a file of them with --prompts")
    return prompts


def _last(
    settings: Run, model: Cascade, chosen: tuple[Sampling, ...], prompts: list[str], start: int, bars: Bars
) -> tuple[int, np.ndarray]:
    """The resolution and the pictures of the last stage that is asked for."""
    drawn = cascade.stages(
        model,
        prompts,
        seed=settings.seed,
        first=start,
        negative=settings.negative,
        up_to=settings.up_to,
        samplings=chosen,
        size=size_of(settings.size),
        batch=settings.batch,
        progress=bars,
    )
    usable(settings.out)  # only now: bad settings leave no folder behind
    return deque(drawn, maxlen=1).pop()


def _information(
    settings: Run, chosen: tuple[Sampling, ...], prompt: str, number: int, resolution: int
) -> dict[str, str]:
    """What the PNG says of itself: enough to draw it again."""
    told = {
        "number": number,
        "per_prompt": settings.per_prompt,
        "negative": settings.negative,
        "up_to": resolution,
        "size": settings.size or None,
        "dtype": settings.drawing.dtype,
        "weights": str(settings.weights),
        "stages": [to_json(sampling) for sampling in chosen],
    }
    return {"prompt": prompt, "seed": str(settings.seed), "settings": json.dumps(told)}


def _slug(prompt: str) -> str:
    """The prompt's first words as part of a file name."""
    words = re.findall(r"\w+", prompt.lower())
    return "".join(f"-{word}" for word in words)[:60].rstrip("-")


if __name__ == "__main__":
    run(main)
