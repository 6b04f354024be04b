"""The published plans: every paper-size stage and T5-XXL's encoder on every kind of TPU.

    python -m experiments.recipes.plan_tables              # all missing plans: about 6 hours of one core, 21 GB
    python -m experiments.recipes.plan_tables --only v5e   # plans whose names contain this
    python -m experiments.recipes.plan_tables --only none  # only the page, from existing plans

Each plan is written to a file of tpu_scripts/plans/ when it is done, so the command can be interrupted and resumed. The
README.md there is generated from these files. A plan is repeated if its settings below change, or with `--again`.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import plan
from experiments.cli import run
from experiments.planning.report import PAPER_STEPS, cycles_are_least, remat_of, rooflined
from experiments.planning.settings import Planned, PlanSettings, flat
from experiments.table import TASKS
from experiments.tasks.diffusion import UNetCompute
from experiments.tasks.t5 import T5Compute
from jaxdiff.core.files import replacing, usable
from jaxdiff.training import chips
from jaxdiff.training.plan import Costs, Roofline

FOLDER = Path("tpu_scripts/plans")
LEAST_FREE = 0.15
"""Fraction of a chip's memory that a plan must leave free."""

SLICES = {"v4": "4x8x8", "v5e": "16x16", "v5p": "4x8x8", "v6e": "16x16", "tpu7x": "4x8x8"}
"""256 chips of every kind, as many as the paper trained its base on."""
HOSTS = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
"""Four chips of every kind."""
SCALED = {"4x4x4": "base64-v5p-64", "8x8x8": "base64-v5p-512"}
"""Other v5p slices, the base model with the same batch on each chip."""
SMALL = {("base64", "v5e")}
"""Plans that need rematerialization of outputs to fit in memory."""


def cases() -> dict[str, Planned]:
    """All plans by name."""
    plans = {}
    for stage, preset in (("base64", "2b"), ("sr256", "paper"), ("sr1024", "paper")):
        model = f"imagen.{stage}"
        for chip, shape in SLICES.items():
            remat = "outputs" if (stage, chip) in SMALL else "none"
            mesh = "data=16,fsdp=32" if chip == "tpu7x" else "data=8,fsdp=32"
            compute = UNetCompute("bfloat16", remat=remat)
            settings = PlanSettings(f"{chip}:{shape}", preset, 2048, mesh, compute=compute)
            plans[f"{stage}-{chip}"] = Planned(model, TASKS[model], settings)
    for shape, name in SCALED.items():
        count = chips.parse(f"v5p:{shape}").chips
        mesh, compute = f"data={count // 32},fsdp=32", UNetCompute("bfloat16")
        settings = PlanSettings(f"v5p:{shape}", "2b", 8 * count, mesh, compute=compute)
        plans[name] = Planned("imagen.base64", TASKS["imagen.base64"], settings)
    for chip, shape in HOSTS.items():
        mesh = "data=2,fsdp=4" if chip == "tpu7x" else "fsdp=-1"  # fsdp=8 would receive five times as much data
        settings = PlanSettings(f"{chip}:{shape}", "xxl", 256, mesh, sample=True, compute=T5Compute("bfloat16"))
        plans[f"text-{chip}"] = Planned("t5", TASKS["t5"], settings)
    return plans


def main(only: str = "", again: bool = False, out: Path = FOLDER) -> int:
    """Compute missing plans and write the page.

    Args:
        only: compute only plans whose names contain this; `none`: only the page
        again: repeat existing plans
        out: folder of the plans
    """
    failed = compute(cases(), out, _write_page, only, again)
    print(f"{out / 'README.md'}: {len(kept_of(cases(), out))} plans")
    return 1 if failed else 0


def compute(
    cases: Mapping[str, Planned], out: Path, write_page: Callable[[Path], None], only: str = "", again: bool = False
) -> int:
    """Compute missing plans, each to a file of `out`, and write the page after each. Returns how many failed."""
    usable(out)
    wanted = {} if only == "none" else {name: case for name, case in cases.items() if only in name}
    if not wanted and only != "none":
        raise ValueError(f"--only {only}: no plan has that in its name: {', '.join(cases)}")
    due = {name: case for name, case in wanted.items() if again or not _answers(out / f"{name}.json", case)}
    failed = 0
    for name, case in tqdm(due.items(), desc="plans", unit="plan"):
        # One process per plan: it frees all memory at its end, and a failure (too little memory, here or on the chip)
        # does not affect the other plans.
        done = subprocess.run([sys.executable, *_words(plan.asked(case, None)), "--json", str(out / f"{name}.json")])
        if done.returncode:
            failed += 1
            tqdm.write(f"{name}: not planned, exit code {done.returncode}", file=sys.stderr)
        write_page(out)
    write_page(out)
    return failed


