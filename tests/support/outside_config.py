"""Configs of the objectives in tests/support/outside; the argument is MODULE:FOLDER, the folder of their files."""

import dataclasses

from specs import TEACHER, TRAINED

from diva_jax import config


def get_config(arg: str):
    name, folder = arg.split(":")
    c = config.default(TRAINED, objective=name)
    name = name.rpartition(".")[2]
    c.update(dtype="float32", frozen_dtype="float32", steps=6, batch_size=8, accum=2)
    c.backbone.source = f"{folder}/clip"
    c.data.path, c.data.threads = f"{folder}/photos", 2
    c.optim.update(name="adamw", lr=1e-3, warmup=0.1)
    c.checkpoint.every, c.log.every, c.log.tensorboard = 2, 1, False
    if name == "distillation":  # So many steps that a signal arrives before the last.
        c.steps, c.distillation.head_steps, c.checkpoint.every = 200, 20, 20
        teacher = dataclasses.replace(TEACHER, source=f"{folder}/teacher.safetensors")
        c.distillation.teacher.update(dataclasses.asdict(teacher))
    return c
