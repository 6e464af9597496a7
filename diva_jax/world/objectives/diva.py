"""DIVA from the kept projection, which `world.pretrain` trained alone, in place of a random one."""

from collections.abc import Mapping

import numpy as np

from diva_jax.models.names import Table
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
        kernel, bias = tensors["visual_proj/kernel"], tensors["visual_proj/bias"]
        weight = formats.Tensor(kernel.shape[::-1], kernel.dtype, lambda: np.asarray(kernel).T)
        tensors = formats.Tensors({"weight": weight, "bias": bias}, [file])
        return parts.Opened(tensors, Table("projection"), str(file))

    return parts.Part(str(file), opened)


class Objective(diva.Objective):
    """As DIVA's; `visual_proj` has a source too."""

    def pretrained(self) -> Mapping[str, parts.Part]:
        return {**super().pretrained(), "visual_proj": _projection()}
