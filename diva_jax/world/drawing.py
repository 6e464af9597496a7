"""Scenes as images of 32 x 32 pixels; all objects of all scenes are drawn at once with numpy."""

import numpy as np

from diva_jax.world.scenes import MAX_OBJECTS, Scenes

SIDE = 32
# RGB of `scenes.COLOURS`, and of the backgrounds of `scenes.TIMES`.
_COLOURS = np.float32([[220, 40, 40], [40, 170, 60], [50, 80, 235], [240, 205, 40], [160, 60, 190], [50, 195, 205]])
_BACKGROUNDS = np.float32([[228, 228, 222], [34, 34, 46]])
_RADIUS = np.float32([5.0, 7.0])  # Of `scenes.SIZES` [pixels].
_HOLE = np.float32(0.45)  # Its radius, as a share of the object's.
_STRIPES = np.float32(5.0)  # Their period [pixels].
_DARK = np.float32(0.42)  # Brightness of the dark stripes.
_CELLS = np.float32([[8, 8], [24, 24], [24, 8], [8, 24]])  # Centres (x, y) of a group's objects, in any rotation.


def _centres(s: Scenes) -> np.ndarray:
    """[N, 4, 2], (x, y) of each object [pixels]."""
    jitter = 3 * (s.nuisance[:, :8].reshape(-1, MAX_OBJECTS, 2) - 0.5)
    groups = _CELLS[(np.arange(MAX_OBJECTS) + (4 * s.nuisance[:, 8:9]).astype(int)) % MAX_OBJECTS] + jitter
    # Pairs: along the axis of the relation 8 and 24; across it both near the middle.
    along = np.float32([[8, 24], [24, 8]])[s.relation & 1]
    across = 16 + 8 * (s.nuisance[:, 8:9] - 0.5) + jitter[:, :2, 0]
    along = along + jitter[:, :2, 1] / 3
    upright = (s.relation >= 2)[:, None]
    pairs = np.stack([np.where(upright, across, along), np.where(upright, along, across)], axis=2)
    pairs = np.pad(pairs, ((0, 0), (0, MAX_OBJECTS - 2), (0, 0)))
    return np.where(s.group[:, None, None] == 1, groups, pairs).astype(np.float32)


def _outside(kind: np.ndarray, u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance [pixels] to each object's outline, negative inside; v points where the object points.

    Args:
      kind: index into `scenes.SHAPES`, [K].
      u, v: coordinates relative to the centre, [K, S, S].
      r: radius, [K, 1, 1].
    """
    out = np.empty_like(u)
    a = np.abs(u)
    for k in np.unique(kind):
        rows = kind == k
        x, y, z, q = a[rows], v[rows], np.abs(v[rows]), r[rows]
        if k == 0:
            d = np.hypot(x, y) - q
        elif k == 1:
            d = np.maximum(x, z) - 0.86 * q
        elif k == 2:
            d = (x + z) * 0.7071 - 0.74 * q
        elif k == 3:
            d = np.minimum(np.maximum(x - 0.36 * q, z - q), np.maximum(x - q, z - 0.36 * q))
        elif k == 4:
            d = np.maximum((1.8 * x + y - q) / 2.06, -y - 0.8 * q)
        elif k == 5:
            d = np.maximum(np.hypot(x, y + 0.4 * q) - 1.15 * q, -y - 0.4 * q)
        else:
            head = np.maximum((x + y - q) * 0.7071, -y)
            d = np.minimum(head, np.maximum(x - 0.34 * q, z - q))
        out[rows] = d
    return out


_WINDOW = 18  # Side of the square in which an object lies [pixels].
_CHUNK = 64  # Scenes drawn at once, whose arrays fit into the processor's cache.


def draw(scenes: Scenes) -> np.ndarray:
    """Images of N scenes: uint8 [N, 32, 32, 3]. A image depends on its own scene alone."""
    chunks = [scenes.take(slice(i, i + _CHUNK)) for i in range(0, len(scenes), _CHUNK)]
    return np.concatenate([_draw(s) for s in chunks]) if chunks else np.zeros((0, SIDE, SIDE, 3), np.uint8)


def _draw(s: Scenes) -> np.ndarray:
    scene, slot = np.nonzero(np.arange(MAX_OBJECTS) < s.count[:, None])  # [K], of each object.
    fact = np.where(s.group[scene] == 1, 0, np.minimum(slot, 1))
    pick = (scene, fact)
    centre = _centres(s)[scene, slot]
    corner = np.clip(np.round(centre - _WINDOW / 2), 0, SIDE - _WINDOW).astype(int)
    pixels = corner[:, :, None] + np.arange(_WINDOW)  # [K, 2, W]
    offset = (pixels + np.float32(0.5) - centre[:, :, None]).astype(np.float32)
    x, y = np.broadcast_arrays(offset[:, 0, None, :], offset[:, 1, :, None])
    direction = s.direction[pick][:, None, None]
    v = np.where(direction < 2, y, x) * np.float32([-1, 1, -1, 1])[direction]
    u = np.where(direction < 2, x, y)
    r = _RADIUS[s.size[pick]][:, None, None] * (0.95 + 0.1 * s.nuisance[scene, 9][:, None, None])
    cover = np.clip(0.5 - _outside(s.shape[pick], u, v, r), 0, 1)
    hole = np.clip(np.hypot(x, y) - _HOLE * r + 0.5, 0, 1)
    cover *= np.where(s.hole[pick][:, None, None] == 1, hole, 1)
    phase = _STRIPES * s.nuisance[scene, 10 + slot][:, None, None]
    dark = np.clip(np.abs((x + y + phase) % _STRIPES - _STRIPES / 2) - _STRIPES / 4 + 0.5, 0, 1)
    shade = np.where(s.texture[pick][:, None, None] == 1, 1 - (1 - _DARK) * dark, 1)
    colour = _COLOURS[s.colour[pick]] * (0.85 + 0.2 * s.nuisance[scene, 14 + fact][:, None])
    background = _BACKGROUNDS[s.time] + 24 * (s.nuisance[:, 16:19] - 0.5)
    out = np.broadcast_to(background[:, None, None], (len(s), SIDE, SIDE, 3)).copy()
    for k in range(MAX_OBJECTS):  # In the order of the slots, where windows overlap.
        here = slot == k
        at = scene[here][:, None, None], pixels[here, 1, :, None], pixels[here, 0, None, :]
        below = out[at]
        out[at] = below + cover[here][..., None] * (shade[here][..., None] * colour[here][:, None, None] - below)
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)
