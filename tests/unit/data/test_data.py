"""The iterator: order, processes, resuming, and images that cannot be read."""

import json
import logging
import threading

import numpy as np
import pytest
from records import data_config, encoded, noise, tags, write_shards, write_tar

from diva_jax.common.errors import RunError, UserError
from diva_jax.data import inputs, pipeline


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """24 images that encode their numbers, in three shards."""
    folder = tmp_path_factory.mktemp("tagged")
    write_shards(folder, 24, 10)
    return folder


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """11 images for which every crop gives another result."""
    folder = tmp_path_factory.mktemp("noisy")
    write_tar(folder / "0.tar", {f"{i}.jpg": noise(i, 64 + i, 48 + 3 * i) for i in range(11)})
    return folder


def build(path, *, seed=0, batch=8, process=(0, 1), **changes):
    index, count = process
    config = data_config(path, **changes)
    wanted = {"image": inputs.Image(max(1, config.image_size))}
    return pipeline.open_batches(
        config, wanted, seed=seed, global_batch=batch, process_index=index, process_count=count
    )


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() == {"image", "row"}
        for k in x:
            np.testing.assert_array_equal(x[k], y[k])


def test_shapes_and_dtypes(noisy):
    batch = next(build(noisy, batch=6, image_size=17))
    assert batch["image"].shape == (6, 17, 17, 3) and batch["image"].dtype == np.uint8
    assert batch["row"].dtype == np.int32 and batch["row"].tolist() == list(range(6))


def test_every_record_once_an_epoch(tagged):
    batches = take(build(tagged, batch=8), 9)
    epochs = [sum((tags(b["image"]) for b in batches[e : e + 3]), []) for e in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(24))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_size_that_does_not_divide(tagged):
    """Batches cross the end of an epoch; every 24 positions are still all records."""
    seen = sum((tags(b["image"]) for b in take(build(tagged, batch=7), 11)), [])
    for start in (0, 24, 48):
        assert sorted(seen[start : start + 24]) == list(range(24))


def test_fewer_records_than_a_batch(noisy):
    batch = next(build(noisy, batch=32, crop={"scale": (0.3, 0.9)}))
    assert len(np.unique(batch["image"].reshape(32, -1), axis=0)) == 32  # A different crop each time.


def test_seeds(tagged):
    first, again, other = (take(build(tagged, seed=s), 3) for s in (0, 0, 1))
    same(first, again)
    orders = [sum((tags(b["image"]) for b in batches), []) for batches in (first, other)]
    assert orders[0] != orders[1]
    second_epoch = sum((tags(b["image"]) for b in take(build(tagged, seed=0), 6)[3:]), [])
    assert orders[1] != second_epoch  # Seed 1 is not seed 0 an epoch later.


