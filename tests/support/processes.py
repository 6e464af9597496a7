"""Starts `python -m diva_jax.main` as several processes on this machine, each with one device."""

import socket

import commands
from places import SUPPORT

# So many that a signal arrives before the last.
STEPS = 90
FIELDS = {"steps": STEPS, "accum": 1, "checkpoint.every": 60}


def free_address() -> str:
    """Returns HOST:PORT of a port that no process uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def start(
    files, workdir, address, index: int, count: int, *more, rows=None, config="outside.rotations:"
) -> commands.Command:
    """Starts the command as process `index` of `count`; `rows` is the prefix of the files that multihost.py writes."""
    flags = [f"--config={SUPPORT}/e2e_config.py:{config}{files}", f"--workdir={workdir}", "--lost_timeout=10"]
    flags += [f"--config.{name}={value}" for name, value in FIELDS.items()]
    env = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    return commands.start(SUPPORT / "multihost.py", f"{rows or workdir}.{index}of{count}.rows", *flags, *more, **env)


def start_all(files, workdir, count: int, *more, **kw) -> list[commands.Command]:
    """Starts all `count` processes of a run; arguments as for `start`."""
    address = free_address()
    return [start(files, workdir, address, index, count, *more, **kw) for index in range(count)]


def finish(processes: list[commands.Command]) -> list[tuple[int, str, str]]:
    """Waits for every process: (exit code, stdout, stderr) of each."""
    return [commands.finish(p) for p in processes]
