"""The iterator: order, processes, resuming, images that cannot be read; mixtures; files of a cache of latents."""

import collections
import json
import logging
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import trees
from helpers import failed, refused
from PIL import Image
from records import batches, encoded, noise, saved, tags, tags_of, take, write_shards, write_tar

from diva_jax.common.errors import RunError
from diva_jax.data import inputs, latent_cache, pipeline, sources
from diva_jax.data.latent_cache import Cache, Entry, Manifest
from diva_jax.data.sources import Record, open_source


@pytest.fixture(scope="module")
def tagged(home):
    """24 images that encode their numbers, in three shards."""
    write_shards(home, 24, 10)
    return home


def images(iterator, count):
    return np.concatenate([batch["image"] for batch in take(iterator, count)])


def state_of(batches, seed=0, records=11, global_batch=6):
    return dict(batches=batches, seed=seed, records=records, global_batch=global_batch)


@pytest.mark.parametrize("batch", [8, 7])
def test_every_record_once_an_epoch(tagged, batch):
    """Also where batches cross the end of an epoch; the order of each epoch is another one."""
    seen = tags_of(batches(tagged, batch=batch), -(-72 // batch))
    epochs = [seen[start : start + 24] for start in (0, 24, 48)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(24)) != epoch
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_crops_depend_on_seed_and_position_alone(noisy):
    ours = images(batches(noisy, batch=4), 6)
    for threads, prefetch, batch in [(0, 1, 4), (5, 7, 4), (1, 1, 12)]:
        others = images(batches(noisy, batch=batch, threads=threads, prefetch=prefetch), 24 // batch)
        np.testing.assert_array_equal(ours, others)
    assert (ours != images(batches(noisy, batch=4, seed=1), 6)).any()
    batch = next(batches(noisy, batch=32, crop={"scale": (0.3, 0.9)}))  # Fewer records than that.
    assert len(np.unique(batch["image"].reshape(32, -1), axis=0)) == 32  # A different crop each time.


@pytest.mark.parametrize(
    "stop, of", [(0, ["012", "345"]), (1, ["03", "14", "25"]), (4, ["012345"]), (5, ["014", "23"])]
)
def test_resume_with_any_number_of_processes_equals_uninterrupted(noisy, stop, of):
    """Stopped within an epoch (11 records, batches of 6); each process has its rows of the global batch."""
    whole = take(batches(noisy, batch=6), 8)
    before = batches(noisy, batch=6, rows=[3, 5])
    take(before, stop)
    state = json.loads(json.dumps(before.get_state()))  # As in a checkpoint.
    assert state == state_of(stop)  # The same in every process; prefetched batches do not count.
    for rows in [[*map(int, digits)] for digits in of]:
        after = batches(noisy, batch=6, rows=rows)
        after.set_state(state)
        for expected, got in zip(whole[stop:], take(after, 8 - stop), strict=True):
            assert got.keys() == {"image", "row"} and got["row"].dtype == np.int32
            assert got["row"].tolist() == rows
            np.testing.assert_array_equal(got["image"], expected["image"][rows])
        assert after.get_state()["batches"] == 8
    after.set_state(state_of(10**8))  # Nothing before is read: that would take days.
    next(after)
    after.set_state(state)  # And back again.
    np.testing.assert_array_equal(next(after)["image"], whole[stop]["image"][rows])


def test_a_state_of_another_run(tagged, noisy):
    state = batches(tagged).get_state()
    for path, changes, complaint in (
        (tagged, {"seed": 1}, "config.seed = 0, this run has 1"),
        (tagged, {"batch": 4}, "config.batch_size = 8, this run has 4"),
        (noisy, {}, "images in config.data.path: 24, this run has 11"),
    ):
        refused(complaint, batches(path, **changes).set_state, state)


def test_close_ends_the_threads(noisy):
    before = set(threading.enumerate())
    iterator = batches(noisy, threads=4)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
    assert next(iterator)["row"].tolist() == list(range(8))  # Resumes at the second batch.
    assert iterator.get_state()["batches"] == 2


def test_broken_images_give_way_to_others_of_the_epoch(tmp_path, tagged, caplog):
    """In every process, and after a resume."""
    order = tags_of(batches(tagged, batch=6), 8)
    # In the first epoch: one in the middle, the last, and two of which one would be replaced by the other.
    bad = {order[5], order[11], order[11 + 17 - 24], order[23]}
    write_shards(tmp_path, 24, 10, broken=bad)
    with caplog.at_level(logging.WARNING):
        iterator = batches(tmp_path, batch=6, max_broken_share=0.5)
        whole = take(iterator, 8)
    seen = [tag for batch in whole for tag in tags(batch["image"])]
    for position, tag in enumerate(order):
        k = position
        while order[k] in bad:
            k = k - k % 24 + (k + 17) % 24  # Never into the next epoch.
        assert seen[position] == order[k] and (tag in bad) == (seen[position] != tag)
    assert iterator.decoder.count == 4
    # Each is logged once, although it occurs in both epochs.
    assert all(caplog.text.count(f"{record:09d}.png") == 1 for record in bad)
    for p in range(3):
        part = batches(tmp_path, batch=6, rows=range(p, 6, 3), max_broken_share=1.0)
        part.set_state(state_of(2, records=24))
        for expected, got in zip(whole[2:], take(part, 6), strict=True):
            np.testing.assert_array_equal(got["image"], expected["image"][p::3])


def test_a_batch_has_few_images_twice_where_every_second_one_is_broken(tmp_path):
    write_shards(tmp_path, 90, 30, broken=range(0, 90, 2))
    for batch in take(batches(tmp_path, batch=20, max_broken_share=1.0), 4):
        assert len(set(tags(batch["image"]))) >= 16


@pytest.mark.parametrize("count", [1, 40])
def test_too_many_broken_images_stop_the_run(tmp_path, count):
    write_shards(tmp_path, count, 10, broken=range(count))
    failed("not one of|max_broken_share", lambda: next(batches(tmp_path)))
    failed(f"not one of the {count} images", lambda: next(batches(tmp_path, max_broken_share=1.0)))
    write_shards(tmp_path, 40, 10, broken=range(0, 40, 3))
    said = failed(r"config.data.max_broken_share=0.1", take, batches(tmp_path, max_broken_share=0.1), 30)
    assert ".png" in said and "%" in said
    take(batches(tmp_path, max_broken_share=0.6), 30)  # A limit above its share.
    write_shards(tmp_path, 40, 10, broken={5})
    take(batches(tmp_path, max_broken_share=0.05), 60)


@pytest.mark.parametrize("fit, most", [(2.9, 2), (0.1, 1)])
def test_images_decoded_at_once_stay_within_their_memory(tmp_path, monkeypatch, fit, most):
    """Of images of zeros, which are much smaller as files; one that is larger than all of it is decoded alone."""
    trees.change(tmp_path, {f"{i}.png": saved(Image.new("RGB", (1000, 1000))) for i in range(12)})
    decode, at_once, decoding = pipeline.images.decode, [], []

    def slow(data):
        decoding.append(data)
        time.sleep(0.02)
        at_once.append(len(decoding))
        decoding.pop()
        return decode(data)

    monkeypatch.setattr(pipeline.images, "decode", slow)
    next(batches(tmp_path, batch=12, threads=12, prefetch=1, decode_gib=fit * 8 * 1000**2 / 2**30))
    assert max(at_once) == most and len(at_once) >= 12


SIZES = {"tars": 12, "table": 5, "folder": 3}


@pytest.fixture
def folder(tmp_path):
    """Twelve records in tars with the tags 0.., five in a CSV file with 100.., three images with 200.."""
    write_shards(tmp_path / "tars", SIZES["tars"], 5)
    paths = [f"files/{i}.png" for i in range(SIZES["table"])]
    files = {path: encoded(100 + i) for i, path in enumerate(paths)}
    for i in range(SIZES["folder"]):
        files |= {f"folder/{i}.png": encoded(200 + i), f"folder/{i}.txt": "a text"}
    trees.change(tmp_path, files | {"table.csv": {"image": paths, "caption": ["words"] * len(paths)}})
    return tmp_path


def path_of(folder, *weights):
    names = ("tars", "table.csv", "folder")
    return "mix:" + "; ".join(f"{w}={folder / n}" for w, n in zip(weights, names, strict=False))


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.25, 0.25), (6, 3, 1), (12, 5, 3), (".1", "2.", "0.3")])
def test_shares_of_an_epoch(folder, weights):
    source = open_source(path_of(folder, *weights))
    found = collections.Counter(source.locate(i) for i in range(len(source)))
    shares = np.array([sum(n for (part, _), n in found.items() if part == p) for p in range(3)]) / len(source)
    want = np.array([float(w) for w in weights]) / sum(float(w) for w in weights)
    np.testing.assert_allclose(shares, want, atol=0.51 / len(source))
    for part, size in enumerate(SIZES.values()):
        times = [found[part, record] for record in range(size)]
        assert max(times) - min(times) <= 1 and min(times) >= 1
    assert min(found.values()) == 1  # One source has each record once.
    for i in (0, len(source) // 2, len(source) - 1):
        part, record = source.locate(i)
        assert source.read(i) == source.parts[part].read(record) and source.name(i) == source.parts[part].name(record)


def test_a_broken_record_of_a_mixture_is_counted_once(folder, caplog):
    """It is in two slots of each epoch."""
    (folder / "folder" / "1.png").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        iterator = batches(path_of(folder, 2, 1, 1), seed=3, batch=6, max_broken_share=1.0)
        seen = tags_of(iterator, 8)[:24]
    assert iterator.decoder.count == 1 and sum("broken image: 1.png" in r.getMessage() for r in caplog.records) == 1
    assert seen != sorted(seen) and set(range(12)) <= set(seen) and 201 not in seen


def test_the_start_says_how_often_and_captions_must_be_in_all(folder, capsys):
    assert open_source(path_of(folder, 1, 1, 1)).has_text
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{folder}/table.csv: 33.3% of the images: 5, each 2.4 times per epoch"
    for text in (folder / "folder").glob("*.txt"):
        text.unlink()
    assert not open_source(path_of(folder, 1, 1, 1)).has_text
    assert open_source(path_of(folder, 1, 1)).has_text


def test_a_mixture_of_very_different_shares_is_refused(folder):
    parts, shares = [open_source(str(folder / "tars"))] * 2, [Fraction(1, 10**9 + 1), Fraction(10**9, 10**9 + 1)]
    refused("an epoch would have 12000000012 images", sources.MixtureSource, parts, shares, "mix:...")


COUNT, CROPS, SHAPE, BROKEN = 11, 3, (5, 3, 6), 7
FACTS = {"vae": {"channels": [8, 12]}, "weights": "ab12", "crop": {"scale": (0.9, 1.0)}}
MANIFEST = Manifest(facts=FACTS, records=COUNT, crops=CROPS, seed=4, per_shard=4, shape=SHAPE)


def jpeg(i: int) -> bytes:
    """As the fixture `noisy` has it."""
    return noise(i, 64 + i, 48 + 3 * i)


def entry(i: int, k: int) -> Entry:
    if i == BROKEN:
        return Entry(i, k, 0, (0, 0, 0, 0), None)
    moments = np.random.default_rng((i, k)).normal(size=SHAPE).astype(latent_cache.DTYPE)
    return Entry(i, k, zlib.crc32(jpeg(i)), (i, k, 40 + i, 30 + k), moments)


@pytest.fixture
def latents(tmp_path):
    (tmp_path / latent_cache.FILE).write_text(MANIFEST.text())
    for s in range(MANIFEST.shards):
        entries = (entry(i, k) for i in MANIFEST.range(s) for k in range(CROPS))
        latent_cache.write_shard(tmp_path, MANIFEST.file(s), entries)
    return tmp_path


def test_every_entry_is_read_as_it_was_written(latents):
    cache = Cache(str(latents), FACTS)
    wanted = [(i, epoch) for i in range(COUNT) for epoch in range(2 * CROPS)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: cache.read(*x), wanted))
    for (i, epoch), got in zip(wanted, found, strict=True):
        want = entry(i, epoch % CROPS)
        assert got is None if i == BROKEN else got[:4] == want[:4] and (got.moments == want.moments).all()
    cache = Cache(str(latents), FACTS)
    cache.arrays(cache.read(3, 0), Record("", jpeg(3)), "3.jpg")
    failed(r"3\.jpg is another image there", cache.arrays, cache.read(3, 0), Record("", jpeg(3) + b"\0"), "3.jpg")


