"""What a step would cost on chips that need not be there: memory, FLOPs, communication, a roofline.

`compiled_costs` reads a program that was compiled ahead of time, `estimated_costs` what shapes alone say of a training
step, for chips that no compiler is at hand for. Both end in `Costs` of one device, from which `roofline` follows.
`network_flops` counts what the network itself needs, the same on every chip.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxdiff.training import hlo
from jaxdiff.training.chips import Topology
from jaxdiff.training.state import Trainable, TrainState, loss_inputs


@dataclass(frozen=True)
class Costs:
    """Of one step on one device: bytes of memory, FLOPs, bytes that pass through memory, collectives by kind.

    peak_bytes: arguments, results that do not reuse their memory, temporaries and the program itself.
    For GPUs it lacks `gpu_targets.NOT_COUNTED`. flops: of the compiled program, with all that it computes again or
    pads; for GPUs of convolutions and matrix products alone. seconds: the compiler's own estimate, None
    where it gives none (or nonsense, below zero or none per FLOP). cycles: its counts by kind of operation, the largest
    first (TPU alone); total_cycles: of all kinds, None where only the largest are kept. Neither holds communication.
    unknown_loops: loops counted once.
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
    total_cycles: float | int | None = None


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step, by several ways of reckoning. None of them was measured.

    compute, memory: what arithmetic and memory need at the chip's published rates, each alone. fastest and slowest:
    the same of the interconnect, over the links of the mesh axes in use; where it is not known to which axis a
    collective belongs, over the one with the most or the fewest links.

    Optimistic, so that a real step takes longer: `overlapped` (compute, memory and `fastest` at the same time),
    `estimate` (the compiler's own) and `cycles` (the compiler's counts at the chip's clock); the last two hold no
    communication. Pessimistic, as nothing overlaps, though still at full rates: `serial` (compute, memory, `slowest`)
    and `cycles_serial` (cycles, `slowest`). None where the compiler or the clock is not known.
    """

    compute: float
    memory: float
    fastest: float
    slowest: float
    estimate: float | None
    cycles: float | None
    least: float
    """Seconds that the useful FLOPs alone would take at the peak."""

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.memory, self.fastest)

    @property
    def serial(self) -> float:
        return self.compute + self.memory + self.slowest

    @property
    def cycles_serial(self) -> float | None:
        return None if self.cycles is None else self.cycles + self.slowest

    @property
    def optimistic(self) -> float:
        """The longest of the optimistic times."""
        return max(self.overlapped, self.estimate or 0.0, self.cycles or 0.0)

    @property
    def pessimistic(self) -> float:
        """The longest of all."""
        return max(self.optimistic, self.serial, self.cycles_serial or 0.0)

    def share(self, seconds: float) -> float:
        """Useful FLOPs / (seconds × peak)."""
        return self.least / seconds if seconds else 0.0


FSDP = ("all-gather", "reduce-scatter", "collective-permute", "all-to-all")
"""Collectives that move parameters and their gradients along `fsdp`, unless layers are split too."""


def roofline(costs: Costs, topology: Topology, useful: float, links: Mapping[str, float | int]) -> Roofline:
    """The roofline of a device, which is a chip of this slice or its equal part.

    Args:
        useful: FLOPs of the network in the whole step (`network_flops`)
        links: of a chip, for each mesh axis of more than one device; empty: all that the chip has (GPUs)
    """
    chip = topology.chip
    peak, bandwidth = chip.peak / chip.devices, chip.bandwidth / chip.devices
    total = None if chip.clock is None or not costs.cycles else costs.total_cycles or sum(costs.cycles.values())
    return Roofline(
        compute=costs.flops / peak,
        memory=costs.bytes_accessed / bandwidth,
        fastest=_received(costs, topology, links, max),
        slowest=_received(costs, topology, links, min),
        estimate=costs.seconds,
        cycles=None if total is None or chip.clock is None else total / chip.clock,
        least=useful / topology.devices / peak,
    )


def _received(
    costs: Costs, topology: Topology, links: Mapping[str, float | int], choose: Callable[..., float]
) -> float:
    """Seconds of the collectives, one after another, each along the mesh axis that `choose` picks by its links unless
    the kind says which axis it is."""
    chip = topology.chip
    if not links:
        return sum(kind["bytes"] for kind in costs.collectives.values()) * chip.devices / chip.interconnect
    used = {name: number for name, number in links.items() if number}  # none between the devices of one chip
    seconds = 0.0
    for kind, collective in costs.collectives.items():
        known = kind in FSDP and "fsdp" in used and "tensor" not in links
        number = used["fsdp"] if known else choose(used.values(), default=math.inf)
        seconds += collective["bytes"] * chip.devices / (number * topology.link)
    return seconds


def compiled_costs(compiled: Any, devices: int) -> Costs:
    """Of a function compiled ahead of time (`jax.jit(…).lower(…).compile()`) for so many devices.

    For GPUs the compiler counts nothing: FLOPs are those of convolutions and matrix products, bytes the operands and
    results of all kernels, both from the program's text. Memory is without cuDNN's workspace.
    """
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis()
    program = hlo.read(compiled.as_text(), devices)
    if counted is None:
        counted = {"flops": program.flops / program.loop_factor, "bytes accessed": program.bytes / program.loop_factor}
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
        collectives={
            kind: {"count": collective.count, "bytes": collective.bytes}
            for kind, collective in program.collectives.items()
        },
        seconds=seconds if seconds > 0 and math.isfinite(seconds) else None,
        cycles=dict(program.cycles.most_common(12)),
        unknown_loops=program.unknown_loops,
        total_cycles=program.cycles.total(),
    )


def network_flops(function: Callable[..., Any], *shapes: Any) -> float:
    """FLOPs of the convolutions and matrix products of a function, from its shapes alone: nothing is compiled, borders
    of convolutions do not count. A training step needs three times those of its loss: the backward pass multiplies
    twice where the forward pass multiplies once."""
    return _counted(jax.make_jaxpr(function)(*shapes).jaxpr)[0]


def estimated_costs(
    trainable: Trainable, state: TrainState, batch: Any, frozen: Any = (), accumulate: int = 1
) -> Costs:
    """Of a training step by shapes alone. `batch`: what one device takes at a time, `accumulate` times a step.

    `state` and `frozen`, what the loss reads and never updates: shapes with shardings, split over the `fsdp` axis of
    their mesh and copied along `data`. Counted are: the FLOPs of convolutions and matrix products; what is kept for the
    backward pass, without any fusion; each array that they read or write once through memory.
    """

    def backward(params: Any, *rest: Any) -> Any:
        return jax.vjp(lambda params: trainable.loss(params, *rest)[0], params)[1]

    params, *rest = loss_inputs(trainable, batch, frozen)
    compute_params = jax.eval_shape(trainable.cast, params)
    sizes = state.step.sharding.mesh.shape
    shards, copies = sizes["fsdp"], sizes["data"]
    kept = _bytes(jax.eval_shape(backward, compute_params, *rest))  # the parameters are among them
    gradient = jax.make_jaxpr(lambda *given: jax.grad(trainable.loss, has_aux=True)(*given)[0])(compute_params, *rest)
    flops, moved = _counted(gradient.jaxpr)
    arguments = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in _leaves((state, frozen))
    )
    size = _bytes(compute_params)
    collectives = {}
    if shards > 1:
        remote = (shards - 1) / shards
        moved_bytes = {"all-gather": size + _bytes((state.extra, frozen)), "reduce-scatter": size}
        collectives = {
            kind: {"count": accumulate, "bytes": accumulate * bytes_ * remote} for kind, bytes_ in moved_bytes.items()
        }
    if copies > 1:
        collectives["all-reduce"] = {"count": 1, "bytes": 2 * size / shards * (copies - 1) / copies}
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
            flops += _convolution(equation)
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


def _convolution(equation: Any) -> float:
    """FLOPs of a convolution; multiplications with what lies beyond a border, or between dilated places, are none."""
    (left, right), out, params = (
        (variable.aval for variable in equation.invars),
        equation.outvars[0].aval,
        equation.params,
    )
    numbers = params["dimension_numbers"]
    pairs = 2.0 * right.shape[numbers.rhs_spec[1]]
    pairs *= out.shape[numbers.out_spec[0]] * out.shape[numbers.out_spec[1]]
    for axis, (low, _) in enumerate(params["padding"]):
        spread, stride = params["lhs_dilation"][axis], params["window_strides"][axis]
        end = (left.shape[numbers.lhs_spec[2 + axis]] - 1) * spread + 1
        taps = np.arange(right.shape[numbers.rhs_spec[2 + axis]]) * params["rhs_dilation"][axis]
        places = np.arange(out.shape[numbers.out_spec[2 + axis]])[:, None] * stride - low + taps
        pairs *= int(np.count_nonzero((places >= 0) & (places < end) & (places % spread == 0)))
    return pairs


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            candidate = getattr(candidate, "jaxpr", candidate)
            if hasattr(candidate, "eqns"):
                yield candidate
