"""Checks a machine's accelerators: python -m diva_jax.selfcheck [--config=configs/vitl14.py] [--workdir=runs/vitl14].

The first command to run on a new machine; it takes at most five minutes and prints one table: versions and devices;
each of this package's kernels forward and backward against XLA's operations, at the shapes of the config; collectives
over all devices; a checkpoint written to the place of the workdir and read back; a train step of the config, with
random weights, on made-up images; the images per second that this host decodes. The last line can be pasted
into an issue. The exit code is 1 if a check failed; "slow" is not a failure, and "-" means that a result is not known.

Results of kernels are kept by versions and kind of device in ~/.cache/diva_jax, or in a workdir in a bucket, where
config.kernels=auto reads them. On a slice, start the same command on every machine. On a CPU all sizes are those of a
toy (configs/tiny.py), and kernels are interpreted.
"""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable

import jax
from absl import flags
from etils import epath

from diva_jax import config as configs
from diva_jax.common import cli, config_files, log, paths
from diva_jax.common.errors import RunError, UserError
from diva_jax.training import compiler, device_checks, distributed, partition
from diva_jax.training.device_checks import FAILED, OK, TOY, UNKNOWN
from diva_jax.training.step import Program

_CONFIG = cli.define_config("The config whose shapes are checked. Default: configs/vitl14.py, eight images per device.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run to come, or gs://...; a checkpoint is tried there.")
_UNLESS = flags.DEFINE_bool("unless_kept", False, "Do nothing where results for this kind of device are kept.")

_SECONDS, _KERNELS_SECONDS = 240.0, 150.0  # Time limits of the whole check and of the check of kernels.


@dataclasses.dataclass
class Table:
    """Prints a row as soon as it is known, and keeps what the last line says."""

    words: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, run: Callable[[], tuple]) -> tuple:
        """Runs a check, prints its row, and returns its result: (verdict or whether it is right, sentence, ...)."""
        try:
            verdict, said, *more = run()
        except UserError:
            raise
        except Exception as e:  # Whatever a device, a compiler or a file system raises.
            verdict, said, more = FAILED, f"{type(e).__name__}: {' '.join(str(e).split())[:200]}", [0.0]
        verdict = {True: OK, False: FAILED}.get(verdict, verdict)
        if distributed.any_failed(verdict == FAILED):
            verdict = FAILED
            self.failed.append(name)
        log.say(f"{name:<30}{verdict:<8}{said}")
        self.words.append(f"{name} {verdict} ({said})")
        return verdict, said, *more


def _about() -> tuple[str, str]:
    """Versions, devices and their memory."""
    found, limit = log.describe(), (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    memory = f" with {limit / 2**30:.2f} GiB" if limit else ""
    tpu = {"libtpu": importlib.metadata.version("libtpu")} if jax.default_backend() == "tpu" else {}
    versions = ", ".join(f"{name} {version}" for name, version in (found["versions"] | tpu).items())
    return OK, f"{found['devices']}{memory}, {jax.process_count()} processes; {versions}"


def check(config, workdir: epath.Path | None, unless_kept: bool = False) -> Table | None:
    """Runs all checks and keeps the results of the kernels; None, after a line, where they are kept already."""
    began, table = time.perf_counter(), Table()
    mesh, device, setting = partition.make_mesh(config.mesh), jax.local_devices()[0], config.kernels
    config.kernels, kind = compiler.OWN, device.device_kind
    step, toy, found, cases = device_checks.Step(Program(config, mesh)), device.platform == "cpu", {}, TOY
    if not toy:
        cases = device_checks.cases_of(step.trace(None)) if device.platform == "tpu" else ()
    names, file = {case.name for case in cases}, compiler.checked_file(kind, workdir)
    if unless_kept:
        kept = file.exists() and names <= compiler.checked_kernels(kind, workdir).keys()
        if not distributed.any_failed(not kept):
            log.say(f"this device was checked before: {file}")
            return None
    table.add("machine", _about)
    if toy or not cases or setting == compiler.XLA:
        step.trace(frozenset())
    step.compile()
    for case in cases:
        if distributed.any_failed(time.perf_counter() - began > _KERNELS_SECONDS):
            table.add("other kernels", lambda: (UNKNOWN, "the time was over: nothing is kept, start the command again"))
            found.clear()
            break
        name = f"{case.name}, {case.n} x {case.m}"
        verdict, *_ = table.add(name, lambda case=case: device_checks.check_kernel(case, toy))
        found[case.name] = verdict == OK and found.get(case.name, True)
    if found.keys() == names:  # Also where the config has none, so that it is not checked at each start.
        log.say(f"{'':<38}kept in {compiler.keep_checked(kind, found, workdir)}")
    table.add("collectives", lambda: device_checks.check_collectives(mesh))
    table.add("checkpoint", lambda: device_checks.check_checkpoint(mesh, workdir, config.checkpoint.timeout))
    passed = frozenset(name for name, right in found.items() if right)
    if not toy and setting == compiler.AUTO and not names <= passed:
        step.trace(passed)
        step.compile()
    *_, seconds = table.add("train step", lambda: step.check(_SECONDS - (time.perf_counter() - began)))
    table.add("host", lambda: device_checks.check_host(config, seconds))
    return table


def _config():
    """The config of the flag, or that of ViT-L/14; on a CPU the toy with one image per device in either case."""
    given, toy = None if _CONFIG.value is None else cli.config_of(_CONFIG), jax.default_backend() == "cpu"
    if given is not None:
        configs.validate(given, jax.device_count())
        if not toy:
            return given.copy_and_resolve_references()
    config = config_files.read("tiny" if toy else "vitl14")
    config.batch_size, config.accum, config.diva.draws = jax.device_count() * (1 if toy else 8), 1, 1
    return config


def main() -> None:
    with distributed.session():
        config = _config()
        workdir = paths.folder(_WORKDIR.value, "--workdir") if _WORKDIR.value else None
        if workdir is None and jax.process_count() > 1:
            raise UserError("--workdir is missing: give a folder that all processes share, where a checkpoint is tried")
        if workdir is not None:
            paths.check_writable(workdir, "--workdir")
        compiler.use_cache(config.compile_cache, workdir or compiler.kept())
        if (table := check(config, workdir, _UNLESS.value)) is None:
            return
        log.say(f"\nfor the report of an issue: {'; '.join(table.words)}")
        if table.failed:
            advice = "training leaves out kernels that failed (config.kernels=auto), and will fail as other rows did"
            raise RunError(f"{', '.join(table.failed)} failed: report the line above; {advice}")


if __name__ == "__main__":
    cli.run(main, described=configs.described)
