"""Starts the commands of this project, each in a process of its own, and those that pages of the documentation show.

`start` forks a process that has imported the package and what it uses of other libraries, which is what a command
spends its first seconds on; `launch` starts any program.
"""

import atexit
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time

from places import FAST_COMPILATION, ROOT, SUPPORT

# Programs are compiled without optimisation, on one device.
_ENVIRONMENT = {"XLA_FLAGS": FAST_COMPILATION, "JAX_PLATFORMS": "cpu"}
_IMPORTED = ("diva_jax.training.loop", "diva_jax.evals.evaluator", "torch_setup", "open_clip")
_IMPORTED += ("diva_jax.weights.export.publish", "transformers.models.clip.modeling_clip")
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(list(_IMPORTED))
_started = []


# The server finds the modules that it imports there.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])


def _environment(path, env) -> dict[str, str]:
    folders = os.pathsep.join(map(str, (*path, os.environ["PYTHONPATH"])))
    return os.environ | _ENVIRONMENT | {"PYTHONPATH": folders} | env


def _run(module: str, arguments, folders, environment, outputs) -> None:
    """What a fork does: `python -m MODULE ARGUMENTS`, or `python FILE.py ARGUMENTS`, with its output in two files."""
    for descriptor, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folders[0])
    sys.path[:0] = folders
    sys.argv[1:] = arguments
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(f"diva_jax.{module}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


class Command(_forks.Process):
    """A command in a fork; attributes and methods are also those of `subprocess.Popen`."""

    def __init__(self, module, *args, path=(), cwd=ROOT, **env):
        line, folders = (str(module), *map(str, args)), [str(folder) for folder in (cwd, *path)]
        files = [tempfile.NamedTemporaryFile("r+") for _ in range(2)]
        given = (line[0], line[1:], folders, _environment(path, env), [file.name for file in files])
        super().__init__(target=_run, args=given)
        self.start()  # With what the fork gets; it cannot get the open files.
        self.args, self._files, self.stdout, self.stderr = line, files, self._lines(), files[1]

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return "".join(self.stdout), self.stderr.read()

    def _lines(self):
        line, ended = "", False
        while not ended:
            ended = self.poll() is not None
            for part in self._files[0]:
                line += part
                if line.endswith("\n"):
                    yield line
                    line = ""
            time.sleep(0.01)
        if line:
            yield line


def start(module, *args, **kw) -> Command:
    """Starts `python -m diva_jax.MODULE ARGS`, or `python MODULE ARGS` of a file, in a fork; keywords as `launch`."""
    process = Command(module, *args, **kw)
    _started.append(process)
    return process


def launch(*line, path=(), cwd=ROOT, **env) -> subprocess.Popen:
    """Starts a command line; folders of `path` are on PYTHONPATH, before the repository and tests/support."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([str(word) for word in line], **pipes, env=_environment(path, env), cwd=cwd)
    _started.append(process)
    return process


def kill_all() -> None:
    """Kills the processes that a failed test has left running."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(process, seconds: float = 400) -> tuple[int, str, str]:
    """Waits until a process ends: (exit code, the rest of stdout, stderr); after `seconds` it raises TimeoutExpired."""
    out, err = process.communicate(timeout=seconds)
    return process.wait(), out, err


def run(module: str, *args, **kw) -> tuple[int, str, str]:
    return finish(start(module, *args, **kw))


def output(process) -> str:
    """Returns the output of a process, which must end with exit code 0."""
    code, out, err = finish(process)
    assert code == 0, f"{process.args} ended with {code}: {out}\n{err}"
    return out


def succeed(module: str, *args, **kw) -> str:
    return output(start(module, *args, **kw))


def refused(module: str, *args, **kw) -> str:
    """Returns the error of a command that ends with exit code 2: one line on stderr, and no traceback."""
    code, out, err = run(module, *args, **kw)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, out, err)
    assert "Traceback" not in out
    return lines[0]


def wait_for_step(process, step: int) -> str:
    """Returns the output of a run up to the progress line of a training step."""
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(f"step {step}/"):
            return seen
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns (language, code) of each block of code of a page of the repository."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), re.S)


def shell(line: str, folder) -> str:
    """Returns the output of a line of the shell, in which `python` is this one."""
    first, python, *rest = shlex.split(line, comments=True)
    if (first, python) == ("python", "-m") and rest[0].startswith("diva_jax."):
        return succeed(rest[0].removeprefix("diva_jax."), *rest[1:], cwd=folder)
    return output(launch(sys.executable, python, *rest, cwd=folder))
