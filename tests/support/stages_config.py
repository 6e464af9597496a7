"""The config of the commands in test_stages_killed.py: DCR with its files in the folder of the argument.

Stage 1 has three steps and stage 2 four. There is dropout in the adapters, whose keys must not depend on where a run
was resumed.
"""

import os

import small
import small_genhancer

from diva_jax import config


def get_config(folder: str):
    c = config.default(small_genhancer.SPEC, small.diffusion(), "dcr")
    c.update(dtype="float32", frozen_dtype="float32", batch_size=8, steps=4)
    c.backbone.source = f"{folder}/clip"
    c.diffusion.update(source=f"{folder}/stable-diffusion", text_tokens=6)
    c.condition.warmup_steps, c.optim.lr = 3, 1e-3
    c.dcr.update(group=2, tile=3)
    c.dcr.lora.rank = 3
    c.data.path, c.data.threads = f"{folder}/photos", 1
    c.checkpoint.every, c.log.every, c.log.tensorboard = 1, 1, False
    c.compile_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "auto")
    return c
