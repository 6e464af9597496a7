"""Configs of the commands that tests run: `MODULE:FOLDER`, an objective outside of the package and the folder of the
files; `FOLDER` alone is DIVA's."""

from small import SPEC, small_config

from diva_jax import config


def get_config(arg: str):
    module, _, folder = arg.rpartition(":")
    if module:  # outside.rotations is for what does not depend on the objective: it compiles in a moment.
        c = config.default(SPEC, objective=module)
        c.update(dtype="float32", frozen_dtype="float32", steps=14, batch_size=8)
    else:
        c = small_config(steps=12, batch_size=8, accum=2)
        c.diffusion.source, c.condition.warmup_steps = f"{folder}/stable-diffusion", 2
    c.backbone.source = f"{folder}/clip"
    c.data.path, c.data.threads = f"{folder}/photos", 2
    c.checkpoint.every, c.log.every = 3, 1
    c.log.tensorboard = False  # Its writer takes seconds to import.
    return c