def _answers(path: Path, case: Planned) -> bool:
    """Whether a saved plan has these settings, regardless of the compiler's version."""
    kept = plan.read(path)
    settings = plan.asked(case, None)
    return kept is not None and {name: kept["asked"].get(name) for name in settings} == settings


def kept_of(cases: Mapping[str, Planned], out: Path) -> dict[str, dict[str, Any]]:
    """The existing plans with current settings."""
    plans = {}
    for name, case in cases.items():
        with contextlib.suppress(ValueError):
            if _answers(out / f"{name}.json", case):
                plans[name] = plan.read(out / f"{name}.json")
    return plans


INTRODUCTION = """\
# Plans

The real step compiled by the TPU compiler, without the hardware (`experiments/plan.py`). Generated by
`python -m experiments.recipes.plan_tables` from the JSON files in this folder.
**Nothing was measured on a TPU.** Every time is headed *optimistic* or *pessimistic*. Pessimistic refers to the overlap
only: all times assume the published rate of every unit, so a real step may be even slower.
Fractions of the peak are of useful FLOPs.

* *Useful FLOPs* are those of the network, the same on every chip: convolutions (without their borders) and matrix
  products of the loss, times three for the backward pass; base64: {useful} TFLOP an image. Compiled FLOPs are those of
  the program, including recomputation; on tpu7x the compiler counts a fifth more than the network needs.
* *Overlapped* (optimistic): the longest of compute, memory and interconnect time.
  *Serial* (pessimistic): their sum.
* *Estimate* (optimistic): the compiler's estimate in seconds, without interconnect. It is shorter than the compiler's
  count of cycles.
* *Cycles* (optimistic): that count at the chip's clock, which is the published peak over the published matrix units,
  without interconnect. {kept}
  *Cycles, interconnect* (pessimistic): their sum. The clocks of v6e and tpu7x do not follow from published numbers, so
  they have neither; their remaining bounds are looser and not comparable with other chips.
* *Interconnect*: the data that a chip receives, over the links of the physical axes of the mesh axis, not over all of
  its links. The files have bytes by kind of collective: gathered and scattered parameters count along fsdp, all-reduces
  along the axis with the most links (optimistic) or the fewest (pessimistic). On tpu7x both halves of a chip receive
  their data separately.
* *A second* and *days* (to the paper's 2.5 M steps) use the longest optimistic and the longest pessimistic time.

base64 on 64, 256 and 512 chips of v5p has the same batch and nearly the same program on each chip. Times without
interconnect are equal by construction: they say nothing about how a run scales, which only a measurement can.

Compilers and dates: {versions}.
A CPU core computes a plan in 1 to 50 minutes.
"""


