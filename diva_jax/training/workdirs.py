"""The arrays of a run: those that it begins with, and in its workdir its config and what it had trained at a step."""

import dataclasses
import functools
import json
import re
import time
import zlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diva_jax import objectives
from diva_jax.common import config_files, json_files, paths
from diva_jax.common.errors import UserError, explained, listing
from diva_jax.common.fields import differences
from diva_jax.common.log import say
from diva_jax.training import checkpoint, partition
from diva_jax.training.step import Program, learning_rate, pace
from diva_jax.weights import formats, origins


def owners(program: Program) -> dict[str, str]:
    """Parameter name -> prefix of its pretrained part; other parameters keep their initial values."""
    found = {}
    parts = program.objective.pretrained()
    for prefix in sorted(parts, key=len):  # The longest prefix is applied last and takes precedence.
        names = [n for n in program.arrays if n == prefix or n.startswith(prefix + "/")]
        if not names:
            problem = f"config.objective={program.config.objective}: pretrained() has {prefix!r}"
            raise UserError(f"{problem}, but parameters are named like {listing(list(program.arrays)[:3])}")
        for name in names:
            found[name] = prefix
            if any(re.fullmatch(pattern, name[len(prefix) + 1 :]) for pattern in parts[prefix].fresh):
                del found[name]
    return found


def initial_arrays(
    program: Program, only: Collection[str] | None = None, every_source: bool = True
) -> tuple[dict, dict]:
    """Loads the arrays `only` (default all): pretrained parts from their sources, others as the objective initialises
    them. Returns ({name: array on its sharding}, {prefix: {"source": names of files, "sha256"}}). Names and shapes of a
    part of which some are loaded are checked as a whole; with `every_source` sources of which nothing is loaded are
    found and hashed too. A UserError where a source is missing, invalid, or of another architecture."""
    wanted = set(program.arrays if only is None else only)
    owner, parts = owners(program), program.objective.pretrained()
    mine = {prefix: [n for n, p in owner.items() if p == prefix] for prefix in parts}
    needed = [prefix for prefix in parts if not wanted.isdisjoint(mine[prefix])]
    # All sources are found and checked before any values are read.
    opened = {prefix: parts[prefix].open() for prefix in (parts if every_source else needed)}
    arrays = {}
    with ThreadPoolExecutor(1) as hashes:
        # Hashing needs the processor while reading waits for the disk.
        digests = {prefix: hashes.submit(formats.fingerprint, o.tensors.files) for prefix, o in opened.items()}
        for prefix in needed:
            depth = prefix.count("/") + 1
            named, variables = {}, {}  # Of each path within the part.
            for name in mine[prefix]:
                path, variable = program.skeleton.variables[name]
                path = path[depth:] or path
                named[path], variables[path] = name, variable.replace(program.arrays[name])
            only = {path for path, name in named.items() if name in wanted}
            state = opened[prefix].fill(nnx.from_flat_state(variables), only)
            arrays |= {named[path]: var.get_value() for path, var in nnx.to_flat_state(state)}
        if fresh := [n for n in program.arrays if n not in owner and n in wanted]:
            # The compiler removes the computation of all others.
            init = jax.jit(
                lambda: {n: a for n, a in partition.disassemble(program.init_module())[1].items() if n in fresh},
                out_shardings={n: program.shardings[n] for n in fresh},
            )
            arrays |= init()
        found = ((prefix, [f.name for f in o.tensors.files]) for prefix, o in opened.items())
        return arrays, {prefix: {"source": names, "sha256": digests[prefix].result()} for prefix, names in found}


# Fields that may differ when a run is resumed, because none of them affects what is learned.
RESUMABLE = (
    *("log", "checkpoint", "eval", "mesh", "remat", "compile_cache", "compiler_options", "kernels", "profile"),
    *("data.threads", "data.prefetch", "data.stall_timeout", "data.decode_gib", "data.max_broken_share"),
)
_NO_CONFIG = (AttributeError, KeyError, TypeError, ValueError)
_PUT_BACK = "run the command in the folder where the run began, or put the weights there"
_VISIBLE_WITHIN_S = 60.0  # Within this time, network file systems show a new file everywhere.
# Sections that are compared as a whole: their fields are those of another library.
WHOLE = ("diffusion.unet", "diffusion.vae", "diffusion.text_encoder", "diffusion.scheduler")


def _run_config(workdir: epath.PathLike) -> dict | None:
    """The config of a run: `workdir/config.json`, or that of its newest checkpoint where the file is damaged."""
    path = epath.Path(workdir) / "config.json"
    try:
        return json_files.read(path, dict[str, Any], "restore it, it is the config of the run", None)
    except UserError as e:
        if (content := checkpoint.stored(workdir, "config")) is None:
            raise
        say(f"{e}; the config in the newest checkpoint is used")
        return content


