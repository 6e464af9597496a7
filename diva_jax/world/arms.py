"""The arms of the experiment as data: which objective with which fields, and what each is compared with."""

import dataclasses
import os
from collections.abc import Mapping

from diva_jax.common.errors import UserError
from diva_jax.objectives import diva
from diva_jax.objectives.contract import EXACT, FAITHFUL
from diva_jax.world import models, objectives, records

# Of every DIVA arm: all timesteps, as `gaps` proposes, pooled token alone, one draw, AdamW.
_TUNING = {
    "diva.draws": 1,
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
# Adapters of rank 16; the rate is that of low-rank adapters in small models, ten times that of whole weights.
_DCR = {
    "dcr.group": 4,
    "dcr.tile": 1000,  # All passes at the same time.
    "optim.lr": 1e-3,
    "optim.warmup": 0.05,
    "condition.warmup_lr": 1e-3,
}
_KUEA = {"kuea.kernel": "cosine", "optim.lr": 1e-4, "optim.warmup": 0.05}
_STRONG_KUEA = _KUEA | {"kuea.kernel_weight": 50.0}
# Stage 1, which trains the denoiser from random weights, has steps of its own, and is made once.
_GENHANCER = {"genhancer.stage1_steps": 1500, "genhancer.stage1_lr": 1e-3, "optim.lr": 1e-3, "optim.warmup": 0.05}
KEPT, OWN, RANDOM = "kept", "own", "random"
DATA_SEED = 1010


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to tune.

    Attributes:
      what: for the reader.
      objective: as in a config; empty: not tuned.
      fields: of the config, by dotted name.
      projection: what the condition starts from: "kept", the projection that `pretrain` trained; "own": a third of the
        steps trains it first, alone; "": random, or none.
      teacher: what teaches, a folder of `models.WEIGHTS`, or "random": one of the same size with random weights; empty:
        the captions alone.
      control: the arm that must be beaten before anything is claimed; empty: a control itself.
      captions: of the training data, a key of `captions.KINDS`.
      shared_first_stage: whether all seeds begin with the first stage of seed 0, where it is long.
    """

    what: str
    objective: str = "diva"
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    projection: str = ""
    teacher: str = models.GENERATOR
    control: str = "shuffled"
    captions: str = "biased"
    shared_first_stage: bool = False


def _diva(what: str, projection: str = KEPT, **fields) -> Arm:
    """DIVA with some fields other than `_TUNING`; in names of `fields`, `__` stands for a dot."""
    return Arm(what, "diva", _TUNING | {k.replace("__", "."): v for k, v in fields.items()}, projection)


def _clip(what: str, lr: float, control: str = "", captions: str = "biased") -> Arm:
    """CLIP's own training, with no teacher but captions."""
    fields = {"optim.lr": lr, "optim.warmup": 0.05}
    return Arm(what, objectives.CLIP, fields, teacher="", control=control, captions=captions)


def _random(arm: Arm) -> Arm:
    """The control of an arm: the same with a teacher of random weights."""
    fields = dict(arm.fields)
    if arm.objective == "genhancer":
        fields["genhancer.stage1_steps"] = 1
    what = f"control: {arm.what}, random teacher"
    return dataclasses.replace(arm, what=what, fields=fields, teacher=RANDOM, control="")


def _shuffled(arm: Arm) -> Arm:
    """The control of an arm: the same with the features of the next image."""
    fields = {**arm.fields, f"{arm.objective}.condition_of": "next"}
    return dataclasses.replace(arm, what=f"control: {arm.what}, features of the next image", fields=fields, control="")


_STAGES = _diva("DIVA in two stages")
_SWITCHES = [f.name for f in dataclasses.fields(diva.DivaOptions) if f.default == EXACT]
# Each has a control of its own, `NAME_shuffled`, which differs in whose features are given.
_VARIANTS = {
    "diva": _diva("DIVA end to end from a random projection", ""),
    "short_stages": _diva("DIVA in two stages, the first a third of the steps", OWN),
    "low_rate": _diva("two stages, learning rate 2e-5", optim__lr=2e-5),
    "anchor": _diva("two stages, anchor 3e-4", anchor__weight=3e-4),
    "strong_anchor": _diva("two stages, anchor 3e-3", anchor__weight=3e-3),
    "ema": _diva("two stages, moving average", ema__decay=0.98),
    "late_timesteps": _diva("two stages, timesteps from 500", diva__first_timestep=500),
    "four_draws": _diva("two stages, four draws", diva__draws=4),
    "faithful": _diva("two stages, faithful switches", **{f"diva__{s}": FAITHFUL for s in _SWITCHES}),
    "last_block": _diva(
        "two stages, last block of the encoder alone",
        trainable=(("vision/blocks/2/.*", 1.0), ("visual_proj/.*", 1.0), (".*", 0.0)),
    ),
    "fixed_projection": _diva(
        "two stages, the projection is not trained in the second", trainable=(("vision/.*", 1.0), (".*", 0.0))
    ),
    "all_tokens": _diva(
        "pooled and all patch tokens, the first third trains the projection", OWN, backbone__select="all"
    ),
    "runs_tokens": _diva("pooled token and 8 means of patches, likewise", OWN, backbone__select="runs:8"),
    "unclip": Arm("un2CLIP", "unclip", _UNCLIP, teacher=models.UNCLIP),
}
# Each has a control of its own, `NAME_random`, whose teacher is random.
_TAUGHT = {
    "dcr": Arm("DCR in two stages, groups of 4", "dcr", _DCR, OWN),
    "genhancer": Arm("GenHancer, adapters of rank 16", "genhancer", _GENHANCER, shared_first_stage=True),
    "kuea": Arm("KUEA, taught by a CLIP that learned from rich captions", "kuea", _KUEA, teacher=models.TEACHER),
    "strong_kuea": Arm("KUEA, weight of the kernels 50 instead of 0.5", "kuea", _STRONG_KUEA, teacher=models.TEACHER),
}

ARMS = {
    "untuned": Arm("the kept CLIP", "", teacher="", control=""),
    "stages": _STAGES,
    "shuffled": _shuffled(_STAGES),
    "random_unet": _random(_STAGES),
    "more_clip": _clip("control: more CLIP training on biased captions", 1e-4),
    "rich_clip": _clip("CLIP training on rich captions", 1e-4, "more_clip", "rich"),
    # With the peak rate of pretraining: whether the tests can show a gain at this budget at all.
    "more_clip_fast": _clip("control: more CLIP training, learning rate 1e-3", 1e-3),
    "rich_clip_fast": _clip("CLIP training on rich captions, learning rate 1e-3", 1e-3, "more_clip_fast", "rich"),
    **{name: dataclasses.replace(arm, control=f"{name}_shuffled") for name, arm in _VARIANTS.items()},
    **{name: dataclasses.replace(arm, control=f"{name}_random") for name, arm in _TAUGHT.items()},
    **{f"{name}_shuffled": _shuffled(arm) for name, arm in _VARIANTS.items()},
    **{f"{name}_random": _random(arm) for name, arm in _TAUGHT.items()},
}


def passes(config) -> int:
    """Passes through the U-Net per image of one step; 1 where there is no U-Net."""
    if "diva" in config:
        return config.diva.draws
    return config.dcr.group + 1 if "dcr" in config else 1


def arm_config(arm: Arm, seed: int, steps: int, batch_size: int, random: str | os.PathLike):
    """The config of one run of an arm.

    All arms have the same budget: `steps` steps, of all stages together, with `batch_size` passes through the U-Net
    (images, where there is none). An arm with several passes per image has fewer images.

    Args:
      arm: not the untuned one.
      seed: of initial weights, data and draws.
      steps, batch_size: the budget.
      random: folder of a teacher with random weights.

    Raises:
      UserError: `batch_size` cannot be divided into images.
    """
    objective = objectives.DIVA if arm.projection == KEPT else arm.objective
    c = models.base_config(objective, models.UNCLIP_DIFFUSION if arm.teacher == models.UNCLIP else None)
    fields = dict(arm.fields)
    table = fields.pop("trainable", None)
    c.update_from_flattened_dict(fields)
    if table:
        c.trainable = table
    if batch_size % passes(c):
        raise UserError(
            f"--batch_size={batch_size} cannot be divided by the {passes(c)} passes per image of an arm: give a "
            f"multiple of {passes(c)}"
        )
    c.update(seed=seed, accum=1, steps=steps, batch_size=batch_size // passes(c))
    if arm.projection == OWN:
        c.condition.warmup_steps = steps // 3
        c.steps = steps - steps // 3
    if arm.teacher == RANDOM and arm.objective != "genhancer":
        section = c.kuea.teacher if "kuea" in c else c.diffusion
        section.source = str(random)
    c.data.path = records.path(DATA_SEED + seed, arm.captions)
    return c
