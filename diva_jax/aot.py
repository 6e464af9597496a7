"""Compiles the train step for a TPU slice, without TPU hardware, and prints its memory use and costs.

    python -m diva_jax.aot --config=configs/vitl14.py --topology=v5e:4x4 [--per-device-batch=8] [--search] [--save=DIR]

The step of training is lowered from shapes. It needs libtpu, the TPU compiler, alone: `pip install -e '.[tpu]'`. A
full-size config took two to 95 minutes on two cores (docs/TPU.md) and 5 to 10 GB; --search compiles several times.
"""

import collections
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import time

import jax
import jinja2
from absl import flags
from etils import epath

from diva_jax import config as configs
from diva_jax.common import cli, errors, log, paths
from diva_jax.common.errors import RunError, UserError
from diva_jax.costs import chips, hlo
from diva_jax.training import compiler, partition
from diva_jax.training.step import Program

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "Chip and shape of the slice, e.g. v5e:4x4, tpu7x:2x2x2.")
_BATCH = flags.DEFINE_integer("per-device-batch", None, "Images per device and micro-batch; default: the config's.")
_SEARCH = flags.DEFINE_bool("search", False, "Find the largest per-device batch that fits (several compilations).")
_SAVE = flags.DEFINE_string("save", None, "Folder or gs://... for all stages' executables, for main --executables.")
_HLO = flags.DEFINE_string("hlo", None, "Write the optimised HLO text to this file.")
_JSON = flags.DEFINE_string("json", None, "Write the report to this file as JSON; '-' prints it instead of the tables.")

_GIB = 2**30
# Without these, libtpu asks the machine's metadata service for its slice, and only one process can load it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


class OutOfMemory(Exception):
    """The compiler reported that the program does not fit: bytes that are needed, and available."""


def devices(topology: str) -> tuple[chips.Chip, tuple[int, ...], list]:
    """The chip of a slice such as "v5e:4x4", its shape, and the devices to compile for. A UserError where libtpu is not
    installed or is locked by another process, or there is no such slice."""
    name, chip, shape = chips.parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the TPU's compiler, is not installed: pip install -e '.[tpu]' (it runs on a CPU)")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # libtpu ends the process, without an exception, if XLA_FLAGS has flags of the CPU's compiler.
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in given if not flag.startswith("--xla_cpu_"))
    from jax.experimental import topologies

    try:
        topology_desc = topologies.get_topology_desc(platform="tpu", topology_name=topology, **dict(chip.options))
    except Exception as e:  # The class of the exception depends on the version.
        raise UserError(explain(str(e), topology)) from e
    return chip, shape, list(topology_desc.devices)


def explain(message: str, topology: str) -> str:
    """Returns a one-sentence error message for an exception of libtpu."""
    if "lockfile" in message or "already in use" in message:
        stale = "if `lsof /tmp/libtpu_lockfile` shows no running process, remove /tmp/libtpu_lockfile"
        other = "otherwise end that process or set ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        return f"libtpu is locked by another process: {stale}, {other}"
    reason = message.strip().splitlines()[0].split("INVALID_ARGUMENT: ")[-1][:200]
    problem = f"--topology={topology} is not a slice that libtpu supports ({reason})"
    return f"{problem}: use e.g. v5e:4x4, v6e:4x4 or v5p:2x2x2"


def with_batch(config, device_count: int, per_device: int | None):
    """The config, checked, with `per_device` images per device and micro-batch; None keeps the config's batch size."""
    if per_device is not None:
        if per_device < 1:
            raise UserError(f"--per-device-batch={per_device} must be at least 1")
        config = config.copy_and_resolve_references()
        config.batch_size = device_count * per_device * config.accum
    configs.validate(config, device_count)
    return config


def least_batch(config, device_count: int, limit: int) -> int:
    """The smallest `per_device` of `with_batch` that the config accepts, such as a whole group of DCR; 1 if none is."""
    for size in range(1, limit + 1):
        with contextlib.suppress(UserError):
            with_batch(config, device_count, size)
            return size
    return 1