def test_crops_depend_on_seed_and_position_alone(noisy):
    ours = take(build(noisy, batch=4), 6)
    for threads, prefetch, batch in [(0, 1, 4), (5, 7, 4), (1, 1, 12)]:
        others = take(build(noisy, batch=batch, threads=threads, prefetch=prefetch), 24 // batch)
        np.testing.assert_array_equal(
            np.concatenate([b["image"] for b in ours]), np.concatenate([b["image"] for b in others])
        )
    with pytest.raises(AssertionError):
        same(ours, take(build(noisy, batch=4, seed=1), 6))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_share_the_global_batch(noisy, count):
    whole = take(build(noisy, batch=6), 5)
    parts = [take(build(noisy, batch=6, process=(p, count)), 5) for p in range(count)]
    for b, batch in enumerate(whole):
        rows = np.concatenate([part[b]["row"] for part in parts])
        images = np.concatenate([part[b]["image"] for part in parts])
        assert all(len(part[b]["row"]) == 6 // count for part in parts)
        assert sorted(rows) == list(range(6))
        np.testing.assert_array_equal(images, batch["image"][rows])
    assert {json.dumps(build(noisy, batch=6, process=(p, count)).get_state()) for p in range(count)} == {
        json.dumps({"batches": 0, "seed": 0, "records": 11, "global_batch": 6})
    }


@pytest.mark.parametrize("stop", [0, 1, 4, 5])
@pytest.mark.parametrize("count", [1, 2])
def test_resume_equals_uninterrupted(noisy, stop, count):
    """Stopped within an epoch (11 records, batches of 6), resumed with another number of processes."""
    whole = take(build(noisy, batch=6), 8)
    before = build(noisy, batch=6, process=(1, 2))
    take(before, stop)
    state = json.loads(json.dumps(before.get_state()))  # As in a checkpoint.
    assert state["batches"] == stop  # Prefetched batches do not count.
    for p in range(count):
        after = build(noisy, batch=6, process=(p, count))
        after.set_state(state)
        for expected, got in zip(whole[stop:], take(after, 8 - stop), strict=True):
            assert got["row"].tolist() == list(range(p, 6, count))
            np.testing.assert_array_equal(got["image"], expected["image"][p::count])
        assert after.get_state()["batches"] == 8


def test_set_state_goes_back_too(noisy):
    iterator = build(noisy, batch=6)
    first = iterator.get_state()
    batches = take(iterator, 3)
    iterator.set_state(first)
    same(take(iterator, 3), batches)


def test_a_restored_run_decodes_nothing_before_its_place(noisy, monkeypatch):
    asked = []
    call = pipeline.Examples.__call__
    monkeypatch.setattr(pipeline.Examples, "__call__", lambda self, p: asked.append(p) or call(self, p))
    iterator = build(noisy, batch=6)
    iterator.set_state({"batches": 100, "seed": 0, "records": 11, "global_batch": 6})
    next(iterator)
    assert min(asked) == 600


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"seed": 1}, "config.seed = 0, this run has 1"),
        ({"batch": 4}, "config.batch_size = 8, this run has 4"),
        ({"path": "noisy"}, "images in config.data.path: 24, this run has 11"),
    ],
)
def test_a_state_of_another_run(tagged, noisy, changes, complaint):
    state = build(tagged).get_state()
    changes = {"path": tagged, **changes}
    changes["path"] = noisy if changes["path"] == "noisy" else tagged
    with pytest.raises(UserError, match=complaint):
        build(**changes).set_state(state)


def test_close_ends_the_threads(noisy):
    before = set(threading.enumerate())
    iterator = build(noisy, threads=4)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
    assert next(iterator)["row"].tolist() == list(range(8))  # Resumes at the second batch.
    assert iterator.get_state()["batches"] == 2


