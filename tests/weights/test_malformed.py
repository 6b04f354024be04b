"""Files that anyone may have written, mutated at random: each is read, or refused in one short line.

Only ValueError and OSError are what a command ends with in exit code 2; anything else would be shown as a bug.
"""

import copy
import json
import random
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import small
import small_if
from safetensors.numpy import save
from small_clip import OPENAI

from jaxdiff.diffusion.parameterization import Prediction
from jaxdiff.diffusion.samplers import DPMSolverPP2M
from jaxdiff.diffusion.schedules import TabulatedSchedule
from jaxdiff.diffusion.thresholding import DynamicThreshold
from jaxdiff.diffusion.time_grid import TabulatedKarras
from jaxdiff.models.sampling import SamplingConfig
from jaxdiff.nets.classifier import ClassifierConfig
from jaxdiff.nets.t5 import T5Config
from jaxdiff.text.encoder import TextEmbedding
from jaxdiff.text.precomputed import PrecomputedTextEncoder
from jaxdiff.weights import captions, classifier, clip, deepfloyd, hub, schedulers, stages, t5, tree
from jaxdiff.weights.deepfloyd_pipeline import read_scheduler
from jaxdiff.weights.settings import VERSION, to_json

HOSTILE = [
    *(0, -1, 1, 3, 65, 2**31, 2**63, 10**30, 10**400, 10**6, True, False, None, 0.0, -0.5, 1e30, 1e999, float("nan")),
    *("", "8", "\x1b[2J", "a\nb", "x" * 10**5, "\ud800", "../..", "\x00"),
    *(
        [],
        [[]],
        {},
        {"class": "models.Diffusion"},
        {"class": "models.LowResConditioner"},
        {"class": "nets.Attention"},
        {"a": {"b": {}}},
        [0] * 10**5,
        ["\x1b"],
        [True],
        [-1, 2**70],
        {"\x1b[2J": 1},
    ),
]
SETTINGS = {
    "T5": ("config.json", t5._hub_config(T5Config(), "float32"), lambda path: t5.read_config(path)),
    "CLIP": ("config.json", clip._hub_config(OPENAI, "float32"), lambda path: clip.read_config(path)),
    "IF": ("config.json", deepfloyd._hub_config(small_if.NETWORKS[1]), lambda path: deepfloyd.read_config(path)),
    "scheduler": (
        "scheduler_config.json",
        {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "thresholding": True, "steps_offset": 1},
        lambda path: read_scheduler(path, True),
    ),
    "schedulers": (
        "scheduler_config.json",
        schedulers.described(
            TabulatedSchedule.scaled_linear(),
            Prediction.V,
            SamplingConfig(
                DPMSolverPP2M(), spacing=TabulatedKarras(rounded=True), thresholding=DynamicThreshold(0.9, 2.0)
            ),
        ),
        schedulers.read,
    ),
    "stage": (
        "stage.json",
        {"version": VERSION, "stage": to_json(small.SR), "sampling": to_json(SamplingConfig()), "text": "0123"},
        lambda path: stages.read_settings(path.parent),
    ),
    "classifier": (
        "classifier.json",
        {"version": VERSION, "name": "a", "config": to_json(ClassifierConfig(8, (8,), 4, ("a", "b"), (2, 3)))},
        lambda path: classifier.load(path.parent),
    ),
    "index": (
        "model.safetensors.index.json",
        {"metadata": {"total": 3}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
        lambda path: hub.open_tensors(path.parent),
    ),
}


def places(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def mutated(values, rng):
    """With one value, or one name, exchanged for a hostile one, dropped, or doubled into a list."""
    values = copy.deepcopy(values)
    *path, last = rng.choice([place for place in places(values) if place])
    parent = values
    for key in path:
        parent = parent[key]
    kind = rng.random()
    if kind < 0.1:
        del parent[last]
    elif kind < 0.2 and isinstance(parent, dict):
        parent[rng.choice(["\x1b[2J", "x" * 10**5, "class", ""])] = parent.pop(last)
    elif kind < 0.3:
        parent[last] = [parent[last]] * rng.choice([1, 2, 50])
    else:
        parent[last] = rng.choice(HOSTILE)
    return values


def only_short_lines(read):
    """Whether something was read; otherwise it was refused as it has to be."""
    try:
        read()
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1500, message[:3000]
        return False
    return True


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings(kind, tmp_path):
    name, values, read = SETTINGS[kind]
    rng, path, count = random.Random(0), tmp_path / name, 150
    read_all = 0
    for _ in range(count):
        path.write_text(json.dumps(mutated(values, rng)))
        read_all += only_short_lines(lambda: read(path))
    assert read_all < count


def tensors():
    rng = np.random.default_rng(0)
    return {"a/kernel": rng.normal(size=(2, 3)).astype("f4"), "a/scale": np.ones(3, "f2"), "steps": np.arange(3)}


def test_headers(tmp_path):
    """Names, types, shapes and places of tensors."""
    rng, path = random.Random(0), tmp_path / "model.safetensors"
    whole = save(tensors())
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    read_all = 0
    for _ in range(300):
        changed = json.dumps(mutated(header, rng)).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + data)
        read_all += only_short_lines(lambda: tree.load_tree(path))
        only_short_lines(lambda: tree.load_expected(path, {"a": {"kernel": np.zeros((2, 3)), "scale": np.zeros(3)}}))
    assert 0 < read_all < 300


def test_bytes(tmp_path):
    """Of a whole file: cut, flipped and put in."""
    rng, path, whole = random.Random(0), tmp_path / "model.safetensors", save(tensors())
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(content))
            content[place : place + rng.choice([0, 1, 8])] = rng.randbytes(rng.choice([0, 1, 8]))
        path.write_bytes(bytes(content))
        only_short_lines(lambda: tree.load_tree(path))


def test_embedded_captions(tmp_path):
    rng, path = random.Random(0), tmp_path / "captions.safetensors"
    embedding = TextEmbedding(jnp.zeros((2, 3, 4)), jnp.ones((2, 3), bool))
    captions.save(path, PrecomputedTextEncoder(("", "a"), embedding, True, "t5"))
    params, told = tree.load_tree(path)
    for _ in range(100):
        read = {name: json.loads(text) if name in ("captions", "whole") else text for name, text in told.items()}
        values = mutated(read, rng)
        metadata = {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        try:
            tree.save_tree(path, params, metadata)
        except UnicodeEncodeError:  # no file can hold half a character
            continue
        only_short_lines(lambda: captions.load(path))
    tree.save_tree(path, params, told | {"captions": "[" * 10**5 + "]" * 10**5})
    with pytest.raises(ValueError, match=r"captions.safetensors: not a file of .* nested too deeply"):
        captions.load(path)
