"""Parses the optimised HLO text of a compiled TPU program (`compiled.as_text()`) and computes costs from it.

`compiled.cost_analysis()` counts the body of a loop once, includes on-chip traffic in the bytes accessed, and counts
Pallas kernels as zero. In the text each operation has the number of cycles that the compiler estimates, each array its
memory space, and each loop its trip count.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from diva_jax.costs.chips import Chip

_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(pred|bf16|[suf](?:8|16|32|64))\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_START = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Operations without memory traffic: names for parts of arrays, and ends of copies, which are counted at their start.
FREE = frozenset(
    "parameter get-tuple-element tuple bitcast constant after-all partition-id replica-id "
    "copy-done slice-done async-done async-update send-done recv-done opt-barrier".split()
)
# Custom calls that only name memory.
_NO_WORK = ("AllocateBuffer", "ConcatBitcast")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """An array of a type, as HLO has it: dtype, shape, and layout (axes from minor to major, tiles, memory)."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def size(self) -> int:
        """Size of the elements [bytes]."""
        return math.prod(self.dims) * _WIDTH.get(self.dtype, 4)


class Op(NamedTuple):
    """One instruction, e.g. "fusion.6" of kind "fusion"; operands are in the same computation, `rest` is its text from
    them on. `path` is the origin in the traced program, e.g. "jit(step)/while/body/unet/conv", or ""; `cycles` are
    those of one execution as estimated by the compiler, 0 for a kernel; `target` is that of a custom call, e.g.
    "tpu_custom_call", or ""; `called` are the names of the computations that it calls."""

    name: str
    kind: str
    type: str
    operands: list[str]
    rest: str
    path: str
    cycles: int
    target: str
    called: list[str]


class Computation(dict[str, Op]):
    """The operations of a computation by name, in the order of execution."""

    def operands(self, op: Op) -> list[Array]:
        """The arrays that an operation reads."""
        return [array for name in op.operands if name in self for array in arrays(self[name].type)]

    @functools.cached_property
    def readers(self) -> dict[str, Op]:
        """Name of an operand -> the first operation that reads it."""
        return {operand: op for op in reversed(self.values()) for operand in op.operands}

    def origin(self, op: Op) -> str:
        """Returns the path of an operation. If it has none, as prefetches do, the path of the op that reads it."""
        for _ in range(5):
            if op.path or op.name not in self.readers:
                break
            op = self.readers[op.name]
        return op.path


class HloModule(NamedTuple):
    """A parsed HLO module: its computations by name, and the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str

    def executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Op, Computation, int]]:
        """Yields every executed operation, also inside loops: (op, its computation, number of executions)."""
        computation = self.computations[name or self.entry]
        for op in computation.values():
            if op.kind in ("while", "call", "conditional"):
                trips = self.trips(op) if op.kind == "while" else 1
                for called in op.called:
                    yield from self.executed(called, times * trips)
            else:
                yield op, computation, times

    def trips(self, loop: Op) -> int:
        """Returns the trip count of a loop: the bound that its condition compares a counter with, or 1 without one."""
        condition = self.computations.get(_first(r"condition=%?([\w.\-]+)", loop.rest), {})
        for op in condition.values():
            if op.kind == "compare" and "direction=LT" in op.rest:
                bound = condition.get(op.operands[1])
                if bound and bound.kind == "constant":
                    return int(bound.rest.strip("()").split(")")[0])
        return 1

    def flops(self, op: Op, computation: Computation) -> int:
        """The FLOPs of matrix products and convolutions, also inside fusions, and of kernels, see `kernel_flops`."""
        if op.kind in ("dot", "convolution"):
            return _product_flops(op, computation)
        if op.kind == "custom-call":
            return kernel_flops(op, computation)
        inside = op.called if op.kind in ("fusion", "async-start") else []
        return sum(self.flops(o, self.computations[c]) for c in inside for o in self.computations[c].values())


def _first(pattern: str, text: str) -> str:
    """The group of a pattern's first match; "" without one."""
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def arrays(type_: str) -> list[Array]:
    """Returns the arrays of a type given as text; tuples are flattened."""
    return [Array(d, tuple(int(n) for n in dims.split(",") if n), lay or "") for d, dims, lay in _ARRAY.findall(type_)]


