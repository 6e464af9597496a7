"""Costs of a compiled step per chip and per part of the program: time, memory traffic, FLOPs and collectives."""

import collections
import dataclasses
import re
from collections.abc import Iterable

from diva_jax.costs import hlo
from diva_jax.costs.chips import Chip

# (name, pattern) of an operation's path in the traced program; the first match counts. Most of the names are
# `jax.named_scope`s.
PARTS = (("vae", r"\bvae\b"), ("unet", r"\bunet\b"), ("vision", r"\bvision\b"), ("optimizer", r"\boptimizer\b"))
KINDS = (
    ("attention", r"\battention\b"),
    ("norm", r"\bnorm\b"),
    ("conv", r"conv_general_dilated"),
    ("matmul", r"dot_general"),
)
OTHER = "other"


def part_of(path: str) -> tuple[str, str]:
    """Returns part and kind of an operation, e.g. ("unet backward", "norm").

    Args:
      path: the path in the traced program, e.g. "jit(step)/.../transpose(jvp(unet))/norm/mul". A fusion has the path
        of its last operation.
    """

    def first(table):
        return next((name for name, pattern in table if re.search(pattern, path)), OTHER)

    part = first(PARTS)
    if part in ("unet", "vision"):
        part += " backward" if "transpose(" in path else " forward"
    return part, first(KINDS)