class TestBroken:
    def test_gives_way_to_the_next_in_order(self, tmp_path, tagged, caplog):
        order = sum((tags(b["image"]) for b in take(build(tagged, batch=8), 6)), [])
        # In the first epoch: one in the middle, two in a row, and the last, which the first one replaces.
        bad = {order[5], order[11], order[12], order[23]}
        write_shards(tmp_path, 24, 10, broken=bad)
        with caplog.at_level(logging.WARNING):
            iterator = build(tmp_path, batch=8, max_broken_share=0.5)
            seen = sum((tags(b["image"]) for b in take(iterator, 6)), [])
        for position, tag in enumerate(order):
            k = position
            while order[k] in bad:
                k = k + 1 if (k + 1) % 24 else k + 1 - 24  # Never into the next epoch.
            assert seen[position] == order[k]
            assert (tag in bad) == (seen[position] != tag)
        assert iterator.broken.count == 4
        for record in bad:  # Each is logged once, although it occurs in both epochs.
            assert caplog.text.count(f"{record:09d}.png") == 1

    def test_processes_and_resume_agree(self, tmp_path):
        write_shards(tmp_path, 24, 10, broken={0, 1, 2, 3, 11})
        kw = dict(batch=6, max_broken_share=1.0)
        whole = take(build(tmp_path, **kw), 7)
        for p in range(3):
            iterator = build(tmp_path, process=(p, 3), **kw)
            iterator.set_state({"batches": 2, "seed": 0, "records": 24, "global_batch": 6})
            for expected, got in zip(whole[2:], take(iterator, 5), strict=True):
                np.testing.assert_array_equal(got["image"], expected["image"][p::3])

    def test_a_tiny_data_set_survives_one(self, tmp_path):
        write_shards(tmp_path, 24, 10, broken={5})
        assert len(take(build(tmp_path, batch=8, max_broken_share=0.05), 60)) == 60

    def test_the_first_image_alone_does_not_stop_a_run(self):
        broken = pipeline.Broken(0.01)
        for record in range(10):
            broken.add(record, "x.jpg", "truncated")
        with pytest.raises(RunError):
            broken.add(10, "x.jpg", "truncated")

    def test_the_share_stops_the_run(self, tmp_path):
        write_shards(tmp_path, 24, 10, broken=range(0, 24, 3))
        iterator = build(tmp_path, batch=8, max_broken_share=0.1)
        with pytest.raises(RunError) as e:
            take(iterator, 30)
        message = str(e.value)
        assert "config.data.max_broken_share=0.1" in message and ".png" in message and "%" in message
        assert "\n" not in message
        # The same data under a limit above its share runs.
        take(build(tmp_path, batch=8, max_broken_share=0.6), 30)

    @pytest.mark.parametrize("count", [1, 4, 40])
    def test_all_broken_ends(self, tmp_path, count):
        write_shards(tmp_path, count, 10, broken=range(count))
        with pytest.raises(RunError, match="not one of|max_broken_share"):
            next(build(tmp_path))
        with pytest.raises(RunError, match=f"not one of the {count} images"):
            next(build(tmp_path, max_broken_share=1.0))

    def test_the_log_stops_naming(self, caplog):
        broken = pipeline.Broken(1.0)
        with caplog.at_level(logging.WARNING):
            for record in range(50):
                broken.add(record, f"image{record}", "why")
        assert len(caplog.records) == 21 and broken.count == 50
        assert "image19: why" in caplog.text and "image20" not in caplog.text

    def test_a_file_that_vanishes_counts(self, tmp_path, caplog):
        for i in range(6):
            (tmp_path / f"{i}.png").write_bytes(encoded(i))
        iterator = build(tmp_path, batch=6, max_broken_share=0.9)
        (tmp_path / "3.png").unlink()
        batch = next(iterator)
        assert 3 not in tags(batch["image"])
        assert "3.png" in caplog.text and iterator.broken.count == 1

    def test_a_truncated_shard_loses_only_its_end(self, tmp_path, caplog):
        write_shards(tmp_path, 24, 10)
        with open(tmp_path / "00001.tar", "r+b") as f:
            f.truncate(f.seek(0, 2) // 2)
        iterator = build(tmp_path, batch=8)
        n = len(iterator.source)
        assert 10 < n < 24 and "00001.tar is cut short" in caplog.text
        seen = set(sum((tags(b["image"]) for b in take(iterator, 4)), []))
        assert seen == set(range(n - 4)) | set(range(20, 24))  # All of shard 0, some of 1, all of 2.
        assert iterator.broken.count == 0


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"path": ""}, "config.data.path is not set"),
        ({"path": "/nowhere/at/all"}, "config.data.path='/nowhere/at/all' does not exist"),
        ({"batch": 8, "process": (0, 3)}, "config.batch_size=8 does not divide over 3 processes"),
    ],
)
def test_bad_fields_are_one_sentence(noisy, changes, complaint):
    with pytest.raises(UserError, match=complaint) as e:
        build(**{"path": noisy, **changes})
    assert "\n" not in str(e.value)


def test_index_is_cached_where_told(tagged, tmp_path):
    pipeline.open_batches(data_config(tagged), {}, seed=0, global_batch=4, cache_dir=tmp_path / "run" / "cache")
    assert [p.suffix for p in (tmp_path / "run" / "cache").iterdir()] == [".npz"]
