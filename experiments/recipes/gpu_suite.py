"""GPU report: the tests of networks and of diffusion run on the accelerator."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from experiments.recipes.gpu_section import Context

ROOT = Path(__file__).parents[2]
FILES = (
    "tests/test_jaxlib.py",
    "tests/nets/test_attention.py",
    "tests/nets/test_blocks.py",
    "tests/nets/test_unet.py",
    "tests/diffusion/test_golden.py",
    "tests/diffusion/test_losses.py",
    "tests/diffusion/test_samplers.py",
)
TINY = ("tests/nets/test_attention.py",)


def main(context: Context) -> None:
    """Run pytest on jax's default device. Products are exact, as on the CPU, for which the tests are written."""
    files = TINY if context.tiny else FILES
    if not (ROOT / files[0]).exists():
        context.record(not_measured="suite", why="there are no tests beside the installed package")
        return
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    environment.setdefault("JAX_PLATFORMS", "cpu" if context.tiny else "")
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if not context.tiny else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--no-summary",
        *parallel,
        *files,
    ]
    results, code = context.out / "suite.txt", None
    with results.open("w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
        try:
            code = process.wait(max(1.0, context.left()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and its workers, which hold accelerator memory
            process.wait()
    text = results.read_text(errors="replace")
    # One line per finished test; xdist writes the outcome before the name.
    line = r"^(?:\[gw\d+\] \[ *\d+%\] (\w+) (tests/.*?)|(tests/.*?) (PASSED|FAILED|SKIPPED|ERROR)(?: .*)?)\s*$"
    outcomes = {name or name2: first or last for first, name, name2, last in re.findall(line, text, re.M)}
    counts = {kind: list(outcomes.values()).count(kind.upper()) for kind in ("passed", "failed", "skipped")}
    counts["failed"] += list(outcomes.values()).count("ERROR")
    context.record(suite=" ".join(files), **counts, exit_code="not done in its time" if code is None else code)
    for name in [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")][:40]:
        context.record(failed=name)
