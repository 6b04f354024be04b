"""Imports run one way only, and importing does nothing: no network, no arrays, no devices."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "core": set(),
    "nets": set(),
    "diffusion": set(),
    "training": set(),
    "text": {"nets"},
    "models": {"text", "nets", "diffusion"},
    "systems": {"models", "text", "nets", "diffusion"},
    "data": {"text"},
    "weights": {"systems", "models", "text", "nets", "diffusion", "training"},
    "evaluation": {"weights", "data", "systems", "models", "text", "nets"},
}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source, package):
    """Full names of the modules that a source imports anywhere in it; `package` is where relative imports start."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def forbidden(source, module):
    """The imports of ours that the room of `module` may not make."""
    own = module.split(".")
    package = module.rpartition(".")[0]
    for name in imported(source, package):
        parts = name.split(".")
        if parts[0] in ("experiments", "tests") and own[0] == "jaxdiff":
            yield name
        elif parts[0] == "jaxdiff" and own[0] == "jaxdiff":
            room = parts[1] if len(parts) > 1 else ""
            if room not in {own[1], "core", *MAY_IMPORT[own[1]]}:
                yield name


def test_the_table_has_every_room():
    rooms = {path.name for path in (ROOT / "jaxdiff").iterdir() if any(path.glob("*.py"))}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    found = modules(f"jaxdiff/{room}")
    assert len(found) > 1
    wrong = [f"{name_of(path)} imports {name}" for path in found for name in forbidden(path.read_text(), name_of(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("from jaxdiff.systems import imagen", "jaxdiff.nets.unet", ["jaxdiff.systems.imagen"]),
        ("from jaxdiff.nets.blocks import Norm", "jaxdiff.nets.unet", []),
        ("import jaxdiff.weights.tree as t", "jaxdiff.models.diffusion", ["jaxdiff.weights.tree"]),
        ("from ..data import records", "jaxdiff.training.loop", ["jaxdiff.data.records"]),
        ("from . import step", "jaxdiff.training.loop", []),
        ("def f():\n    from jaxdiff.evaluation import fid", "jaxdiff.weights.imagen", ["jaxdiff.evaluation.fid"]),
        ("from jaxdiff.core import errors", "jaxdiff.nets.unet", []),
        ("from jaxdiff.nets import unet", "jaxdiff.core.errors", ["jaxdiff.nets.unet"]),
        ("import experiments.cli", "jaxdiff.data.folder", ["experiments.cli"]),
        ("from jaxdiff import nets, data", "jaxdiff.text.t5", ["jaxdiff.data"]),
        ("import jax, numpy", "jaxdiff.nets.unet", []),
        ("from jaxdiff.core import messages", "jaxdiff.nets.unet", []),
        ("from jaxdiff.nets import unet", "jaxdiff.core.messages", ["jaxdiff.nets.unet"]),
        ("from jaxdiff.training import loop", "experiments.train", []),
    ],
)
def test_the_reader_of_imports(source, module, wrong):
    assert list(forbidden(source, module)) == wrong


IMPORT_ALL = """
import socket, sys
def refuse(*args, **options):
    raise AssertionError("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
import jax
# jax refuses this setting once a backend exists, as it does after the first array.
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3, jax.device_count()
# transformers imports PyTorch wherever that is installed; nothing here may need it (see the test below).
assert "tensorflow" not in sys.modules
"""


def test_importing_uses_no_network_and_makes_no_arrays():
    names = [name_of(path) for package in ("jaxdiff", "experiments") for path in modules(package)]
    assert len(names) > 50
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_imports_pytorch_or_tensorflow():
    own = [path for package in ("jaxdiff", "experiments") for path in (ROOT / package).rglob("*.py")]
    pattern = re.compile(r"^\s*(import|from)\s+(torch|tensorflow)\b", re.MULTILINE)
    assert len(own) > 50
    found = [path.relative_to(ROOT).as_posix() for path in own if pattern.search(path.read_text())]
    # One reads a pickle, once, the others compare with diffusers and transformers: they import it only then.
    assert sorted(found) == [
        "experiments/exports/inception.py",
        "experiments/recipes/gpu_diffusers.py",
        "experiments/verifications/libraries.py",
    ]
