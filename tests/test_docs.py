"""What a newcomer reads: a page in every room, the agreed top level, and a README whose Python runs."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "jaxdiff", "experiments", "tests", "tpu_scripts"}
ROOMS = sorted(path.parent for path in (ROOT / "jaxdiff").glob("*/__init__.py"))
README = ROOT / "README.md"
PAGE = 80


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_has_a_page(room):
    page = room / "README.md"
    assert page.is_file(), f"jaxdiff/{room.name} has no README.md"
    lines = page.read_text().splitlines()
    assert 3 < len(lines) <= PAGE
    assert lines[0].startswith("# ") and room.name in lines[0]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_pages_name_files_that_exist(room):
    """Files named in the first column of a table are in the room, or in the repository."""
    named = re.findall(r"^\| `([\w/.]+\.py)`", (room / "README.md").read_text(), re.MULTILINE)
    missing = [name for name in named if not (room / name).is_file() and not (ROOT / name).is_file()]
    assert not missing


def tracked():
    """The files of the repository; outside a checkout the test is skipped."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_top_level_is_the_agreed_one():
    found = {name.split("/")[0] for name in tracked()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


def test_only_the_library_is_installed():
    """No package called experiments comes into anybody's environment."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["jaxdiff*"]


def test_shipped_files_are_small():
    """At most 20 MB of weights; none of the emoji artwork, no run folders."""
    files = tracked()
    sizes = {name: (ROOT / name).stat().st_size for name in files if (ROOT / name).is_file()}
    weights = {name: size for name, size in sizes.items() if name.startswith("jaxdiff/weights/tiny/")}
    assert sum(weights.values()) <= 20e6
    large = {name: size for name, size in sizes.items() if size > 1e6 and name not in weights}
    assert sum(large.values()) < 5e6, large
    assert not [name for name in files if name.endswith(".svg") or name.startswith("runs/")]


def blocks_of(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs(tmp_path):
    """Each block in a process of its own, in an empty folder."""
    blocks = blocks_of(README.read_text())
    assert blocks, "README.md shows no Python"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for block in blocks:
        assert len(block.splitlines()) <= 12, "ten lines load a cascade and draw"
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"


def test_blocks_are_found():
    assert blocks_of("a\n```python\nx = 1\ny = 2\n```\n```\nno\n```\n```python\nz\n```\n") == ["x = 1\ny = 2\n", "z\n"]
