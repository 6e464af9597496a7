"""Measures a train step on one GPU against the same step in PyTorch: images/s, peak memory, MFU.

    pip install -e '.[cuda,test]'      # and a build of torch for CUDA
    python bench/gpu.py

Both steps are those of diva_step.py: ViT-L/14, Stable Diffusion 2.1-base at 512 pixels, two draws, bfloat16. Ours uses
cuDNN's attention (`models/attention.py`); PyTorch's uses scaled_dot_product_attention and torch.compile. Each
measurement is a process of its own, and the sides alternate. Without a GPU, --size=tiny --platform=cpu runs the same
program on the CPU. MFU counts the FLOPs of `Program.flops`, recomputation not counted, against the chip's dense bf16
peak of `costs/chips.py`.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time

from absl import app, flags
from diva_step import SIZES, config_of, ours, theirs

_SIZE = flags.DEFINE_enum("size", "full", SIZES, "Size of all models, see diva_step.py.")
_PLATFORM = flags.DEFINE_enum("platform", "cuda", ("cuda", "cpu"), "Where the steps run.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Images per step.", 1)
_PAIRS = flags.DEFINE_integer("pairs", 3, "Number of measurements per side.", 1)
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps per measurement.", 1)
_COMPILE = flags.DEFINE_bool("compile", True, "Whether PyTorch's side uses torch.compile.")
_SIDE = flags.DEFINE_enum("side", None, ("torch", "ours"), "Internal: the side to measure once.")


def measure(side: str) -> dict:
    """{"images_per_s", "peak_gib", "compile_s", "mfu", "loss", "device"} of one side."""
    import jax

    gpu = _PLATFORM.value == "cuda"
    if side == "torch" or not gpu:
        jax.config.update("jax_platforms", "cpu")  # The GPU's memory belongs to PyTorch.
    from diva_jax.costs import chips
    from diva_jax.training import partition
    from diva_jax.training.step import Program
    from diva_jax.weights.export import layouts

    config = config_of(_SIZE.value, _BATCH.value, "bfloat16")
    began = time.perf_counter()
    if side == "torch":
        assert layouts.available("open_clip") and layouts.available("diffusers")
        run = theirs(config, _PLATFORM.value, _COMPILE.value)
    else:
        run = ours(config)
    for _ in range(2):  # Compiles, and chooses algorithms.
        run()
    ready = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(_STEPS.value):
        loss = run()
    rate = _STEPS.value * _BATCH.value / (time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = "cpu"
    if gpu and side == "torch":
        import torch

        peak, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    elif gpu:
        peak, device = jax.devices()[0].memory_stats()["peak_bytes_in_use"], jax.devices()[0].device_kind
    chip = chips.of(device)
    program = Program(config, partition.make_mesh(config.mesh, jax.devices()[:1]))
    mfu = rate * program.flops().total() / chip.flops if chip else None
    return dict(images_per_s=rate, peak_gib=peak / 2**30, ready_s=ready, mfu=mfu, loss=loss, device=device)


def main(_) -> None:
    if _SIDE.value:
        print(json.dumps(measure(_SIDE.value)))
        return
    if _PLATFORM.value == "cuda" and shutil.which("nvidia-smi") is None:
        raise SystemExit(
            "there is no NVIDIA driver (nvidia-smi is not found): use --platform=cpu --size=tiny for a test"
        )
    seen: dict[str, list[dict]] = {"torch": [], "ours": []}
    for pair in range(_PAIRS.value):
        for side in ("torch", "ours") if pair % 2 == 0 else ("ours", "torch"):
            given = [f"--{f.name}={f.value}" for f in (_SIZE, _PLATFORM, _BATCH, _STEPS, _COMPILE)]
            out = subprocess.run(
                [sys.executable, __file__, f"--side={side}", *given], check=True, stdout=subprocess.PIPE
            )
            found = json.loads(out.stdout.decode().strip().splitlines()[-1])
            seen[side].append(found)
            mfu = "not known for this device" if found["mfu"] is None else f"{found['mfu']:.1%}"
            print(
                f"{side:<6} {found['images_per_s']:.2f} images/s  peak memory {found['peak_gib']:.2f} GiB  MFU {mfu}  "
                f"ready after {found['ready_s']:.0f} s  loss {found['loss']:.3f}  {found['device']}",
                flush=True,
            )
    for what in ("images_per_s", "peak_gib"):
        ratios = [a[what] / b[what] for a, b in zip(seen["ours"], seen["torch"], strict=True)]
        print(f"{what}: ours / torch, median of the pairs {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    app.run(main)
