"""Report of an accelerator in minutes: correctness, speed, PyTorch for comparison, images, and some training.

    python -m experiments.recipes.gpu_report --minutes 8 --out runs/gpu_report
    python -m experiments.recipes.gpu_report --minutes 5 --sections benchmark sampling --out runs/gpu_speed

Sections run in this order, the most important first, each in its own process with a fraction of the time:

    networks    every network on the CPU and on the accelerator, float32 and bfloat16; attention kernels; a gradient
    suite       the tests of networks and of diffusion, on the accelerator
    benchmark   training steps of all presets, and the fraction of the matrix product rate measured on this card
    diffusers   diffusers' U-Net of DeepFloyd IF, eager and compiled, and ours (needs PyTorch and diffusers)
    sampling    the shipped cascade, 64 to 256 to 1024 pixels; CPU and accelerator sample the same images
    training    further training of the shipped 64×64 base, half of the captions with two objects

A section appends each result to OUT/<section>.jsonl at once, and OUT/report.md is rewritten after each section, so an
interrupted run keeps its measurements. A failed section is reported, and the next one starts. The exit code is 1 if
anything failed, exceeded its limits or was not measured. `--tiny` runs everything on small sizes, also on a CPU.
Results of one H100 are in experiments/results/README.md.
"""

import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.cli import run
from experiments.recipes import gpu_benchmark, gpu_diffusers, gpu_networks, gpu_sampling, gpu_suite, gpu_training
from experiments.recipes.gpu_section import Context, record, recorded
from jaxdiff.core.files import replacing, usable
from jaxdiff.weights.imagen import SHIPPED


@dataclasses.dataclass(frozen=True)
class Section:
    """run: measures and records until its deadline. fraction: of the time. env: environment of its process."""

    run: Callable[[Context], None]
    fraction: float
    env: dict[str, str] = dataclasses.field(default_factory=dict)


_CORRECTNESS = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",  # a third of the time to compile
}
_SPEED = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
    # Convolutions are autotuned but not checked; products use cuBLAS. This saves minutes of compilation.
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=2 --xla_gpu_enable_triton_gemm=false",
}

SECTIONS: dict[str, Section] = {
    "networks": Section(gpu_networks.main, 0.15, _CORRECTNESS),
    "suite": Section(gpu_suite.main, 0.12, _CORRECTNESS),
    "benchmark": Section(gpu_benchmark.main, 0.25, _SPEED),
    "diffusers": Section(gpu_diffusers.main, 0.12, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
    "sampling": Section(gpu_sampling.main, 0.10, _SPEED),
    "training": Section(gpu_training.main, 0.26, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
}


REHEARSAL = 200.0
"""Seconds per section with --tiny."""
GRACE = 15.0
"""Seconds after its deadline at which a section is killed: a compilation cannot be interrupted."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sections and time of the report."""

    out: Path
    """Folder of the report."""
    minutes: float = 8.0
    """Total time of all sections. A section can use the time left by earlier ones."""
    sections: tuple[str, ...] = tuple(SECTIONS)
    """Sections to run: networks | suite | benchmark | diffusers | sampling | training."""
    weights: Path = SHIPPED
    """The cascade to sample from and to train further."""
    tiny: bool = False
    """Test run: every section on small sizes, on any device."""
    training: gpu_training.Settings = gpu_training.Settings()


def main(settings: Settings) -> int | None:
    """Measure correctness and speed of this machine's accelerator and train on it, in minutes."""
    unknown = [name for name in settings.sections if name not in SECTIONS]
    if unknown:
        raise ValueError(f"--sections {unknown[0]}: choose from {', '.join(SECTIONS)}")
    if not settings.minutes > 0:
        raise ValueError(f"--minutes {settings.minutes}: must be above 0")
    out = usable(settings.out)
    begun = time.time()
    chosen = [name for name in SECTIONS if name in settings.sections]
    for name in chosen:
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    failed = []
    with _prepared(settings, chosen):
        for place, name in enumerate(chosen):
            left = begun + 60 * settings.minutes - time.time()
            rest = sum(SECTIONS[other].fraction for other in chosen[place:])
            seconds = left * SECTIONS[name].fraction / rest
            print(f"{name}: {seconds:.0f} s of the {max(left, 0):.0f} s left", flush=True)
            ended_badly = _child(settings, name, seconds)
            failed += [name] if ended_badly or any(map(_bad, recorded(out, name))) else []
            _write_report(out)
    print(f"{out / 'report.md'} ({time.time() - begun:.0f} s)")
    if failed:
        print(f"something in {', '.join(failed)} failed or was not measured", file=sys.stderr)
    return 1 if failed else None


def _bad(row: dict[str, Any]) -> bool:
    """Whether a result is an error, a failure or missing."""
    return "error" in row or "not_measured" in row or bool(row.get("failed")) or row.get("within_limits") is False


def _child(settings: Settings, name: str, seconds: float) -> bool:
    """Run a section in its own process. Returns whether it failed, which is also recorded."""
    out = settings.out
    if settings.tiny:
        seconds = REHEARSAL
    if seconds < 5:
        record(out, name, {"error": "no time was left"})
        return True
    context = Context(name, out, time.time() + seconds, settings.tiny, settings.weights, settings.training)
    log = out / f"{name}.log"
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(SECTIONS[name].run, context, log))
    with _environment(SECTIONS[name].env):
        process.start()
    process.join(seconds + GRACE)
    if process.is_alive():
        process.kill()
        process.join()
        record(out, name, {"error": f"stopped after {seconds:.0f} s, its fraction of the minutes"})
    elif process.exitcode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        record(out, name, {"error": f"exit code {process.exitcode}: {lines[-1][:300] if lines else ''} ({log})"})
    return process.exitcode != 0


def _run(section: Callable[[Context], None], context: Context, log: Path) -> None:
    """The section's process, with its output and that of its libraries redirected to its log."""
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    section(context)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _prepared(settings: Settings, chosen: list[str]) -> Iterator[None]:
    """Render the examples of the training section on the CPU while the other sections use the accelerator."""
    drawing = None
    if "training" in chosen:
        drawing = gpu_training.start_drawing(settings.out, settings.weights, settings.training, settings.tiny)
    try:
        yield
    finally:
        if drawing is not None:
            drawing.terminate()
            drawing.wait()
            gpu_training.remove_examples(settings.out)


def _write_report(out: Path) -> None:
    """Write OUT/report.md from the results of all sections so far, including earlier runs."""
    blocks = ["# Report of an accelerator"]
    for name in SECTIONS:
        rows = recorded(out, name)
        if not rows:
            continue
        blocks.append(f"## {name}")
        tables: dict[tuple[str, ...], list[dict]] = {}
        for row in rows:
            tables.setdefault(tuple(row), []).append(row)
        for columns, members in tables.items():
            lines = [columns, ["---"] * len(columns), *([_cell(row[c]) for c in columns] for row in members)]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    with replacing(out / "report.md") as temporary:
        temporary.write_text("\n\n".join(blocks) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value).replace("|", "\\|")


if __name__ == "__main__":
    run(main)
