"""Compare public weights in jaxdiff with an independent implementation, in PyTorch: the same prompts, noise and steps.

    python -m experiments.verify --weights stable-diffusion-v1-5/ --against diffusers
    python -m experiments.verify --weights sd_xl_base_1.0.safetensors --dtype bfloat16 --size 512 --steps 2
    python -m experiments.verify --weights DeepFloyd/IF-I-M-v1.0 DeepFloyd/IF-II-M-v1.0 --dtype bfloat16
    python -m experiments.verify --weights google/flan-t5-base --against transformers

The tests compare networks with random parameters, which proves the code; this command proves a file. It recognises
T5 and CLIP (compared with transformers), DeepFloyd IF and Stable Diffusion 1, 2 and XL, also for inpainting (compared
with diffusers), as folders, single files or hub ids. Nothing is downloaded for a path.

Each network is compared on the same arrays: text encoders, the U-Net at five noise levels, the autoencoder. Then both
pipelines sample a few steps, each with its own networks. A row of the table is one comparison; it passes if its error
is at most the limit:

    type       networks: largest error / largest value   images: mean error / 255
    float32    5e-4                                      2
    bfloat16   5e-2                                      8

jaxdiff runs first and is freed before the same network of the other is loaded. In float32, DeepFloyd IF's T5-XXL takes
19 GB and SDXL's U-Net 10 GB; bfloat16 takes half. PyTorch runs on the CPU. Stable Diffusion 1 with random weights took
5.7 GiB and 6.6 minutes (`--size 256 --steps 2`, 2 busy CPU cores, jax 0.10.1, torch 2.13.0, 2026-11-27).

Writes report.json, and comparison-HEIGHTxWIDTH.png: both images and their difference. Exit code: 0 if all rows pass, 1
if one fails, 2 for bad input.

Needs `pip install torch diffusers` (transformers is installed with jaxdiff).
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from experiments.cli import Command, run
from experiments.options.sampling import sides_of
from experiments.output.comparison import side_by_side
from experiments.output.folder import folder_for_images
from experiments.verifications.inputs import Inputs
from experiments.verifications.kinds import Kind, recognised
from experiments.verifications.libraries import Against, Libraries, imported
from experiments.verifications.rows import LIMITS, Row
from jaxdiff.core.files import usable, write_json
from jaxdiff.data import grids

OUT = Path("runs/verify")
COLUMNS = f"{'network':14} {'compared':22} {'largest error':>13} {'/ largest':>10} {'mean / 255':>10} {'limit':>7}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Weights, inputs and output."""

    weights: tuple[str, ...] = ()
    """A folder, a safetensors file or a hub id (id@revision); of DeepFloyd IF one for each stage."""
    against: Against | None = None
    """diffusers | transformers; default: the one that has the model."""
    prompt: tuple[str, ...] = ("a photo of a red panda on a mossy branch",)
    """Prompts."""
    negative: str = ""
    """Negative prompt."""
    seed: int = 0
    """Random seed of the noise."""
    steps: int = 4
    """Steps of each pipeline."""
    size: str = ""
    """Size of the first image: SIDE or HEIGHTxWIDTH in pixels; default: the model's own. Smaller is faster."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and computation, of both implementations. Limits: float32 5e-4 for networks and 2/255 for
    images, bfloat16 5e-2 and 8/255."""
    variant: str | None = None
    """Variant of the files, such as fp16 (part of their names)."""
    out: Path | None = None
    """Folder of report.json and the images; default: runs/verify, or the first of runs/verify-2, … without images."""
    overwrite: bool = False
    """Allow a folder that already contains images."""


def command() -> Command:
    return Command(main, Settings(), (main.__doc__ or "").strip())


def main(settings: Settings) -> int:
    """Compare public weights in jaxdiff with diffusers or transformers. A row passes if its error is at most the limit:
    in float32 5e-4 of the largest value for networks, a mean of 2/255 for images; in bfloat16 5e-2 and 8/255."""
    inputs = _inputs(settings)
    kind, places = recognised(settings.weights)
    _check(settings, kind)
    libraries = imported(kind.against, settings.dtype)
    out = folder_for_images(settings.out, OUT, settings.overwrite)
    print(f"{', '.join(settings.weights)}: {kind.title}, jaxdiff against {kind.against}, {settings.dtype}\n\n{COLUMNS}")
    rows = []
    # On accelerators the default precision of float32 is lower.
    with jax.default_matmul_precision("highest" if settings.dtype == "float32" else "default"):
        for row in kind.compare(places, inputs, libraries):
            rows.append(row)
            print(line(row), flush=True)
    _write(usable(out), settings, kind, libraries, rows)
    failed = sum(not row.passed for row in rows)
    verdict = f"FAIL: {failed} of {len(rows)} rows" if failed else f"pass: all {len(rows)} rows"
    print(f"\n{verdict}\n{out}: report.json{' and the images' * any(row.images is not None for row in rows)}")
    return 1 if failed else 0


def line(row: Row) -> str:
    """A row of the table."""
    mean = "" if row.mean is None else f"{row.mean:.3f}"
    numbers = f"{row.largest:13.1e} {row.relative:10.1e} {mean:>10} {row.limit:7g}"
    return (
        f"{row.stage:14} {row.what:22} {numbers}  {'pass' if row.passed else 'FAIL'}{f' ({row.note})' * bool(row.note)}"
    )


def _inputs(settings: Settings) -> Inputs:
    """ValueError for values that no model takes."""
    if not settings.prompt or not all(prompt.strip() for prompt in settings.prompt):
        raise ValueError("--prompt is empty")
    if settings.steps < 1:
        raise ValueError(f"--steps {settings.steps}: at least one")
    if not 0 <= settings.seed < 2**32:
        raise ValueError(f"--seed {settings.seed}: must be at least 0 and below 2**32")
    given = {name: getattr(settings, name) for name in ("negative", "seed", "steps", "dtype", "variant")}
    return Inputs(settings.prompt, size=sides_of(settings.size), **given)


def _check(settings: Settings, kind: Kind) -> None:
    if settings.against not in (None, kind.against):
        raise ValueError(f"--against {settings.against}: {kind.title} is compared with {kind.against}")
    if settings.size and not kind.sampled:
        raise ValueError(f"--size is for models that sample images, not for {kind.title}")


def _write(out: Path, settings: Settings, kind: Kind, libraries: Libraries, rows: list[Row]) -> None:
    versions = {"jax": jax.__version__} | libraries.versions
    given = {
        name: getattr(settings, name) for name in ("prompt", "negative", "seed", "steps", "size", "dtype", "variant")
    }
    report = {
        "weights": settings.weights,
        "family": kind.title,
        "against": kind.against,
        "versions": versions,
        "device": jax.devices()[0].device_kind,
        **given,
        "limits": LIMITS[settings.dtype]._asdict(),
        "rows": [row.values() for row in rows],
        "passed": all(row.passed for row in rows),
    }
    write_json(out / "report.json", report)
    for row in rows:
        if row.images is not None:
            height, width = row.images[0].shape[1:3]
            image = side_by_side(*row.images, kind.against, settings.prompt)
            grids.write(out / f"comparison-{height}x{width}.png", image)


if __name__ == "__main__":
    run(command())
