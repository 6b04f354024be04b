"""Train a classifier of `shapes`, whose 64 features stand in for Inception's: FD-shapes, never to be called FID.

    python -m experiments.classifier --out runs/classifier

Takes about ten minutes on one CPU core. It says of one object its kind, colour, fill, size and place, and of every
picture its background and how many objects there are. OUT/model is what `--classifier` of other scripts reads; the
package ships one (jaxdiff/weights/tiny/README.md).
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import run
from experiments.cores import use_cores
from jaxdiff.data import sources
from jaxdiff.data.pipeline import Batches, DataConfig, image_batches
from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, FILLS, KINDS, POSITIONS, SIZES, Scene, scene
from jaxdiff.models.classifier import ClassifierTraining, of_size_one
from jaxdiff.nets.classifier import ClassifierConfig
from jaxdiff.training.distributed import on_process_0, once
from jaxdiff.training.lock import locked
from jaxdiff.training.loop import Diverged, TrainConfig, train
from jaxdiff.training.optimizer import AdamW, OptimizerConfig
from jaxdiff.weights import classifier

OF_ONE = {"kind": KINDS, "colour": tuple(COLOURS), "fill": FILLS, "size": tuple(SIZES), "position": POSITIONS}
OF_ALL = {"background": tuple(BACKGROUNDS), "objects": ("1", "2")}
ATTRIBUTES = OF_ONE | OF_ALL


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of one training run."""

    out: Path = Path("runs/classifier")
    """Folder of the run."""
    side: int = 64
    """Side of the pictures that it sees, in pixels."""
    features: int = 64
    """Width of its features."""
    steps: int = 3000
    """Updates."""
    batch: int = 64
    """Pictures per update."""
    learning_rate: float = 2e-3
    """At its peak."""
    noise: float = 0.1
    """The most noise on the pictures, of a range of 2."""
    save_every: int = 500
    """Steps between checkpoints."""
    seed: int = 0
    """Of the initial parameters, the order of the data and the noise."""
    examples: int = 20_000
    """How many pictures of shapes to draw."""
    held_out: int = 1_000
    """How many held-out ones beside them."""
    dtype: Literal["float32", "float16"] = "float32"
    """What the finished parameters are stored in."""
    data_dir: Path = Path("runs/data")
    """Where prepared data sets live."""


def main(settings: Run) -> None:
    """Train a classifier of `shapes` and write it to OUT/model."""
    with locked(settings.out):
        train_classifier(settings)


def train_classifier(settings: Run) -> None:
    """All of it, in a folder that is this run's alone."""
    if settings.steps < 1 or settings.batch < 1:
        raise ValueError(f"steps {settings.steps}, batch {settings.batch}: both must be at least 1")
    use_cores(settings.batch)
    config = ClassifierConfig(
        side=settings.side,
        features=settings.features,
        names=tuple(ATTRIBUTES),
        classes=tuple(map(len, ATTRIBUTES.values())),
    )
    spec = sources.Shapes(settings.examples, settings.held_out)
    source = once(settings.data_dir, lambda: sources.open(spec, settings.side, "train", settings.data_dir))
    stream = image_batches(source, DataConfig(settings.side, settings.batch, seed=settings.seed, captions=True))
    training = TrainConfig(
        optimizer=OptimizerConfig(
            kind=AdamW(weight_decay=0.05, decay_all=False),
            learning_rate=settings.learning_rate,
            warmup=min(100, settings.steps - 1),
            total=settings.steps,
        ),
        steps=settings.steps,
        ema_decay=0.995,
        save_every=settings.save_every,
        seed=settings.seed,
        description="classifier",
    )
    made_of = {"examples": len(source), "batch": settings.batch}
    state = train(
        ClassifierTraining(config, settings.noise),
        Labelled(stream),
        training,
        settings.out,
        data=made_of,
    )
    in_order = DataConfig(settings.side, min(512, len(source)), shuffle=False, repeat=False)
    some = next(image_batches(source, in_order))["image"]

    def finish() -> None:
        params = of_size_one(config, jax.device_get(state.ema), jnp.asarray(some))
        classifier.save(settings.out / "model", "shapes", config, params, settings.dtype)

    on_process_0(finish)
    print(f"{settings.out / 'model'}: a classifier of {', '.join(ATTRIBUTES)} with {settings.features} features")


def labels(true: Scene) -> list[int]:
    """The class of each attribute; -1 for those of one object where there are two."""
    values = {"background": true.background, "objects": str(len(true.objects))}
    if len(true.objects) == 1:
        values |= {name: getattr(true.objects[0], name) for name in OF_ONE}
    return [classes.index(values[name]) if name in values else -1 for name, classes in ATTRIBUTES.items()]


class Labelled:
    """Batches of training pictures with their labels, which are those of the scene in the same place of the set."""

    def __init__(self, stream: Batches):
        self._stream = stream

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._stream)
        found = np.array([labels(scene("train", int(index))) for index in batch["index"]], np.int32)
        return {"image": batch["image"], "labels": found}

    def get_state(self) -> dict:
        return self._stream.get_state()

    def set_state(self, state: dict) -> None:
        self._stream.set_state(state)


if __name__ == "__main__":
    run(main, stopped_by=(Diverged,))
