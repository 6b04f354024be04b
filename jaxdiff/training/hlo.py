"""Cost analysis of a compiled program from its text: collectives with their bytes, loops, cycle estimates.

XLA's own cost analysis counts a loop body once, ignores communication, and is unavailable for GPUs. The text
(`as_text()` of a compiled function, the optimised HLO of one device) contains all of this.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

COUNTING = 2
"""Version of the counting rules; results of another version must be recomputed."""
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_UNKNOWN = 2**62
"""Cycle estimates from here on are invalid: overflows, or the maximum value."""

_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^\s*([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")


@dataclass(frozen=True)
class Instruction:
    """One line: name, the text of its shape, opcode, and what follows the opening parenthesis."""

    name: str
    shape: str
    opcode: str
    rest: str


@dataclass
class Collectives:
    """Collectives of one kind: their number per run of the program, and the bytes that each device receives."""

    count: int = 0
    bytes: float = 0.0


@dataclass(frozen=True)
class Program:
    """Counts for one run of a program on one device, loop iterations included.

    loop_factor: FLOPs of convolutions and matrix products with loop iterations, divided by those with each body counted
    once: the correction for a cost analysis without loops. unknown_loops: loops with an unknown trip count. cycles: the
    compiler's estimates by kind of operation (TPU only). flops: of convolutions, matrix products and (GPU) attention.
    bytes: operands and results of all kernels, each read or written once; kernels: their number, including copies and
    collectives.
    """

    collectives: dict[str, Collectives]
    loop_factor: float
    unknown_loops: int
    cycles: Counter = field(default_factory=Counter)
    flops: float = 0.0
    bytes: float = 0.0
    kernels: int = 0


def read(text: str, devices: int) -> Program:
    """The counts of an optimised HLO module for `devices` devices."""
    computations, entry = _computations(text)
    times, unknown = _multiplicities(computations, entry)
    collectives: dict[str, Collectives] = defaultdict(Collectives)
    once = looped = 0.0
    cycles: Counter = Counter()
    chains: set[str] = set()
    launching, moved, kernels = _launching(computations, entry), 0.0, 0
    for name, instructions in computations.items():
        if name not in times:
            continue
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            kind = _kind(instruction, name)
            if kind is not None and _begins(instruction, chains):
                collectives[kind].count += times[name]
                collectives[kind].bytes += times[name] * _received(instruction, kind, devices)
            flops = _flops(instruction, shapes)
            once, looped = once + flops, looped + times[name] * flops
            if name in launching and _is_kernel(instruction):
                kernels += times[name]
                moved += times[name] * _moved(instruction, shapes)
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            if estimate and int(estimate[1]) < _UNKNOWN and "fused" not in name:
                cycles[_label(instruction)] += times[name] * int(estimate[1])
    return Program(dict(collectives), looped / once if once else 1.0, unknown, cycles, looped, moved, kernels)


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation's instructions by its name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = head[2]
            entry = current if head[1] else entry
            computations[current] = []
        elif current and (parsed := _instruction(line)) is not None:
            computations[current].append(parsed)
    if not entry:
        raise ValueError("no HLO module: it has no ENTRY")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if match is None:
        return None
    text = match[2]
    end = _closing(text) + 1 if text.startswith("(") else text.find(" ")
    opcode = _OPCODE.match(text[end:])
    return None if opcode is None else Instruction(match[1], text[:end], opcode[1], opcode[2])


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text) - 1


def _multiplicities(computations: dict[str, list[Instruction]], entry: str) -> tuple[Counter, int]:
    """The number of runs of each computation, and the number of loops with an unknown trip count."""
    times: Counter = Counter({entry: 1})
    unknown = 0

    def visit(name: str, factor: int) -> None:
        nonlocal unknown
        for instruction in computations[name]:
            runs = factor
            if instruction.opcode == "while":
                length = _length(instruction, computations)
                unknown += length is None
                runs *= length or 1
            for called in _called(instruction):
                if called in computations:
                    times[called] += runs
                    visit(called, runs)

    visit(entry, 1)
    return times, unknown


def _called(instruction: Instruction) -> Iterator[str]:
    for group in _CALLED.findall(instruction.rest):
        yield from (name.strip().lstrip("%") for name in group.split(",") if name.strip())


def _length(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """The trip count of a loop: from the compiler's annotation, or from the comparison in its condition."""
    noted = re.search(r'known_trip_count[^0-9]{1,12}"?(\d+)', loop.rest)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    instructions = computations.get(condition[1], []) if condition else []
    constants = {
        line.name: int(value[1])
        for line in instructions
        if line.opcode == "constant" and (value := re.match(r"(\d+)\)", line.rest))
    }
    for line in instructions:
        if line.opcode == "compare" and "direction=LT" in line.rest:
            operands = re.findall(r"%([\w.\-]+)", line.rest.split(")")[0])
            return next((constants[name] for name in operands if name in constants), None)
    return None


def _kind(instruction: Instruction, computation: str) -> str | None:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in KINDS:
        return None
    # The TPU compiler writes a reduce-scatter as an all-reduce fused with a slice.
    return "reduce-scatter" if opcode == "all-reduce" and "all-reduce-scatter" in computation else opcode


def _begins(instruction: Instruction, chains: set[str]) -> bool:
    """Whether a collective occurs for the first time. If it overlaps with fusions, the TPU compiler repeats it in each
    of them with one chain id; `chains` holds the ids seen so far."""
    chain = re.search(r'chain_id="(\d+)"', instruction.rest)
    if chain is None:
        return True
    new = chain[1] not in chains
    chains.add(chain[1])
    return new


