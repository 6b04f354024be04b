"""GPU report: the shipped cascade samples 64, 256 and 1024 pixels, and the CPU samples the same images."""

import dataclasses
import itertools
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.recipes.gpu_section import Context
from jaxdiff.data.grids import grid, write
from jaxdiff.data.shapes_caption import held_out_captions
from jaxdiff.systems.pipeline import After, Pipeline, SampleOptions, with_boxes
from jaxdiff.text.precomputed import embed_captions
from jaxdiff.weights.imagen import load, trained, with_dtype


def main(context: Context) -> None:
    """Measure the largest difference from the CPU's image; then the time of 1 and 16 images in bfloat16 and float32."""
    model = load(context.weights)
    captions = [c.text for c in held_out_captions(16)]
    counts, up_to = ((1,), 64) if context.tiny else ((16, 1), 1024)
    context.attempt("CPU = accelerator", partial(_same, context, model, captions[:1], 64 if context.tiny else 256))
    for dtype in ("bfloat16", "float32"):
        for count in counts:
            measure = partial(_time, context, with_dtype(model, dtype), captions[:count], dtype, up_to)
            context.attempt(f"{count} images, {dtype}", measure)


def _time(context: Context, model: Pipeline, captions: list[str], dtype: str, up_to: int) -> None:
    first = _seconds(model, captions, up_to)[0]
    total, of_stages, images = _seconds(model, captions, up_to)
    context.record(
        images=len(captions),
        dtype=dtype,
        up_to=up_to,
        seconds=total,
        seconds_per_image=total / len(captions),
        seconds_of_stages=" + ".join(f"{seconds:.3f}" for seconds in of_stages),
        first_call_s=round(first, 1),
    )
    if len(captions) > 1:
        write(context.out / f"sampled-{dtype}.png", grid(images, captions, 256, 4))


def _seconds(model: Pipeline, captions: list[str], up_to: int) -> tuple[float, list[float], Any]:
    """Total seconds, seconds per stage, and the images of the last stage."""
    begun, after = time.perf_counter(), None
    embedded = dataclasses.replace(model, text_encoder=embed_captions(model.text_encoder, captions, ""))
    laps = [time.perf_counter()]
    for box in range(model.sides.index(up_to) + 1):
        (images,) = embedded.sample(captions, SampleOptions(seed=7, last=box, after=after))
        after = After(box, images)
        laps.append(time.perf_counter())
    return laps[-1] - begun, [b - a for a, b in itertools.pairwise(laps)], images


def _same(context: Context, model: Pipeline, captions: list[str], up_to: int) -> None:
    """Check that one seed gives the same images on different devices, within 1e-3 of the range with exact products."""
    sampled = {}
    for name, device in (("cpu", jax.devices("cpu")[0]), ("accelerator", jax.devices()[0])):
        boxes = [dataclasses.replace(m, params=jax.device_put(m.params, device)) for m in trained(model)]
        text = dataclasses.replace(model.text_encoder, params=jax.device_put(model.text_encoder.params, device))
        placed = dataclasses.replace(with_boxes(model, boxes), text_encoder=text)
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            sampled[name] = placed.sample(captions, SampleOptions(seed=7, last=model.sides.index(up_to)))
    for resolution, images, others in zip(model.sides, sampled["cpu"], sampled["accelerator"]):
        error = float(np.abs(images - others).max()) / 2
        context.record(resolution=resolution, largest_difference_of_range=error, within_limits=error < 1e-3)
