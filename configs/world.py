"""DIVA in the small world of diva_jax/world, from the weights that are kept there: minutes on two CPU cores.

    python -m diva_jax.main --config=configs/world.py --workdir=runs/world/tuned
    python -m diva_jax.main --config=configs/world.py --workdir=runs/world/control --config.diva.condition_of=next

The control conditions the U-Net on another image's features, so that it can teach nothing. docs/DOES_IT_WORK.md says
how the fields were chosen, and what comes out over several seeds.
"""

from diva_jax import config
from diva_jax.world import arms, models


def get_config(arg: str | None = None):
    c = arms.arm_config(arms.ARMS["stages"], seed=0, steps=200, batch_size=40, random="")
    c.backbone.source, c.diffusion.source = str(models.WEIGHTS / models.CLIP), str(models.WEIGHTS / models.GENERATOR)
    c.checkpoint.every, c.log.every = 50, 10
    return config.variant(c, arg)
