"""Objectives: `config.objective` is the name of a module of this package, or the dotted path of any other module.

An objective module defines
  `Objective`: a subclass of `contract.Objective`;
  `SECTION` (optional): the dataclass of its own fields, see `common.fields`; they become
    `config.<last component of the name>`;
  `SECTIONS` (optional): names of shared sections that its configs have, see `config.SECTIONS`;
  `recipe(config) -> None` (optional): sets the general fields of a config to the published values;
  `stages(config) -> tuple[Stage, ...]` (optional): default one stage that trains `config.trainable`;
  `validate(config) -> None` (optional): raises a `UserError` for fields that do not fit together.

A diffusion objective whose only input is an image may have two more members for the evaluation task `feedback`, see
`diva.Objective`: `condition_losses(batch, keys, edges)`, and `timesteps`, the number of timesteps. Without
`nats_per_loss` among its losses, there is no estimate in nats.
"""

import inspect
import pkgutil
from types import ModuleType

from diva_jax.common import config_files
from diva_jax.common.errors import UserError, explained, listing
from diva_jax.objectives.contract import Objective, Pace, Progress, Stage, tune

__all__ = ["Objective", "Pace", "Progress", "Stage", "find", "names", "section", "stages", "tune"]


def names() -> list[str]:
    """Returns the names of the objectives of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "contract")


def find(name: str) -> ModuleType:
    """Imports an objective's module, of this package or of a dotted path; a UserError where it is none."""
    if "." not in name and name not in names():
        raise UserError(f"config.objective={name!r} is not known: use {listing(names())}, or a module's dotted path")
    path = name if "." in name else f"{__name__}.{name}"
    module = config_files.module(path, "config.objective", "check the path and PYTHONPATH")
    if not hasattr(module, "Objective"):
        raise UserError(f"config.objective={name!r} is not an objective: the module does not define Objective")
    kind = module.Objective
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise UserError(f"config.objective={name!r}: its Objective must be a subclass of diva_jax.objectives.Objective")
    if callable(inspect.getattr_static(kind, "inputs")):
        raise UserError(f"config.objective={name!r}: its inputs is a method: write @property above it")
    problem = f"config.objective={name!r}: its Objective must be made as Objective(config, rngs=rngs)"
    with explained(problem, "correct its __init__", TypeError):
        inspect.signature(kind.__init__).bind(None, None, rngs=None)
    return module


def section(name: str) -> str:
    """Returns the name of the config section of an objective: the last component of its path."""
    return name.rpartition(".")[2]


def stages(config) -> tuple[Stage, ...]:
    """Returns the stages of a run; a UserError where there are gaps between them, or one has no steps."""
    module = find(config.objective)
    given = module.stages(config) if hasattr(module, "stages") else (tune(config),)
    usual = {name: config.optim[name] for name in ("schedule", "warmup_steps")}
    stages = tuple(s._replace(**{k: v for k, v in usual.items() if getattr(s, k) is None}) for s in given)
    starts = [0, *(s.end for s in stages)]
    if not stages or any(s.start != start or s.steps < 1 for s, start in zip(stages, starts, strict=False)):
        spans = ", ".join(f"{s.name} {s.start} to {s.end}" for s in stages)
        raise UserError(f"the stages of config.objective={config.objective} must follow one another, but are {spans}")
    return stages
