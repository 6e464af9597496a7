"""Trains an encoder: python -m diva_jax.main --config=configs/vitl14.py --workdir=runs/vitl14 [--config.FIELD=VALUE].

The same command resumes from the last checkpoint, or prints that the run is done. SIGTERM saves a checkpoint and ends
the process with exit code 0, or with 143 before training has begun. On a TPU slice or under Slurm, the same command on
every machine starts one run; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import functools
import shlex
import signal

from absl import flags

from diva_jax import config as configs
from diva_jax.common import cli
from diva_jax.common.errors import Terminated, UserError
from diva_jax.training import distributed

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the config of this run.")
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "WORKDIR or WORKDIR:STEP of another run: parameters of the same name and shape are taken from its checkpoint and "
    "not from their sources. Has no effect on a run that resumes.",
)
_EXECUTABLES = flags.DEFINE_string(
    "executables",
    None,
    "Folder of your own that aot --save wrote: steps that it has for this config, slice and versions are not compiled. "
    "What is in it is run as code.",
)
_JOIN = flags.DEFINE_integer("join_timeout", 300, "Seconds within which all processes of a run must start.", 1)
_LOST = flags.DEFINE_integer(
    "lost_timeout", 100, "Seconds without a heartbeat after which a process is lost and all others end.", 2
)
cli.define_trust()


def main() -> None:
    config = cli.config_of(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: give a folder for checkpoints and metrics, e.g. --workdir=runs/tiny")
    from diva_jax.common.log import say

    try:
        from diva_jax.training.loop import Run

        with distributed.session(_JOIN.value, _LOST.value):
            run = Run(config, _WORKDIR.value, _INIT_FROM.value, _EXECUTABLES.value)
            done = f"{_WORKDIR.value}: all {run.total} steps are done" if run.finished else f"done: {run.total} steps"
            if run.run():
                export = f"python -m diva_jax.export_torch --workdir={shlex.quote(_WORKDIR.value)} --out=DIR"
                say(f"{done}; export with {export}, or train on with a larger --config.steps")
        if run.stopped_by == signal.SIGINT:
            # The run is saved; the exit code is 130.
            raise KeyboardInterrupt
    except Terminated:
        # Once training has begun, the run handles the signal itself, and saves.
        say("SIGTERM: nothing was trained that is not saved; the same command starts again from here")
        raise


entry = functools.partial(cli.run, main, described=configs.described)

if __name__ == "__main__":
    entry()