def check_config(workdir: epath.PathLike, config) -> int | None:
    """A UserError where the checkpoints of a workdir, if there are any, are of another config. Returns the run's number
    of `config.steps` where the config has more, which extends it; otherwise None."""
    if checkpoint.latest_step(workdir) is None or (there := _run_config(workdir)) is None:
        return None
    before, longer = there.get("steps"), False
    if isinstance(before, int) and (longer := before < config.steps):
        there = there | {"steps": config.steps}
    if changed := differences(there, json.loads(config.to_json()), WHOLE, RESUMABLE):
        advice = "use another workdir, or the config of that run"
        raise UserError(f"--workdir={workdir} holds a run of another config: {listing(changed, 5)}; {advice}")
    return before if longer else None


def extension(program: Program, start: int, before: int) -> str:
    """What it means for the learning rate that a run has more steps than `before` after `start` ones; "": nothing."""
    config = program.config.copy_and_resolve_references()
    config.steps = before
    old, new = objectives.stages(config)[-1], program.stages[-1]
    if old == new:
        return ""

    def at(stage: objectives.Stage, step: int) -> float:
        rate = learning_rate(stage, pace(stage, config.optim.warmup))
        return float(rate(np.int32(min(step, stage.end - 1) - stage.start)))

    first = max(start, new.start)
    return (
        f"config.steps was {before} and is {program.config.steps}: the stage {new.name} has the schedule of its "
        f"{new.steps} steps from here on; its learning rate after {first} steps is {at(new, first):.3g}, where that of "
        f"{old.steps} steps has {at(old, first):.3g}"
    )


def write_config(workdir: epath.PathLike, config) -> None:
    """Writes the config to `workdir/config.json`; a UserError where that cannot be written."""
    with explained(f"--workdir={workdir} cannot be written", "use a folder that you may write"):
        paths.write_whole(epath.Path(workdir) / "config.json", json.dumps(json.loads(config.to_json()), indent=1))


def seen(path: epath.Path) -> int | None:
    """The checksum of a file that process 0 has just written, once it is seen; None if the folder is not shared."""
    until = time.monotonic() + _VISIBLE_WITHIN_S
    while not path.exists():
        if time.monotonic() > until:
            return None
        time.sleep(1.0)
    return zlib.crc32(json_files.read_bytes(path))


def check_sources(there: dict, here: dict) -> None:
    """Raises a UserError where a resumed run would have other frozen weights than before."""
    if changed := [k for k in here if there.get(k, {}).get("sha256") != here[k]["sha256"]]:
        began = there.get(changed[0], {}).get("source")
        problem = f"the weights of {listing(changed)} are not those this run began with ({began})"
        raise UserError(f"{problem}: put the same files back, or use another workdir")


def read_config(workdir: epath.PathLike, field: str = "--workdir") -> ConfigDict:
    """The config of a run in its workdir; a UserError where there is no run, or it names code that is not trusted."""
    found = _run_config(paths.folder(workdir, field))
    if found is None or "model_type" in found:  # An export for transformers has a config.json too.
        advice = "give that of python -m diva_jax.main (export_torch: a step as --step=STEP, other weights as --source)"
        raise UserError(f"{field}={workdir} holds no run: {advice}")
    config_files.check_stored(found, f"{field}={workdir}: config.json")
    # A ConfigDict raises these errors for names that no field can have.
    with explained(f"{field}={workdir}: config.json is not the config of a run", "restore it", *_NO_CONFIG):
        return ConfigDict(found)


def choose_step(workdir: epath.PathLike, step: int | None = None, given: str = "") -> int:
    """`step`, or the newest one; a UserError lists those that exist. `given` is what the user wrote for it."""
    given, workdir = given or f"--step={step}", epath.Path(workdir).expanduser()
    damages = checkpoint.damages(workdir)
    whole, newest = sorted(s for s, damage in damages.items() if damage is None), max(damages, default=None)
    if not whole:
        broken = f" that can be read (that of step {newest}: {damages[newest]})" if damages else " yet"
        raise UserError(f"{workdir} has no checkpoint{broken}: let the run save one, or correct the path")
    if step is None:
        if damages[newest]:
            damage = f"the checkpoint of step {newest} is damaged ({damages[newest]})"
            say(f"{workdir}: {damage}: that of step {whole[-1]} is used")
        return whole[-1]
    if step not in damages:
        raise UserError(f"{given} has no checkpoint in {workdir}: use one of {listing(whole)}")
    if damages[step]:
        raise UserError(f"{given}: that checkpoint is damaged ({damages[step]}): use one of {listing(whole)}")
    return step


