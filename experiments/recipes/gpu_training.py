"""GPU report: the shipped 64×64 base, trained on for as long as there is time.

Examples are drawn once (gpu_examples.py), while other sections need the accelerator, and lie in its memory: a network
this small takes them faster than a host can decode files. The averaged parameters are written to OUT/model once a
minute, so that a run that is cut off has them. Afterwards the model samples held-out captions, and the exact reader
counts how many images are right, of one object and of two apart.
"""

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.evaluations.attributes import KINDS, attribute_scores
from experiments.recipes.gpu_examples import DONE, IDS, IMAGES, MASK
from experiments.recipes.gpu_section import Context
from jaxdiff.data.shapes_caption import held_out_captions
from jaxdiff.diffusion.losses import PowerSNR
from jaxdiff.diffusion.time_samplers import LogSNRRange
from jaxdiff.models.diffusion import DiffusionModel, executed
from jaxdiff.models.sampling import TrainedModel
from jaxdiff.systems.imagen import imagen
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.text.encoder import NetworkTextEncoder
from jaxdiff.text.tokenizer import Tokens
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.optimizer import Decay, Muon, OptimizerConfig
from jaxdiff.training.state import TrainState, abstract_state, init_state, placements_of
from jaxdiff.training.step import make_step
from jaxdiff.weights.imagen import load, trained, with_dtype
from jaxdiff.weights.stages import save_model

RESERVE = 5.0
"""Seconds kept for writing the parameters at the end; each caption that is scored takes SCORE beside them."""
SCORE = 0.12
PROBE = 15.0
"""Seconds after which the speed is known, and with it how many updates there is time for."""
CAUTION = 0.9
"""Of the updates that this speed gives, those that are planned: the rate has to reach 0 before the time is over."""
FALL = 0.4
"""Fraction of the updates, the last ones, over which the learning rate falls to 0."""


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
    """Updates; 0: as many as there is time for."""
    learning_rate: float = 2e-3
    """Of Muon, until it falls to 0 over the last part of the updates."""
    ema_decay: float = 0.999
    """Of the averaged parameters, which are kept."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the network computes in."""
    focus: float = 0.75
    """Fraction of the training at log-SNRs of -6 to 2, where forms and places are decided."""
    scored: int = 128
    """Held-out captions of one object, and as many of two, that are sampled at the end; 0: none."""
    first: int = 1_400_000
    """Number of the first scene of `shapes`: the shipped base was trained on those below."""


def remove_examples(out: Path) -> None:
    """Their five gigabytes are of no use to anyone else."""
    for name in (IMAGES, IDS, MASK, DONE):
        (out / name).unlink(missing_ok=True)


def start_drawing(out: Path, weights: Path, settings: Settings, tiny: bool) -> subprocess.Popen:
    """A process that draws the examples into OUT."""
    settings = _rehearsed(settings) if tiny else settings
    (out / DONE).unlink(missing_ok=True)
    options = {"out": out, "weights": weights, "count": settings.examples}
    options |= {"two-objects": settings.two_objects, "first": settings.first}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "experiments.recipes.gpu_examples", *arguments])


def main(context: Context) -> None:
    """Training, then the scores of the trained base and of the shipped one."""
    settings = _rehearsed(context.training) if context.tiny else context.training
    cascade = load(context.weights)
    shipped, *_ = trained(cascade)
    stage = _stage(shipped.model, settings)
    optimizer = OptimizerConfig(Muon(), settings.learning_rate, warmup=100, decay=Decay.CONSTANT)
    mesh = make_mesh(devices=jax.devices()[:1])
    steps = _Steps(stage, optimizer, settings, mesh, abstract_state(stage, optimizer, mesh))
    begun = time.perf_counter()
    program = steps.compiled()
    context.record(compiled_in_s=round(time.perf_counter() - begun, 1), batch=settings.batch, dtype=settings.dtype)
    data = _on_device(context, cascade.text_encoder, settings)
    save = partial(_save, context.out, shipped, settings)
    with jax.set_mesh(mesh):
        state = init_state(stage, optimizer, jax.random.key(0), mesh, shipped.params)
        ema = _trained(context, steps, program, state, data, save)
    save(ema)
    longer = replace(shipped, params=jax.device_get(ema))
    for name, model in (("trained", longer), ("shipped", shipped)):
        if settings.scored:
            context.attempt(f"scores of the {name} base", partial(_score, context, cascade, model, name))


@dataclass(frozen=True)
class _Steps:
    """The training step, compiled for one schedule of the learning rate or another."""

    stage: DiffusionModel
    optimizer: OptimizerConfig
    settings: Settings
    mesh: Mesh
    state: TrainState

    def compiled(self, fall: int = 0, total: int = 0) -> Any:
        """With a constant rate; or one that falls to 0 from the update `fall` to `total`, for a state that is there."""
        optimizer = self.optimizer
        if total:
            optimizer = replace(optimizer, decay=Decay.COSINE, warmup=fall, total=total)
        placements = placements_of(self.state)
        with jax.set_mesh(self.mesh):
            step = make_step(self.stage, optimizer, placements, ema_decay=self.settings.ema_decay)
            batch = self.stage.batch_spec(self.settings.batch, self.stage.side)
            return step.lower(self.state, batch, jax.random.key(0)).compile()


def _rehearsed(settings: Settings) -> Settings:
    return replace(settings, examples=40, batch=4, updates=5, dtype="float32", scored=4)


