"""jax's internals: the versions that have them are those of pyproject.toml, and others are refused in one line."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from jax._src import xla_bridge

from jaxdiff.core import jax_internals

ROOT = Path(__file__).parents[2]


def test_the_versions_are_those_of_the_project():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"jax{jax_internals.SUPPORTED}" in dependencies


def test_nothing_else_imports_them():
    internal = re.compile(r"jax\._src|jaxlib\._|(from|import) jaxlib\b")
    files = [path for path in (ROOT / "jaxdiff").rglob("*.py") if internal.search(path.read_text())]
    assert files == [ROOT / "jaxdiff" / "core" / "jax_internals.py"]


def test_a_version_without_them_is_refused_in_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, jax_internals.__name__)
    monkeypatch.delattr(xla_bridge, "backends_are_initialized")
    with pytest.raises(ImportError, match=r"^jax \S+ is not supported, only jax>=0\.10.*<0\.13: .*backends_are_init"):
        importlib.import_module(jax_internals.__name__)


def test_a_process_that_is_alone_has_no_coordination_service():
    with pytest.raises(RuntimeError, match="not initialized"):
        jax_internals.coordination()
