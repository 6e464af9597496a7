"""Peak performance, memory and interconnect of accelerator chips, and the arithmetic of a traced program.

Sources: Google Cloud's documentation of each TPU version (peak compute, HBM size and bandwidth, interconnect, chips per
pod; v6e and TPU7x as of November 2026); for the links and the clock of v4 also Jouppi et al., "TPU v4", arXiv
2304.01433, table 4; NVIDIA's H100 and H200 data sheets (SXM, dense bf16). The clock of a TPU is the one at which its
matrix units reach the published peak. Google counts two units on a v6e and per core of a TPU7x; by the cycles that
the compiler states for a product of 8192 x 8192 matrices they are four of 256 x 256, with one multiply-add per element.
"""

import collections
import math
import re
from typing import NamedTuple

from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from diva_jax.common.errors import UserError
from diva_jax.common.json_files import packaged


class Chip(NamedTuple):
    """One device of JAX: an accelerator chip, or one of the two of a TPU7x; `kind` is its name, `device.device_kind`.
    `flops` is the peak bf16 rate, a multiply-add counted as two [FLOP/s], `hbm_bandwidth` the peak [bytes/s]; `usable`
    bytes of memory are available to a program, as the compiler reports it when one does not fit. Of TPUs alone: the
    `clock` of the cycles that the compiler estimates [Hz]; `ici`, the rate at which a chip can send over all its links
    together [bytes/s]; `wrap`, a multiple of which an axis has wrap-around links, with three axes only where all are
    multiples; the sides of the square matrix units [elements]; `axes` of a slice; devices `per_chip`; `options` of
    `topologies.get_topology_desc`; `compiler_options` of the train step; and the size of the `scores` of attention that
    stay in VMEM, 0 where parts of a batch are no faster [bytes] (docs/PERFORMANCE.md for both)."""

    kind: str
    flops: float
    hbm_bandwidth: float
    usable: int = 0
    clock: float = 0.0
    ici: float = 0.0
    wrap: int = 0
    matrix_side: int = 0
    axes: int = 0
    per_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()
    compiler_options: tuple[tuple[str, str], ...] = ()
    scores: int = 0


_TABLE = packaged(__file__, "chips.json")
# Key: the part of a topology's name before the colon, e.g. "v5e" of "v5e:4x4". A v4 is one device on the real machines,
# but two in the compiler's topology without megacore. By default, libtpu 0.0.51 moves collectives of a TPU7x to its
# sparse cores, in a form of HLO that jaxlib 0.10.2 cannot print; nearly all of a step's bytes are reduced at its end,
# where there is no other work for the tensor cores.
CHIPS: dict[str, Chip] = {name: Chip(**row) for name, row in _TABLE["tpus"].items()}
_OTHERS = tuple(Chip(**row) for row in _TABLE["gpus"])
# Other names of the same chips, used by some runtimes.
_ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def of(device) -> Chip | None:
    """Returns the chip of a `jax.Device`, or with this name in JAX or PyTorch; None for one without a table entry."""
    kind = device if isinstance(device, str) else device.device_kind
    kind = _ALIASES.get(kind, kind)
    return next((c for c in (*CHIPS.values(), *_OTHERS) if c.kind == kind), None)


def parse_topology(topology: str) -> tuple[str, Chip, tuple[int, ...]]:
    """`"v5e:4x4"` -> ("v5e", its Chip, (4, 4)); a UserError for an unknown chip, or a wrong number of axes."""
    name, _, sides = topology.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology={topology}: the chip {name!r} is unknown, use one of {', '.join(CHIPS)}")
    axes = CHIPS[name].axes
    if not re.fullmatch("x".join(["[1-9][0-9]*"] * axes), sides):
        example = "2x2x2" if axes == 3 else "4x4"
        raise UserError(f"--topology={topology}: {name} has {axes} axes, write e.g. {name}:{example}")
    return name, CHIPS[name], tuple(map(int, sides.split("x")))


def all_reduce_seconds(size: float, chip: Chip, shape: tuple[int, ...]) -> float:
    """Returns a lower bound for the time of an all-reduce of `size` bytes per chip over a slice of this shape [s]. Each
    chip sends 2 (n - 1) / n of the bytes (reduce-scatter, then all-gather). All links of a chip are assumed busy, and
    the sum over the two devices of a chip is not counted. Along an axis without wrap-around links, a ring uses each
    link in both directions, so its bandwidth is halved. An axis of length 1 has no links."""
    n = math.prod(shape)
    wraps = [side % chip.wrap == 0 for side in shape]
    if len(shape) == 3:
        wraps = [all(wraps)] * 3
    rings = sum(1.0 if wrap else 0.5 for side, wrap in zip(shape, wraps, strict=True) if side > 1) / len(shape)
    return 0.0 if n == 1 else 2 * size * (n - 1) / n / (chip.ici * rings)


_SCOPE = re.compile(r"(?:\w+\()*([\w-]+)\)*")  # With the transformations around it: transpose(jvp(unet)).


def flops_by_part(jaxpr: Jaxpr, times: int = 1, part: str = "") -> collections.Counter[str]:
    """The model FLOPs of a jaxpr that is run `times` times in the part `part`, by the outermost `jax.named_scope`, the
    part; "" for operations outside of any: matrix products and convolutions alone, a multiply-add as two, every
    convolution with its full window. What is computed again to save memory, or is not used, does not count. Of the
    traced loss and its gradient they are the numerator of MFU."""
    total = collections.Counter()
    for e in dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0].eqns:
        names = [m[1] for scope in str(e.source_info.name_stack).split("/") if (m := _SCOPE.fullmatch(scope))]
        if "rematted_computation" in names:  # Of `jax.checkpoint`, what the backward pass computes a second time.
            continue
        own = part or next((name for name in names if name != "checkpoint"), "")
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            summed = math.prod(e.invars[0].aval.shape[i] for i in contracted)
            total[own] += 2 * times * math.prod(e.outvars[0].aval.shape) * summed
        elif e.primitive.name == "conv_general_dilated":
            kernel, numbers = e.invars[1].aval.shape, e.params["dimension_numbers"]
            work = 2 * math.prod(e.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            # The backward pass of a stride multiplies mostly zeros.
            total[own] += times * work // math.prod(e.params["lhs_dilation"])
        for inner in jaxprs_in_params(e.params):
            total += flops_by_part(inner, times * e.params.get("length", 1), own)
    return total