def test_the_slot_of_a_record_without_moments_is_filled_and_a_run_resumes(latents, noisy):
    """tests/runs compares crops and moments with those of a run without a cache."""
    wanted = {"image": inputs.Image(12), "moments": inputs.Cached(SHAPE)}

    def opened():
        return batches(noisy, wanted, seed=4, batch=5, max_broken_share=1.0, cache=Cache(str(latents), FACTS))

    iterator, order = opened(), pipeline.shuffled(COUNT, 4)
    seen = take(iterator, 9)
    for position in range(COUNT):
        i = order[position] if order[position] != BROKEN else order[(position + 7) % COUNT]
        np.testing.assert_array_equal(seen[position // 5]["moments"][position % 5], entry(i, 0).moments)
    assert iterator.decoder.count == 1
    resumed = opened()
    resumed.set_state({**iterator.get_state(), "batches": 7})
    np.testing.assert_array_equal(next(resumed)["moments"], seen[7]["moments"])
    refused("fingerprint", resumed.set_state, {**iterator.get_state(), "latents": "of another"})


def test_a_damaged_entry_is_an_error(latents):
    path = latents / MANIFEST.file(1)
    whole = path.read_bytes()
    at = whole.index(entry(5, 2).moments.tobytes()[:40])
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    cache = Cache(str(latents), FACTS)
    failed(r"record 5, crop 2 in 00001-of-00003\.array_record cannot be read", cache.read, 5, 2)
    assert cache.read(4, 1).record == 4
    path.write_bytes(whole[: len(whole) // 2])
    failed("cannot be read", lambda: Cache(str(latents), FACTS).read(4, 1))
    path.write_bytes((latents / MANIFEST.file(0)).read_bytes())
    failed("it is that of record 0", lambda: Cache(str(latents), FACTS).read(4, 0))
    assert latent_cache.is_complete(path, 4 * CROPS)
    assert not latent_cache.is_complete(latents / MANIFEST.file(2), 4 * CROPS)


def test_what_is_refused_when_a_cache_is_opened(latents, noisy, tmp_path):
    def opened(where=latents, check="", **facts):
        cache = Cache(str(where), FACTS | facts)
        if check:
            cache.check(sources.open_source(str(check)))

    refused(r"weights \('ab12' there, 'cd' here\)", opened, weights="cd")
    refused(r"crop\.scale", opened, crop={"scale": (0.8, 1.0)})
    refused("holds no cache", opened, noisy)
    refused("a folder on this machine", opened, "gs://bucket/latents")
    write_tar(other := tmp_path / "other.tar", {f"{i:02}.jpg": jpeg(COUNT - i) for i in range(COUNT)})
    refused("another image there", opened, check=other)
    write_tar(other, {"a.jpg": jpeg(0)})
    refused("made of 11 images, and config.data.path has 1", opened, check=other)
    (latents / MANIFEST.file(2)).unlink()
    refused("lacks 1 of its 3 shards", opened, check=noisy)
    (latents / "latents.json").write_text("{}")
    refused(r"latents\.json: it has no 'facts'", opened)


def test_a_shard_is_there_when_it_is_complete(tmp_path):
    def failing():
        yield entry(0, 0)
        raise RunError("too many images are broken")

    failed("too many", latent_cache.write_shard, tmp_path, "a", failing())
    assert not list(tmp_path.iterdir())
