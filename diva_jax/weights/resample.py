"""Position embeddings at another resolution than they were trained at."""

import jax
import numpy as np

from diva_jax.models.backbones import Spec
from diva_jax.weights.tensors import Tensor, Tensors

_NAMES = {"vit": "visual.positional_embedding", "siglip": "visual.trunk.pos_embed"}


def grids(tensors: Tensors, spec: Spec) -> tuple[int, int]:
    """(patches along a side in the checkpoint, the same in `spec`)."""
    positions = tensors[_NAMES[spec.arch]].shape[-2]
    return round((positions - (spec.arch == "vit")) ** 0.5), spec.grid


def to_resolution(tensors: Tensors, spec: Spec) -> Tensors:
    """The tensors with position embeddings for `spec.image_size`; the same object where they fit already.

    As open_clip does it (`resize_pos_embed`): bicubic with antialias over the grid of patches, in float32; the class
    token's embedding is kept.
    """
    old, new = grids(tensors, spec)
    if old == new:
        return tensors
    name = _NAMES[spec.arch]
    was = tensors[name]
    extra = was.shape[-2] - old * old
    shape = (*was.shape[:-2], extra + new * new, was.shape[-1])

    def read() -> np.ndarray:
        table = np.asarray(was, np.float32).reshape(-1, was.shape[-1])
        grid = table[extra:].reshape(old, old, -1)
        # Exact products: an accelerator's default would round them to bfloat16.
        with jax.default_matmul_precision("highest"):
            grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True)
        return np.concatenate([table[:extra], np.asarray(grid).reshape(new * new, -1)]).reshape(shape)

    resized = Tensor(shape, np.dtype(np.float32), read)
    return Tensors({n: resized if n == name else t for n, t in tensors.items()}, tensors.files)
