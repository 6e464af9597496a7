"""Compiled programs: options of the TPU compiler, where they are kept, which of this package's Pallas kernels they use
(`config.kernels`, and what `selfcheck` has found), and compiled steps in a folder.

`aot --save` writes such a folder, and `main --executables` starts with it without compiling. STAGE.json says what the
step of a stage was compiled of and for. STAGE.bin is the executable as a pickle of
`jax.experimental.serialize_executable`, which can run any code where it is read: it is read from the folder that the
user named alone, and only where it has the checksum of the JSON file.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import pydantic
from etils import epath
from jax.experimental import serialize_executable

from diva_jax import __version__
from diva_jax.common import json_files, paths
from diva_jax.common.errors import UserError, explained, listing
from diva_jax.common.fields import differences
from diva_jax.common.log import say, say_once
from diva_jax.costs import chips
from diva_jax.models import platform
from diva_jax.training import distributed

AUTO, XLA, OWN = "auto", "xla", "own"
_MAX_CACHE_BYTES = 10 * 2**30  # The compiled programs of all runs of a user have at most this size.
_MAX_EXECUTABLE_BYTES = 2**33
_REFUSED = re.compile(r"No such compile option: '([^']*)'|Failed to parse '[^']*' into flag (\w+)")
_SOURCES = [Path(platform.__file__).with_name(f"{name}.py") for name in ("attention", "kernels", "platform")]
_CHECK = "python -m diva_jax.selfcheck --config=FILE --workdir=DIR"
# In a lowered kernel are the names of its source files. Without the folders that the packages are installed in, the
# steps of `aot` and `main` are the same on any two machines.
_FOLDERS = jax.config.jax_hlo_source_file_canonicalization_regex or "^.*/(?=(diva_jax|jax)/)"
jax.config.update("jax_hlo_source_file_canonicalization_regex", _FOLDERS)


def parse(text: str) -> dict[str, str]:
    """`"a=1,b=false"` -> {"a": "1", "b": "false"}; whether the compiler knows the options, it says itself. A ValueError
    where a part is not NAME=VALUE or a name is there twice."""
    pairs = [part.strip().split("=") for part in text.split(",")] if text else []
    options = {pair[0]: pair[-1] for pair in pairs}
    if any(len(pair) != 2 or not all(pair) for pair in pairs) or len(options) < len(pairs):
        raise ValueError(text)
    return options


def options(setting: str, device: jax.Device) -> dict[str, str] | None:
    """The options of `config.compiler_options` for a device, also of a topology; None for one that is not a TPU."""
    if device.platform != "tpu":
        return None
    if setting == AUTO:
        chip = chips.of(device)
        return dict(chip.compiler_options) if chip else {}
    return parse(setting)


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a lowered step, in a thread, since no signal ends the call of the compiler, which may take an hour; a
    UserError where it refuses an option of `config.compiler_options`."""
    try:
        return ThreadPoolExecutor(1).submit(lowered.compile).result()
    except jax.errors.JaxRuntimeError as e:
        if not (found := _REFUSED.search(str(e))):
            raise
        name = found.group(1) or found.group(2)
        problem = f"this version of the TPU compiler does not accept {name} ({str(e).splitlines()[0][:200]})"
        advice = f"remove or correct it, or use config.compiler_options={AUTO}"
        raise UserError(f"config.compiler_options: {problem}: {advice}") from e


def kept(workdir: epath.Path | None = None) -> epath.Path:
    """The folder of what is found out about programs and devices: `~/.cache/diva_jax`, for all runs of a user, or
    `WORKDIR/cache` for a workdir in a bucket, since its machines come and go."""
    if workdir is not None and paths.is_remote(workdir):
        return epath.Path(workdir) / "cache"
    return epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diva_jax"


def use_cache(setting: str, workdir: epath.Path) -> None:
    """Keeps compiled programs in the folder `setting` (`config.compile_cache`), so that a restart need not compile; ""
    for none. auto is `compiled` in the folder `kept`, of limited size on this machine, or JAX_COMPILATION_CACHE_DIR."""
    if not setting:
        return
    if setting != AUTO:
        folder = epath.Path(setting).expanduser()
    elif paths.is_remote(workdir):
        folder = kept(workdir) / "compiled"
    elif os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    else:
        folder = kept() / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_max_size", _MAX_CACHE_BYTES)
        except OSError:  # A home that cannot be written.
            folder = workdir / "cache" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(paths.absolute(folder)))


def checked_file(kind: str, workdir: epath.Path | None = None) -> epath.Path:
    """The file with the results of a kind of device, `device.device_kind`; other versions or kernels have another."""
    packages = [p for p in ("jax", "jaxlib", "libtpu") if importlib.util.find_spec(p)]
    versions = [__version__, *map(importlib.metadata.version, packages)]
    crc = zlib.crc32(b"".join([json.dumps([kind, *versions]).encode(), *[file.read_bytes() for file in _SOURCES]]))
    return kept(workdir) / f"selfcheck-{re.sub(r'[^A-Za-z0-9]+', '-', kind)}-{crc:08x}.json"


def checked_kernels(kind: str, workdir: epath.Path | None = None) -> dict[str, bool]:
    """The kept results of a kind of device: kernel, as in `platform.allowed`, -> whether it computes what XLA does; a
    UserError where the file is damaged."""
    form, repair = dict[Literal["kernels"], dict[str, pydantic.StrictBool]], f"remove it, {_CHECK} writes it again"
    return json_files.read(checked_file(kind, workdir), form, repair, {}).get("kernels", {})


