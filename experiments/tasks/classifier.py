"""Training a classifier of `shapes`, whose 64 features replace Inception's in FD-shapes (never called FID).

    python -m experiments.train classifier --out runs/classifier

Takes about ten minutes on one CPU core. It predicts background and number of objects of every image, and kind, colour,
fill, size and position of a single object. `--classifier` of other commands reads OUT/model; the package ships one
(jaxdiff/weights/tiny/README.md).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.options.training import OptimizerOptions, Rule, RunOptions, TrainSettings
from experiments.tasks.held_out import held_out_source, in_full_batches
from experiments.tasks.task import Inference, Start, Task, Work
from jaxdiff.data import sources
from jaxdiff.data.mixture import Spread
from jaxdiff.data.pipeline import Batches, DataConfig, image_batches
from jaxdiff.data.shapes_scene import BACKGROUNDS, COLOURS, FILLS, KINDS, POSITIONS, SIZES, Scene, scene
from jaxdiff.models.classifier import ClassifierTraining, of_size_one
from jaxdiff.nets.classifier import Classifier, ClassifierConfig
from jaxdiff.training.distributed import once
from jaxdiff.training.held_out import HeldOutBatches
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.state import Params
from jaxdiff.weights import classifier

OF_ONE = {"kind": KINDS, "colour": tuple(COLOURS), "fill": FILLS, "size": tuple(SIZES), "position": POSITIONS}
OF_ALL = {"background": tuple(BACKGROUNDS), "objects": ("1", "2")}
ATTRIBUTES = OF_ONE | OF_ALL


def _config(side: int, features: int) -> ClassifierConfig:
    return ClassifierConfig(
        side=side, features=features, names=tuple(ATTRIBUTES), classes=tuple(map(len, ATTRIBUTES.values()))
    )


@dataclass(frozen=True)
class ClassifierOptions:
    """Settings of a classifier."""

    side: int | None = None
    """Side of the input images in pixels; default: the preset's."""
    features: int | None = None
    """Number of features; default: the preset's."""
    noise: float = 0.1
    """Maximum noise on the images, whose range is 2."""
    store: Literal["float32", "float16"] = "float32"
    """Type of the stored parameters."""


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Train a classifier of `shapes`."""

    run: RunOptions = RunOptions(steps=3000, batch=64, ema_decay=0.995)
    optimization: OptimizerOptions = OptimizerOptions(learning_rate=2e-3, warmup=100, weight_decay=0.05)
    classifier: ClassifierOptions = ClassifierOptions()


@dataclass(frozen=True)
class ClassifierTask(Task):
    """A classifier of `shapes`."""

    rules: ClassVar[Mapping[str, Rule]] = {"adam": AdamW(decay_all=False)}
    presets: dict[str, ClassifierConfig] = field(default_factory=lambda: {"tiny": _config(64, 64)})
    settings: Settings = Settings()

    def model(self, preset: str, compute: Any) -> ClassifierTraining:
        return ClassifierTraining(self.preset(preset))

    def side(self, model: ClassifierTraining, crop: int | None) -> int:
        super().side(model, crop)
        return model.config.side

    def inference(self, preset: str, model: ClassifierTraining, count: int) -> Inference:
        """Features and logits of images."""
        network = Classifier(model.config)
        image = model.batch_spec(count, model.config.side)["image"]
        return Inference(lambda params, image: network.apply({"params": params}, image), (image,))

    def prepare(self, settings: Settings, start: Start) -> Work:
        options, run, data = settings.classifier, settings.run, settings.dataset
        if data.data != ("shapes",):
            raise ValueError(f"--data {data.shown}: the classifier is one of `shapes`, whose attributes are known")
        for name, value in (("--init", run.init), ("--limit", data.limit)):
            if value:
                raise ValueError(f"{name} {value}: the classifier is trained from scratch, on all images")
        if start.processes > 1:
            raise ValueError("the classifier is trained by one process: --join none")
        given = {name: value for name in ("side", "features") if (value := getattr(options, name)) is not None}
        config = dataclasses.replace(self.preset(settings.preset), **given)
        source = once(data.data_dir, lambda: sources.open(data.spec(), config.side, "train", data.data_dir))
        stream = image_batches(source, DataConfig(config.side, run.batch, seed=run.seed, captions=True))

        def finish(params: Params, extra: Any) -> str:
            in_order = DataConfig(config.side, min(512, len(source)), shuffle=False, repeat=False)
            some = next(image_batches(source, in_order))["image"]
            plain = of_size_one(config, jax.device_get(params), jnp.asarray(some))
            folder = settings.out / "model"
            classifier.save(folder, "shapes", config, plain, options.store)
            return f"{folder}: a classifier of {', '.join(ATTRIBUTES)} with {config.features} features"

        contents = {"examples": len(source), "batch": run.batch}
        model = ClassifierTraining(config, options.noise)
        return Work(model, Labelled(stream), contents, finish, held_out=_held_out(settings, config))


def _held_out(settings: Settings, config: ClassifierConfig) -> HeldOutBatches | None:
    """Held-out images with the labels of their scenes."""
    if settings.dataset.evaluate_data is not None:
        raise ValueError(f"--evaluate-data {settings.dataset.evaluate_data}: the held-out images of `shapes` are known")
    source = held_out_source(settings, config.side)
    some = None if source is None else in_full_batches(settings, source)
    if some is None:
        return None
    place = some.place if isinstance(some, Spread) else int
    in_order = DataConfig(config.side, settings.run.batch, shuffle=False, repeat=False, captions=True)
    return lambda: Labelled(image_batches(some, in_order), "held_out", place)


def labels(true: Scene) -> list[int]:
    """The class of each attribute; -1 for attributes of a single object if there are two."""
    values = {"background": true.background, "objects": str(len(true.objects))}
    if len(true.objects) == 1:
        values |= {name: getattr(true.objects[0], name) for name in OF_ONE}
    return [classes.index(values[name]) if name in values else -1 for name, classes in ATTRIBUTES.items()]


class Labelled:
    """Batches of images with the labels of their scenes, by the index in the dataset."""

    def __init__(self, stream: Batches, split: str = "train", place: Callable[[int], int] = int):
        self._stream, self._split, self._place = stream, split, place

    def __iter__(self) -> "Labelled":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._stream)
        classes = np.array([labels(scene(self._split, self._place(int(index)))) for index in batch["index"]], np.int32)
        return {"image": batch["image"], "labels": classes}

    def get_state(self) -> dict:
        return self._stream.get_state()

    def set_state(self, state: dict) -> None:
        self._stream.set_state(state)
