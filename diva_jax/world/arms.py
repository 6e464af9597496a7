"""The arms of the experiment as data: which objective with which fields, and what each is compared with."""

import dataclasses
import os
from collections.abc import Mapping
from typing import NamedTuple

from diva_jax.common.errors import UserError, listing
from diva_jax.world import models, objectives, records

RANDOM = "random"
DATA_SEED = 1010
SEARCH = 100  # Seeds from this one on are for the search of learning rates; their runs are not reported.
_DECAY, _WARMUP = 0.99, 40  # Decay of the moving average of weights, and steps of warm-up, in all arms.


class Budget(NamedTuple):
    """What each run may use: images, counted as often as they are seen, and the images of one step; and after how many
    images it is measured for the first time, which is the budget of the demo."""

    images: int = 102_400
    batch_size: int = 128
    early: int = 25_600


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to tune.

    Attributes:
      what: for the reader.
      objective: as in a config; empty: not tuned.
      fields: of the config, by dotted name.
      teacher: what teaches, a folder of `models.WEIGHTS`, or "random": one of the same size with random weights; empty:
        nothing that is kept.
      control: the arm that must be beaten before anything is claimed; empty: a control itself.
      captions: of the training data, a key of `captions.KINDS`.
      wrong: of so many training images in a hundred no text is true.
    """

    what: str
    objective: str
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    teacher: str = models.GENERATOR
    control: str = ""
    captions: str = "biased"
    wrong: int = 0


def _controlled(name: str, arm: Arm, what: str, **changes) -> dict[str, Arm]:
    """An arm and its control, which has other fields or another teacher."""
    control = f"{name}_control"
    changes["fields"] = arm.fields | changes.get("fields", {})
    wrong = dataclasses.replace(arm, what=f"control of `{name}`: {what}", **changes)
    return {name: dataclasses.replace(arm, control=control), control: wrong}


_NEXT = "the features of the next image"
_ANCHOR = {"anchor.of": "unit", "anchor.weight": 80.0}
_JUDGE = {"judge.texts": "records", "judge.neutral": "none", "judge.draws": 1, "optim.lr": 3e-3} | _ANCHOR
_DIVA = {"optim.name": "adamw", "diva.draws": 1, "diva.first_timestep": 300}
_UNCLIP = {"unclip.latents": "mean", "trainable": (("vision/.*", 1.0), (".*", 0.0))}
_CONTRAST = {"contrast.weight": 1.0}
# With the published weight, 0.5, the kernel is too small beside the distance to the untuned encoder to move anything.
_KUEA = {"kuea.kernel": "cosine", "kuea.kernel_weight": 1000.0, "optim.lr": 1e-3}
_KUEA |= {"optim.schedule": "cosine", "optim.warmup_steps": -1}  # KUEA's own schedule, in which its arms were run.
# The weights are those of ComCLIP's config, except the anchor's: with its 1, embeddings drift four times as far.
_COMCLIP = {"contrast.weight": 1.0, "relation.weight": 1.0, "optim.lr": 1e-3} | _ANCHOR
_SALM = {"optim.lr": 3e-3}
_GENHANCER = {"genhancer.stage1_steps": 500, "genhancer.stage1_lr": 2e-3, "optim.lr": 1e-3}
# The authors compare 16 images with each other, in 17 passes of the generator per image; two take 3.
_DCR = {"dcr.group": 2, "dcr.tile": 384, "condition.warmup_steps": 100, "condition.warmup_lr": 2e-3, "optim.lr": 1e-4}
_DIVA_NEXT, _UNCLIP_NEXT = {"diva.condition_of": "next"}, {"unclip.condition_of": "next"}

# Learning rates and anchors were searched with seeds from `SEARCH` on; docs/DOES_IT_WORK.md has the commands.
ARMS = {
    "untuned": Arm("the kept CLIP", "", teacher=""),
    "labels": Arm("true labels, text by text", "judge", _JUDGE | {"judge.verdict": "first"}, control="judge_control"),
    **_controlled(
        "judge",
        Arm("the generator's posterior, text by text", "judge", _JUDGE),
        "the posterior in a random order",
        fields={"judge.verdict": "shuffled"},
    ),
    **_controlled(
        "judge_half",
        Arm(
            "the judge, half of whose questions have no true text",
            "judge",
            _JUDGE | {"judge.neutral": "auto"},
            wrong=50,
        ),
        "the posterior in a random order",
        fields={"judge.verdict": "shuffled"},
    ),
    "judge_forced": Arm("the same without a neutral text", "judge", _JUDGE, wrong=50, control="judge_half_control"),
    **_controlled(
        "diva",
        Arm("DIVA, the second of two stages", objectives.DIVA, {"optim.lr": 1e-5} | _DIVA),
        _NEXT,
        fields=_DIVA_NEXT,
    ),
    **_controlled(
        "unclip",
        Arm("un2CLIP", "unclip", {"optim.lr": 1e-4} | _UNCLIP, models.UNCLIP),
        _NEXT,
        fields=_UNCLIP_NEXT,
    ),
    **_controlled(
        "diva_terms",
        Arm("DIVA with contrast and anchor", objectives.DIVA, {"optim.lr": 3e-4} | _DIVA | _CONTRAST | _ANCHOR),
        _NEXT,
        fields=_DIVA_NEXT,
    ),
    **_controlled(
        "unclip_terms",
        Arm(
            "un2CLIP with contrast and anchor",
            "unclip",
            {"optim.lr": 3e-4} | _UNCLIP | _CONTRAST | _ANCHOR,
            models.UNCLIP,
        ),
        _NEXT,
        fields=_UNCLIP_NEXT,
    ),
    **_controlled(
        "kuea",
        Arm("KUEA, taught by a CLIP of rich captions", "kuea", _KUEA, models.TEACHER),
        "a random teacher",
        teacher=RANDOM,
    ),
    **_controlled(
        "comclip",
        Arm("ComCLIP, taught by captions and a CLIP of rich captions", "comclip", _COMCLIP, models.TEACHER),
        "a random teacher; the captions stay",
        teacher=RANDOM,
    ),
    **_controlled(
        "salm",
        Arm("SALM, taught by the patch tokens of a CLIP of rich captions", "salm", _SALM, models.TEACHER),
        "a random teacher",
        teacher=RANDOM,
    ),
    **_controlled(
        "genhancer",
        Arm("GenHancer, both stages", "genhancer", _GENHANCER, teacher=""),
        "its denoiser is not trained",
        fields={"genhancer.stage1_steps": 0},
    ),
    **_controlled(
        "dcr",
        Arm("DCR, both stages", "dcr", _DCR),
        "a random generator, to which the projector is trained",
        teacher=RANDOM,
    ),
}


def find(name: str) -> Arm:
    """The arm of a name, which may change fields: "diva:optim.lr=1e-3:anchor.weight=0.1".

    Raises:
      UserError: there is no such arm, or the name has no value for a field.
    """
    known, *changes = name.split(":")
    if known not in ARMS:
        raise UserError(f"--arms has {known}: use some of {listing(list(ARMS))}")
    fields = dict(change.partition("=")[::2] for change in changes)
    try:
        fields = {k: float(v) for k, v in fields.items()}
    except ValueError:
        raise UserError(f"--arms has {name}: give each field a number, {known}:optim.lr=1e-3") from None
    arm = ARMS[known]
    return dataclasses.replace(arm, fields=arm.fields | fields) if fields else arm


def arm_config(arm: Arm, seed: int, budget: Budget, random: str | os.PathLike = ""):
    """The config of one run of an arm.

    Args:
      arm: not the untuned one.
      seed: of initial weights, data and draws.
      budget: of images.
      random: folder of a teacher with random weights.
    """
    c = models.base_config(arm.objective, models.UNCLIP_DIFFUSION if arm.teacher == models.UNCLIP else None)
    c.ema.decay, c.optim.warmup_steps, c.accum = _DECAY, _WARMUP, 1
    c.optim.schedule = "constant"  # The moving average of weights replaces a decay.
    c.update(seed=seed, batch_size=budget.batch_size, steps=budget.images // budget.batch_size)
    c.update_from_flattened_dict(arm.fields)
    if arm.teacher == RANDOM:
        if "diffusion" in c:
            c.diffusion.source = str(random)
        elif "kuea" in c:
            c.kuea.teacher.source = str(random)
        else:
            c.teacher.source = str(random)
    c.data.path = records.path(DATA_SEED + seed, arm.captions, wrong=arm.wrong)
    return c
