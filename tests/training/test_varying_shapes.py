"""Batches that differ in shape, as aspect-ratio buckets have them: trained on, resumed, and agreed on by processes."""

import dataclasses
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data.buckets import Buckets
from jaxdiff.data.embeddings import store_embeddings
from jaxdiff.data.example import captions
from jaxdiff.data.image_sizes import read_sizes
from jaxdiff.data.pipeline import DataConfig, image_batches
from jaxdiff.nets.unet import EfficientUNetConfig
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.training import prefetch
from jaxdiff.training.loop import Layout, train
from jaxdiff.training.mesh import make_mesh
from jaxdiff.training.metrics import read
from jaxdiff.training.prefetch import OwnRows, Prefetch
from jaxdiff.training.reporter import Reporter
from jaxdiff.training.watchdog import Watchdog

sys.path.insert(0, str(Path(__file__).parents[1]))
from small import LENGTH, SR, UNET, WIDTH
from training_toy import config

ONE = make_mesh(devices=jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Network(EfficientUNetConfig):
    """One 1 × 1 convolution of the noised image and the enlarged low-resolution one: it compiles in no time."""

    def module(self):
        return self

    def init(self, key, *inputs):
        return {"params": {"kernel": 0.1 * jax.random.normal(key, (6, 3))}}

    def apply(self, variables, x, time, given):
        return jnp.concatenate([x, given.concat], -1) @ variables["params"]["kernel"]


SETTINGS = {field.name: getattr(UNET, field.name) for field in dataclasses.fields(UNET)}
MODEL = dataclasses.replace(SR, unet=Network(**SETTINGS))


@dataclasses.dataclass(frozen=True)
class Wide:
    """Images in turn square and wide."""

    count: int = 9

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (16, 16 if index % 2 else 30, 3), np.uint8)
        return {"image": image, "caption": f"image {index}", "name": str(index)}


@pytest.fixture(scope="module")
def bucket_stream(tmp_path_factory):
    source = Wide()

    def encode(texts):
        tokens = np.random.default_rng(len(texts)).normal(size=(len(texts), LENGTH, WIDTH))
        return TextEmbedding(tokens, np.ones((len(texts), LENGTH), bool))

    stored = store_embeddings(captions(source), encode, tmp_path_factory.mktemp("text"), encoder="random", batch=9)
    settings = DataConfig(16, 2, low_resolution=4, buckets=Buckets(stride=4), seed=1)
    return lambda: image_batches(source, settings, stored, sizes=read_sizes(source))


@pytest.fixture(scope="module")
def shapes(bucket_stream):
    return [batch["image"].shape[1:3] for batch in itertools.islice(bucket_stream(), 4)]


@pytest.mark.parametrize("model", [MODEL, pytest.param(SR, marks=pytest.mark.slow)], ids=["convolution", "U-Net"])
def test_a_diffusion_model_trains_on_two_buckets_and_resumes_bit_by_bit(
    model, bucket_stream, shapes, shared_steps, tmp_path, monkeypatch
):
    assert set(shapes[:3]) == {(12, 20), (16, 16)}
    said = []
    monkeypatch.setattr(Watchdog, "doing", lambda self, what, compiles=False: said.append((what, compiles)))
    left_out, paused = [], Reporter.paused
    monkeypatch.setattr(Reporter, "paused", lambda self, doing="": left_out.append(doing) or paused(self, doing))
    settings = dataclasses.replace(config(steps=4), log_every=1, save_every=2)
    whole = train(model, bucket_stream(), settings, tmp_path / "whole", layout=Layout(ONE))
    compiled = [compiles for what, compiles in said if what.startswith("in step")]
    assert compiled == [shape not in shapes[:i] for i, shape in enumerate(shapes)]
    assert left_out.count("compiling") == 2
    train(model, bucket_stream(), dataclasses.replace(settings, steps=2), tmp_path / "parts", layout=Layout(ONE))
    resumed = train(model, bucket_stream(), settings, tmp_path / "parts", layout=Layout(ONE))
    losses = [[line["loss"] for line in read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all() and len(set(losses[0])) == 4
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(whole.params), jax.device_get(resumed.params)))


@dataclasses.dataclass
class Stream:
    """Batches of these shapes."""

    shapes: list[tuple[int, ...]]
    place: int = 0

    def __next__(self):
        self.place += 1
        image = np.zeros(self.shapes[self.place - 1], np.float32)
        return {"image": image, "caption": np.array(["a"] * len(image))}

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


class Varying(Stream):
    varying_shapes = "order 1"


@pytest.fixture
def two_processes(monkeypatch):
    """What this process would tell the other one."""
    said = []
    monkeypatch.setattr(prefetch, "agree", lambda name, values: said.append(values))
    multihost = SimpleNamespace(count=lambda: 2, name=lambda: "process 0", index=lambda: 0)
    monkeypatch.setattr(prefetch, "multihost", multihost)
    return said


def test_of_several_processes_all_have_the_same_order_of_shapes(two_processes):
    feed = Prefetch(Varying([(2, 8, 8, 3), (2, 6, 10, 3)]), ONE, 1, 2)
    assert [next(feed)[0]["image"].shape for _ in range(2)] == [(2, 8, 8, 3), (2, 6, 10, 3)]
    assert two_processes == [{"image": "float32[2, 8, 8, 3]", "order of shapes": "order 1"}]


@pytest.mark.parametrize("kind, shape", [(Stream, (2, 6, 10, 3)), (Varying, (4, 8, 8, 3)), (Varying, (2, 8, 8))])
def test_other_shapes_are_refused(two_processes, kind, shape):
    feed = Prefetch(kind([(2, 8, 8, 3), shape]), ONE, 1, 2)
    with pytest.raises(ValueError, match=r"batch 2 on process 0: image is .* all batches must be alike"):
        next(feed)


def test_rows_of_a_shared_stream_keep_its_order_of_shapes():
    assert OwnRows(Varying([])).varying_shapes == "order 1" and OwnRows(Stream([])).varying_shapes is None
