"""Estimated costs of a step on chips that need not be present: memory, FLOPs, communication, a roofline.

`compiled_costs` reads a program compiled ahead of time. `estimated_costs` uses only the shapes of a training step, for
chips without an available compiler. Both return the `Costs` of one device, the input of `roofline`. `network_flops`
counts the FLOPs of the network itself, the same on every chip.
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
    """Costs of one step on one device: bytes of memory, FLOPs, bytes accessed in memory, collectives by kind.

    peak_bytes: arguments, results that do not reuse their memory, temporaries and the program itself. For GPUs it lacks
    `gpu_targets.NOT_COUNTED`. flops: of the compiled program, including recomputation and padding; for GPUs only
    convolutions and matrix products. seconds: the compiler's estimate; None if absent or invalid (not above 0 or not
    finite). cycles: the compiler's counts by kind of operation, the largest first (TPU only). total_cycles: of all
    kinds; None if only the largest are stored. Cycles exclude communication. unknown_loops: loops counted once.
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
    """Estimates of a step's seconds by several methods; none is measured.

    compute, memory: time of the arithmetic or the memory accesses alone, at the chip's published rates. fastest,
    slowest: time of the interconnect alone, over the links of the mesh axes in use; if a collective's axis is unknown,
    over the axis with the most or the fewest links.

    Optimistic (a real step takes longer): `overlapped` (compute, memory and `fastest` in parallel), `estimate` (the
    compiler's) and `cycles` (the compiler's counts at the chip's clock); the last two exclude communication.
    Pessimistic (no overlap, but full rates): `serial` (compute, memory, `slowest`) and `cycles_serial` (cycles,
    `slowest`). None if the compiler's numbers or the clock are unknown.
    """

    compute: float
    memory: float
    fastest: float
    slowest: float
    estimate: float | None
    cycles: float | None
    least: float
    """Seconds for the useful FLOPs at the peak rate."""

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
        """The longest optimistic time."""
        return max(self.overlapped, self.estimate or 0.0, self.cycles or 0.0)

    @property
    def pessimistic(self) -> float:
        """The longest time."""
        return max(self.optimistic, self.serial, self.cycles_serial or 0.0)

    def share(self, seconds: float) -> float:
        """Useful FLOPs / (seconds × peak)."""
        return self.least / seconds if seconds else 0.0


FSDP = ("all-gather", "reduce-scatter", "collective-permute", "all-to-all")
"""Collectives that move parameters and their gradients along `fsdp`, unless layers are also split."""


def roofline(costs: Costs, topology: Topology, useful: float, links: Mapping[str, float | int]) -> Roofline:
    """The roofline of one device of this slice: a chip, or an equal fraction of a chip.

    Args:
        useful: FLOPs of the network in the step, over all devices (`network_flops`)
        links: links of a chip for each mesh axis of more than one device; empty: all of the chip's links (GPUs)
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
    """Seconds of the collectives in sequence. Each runs along the mesh axis implied by its kind, or else along the axis
    that `choose` selects by the number of links."""
    chip = topology.chip
    if not links:
        return sum(kind["bytes"] for kind in costs.collectives.values()) * chip.devices / chip.interconnect
    used = {name: number for name, number in links.items() if number}  # 0 between the devices of one chip
    seconds = 0.0
    for kind, collective in costs.collectives.items():
        known = kind in FSDP and "fsdp" in used and "tensor" not in links
        number = used["fsdp"] if known else choose(used.values(), default=math.inf)
        seconds += collective["bytes"] * chip.devices / (number * topology.link)
    return seconds


def compiled_costs(compiled: Any, devices: int) -> Costs:
    """Costs of a function compiled ahead of time (`jax.jit(…).lower(…).compile()`) for `devices` devices.

    For GPUs the compiler counts nothing: FLOPs are those of convolutions and matrix products, bytes those of the
    operands and results of all kernels, both read from the program's text. Memory excludes cuDNN's workspace.
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
    """FLOPs of the convolutions and matrix products of a function, from shapes only, without compilation or the padding
    of convolutions."""
    return _counted(jax.make_jaxpr(function)(*shapes).jaxpr)[0]


def training_flops(trainable: Trainable, batch: Any, frozen: Any = ()) -> float:
    """`network_flops` of a training step without recomputation. The backward pass has two products for each product of
    the forward pass; for frozen arrays it has one, or none, so with these the gradient itself is counted."""
    inputs = loss_inputs(trainable, batch, frozen)
    if not jax.tree.leaves(frozen):
        return 3 * network_flops(trainable.loss, *inputs)
    return network_flops(jax.grad(trainable.loss, has_aux=True), *inputs)


def estimated_costs(
    trainable: Trainable, state: TrainState, batch: Any, frozen: Any = (), accumulate: int = 1
) -> Costs:
    """Costs of a training step from shapes only. batch: one device's microbatch, of `accumulate` per step.

    state, frozen: shapes with shardings, sharded over the `fsdp` axis of their mesh and replicated along `data`.
    Counts the FLOPs of convolutions and matrix products, one memory access for each of their operands and results, and
    the activations stored for the backward pass, without fusion.
    """

    def backward(params: Any, *rest: Any) -> Any:
        return jax.vjp(lambda params: trainable.loss(params, *rest)[0], params)[1]

    params, *rest = loss_inputs(trainable, batch, frozen)
    compute_params = jax.eval_shape(trainable.cast, params)
    sizes = state.step.sharding.mesh.shape
    shards, copies = sizes["fsdp"], sizes["data"]
    stored = _bytes(jax.eval_shape(backward, compute_params, *rest))  # includes the parameters
    gradient = jax.make_jaxpr(lambda *args: jax.grad(trainable.loss, has_aux=True)(*args)[0])(compute_params, *rest)
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
    temporary = stored + size  # plus the gradients
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
    """FLOPs of the convolutions and matrix products of a jaxpr, including loops, and the bytes they read and write."""
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
    """FLOPs of a convolution, without multiplications by padding or by the zeros of a dilated input."""
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
