"""Generates the tables of docs/TPU.md: compiles every config for TPU slices, without the hardware, and prints Markdown.

    python bench/tpu.py [--out=bench/tpu] [--only=REGEX] [--tables] [--docs=docs/TPU.md]

Each compilation is one run of `python -m diva_jax.aot` and takes minutes. Its report is stored as JSON in --out, and is
not made again if the file exists. --tables prints the tables of the existing reports without compiling. --docs also
writes the tables between the two markers in that file.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

from diva_jax.costs import chips

CONFIGS = (
    "vitl14", "vitl14_336", "metaclip_l14", "metaclip_h14", "dfn_h14", "dfn_h14_378", "siglip_so400m",
    "siglip_so400m_384",
)  # fmt: skip
# One config per other objective.
FAMILY = (
    "unclip_vitl14", "genhancer_vitl14", "dcr_vitl14", "kuea_vitl14", "smartclip_vitl14", "judge_vitl14",
    "comclip_vitl14", "salm_vitl14", "judge_vitl14_336", "comclip_vitl14_336", "salm_vitl14_336",
)  # fmt: skip
# Name of the report -> (config, topology, further flags).
RUNS = {
    **{f"{c}-v5e-16": (c, "v5e:4x4", []) for c in (*CONFIGS, *FAMILY)},
    "vitl14-v4-16": ("vitl14", "v4:2x2x4", []),
    "vitl14-v5p-16": ("vitl14", "v5p:2x2x4", []),
    "vitl14-v6e-16": ("vitl14", "v6e:4x4", []),
    # With Python 3.12 or newer: the jaxlib of that lane of constraints can read what is compiled for this chip. The
    # slice of eight chips has 16 devices, each with the images of one of v5e:4x4.
    "vitl14-tpu7x-16": ("vitl14", "tpu7x:2x2x4", ["--config.accum=1"]),
    **{f"{c}-tpu7x-8": (c, "tpu7x:2x2x2", []) for c in (*CONFIGS, *FAMILY)},
    # Savings and costs of single settings.
    "vitl14-v5e-16-latents": ("vitl14", "v5e:4x4", ["--config.data.latents=any"]),
    "vitl14-v5e-16-remat": ("vitl14", "v5e:4x4", ["--config.remat=vision"]),
    "dfn_h14_378-v5e-16-sharded": ("dfn_h14_378", "v5e:4x4", ["--config.mesh.shard_frozen=True"]),
    # Stage 1 of GenHancer; the other report of its config is of stage 2.
    "genhancer_vitl14-v5e-16-stage1": ("genhancer_vitl14", "v5e:4x4", ["--config.genhancer.stage2=none"]),
    # Weak scaling: the same number of images per chip on every slice.
    "vitl14-v5e-4": ("vitl14", "v5e:2x2", ["--per-device-batch=8"]),
    "vitl14-v5e-256": ("vitl14", "v5e:16x16", ["--per-device-batch=8"]),
}
SCALING = {"vitl14-v5e-4": (2, 2), "vitl14-v5e-16": (4, 4), "vitl14-v5e-256": (16, 16)}
BASE = "vitl14-v5e-16"
BEGIN, END = "<!-- tables: python bench/tpu.py --docs=docs/TPU.md -->", "<!-- end of tables -->"
GIB = 2**30


def compile_missing(out: Path, only: str) -> None:
    for name, (config, topology, flags) in RUNS.items():
        path = out / f"{name}.json"
        if path.exists() or not re.search(only, name):
            continue
        if topology.startswith("tpu7x") and sys.version_info < (3, 12):
            print(f"{name}: not compiled, it needs Python 3.12 or newer", file=sys.stderr, flush=True)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "diva_jax.aot", f"--config=configs/{config}.py", f"--topology={topology}"]
        subprocess.run([*command, f"--json={path}", *flags], check=True, stdout=subprocess.DEVNULL)


def reports(out: Path) -> dict[str, dict]:
    return {name: json.loads(p.read_text()) for name in RUNS if (p := out / f"{name}.json").exists()}


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_between(file: Path, begin: str, text: str, end: str) -> None:
    """Replaces what is between two markers of a file."""
    before, _, rest = file.read_text().partition(begin)
    file.write_text(before + begin + "\n" + text + "\n" + end + rest.partition(end)[2])


def costs(found: dict[str, dict]) -> str:
    """Returns a table with one row per report: memory, and costs of a step per chip."""
    header = (
        "config, slice | fsdp | remat | images per device x micro-batches | HBM needed, of [GiB] | temporaries [GiB] | "
        "model + kernels at their bound (at peak) [ms] | links [ms] | images/s per chip | MFU | HBM [GB] | "
        "TFLOP + in kernels | compile [s]"
    ).split(" | ")
    rows = []
    for name, r in found.items():
        row = [
            ", ".join([RUNS[name][0], r["topology"], *(f.removeprefix("--config.") for f in RUNS[name][2])]),
            r["mesh"]["fsdp"],
            r["remat"],
            f"{r['per_device_batch']} x {r['accum']}",
            f"{r['needed'] / GIB:.2f}, {r['available'] / GIB:.2f}" + ("" if r["fits"] else " **does not fit**"),
        ]
        if "memory" in r:
            row += [
                f"{r['memory']['temporaries'] / GIB:.2f}",
                f"{r['model_ms']:.0f} + {r['kernel_bound_ms']:.0f} ({r['kernel_ms']:.0f})",
                f"{r['all_reduce_ms']:.0f}",
                f"{r['images_per_s']:.1f}",
                f"{100 * r['mfu']:.0f}%",
                f"{r['hbm_gb']:.0f}",
                f"{r['flops'] / 1e12:.0f} + {r['kernel_flops'] / 1e12:.0f}",
                f"{r['seconds']['compile']:.0f}",
            ]
        rows.append(row + [""] * (len(header) - len(row)))
    return table(header, rows)


def parts(found: dict[str, dict], name: str) -> str:
    """Returns a table of one report's time and traffic per part of the program."""
    rows = [
        [
            part,
            f"{p['model_ms']:.0f} + {p['kernel_bound_ms']:.0f}",
            f"{p['kernel_flops'] / 1e12:.1f}",
            f"{p['hbm_gb']:.1f}",
            f"{p['flops'] / 1e12:.1f}",
        ]
        for part, p in found[name]["parts"].items()
    ]
    return table(["part", "model + kernels at their bound [ms]", "TFLOP in kernels", "HBM GB", "TFLOP outside"], rows)


