"""A small data set of real photographs that needs no network: regions of those in the scikit-image wheel.

    python -m diva_jax.data.photos --out=data/photos

All are public domain or CC0, except the motorcycle pair (Middlebury 2014 stereo data, see scikit-image).
"""

import hashlib
import importlib.util
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diva_jax.common import paths
from diva_jax.common.errors import UserError

# File in skimage/data -> caption.
PHOTOGRAPHS = {
    "astronaut.png": "a portrait of an astronaut in an orange suit in front of a flag",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera on a tripod on a lawn",
    "chelsea.png": "a close-up of a tabby cat",
    "clock_motion.png": "a wall clock blurred by motion",
    "coffee.png": "a cup of coffee with a spoon on a wooden table",
    "coins.png": "ancient Greek coins on a dark background",
    "grass.png": "a lawn seen from above",
    "gravel.png": "gravel seen from above",
    "hubble_deep_field.jpg": "distant galaxies in a dark sky",
    "ihc.png": "stained tissue under a microscope",
    "moon.png": "the surface of the moon",
    "motorcycle_left.png": "a motorcycle in a garage",
    "motorcycle_right.png": "a motorcycle in a garage, from a little to the right",
    "retina.jpg": "the retina of a human eye",
    "rocket.jpg": "a rocket on its launch pad at dusk",
}
_LONGEST = (160, 384)  # Longer side of an example [pixels], drawn from this range.
_QUALITY = 90


class Example(NamedTuple):
    """One region of a photograph: its source's file name, a caption, and the region as a JPEG."""

    photograph: str
    caption: str
    width: int
    height: int
    jpeg: bytes


def _folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec else None
    if not folder or not all((folder / name).exists() for name in PHOTOGRAPHS):
        raise UserError(
            "the demo's photographs come with scikit-image, which is not installed: pip install 'diva_jax[demo]'"
        )
    return folder


def _region(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A region of 35% to 90% of the photograph's area, with an aspect ratio of 2:3 to 3:2, scaled down."""
    share, aspect = rng.uniform(0.35, 0.9), np.exp(rng.uniform(np.log(2 / 3), np.log(3 / 2)))
    area = share * image.width * image.height
    width = min(image.width, round((area * aspect) ** 0.5))
    height = min(image.height, round((area / aspect) ** 0.5))
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    shrink = min(1.0, int(rng.integers(_LONGEST[0], _LONGEST[1] + 1)) / max(width, height))
    size = (round(width * shrink), round(height * shrink))
    return image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)


def examples(count: int = 96, seed: int = 0) -> Iterator[Example]:
    """Overlapping regions, one photograph after the other; the same bytes on every call.

    Raises:
      UserError: scikit-image is not installed.
    """
    folder = _folder()
    names = list(PHOTOGRAPHS)
    images = {name: Image.open(folder / name).convert("RGB") for name in names}
    for i in range(count):
        name = names[i % len(names)]
        region = _region(images[name], np.random.default_rng((seed, i)))
        jpeg = io.BytesIO()
        region.save(jpeg, "JPEG", quality=_QUALITY)
        yield Example(name, PHOTOGRAPHS[name], *region.size, jpeg.getvalue())


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to a tar; its header depends on name and data alone."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"
    tar.addfile(info, io.BytesIO(data))


def _shard(shard: int, chunk: list[Example]) -> bytes:
    """One tar in img2dataset's layout: 9-digit keys, each with .jpg, .json and .txt members, in this order."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, example in enumerate(chunk):
            key = f"{shard:05d}{i:04d}"
            meta = {
                "caption": example.caption,
                "url": f"skimage/data/{example.photograph}",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": example.width,
                "height": example.height,
                "original_width": example.width,
                "original_height": example.height,
                "exif": "{}",
                "sha256": hashlib.sha256(example.jpeg).hexdigest(),
            }
            add_member(tar, f"{key}.jpg", example.jpeg)
            add_member(tar, f"{key}.json", json.dumps(meta, indent=4).encode())
            add_member(tar, f"{key}.txt", example.caption.encode())
    return data.getvalue()


def pack_photos(out_dir: str | Path, count: int = 96, per_shard: int = 32, seed: int = 0) -> list[Path]:
    """Writes webdataset tar shards in img2dataset's layout, each with its `_stats.json`.

    The bytes depend only on the arguments and on Pillow's JPEG encoder.

    Args:
      out_dir: folder for the shards, created when needed.
      count: examples in all shards.
      per_shard: examples per shard, at most 10,000.
      seed: of the regions.

    Returns:
      The shards.

    Raises:
      UserError: scikit-image is not installed.
    """
    every = list(examples(count, seed))
    shards = []
    for shard, start in enumerate(range(0, count, per_shard)):
        chunk = every[start : start + per_shard]
        path = Path(out_dir) / f"{shard:05d}.tar"
        paths.write_whole(path, _shard(shard, chunk))
        stats = {
            "count": len(chunk),
            "successes": len(chunk),
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "duration": 0.0,
            "status_dict": {"success": len(chunk)},
        }
        path.with_name(f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
        shards.append(path)
    return shards


def write_folder(out_dir: str | Path, count: int = 96, seed: int = 0) -> list[Path]:
    """Writes the examples of `pack_photos` as a plain folder: `<photograph>/<number>.jpg`."""
    written = []
    for i, example in enumerate(examples(count, seed)):
        path = Path(out_dir) / Path(example.photograph).stem / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example.jpeg)
        written.append(path)
    return written


def _main() -> None:
    shards = pack_photos(flags.FLAGS.out, flags.FLAGS.count)
    print(f"{flags.FLAGS.count} photographs in {len(shards)} shards in {flags.FLAGS.out}")


if __name__ == "__main__":
    from absl import flags

    from diva_jax.common import cli

    # Here and not above: other modules of this package define --out as well.
    flags.DEFINE_string("out", "data/photos", "Folder for the shards.")
    flags.DEFINE_integer("count", 96, "Examples to cut.", lower_bound=1)
    cli.run(_main)
