"""The config of the commands in test_stages_killed.py: DCR with its files in the folder of the argument.

Stage 1 has three steps and stage 2 four. There is dropout in the adapters, whose keys must not depend on where a run
was resumed.
"""

import small


def get_config(folder: str):
    c = small.dcr_config(steps=4, batch_size=8, condition__warmup_steps=3, dcr__group=2, dcr__tile=3)
    c.backbone.source, c.diffusion.source = f"{folder}/clip", f"{folder}/stable-diffusion"
    c.data.path, c.data.threads = f"{folder}/photos", 1
    c.checkpoint.every, c.log.every, c.log.tensorboard = 1, 1, False
    return c
