"""What a step would cost on chips that need not be there: memory, FLOPs, communication, a roofline.

`compiled_costs` reads a program that was compiled ahead of time, `estimated_costs` what shapes alone say of a training
step, for chips that no compiler is at hand for. Both end in `Costs` of one device, from which `roofline` follows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxdiff.training import hlo
from jaxdiff.training.chips import Topology


@dataclass(frozen=True)
class Costs:
    """Of one step on one device: bytes of memory, FLOPs, bytes that pass through memory, collectives by kind.

    peak_bytes: arguments, results that do not reuse their memory, temporaries and the program itself.
    seconds: the compiler's own estimate, None where it gives none (or nonsense, below zero or none per FLOP).
    cycles: the same by kind of operation, the largest first (TPU alone). unknown_loops: loops counted once.
    """

    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    flops: float
    bytes_accessed: float
    collectives: dict[str, dict[str, float | int]]
    seconds: float | None = None
    cycles: dict[str, float | int] = field(default_factory=dict)
    unknown_loops: int = 0


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step that arithmetic, memory and interconnect need at the chip's published rates, each alone.

    overlapped: all at the same time, the longest of them; serial: one after the other. A real step lies between, if the
    kernels reach those rates. Shares are of the peak: FLOPs / (seconds × peak).
    """

    compute: float
    memory: float
    interconnect: float
    overlapped: float
    serial: float
    share_overlapped: float
    share_serial: float
    share_compiler: float | None


def roofline(costs: Costs, topology: Topology) -> Roofline:
    """The roofline of a device, which is a chip of this slice or its equal part."""
    chip = topology.chip
    peak, bandwidth, interconnect = (rate / chip.devices for rate in (chip.peak, chip.bandwidth, topology.interconnect))
    received = sum(kind["bytes"] for kind in costs.collectives.values())
    parts = (costs.flops / peak, costs.bytes_accessed / bandwidth, received / interconnect)
    overlapped, serial = max(parts), sum(parts)
    share = lambda seconds: costs.flops / (seconds * peak) if seconds else 0.0  # noqa: E731
    compiler = None if costs.seconds is None else share(costs.seconds)
    return Roofline(*parts, overlapped, serial, share(overlapped), share(serial), compiler)


def compiled_costs(compiled: Any, devices: int) -> Costs:
    """Of a function compiled ahead of time (`jax.jit(…).lower(…).compile()`) for so many devices."""
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis()
    program = hlo.read(compiled.as_text(), devices)
    temporary = memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    seconds = counted.get("optimal_seconds", 0.0) * program.loop_factor
    return Costs(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=temporary,
        peak_bytes=memory.argument_size_in_bytes + results + temporary + code,
        flops=counted["flops"] * program.loop_factor,
        bytes_accessed=counted["bytes accessed"] * program.loop_factor,
        collectives={kind: {"count": found.count, "bytes": found.bytes} for kind, found in program.collectives.items()},
        seconds=seconds if seconds > 0 and math.isfinite(seconds) else None,
        cycles=dict(program.cycles.most_common(12)),
        unknown_loops=program.unknown_loops,
    )


def estimated_costs(
    loss: Callable[..., Any], state: Any, whole: Any, batch: Any, key: Any, parts: int, copies: int, accumulate: int = 1
) -> Costs:
    """Of a training step by shapes alone. `loss(params, batch, key)`, with aux; `batch`: what one device takes at a
    time, `accumulate` times a step.

    `state`: the train state, shapes with shardings; `whole`: the parameters as the loss takes them. Parameters are
    split over `parts` devices, of which there are `copies`. Counted are: the FLOPs of convolutions and matrix products;
    what is kept for the backward pass, without any fusion; each array that they read or write once through memory.
    """

    def backward(params: Any, batch: Any, key: Any) -> Any:
        return jax.vjp(lambda params: loss(params, batch, key)[0], params)[1]

    kept = _bytes(jax.eval_shape(backward, whole, batch, key))  # the parameters are among them
    gradient = jax.make_jaxpr(lambda *given: jax.grad(loss, has_aux=True)(*given)[0])(whole, batch, key)
    flops, moved = _counted(gradient.jaxpr)
    arguments = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in _leaves(state))
    size = _bytes(whole)
    collectives = {}
    if parts > 1:
        share = (parts - 1) / parts
        each = {"count": accumulate, "bytes": accumulate * size * share}
        collectives = {kind: dict(each) for kind in ("all-gather", "reduce-scatter")}
    if copies > 1:
        collectives["all-reduce"] = {"count": 1, "bytes": 2 * size / parts * (copies - 1) / copies}
    temporary = kept + size  # and the gradients
    # The update reads and writes the state once.
    moved = accumulate * moved + 2 * arguments
    return Costs(arguments, temporary, arguments + temporary, accumulate * flops, moved, collectives)


def _leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in _leaves(tree) if _plain(leaf))


def _plain(leaf: Any) -> bool:
    return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) and leaf.dtype != jax.dtypes.float0


def _counted(jaxpr: Any) -> tuple[float, float]:
    """FLOPs of the convolutions and matrix products of a jaxpr, loops included, and the bytes they read and write."""
    flops = moved = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.conv_general_dilated_p:
            kernel = equation.invars[1].aval
            places = equation.params["dimension_numbers"].rhs_spec
            flops += 2.0 * equation.outvars[0].aval.size * kernel.size / kernel.shape[places[0]]
        elif equation.primitive is jax.lax.dot_general_p:
            (_, contracted), _ = equation.params["dimension_numbers"]
            right = equation.invars[1].aval.shape
            flops += 2.0 * equation.outvars[0].aval.size * math.prod(right[axis] for axis in contracted)
        else:
            times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            for inner in _inner(equation.params):
                inside, through = _counted(inner)
                flops, moved = flops + times * inside, moved + times * through
            continue
        arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        moved += sum(array.size * array.dtype.itemsize for array in arrays)
    return flops, moved


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            candidate = getattr(candidate, "jaxpr", candidate)
            if hasattr(candidate, "eqns"):
                yield candidate
