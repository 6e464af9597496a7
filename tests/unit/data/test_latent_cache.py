"""Files of a cache of latents: what is written is read, and damage, other settings and other data are refused."""

import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import failed, refused
from records import batches, noise, take, write_tar

from diva_jax.common.errors import RunError
from diva_jax.data import inputs, latent_cache, pipeline, sources
from diva_jax.data.latent_cache import Cache, Entry, Manifest
from diva_jax.data.sources import Record

COUNT, CROPS, SHAPE, BROKEN = 11, 3, (5, 3, 6), 7
FACTS = {"vae": {"channels": [8, 12]}, "weights": "ab12", "crop": {"scale": (0.9, 1.0)}}
MANIFEST = Manifest(facts=FACTS, records=COUNT, crops=CROPS, seed=4, per_shard=4, shape=SHAPE)


def jpeg(i: int) -> bytes:
    return noise(i, 64 + i, 48 + 3 * i)


def entry(i: int, k: int) -> Entry:
    if i == BROKEN:
        return Entry(i, k, 0, (0, 0, 0, 0), None)
    moments = np.random.default_rng((i, k)).normal(size=SHAPE).astype(latent_cache.DTYPE)
    return Entry(i, k, zlib.crc32(jpeg(i)), (i, k, 40 + i, 30 + k), moments)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / latent_cache.FILE).write_text(MANIFEST.text())
    for s in range(MANIFEST.shards):
        entries = (entry(i, k) for i in MANIFEST.range(s) for k in range(CROPS))
        latent_cache.write_shard(tmp_path, MANIFEST.file(s), entries)
    return tmp_path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "0.tar"
    write_tar(path, {f"{i:02}.jpg": jpeg(i) for i in range(COUNT)})
    return path


def test_every_entry_is_read_as_it_was_written(folder):
    cache = Cache(str(folder), FACTS)
    wanted = [(i, epoch) for i in range(COUNT) for epoch in range(2 * CROPS)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: cache.read(*x), wanted))
    for (i, epoch), got in zip(wanted, found, strict=True):
        want = entry(i, epoch % CROPS)
        assert got is None if i == BROKEN else got[:4] == want[:4] and (got.moments == want.moments).all()


def test_the_slot_of_a_record_without_moments_is_filled_and_a_run_resumes(folder, data):
    """tests/runs compares crops and moments with those of a run without a cache."""
    wanted = {"image": inputs.Image(12), "moments": inputs.Cached(SHAPE)}

    def opened():
        return batches(data, wanted, seed=4, batch=5, max_broken_share=1.0, cache=Cache(str(folder), FACTS))

    iterator, order = opened(), pipeline.shuffled(COUNT, 4)
    seen = take(iterator, 9)
    for position in range(COUNT):
        i = order[position] if order[position] != BROKEN else order[(position + 1) % COUNT]
        np.testing.assert_array_equal(seen[position // 5]["moments"][position % 5], entry(i, 0).moments)
    assert iterator.decoder.count == 1
    resumed = opened()
    resumed.set_state({**iterator.get_state(), "batches": 7})
    np.testing.assert_array_equal(next(resumed)["moments"], seen[7]["moments"])
    refused("fingerprint", resumed.set_state, {**iterator.get_state(), "latents": "of another"})


def test_a_damaged_entry_is_an_error(folder):
    path = folder / MANIFEST.file(1)
    whole = path.read_bytes()
    at = whole.index(entry(5, 2).moments.tobytes()[:40])
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    cache = Cache(str(folder), FACTS)
    failed(r"record 5, crop 2 in 00001-of-00003\.array_record cannot be read", cache.read, 5, 2)
    assert cache.read(4, 1).record == 4
    path.write_bytes(whole[: len(whole) // 2])
    failed("cannot be read", lambda: Cache(str(folder), FACTS).read(4, 1))
    path.write_bytes((folder / MANIFEST.file(0)).read_bytes())
    failed("it is that of record 0", lambda: Cache(str(folder), FACTS).read(4, 0))
    assert latent_cache.is_complete(path, 4 * CROPS)
    assert not latent_cache.is_complete(folder / MANIFEST.file(2), 4 * CROPS)


def test_what_is_refused_when_a_cache_is_opened(folder, data, tmp_path):
    def opened(where=folder, check="", **facts):
        cache = Cache(str(where), FACTS | facts)
        if check:
            cache.check(sources.open_source(str(check)))

    refused(r"weights \('ab12' there, 'cd' here\)", opened, weights="cd")
    refused(r"crop\.scale", opened, crop={"scale": (0.8, 1.0)})
    refused("holds no cache", opened, data.parent)
    refused("a folder on this machine", opened, "gs://bucket/latents")
    (tmp_path / "other").mkdir()
    other = tmp_path / "other/0.tar"
    write_tar(other, {f"{i:02}.jpg": jpeg(COUNT - i) for i in range(COUNT)})
    refused("another image there", opened, check=other)
    write_tar(other, {"a.jpg": jpeg(0)})
    refused("made of 11 images, and config.data.path has 1", opened, check=other)
    (folder / MANIFEST.file(2)).unlink()
    refused("lacks 1 of its 3 shards", opened)
    (folder / "latents.json").write_text("{}")
    refused(r"latents\.json: it has no 'facts'", opened)


def test_a_changed_image_is_found_where_it_is_used(folder):
    """The probes at the start do not see every image."""
    cache = Cache(str(folder), FACTS)
    cache.arrays(cache.read(3, 0), Record("", jpeg(3)), "3.jpg")
    changed = Record("", jpeg(3) + b"\0")
    failed(r"3\.jpg is another image there", cache.arrays, cache.read(3, 0), changed, "3.jpg")


def test_a_shard_is_there_when_it_is_complete(tmp_path):
    def failing():
        yield entry(0, 0)
        raise RunError("too many images are broken")

    failed("too many", latent_cache.write_shard, tmp_path, "a", failing())
    assert not list(tmp_path.iterdir())
