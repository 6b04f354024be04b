"""The published plans: every paper-size stage and T5-XXL's encoder on every kind of TPU, and how they scale.

    python -m experiments.plan_tables                # whatever is not planned yet: some 6 hours of one core, 21 GB
    python -m experiments.plan_tables --only v5e     # those whose name has this in it
    python -m experiments.plan_tables --only none    # the page alone, from the plans that are there

Each plan is a file of tpu_scripts/plans/, written when it is done, so that the command goes on where it was stopped;
README.md there is made from them, with the command of each. A plan is made again when its settings below change, or
under `--again`.
"""

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import plan
from experiments.cli import run
from jaxdiff.data.files import replacing, usable
from jaxdiff.training import chips
from jaxdiff.training.plan import Costs

FOLDER = Path("tpu_scripts/plans")
LEAST_FREE = 0.15
"""Share of a chip's memory that a plan has to leave."""

SLICES = {"v4": "4x8x8", "v5e": "16x16", "v5p": "4x8x8", "v6e": "16x16", "tpu7x": "4x8x8"}
"""256 chips of every kind: the paper trained its base on so many."""
HOSTS = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
"""Four chips of every kind."""
SCALED = {"4x4x4": 64, "4x8x8": 256, "8x8x8": 512}
"""v5p slices, the base model with the same batch on each chip."""
SMALL = {("base64", "v5e")}
"""Where memory asks for computing again what lies between convolutions."""


def cases() -> dict[str, plan.Run]:
    """Every plan by its name."""
    found = {}
    for stage, preset in (("base64", "2b"), ("sr256", "paper"), ("sr1024", "paper")):
        for chip, shape in SLICES.items():
            remat = "outputs" if (stage, chip) in SMALL else "none"
            mesh = "data=16,fsdp=32" if chip == "tpu7x" else "data=8,fsdp=32"
            found[f"{stage}-{chip}"] = plan.Run(f"{chip}:{shape}", stage, preset, 2048, mesh, remat=remat)
    for shape, count in SCALED.items():
        if (name := scaled()[count]) not in found:
            found[name] = plan.Run(f"v5p:{shape}", "base64", "2b", 8 * count, f"data={count // 32},fsdp=32")
    for chip, shape in HOSTS.items():
        mesh = "data=2,fsdp=4" if chip == "tpu7x" else "fsdp=-1"  # over fsdp=8 it would receive five times as much
        found[f"text-{chip}"] = plan.Run(f"{chip}:{shape}", "text", "2b", 256, mesh)
    return found


def main(only: str = "", again: bool = False, out: Path = FOLDER) -> int:
    """Plan what is not planned yet, and write the page.

    Args:
        only: a part of the names of those to plan; `none`: the page alone
        again: also those that are there
        out: where the plans are kept
    """
    usable(out)
    wanted = {} if only == "none" else {name: case for name, case in cases().items() if only in name}
    if not wanted and only != "none":
        raise ValueError(f"--only {only}: no plan has that in its name: {', '.join(cases())}")
    due = {name: case for name, case in wanted.items() if again or not _answers(out / f"{name}.json", case)}
    failed = 0
    for name, case in tqdm(due.items(), desc="plans", unit="plan"):
        # A process each: what one leaves in memory is gone with it, and one that fails (too little memory, here or on
        # the chip) leaves the others alone.
        done = subprocess.run([sys.executable, *_words(dataclasses.asdict(case)), "--json", str(out / f"{name}.json")])
        if done.returncode:
            failed += 1
            tqdm.write(f"{name}: not planned, exit code {done.returncode}", file=sys.stderr)
        _write_page(out)
    _write_page(out)
    print(f"{out / 'README.md'}: {len(_kept(out))} plans")
    return 1 if failed else 0


def _answers(path: Path, case: plan.Run) -> bool:
    """Whether a kept plan has these settings, whatever the compiler's version."""
    kept = plan.read(path)
    settings = plan.asked(case, None)
    return kept is not None and {name: kept["asked"].get(name) for name in settings} == settings


def _kept(out: Path) -> dict[str, dict[str, Any]]:
    """The plans that are there and still wanted."""
    found = {}
    for name, case in cases().items():
        with contextlib.suppress(ValueError):
            if _answers(out / f"{name}.json", case):
                found[name] = plan.read(out / f"{name}.json")
    return found


