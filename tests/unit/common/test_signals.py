"""Signals to a command that is not training: they end it, wherever the program is, and what it has begun is removed."""

import os
import signal
import subprocess
import sys
import time

import pytest
from places import ROOT

pytestmark = pytest.mark.attack

# A command that waits, after it has said that it does: in the main program, or in a callback of the garbage collector,
# where Python drops exceptions.
COMMAND = """
import gc, sys, time
from diva_jax.common import cli

where = sys.argv.pop()

def wait(*_):
    print("ready", flush=True)
    time.sleep(3)

def main():
    try:
        if where == "main":
            wait()
        else:
            gc.callbacks.append(lambda phase, _: phase == "start" and (gc.callbacks.clear(), wait()))
            gc.collect()
        time.sleep(30)
    finally:
        print("removed", flush=True)

cli.run(main)
"""


@pytest.mark.parametrize("where", ["main", "collector"])
@pytest.mark.parametrize("sig, code, said", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_a_command(sig, code, said, where):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", COMMAND, where], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(sig)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "removed\n", said + "\n")
    assert time.monotonic() - began < 9  # Less than the time after which it would have been ended from outside.


def test_sigint_while_a_command_imports(tmp_path):
    """A module in place of jax says when it is imported."""
    (tmp_path / "jax.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    command = [sys.executable, "-m", "diva_jax.report", "x"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(timeout=60), process.returncode) == ("", "interrupted\n", 130)
