"""What the readers of golden files share."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np


def take(arrays, prefix: str, new: str = "") -> dict[str, np.ndarray]:
    """Returns the arrays whose names begin with `prefix`, under their names with `new` in its place."""
    return {new + k[len(prefix) :]: np.asarray(arrays[k]) for k in arrays if k.startswith(prefix)}


def relative(ours, want, scale=None) -> float:
    """Returns the L2 error relative to `scale`, which is `want` by default.

    Raises:
      ValueError: the shapes differ.
    """
    ours, want, scale = (np.asarray(x, np.float64) for x in (ours, want, want if scale is None else scale))
    if ours.shape != want.shape:
        raise ValueError(f"shapes differ: {ours.shape} here, {want.shape} recorded")
    return float(np.linalg.norm(ours - want) / max(np.linalg.norm(scale), np.finfo(np.float64).tiny))


def rows(
    recorded: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], bound: Callable[[str], float]
) -> list[tuple[str, float, float]]:
    """Returns (quantity, relative L2 error, bound) for every recorded result.

    Raises:
      ValueError: other quantities are recorded than we compute.
    """
    same_names(recorded, ours)
    return [(key, relative(ours[key], want), bound(key)) for key, want in recorded.items()]


def same_names(recorded: Iterable[str], ours: Iterable[str]) -> None:
    if differ := sorted(set(recorded) ^ set(ours)):
        raise ValueError(f"quantities differ: {differ}")