def _host() -> jax.Device:
    """The device that stands for this machine's memory."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # Only another platform was asked for.
        return jax.local_devices()[0]


@dataclasses.dataclass(frozen=True)
class Parent:
    """The checkpoint of a run that another run starts from: what it has trained, and the SHA-256 of its description."""

    workdir: str
    step: int
    shapes: Mapping[str, tuple[int, ...]]
    sha256: str

    @classmethod
    def open(cls, text: str, field: str = "--init_from") -> "Parent":
        """Finds WORKDIR (the newest step) or WORKDIR:STEP, the value of `field`; a UserError where it is not there."""
        workdir, step = origins.split_step(text)
        where = paths.folder(workdir, field)
        step = choose_step(where, step, f"{field}={text}")
        shapes = {n: tuple(a.shape) for n, a in checkpoint.trained(where, step)["params"].items()}
        return cls(str(paths.absolute(where)), step, shapes, checkpoint.identity(where, step))

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Parent":
        """The checkpoint of a run's `record`; a UserError where it is gone, or is another one."""
        where = f"{record['workdir']}:{record['step']}"
        with explained(f"this run began with frozen parameters of {where}", "put it back", UserError):
            found = cls.open(where)
        if found.sha256 != record["sha256"]:
            raise UserError(f"{where} is not the checkpoint that this run began with: put the same one back")
        return found

    def record(self, frozen: Iterable[str]) -> dict:
        """What the checkpoints of the run that starts here keep; `frozen`: what it has taken and does not train."""
        return {"workdir": self.workdir, "step": self.step, "sha256": self.sha256, "frozen": sorted(frozen)}

    def matching(self, arrays: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
        """The names of arrays that are in the checkpoint, in the same shape; a UserError where there are none."""
        found = [n for n, a in arrays.items() if self.shapes.get(n) == tuple(a.shape)]
        if not found:
            there, here = (listing(list(known)[:3]) for known in (self.shapes, arrays))
            problem = f"no parameter there ({there}) has the name and shape of one of this config ({here})"
            raise UserError(f"--init_from={self.workdir}:{self.step}: {problem}: use a run of the same models")
        return found


@dataclasses.dataclass(frozen=True)
class RunAt:
    """A run at a checkpoint, over the weights that it began with: `params`, what it has trained, by name, or the moving
    average where it keeps one, on the host; `sources`, prefix -> {"source": file names, "sha256"} of those weights;
    `taken`, the `Parent.record` of what it took from another run, if anything."""

    workdir: epath.PathLike
    step: int
    config: ConfigDict
    params: dict[str, jax.Array]
    sources: dict[str, dict]
    taken: dict

    @classmethod
    def open(cls, workdir: epath.PathLike, step: int | None = None) -> "RunAt":
        """Reads a run at a step, default the newest; a UserError where it is damaged, or of another `config.json`."""
        config = read_config(workdir)
        while True:
            chosen = choose_step(workdir, step)
            try:
                params, meta = checkpoint.restore_params(workdir, chosen, _host())
                saved = meta.get("config") if isinstance(meta.get("config"), dict) else {}
                # A run of another version may have other fields.
                here = {k: v for k, v in json.loads(config.to_json()).items() if k in saved}
                if changed := differences(here, saved, WHOLE, (*RESUMABLE, "steps")):
                    problem = f"is not the config that the checkpoint of step {chosen} was saved with"
                    advice = f"they differ in {listing(changed, 5)}: put the run's own config.json back"
                    raise UserError(f"{workdir}/config.json {problem}, {advice}")
                return cls(workdir, chosen, config, params, meta.get("sources", {}), meta.get("init_from", {}))
            except UserError:
                # A run that trains there may have deleted it meanwhile, and then it has newer ones.
                if step is not None or choose_step(workdir) == chosen:
                    raise

    @functools.cached_property
    def program(self) -> Program:
        """The run's program, on one device of the host."""
        # A field is missing, or cannot be used.
        problem = f"{self.workdir}/config.json does not describe a run of this version"
        with explained(problem, "restore it", *_NO_CONFIG):
            return Program(self.config.copy_and_resolve_references(), Mesh(np.asarray([[_host()]]), ("data", "fsdp")))

    def open_base(self) -> origins.ClipSource:
        """Opens the weights that it was tuned from; a UserError where they are gone or have changed."""
        source = self.config.backbone.source
        with explained(f"{self.workdir} was tuned from weights that cannot be opened", _PUT_BACK, UserError):
            base = origins.open_source(source, "config.backbone.source")
        sha256 = formats.fingerprint(base.tensors.files)
        for prefix, part in self.program.objective.pretrained().items():
            began = self.sources.get(prefix)
            if part.source == source and began and began["sha256"] != sha256:
                said = f"(sha256 {sha256[:12]}, {began['sha256'][:12]} expected)"
                problem = f"{base.where} is not the checkpoint that the run {self.workdir} began with {said}"
                raise UserError(f"{problem}: put {listing(began['source'])} back")
        return base

    def towers(self) -> partition.Flat:
        """The tuned towers, adapters merged; a UserError where weights that the run began with are gone or changed."""
        self.program.check_exportable()
        towers = self.program.towers
        needed = set().union(*map(towers.needs, towers.shapes)) - set(self.params)
        taken = {n: self.program.arrays[n] for n in needed & set(self.taken.get("frozen", ()))}
        with explained(f"{self.workdir} was tuned from weights that cannot be opened", _PUT_BACK, UserError):
            arrays, began = initial_arrays(self.program, needed - taken.keys(), every_source=False)
        check_sources(self.sources, began)
        if taken:
            parent = Parent.recorded(self.taken)
            arrays |= checkpoint.restore_arrays(parent.workdir, parent.step, taken)[0]
        return towers({**arrays, **self.params})
