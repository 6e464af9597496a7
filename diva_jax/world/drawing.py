"""Scenes as images of 16 x 16 pixels; all objects of all scenes are drawn at once with numpy."""

import numpy as np

from diva_jax.world.scenes import Scenes

SIDE = 16
_SIZE = 6  # Side of an object [pixels].
_COLOURS = np.float32([[220, 50, 50], [60, 180, 70], [60, 90, 230], [230, 200, 50]])  # RGB of `scenes.COLOURS`.
_ROWS, _COLUMNS = np.abs(np.mgrid[:_SIZE, :_SIZE] - (_SIZE - 1) / 2)
# Of `scenes.SHAPES`: [4, 6, 6], whether a pixel belongs to the object.
_MASKS = np.stack([_ROWS >= 0, np.minimum(_ROWS, _COLUMNS) < 1, np.maximum(_ROWS, _COLUMNS) > 1, _ROWS + _COLUMNS <= 3])


def draw(scenes: Scenes) -> np.ndarray:
    """Images of N scenes: uint8 [N, 16, 16, 3]. An image depends on its own scene alone."""
    s, n = scenes, len(scenes)
    background = 128 + 80 * (s.nuisance[:, :3] - 0.5)
    out = np.broadcast_to(background[:, None, None], (n, SIDE, SIDE, 3)).copy()
    middle = 3 + np.floor(5 * s.nuisance[:, 3]).astype(int)  # Place of both objects across the relation's axis.
    for k in range(2):
        jitter = np.floor(3 * s.nuisance[:, 4 + 2 * k : 6 + 2 * k]).astype(int)
        first = (s.relation % 2 == 0) == (k == 0)
        along, across = np.where(first, 0, 8) + jitter[:, 0], middle - 1 + jitter[:, 1]
        beside = s.relation < 2
        top, left = np.where(beside, across, along), np.where(beside, along, across)
        i, y, x = np.nonzero(_MASKS[s.shape[:, k]])
        shade = 0.75 + 0.35 * s.nuisance[:, 8 + k]
        out[i, top[i] + y, left[i] + x] = (shade[:, None] * _COLOURS[s.colour[:, k]])[i]
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)
