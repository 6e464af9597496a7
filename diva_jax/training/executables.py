"""Compiled steps in a folder: `aot --save` writes them, and `main --executables` starts with them without compiling.

STAGE.json says what the step of a stage was compiled of and for. STAGE.bin is the executable as a pickle of
`jax.experimental.serialize_executable`, which can run any code where it is read: it is read from the folder that the
user named alone, and only where it has the checksum of the JSON file.
"""

import hashlib
import importlib.metadata
import json
import os
from typing import Annotated, Any

import jax
import pydantic
from etils import epath
from jax.experimental import serialize_executable

from diva_jax.common import json_files, paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import differences
from diva_jax.common.log import say
from diva_jax.training import compiler, distributed

_MAX_BYTES = 2**33


class Saved(json_files.Record):
    """What STAGE.json has: of STAGE.bin its checksum and size; and the config, for messages."""

    sha256: str
    size: Annotated[int, pydantic.Field(ge=0, le=_MAX_BYTES)]
    facts: dict[str, str]
    config: dict[str, Any]


def folder(path: str) -> epath.Path:
    """The folder of `--executables`, on this machine or in a bucket; a UserError where no executable is in it."""
    found = paths.folder(path, "--executables")
    if not any(found.glob("*.json")):
        raise UserError(
            f"--executables={path} has no executables: write them with python -m diva_jax.aot --save={path}"
        )
    return found


def facts(lowered: jax.stages.Lowered, program) -> dict[str, str]:
    """What must be the same where a step of a `step.Program` was compiled and where it runs; to be asked for before it
    is compiled, which changes what `lowered` holds.
    """
    devices = list(program.mesh.devices.flat)
    first, places = devices[0], [(d.id, *getattr(d, "coords", ()), getattr(d, "core_on_chip", 0)) for d in devices]
    return {
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu") if first.platform == "tpu" else "",
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "config.compiler_options": json.dumps(compiler.options(program.config.compiler_options, first)),
        "the devices": f"{len(devices)} x {first.device_kind}",
        "the order of devices": hashlib.sha256(repr(places).encode()).hexdigest()[:12],
        "the step": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12],
    }


def _file(folder: epath.Path, program, index: int) -> str:
    return f"{folder}/{index}-{program.stages[index].name}"


def save(folder: epath.PathLike, index: int, known: dict[str, str], compiled: jax.stages.Compiled, program) -> None:
    """Writes the executable of stage `index`, of which `facts` are `known`, to a folder, which may be in a bucket."""
    data = serialize_executable.serialize(compiled)[0]
    saved = Saved(
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        facts=known,
        config=json.loads(program.config.to_json()),
    )
    file = _file(folder, program, index)
    paths.write_whole(f"{file}.bin", data)
    paths.write_whole(f"{file}.json", saved.model_dump_json(indent=1))


def _read(file: str, lowered: jax.stages.Lowered, program) -> jax.stages.Compiled:
    """The executable of a step; a UserError with the reason why it cannot be used."""
    saved = json_files.read(f"{file}.json", Saved, "write it again with python -m diva_jax.aot --save")
    here = facts(lowered, program)
    if other := differences(saved.facts, here):
        if saved.facts | {"the step": ""} == here | {"the step": ""}:
            fields = differences(saved.config, json.loads(program.config.to_json()))
            other = [f"config.{field}" for field in fields] or ["the code or the version of a library"]
        raise UserError(f"{file}.bin is of another step: {listing(other, 3)}")
    data = json_files.read_bytes(f"{file}.bin", saved.size)
    if hashlib.sha256(data).hexdigest() != saved.sha256:
        raise UserError(f"{file}.bin has not the checksum that {file}.json gives: it was changed or is damaged")
    given, devices = jax.tree.structure(lowered.args_info), list(program.mesh.devices.flat)
    try:
        return serialize_executable.deserialize_and_load(data, given, lowered.out_tree, devices[0].client, devices)
    except Exception as e:  # Of pickle, of the runtime, of another version of jax.
        raise UserError(f"{file}.bin cannot be loaded ({paths.reason(e)})") from e


def load(folder: epath.Path, index: int, lowered: jax.stages.Lowered, program) -> jax.stages.Compiled | None:
    """The executable of stage `index`; None, after a line that says why, where some process of the run has none."""
    file, found, why = _file(folder, program, index), None, "another process of the run cannot use its executable"
    try:
        found = _read(file, lowered, program)
    except UserError as e:
        why = str(e)
    if distributed.any_failed(found is None):
        say(f"compiling, since {why}")
        return None
    say(f"not compiled: {file}.bin is this step's executable, for these versions and devices")
    return found