def keep_checked(kind: str, found: dict[str, bool], workdir: epath.Path | None = None) -> epath.Path:
    """Adds results to those that are kept; returns the file."""
    file = checked_file(kind, workdir)
    paths.write_whole(file, json.dumps({"kernels": checked_kernels(kind, workdir) | found}, indent=1))
    return file


def chosen_kernels(setting: str, mesh, workdir: epath.Path | None = None) -> frozenset[str] | None:
    """The kernels that a program of `config.kernels` uses on an abstract mesh, for `platform.traced_on`; None for all.
    With auto these are the ones that passed the check on this kind of device, on a process and failed on none; a line
    says which. Every process of a run must call it."""
    if setting != AUTO:
        return None if setting == OWN else frozenset()
    if platform.traced_for(mesh) != "tpu":
        return frozenset()
    found: dict[str, bool] = {}
    for results in distributed.gathered(checked_kernels(mesh.abstract_device.device_kind, workdir)):
        for name, ok in results.items():
            found[name] = ok and found.get(name, True)
    passed = frozenset(name for name, ok in found.items() if ok)
    if passed:
        say_once(f"kernels: this package's for {', '.join(sorted(passed))}, which passed the check of this device")
    elif found or not checked_file(mesh.abstract_device.device_kind, workdir).exists():
        why = "failed the check of this device" if found else f"were not checked on this device: run {_CHECK}"
        say_once(f"kernels: XLA's and jax's, since this package's {why} (config.kernels=auto)")
    return passed


class _Saved(json_files.Record):
    """What STAGE.json has: of STAGE.bin its checksum and size; and the config, for messages."""

    sha256: str
    size: Annotated[int, pydantic.Field(ge=0, le=_MAX_EXECUTABLE_BYTES)]
    facts: dict[str, str]
    config: dict[str, Any]


def saved_in(path: str) -> epath.Path:
    """The folder of `--executables`, on this machine or in a bucket; a UserError where no executable is in it."""
    found = paths.folder(path, "--executables")
    if not any(found.glob("*.json")):
        raise UserError(f"--executables={path} has no executables: python -m diva_jax.aot --save={path} writes them")
    return found


def executable_facts(lowered: jax.stages.Lowered, program) -> dict[str, str]:
    """What must be the same where a step of a `step.Program` was compiled and where it runs; to be asked for before it
    is compiled, which changes what `lowered` holds."""
    devices = list(program.mesh.devices.flat)
    first, places = devices[0], [(d.id, *getattr(d, "coords", ()), getattr(d, "core_on_chip", 0)) for d in devices]
    return {
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu") if first.platform == "tpu" else "",
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "config.compiler_options": json.dumps(options(program.config.compiler_options, first)),
        "the devices": f"{len(devices)} x {first.device_kind}",
        "the order of devices": hashlib.sha256(repr(places).encode()).hexdigest()[:12],
        "the step": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12],
    }


def _file(folder: epath.Path, program, index: int) -> str:
    return f"{folder}/{index}-{program.stages[index].name}"


def save_executable(
    folder: epath.PathLike, index: int, known: dict[str, str], compiled: jax.stages.Compiled, program
) -> None:
    """Writes the executable of stage `index`, with its `executable_facts`, to a folder, which may be in a bucket."""
    data, config = serialize_executable.serialize(compiled)[0], json.loads(program.config.to_json())
    saved = _Saved(sha256=hashlib.sha256(data).hexdigest(), size=len(data), facts=known, config=config)
    file = _file(folder, program, index)
    paths.write_whole(f"{file}.bin", data)
    paths.write_whole(f"{file}.json", saved.model_dump_json(indent=1))


def load_executable(folder: epath.Path, index: int, lowered: jax.stages.Lowered, program) -> jax.stages.Compiled | None:
    """The executable of stage `index`; None, after a line that says why, where some process of the run has none."""
    file, found, why = _file(folder, program, index), None, "another process of the run cannot use its executable"
    try:
        saved = json_files.read(f"{file}.json", _Saved, "write it again with python -m diva_jax.aot --save")
        here = executable_facts(lowered, program)
        if other := differences(saved.facts, here):
            if saved.facts | {"the step": ""} == here | {"the step": ""}:
                # `aot` has saved `own` in place of `auto`.
                fields = differences(saved.config, json.loads(program.config.to_json()), ignored=("kernels",))
                other = [f"config.{f}" for f in fields] or ["the kernels chosen here, the code or a library's version"]
            raise UserError(f"{file}.bin is of another step: {listing(other, 3)}")
        data = json_files.read_bytes(f"{file}.bin", saved.size)
        if hashlib.sha256(data).hexdigest() != saved.sha256:
            raise UserError(f"{file}.bin has not the checksum that {file}.json gives: it was changed or is damaged")
        given, devices = jax.tree.structure(lowered.args_info), list(program.mesh.devices.flat)
        # Pickle, the runtime and other versions of jax raise exceptions of many types.
        with explained(f"{file}.bin cannot be loaded", "write it again with python -m diva_jax.aot --save", Exception):
            found = serialize_executable.deserialize_and_load(data, given, lowered.out_tree, devices[0].client, devices)
    except UserError as e:
        why = str(e)
    if distributed.any_failed(found is None):
        say(f"compiling, since {why}")
        return None
    say(f"not compiled: {file}.bin is this step's executable, for these versions and devices")
    return found
