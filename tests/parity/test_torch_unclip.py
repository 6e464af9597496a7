"""Ten optimizer steps of un²CLIP against the same written in plain PyTorch, and its views and latents alone."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import close

from diva_jax.data import preprocess


def kornia_resize(x: torch.Tensor, size: int) -> torch.Tensor:
    """kornia.geometry.resize(x, size, "bicubic", align_corners=True, antialias=True) of square images, smaller ones."""
    sigma = max((x.shape[-1] / size - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3))
    taps += taps % 2 == 0
    at = torch.arange(taps) - taps // 2
    g = torch.exp(-(at**2) / (2 * sigma**2)).to(x)
    kernel = torch.outer(g, g) / g.sum() ** 2
    b, c, *_ = x.shape
    padded = F.pad(x, (taps // 2,) * 4, mode="reflect")
    blurred = F.conv2d(padded, kernel.expand(c, 1, taps, taps), groups=c)
    return F.interpolate(blurred, (size, size), mode="bicubic", align_corners=True)


@pytest.mark.parametrize("n, size", [(24, 21), (50, 14), (17, 30)])
def test_aligned_resize(n, size):
    x = np.random.default_rng(n).uniform(size=(2, n, n, 3)).astype(np.float32)
    torch_x = torch.from_numpy(x).permute(0, 3, 1, 2)
    larger = F.interpolate(torch_x, (size, size), mode="bicubic", align_corners=True)
    want = (kornia_resize(torch_x, size) if size < n else larger).permute(0, 2, 3, 1)
    close(preprocess.aligned_resize(jnp.asarray(x), size), want, 2e-6)
