"""Runs of `python -m diva_jax.main` as several processes on this machine, each with one device; and this file as that
command, altered by variables of the environment:

ROWS: a file to which a row [step, row of the global batch, checksum of the image] is written for every image of a step.
FAILS: how many arrays of a checkpoint the process fails to write, where its number is FAILS_ON.
READS: after so many reads of data they never end.
"""

import errno
import itertools
import json
import os
import socket
import threading
import zlib

import commands
from places import SUPPORT

# So many that a signal arrives before the last.
STEPS = 90
FIELDS = {"steps": STEPS, "accum": 1, "checkpoint.every": 60}
ROTATIONS = f"--config={SUPPORT}/e2e_config.py:outside.rotations:"


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def start(files, workdir, address, index: int, count: int, *more, rows=None, config=ROTATIONS) -> commands.Command:
    """Starts the command as process `index` of `count`; `rows` is the prefix of the files of rows."""
    flags = [f"{config}{files}", f"--workdir={workdir}", "--lost_timeout=6"]
    flags += [f"--config.{name}={value}" for name, value in FIELDS.items()]
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
    return commands.start(__file__, *flags, *more, ROWS=f"{rows or workdir}.{index}of{count}.rows", **env)


def start_all(files, workdir, count: int, *more, **kw) -> list[commands.Command]:
    address = free_address()
    return [start(files, workdir, address, index, count, *more, **kw) for index in range(count)]


def finish(processes: list[commands.Command]) -> list[tuple[int, str, str]]:
    """Waits for every process: (exit code, stdout, stderr) of each."""
    return [commands.finish(p) for p in processes]


def record(path) -> None:
    """Writes every later batch of this process to `path`, and asserts that each example is at its row of the global
    batch, on whose neighbours an objective's loss may depend."""
    import jax

    from diva_jax.data import pipeline

    original, put = pipeline.Batches.wait, jax.make_array_from_process_local_data

    def placed(sharding, local):
        array = put(sharding, local)
        for shard in array.addressable_shards if local.ndim == 1 else ():  # Of "row".
            assert shard.data.tolist() == list(range(*shard.index[0].indices(len(array))))
        return array

    jax.make_array_from_process_local_data = placed

    def wait(self, *args):
        batch = original(self, *args)
        if batch is not None:
            with open(path, "a") as f:
                for row, image in zip(batch["row"], batch["image"], strict=True):
                    f.write(json.dumps([self.get_state()["batches"], int(row), zlib.crc32(image.tobytes())]) + "\n")
        return batch

    pipeline.Batches.wait = wait


def _fail_to_write(times: int) -> None:
    """Simulates a full disk in this process for this number of arrays."""
    from orbax.checkpoint._src.serialization import serialization

    write, left = serialization.async_serialize_from_host, itertools.count(times, -1)

    async def full(*args, **kwargs):
        if next(left) > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(*args, **kwargs)

    serialization.async_serialize_from_host = full


def _stall(reads: int) -> None:
    from diva_jax.data import files

    read, left = files.read_range, itertools.count(reads, -1)

    def stalling(*args):
        if next(left) <= 0:
            print("stalled", flush=True)
            threading.Event().wait()
        return read(*args)

    files.read_range = stalling


if __name__ == "__main__":
    import jax

    from diva_jax import main
    from diva_jax.common import cli

    if "FAILS_ON" in os.environ and os.environ["FAILS_ON"] == os.environ["JAX_PROCESS_ID"]:
        _fail_to_write(int(os.environ["FAILS"]))
    if "READS" in os.environ:
        _stall(int(os.environ["READS"]))
    if "ROWS" in os.environ:
        record(os.environ["ROWS"])
    jax.config.update("jax_default_matmul_precision", "highest")  # A fork reads no variables of jax.
    cli.run(main.main)
