"""A system that no command knows, trained, sampled, planned, measured and evaluated by a line of the table alone."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_judges import write_judges

from experiments import benchmark, evaluate, plan, sample, train
from experiments.options.training import OptimizerOptions, RunOptions, TrainSettings
from experiments.table import TASKS
from experiments.tasks.task import Inference, Task, Work
from jaxdiff.core.products import ImageSpec
from jaxdiff.data import sources
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.models.boxes import Generator
from jaxdiff.models.single_optimizer import SingleOptimizer
from jaxdiff.systems.pipeline import Pipeline
from jaxdiff.training.optimizer import Adafactor, AdamW, Muon


@dataclass(frozen=True)
class MeanColour(SingleOptimizer):
    """Learns the mean colour of images."""

    side: int = 16

    def init(self, key):
        return {"mean": jnp.zeros(3)}, ()

    def loss(self, params, extra, frozen, batch, key, step):
        loss = ((batch["image"] @ jnp.eye(3) - params["mean"]) ** 2).mean()
        return loss, ({}, extra)

    def batch_spec(self, batch_size, side):
        return {"image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)}


@dataclass(frozen=True, eq=False)
class Constant(Generator):
    """Images of one colour."""

    mean: Any
    produces: object = ImageSpec()
    side: int = 64

    def generate(self, request):
        return jnp.broadcast_to(jnp.asarray(self.mean), (len(request.keys), *request.size, 3))


@dataclass(frozen=True)
class ToyTask(Task):
    presets: dict = field(default_factory=lambda: {"tiny": MeanColour()})

    def prepare(self, settings, start):
        spec, data = settings.dataset.spec(), settings.dataset.data_dir
        source = sources.open(spec, 64, "train", data)
        stream = image_batches(source, DataConfig(16, settings.run.batch, seed=settings.run.seed, captions=True))

        def finish(params, extra):
            np.save(settings.out / "mean.npy", params["mean"])
            return f"{settings.out}: a mean colour"

        images = _WithoutCaptions(stream)
        return Work(self.preset(settings.preset), images, {"examples": len(source)}, finish)

    def inference(self, preset, model, count):
        return Inference(lambda params, x: x @ jnp.eye(3) + params["mean"], tuple(model.batch_spec(count, 16).values()))

    def pipeline(self, folders):
        return Pipeline(None, Constant(np.load(Path(folders[0]) / "mean.npy")))


class _WithoutCaptions:
    def __init__(self, stream):
        self._stream, self.get_state, self.set_state = stream, stream.get_state, stream.set_state

    def __next__(self):
        return {"image": next(self._stream)["image"]}


TABLE = TASKS | {"toy": ToyTask("the mean colour of images", settings=TrainSettings(run=RunOptions(steps=40, batch=8)))}


def test_every_command_takes_it(command, tmp_path):
    run, data = tmp_path / "run", ("--data-dir", tmp_path / "data", "--examples", 8, "--held-out", 20)
    done = command(train.commands(TABLE), "toy", "--out", run, *data, "--learning-rate", 0.1, "--steps", 40)
    assert done.code == 0 and "a mean colour" in done.out, done.err
    kept = json.loads((run / "settings.json").read_text())
    assert kept["command"] == "toy" and kept["settings"]["steps"] == 40

    done = command(sample.command(TABLE), "a", "b", "--weights", run, "--out", tmp_path / "images")
    assert done.code == 0 and "2 images at 64 pixels" in done.out, done.err
    image = np.asarray(Image.open(tmp_path / "images" / "0000-a.png"))
    assert image.shape == (64, 64, 3) and np.ptp(image.reshape(-1, 3), axis=0).max() == 0 and image.min() > 0

    file = tmp_path / "plan.json"
    asked = "--topology", "h100:1", "--batch", 8, "--json", file
    done = command(plan.commands(TABLE), "toy", *asked)
    assert done.code == 0 and "toy tiny on h100:1" in done.out, done.err
    assert json.loads(file.read_text())["parameters"] == 3

    done = command(benchmark.commands(TABLE), "toy", "--steps", 1, "--batch", 8, "--json", tmp_path / "speed.json")
    assert done.code == 0, done.err
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["model"] == "toy" and row["sampling_seconds"] > 0 and row["unit"] == "images"

    networks = write_judges(tmp_path / "networks")
    named = "--clip", networks["clip"], "--classifier", networks["classifier"], "--kid-subsets", 2, "--splits", 2
    done = command(
        evaluate.commands(TABLE), "metrics", "--weights", run, "--n", 12, "--out", tmp_path / "scores", *named, *data
    )
    assert done.code == 0, done.err
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"]
    assert "attributes, 1 object" in {score["name"] for score in scores}


def test_the_tables_are_not_changed(command):
    done = command(train, "toy")
    assert done.code == 2 and "unknown 'toy'" in done.err


def test_all_tasks_keep_the_contract():
    """Every preset's batch, side, loss and inference can be asked for, without a computation."""
    for name, task in TASKS.items():
        assert task.settings.preset in task.presets, name
        model = task.on_one_device(task.model("tiny", task.settings.compute))
        shapes = model.batch_spec(2, task.side(model, None))
        assert all(leaf.shape[0] == 2 for leaf in shapes.values()), name
        frozen, key = task.frozen(model), jax.random.key(0)
        init = jax.eval_shape(model.init, key)
        if jax.tree.leaves(frozen):
            assert jax.eval_shape(model.loss, *init, frozen, shapes, key, jnp.int32(0))[0].shape == (), name
        if (inference := task.inference("tiny", model, 2)) is not None:
            params = jax.eval_shape(inference.used, init[0], frozen)
            assert jax.tree.leaves(jax.eval_shape(inference.function, params, *inference.given)), name
        with pytest.raises(ValueError, match="--preset huge: choose from"):
            task.preset("huge")


def test_the_optimizer_is_the_presets():
    task, given = TASKS["imagen.base64"], OptimizerOptions
    rates = {}
    for preset in ("tiny", "50m", "300m", "2b"):
        chosen = task.config(dataclasses.replace(task.settings, preset=preset), "").optimizer
        rates[preset] = type(chosen.kind), chosen.learning_rate
    assert rates == {"tiny": (Muon, 2e-3), "50m": (AdamW, 2e-4), "300m": (AdamW, 1e-4), "2b": (Adafactor, 1e-4)}
    told = dataclasses.replace(task.settings, optimization=given("adam", 1e-5))
    chosen = task.config(told, "").optimizer
    assert (type(chosen.kind), chosen.learning_rate) == (AdamW, 1e-5)
    with pytest.raises(ValueError, match=r"--optimizer adam: needs a --learning-rate; the preset's 0.002 is for muon"):
        task.config(dataclasses.replace(task.settings, optimization=given("adam")), "")
