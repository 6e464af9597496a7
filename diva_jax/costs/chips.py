"""What the accelerators can do at most: peaks, memory, interconnect.

Sources: Google Cloud's TPU pages of each version (peak compute, HBM size and bandwidth, interconnect, chips of a
pod); for v4's links and clock also Jouppi et al., "TPU v4", arXiv 2304.01433, table 4; NVIDIA's H100 and H200
data sheets (SXM, dense bf16). The TPUs' clocks are those that turn their matrix units into the published peak.
"""

import dataclasses
import math

from diva_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
      kind: what JAX calls it, `device.device_kind`.
      flops: peak bf16, multiply and add counted as two [FLOP/s].
      hbm_bandwidth: [bytes/s].
      hbm: memory [bytes].
      usable: what the compiler gives to a program, as it says when one does not fit [bytes].
      clock: [Hz], of the unit in which the TPU's compiler estimates cycles; 0 where there is no such unit.
      ici: what one chip can send to its neighbours over all links at once [bytes/s]; 0: no table entry.
      wrap: a slice whose side is a multiple of this has wrap-around links along it (a torus, not a mesh).
      options: further arguments of `topologies.get_topology_desc`.
    """

    kind: str
    flops: float
    hbm_bandwidth: float
    hbm: int
    usable: int = 0
    clock: float = 0.0
    ici: float = 0.0
    wrap: int = 0
    options: tuple[tuple[str, str], ...] = ()


_G = 2**30
# By the name that stands before the colon of a topology, "v5e:4x4".
CHIPS: dict[str, Chip] = {
    # Without megacore the compiler's topology has two devices a chip; on the machines both cores are one device.
    "v4": Chip(
        "TPU v4", 275e12, 1228e9, 32 * _G, int(30.75 * _G), 1.05e9, 6 * 50e9, 4, (("chip_config_name", "megacore"),)
    ),
    "v5e": Chip("TPU v5 lite", 197e12, 819e9, 16 * _G, int(15.75 * _G), 1.5e9, 4 * 50e9, 16),
    "v5p": Chip("TPU v5", 459e12, 2765e9, 95 * _G, int(95.73 * _G), 1.75e9, 6 * 100e9, 4),
    "v6e": Chip("TPU v6 lite", 918e12, 1640e9, 32 * _G, int(31.24 * _G), 1.75e9, 4 * 100e9, 16),
}
_OTHERS = (
    Chip("NVIDIA H100 80GB HBM3", 989e12, 3350e9, 80 * 10**9),
    Chip("NVIDIA H200", 989e12, 4800e9, 141 * 10**9),
)
# Names under which some runtimes know the same chip.
_ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def peak(device) -> float | None:
    """Peak bf16 FLOP/s of a `jax.Device`; None where the table has no such kind (a CPU, say)."""
    kind = _ALIASES.get(device.device_kind, device.device_kind)
    return next((c.flops for c in (*CHIPS.values(), *_OTHERS) if c.kind == kind), None)


def parse_topology(topology: str) -> tuple[str, Chip, tuple[int, ...]]:
    """`"v5e:4x4"` -> ("v5e", its Chip, (4, 4)).

    Raises:
      UserError: another form, or a chip that is not in the table.
    """
    name, _, sides = topology.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology={topology}: the chip {name!r} is not known, use one of {', '.join(CHIPS)}")
    try:
        shape = tuple(int(s) for s in sides.split("x"))
    except ValueError:
        shape = ()
    axes = 3 if name in ("v4", "v5p") else 2
    if len(shape) != axes or min(shape) < 1:
        example = "2x2x2" if axes == 3 else "4x4"
        raise UserError(f"--topology={topology}: {name} is laid out along {axes} axes, write e.g. {name}:{example}")
    return name, CHIPS[name], shape


def all_reduce_seconds(size: float, chip: Chip, shape: tuple[int, ...]) -> float:
    """A lower bound for summing `size` bytes over all chips of a slice.

    Every chip sends 2 (n - 1) / n of the bytes (reduce-scatter, then all-gather). All links work at once where
    the sides longer than 1 wrap around; an axis that does not wrap is a line, on which a ring uses each link
    for both ways and so has half of it; an axis of length 1 has no links.
    """
    n = math.prod(shape)
    rings = sum((1.0 if side % chip.wrap == 0 else 0.5) for side in shape if side > 1) / len(shape)
    return 0.0 if n == 1 else 2 * size * (n - 1) / n / (chip.ici * rings)
