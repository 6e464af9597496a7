"""The small world of diva_jax/world, from the weights that are kept there: minutes on two CPU cores.

    python -m diva_jax.main --config=configs/world.py:judge --workdir=runs/world/judge
    python -m diva_jax.main --config=configs/world.py:judge_control --workdir=runs/world/judge_control

After the colon stands an arm of diva_jax/world/arms.py, by default diva. docs/DOES_IT_WORK.md says how the fields were
chosen, and what comes out over several seeds. A control with a random teacher needs the folder of one, which
world.experiment writes: --config.teacher.source, .kuea.teacher.source or .diffusion.source.
"""

from diva_jax import config
from diva_jax.common import errors
from diva_jax.world import arms


def get_config(arg: str | None = None):
    known = [name for name in arms.ARMS if name != "untuned"]
    if arg and arg not in (*known, "exact", "faithful"):
        advice = f"give one of {errors.listing(known, 50)}"
        raise errors.UserError(errors.unknown("configs/world.py has no arm", [arg], known, advice))
    name = arg if arg in known else "diva"
    c = arms.arm_config(arms.find(name), 0, arms.Budget())
    c.checkpoint.every, c.log.every = 200, 20
    return config.variant(c, None if arg == name else arg)