@dataclasses.dataclass
class Cost:
    """Sums over operations, per device and per step.

    Attributes:
      cycles: as estimated by the compiler, without kernels.
      hbm: bytes read from and written to HBM, without the padding of tiles.
      flops: FLOPs of matrix products and convolutions outside of kernels.
      kernel_flops: FLOPs inside of kernels.
      kernel_seconds: time of the kernels at the bound of their shapes, see `kernel_seconds`.
      ops: number of executed operations.
    """

    cycles: int = 0
    hbm: int = 0
    flops: int = 0
    kernel_flops: int = 0
    kernel_seconds: float = 0.0
    ops: int = 0

    def add(self, other: "Cost") -> None:
        """Adds another cost to this one, in place."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def kernel_seconds(op: hlo.Op, computation: hlo.Computation, chip: Chip) -> float:
    """Returns a lower bound for the time of one execution of a kernel, for which the compiler has no estimate [s].

    It is the larger of the time of its products, where sums over a head dim of 64 occupy a 128-wide matrix unit as sums
    over 128 do, and the time of its operands and results at the HBM's bandwidth.
    """
    if op.target != "tpu_custom_call":
        return 0.0
    products = hlo.kernel_flops(op, computation, chip.matrix_side) / chip.flops
    return max(products, hlo.hbm_traffic(op, computation) / chip.hbm_bandwidth)


def op_cost(module: hlo.HloModule, op: hlo.Op, computation: hlo.Computation, times: int, chip: Chip) -> Cost:
    """Returns the cost of an operation that is executed `times` times."""
    flops = module.flops(op, computation)
    kernel = op.kind == "custom-call"
    return Cost(
        cycles=times * op.cycles,
        hbm=times * hlo.hbm_traffic(op, computation),
        flops=0 if kernel else times * flops,
        kernel_flops=times * flops if kernel else 0,
        kernel_seconds=times * kernel_seconds(op, computation, chip),
        ops=times,
    )


def analyse(text: str, chip: Chip) -> dict:
    """Computes the costs of one step on one device from the optimised HLO.

    Args:
      text: `compiled.as_text()`.
      chip: the chip whose clock and peak rate convert cycles and FLOPs to time.

    Returns:
      A dict with these keys:
        "model_ms": sum of the compiler's cycle estimates [ms], without kernels.
        "kernel_ms": time of the kernels' FLOPs at the chip's peak rate [ms].
        "kernel_bound_ms": the least time that the kernels' shapes allow, see `kernel_seconds` [ms].
        "kernel_bound": the reason for the difference, one sentence; "" without kernels.
        "hbm_gb": HBM traffic [1e9 bytes].
        "flops", "kernel_flops": FLOPs outside and inside of kernels.
        "parts": {part: {"model_ms", "hbm_gb", "flops", "kernel_flops", "kernel_bound_ms", "kinds": {kind: model ms}}}.
        "collectives": {kind: {"count", "gb"}}.
        "largest": [{"mib", "count", "path"}], the twelve largest arrays in HBM, padding included.
        "kernels": {name: number of executions}.
        "loops": trip count of each loop, largest first.

    Raises:
      ValueError: the text has no entry computation.
    """
    module = hlo.parse(text)
    parts: dict[str, Cost] = collections.defaultdict(Cost)
    kinds: dict[tuple[str, str], int] = collections.Counter()
    channels: dict[str, tuple[str, int, int]] = {}
    kernels: dict[str, int] = collections.Counter()
    largest: dict[tuple[int, str], int] = collections.Counter()
    for op, computation, times in module.executed():
        if op.kind in hlo.FREE:
            continue
        cost = op_cost(module, op, computation, times, chip)
        path = module.origin(op, computation)
        part, kind = part_of(path)
        parts[part].add(cost)
        kinds[part, kind] += cost.cycles
        for channel, (name, size) in hlo.collectives(module, op, computation).items():
            channels[channel] = (name, times, times * size)
        if op.target == "tpu_custom_call":
            kernels[op.name.rsplit(".", 1)[0]] += times
        for array in hlo.materialised(op):
            largest[array.laid_out, _short(path) or op.kind] += 1
    total = Cost()
    for cost in parts.values():
        total.add(cost)
    return {
        **_row(total, chip),
        "kernel_ms": 1e3 * total.kernel_flops / chip.flops,
        "kernel_bound": _reason(total, chip),
        "parts": {
            part: _row(cost, chip)
            | {
                "kinds": {
                    k: _ms(n, chip) for (p, k), n in sorted(kinds.items(), key=lambda i: -i[1]) if p == part and n
                }
            }
            for part, cost in sorted(parts.items(), key=lambda i: -i[1].cycles)
        },
        "collectives": _by_kind(channels.values()),
        "largest": [
            {"mib": size / 2**20, "count": n, "path": path}
            for (size, path), n in sorted(largest.items(), key=lambda i: -i[0][0])[:12]
        ],
        "kernels": dict(sorted(kernels.items())),
        "loops": module.loops(),
    }


def _ms(cycles: int, chip: Chip) -> float:
    return 1e3 * cycles / chip.clock


def _row(cost: Cost, chip: Chip) -> dict:
    return {
        "model_ms": _ms(cost.cycles, chip),
        "hbm_gb": cost.hbm / 1e9,
        "flops": cost.flops,
        "kernel_flops": cost.kernel_flops,
        "kernel_bound_ms": 1e3 * cost.kernel_seconds,
    }


def _reason(total: Cost, chip: Chip) -> str:
    if not total.kernel_seconds:
        return ""
    share = total.kernel_flops / chip.flops / total.kernel_seconds
    return (
        f"the kernels' shapes allow {100 * share:.0f}% of the peak rate: the length of a sum counts as the next "
        f"multiple of {chip.matrix_side}, the side of the matrix unit, and operands and results are read and written "
        "in HBM once"
    )


def _by_kind(channels: Iterable[tuple[str, int, int]]) -> dict[str, dict]:
    out: dict[str, dict] = {}
    for kind, count, size in sorted(channels):
        row = out.setdefault(kind, {"count": 0, "gb": 0.0})
        row["count"] += count
        row["gb"] += size / 1e9
    return out


def _short(path: str, length: int = 90) -> str:
    """Returns the end of a path without the components that most paths have."""
    path = re.sub(r"(jit\(step\)|while|body|closed_call|checkpoint|rematted_computation)/", "", path)
    return path if len(path) <= length else "..." + path[-length:]
