"""Writes scenes as webdataset tar shards: python -m diva_jax.world.write --out=data/world --count=10000

Each record is a PNG, its caption as .txt, and its scene's seed and number as .json. Record i is the one that the data
path `module:diva_jax.world.records` has at i; the bytes depend on the arguments and on Pillow's PNG encoder alone.
"""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.data.photos import add_member
from diva_jax.world import records


def write(out: Path, source: records.World, per_shard: int = 1000) -> list[Path]:
    """Writes all records of a source; returns the shards."""
    shards = []
    for number, first in enumerate(range(0, len(source), per_shard)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + per_shard, len(source))):
                record, png = source.read(i), io.BytesIO()
                Image.open(io.BytesIO(record.image)).save(png, "PNG")
                add_member(tar, f"{i:09d}.png", png.getvalue())
                add_member(tar, f"{i:09d}.txt", record.text.encode())
                add_member(tar, f"{i:09d}.json", json.dumps({"seed": source.seed, "number": i}).encode())
        shards.append(out / f"{number:05d}.tar")
        paths.write_whole(shards[-1], data.getvalue())
    return shards


def _main() -> None:
    given = flags.FLAGS
    if not given.out:
        raise UserError("--out is missing: give a folder for the shards, e.g. --out=data/world")
    source = records.World(given.seed, given.count, given.captions)
    shards = write(Path(given.out), source)
    print(f"wrote {len(source)} records in {len(shards)} shards to {given.out}")


if __name__ == "__main__":
    from absl import flags

    from diva_jax.common import cli
    from diva_jax.world import captions

    # Here and not above: other modules of this package define --out as well.
    flags.DEFINE_string("out", None, "Folder for the shards.")
    flags.DEFINE_integer("count", 10_000, "Records.", 1)
    flags.DEFINE_integer("seed", 0, "Of scenes and captions.", 0)
    flags.DEFINE_enum("captions", "biased", list(captions.KINDS), "Their kind.")
    cli.run(_main)
