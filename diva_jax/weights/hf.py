"""Conversion between models of transformers, with each architecture's `TRANSFORMERS`, and open_clip's names: tensors
and config files."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from diva_jax.common.errors import UserError, brief, listing
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec, architecture, architectures
from diva_jax.models.backbones.shared.transformers_layout import Layout, Recipe
from diva_jax.weights.readers import Tensor, Tensors


def _layouts() -> list[Layout]:
    return [module.TRANSFORMERS for module in architectures().values() if module.TRANSFORMERS is not None]


def _layout(spec: Spec) -> Layout:
    """The layout of `spec` in transformers; a UserError where transformers has no such model."""
    layout = architecture(spec.arch).TRANSFORMERS
    if layout is None:
        raise UserError(f"transformers has no {spec.arch} model: use --format=open_clip or --format=pt")
    return layout


def recognises(names: Iterable[str]) -> bool:
    """Returns whether tensors have transformers' names."""
    return any(name.startswith(tuple(layout.mark for layout in _layouts())) for name in names)


def _convert(recipe: Recipe, tensors: Mapping[str, Any], to_hf: bool) -> dict[str, Tensor]:
    names, out = (recipe.open_clip, recipe.hf) if to_hf else (recipe.hf, recipe.open_clip)
    parts = [tensors[n] for n in names]
    first = tuple(parts[0].shape)
    if len(parts) > 1 and (not first or any(tuple(p.shape[1:]) != first[1:] or not p.shape for p in parts)):
        raise UserError(f"{listing(names)} have shapes that do not fit each other: fetch the file again")
    shape = first if len(parts) == 1 else (sum(p.shape[0] for p in parts), *first[1:])
    joint_shape = shape[::-1] if recipe.transposed else shape
    if recipe.lead and not recipe.transposed:  # Adds the axis in the layout that has it, and removes it in the other.
        joint_shape = shape[1:] if (recipe.lead > 0) == to_hf else (1, *shape)

    def joint() -> np.ndarray:
        arrays = [np.asarray(p) for p in parts]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return array.T if recipe.transposed else array.reshape(joint_shape)

    if len(out) == 1:
        return {out[0]: Tensor(joint_shape, parts[0].dtype, joint)}
    shares = (1,) * len(out) if to_hf else recipe.shares
    if not joint_shape or joint_shape[0] % sum(shares):
        raise UserError(f"{names[0]} has the shape {joint_shape}, whose rows do not divide into {listing(out)}")
    unit, split, start = joint_shape[0] // sum(shares), {}, 0
    for name, share in zip(out, shares, strict=True):
        rows = slice(start * unit, (start + share) * unit)
        shape = (share * unit, *joint_shape[1:])
        split[name] = Tensor(shape, parts[0].dtype, lambda rows=rows: joint()[rows])
        start += share
    return split


def to_open_clip_names(tensors: Tensors, spec: Spec, source: str) -> Tensors:
    """A transformers model under open_clip's names, lazily; a UserError lists names that are missing or unknown."""
    plan = _layout(spec).recipes(spec)
    known = {n for r in plan for n in r.hf}
    constants = {f"{m}_model.embeddings.position_ids" for m in ("text", "vision")}
    missing = [n for n in known if n not in tensors]
    unknown = [n for n in tensors if n not in known | constants]
    if missing or unknown:
        parts = [f"{what}: {listing(sorted(n))}" for what, n in (("missing", missing), ("unknown", unknown)) if n]
        raise UserError(f"{source} does not fit its config.json: {'; '.join(parts)}")
    return Tensors({n: t for r in plan for n, t in _convert(r, tensors, False).items()}, tensors.files)


def to_transformers_names(tensors: Mapping[str, Any], spec: Spec) -> dict[str, Tensor]:
    """The inverse of `to_open_clip_names`; `tensors` are those of the whole model."""
    return {n: t for r in _layout(spec).recipes(spec) for n, t in _convert(r, tensors, True).items()}


def from_transformers(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str
) -> tuple[Spec, frozenset[str]]:
    """(The Spec that config.json and preprocessor_config.json, or {}, describe, the fields of it that they do not
    specify); a UserError where the model or its activation is not implemented."""
    kind = config.get("model_type")
    layouts = {model: layout for layout in _layouts() for model in layout.models}
    if not isinstance(kind, str) or kind not in layouts:
        known = [name for layout in layouts.values() for name in layout.models.values()]
        problem = f"{where} is a {brief(kind)} model"
        raise UserError(f"{problem}: give the folder of a whole {' or '.join(dict.fromkeys(known))}")
    spec, silent = layouts[kind].from_config(config, preprocessor, where)
    return backbones.check(spec, f"{where}: backbone"), silent


def to_transformers(spec: Spec, dtype: str) -> dict:
    """The content of config.json for weights of a dtype, e.g. "float32"; a UserError for what transformers has not."""
    return _layout(spec).to_config(spec, dtype)


def image_processor(spec: Spec) -> dict:
    """Returns the content of preprocessor_config.json: the test-time transform of `spec`."""
    return _layout(spec).preprocessor(spec)