def scaling(found: dict[str, dict]) -> str:
    """Returns a table of calculated weak scaling: compute plus the all-reduce at the links' published speed.

    No overlap of communication and compute is assumed. For a slice without a report, compute and bytes are those of the
    slice with 16 chips; both are per device, and the program per device is the same.
    """
    rows = []
    for name, shape in SCALING.items():
        r = found.get(name, found.get(BASE))
        if r is None or "memory" not in r:
            continue
        n, reduced = math.prod(shape), r["collectives"]["all-reduce"]
        ms = 1e3 * chips.all_reduce_seconds(1e9 * reduced["gb"], chips.CHIPS["v5e"], shape)
        rows.append([
            f"{n}" if name in found else f"{n} (from 16)", n * r["per_device_batch"] * r["accum"],
            f"{r['step_ms']:.0f}", f"{reduced['gb']:.2f} in {reduced['count']}", f"{ms:.1f}",
            f"{100 * r['step_ms'] / (r['step_ms'] + ms):.1f}%",
        ])  # fmt: skip
    return table(
        ["chips", "batch", "compute [ms]", "all-reduce per step [GB]", "at the links' speed [ms]", "efficiency"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/tpu"))
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--docs", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.tables:
        compile_missing(args.out, args.only)
    found = reports(args.out)
    text = "\n\n".join(
        [
            costs(found),
            *(
                ["Costs of a step of `vitl14` on v5e:4x4 per part of the program:", parts(found, BASE)]
                if BASE in found
                else []
            ),
            "Weak scaling of `vitl14`, eight images per chip and micro-batch:",
            scaling(found),
        ]
    )
    print(text)
    if args.docs:
        write_between(args.docs, BEGIN, text, END)


if __name__ == "__main__":
    main()