def compile_step(program: Program, stage: int):
    """A compiled step, its `compiler.executable_facts`, and the seconds to trace and to compile it. `OutOfMemory` where
    the compiler reports that the program does not fit, a UserError where it refuses an option."""
    began = time.perf_counter()
    shapes = program.abstract_state(stage), program.abstract_frozen(), program.abstract_batch()
    lowered = program.step(stage).lower(*shapes)
    known, traced = compiler.executable_facts(lowered, program), time.perf_counter()
    try:
        with log.waiting("compiling", lambda line: print(line, file=sys.stderr, flush=True)):
            compiled = compiler.compiled(lowered)
    except jax.errors.JaxRuntimeError as e:
        sizes = re.findall(r"([\d.]+)([GM])\b", str(e).split("RESOURCE_EXHAUSTED")[-1])
        # A kernel that does not fit into VMEM is a fault of the kernel. No batch size or mesh helps.
        if "RESOURCE_EXHAUSTED" not in str(e) or "memory space vmem" in str(e) or len(sizes) < 2:
            raise
        raise OutOfMemory(*(float(n) * {"G": _GIB, "M": 2**20}[unit] for n, unit in sizes[:2])) from e
    return compiled, known, {"trace": traced - began, "compile": time.perf_counter() - traced}


def report(config, topology: str, save: epath.PathLike | None = None, hlo_file: epath.PathLike | None = None) -> dict:
    """Compiles the step of a config's last stage for a slice, and returns its costs, for JSON. Writes the executables
    of all stages to the folder `save`, and the optimised HLO to `hlo_file`. All keys are per device, of which a
    TPU7x has two per chip, unless their names imply otherwise. Where the compiler reports that the program does not
    fit, there are those of the input, "fits", "needed" and "available" [bytes of HBM] alone. Else there are "memory"
    [bytes], with "aliases", the part of the outputs that reuses the memory of arguments; "seconds", to trace and to
    compile; all keys of `hlo.analyse`; "step_ms", "model_ms" plus "kernel_bound_ms"; "images_per_s", per chip;
    "mfu", between 0 and 1; "all_reduce_ms", a lower bound of communication time, not part of "step_ms".
    A RunError where jaxlib cannot read the compiled program."""
    chip, shape, mesh_devices = devices(topology)
    n, config = len(mesh_devices), config.copy_and_resolve_references()
    if config.kernels == compiler.AUTO:
        config.kernels = compiler.OWN  # There is no device here whose kernels could have been checked.
    row = {
        "topology": topology,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "kernels_of_config": config.kernels,
        "chips": n // chip.per_chip,
        "devices": n,
        "mesh": {"data": n // config.mesh.fsdp, "fsdp": config.mesh.fsdp},
        **{name: config[name] for name in ("remat", "accum", "batch_size")},
        "per_device_batch": config.batch_size // config.accum // n,
    }
    program = Program(config, partition.make_mesh(config.mesh, mesh_devices))
    last = len(program.stages) - 1
    try:
        for stage in range(0 if save else last, last + 1):
            compiled, known, seconds = compile_step(program, stage)
            if save:
                compiler.save_executable(save, stage, known, compiled, program)
    except OutOfMemory as e:
        return row | {"fits": False, "needed": e.args[0], "available": e.args[1]}
    memory = hlo.memory(compiled)
    needed = memory.pop("needed")
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as e:
        raise RunError(
            f"the step compiles for {topology} in {seconds['compile']:.0f} s and needs {needed / _GIB:.2f} of "
            f"{chip.usable / _GIB:.2f} GiB, but its time is not known: jaxlib {importlib.metadata.version('jaxlib')} "
            f"cannot read what libtpu {row['versions']['libtpu']} made of it ({errors.reason(e)})"
        ) from e
    if hlo_file:
        paths.write_whole(hlo_file, text)
    cost = hlo.analyse(text, chip)
    images, counted = config.batch_size / n, program.flops().total()
    ms = cost["model_ms"] + cost["kernel_bound_ms"]
    # A reduce-scatter or an all-gather counts as half of an all-reduce.
    gb = collections.Counter({kind: c["gb"] for kind, c in cost["collectives"].items()})
    reduced = gb["all-reduce"] + (gb["reduce-scatter"] + gb["all-gather"]) / 2
    return row | {
        "fits": needed <= chip.usable,
        "needed": needed,
        "available": chip.usable,
        "memory": memory | {"available": chip.usable},
        "seconds": seconds,
        **cost,
        "step_ms": ms,
        "images_per_s": 1e3 * images / ms * chip.per_chip,
        "mfu": counted * images / (ms / 1e3 * chip.flops),
        "all_reduce_ms": 1e3 * chips.all_reduce_seconds(1e9 * reduced, chip, shape),
    }


def search(config, topology: str, limit: int = 256) -> dict:
    """Returns the report of the largest per-device batch that fits, or that of batch 1 if none fits. Each trial is a
    compilation. The first trial is the config's batch; further ones, at most `limit`, are interpolated or extrapolated
    linearly from the memory that the trials so far needed. All are multiples of `least_batch`."""
    n = len(devices(topology)[2])
    least = least_batch(config, n, limit)
    most = limit // least
    rows, needed, low, high = {}, {}, 0, most + 1  # From here on, sizes are in units of `least`.
    size = min(max(config.batch_size // config.accum // n // least, 1), most)
    while high - low > 1:
        row = rows[size] = report(with_batch(config, n, size * least), topology)
        print(f"per-device batch {size * least}: {verdict(row)}", file=sys.stderr, flush=True)
        low, high = (size, high) if row["fits"] else (low, size)
        needed.setdefault(0, row.get("memory", {}).get("arguments", 0))
        needed[size] = row["needed"]
        a, b = (low, high) if high <= most else sorted(needed)[-2:]
        grown = needed[b] - needed[a]  # Padding may make it 0.
        size = a + int((row["available"] - needed[a]) * (b - a) / grown) if grown else high
        size = min(max(size, low + 1), high - 1)
    return rows[low or 1]


def verdict(row: dict) -> str:
    """E.g. `fits, 2.31 GiB to spare (13.44 of 15.75 GiB)`."""
    spare = (row["available"] - row["needed"]) / _GIB
    word = f"fits, {spare:.2f} GiB to spare" if row["fits"] else f"does not fit, {-spare:.2f} GiB too much"
    return f"{word} ({row['needed'] / _GIB:.2f} of {row['available'] / _GIB:.2f} GiB)"


def text_of(row: dict) -> str:
    """Formats a report as text."""
    template = jinja2.Environment(loader=jinja2.PackageLoader("diva_jax.costs", "")).get_template("report.j2")
    return template.render(row=row, verdict=verdict, sizes=hlo.SIZES)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # This process only compiles and must not occupy a TPU.
    config, topology = cli.config_of(_CONFIG), _TOPOLOGY.value
    config = with_batch(config, len(devices(topology)[2]), _BATCH.value)
    if _SEARCH.value and (_SAVE.value or _HLO.value):
        raise UserError("--save and --hlo are of one batch size: run --search first, then with its --per-device-batch")
    wanted = {f.name: paths.folder(f.value, f"--{f.name}") for f in (_SAVE, _HLO, _JSON) if f.value not in (None, "-")}
    for name, path in wanted.items():  # Before a step is compiled, which takes minutes.
        paths.check_writable(path if name == "save" else path.parent, f"--{name}")
        if name != "save" and path.is_dir():
            raise UserError(f"--{name}={path} is a folder: give a file")
    row = search(config, topology) if _SEARCH.value else report(config, topology, wanted.get("save"), wanted.get("hlo"))
    text = json.dumps(row, indent=1)
    if "json" in wanted:
        paths.write_whole(wanted["json"], text + "\n")
    print(text if _JSON.value == "-" else text_of(row), flush=True)


entry = functools.partial(cli.run, main, described=configs.described)

if __name__ == "__main__":
    entry()
