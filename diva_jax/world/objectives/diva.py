"""DIVA from the kept projection, which `world.pretrain` trained alone, in place of a random one."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from diva_jax.objectives import diva
from diva_jax.objectives.diva import SECTION, SECTIONS, recipe, stages
from diva_jax.weights import formats, parts
from diva_jax.world import models

__all__ = ["SECTION", "SECTIONS", "Objective", "recipe", "stages"]


def _projection() -> parts.Part:
    """The source of `visual_proj`."""
    file = models.WEIGHTS / models.PROJECTION / models.PROJECTION_FILE

    def opened() -> parts.Opened:
        tensors = formats.open_file(file)

        def fill(state, put):
            filled = {}
            for path, var in nnx.to_flat_state(state):
                array = np.asarray(tensors[f"visual_proj/{path[-1]}"]).astype(var.dtype)
                filled[path] = var.replace(put(path, array, jax.ShapeDtypeStruct(var.shape, var.dtype)))
            return nnx.from_flat_state(filled)

        return parts.Opened([file], fill)

    return parts.Part(str(file), opened)


class Objective(diva.Objective):
    """As DIVA's; `visual_proj` has a source too."""

    def pretrained(self) -> Mapping[str, parts.Part]:
        return {**super().pretrained(), "visual_proj": _projection()}