def hbm_traffic(op: Op, computation: Computation) -> int:
    """Returns the HBM traffic of an operation [bytes]: the sizes of its operands and results that are in HBM."""
    if op.kind in FREE or op.target in _NO_WORK:
        return 0
    if op.kind in ("copy-start", "slice-start"):
        # The type is (destination, source, context) or ((sources), destination, context). The traffic is counted once.
        return arrays(op.type)[1 if op.type.startswith("((") else 0].size
    touched = computation.operands(op) + arrays(op.type)
    # S(1) is VMEM, other ones are on chip too.
    return sum(a.size for a in touched if not re.search(r"S\([1-9]", a.layout))


def collectives(module: HloModule, op: Op, computation: Computation) -> dict[str, tuple[str, int]]:
    """The collectives of an operation and of the computations it calls, by channel id, or by name without one. Each is
    (kind, the larger of the sizes of operands and results [bytes]). An asynchronous collective is split over several
    fusions that share one channel."""
    found = {}
    kind = op.kind.removesuffix("-start")
    if kind in COLLECTIVES:
        channel = _first(r"channel_id=(\d+)", op.rest)
        operands = sum(a.size for a in computation.operands(op))
        results = sum(a.size for a in arrays(op.type))
        if op.kind != kind and op.type.startswith("(("):
            results -= operands  # The type of a start lists operands and results.
        found[channel or op.name] = (kind, max(operands, results))
    elif op.kind in ("fusion", "async-start"):
        for called in op.called:
            inner = module.computations[called]
            # On TPUs a reduce-scatter is an all-reduce followed by a dynamic slice.
            scattered = any(o.kind == "dynamic-slice" for o in inner.values())
            for o in inner.values():
                for channel, (name, size) in collectives(module, o, inner).items():
                    found[channel] = ("reduce-scatter" if scattered and name == "all-reduce" else name, size)
    return found


