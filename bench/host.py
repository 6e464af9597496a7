"""Compares the host's work per image with a PyTorch pipeline on the same shards [images per second and core].

    python bench/host.py --pairs=5

Both sides read the same tar shards of JPEGs, decode each image, and make DIVA's crop of it: RandomResizedCrop(512,
scale 0.9 to 1, ratio 3/4 to 4/3, bicubic). Ours is `diva_jax.data.pipeline`, which gives uint8 to the device. Theirs is
the kind of pipeline that the authors' code has: a webdataset stream with a shuffle buffer and torchvision's transforms
on Pillow images, including ToTensor and Normalize. Each side runs in one process, alternately; CPU time, which other
load on the machine affects less than wall time, gives the images per second and core. With --workers, both also run
with that many threads (ours) and processes (theirs), and wall time gives images per second.
"""

import contextlib
import io
import resource
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

from absl import app, flags

_PAIRS = flags.DEFINE_integer("pairs", 5, "Number of measurements per side.", 1)
_IMAGES = flags.DEFINE_integer("images", 192, "Images per measurement.", 16)
_SHORTER = flags.DEFINE_integer("shorter", 512, "Shorter side of the images in the shards [pixels].", 16)
_SIZE = flags.DEFINE_integer("size", 512, "Side of the crops [pixels].", 1)
_WORKERS = flags.DEFINE_integer("workers", 0, "Threads or processes of a second comparison; 0: none.", 0)
_DATA = flags.DEFINE_string(
    "data", None, "Shards to read instead, a brace pattern; default photographs of this program."
)
_NEEDED = flags.DEFINE_float(
    "needed", 208.0, "Images per second that a host must deliver: 8 chips x 26.0 (docs/TPU.md)."
)

SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
_BATCH, _PER_SHARD = 16, 64


def write_shards(folder: Path, count: int, shorter: int) -> str:
    """Writes regions of scikit-image's photographs as img2dataset does; returns the pattern of the shards."""
    import numpy as np
    from PIL import Image

    from diva_jax.demo import examples

    found = [Image.open(io.BytesIO(jpeg)).convert("RGB") for _, _, jpeg in examples(min(count, 64))]
    rng = np.random.default_rng(0)
    shards = -(-count // _PER_SHARD)
    for s in range(shards):
        with tarfile.open(folder / f"{s:05d}.tar", "w") as tar:
            for i in range(s * _PER_SHARD, min(count, (s + 1) * _PER_SHARD)):
                image = found[i % len(found)]
                factor = shorter / min(image.size) * rng.uniform(1, 1.05)
                image = image.resize([max(shorter, round(n * factor)) for n in image.size], Image.Resampling.LANCZOS)
                data = io.BytesIO()
                image.save(data, "JPEG", quality=95)
                info = tarfile.TarInfo(f"{i:09d}.jpg")
                info.size = data.tell()
                tar.addfile(info, io.BytesIO(data.getvalue()))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def _config(path: str, threads: int):
    from diva_jax import config

    data = config.default().data
    data.update(path=path, image_size=_SIZE.value, threads=threads)
    data.crop.update(scale=SCALE, ratio=RATIO)
    return data


def ours(path: str, workers: int):
    """A function that makes this many images in batches."""
    from diva_jax.data import inputs, pipeline

    def run(count: int) -> None:
        wanted = {"image": inputs.Image(_SIZE.value)}
        batches = pipeline.Batches(_config(path, workers), wanted, seed=0, global_batch=_BATCH)
        with contextlib.closing(batches):
            for _ in range(count // _BATCH):
                assert next(batches)["image"].shape == (_BATCH, _SIZE.value, _SIZE.value, 3)

    return run


def theirs(path: str, workers: int):
    """A function that makes this many images in batches."""
    import torch
    import webdataset
    from torchvision import transforms

    from diva_jax.models.backbones import OPENAI_MEAN, OPENAI_STD

    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                _SIZE.value, scale=SCALE, ratio=RATIO, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
        ]
    )

    def run(count: int) -> None:
        kw = dict(resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node, seed=0)
        stream = webdataset.WebDataset(path, **kw).shuffle(100, rng=None).decode("pilrgb").to_tuple("jpg")
        loader = torch.utils.data.DataLoader(stream.map_tuple(transform), _BATCH, num_workers=workers)
        for i, (batch,) in enumerate(loader, 1):
            assert batch.shape == (_BATCH, 3, _SIZE.value, _SIZE.value)
            if i == count // _BATCH:
                break

    return run


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def compare(path: str, count: int, workers: int) -> None:
    """Prints the images per CPU second (or, with workers, per second) of both sides, pair by pair, and the ratio."""
    sides = {"torch": theirs(path, workers), "ours": ours(path, workers)}
    for run in sides.values():  # Imports and the page cache.
        run(_BATCH)
    clock, unit = (time.perf_counter, "images/s") if workers else (_cpu, "images/s and core")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(_PAIRS.value):
        for name in sides if pair % 2 == 0 else reversed(sides):
            began = clock()
            sides[name](count)
            rates[name].append(count // _BATCH * _BATCH / (clock() - began))
        print("  ".join(f"{name} {r[-1]:.1f} {unit}" for name, r in rates.items()), flush=True)
    middle = {name: statistics.median(r) for name, r in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["torch"], strict=True))
    print("median  " + "  ".join(f"{name} {m:.1f} {unit}" for name, m in middle.items()))
    print(f"ours / torch, median of the pairs: {ratio:.2f}")
    if not workers:
        print(f"{_NEEDED.value:g} images/s need {_NEEDED.value / middle['ours']:.1f} cores")


def main(_) -> None:
    import torch

    for name in ("nms", "qnms"):  # torchvision needs them at import, and a CPU build of torch does not have them.
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with tempfile.TemporaryDirectory() as tmp:
        path = _DATA.value or write_shards(Path(tmp), _IMAGES.value, _SHORTER.value)
        compare(path, _IMAGES.value, workers=0)
        if _WORKERS.value:
            compare(path, _IMAGES.value, _WORKERS.value)


if __name__ == "__main__":
    app.run(main)
