"""Objectives, found by module name: `config.objective = "diva"` is `diva_jax.objectives.diva`.

An objective module defines
  `build(config, rngs) -> nnx.Module` with `loss(batch, keys) -> (loss, metrics)` and, for the evaluation task
    `feedback`, `condition_losses(batch, keys, edges)` as `diva.Diva` has it (optional),
  `PRETRAINED`: attribute -> the kind of pretrained part that fills it (a name in `diva_jax.weights.parts`);
    every other attribute starts from the random weights that `build` gives it,
  `flops_per_image(config)` (optional): counted FLOPs of one image in one step, for the MFU in the progress line.
It does not know about meshes, optimizers or files.
"""

import importlib
import pkgutil

from diva_jax.common.errors import UserError


def find(name: str):
    """The objective's module.

    Raises:
      UserError: there is none of that name.
    """
    known = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("condition", "draws"))
    if name not in known:
        raise UserError(f"config.objective={name!r} is not known: use one of {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}")
