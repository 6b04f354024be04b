"""GPU report: further training of the shipped 64×64 base until the time is over.

Examples are rasterised once (gpu_examples.py), while other sections use the accelerator, and are kept in its memory: a
network this small consumes them faster than a host can decode files. The EMA parameters are written to OUT/model once a
minute, so an interrupted run keeps them. Afterwards the model samples held-out captions, and the exact reader scores
the images, separately for one object and for two.
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
"""Seconds reserved for writing the parameters at the end, plus SCORE per scored caption."""
SCORE = 0.12
PROBE = 15.0
"""Seconds after which the speed is measured and the number of updates is planned."""
CAUTION = 0.9
"""Planned fraction of the updates possible at this speed, as the learning rate must reach 0 before the time is over."""
FALL = 0.4
"""Fraction of the updates, at the end, over which the learning rate decays to 0."""


@dataclass(frozen=True)
class Settings:
    """Settings of the further training."""

    examples: int = 400_000
    """Examples to rasterise; they repeat as often as the time allows."""
    two_objects: float = 0.6
    """Fraction of examples with two objects."""
    batch: int = 512
    """Images per update."""
    updates: int = 0
    """Updates; 0: as many as the time allows."""
    learning_rate: float = 2e-3
    """Learning rate of Muon, which decays to 0 over the last updates."""
    ema_decay: float = 0.999
    """Decay of the EMA of the parameters."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type of the network."""
    focus: float = 0.75
    """Fraction of the training at log-SNRs of -6 to 2, which determine shapes and positions."""
    scored: int = 128
    """Held-out captions of one object, and as many of two, to sample at the end; 0: none."""
    first: int = 1_400_000
    """Index of the first scene of `shapes`; the shipped base was trained on lower ones."""


def remove_examples(out: Path) -> None:
    """Delete the examples (5 GB), which nothing else uses."""
    for name in (IMAGES, IDS, MASK, DONE):
        (out / name).unlink(missing_ok=True)


def start_drawing(out: Path, weights: Path, settings: Settings, tiny: bool) -> subprocess.Popen:
    """Start a process that rasterises the examples into OUT."""
    settings = _rehearsed(settings) if tiny else settings
    (out / DONE).unlink(missing_ok=True)
    options = {"out": out, "weights": weights, "count": settings.examples}
    options |= {"two-objects": settings.two_objects, "first": settings.first}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "experiments.recipes.gpu_examples", *arguments])


def main(context: Context) -> None:
    """Train, then score the trained base and the shipped one."""
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
    """The training step, compiled for different learning-rate schedules."""

    stage: DiffusionModel
    optimizer: OptimizerConfig
    settings: Settings
    mesh: Mesh
    state: TrainState

    def compiled(self, fall: int = 0, total: int = 0) -> Any:
        """Compile with a constant rate, or for an existing state with one that decays to 0 from `fall` to `total`."""
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
    """The shipped stage, trained mostly at noise levels that determine shapes, with equal weights at all levels."""
    return replace(
        executed(stage, dtype=settings.dtype),
        time_sampler=LogSNRRange(-6.0, 2.0, settings.focus, rest=LogSNRRange(-11.0, 4.0)),
        weighting=PowerSNR(0.0),
    )


def _on_device(context: Context, encoder: NetworkTextEncoder, settings: Settings) -> dict[str, jax.Array]:
    """Wait for the examples and move them to the device: image (n 64 64 3) uint8, text (n l d) float16, text_mask."""
    while not (context.out / DONE).is_file():
        if context.left() <= 0:
            raise TimeoutError("the examples were not drawn in time")
        time.sleep(0.2)
    examples = json.loads((context.out / DONE).read_text())
    if "error" in examples:
        raise RuntimeError(f"the examples could not be drawn: {examples['error']}")
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
    """Train until all updates are done or the time is over. Returns the EMA parameters."""
    settings, reserve = steps.settings, RESERVE + 2 * SCORE * steps.settings.scored
    rng, key, order = np.random.default_rng(settings.first), jax.random.key(settings.first), np.zeros(0, np.int32)
    log, done, total, fall, falling = _Log(context, settings.batch), 0, settings.updates, 0, None
    # The step with a decaying rate is compiled while the first one runs.
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
    """Records the mean loss and the speed every ten seconds. The host is at most ten steps ahead of the device."""

    def __init__(self, context: Context, batch: int):
        self._context, self._batch = context, batch
        self._begun = self._flushed = self._saved = time.perf_counter()
        self._losses: list[jax.Array] = []
        self._rate: Any = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def add(self, done: int, metrics: dict[str, jax.Array]) -> bool:
        """Add a loss. Returns whether a minute has passed since this was last true. FloatingPointError for a non-finite
        loss."""
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
    """The fraction of images with all stated attributes, for held-out captions of one object and of two."""
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
