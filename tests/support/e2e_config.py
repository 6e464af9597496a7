"""The config of the commands in test_train_e2e.py: `small.small_config` with files in the folder of the argument."""

from small import small_config


def get_config(folder: str):
    c = small_config(steps=12, batch_size=8, accum=2)
    c.backbone.source, c.diffusion.source = f"{folder}/clip", f"{folder}/stable-diffusion"
    c.data.path, c.data.threads = f"{folder}/photos", 2
    c.condition.warmup_steps = 2
    c.checkpoint.every, c.log.every = 3, 1
    c.log.tensorboard = False  # Its writer takes seconds to import.
    return c
