"""GPU report: the shipped 64×64 base, trained on for as long as there is time.

Examples are drawn once (gpu_examples.py), while other sections need the accelerator, and lie in its memory: a network
this small takes them faster than a host can decode files. The averaged parameters are written to OUT/model once a
minute, so that a run that is cut off has them. Afterwards the model samples held-out captions, and the exact reader
counts how many images are right, of one object and of two apart.
"""

import math
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.imagen.drawing import with_dtype
from experiments.imagen.evaluate import attribute_scores
from experiments.recipes.gpu_examples import DONE, IDS, IMAGES, MASK
from experiments.recipes.gpu_section import Context
from jaxdiff.data.shapes_caption import held_out_captions
from jaxdiff.diffusion.losses import PowerSNR
from jaxdiff.diffusion.schedules import Focused
from jaxdiff.systems.cascade import Cascade, Model
from jaxdiff.systems.imagen import Stage
from jaxdiff.text.t5 import TextEncoder, embed
from jaxdiff.text.tokenizer import Tokens
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import Decay, Muon, OptimizerConfig
from jaxdiff.training.state import abstract_state, init_state
from jaxdiff.training.step import make_step
from jaxdiff.weights.imagen import load, save_model

EVALUATION = 35.0
"""Seconds kept for the scores at the end."""


@dataclass(frozen=True)
class Settings:
    """How the base is trained on."""

    examples: int = 400_000
    """Examples that are drawn; each is seen as often as there is time."""
    two_objects: float = 0.6
    """Fraction of them with two objects."""
    batch: int = 512
    """Images of an update."""
    updates: int = 0
    """Updates, over which the learning rate falls to 0; 0: as many as there is time for, at a constant rate."""
    learning_rate: float = 2e-3
    """Of Muon, at its peak."""
    ema_decay: float = 0.999
    """Of the averaged parameters, which are kept."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the network computes in."""
    focus: float = 0.75
    """Fraction of the training at log-SNRs of -6 to 2, where forms and places are decided."""
    first: int = 1_000_000
    """Number of the first scene of `shapes`: the shipped base was trained on those below."""


def start_drawing(out: Path, settings: Settings, tiny: bool) -> subprocess.Popen:
    """A process that draws the examples into OUT."""
    settings = _rehearsed(settings) if tiny else settings
    (out / DONE).unlink(missing_ok=True)
    arguments = [str(out), str(settings.examples), str(settings.two_objects), str(settings.first)]
    return subprocess.Popen([sys.executable, "-m", "experiments.recipes.gpu_examples", *arguments])


def main(context: Context) -> None:
    """Scores before, training, scores after."""
    settings = _rehearsed(context.training) if context.tiny else context.training
    cascade = load()
    stage = _stage(cascade.base.stage, settings)
    optimizer = OptimizerConfig(
        kind=Muon(),
        learning_rate=settings.learning_rate,
        warmup=min(100, max(settings.updates - 1, 1)),
        total=settings.updates or 2,
        decay=Decay.COSINE if settings.updates else Decay.CONSTANT,
    )
    if not settings.updates:
        optimizer = replace(optimizer, warmup=100)
    mesh = make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(stage, optimizer, mesh)
    placements = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    with jax.set_mesh(mesh):
        step = make_step(stage, optimizer, placements, ema_decay=settings.ema_decay)
        shapes = stage.batch(settings.batch, stage.resolution)
        begun = time.perf_counter()
        program = step.lower(abstract, shapes, jax.random.key(settings.first)).compile()
        context.record(compiled_in_s=round(time.perf_counter() - begun, 1), batch=settings.batch, dtype=settings.dtype)
        data = _on_device(context, cascade.text, settings)
        state = init_state(stage, optimizer, jax.random.key(0), mesh, cascade.base.params)
        ema = _trained(context, program, state, data, settings, partial(_save, context.out, cascade.base, settings))
    _save(context.out, cascade.base, settings, ema)
    trained = replace(cascade.base, params=jax.device_get(ema))
    for name, model in (("trained", trained), ("shipped", cascade.base)):
        context.attempt(f"scores of the {name} base", partial(_score, context, cascade, model, name))


def _rehearsed(settings: Settings) -> Settings:
    return replace(settings, examples=40, batch=4, updates=3, dtype="float32")