def _received(instruction: Instruction, kind: str, devices: int) -> float:
    """Bytes that a device receives with optimal algorithms."""
    arrays = _ARRAY.findall(instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # Operands, results, and for a permutation two scalars.
        arrays = [(dtype, dims) for dtype, dims in arrays if dims]
        arrays = arrays[len(arrays) // 2 :]
    size = sum(_size(dtype, dims) for dtype, dims in arrays)
    group = _group_size(instruction.rest, devices)
    remote = (group - 1) / group
    if kind == "all-reduce":
        return 2 * size * remote
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter" and instruction.opcode == "reduce-scatter":
        return size * (group - 1)
    return size * remote


def _group_size(text: str, devices: int) -> int:
    """Devices per group, from any of XLA's notations."""
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        factors = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(factor or sizes[name]) for name, factor in factors) or 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(listed[1].split(",")) if listed else devices


def _launching(computations: dict[str, list[Instruction]], entry: str) -> set[str]:
    """The computations whose instructions are separate kernels: the entry, and those of loops, branches and calls.
    Instructions of fusions and reductions are part of one kernel."""
    launching, new = set(), [entry]
    while new:
        name = new.pop()
        launching.add(name)
        for instruction in computations[name]:
            if instruction.opcode in ("while", "conditional", "call", "async-start"):
                new += [called for called in _called(instruction) if called in computations and called not in launching]
    return launching


_NO_KERNELS = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "async-start", "async-update", "opt-barrier"),
}


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode not in _NO_KERNELS and not instruction.opcode.endswith("-done")


def _operands(instruction: Instruction) -> list[str]:
    """Names of the operands of an instruction."""
    return re.findall(r"%([\w.\-]+)", instruction.rest[: _closing("(" + instruction.rest) - 1])


def _moved(instruction: Instruction, shapes: dict[str, str]) -> float:
    """Bytes of the operands and the result, without a library's workspace (an array of bytes behind the result)."""
    result = _ARRAY.findall(instruction.shape)
    if instruction.opcode == "custom-call" and len(result) > 1 and result[-1][0] in ("u8", "s8"):
        result = result[:-1]
    read = [array for name in _operands(instruction) for array in _ARRAY.findall(shapes.get(name, ""))]
    return sum(_size(dtype, dims) for dtype, dims in (*result, *read))


def _flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    """FLOPs of a convolution (which includes TPU matrix products), a dot, or an NVIDIA library call; borders of
    convolutions are counted as interior."""
    if instruction.opcode not in ("convolution", "dot", "custom-call"):
        return 0.0
    result = _dims(instruction.shape)
    operands = [_dims(shapes.get(name, "")) for name in _operands(instruction)] + [(), ()]
    if instruction.opcode == "custom-call":
        return _library_flops(instruction.rest, result, operands)
    if instruction.opcode == "dot":
        contracted = re.search(r"rhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return _product_flops(result, operands[1], contracted[1].split(",") if contracted else [])
    return _window_flops(instruction.rest, result, operands[1])


def _library_flops(rest: str, result: tuple[int, ...], operands: list[tuple[int, ...]]) -> float:
    """FLOPs of a call of cuDNN (convolutions and their gradients, attention) or cuBLAS."""
    match = re.search(r'custom_call_target="__(cudnn|cublas)\$([\w$]+)"', rest)
    target, (first, second) = match[2] if match else "", operands[:2]
    if target.startswith("convBackwardInput"):
        return _window_flops(rest, first, second)
    if target.startswith("convBackwardFilter"):
        return _window_flops(rest, second, result)
    if target.startswith("conv"):
        return _window_flops(rest, result, second)
    if target.startswith("fmha"):  # batch, queries, heads, channels; the backward pass has five products, not two
        return (10.0 if target.endswith("Backward") else 4.0) * math.prod(first) * (second[1] if second else 0)
    contracted = re.search(r'"rhs_contracting_dimensions":\[([\d",]*)\]', rest) if match else None
    return _product_flops(result, second, contracted[1].replace('"', "").split(",")) if contracted else 0.0


def _product_flops(result: tuple[int, ...], right: tuple[int, ...], contracted: list[str]) -> float:
    axes = [int(axis) for axis in contracted if axis]
    return 2.0 * math.prod(result) * math.prod(right[axis] for axis in axes if axis < len(right))


def _window_flops(rest: str, output: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """FLOPs of a convolution or one of its gradients: each output element is a sum over the window and the kernel's
    inputs."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", rest)
    window = re.search(r"window=\{size=([\dx]+)", rest)
    inputs = kernel[labels[1].index("i")] if labels and len(kernel) == len(labels[1]) else 1
    return 2.0 * math.prod(output) * inputs * math.prod(map(int, window[1].split("x")) if window else ())


def _label(instruction: Instruction) -> str:
    """A label of an operation: its opcode, and the last component of its op_name."""
    place = re.search(r'op_name="([^"]*)"', instruction.rest)
    words = place[1].split("/") if place else []
    direction = "backward " if place and "transpose" in place[1] else ""
    return f"{instruction.opcode}: {direction}{words[-1] if words else 'moved by the compiler'}"


def _dims(shape: str) -> tuple[int, ...]:
    match = _ARRAY.search(shape)
    return tuple(int(side) for side in match[2].split(",") if side) if match else ()


def _size(dtype: str, dims: str) -> float:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])  # the first number of its name
    return math.prod(int(side) for side in dims.split(",") if side) * bits / 8