def _stage(stage: DiffusionModel, settings: Settings) -> DiffusionModel:
    """The shipped stage, trained most where forms are decided, its error weighted alike at all noise levels."""
    return replace(
        executed(stage, dtype=settings.dtype),
        time_sampler=LogSNRRange(-6.0, 2.0, settings.focus, rest=LogSNRRange(-11.0, 4.0)),
        weighting=PowerSNR(0.0),
    )


def _on_device(context: Context, encoder: NetworkTextEncoder, settings: Settings) -> dict[str, jax.Array]:
    """On the device: image (n 64 64 3) uint8, text (n l d) float16 and text_mask (n l)."""
    while not (context.out / DONE).is_file():
        if context.left() <= 0:
            raise TimeoutError("the examples were not drawn in time")
        time.sleep(0.2)
    drawn = json.loads((context.out / DONE).read_text())
    if "error" in drawn:
        raise RuntimeError(f"the examples could not be drawn: {drawn['error']}")
    begun = time.perf_counter()
    ids, mask = np.load(context.out / IDS), np.load(context.out / MASK)
    embeddings = []
    for first in range(0, len(ids), 16_384):
        rows = slice(first, first + 16_384)
        embeddings.append(encoder.embed(Tokens(ids[rows], mask[rows])).tokens.astype(jnp.float16))
    data = {"text": jnp.concatenate(embeddings), "text_mask": jnp.asarray(mask)}
    data["image"] = jnp.asarray(np.load(context.out / IMAGES, mmap_mode="r"))
    jax.block_until_ready(data)
    context.record(examples=len(ids), embedded_and_moved_in_s=round(time.perf_counter() - begun, 1))
    return data


@jax.jit
def _batch(data: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    batch = {name: array[rows] for name, array in data.items()}
    return batch | {"image": batch["image"].astype(jnp.float32) / 127.5 - 1.0}


def _trained(context: Context, steps: _Steps, program: Any, state: TrainState, data: Any, save: Any) -> Any:
    """The averaged parameters at the end: after all updates, or where the time ends."""
    settings, reserve = steps.settings, RESERVE + 2 * SCORE * steps.settings.scored
    rng, key, order = np.random.default_rng(settings.first), jax.random.key(settings.first), np.zeros(0, np.int32)
    log, done, total, fall, falling = _Log(context, settings.batch), 0, settings.updates, 0, None
    # The step with a falling rate is compiled while the first one runs.
    with ThreadPoolExecutor(1) as pool:
        while context.left() > reserve and (not total or done < total):
            if falling is None and (settings.updates or log.seconds > PROBE):
                total = total or done + int(CAUTION * done / log.seconds * (context.left() - reserve))
                fall = done + max(1, int((1 - FALL) * (total - done)))
                falling = pool.submit(steps.compiled, fall, total)
                context.record(updates_planned=total, rate_falls_from=fall)
            if falling is not None and done >= fall and (falling.done() or settings.updates):
                program = falling.result()
            if len(order) < settings.batch:
                order = rng.permutation(len(data["image"])).astype(np.int32)
            rows, order = order[: settings.batch], order[settings.batch :]
            state, metrics = program(state, _batch(data, jnp.asarray(rows)), key)
            done += 1
            if log.add(done, metrics):
                save(state.ema)
    log.flush(done)
    context.record(updates=done, images_seen=done * settings.batch, seconds=round(log.seconds, 1))
    return state.ema


class _Log:
    """Records the mean loss and the speed every ten seconds. Of the device it is at most ten steps ahead."""

    def __init__(self, context: Context, batch: int):
        self._context, self._batch = context, batch
        self._begun = self._flushed = self._saved = time.perf_counter()
        self._losses: list[jax.Array] = []
        self._rate: Any = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def add(self, done: int, metrics: dict[str, jax.Array]) -> bool:
        """Whether a minute has passed since this was last true. FloatingPointError for a loss that is not finite."""
        self._losses.append(metrics["loss"])
        self._rate = metrics["learning_rate"]
        if done % 10 == 0:
            jax.block_until_ready(self._losses[-1])
        now = time.perf_counter()
        if now - self._flushed > 10:
            self.flush(done)
        if now - self._saved < 60:
            return False
        self._saved = now
        return True

    def flush(self, done: int) -> None:
        if not self._losses:
            return
        loss, speed = float(jnp.mean(jnp.stack(self._losses))), len(self._losses) * self._batch
        now = time.perf_counter()
        self._context.record(
            update=done,
            seconds=round(now - self._begun, 1),
            loss=loss,
            learning_rate=float(self._rate),
            images_per_second=round(speed / (now - self._flushed)),
        )
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {done} updates")
        self._losses, self._flushed = [], now


def _save(out: Path, shipped: TrainedModel, settings: Settings, ema: Any) -> None:
    model = replace(_stage(shipped.model, settings), unet=shipped.model.unet)
    save_model(replace(shipped, model=model, params=jax.device_get(ema)), out / "model", "float16")


def _score(context: Context, cascade: Pipeline, model: TrainedModel, name: str) -> None:
    """Of held-out captions of one object and of two: the fraction of images with everything that is stated."""
    base = with_dtype(imagen(cascade.text_encoder, model), "float32")
    count = (_rehearsed(context.training) if context.tiny else context.training).scored
    captions = {objects: held_out_captions(count, objects) for objects in KINDS}
    scores = attribute_scores(base, captions, 3, 32)
    for objects, kind in KINDS.items():
        context.record(
            base=name,
            objects=objects,
            captions=count,
            right=scores[f"attribute_accuracy_64{kind}"],
            attributes=" ".join(f"{k} {v:.3f}" for k, v in scores[f"attributes_64{kind}"].items()),
        )
