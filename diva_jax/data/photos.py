"""A small data set that needs no network: regions of the photographs in the scikit-image wheel. All are public domain
or CC0, except the motorcycle pair (Middlebury 2014 stereo data, see scikit-image)."""

import importlib.util
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from diva_jax.common import paths
from diva_jax.common.errors import UserError

# File in skimage/data -> caption.
PHOTOGRAPHS: dict[str, str] = json.loads(Path(__file__).with_name("photos.json").read_text())
# The longer side of an example is drawn from this range [pixels].
_MIN_SIDE, _MAX_SIDE = 160, 384
_JPEG_QUALITY = 90


def _region(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A region of 35% to 90% of the photograph's area, with an aspect ratio of 2:3 to 3:2, scaled down."""
    share, aspect = rng.uniform(0.35, 0.9), np.exp(rng.uniform(np.log(2 / 3), np.log(3 / 2)))
    area = share * image.width * image.height
    width = min(image.width, round((area * aspect) ** 0.5))
    height = min(image.height, round((area / aspect) ** 0.5))
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    shrink = min(1.0, int(rng.integers(_MIN_SIDE, _MAX_SIDE + 1)) / max(width, height))
    size = (round(width * shrink), round(height * shrink))
    return image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)


def examples(count: int = 96, seed: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """Overlapping regions, one photograph after the other: (file name of the photograph, caption, region as a JPEG);
    the same bytes always. A UserError without scikit-image."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec else Path()
    if not all((folder / name).exists() for name in PHOTOGRAPHS):
        raise UserError("the demo's photographs come with scikit-image, which is missing: pip install -e '.[demo]'")
    names = list(PHOTOGRAPHS)
    images = {name: Image.open(folder / name).convert("RGB") for name in names}
    for i in range(count):
        name = names[i % len(names)]
        jpeg = io.BytesIO()
        _region(images[name], np.random.default_rng((seed, i))).save(jpeg, "JPEG", quality=_JPEG_QUALITY)
        yield name, PHOTOGRAPHS[name], jpeg.getvalue()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to a tar; its header depends on name and data alone."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"
    tar.addfile(info, io.BytesIO(data))


def pack_photos(out_dir: str | Path, count: int = 96, per_shard: int = 32, seed: int = 0) -> list[Path]:
    """Writes tar shards of `per_shard` (at most 10,000) examples as img2dataset does, 9-digit keys with a .jpg and a
    .txt each, and returns them. The bytes depend only on the arguments and on Pillow's JPEG encoder."""
    every, shards = list(examples(count, seed)), []
    for number, start in enumerate(range(0, count, per_shard)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, (_, caption, jpeg) in enumerate(every[start : start + per_shard]):
                add_member(tar, f"{number:05d}{i:04d}.jpg", jpeg)
                add_member(tar, f"{number:05d}{i:04d}.txt", caption.encode())
        shards.append(Path(out_dir) / f"{number:05d}.tar")
        paths.write_whole(shards[-1], data.getvalue())
    return shards


def write_folder(out_dir: str | Path, count: int = 96, seed: int = 0) -> list[Path]:
    """Writes the examples of `pack_photos` as a plain folder: `<photograph>/<number>.jpg`."""
    written = []
    for i, (photograph, _, jpeg) in enumerate(examples(count, seed)):
        written.append(Path(out_dir) / Path(photograph).stem / f"{i:04d}.jpg")
        paths.write_whole(written[-1], jpeg)
    return written
