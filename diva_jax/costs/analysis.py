"""Costs of a compiled step per chip and per part of the program: time, memory traffic, FLOPs and collectives."""

import collections
import re

import jax

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
SIZES = dict(arguments="argument", outputs="output", aliases="alias", temporaries="temp", code="generated_code")


def part_of(path: str) -> tuple[str, str]:
    """Part and kind of an operation, e.g. ("unet backward", "norm"), from its path
    "jit(step)/.../transpose(jvp(unet))/norm/mul" in the traced program; a fusion has that of its last operation."""
    part, kind = (next((name for name, p in table if re.search(p, path)), OTHER) for table in (PARTS, KINDS))
    if part in ("unet", "vision"):
        part += " backward" if "transpose(" in path else " forward"
    return part, kind


def kernel_seconds(op: hlo.Op, computation: hlo.Computation, chip: Chip) -> float:
    """Returns a lower bound for the time of one execution of a kernel, for which the compiler has no estimate [s]. It
    is the larger of the time of its products, where sums over a head dim of 64 occupy a 128-wide matrix unit as sums
    over 128 do, and the time of its operands and results at the HBM's bandwidth."""
    if op.target != "tpu_custom_call":
        return 0.0
    products = hlo.kernel_flops(op, computation, chip.matrix_side) / chip.flops
    return max(products, hlo.hbm_traffic(op, computation) / chip.hbm_bandwidth)


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
    module = hlo.parse(text)
    costs, kinds = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    kernels, channels = collections.Counter(), {}
    for op, computation, times in module.executed():
        if op.kind in hlo.FREE:
            continue
        part, kind = part_of(computation.origin(op))
        work = "kernel_flops" if op.kind == "custom-call" else "flops"
        once = {
            "cycles": op.cycles,
            "hbm": hlo.hbm_traffic(op, computation),
            work: module.flops(op, computation),
            "kernel_seconds": kernel_seconds(op, computation, chip),
        }
        costs[part].update({name: times * n for name, n in once.items()})
        kinds[part][kind] += times * op.cycles
        if op.target == "tpu_custom_call":
            kernels[op.name.rsplit(".", 1)[0]] += times
        for channel, (name, size) in hlo.collectives(module, op, computation).items():
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
    collected: dict[str, dict] = {}
    for name, count, size in sorted(channels.values()):
        sums = collected.setdefault(name, {"count": 0, "gb": 0.0})
        sums["count"] += count
        sums["gb"] += size / 1e9
    return {
        **row(total),
        "kernel_ms": 1e3 * total["kernel_flops"] / chip.flops,
        "parts": {
            part: row(cost) | {"kinds": {k: 1e3 * n / chip.clock for k, n in kinds[part].most_common() if n}}
            for part, cost in sorted(costs.items(), key=lambda i: -i[1]["cycles"])
        },
        "collectives": collected,
        "kernels": dict(sorted(kernels.items())),
    }
