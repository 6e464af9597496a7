"""Writes the data and weights for configs/tiny.py: python -m diva_jax.demo --out=data/tiny.

Photographs in tar shards (the format of img2dataset), some of them as files, an open_clip folder with both towers, and
a diffusers folder. The models are tiny and random; file formats and readers are those of full-size models. The
photographs are regions of those in the scikit-image wheel, so that no network is needed. All are public domain or CC0,
except the motorcycle pair (Middlebury 2014 stereo data, see scikit-image).
"""

import importlib.util
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from flax import nnx
from PIL import Image

from diva_jax.common import cli, paths
from diva_jax.common.errors import UserError
from diva_jax.common.json_files import packaged
from diva_jax.data import tokenizers
from diva_jax.data.images import sample_box
from diva_jax.models import backbones
from diva_jax.models.diffusion import presets
from diva_jax.models.layers import Keys
from diva_jax.weights import formats, names, parts

_OUT = flags.DEFINE_string("out", None, "The folder to write.")

# File in skimage/data -> caption.
PHOTOGRAPHS: dict[str, str] = packaged(__file__, "photos.json")
# The longer side of an example is drawn from this range [pixels].
_MIN_SIDE, _MAX_SIDE = 160, 384


def examples(count: int = 96, seed: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """Overlapping regions of 35% to 90% of a photograph's area, scaled down, one photograph after the other: (its file
    name, its caption, the region as a JPEG); the same bytes always. A UserError without scikit-image."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec else Path()
    if not all((folder / name).exists() for name in PHOTOGRAPHS):
        raise UserError("the demo's photographs come with scikit-image, which is missing: pip install -e '.[demo]'")
    images = {name: Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS}
    for i, name in zip(range(count), itertools.cycle(PHOTOGRAPHS), strict=False):
        rng, jpeg = np.random.default_rng((seed, i)), io.BytesIO()
        region = images[name].crop(sample_box(rng, *images[name].size, (0.35, 0.9), (2 / 3, 3 / 2)))
        region.thumbnail([int(rng.integers(_MIN_SIDE, _MAX_SIDE + 1))] * 2, Image.Resampling.LANCZOS)
        region.save(jpeg, "JPEG", quality=90)
        yield name, PHOTOGRAPHS[name], jpeg.getvalue()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to a tar; its header depends on name and data alone."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"
    tar.addfile(info, io.BytesIO(data))


def pack_photos(out_dir: str | Path, count: int = 96, per_shard: int = 32) -> list[Path]:
    """Writes tar shards of `per_shard` (at most 10,000) examples as img2dataset does, 9-digit keys with a .jpg and a
    .txt each, and returns them. The bytes depend only on the arguments and on Pillow's JPEG encoder."""
    every, shards = list(examples(count)), []
    for number, start in enumerate(range(0, count, per_shard)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, (_, caption, jpeg) in enumerate(every[start : start + per_shard]):
                add_member(tar, f"{number:05d}{i:04d}.jpg", jpeg)
                add_member(tar, f"{number:05d}{i:04d}.txt", caption.encode())
        shards.append(Path(out_dir) / f"{number:05d}.tar")
        paths.write_whole(shards[-1], data.getvalue())
    return shards


def write_byte_tokenizer(folder: Path) -> None:
    """Writes CLIP's byte-level vocabulary without merges, 514 tokens, as transformers' vocab.json and merges.txt."""
    words = [*tokenizers.BYTE_TOKENS, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, indent=1))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_stable_diffusion(folder: Path, config: dict) -> None:
    """Writes a diffusers folder of a result of `presets.preset` with random weights; of the VAE, only the encoder."""
    rngs = Keys()
    for name, content in packaged(__file__, "demo.json").items():
        path, part = folder / name, name.partition("/")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | config.get(part, {}), indent=1))
    for kind, (part, model, table, (stem, *_)) in parts.STABLE_DIFFUSION.items():
        tensors = names.to_torch(nnx.state(model(kind.from_dict(config[part]), rngs=rngs)), table)
        formats.write_safetensors(folder / part / f"{stem}.safetensors", tensors)
    write_byte_tokenizer(folder / "tokenizer")


def write_all(out: Path) -> None:
    """Writes photographs, towers and diffusion model into a folder; existing files are overwritten."""
    print(f"writing photographs to {out / 'photos'} and {out / 'images'}", flush=True)
    pack_photos(out / "photos")
    for i, (photograph, _, jpeg) in enumerate(examples(24)):
        paths.write_whole(out / "images" / Path(photograph).stem / f"{i:04d}.jpg", jpeg)
    print(f"writing a tiny CLIP to {out / 'clip'}", flush=True)
    names.write_random_clip(out / "clip", backbones.TINY)
    write_byte_tokenizer(out / "clip")
    print(f"writing a tiny Stable Diffusion to {out / 'stable-diffusion'}", flush=True)
    write_stable_diffusion(out / "stable-diffusion", presets.preset("tiny"))


def main() -> None:
    if not _OUT.value:
        raise UserError("--out is missing: give a folder, e.g. --out=data/tiny")
    paths.check_writable(out := paths.local(_OUT.value, "--out"), "--out")
    jax.config.update("jax_platforms", "cpu")
    write_all(out)
    print(f"Wrote photos (tar shards), images (files), clip (open_clip) and stable-diffusion (diffusers) to {out}.")


if __name__ == "__main__":
    cli.run(main)