def _closing(text: str) -> int:
    """The index after the bracket that closes the one with which a text begins."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i + 1
    return len(text)


def _parse_op(text: str) -> Op:
    name, rest = text.split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    kind, rest = rest[: (bracket := rest.index("("))], rest[bracket:]
    operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest)])
    called = _CALLED.findall(rest)
    called += [n.strip().lstrip("%") for group in _BRANCHES.findall(rest) for n in group.split(",")]
    path, target = _first(r'op_name="([^"]*)"', rest), _first(r'custom_call_target="([^"]*)"', rest)
    cycles = int(_first(r'"estimated_cycles":"?(\d+)', rest) or 0)
    return Op(name.strip().removeprefix("ROOT ").lstrip("%"), kind, type_, operands, rest, path, cycles, target, called)


def parse(text: str) -> HloModule:
    """Parses `compiled.as_text()`; a ValueError if it has no entry computation."""
    lines: dict[str, list[str]] = {}  # Computation -> its operations.
    entry = current = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = lines[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and _START.match(line):
            current.append(line)
        elif current:  # The attributes of a kernel can span several lines.
            current[-1] += line
    if entry is None:
        raise ValueError("the text has no ENTRY computation: give the result of compiled.as_text()")
    parsed = {name: [_parse_op(line) for line in operations] for name, operations in lines.items()}
    return HloModule({name: Computation({op.name: op for op in ops}) for name, ops in parsed.items()}, entry)


def _product_flops(op: Op, computation: Computation) -> int:
    lhs, rhs = (a.dims for a in computation.operands(op)[:2])
    out = arrays(op.type)[0].dims
    if op.kind == "dot":
        summed = _first(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
        return 2 * math.prod(out) * math.prod(lhs[int(i)] for i in summed.split(",") if i)
    inputs, kernel, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()
    # Pairs of an output position and a kernel position whose input is a pixel and not padding, per spatial axis.
    pairs = math.prod(
        _valid_pairs(lhs[inputs.index(axis)], rhs[kernel.index(axis)], out[result.index(axis)], op.rest, int(axis))
        for axis in set(kernel) - {"i", "o"}
    )
    return 2 * pairs * rhs[kernel.index("i")] * out[result.index("b")] * out[result.index("f")]


def _valid_pairs(size: int, taps: int, out: int, rest: str, axis: int) -> int:
    """The number of pairs (output position, kernel position) of one axis whose input is a pixel and not padding."""
    given = dict(part.split("=") for part in _first(r"window=\{([^}]*)\}", rest).split())
    low, stride, dilation, spread = (
        int(given[key].split("x")[axis].split("_")[0]) if key in given else default
        for key, default in (("pad", 0), ("stride", 1), ("rhs_dilate", 1), ("lhs_dilate", 1))
    )
    # Within the dilated input, `spread` apart are pixels, and zeros between them.
    places = (o * stride + tap * dilation - low for o in range(out) for tap in range(taps))
    return sum(0 <= place <= (size - 1) * spread and place % spread == 0 for place in places)


# The attention kernels of models/kernels.py. Their names begin as these keys and end with the head dim. The values are
# two numbers of products of queries x keys x head dim: of those whose sums are over the head dim, and of those in which
# the head dim is the number of rows.
_FLASH = {"flash_forward_d": (1, 1), "flash_backward_d": (2, 3)}
# The feed-forward kernels, whose names end with the number of hidden units H: the number of products of tokens x C x H
# whose sums are over the C channels, and of those whose sums are over hidden units.
_FEED_FORWARD = {"feed_forward_forward_h": (2, 1), "feed_forward_backward_h": (1, 2)}
_KERNEL = re.compile(rf"\b({'|'.join([*_FLASH, *_FEED_FORWARD])})(\d+)")


def kernel_flops(op: Op, computation: Computation, side: int = 1) -> int:
    """Returns the FLOPs of a kernel of models/ from its name and the shapes of its operands; 0 for other kernels. The
    length of the sums is rounded up to a multiple of the side of the chip's matrix unit, because the unit adds up that
    many products per element of the result, zeros included. Rows stream through the unit, and their number is not
    rounded. The result is the FLOPs that the unit could do in the time that the kernel occupies it."""
    found = _KERNEL.search(op.path)
    if op.target != "tpu_custom_call" or not found:
        return 0
    padded = lambda length: -(-length // side) * side  # noqa: E731
    name, number = found.group(1), int(found.group(2))
    first, second = (a.dims for a in computation.operands(op)[:2])
    if name in _FLASH:  # q, [B, H*D, N], and k, [B, H*D, M].
        (batch, channels, queries), keys, (sums, rows) = first, second[2], _FLASH[name]
        return 2 * batch * queries * keys * (channels // number) * (sums * padded(number) + rows * number)
    (batch, channels, tokens), (narrow, wide) = first, _FEED_FORWARD[name]
    return 2 * batch * tokens * (narrow * padded(channels) * number + wide * channels * padded(number))


# (name, pattern) of an operation's path in the traced program; the first match counts.
PARTS = (("vae", r"\bvae\b"), ("unet", r"\bunet\b"), ("vision", r"\bvision\b"), ("optimizer", r"\boptimizer\b"))
KINDS = (("attention", r"\battention\b"), ("norm", r"\bnorm\b"), ("conv", "conv_general"), ("matmul", "dot_general"))
SIZES = dict(arguments="argument", outputs="output", aliases="alias", temporaries="temp", code="generated_code")


def kernel_seconds(op: Op, computation: Computation, chip: Chip) -> float:
    """Returns a lower bound for the time of one execution of a kernel, for which the compiler has no estimate [s]. It
    is the larger of the time of its products, where sums over a head dim of 64 occupy a 128-wide matrix unit as sums
    over 128 do, and the time of its operands and results at the HBM's bandwidth."""
    if op.target != "tpu_custom_call":
        return 0.0
    products = kernel_flops(op, computation, chip.matrix_side) / chip.flops
    return max(products, hbm_traffic(op, computation) / chip.hbm_bandwidth)


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """HBM of a compiled program per device [bytes], by the names of SIZES, and what it "needed" in all; outputs that
    reuse the memory of arguments are "aliases"."""
    stats = compiled.memory_analysis()
    found = {name: getattr(stats, f"{size}_size_in_bytes") for name, size in SIZES.items()}
    return found | {"needed": sum(found.values()) - 2 * found["aliases"]}


