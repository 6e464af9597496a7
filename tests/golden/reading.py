"""What the readers of golden files share."""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flax import nnx

from diva_jax.models import backbones
from diva_jax.weights import hf, names


def take(arrays, prefix: str, new: str = "") -> dict[str, np.ndarray]:
    """Returns the arrays whose names begin with `prefix`, under their names with `new` in its place."""
    return {new + k[len(prefix) :]: np.asarray(arrays[k]) for k in arrays if k.startswith(prefix)}


def tower_spec(tensors, arch: str, **fields) -> backbones.Spec:
    """Returns the backbone of a tower's tensors under open_clip's names; `fields` are those that they do not tell."""
    siglip = dict(activation="gelu", norm_eps=1e-6, mean=backbones.HALF, std=backbones.HALF)
    about = siglip if arch == "siglip" else dict(activation="quick_gelu", norm_eps=1e-5)
    return backbones.Spec(**about | backbones.architecture(arch).shapes(tensors) | fields)


def from_hf(tensors, spec: backbones.Spec) -> dict[str, np.ndarray]:
    """Returns transformers' tensors of a tower under open_clip's names."""
    recipes = backbones.architecture(spec.arch).TRANSFORMERS.recipes(spec)
    found = [r for r in recipes if all(n in tensors for n in r.hf)]
    return {n: np.asarray(t) for r in found for n, t in hf._convert(r, tensors, False).items()}


def hf_spec(tensors, **fields) -> backbones.Spec:
    """Returns `tower_spec` of transformers' tensors."""
    layers = {m[1] for k in tensors if (m := re.search(r"vision_model\.encoder\.layers\.(\d+)\.", k))}
    arch = "vit" if any("pre_layrnorm" in k for k in tensors) else "siglip"
    return tower_spec(from_hf(tensors, backbones.Spec(arch=arch, layers=len(layers))), arch, **fields)


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


def gradients(skeleton, grads, part: str, table) -> dict[str, np.ndarray]:
    """Returns the gradients of one part of an objective under its library's names, by `name -> gradient`."""
    state = {
        path[1:]: var.replace(grads[name])
        for name, (path, var) in skeleton.variables.items()
        if name.startswith(f"{part}/")
    }
    return names.to_torch(nnx.from_flat_state(state), table)
