"""Interpolation of position embeddings to another resolution than that of the checkpoint."""

import jax
import numpy as np

from diva_jax.models.backbones import Spec, architecture
from diva_jax.weights.tensors import Tensor, Tensors


def grids(tensors: Tensors, spec: Spec) -> tuple[int, int]:
    """Returns the patches per side in the checkpoint and in `spec`."""
    return architecture(spec.arch).positions(spec).grid(tensors), spec.grid


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Returns Keys' cubic convolution kernel at distances x."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _bicubic(old: int, new: int) -> np.ndarray:
    """Returns the weights [new, old] of cubic interpolation, without antialiasing, edges repeated, as in torch."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        at = np.floor(centres).astype(int) + tap
        np.add.at(weights, (np.arange(new), at.clip(0, old - 1)), _cubic(centres - at))
    return weights


def _resize(grid: np.ndarray, new: int, antialias: bool) -> np.ndarray:
    """Resizes float32 [old, old, D] to [new, new, D]."""
    if not antialias:
        weights = _bicubic(len(grid), new)
        return np.einsum("io,opd,jp->ijd", weights, grid, weights, optimize=True).astype(np.float32)
    # In full precision: by default an accelerator rounds products to bfloat16.
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True))


def to_resolution(tensors: Tensors, spec: Spec) -> Tensors:
    """Returns the tensors with position embeddings for `spec.image_size`; the same object if they fit already.

    Interpolation is bicubic over the grid of patches, in float32, as in the original (open_clip's `resize_pos_embed`;
    for DINOv2 the models of transformers). Embeddings of other tokens are kept. Rotary embeddings are computed by the
    model and are not in a checkpoint.
    """
    old, new = grids(tensors, spec)
    if old == new:
        return tensors
    positions = architecture(spec.arch).positions(spec)
    was = tensors[positions.name]
    extra = was.shape[-2] - old * old
    shape = (*was.shape[:-2], extra + new * new, was.shape[-1])

    def read() -> np.ndarray:
        table = np.asarray(was, np.float32).reshape(-1, was.shape[-1])
        grid = _resize(table[extra:].reshape(old, old, -1), new, positions.antialias)
        return np.concatenate([table[:extra], grid.reshape(new * new, -1)]).reshape(shape)

    resized = Tensor(shape, np.dtype(np.float32), read)
    return Tensors({n: resized if n == positions.name else t for n, t in tensors.items()}, tensors.files)
