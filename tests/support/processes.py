"""Starts `python -m diva_jax.main` as several processes on this machine, each with one device."""

import os
import socket
import subprocess
import sys

from places import ROOT, SUPPORT

STEPS = 9
FIELDS = {"steps": STEPS, "accum": 1, "condition.warmup_steps": 0, "diva.draws": 1, "log.tensorboard": False}


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def start(files, workdir, address, index: int, count: int, *more, rows=None) -> subprocess.Popen:
    """The command as process `index` of `count`, with one device; see multihost.py for what goes beside `rows`."""
    flags = [f"--config={SUPPORT}/e2e_config.py:{files}", f"--workdir={workdir}", "--lost_timeout=10"]
    flags += [f"--config.{name}={value}" for name, value in FIELDS.items()]
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, SUPPORT / "multihost.py", f"{rows or workdir}.{index}of{count}.rows", *flags, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def start_all(files, workdir, count: int, *more, rows=None) -> list[subprocess.Popen]:
    address = free_address()
    return [start(files, workdir, address, index, count, *more, rows=rows) for index in range(count)]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    ends = [(p.communicate(timeout=300), p.returncode) for p in processes]
    return [(code, out, err) for (out, err), code in ends]


def wait_for_step(process: subprocess.Popen, step: int) -> str:
    """What it printed until the progress line of a step."""
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(f"step {step}/"):
            return seen
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")