def _stage(stage: Stage, settings: Settings) -> Stage:
    """The shipped stage, trained most where forms are decided, its error weighted alike at all noise levels."""
    schedule = stage.schedule.schedule if isinstance(stage.schedule, Focused) else stage.schedule
    everywhere = Focused(schedule, -11.0, 4.0)
    return replace(
        stage,
        unet=replace(stage.unet, dtype=settings.dtype),
        schedule=Focused(everywhere, -6.0, 2.0, settings.focus),
        weighting=PowerSNR(0.0),
    )


def _on_device(context: Context, encoder: TextEncoder, settings: Settings) -> dict[str, jax.Array]:
    """On the device: image (n 64 64 3) uint8, text (n l d) float16 and text_mask (n l)."""
    while not (context.out / DONE).is_file():
        if context.left() <= 0:
            raise TimeoutError("the examples were not drawn in time")
        time.sleep(0.2)
    begun = time.perf_counter()
    ids, mask = np.load(context.out / IDS), np.load(context.out / MASK)
    embeddings = []
    for first in range(0, len(ids), 16_384):
        rows = slice(first, first + 16_384)
        embeddings.append(embed(encoder, Tokens(ids[rows], mask[rows])).embeddings.astype(jnp.float16))
    data = {"text": jnp.concatenate(embeddings), "text_mask": jnp.asarray(mask)}
    data["image"] = jnp.asarray(np.load(context.out / IMAGES, mmap_mode="r"))
    jax.block_until_ready(data)
    context.record(examples=len(ids), embedded_and_moved_in_s=round(time.perf_counter() - begun, 1))
    return data


@jax.jit
def _batch(data: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    batch = {name: array[rows] for name, array in data.items()}
    return batch | {"image": batch["image"].astype(jnp.float32) / 127.5 - 1.0}


def _trained(context: Context, program: Any, state: Any, data: Any, settings: Settings, save: Any) -> Any:
    """The averaged parameters at the end: after `updates`, or where the time ends."""
    rng, key = np.random.default_rng(settings.first), jax.random.key(settings.first)
    order = np.zeros(0, np.int32)
    begun = last = saved = time.perf_counter()
    done = logged = 0
    losses: list[jax.Array] = []
    while not settings.updates or done < settings.updates:
        if len(order) < settings.batch:
            order = rng.permutation(len(data["image"])).astype(np.int32)
        rows, order = order[: settings.batch], order[settings.batch :]
        state, metrics = program(state, _batch(data, jnp.asarray(rows)), key)
        done += 1
        losses.append(metrics["loss"])
        if done % 10 == 0:
            jax.block_until_ready(losses[-1])  # at most ten steps ahead of the device
        now = time.perf_counter()
        if now - last > 10 or done == settings.updates:
            loss = float(jnp.mean(jnp.stack(losses)))
            rate = (done - logged) * settings.batch / (now - last)
            context.record(update=done, seconds=round(now - begun, 1), loss=loss, images_per_second=round(rate))
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} after {done} updates")
            losses, last, logged = [], now, done
        if now - saved > 60:
            save(state.ema)
            saved = now
        if context.left() < EVALUATION:
            break
    seconds = time.perf_counter() - begun
    context.record(updates=done, images_seen=done * settings.batch, seconds=round(seconds, 1))
    return state.ema


def _save(out: Path, shipped: Model, settings: Settings, ema: Any) -> None:
    stage = replace(_stage(shipped.stage, settings), unet=shipped.stage.unet)
    save_model(replace(shipped, stage=stage, params=jax.device_get(ema)), out / "model", "float16")


def _score(context: Context, cascade: Cascade, model: Model, name: str) -> None:
    """Of held-out captions of one object and of two: the fraction of images with everything that is stated."""
    base = with_dtype(Cascade(cascade.text, model), "float32")
    count = 4 if context.tiny else 128
    for objects in (1, 2):
        captions = held_out_captions(count, objects)
        scores = attribute_scores(base, captions, [model.sampling], 3, 32)
        context.record(
            base=name,
            objects=objects,
            captions=count,
            right=scores["attribute_accuracy_64"],
            attributes=" ".join(f"{k} {v:.3f}" for k, v in scores["attributes_64"].items()),
        )
