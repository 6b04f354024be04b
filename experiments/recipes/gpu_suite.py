"""GPU report: the tests of networks, diffusion and the training step run on the accelerator."""

import os
import re
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
    "tests/diffusion",
    "tests/training/test_step.py",
    "tests/training/test_optimizer.py",
)
TINY = ("tests/nets/test_attention.py",)


def main(context: Context) -> None:
    """Runs pytest on the device that jax finds first. Products are exact, as on the CPU that the tests are made for."""
    files = TINY if context.tiny else FILES
    if not (ROOT / files[0]).exists():
        context.record(not_measured="suite", why="there are no tests beside the installed package")
        return
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    environment.setdefault("JAX_PLATFORMS", "" if not context.tiny else "cpu")
    parallel = ["-n", "4"] if not context.tiny else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *parallel, *files]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=min(context.left(), 1e6)
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        context.record(not_measured="suite", why=f"not done when its time was: {output[-200:]!r}")
        return
    print(done.stdout[-20000:], done.stderr[-2000:])
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)}
    context.record(suite=" ".join(files), **counts, exit_code=done.returncode)
    for line in re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.M)[:40]:
        context.record(failed=line[:300])
