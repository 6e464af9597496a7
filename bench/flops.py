"""Prints the FLOPs per image and step of configs' last stages, by part: python bench/flops.py configs/vitl14.py ..."""

import sys

import jax

from diva_jax.common import config_files
from diva_jax.training.step import Program


def main() -> None:
    for file in sys.argv[1:]:
        mesh = jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))
        found = Program(config_files.read(file), mesh).flops()
        parts = "  ".join(f"{part or 'other'} {n / 1e12:.3f}" for part, n in found.most_common() if n >= 5e8)
        print(f"{file}: {found.total() / 1e12:.3f} TFLOP: {parts}", flush=True)


if __name__ == "__main__":
    main()
