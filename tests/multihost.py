"""What test_distributed.py starts: `python multihost.py FILE ...` is `python -m diva_jax.main ...`, and FILE gets a row
[step, row of the global batch, checksum of the image] for every image that a step takes."""

import json
import sys
import zlib

from diva_jax import errors
from diva_jax.data import pipeline

_take = pipeline.Iterator.__next__


def record(path) -> None:
    """From here on, every batch that this process takes is written to `path`."""

    def take(self):
        batch = _take(self)
        with open(path, "a") as f:
            for row, image in zip(batch["row"], batch["image"], strict=True):
                f.write(json.dumps([self.get_state()["batches"], int(row), zlib.crc32(image.tobytes())]) + "\n")
        return batch

    pipeline.Iterator.__next__ = take


if __name__ == "__main__":
    record(sys.argv.pop(1))
    from diva_jax import main  # Its flags would clash with those of other commands that a test process imports.

    errors.run(main.main)
