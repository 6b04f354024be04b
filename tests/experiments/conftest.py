"""A very small cascade with random parameters in place of the shipped one, and scripts called as from a shell."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small import random_params
from small_cascade import ADAM, BASE, STAGES, T5, WIDTH

from experiments import train
from experiments.cli import run
from experiments.options import names, training
from experiments.table import TASKS
from experiments.tasks.noise_levels import NoiseLevels
from jaxdiff.data.shapes_caption import held_out_captions
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.models.sampling import SamplingConfig, TrainedModel
from jaxdiff.nets.t5 import T5Encoder
from jaxdiff.text.tokenizer import train_tokenizer
from jaxdiff.weights.stages import save_model
from jaxdiff.weights.t5 import export


@pytest.fixture(scope="session")
def standin(tmp_path_factory) -> Path:
    """A folder of weights in the layout of the shipped cascade."""
    folder = tmp_path_factory.mktemp("standin")
    words = train_tokenizer([caption.text for caption in held_out_captions(100)], 400)
    words.save_pretrained(str(folder / "text"))
    config = dataclasses.replace(T5, vocab=len(words), decoder_layers=0)
    ids, rng = np.zeros((1, 4), np.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids == 0)["params"]
    export(config, jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape), shapes), folder / "text")
    for number, (name, stage) in enumerate(STAGES.items()):
        sampling = SamplingConfig(names.SAMPLERS["ddim"], steps=2, guidance=Guidance(2.0 if stage is BASE else 1.0))
        save_model(TrainedModel(stage, random_params(stage, number), sampling), folder / name)
    return folder


@pytest.fixture(autouse=True, scope="module")
def steps(shared_steps) -> None:
    """For all tests here: none is about how a step is made."""


@pytest.fixture(autouse=True, scope="module")
def one_device() -> Iterator[None]:
    """Training without `--mesh` uses one of the eight devices: its step compiles in three quarters of the time."""
    real = training.make_mesh

    def make_mesh(*sizes: int) -> Mesh:
        return real(1, devices=jax.devices()[:1]) if sizes == (-1, 1, 1) else real(*sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", make_mesh)
        yield


@pytest.fixture
def small_presets(monkeypatch) -> None:
    """The tiny presets of training, smaller still."""
    sampling = SamplingConfig(names.SAMPLERS["ddim"], steps=2)
    for name, stage in STAGES.items():
        presets = TASKS[f"imagen.{name}"].presets
        small = dataclasses.replace(
            presets["tiny"], model=stage, sampling=sampling, reads=(24, WIDTH), optimizer=ADAM, levels=NoiseLevels()
        )
        for preset in ("tiny", "quick"):
            monkeypatch.setitem(presets, preset, small)
    monkeypatch.setitem(TASKS["t5"].presets, "tiny", T5)


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys):
    """`command(train, "imagen.base64", …)`: what a module's command would do when called with them from a shell; in
    place of a module, a function, a command or a table of them."""

    def call(what, *arguments) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(_main(what), [str(argument) for argument in arguments])
        return Result(stop.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def trained():
    """`trained("clip", …)`: `experiments.train`, which must succeed, for the fixtures of modules; what it printed."""

    def call(*arguments) -> str:
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            pytest.raises(SystemExit) as stop,
        ):
            run(train.commands(), [str(argument) for argument in arguments])
        assert stop.value.code == 0, printed.getvalue()
        return printed.getvalue()

    return call


def _main(what):
    if not isinstance(what, ModuleType):
        return what
    for name in ("commands", "command"):
        if isinstance(make := getattr(what, name, None), FunctionType):
            return make()
    return what.main
