"""Configs of the commands that tests run: `FOLDER` is DIVA's on its files; `OBJECTIVE:FOLDER` one of WORLD, on the kept
models of the world, or one outside of the package, on the folder's files."""

from small import SPEC, diva_config, with_fields

from diva_jax import config
from diva_jax.world import models, records

# SALM's curriculum follows the step, and its teacher is in the checkpoint; the judge's texts, of those records that
# have any, follow from the position, its draws from the step.
WORLD = {
    "salm": dict(batch_size=16, accum=2, salm__teacher="self", ema__decay=0.6),
    "judge": dict(batch_size=8, judge__verdict="shuffled", judge__count=3),
}


def rotations(folder="none", **fields):
    """The config of docs/WRITE_AN_OBJECTIVE.md's objective on the files of a folder; `fields` as `with_fields`'s."""
    return with_fields(get_config(f"outside.rotations:{folder}"), fields)


def get_config(arg: str):
    objective, _, folder = arg.rpartition(":")
    if objective in WORLD:
        c = with_fields(models.base_config(objective), dict(steps=14) | WORLD[objective])
    elif objective:  # outside.rotations is for what does not depend on the objective: it compiles in a moment.
        c = config.default(SPEC, objective=objective)
        c.update(dtype="float32", frozen_dtype="float32", steps=14, batch_size=8)
    else:
        c = diva_config(steps=12, batch_size=8, accum=2)
        c.diffusion.source, c.condition.warmup_steps = f"{folder}/stable-diffusion", 2
    c.checkpoint.every, c.log.every, c.data.threads = 3, 1, 2
    c.log.tensorboard = False  # Its writer takes seconds to import.
    if objective in WORLD:
        c.data.path = records.path(3, count=30)
    else:
        c.backbone.source, c.data.path = f"{folder}/clip", f"{folder}/photos"
    return c
