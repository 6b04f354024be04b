"""Every script says how it is called, and answers --help."""

import importlib
import re
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
    entry = re.search(r"^    run\((\w+)", SCRIPTS[name].read_text(), re.MULTILINE).group(1)
    done = command(getattr(module, entry), "--help")
    assert done.code == 0
    assert "--" in done.out and done.err == ""


def test_the_page_lists_every_script():
    page = (ROOT / "experiments" / "README.md").read_text()
    assert [name for name in SCRIPTS if name not in page] == []
