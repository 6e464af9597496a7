"""The command of test_distributed.py: `python multihost.py FILE ...` is `python -m diva_jax.main ...`, and writes a row
[step, row of the global batch, checksum of the image] to FILE for every image of a step. With FAILS in the environment,
the process whose number is FAILS_ON fails to write the first FAILS arrays of a checkpoint."""

import errno
import json
import os
import sys
import zlib

import jax
from orbax.checkpoint._src.serialization import serialization

from diva_jax.common import cli
from diva_jax.data import pipeline

_wait = pipeline.Iterator.wait


def record(path) -> None:
    """Writes every later batch of this process to `path`."""

    def wait(self, *args):
        batch = _wait(self, *args)
        if batch is not None:
            with open(path, "a") as f:
                for row, image in zip(batch["row"], batch["image"], strict=True):
                    f.write(json.dumps([self.get_state()["batches"], int(row), zlib.crc32(image.tobytes())]) + "\n")
        return batch

    pipeline.Iterator.wait = wait


def fail_to_write(times: int) -> None:
    """Simulates a full disk in this process for this number of arrays."""
    write, failed = serialization.async_serialize_from_host, []

    async def full(*args, **kwargs):
        if len(failed) < times:
            failed.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(*args, **kwargs)

    serialization.async_serialize_from_host = full


if __name__ == "__main__":
    if os.environ.get("FAILS_ON") == os.environ["JAX_PROCESS_ID"]:
        fail_to_write(int(os.environ["FAILS"]))
    record(sys.argv.pop(1))
    jax.config.update("jax_default_matmul_precision", "highest")  # A fork reads no variables of jax.
    from diva_jax import main  # Its flags would clash with those of other commands that a test process imports.

    cli.run(main.main)
