"""Every script says how it is called, and answers --help."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "experiments").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, command):
    module = importlib.import_module(name)
    assert f"python -m {name}" in module.__doc__
    lines = [["--help"]]
    if hasattr(module, "commands"):  # a table, of which each line has settings of its own
        lines += [[line, "--help"] for line in module.commands()]
    for line in lines:
        done = command(module, *line)
        assert done.code == 0 and done.err == ""
        assert "--" in done.out and "Args:" not in done.out


def test_the_page_lists_every_script():
    page = (ROOT / "experiments" / "README.md").read_text()
    assert [name for name in SCRIPTS if name not in page] == []
