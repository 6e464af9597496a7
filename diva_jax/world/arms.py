"""The arms of the experiment as data: which objective with which fields, and what each is compared with."""

import dataclasses
import os
from collections.abc import Mapping

from diva_jax.world import models, records

# Of every diffusion arm: what `gaps` proposes, pooled token alone, one draw, AdamW.
_TUNING = {
    "diva.draws": 1,
    "diva.first_timestep": 100,
    "optim.name": "adamw",
    "optim.lr": 1e-4,
    "optim.warmup": 0.05,
    "condition.warmup_lr": 1e-3,
}
_UNCLIP = {
    "optim.lr": 1e-4,
    "optim.warmup": 0.05,
    "unclip.latents": "mean",
    "trainable": (("vision/.*", 1.0), (".*", 0.0)),
}
DATA_SEED = 1004


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to tune.

    Attributes:
      what: for the reader.
      objective: of the package; empty: not tuned.
      fields: of the config, by dotted name.
      stages: whether a third of the steps trains the projection alone first.
      generator: a folder of `models.WEIGHTS`, or "random": one of the same size with random weights.
      control: the arm that must be beaten before anything is claimed; empty: a control itself.
    """

    what: str
    objective: str = "diva"
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    stages: bool = True
    generator: str = models.GENERATOR
    control: str = "shuffled"


def _diva(
    what: str, stages: bool = True, generator: str = models.GENERATOR, control: str = "shuffled", **fields
) -> Arm:
    """DIVA with some fields other than `_TUNING`; in names of `fields`, `__` stands for a dot."""
    return Arm(what, "diva", _TUNING | {k.replace("__", "."): v for k, v in fields.items()}, stages, generator, control)


# Variants of `stages`, each with a control of its own, `NAME_shuffled`, which differs in whose features are given.
_VARIANTS = {
    "diva": _diva("DIVA end to end from a random projection", stages=False),
    "anchor": _diva("two stages, anchor 3e-4", anchor__weight=3e-4),
    "low_rate": _diva("two stages, learning rate 2e-5", optim__lr=2e-5),
    "all_tokens": _diva("two stages, pooled and all patch tokens", backbone__select="all"),
    "runs_tokens": _diva("two stages, pooled and 8 tokens, means of patches", backbone__select="runs:8"),
    "all_timesteps": _diva("two stages, all timesteps", diva__first_timestep=0),
    "four_draws": _diva("two stages, four draws", diva__draws=4),
    "ema": _diva("two stages, moving average", ema__decay=0.98),
    "unclip": Arm("un2CLIP", "unclip", _UNCLIP, False, models.UNCLIP),
}


def _shuffled(arm: Arm) -> Arm:
    """The control of an arm: the same with the features of the next image."""
    fields = {**arm.fields, f"{arm.objective}.condition_of": "next"}
    return dataclasses.replace(arm, what=f"control: {arm.what}, features of the next image", fields=fields, control="")


ARMS = {
    "untuned": Arm("the kept CLIP", "", control=""),
    "stages": _diva("DIVA in two stages"),
    "shuffled": _shuffled(_diva("DIVA in two stages")),
    "random_unet": _diva("control: DIVA in two stages, random U-Net", generator="random", control=""),
    "more_clip": Arm(
        "control: more CLIP training on biased captions",
        "clip",
        {"optim.lr": 1e-4, "optim.warmup": 0.05},
        stages=False,
        control="",
    ),
    **{name: dataclasses.replace(arm, control=f"{name}_shuffled") for name, arm in _VARIANTS.items()},
    **{f"{name}_shuffled": _shuffled(arm) for name, arm in _VARIANTS.items()},
}


def arm_config(arm: Arm, seed: int, steps: int, batch_size: int, random_generator: str | os.PathLike):
    """The config of one run of an arm.

    All arms have the same budget: `steps` steps, of all stages together, with `batch_size` passes through the U-Net. An
    arm with several draws per picture has fewer pictures.
    """
    c = models.base_config(arm.objective, models.UNCLIP_DIFFUSION if arm.generator == models.UNCLIP else None)
    fields = dict(arm.fields)
    table = fields.pop("trainable", None)
    c.update_from_flattened_dict(fields)
    if table:
        c.trainable = table
    c.update(seed=seed, batch_size=batch_size, accum=1, steps=steps)
    if arm.objective == "diva":
        c.batch_size = max(1, batch_size // c.diva.draws)
    if arm.stages:
        c.condition.warmup_steps = steps // 3
        c.steps = steps - steps // 3
    if "diffusion" in c and arm.generator == "random":
        c.diffusion.source = str(random_generator)
    c.data.path = records.path(DATA_SEED + seed, "biased")
    return c
