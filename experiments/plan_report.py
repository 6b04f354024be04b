"""What a plan says: one screen for one plan, the cells of the published tables. From the kept JSON alone."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.training import chips
from jaxdiff.training.plan import Costs, Roofline, roofline

PAPER_STEPS = 2_500_000


def rooflined(plan: Mapping[str, Any]) -> Roofline:
    """The roofline of a plan, by the rates as they are known now."""
    topology = chips.parse(plan["asked"]["topology"])
    return roofline(Costs(**plan["costs"]), topology, plan["useful_flops"], plan["links"])


def cycles_are_least(plan: Mapping[str, Any]) -> bool:
    """Whether only the largest kinds of operations were kept of the cycles, so that all of them are more."""
    return plan["costs"].get("total_cycles") is None


def report(plan: Mapping[str, Any]) -> str:
    """One screen."""
    asked, costs, roof = plan["asked"], Costs(**plan["costs"]), rooflined(plan)
    topology = chips.parse(asked["topology"])
    chip, devices = topology.chip, topology.devices
    peak = costs.peak_bytes * chip.devices
    mesh = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    what = "drawing step" if asked["sample"] else "batch" if asked["stage"] == "text" else "training step"
    size = "" if asked["stage"] == "text" else f" {asked['preset']}"
    lines = [
        f"{asked['stage']}{size} on {topology}: {topology.chips} chips, {devices} devices ({mesh})",
        f"{what} of {asked['batch']}, {asked['dtype']}, remat {asked['remat']}, {asked['compiler']}",
    ]
    if plan["estimate"]:
        lines.append("AN ESTIMATE from shapes alone: nothing was compiled for this chip")
    lines += ["", f"parameters            {plan['parameters'] / 1e6:,.1f} M"]
    for name, size in plan.get("bytes_per_device", {}).items():
        lines.append(f"{name + ', a device':21} {_gib(size)}")
    useful = plan["useful_flops"] / 1e12
    lines += [
        f"arguments, a device   {_gib(costs.argument_bytes)}",
        f"temporaries, a device {_gib(costs.temporary_bytes)}",
        f"peak, a device        {_gib(costs.peak_bytes)}",
        f"peak, a chip          {_gib(peak)} of {_gib(chip.memory)}: {1 - peak / chip.memory:.0%} free",
        "",
        f"useful FLOPs a step   {useful:,.1f} T, {useful / asked['batch']:,.3f} T an image or caption",
        f"compiled FLOPs        {costs.flops * devices / 1e12:,.1f} T, {costs.flops / 1e12:,.3f} T a device",
    ]
    for kind, found in sorted(costs.collectives.items()):
        lines.append(f"{kind:21} {found['count']:,} with {found['bytes'] / 1e9:.3f} GB a device")
    if costs.unknown_loops:
        lines.append(f"{costs.unknown_loops} loops of unknown length count once")
    links = ", ".join(f"{name} {number:g}" for name, number in plan["links"].items()) or "all"
    lines += [
        "",
        f"compute               {_ms(roof.compute)}",
        f"memory                {_ms(roof.memory)} for {costs.bytes_accessed / 1e9:.1f} GB",
        f"interconnect          {_ms(roof.fastest)} to {_ms(roof.slowest)} (links of a chip: {links})",
        *_outcomes(plan, roof),
    ]
    return "\n".join(lines)


def _outcomes(plan: Mapping[str, Any], roof: Roofline) -> list[str]:
    asked, least = plan["asked"], "at least " if cycles_are_least(plan) else ""
    times = {
        "optimistic, all overlapped": (roof.overlapped, ""),
        "optimistic, compiler's estimate": (roof.estimate, "without interconnect: "),
        "optimistic, compiler's cycles": (roof.cycles, f"without interconnect: {least}"),
        "pessimistic, none overlapped": (roof.serial, ""),
        "pessimistic, cycles and interconnect": (roof.cycles_serial, least),
    }
    lines = ["", "Shares are of useful FLOPs. Pessimistic times, too, take every unit at its published rate."]
    for name, (seconds, note) in times.items():
        if seconds is None:
            lines.append(f"{name:36} none")
            continue
        line = f"{name:36} {note}{_ms(seconds)}, {roof.share(seconds):.0%} of peak"
        line += f", {asked['batch'] / seconds:,.0f} a second"
        if asked["stage"] != "text" and not asked["sample"]:
            line += f", {seconds * PAPER_STEPS / 86400:.1f} days to {PAPER_STEPS:,} steps"
        lines.append(line)
    return lines


def _gib(size: float) -> str:
    return f"{size / chips.GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
