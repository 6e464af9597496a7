"""Starts the commands of this project, each in a process of its own."""

import os
import signal
import subprocess
import sys

from places import ROOT, SUPPORT

# Programs are compiled without optimisation, on one device.
_ENVIRONMENT = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}


def start(module: str, *args, path=(), **env) -> subprocess.Popen:
    """Starts `python -m diva_jax.MODULE ARGS`.

    Args:
      module: below diva_jax.
      args: of the command.
      path: folders to put in PYTHONPATH, beside tests/support.
      env: environment variables to set.
    """
    folders = os.pathsep.join(map(str, (*path, SUPPORT)))
    environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": folders} | env
    line = [sys.executable, "-m", f"diva_jax.{module}", *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(line, **pipes, env=environment, cwd=ROOT)


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str, str]:
    """(exit code, what is left of stdout, stderr) of a process, when it ends."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def run(module: str, *args, **kw) -> tuple[int, str, str]:
    """`start` and `finish`."""
    return finish(start(module, *args, **kw))


def succeed(module: str, *args, **kw) -> str:
    """What a command prints, which must end with exit code 0."""
    code, out, err = run(module, *args, **kw)
    assert code == 0, f"{module} ended with {code}: {err}"
    return out


def signal_at(process: subprocess.Popen, step: int, sig: signal.Signals) -> None:
    """Sends a signal as soon as the progress line of a training step is printed."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            process.send_signal(sig)
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")
