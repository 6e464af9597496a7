"""Small images, tar shards and batches of them."""

import io
import tarfile

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.data import inputs, pipeline


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def encoded(tag: int, width: int = 40, height: int = 30, form: str = "PNG", mode: str = "RGB") -> bytes:
    """Returns an image of one colour that encodes its number: (tag // 256, tag % 256, 7)."""
    return saved(Image.new("RGB", (width, height), (tag // 256, tag % 256, 7)).convert(mode), form)


def tags(images: np.ndarray) -> list[int]:
    """Returns the tags of crops [B, S, S, 3]; resizing keeps a constant colour."""
    assert (images == images[:, :1, :1]).all()
    return [int(r) * 256 + int(g) for r, g, _ in images[:, 0, 0]]


def noise(seed: int, width: int = 64, height: int = 48) -> bytes:
    """Returns a JPEG of coarse noise, for which every crop box gives another result."""
    rng = np.random.default_rng(seed)
    return saved(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height)), "JPEG")


def write_tar(path, members, **kw) -> None:
    """Writes data by name, or pairs of both where a name is there twice; (type, target) in place of data is a link."""
    with tarfile.open(path, "w", **kw) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                (info.type, info.linkname), data = data, b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tfds(folder, name: str, split: str, features, examples: list[dict]) -> None:
    """Prepares a dataset of tfds; `features` gives its features of the module `tfds.features`."""
    import tensorflow_datasets as tfds

    kinds = tfds.features.FeaturesDict(features(tfds.features))
    content = {"VERSION": tfds.core.Version("1.0.0"), "_generate_examples": lambda self: enumerate(examples)}
    content["_info"] = lambda self: tfds.core.DatasetInfo(builder=self, features=kinds)
    content["_split_generators"] = lambda self, _: {split: self._generate_examples()}
    builder = type(name, (tfds.core.GeneratorBasedBuilder,), content)
    builder(data_dir=folder, file_format="array_record").download_and_prepare()


def write_shards(folder, count: int, per_shard: int, broken=(), caption="a caption") -> None:
    """Writes shards of tagged PNGs with captions, of which {} is the number; those in `broken` are not images."""
    folder.mkdir(exist_ok=True)
    for shard in range(0, count, per_shard):
        members = {}
        for i in range(shard, min(shard + per_shard, count)):
            members[f"{i:09d}.png"] = b"no image" if i in broken else encoded(i)
            members[f"{i:09d}.txt"] = caption.format(i).encode()
        write_tar(folder / f"{shard // per_shard:05d}.tar", members)


def data_config(path, **changes) -> ConfigDict:
    crop = dict(scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic")
    config = ConfigDict(dict(path=str(path), image_size=12, crop=crop, threads=2, prefetch=2, max_broken_share=0.05))
    config.update(stall_timeout=60.0, decode_gib=1.0, allow_urls=False)
    config.update(changes)
    return config


def batches(path, wanted=None, *, batch: int = 8, seed: int = 0, rows=None, cache=None, cache_dir=None, **changes):
    """The iterator over the data at a path; `changes` are fields of `data_config`."""
    config = data_config(path, **changes)
    wanted = {"image": inputs.Image(config.image_size)} if wanted is None else wanted
    at = dict(rows=rows, cache_dir=cache_dir, cache=cache)
    return pipeline.Batches(config, wanted, seed=seed, global_batch=batch, **at)


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def tags_of(iterator, count: int) -> list[int]:
    return [tag for batch in take(iterator, count) for tag in tags(batch["image"])]


def letters(length):

    def tokenize(texts):
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = list(map(ord, text[:length]))
        return ids

    return tokenize


def text_of(ids) -> str:
    return "".join(chr(i) for i in ids if i)