def _write_page(out: Path) -> None:
    kept = kept_of(cases(), out)
    training = {name: saved for name, saved in kept.items() if saved["asked"]["model"] != "t5"}
    encoding = {name: saved for name, saved in kept.items() if saved["asked"]["model"] == "t5"}
    versions = sorted({f"{saved['asked']['compiler']}, {saved['date']}" for saved in kept.values()})
    least = "≥, ≤: only the 12 largest kinds of operation were kept, so these are bounds."
    per_image = {round(saved["useful_flops"] / saved["asked"]["batch"] / 1e12, 2) for saved in bases(kept)}
    introduction = INTRODUCTION.format(
        useful=" or ".join(map(str, sorted(per_image))) or "?",
        kept=least if any(map(cycles_are_least, kept.values())) else "",
        versions="; ".join(versions) or "none yet",
    )
    lines = [
        introduction,
        "## Training",
        "",
        *_tables(training, "images"),
        "",
        "## T5-XXL's encoder: frozen, bfloat16, captions of 128 tokens",
        "",
        *_tables(encoding, "captions"),
        "",
        "## Commands",
        "",
        *(f"    {command_of(saved)}" for saved in kept.values()),
        *sorted({f"\n{saved['added']}." for saved in kept.values() if "added" in saved}),
    ]
    with replacing(out / "README.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def bases(kept: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The plans of the base model."""
    return [saved for saved in kept.values() if saved["asked"]["model"] == "imagen.base64"]


def command_of(saved: dict[str, Any]) -> str:
    """The command that computes this plan."""
    return " ".join(["python", *_words(saved["asked"])])


def _words(asked: dict[str, Any]) -> list[str]:
    default = flat(PlanSettings(compute=plan.accelerated(TASKS[asked["model"]].settings.compute)))
    words = ["-m", "experiments.plan", asked["model"]]
    for name, standard in default.items():
        value = asked.get(name, standard)
        if value != standard:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def _tables(plans: dict[str, dict[str, Any]], what: str) -> list[str]:
    """Tables of the plans' memory and of their times."""
    if not plans:
        return ["Not planned yet."]
    needs = {name: _needs(saved) for name, saved in plans.items()}
    times = {name: _times(saved, what) for name, saved in plans.items()}
    return [*_table(needs), "", *_table(times)]


def _table(rows: dict[str, dict[str, str]]) -> list[str]:
    names = ["plan", *next(iter(rows.values()))]
    table = [names, ["---"] * len(names), *([name, *cells.values()] for name, cells in rows.items())]
    return [f"| {' | '.join(row)} |" for row in table]


def _needs(saved: dict[str, Any]) -> dict[str, str]:
    asked, costs = saved["asked"], Costs(**saved["costs"])
    chip = chips.parse(asked["topology"]).chip
    received = sum(kind["bytes"] for kind in costs.collectives.values())
    return {
        "chips": f"{saved['chips']} {chip.name}",
        "mesh": " ".join(f"{axis} {size}" for axis, size in saved["mesh"].items() if size > 1),
        "links": " ".join(f"{axis} {number:g}" for axis, number in saved["links"].items()),
        "batch": str(asked["batch"]),
        "remat": remat_of(asked),
        "HBM a chip": f"{costs.peak_bytes * chip.devices / chips.GIB:.1f} of {chip.memory / chips.GIB:.0f} GiB",
        "free": f"{free(saved):.0%}",
        "useful TFLOP a chip": f"{saved['useful_flops'] / saved['chips'] / 1e12:.1f}",
        "compiled": f"{costs.flops * chip.devices / 1e12:.1f}",
        "GB received a chip": f"{received * chip.devices / 1e9:.1f}",
    }


def _times(saved: dict[str, Any], what: str) -> dict[str, str]:
    asked, roof = saved["asked"], rooflined(saved)
    least = cycles_are_least(saved)
    bounds = {"*optimistic*": roof.optimistic, "*pessimistic*": roof.pessimistic}
    cells = {
        "overlapped, *optimistic*": _time(roof, roof.overlapped),
        "estimate, *optimistic*": _time(roof, roof.estimate),
        "cycles, *optimistic*": _time(roof, roof.cycles, least),
        "serial, *pessimistic*": _time(roof, roof.serial),
        "cycles, interconnect, *pessimistic*": _time(roof, roof.cycles_serial, least),
        "interconnect alone, *optimistic*": f"{roof.fastest * 1e3:.0f} ms",
        "interconnect alone, *pessimistic*": f"{roof.slowest * 1e3:.0f} ms",
    }
    cells |= {f"{what} a second, {kind}": f"{asked['batch'] / seconds:,.0f}" for kind, seconds in bounds.items()}
    if asked["model"] != "t5":
        cells |= {f"days, {kind}": f"{seconds * PAPER_STEPS / 86400:.1f}" for kind, seconds in bounds.items()}
    return cells


def _time(roof: Roofline, seconds: float | None, least: bool = False) -> str:
    """Milliseconds and the fraction of the peak. least: the time is a lower bound."""
    if seconds is None:
        return "none"
    return f"{'≥ ' * least}{seconds * 1e3:.0f} ms, {'≤ ' * least}{roof.share(seconds):.0%}"


def free(saved: dict[str, Any]) -> float:
    """The fraction of a chip's memory that a plan leaves free."""
    chip = chips.parse(saved["asked"]["topology"]).chip
    return 1 - saved["costs"]["peak_bytes"] * chip.devices / chip.memory


if __name__ == "__main__":
    run(main)
