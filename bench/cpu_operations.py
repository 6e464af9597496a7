"""Rates of single operations on one thread of a CPU, with PyTorch and with XLA as this package uses it: GFLOP/s.

    python bench/cpu_operations.py [--pairs=3]

Each measurement is a process of its own, and the two sides alternate. Time is CPU time, the first quartile of ten runs.
With XLA_FLAGS=--xla_cpu_max_isa=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2, both are without AVX-512.
"""

import collections
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

_PAIRS = flags.DEFINE_integer("pairs", 3, "Number of measurements per side.", 1)
_SIDE = flags.DEFINE_enum("side", None, ("torch", "ours"), "Internal: the side to measure once.")

# The shapes are those of the U-Net of a tenth of the full size, see diva_step.py: [B, H, W, C] and [B, N, H, D].
_MATRIX, _IMAGES, _HEADS = (1024, 1024), (2, 32, 32, 192), (2, 1024, 3, 32)
# Operation -> FLOPs; the gradient of attention has its products two and a half times.
_FLOPS = {
    "matrix product": 2 * 1024**3,
    "convolution 3 x 3": 2 * np.prod(_IMAGES) * 192 * 9,
    "attention": 4 * 2 * 3 * 1024 * 1024 * 32,
    "attention and gradient": 14 * 2 * 3 * 1024 * 1024 * 32,
}


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def torch_operations() -> list[Callable[[], object]]:
    """In the order of `_FLOPS`."""
    import torch
    from torch.nn.functional import conv2d, scaled_dot_product_attention

    torch.set_num_threads(1)
    matrix, q = torch.from_numpy(_random(*_MATRIX)), torch.from_numpy(_random(*_HEADS)).transpose(1, 2).contiguous()
    images = torch.from_numpy(_random(*_IMAGES)).permute(0, 3, 1, 2).contiguous()
    kernel = torch.from_numpy(_random(192, 192, 3, 3))

    def gradient():
        q_k_v = [q.clone().requires_grad_() for _ in range(3)]
        scaled_dot_product_attention(*q_k_v).backward(q)

    return [
        lambda: matrix @ matrix,
        lambda: conv2d(images, kernel, padding=1),
        lambda: scaled_dot_product_attention(q, q, q),
        gradient,
    ]


def our_operations() -> list[Callable[[], object]]:
    """In the order of `_FLOPS`."""
    import jax
    import jax.numpy as jnp

    from diva_jax.models import attention, platform

    mesh = jax.make_mesh((1,), ("data",)).abstract_mesh

    def attend(q, k, v):
        with platform.traced_on(mesh, None):
            return attention.attention(q, k, v)

    shapes = (_MATRIX, _IMAGES, (3, 3, 192, 192), _HEADS)
    matrix, images, kernel, q = (jnp.asarray(_random(*shape)) for shape in shapes)
    layout = ("NHWC", "HWIO", "NHWC")
    product = jax.jit(jnp.matmul)
    convolve = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout))
    forward = jax.jit(attend)
    gradient = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1](q.reshape(*q.shape[:2], -1)))
    return [
        lambda: jax.block_until_ready(product(matrix, matrix)),
        lambda: jax.block_until_ready(convolve(images, kernel)),
        lambda: jax.block_until_ready(forward(q, q, q)),
        lambda: jax.block_until_ready(gradient(q, q, q)),
    ]


def measure(side: str) -> None:
    """Prints the rate of each operation, GFLOP/s."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    os.environ["JAX_PLATFORMS"] = "cpu"
    for flops, run in zip(_FLOPS.values(), {"torch": torch_operations, "ours": our_operations}[side](), strict=True):
        run()
        seconds = []
        for _ in range(10):
            began = time.process_time()
            run()
            seconds.append(time.process_time() - began)
        print(flops / statistics.quantiles(seconds)[0] / 1e9)


def main(_) -> None:
    if _SIDE.value:
        return measure(_SIDE.value)
    rates = collections.defaultdict(list)
    for _ in range(_PAIRS.value):
        for side in ("torch", "ours"):
            command = [sys.executable, __file__, f"--side={side}"]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            rates[side].append([float(line) for line in lines])
    print("| operation | PyTorch | ours | ours / PyTorch |\n| --- | --- | --- | --- |")
    for i, name in enumerate(_FLOPS):
        torch, ours = ([row[i] for row in rates[side]] for side in ("torch", "ours"))
        ratios = sorted(b / a for a, b in zip(torch, ours, strict=True))
        middle = statistics.median(ratios)
        print(
            f"| {name} | {statistics.median(torch):.0f} | {statistics.median(ours):.0f} | "
            f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )


if __name__ == "__main__":
    app.run(main)