def analyse(text: str, chip: Chip) -> dict:
    """The costs of one step on one device, from the optimised HLO `compiled.as_text()`, as a dict with these keys:

    "model_ms": sum of the compiler's cycle estimates [ms], without kernels.
    "kernel_ms": time of the kernels' FLOPs at the chip's peak rate [ms].
    "kernel_bound_ms": the least time that the kernels' shapes allow, see `kernel_seconds` [ms].
    "hbm_gb": HBM traffic, without the padding of tiles [1e9 bytes].
    "flops", "kernel_flops": FLOPs of matrix products and convolutions outside and inside of kernels.
    "parts": {part: {"model_ms", "hbm_gb", "flops", "kernel_flops", "kernel_bound_ms", "kinds": {kind: model ms}}}.
    "collectives": {kind: {"count", "gb"}}.
    "kernels": {name: number of executions}."""
    module = parse(text)
    costs, kinds = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    kernels, channels = collections.Counter(), {}
    for op, computation, times in module.executed():
        if op.kind in FREE:
            continue
        # From its path, such as "jit(step)/.../transpose(jvp(unet))/norm/mul"; a fusion has that of its last operation.
        path = computation.origin(op)
        part, kind = (next((name for name, p in table if re.search(p, path)), "other") for table in (PARTS, KINDS))
        if part in ("unet", "vision"):
            part += " backward" if "transpose(" in path else " forward"
        work = "kernel_flops" if op.kind == "custom-call" else "flops"
        once = {
            "cycles": op.cycles,
            "hbm": hbm_traffic(op, computation),
            work: module.flops(op, computation),
            "kernel_seconds": kernel_seconds(op, computation, chip),
        }
        costs[part].update({name: times * n for name, n in once.items()})
        kinds[part][kind] += times * op.cycles
        if op.target == "tpu_custom_call":
            kernels[op.name.rsplit(".", 1)[0]] += times
        for channel, (name, size) in collectives(module, op, computation).items():
            channels[channel] = (name, times, times * size)

    def row(cost: collections.Counter) -> dict:
        return {
            "model_ms": 1e3 * cost["cycles"] / chip.clock,
            "hbm_gb": cost["hbm"] / 1e9,
            "flops": cost["flops"],
            "kernel_flops": cost["kernel_flops"],
            "kernel_bound_ms": 1e3 * cost["kernel_seconds"],
        }

    total = sum(costs.values(), collections.Counter())
    collected = collections.defaultdict(collections.Counter)
    for name, count, size in sorted(channels.values()):
        collected[name].update(count=count, gb=size / 1e9)
    return {
        **row(total),
        "kernel_ms": 1e3 * total["kernel_flops"] / chip.flops,
        "parts": {
            part: row(cost) | {"kinds": {k: 1e3 * n / chip.clock for k, n in kinds[part].most_common() if n}}
            for part, cost in sorted(costs.items(), key=lambda i: -i[1]["cycles"])
        },
        "collectives": {name: dict(sums) for name, sums in collected.items()},
        "kernels": dict(sorted(kernels.items())),
    }
