"""Reports of plans: one screen per plan, and cells of the published tables, from the saved JSON only."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.training import chips
from jaxdiff.training.gpu_targets import NOT_COUNTED
from jaxdiff.training.plan import Costs, Roofline, roofline

PAPER_STEPS = 2_500_000


def is_plan(values: Any) -> bool:
    """Whether JSON has all fields of a plan that the reports and tables read, with the right types."""
    kinds = {"asked": dict, "costs": dict, "mesh": dict, "chips": int, "parameters": int, "estimate": bool, "date": str}
    kinds |= {"unit": str, "links": dict}
    asked = {"topology": str, "model": str, "preset": str, "batch": int, "sample": bool, "compiler": str}
    if not (_has(values, kinds) and _has(values["asked"], asked) and _are_costs(values["costs"])):
        return False
    optional = {"bytes_per_device": {}, "added": ""} | values
    numbers = [values["chips"], values["parameters"], values["asked"]["batch"], values.get("useful_flops")]
    of_numbers = (values["mesh"], optional["bytes_per_device"], values["links"])
    return (
        all(map(_is_number, numbers))
        and all(map(_holds_numbers, of_numbers))
        and min(values["chips"], values["asked"]["batch"]) > 0
        and isinstance(optional["added"], str)
        and isinstance(values["asked"].get("dtype", "float32"), str)
    )


def _has(values: Any, kinds: Mapping[str, type]) -> bool:
    return isinstance(values, dict) and all(isinstance(values.get(name), kind) for name, kind in kinds.items())


def _are_costs(values: dict[str, Any]) -> bool:
    try:
        costs = Costs(**values)
    except TypeError:  # an extra or a missing field
        return False
    numbers = [costs.argument_bytes, costs.temporary_bytes, costs.peak_bytes, costs.flops, costs.bytes_accessed]
    numbers += [costs.unknown_loops, *(each for each in (costs.seconds, costs.total_cycles) if each is not None)]
    if not (all(map(_is_number, numbers)) and _holds_numbers(costs.cycles) and isinstance(costs.collectives, dict)):
        return False
    collectives = all(_holds_numbers(kind) and {"count", "bytes"} <= kind.keys() for kind in costs.collectives.values())
    # Rates divide by times, which must not be zero.
    times = (
        costs.flops,
        1 if costs.seconds is None else costs.seconds,
        sum(costs.cycles.values()) if costs.cycles else 1,
    )
    return collectives and min(times) > 0


def _holds_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(map(_is_number, values.values()))


def _is_number(value: Any) -> bool:
    """Whether a value is a valid count or size: no bool, not negative, not NaN, no float overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**100


def rooflined(plan: Mapping[str, Any]) -> Roofline:
    """The roofline of a plan, with the current rates of the chips."""
    topology = chips.parse(plan["asked"]["topology"])
    return roofline(Costs(**plan["costs"]), topology, plan["useful_flops"], plan["links"])


def cycles_are_least(plan: Mapping[str, Any]) -> bool:
    """Whether the plan has the cycles of the largest kinds of operations only, a lower bound of the total."""
    return plan["costs"].get("total_cycles") is None


def remat_of(asked: Mapping[str, Any]) -> str:
    """The rematerialization by the names of U-Nets; other networks have only blocks, or no choice."""
    chosen = asked.get("remat", False)
    return chosen if isinstance(chosen, str) else "blocks" if chosen else "none"


def report(plan: Mapping[str, Any]) -> str:
    """The report of a plan, one screen."""
    asked, costs, roof = plan["asked"], Costs(**plan["costs"]), rooflined(plan)
    topology = chips.parse(asked["topology"])
    chip, devices = topology.chip, topology.devices
    peak = costs.peak_bytes * chip.devices
    mesh = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    what = "sampling or encoding step" if asked["sample"] else "training step"
    lines = [
        f"{asked['model']} {asked['preset']} on {topology}: {topology.chips} chips, {devices} devices ({mesh})",
        f"{what} of {asked['batch']} {plan['unit']}, {asked.get('dtype', 'float32')}, remat {remat_of(asked)}, "
        f"{asked['compiler']}",
    ]
    if plan["estimate"]:
        lines.append("AN ESTIMATE from shapes alone: not compiled for this chip")
    elif not topology.is_tpu:
        lines.append(f"compiled, not run; memory is without {NOT_COUNTED}")
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
        f"useful FLOPs a step   {useful:,.1f} T, {useful / asked['batch']:,.3f} T for each of the {plan['unit']}",
        f"compiled FLOPs        {costs.flops * devices / 1e12:,.1f} T, {costs.flops / 1e12:,.3f} T a device",
    ]
    for kind, total in sorted(costs.collectives.items()):
        lines.append(f"{kind:21} {total['count']:,} with {total['bytes'] / 1e9:.3f} GB a device")
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
    lines = ["", "Fractions are of useful FLOPs. Pessimistic times also assume the published rate of every unit."]
    for name, (seconds, note) in times.items():
        if seconds is None:
            lines.append(f"{name:36} none")
            continue
        line = f"{name:36} {note}{_ms(seconds)}, {roof.share(seconds):.0%} of peak"
        line += f", {asked['batch'] / seconds:,.0f} {plan['unit']} a second"
        if asked["model"].startswith("imagen.") and not asked["sample"]:
            line += f", {seconds * PAPER_STEPS / 86400:.1f} days to {PAPER_STEPS:,} steps"
        lines.append(line)
    return lines


def _gib(size: float) -> str:
    return f"{size / chips.GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