def _write_page(out: Path) -> None:
    kept = _kept(out)
    training = {name: made for name, made in kept.items() if made["asked"]["stage"] != "text"}
    encoding = {name: made for name, made in kept.items() if made["asked"]["stage"] == "text"}
    versions = sorted({f"{made['asked']['compiler']}, {made['date']}" for made in kept.values()})
    lines = [
        "# Plans",
        "",
        "What the TPUs' own compiler makes of the real step, for slices that nobody here has (`experiments/plan.py`).",
        "Made by `python -m experiments.plan_tables`; nothing of it was measured on a TPU. `overlapped` and `serial`:",
        "the step if arithmetic, memory and interconnect ran at the published rates all at once, or one after another;",
        "`compiler`: its own estimate. Shares are of the chip's peak; days are to the paper's 2.5 M steps.",
        f"Compilers and dates: {'; '.join(versions) or 'none yet'}. A CPU core makes a plan in 1 to 50 minutes.",
        "",
        *_table(training),
        "",
        *_scaling(kept),
        "T5-XXL's encoder, frozen, bfloat16, captions of 128 tokens:",
        "",
        *_table(encoding),
        "",
        "The command of each:",
        "",
        *(f"    {command(made)}" for made in kept.values()),
    ]
    with replacing(out / "README.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scaling(kept: dict[str, dict[str, Any]]) -> list[str]:
    """What becomes of the base model's speed on v5p when chips are added, each with as many pictures as before."""
    plans = {chips: kept[name] for chips, name in scaled().items() if name in kept}
    if len(plans) < 2:
        return []
    first, *others = sorted(plans)
    told = []
    for count in others:
        shares = [measure(plans[count]) / measure(plans[first]) for measure in (speed, serial_speed)]
        told.append("on {} {:.1%} by the compiler's estimate, {:.1%} if nothing overlaps".format(count, *shares))
    return [f"Pictures a second and chip of base64 on v5p, of those on {first} chips: {'; '.join(told)}.", ""]


def scaled() -> dict[int, str]:
    """The plans of the base model on more and more v5p chips, by their number."""
    return {count: "base64-v5p" if count == 256 else f"base64-v5p-{count}" for count in SCALED.values()}


def speed(made: dict[str, Any]) -> float:
    """Pictures a second and chip by the compiler's estimate; where it gives none, if nothing overlaps."""
    seconds = made["costs"]["seconds"]
    return made["asked"]["batch"] / seconds / made["chips"] if seconds else serial_speed(made)


def serial_speed(made: dict[str, Any]) -> float:
    """Pictures a second and chip if arithmetic, memory and interconnect come one after another."""
    return made["asked"]["batch"] / plan.rooflined(made).serial / made["chips"]


def command(made: dict[str, Any]) -> str:
    """What would make this plan."""
    return " ".join(["python", *_words(made["asked"])])


def _words(asked: dict[str, Any]) -> list[str]:
    default = plan.Run(asked["topology"])
    words = ["-m", "experiments.plan"]
    for field in dataclasses.fields(plan.Run):
        value = asked.get(field.name, getattr(default, field.name))
        if field.name == "topology" or value != getattr(default, field.name):
            words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    return words


def _table(plans: dict[str, dict[str, Any]]) -> list[str]:
    if not plans:
        return ["Not planned yet."]
    names = ("plan", "chips", "mesh", "batch", "remat", "HBM a chip", "free", "TFLOP a chip", "GB received a chip")
    names += ("overlapped", "serial", "compiler", "a second", "days")
    rows = [names, ("---",) * len(names), *(_row(name, made) for name, made in plans.items())]
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(name: str, made: dict[str, Any]) -> tuple[str, ...]:
    asked, costs, roof = made["asked"], Costs(**made["costs"]), plan.rooflined(made)
    chip = chips.parse(asked["topology"]).chip
    received = sum(kind["bytes"] for kind in costs.collectives.values())
    estimate = costs.seconds or roof.serial
    trains = asked["stage"] != "text"
    compiler = "none" if costs.seconds is None else f"{costs.seconds * 1e3:.0f} ms, {roof.share_compiler:.0%}"
    return (
        name,
        f"{made['chips']} {chip.name}",
        " ".join(f"{axis} {size}" for axis, size in made["mesh"].items() if size > 1),
        str(asked["batch"]),
        asked["remat"],
        f"{costs.peak_bytes * chip.devices / chips.GIB:.1f} of {chip.memory / chips.GIB:.0f} GiB",
        f"{free(made):.0%}",
        f"{costs.flops * chip.devices / 1e12:.1f}",
        f"{received * chip.devices / 1e9:.1f}",
        f"{roof.overlapped * 1e3:.0f} ms, {roof.share_overlapped:.0%}",
        f"{roof.serial * 1e3:.0f} ms, {roof.share_serial:.0%}",
        compiler,
        f"{asked['batch'] / estimate:,.0f}",
        f"{estimate * plan.PAPER_STEPS / 86400:.1f}" if trains else "–",
    )


def free(made: dict[str, Any]) -> float:
    """The share of a chip's memory that a plan leaves."""
    chip = chips.parse(made["asked"]["topology"]).chip
    return 1 - made["costs"]["peak_bytes"] * chip.devices / chip.memory


if __name__ == "__main__":
    run(main)
