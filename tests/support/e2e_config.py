"""Configs of the commands that tests run: `MODULE:FOLDER`, an objective outside of the package and the folder of the
files; `FOLDER` alone is DIVA's."""

import dataclasses

from small import SPEC, small_config
from specs import TEACHER

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
    if module.endswith((".captions", ".distillation")):
        c.update(steps=6, accum=2)
        c.optim.update(name="adamw", lr=1e-3, warmup=0.1)
    if module.endswith(".distillation"):  # So many steps that a signal arrives before the last.
        c.steps, c.distillation.head_steps, c.checkpoint.every = 200, 20, 20
        teacher = dataclasses.replace(TEACHER, source=f"{folder}/teacher.safetensors")
        c.distillation.teacher.update(dataclasses.asdict(teacher))
    return c
