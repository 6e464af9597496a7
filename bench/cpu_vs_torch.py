"""Compares a train step on the CPU with the same step in PyTorch: time and peak memory, as ratios.

    python bench/cpu_vs_torch.py --size=tiny --pairs=3
    python bench/cpu_vs_torch.py --size=tenth --pairs=3 --steps=2

The steps are those of diva_step.py, in float32 with the same number of threads. Each measurement is a process of its
own, and the two sides alternate. The first step of each is not timed. CPU seconds are those of all threads of a step,
which other load on the machine affects less than wall time. Peak memory is that of the process, less what it has after
its imports.
"""

import os
import re
import resource
import statistics
import subprocess
import sys
import time

from absl import app, flags
from diva_step import SIZES, config_of, ours, theirs

_SIZE = flags.DEFINE_enum("size", "tiny", SIZES, "Size of all models, see diva_step.py.")
_PAIRS = flags.DEFINE_integer("pairs", 3, "Number of measurements per side.", 1)
_STEPS = flags.DEFINE_integer("steps", 5, "Timed steps per measurement.", 1)
_BATCH = flags.DEFINE_integer("batch_size", 2, "Images per step.", 1)
_THREADS = flags.DEFINE_integer("threads", 2, "Threads of both sides.", 1)
_SIDE = flags.DEFINE_enum("side", None, ("torch", "ours"), "Internal: the side to measure once.")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(side: str) -> None:
    """Prints wall and CPU seconds per step, and the increase of peak memory."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
    os.environ["JAX_PLATFORMS"] = "cpu"
    from diva_jax.weights.export import layouts

    if side == "torch":
        assert layouts.available("open_clip") and layouts.available("diffusers")
        import torch

        torch.set_num_threads(_THREADS.value)
    config = config_of(_SIZE.value, _BATCH.value, "float32")
    before = _peak()
    run = ours(config) if side == "ours" else theirs(config)
    run()
    wall, cpu = [], []
    for _ in range(_STEPS.value):
        began = time.perf_counter(), time.process_time()
        loss = run()
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    middle = [statistics.median(x) for x in (wall, cpu)]
    print(
        f"{side:<6} wall {middle[0]:.4f} s  CPU {middle[1]:.4f} s  memory {(_peak() - before) / 2**20:.0f} MiB  ",
        end="",
    )
    print(f"loss {loss:.3f}", flush=True)


def main(_) -> None:
    if _SIDE.value:
        measure(_SIDE.value)
        return
    seen: dict[str, list[list[float]]] = {"torch": [], "ours": []}
    for pair in range(_PAIRS.value):
        for side in ("torch", "ours") if pair % 2 == 0 else ("ours", "torch"):
            given = [f"--{f.name}={f.value}" for f in (_SIZE, _STEPS, _BATCH, _THREADS)]
            out = subprocess.run(
                [sys.executable, __file__, f"--side={side}", *given], check=True, stdout=subprocess.PIPE
            )
            line = out.stdout.decode().strip().splitlines()[-1]
            print(line, flush=True)
            seen[side].append([float(x) for x in re.findall(r"[\d.]+(?= s| MiB)", line)])
    for i, what in enumerate(("wall time", "CPU time", "peak memory")):
        ratios = [a[i] / b[i] for a, b in zip(seen["ours"], seen["torch"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{what}: ours / torch, median of the pairs {statistics.median(ratios):.2f} ({spread})", flush=True)


if __name__ == "__main__":
    app.run(main)
