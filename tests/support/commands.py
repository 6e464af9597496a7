"""Starts the commands of this project, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys

from places import FAST_COMPILATION, ROOT, SUPPORT

_started: list[subprocess.Popen] = []
# Programs are compiled without optimisation, on one device.
_ENVIRONMENT = {"XLA_FLAGS": FAST_COMPILATION, "JAX_PLATFORMS": "cpu"}


def launch(*line, path=(), cwd=ROOT, stdin=None, **env) -> subprocess.Popen:
    """Starts a command line; folders of `path` are on PYTHONPATH, before the repository and tests/support."""
    folders = os.pathsep.join(map(str, (*path, ROOT, SUPPORT)))
    environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": folders} | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=stdin, text=True)
    process = subprocess.Popen([str(word) for word in line], **pipes, env=environment, cwd=cwd)
    _started.append(process)
    return process


def kill_all() -> None:
    """Kills the processes that a failed test has left running."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


def start(module: str, *args, **kw) -> subprocess.Popen:
    """Starts `python -m diva_jax.MODULE ARGS`; keywords as for `launch`."""
    return launch(sys.executable, "-m", f"diva_jax.{module}", *args, **kw)


def finish(process: subprocess.Popen, seconds: float = 400) -> tuple[int, str, str]:
    """Waits until a process ends: (exit code, the rest of stdout, stderr); after `seconds` it raises TimeoutExpired."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def run(module: str, *args, **kw) -> tuple[int, str, str]:
    """`start` and `finish`."""
    return finish(start(module, *args, **kw))


def run_each(module: str, lines: list, cwd=ROOT, seconds: float = 400, path=()) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a command for each list of arguments, in forks of one process that imports it."""
    process = launch(sys.executable, SUPPORT / "forked.py", module, path=path, cwd=cwd, stdin=subprocess.PIPE)
    out, err = process.communicate(json.dumps([[str(word) for word in line] for line in lines]), timeout=seconds)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def output(process: subprocess.Popen) -> str:
    """Returns the output of a process, which must end with exit code 0."""
    code, out, err = finish(process)
    assert code == 0, f"{process.args} ended with {code}: {out}\n{err}"
    return out


def succeed(module: str, *args, **kw) -> str:
    """Returns the output of a command, which must end with exit code 0."""
    return output(start(module, *args, **kw))


def refusal(process: subprocess.Popen) -> str:
    """Returns the error of a process that ends with exit code 2: one line on stderr, and no traceback."""
    code, out, err = finish(process)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, out, err)
    assert "Traceback" not in out
    return lines[0]


def refused(module: str, *args, **kw) -> str:
    """Returns the error of a command that must be refused, see `refusal`."""
    return refusal(start(module, *args, **kw))


def wait_for_step(process: subprocess.Popen, step: int) -> str:
    """Returns the output of a run up to the progress line of a training step."""
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(f"step {step}/"):
            return seen
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def signal_at(process: subprocess.Popen, step: int, sig: signal.Signals) -> None:
    """Sends a signal as soon as the progress line of a training step is printed."""
    wait_for_step(process, step)
    process.send_signal(sig)
