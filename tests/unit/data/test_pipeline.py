"""The iterator: order, processes, resuming, and images that cannot be read."""

import json
import logging
import threading

import numpy as np
import pytest
from helpers import failed, refused
from records import batches, tags, tags_of, take, write_shards

from diva_jax.common.errors import RunError, UserError
from diva_jax.data import pipeline


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """24 images that encode their numbers, in three shards."""
    folder = tmp_path_factory.mktemp("tagged")
    write_shards(folder, 24, 10)
    return folder


def images(iterator, count):
    return np.concatenate([batch["image"] for batch in take(iterator, count)])


@pytest.mark.parametrize("batch", [8, 7])
def test_every_record_once_an_epoch(tagged, batch):
    """Also where batches cross the end of an epoch; the order of each epoch is another one."""
    seen = tags_of(batches(tagged, batch=batch), -(-72 // batch))
    epochs = [seen[start : start + 24] for start in (0, 24, 48)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(24)) != epoch
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_fewer_records_than_a_batch(noisy):
    batch = next(batches(noisy, batch=32, crop={"scale": (0.3, 0.9)}))
    assert len(np.unique(batch["image"].reshape(32, -1), axis=0)) == 32  # A different crop each time.


def test_crops_depend_on_seed_and_position_alone(noisy):
    ours = images(batches(noisy, batch=4), 6)
    for threads, prefetch, batch in [(0, 1, 4), (5, 7, 4), (1, 1, 12)]:
        others = images(batches(noisy, batch=batch, threads=threads, prefetch=prefetch), 24 // batch)
        np.testing.assert_array_equal(ours, others)
    assert (ours != images(batches(noisy, batch=4, seed=1), 6)).any()


@pytest.mark.parametrize("stop, count", [(0, 2), (1, 3), (4, 1), (4, 6), (5, 2)])
def test_resume_with_any_number_of_processes_equals_uninterrupted(noisy, stop, count):
    """Stopped within an epoch (11 records, batches of 6); each process has its rows of the global batch."""
    whole = take(batches(noisy, batch=6), 8)
    before = batches(noisy, batch=6, process=(1, 2))
    take(before, stop)
    state = json.loads(json.dumps(before.get_state()))  # As in a checkpoint.
    # The same in every process; prefetched batches do not count.
    assert state == {"batches": stop, "seed": 0, "records": 11, "global_batch": 6}
    for p in range(count):
        after = batches(noisy, batch=6, process=(p, count))
        after.set_state(state)
        for expected, got in zip(whole[stop:], take(after, 8 - stop), strict=True):
            assert got.keys() == {"image", "row"} and got["row"].dtype == np.int32
            assert got["row"].tolist() == list(range(p, 6, count))
            np.testing.assert_array_equal(got["image"], expected["image"][p::count])
        assert after.get_state()["batches"] == 8
    after.set_state(state)  # And back again.
    np.testing.assert_array_equal(next(after)["image"], whole[stop]["image"][p::count])


def test_a_restored_run_decodes_nothing_before_its_place(noisy, monkeypatch):
    asked = []
    call = pipeline.Iterator._at
    monkeypatch.setattr(pipeline.Iterator, "_at", lambda self, p: asked.append(p) or call(self, p))
    iterator = batches(noisy, batch=6)
    iterator.set_state({"batches": 100, "seed": 0, "records": 11, "global_batch": 6})
    next(iterator)
    assert min(asked) == 600


def test_a_state_of_another_run(tagged, noisy):
    state = batches(tagged).get_state()
    for path, changes, complaint in (
        (tagged, {"seed": 1}, "config.seed = 0, this run has 1"),
        (tagged, {"batch": 4}, "config.batch_size = 8, this run has 4"),
        (noisy, {}, "images in config.data.path: 24, this run has 11"),
    ):
        with pytest.raises(UserError, match=complaint):
            batches(path, **changes).set_state(state)


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


def test_broken_images_give_way_to_the_next_in_order(tmp_path, tagged, caplog):
    """In every process, and after a resume."""
    order = tags_of(batches(tagged, batch=6), 8)
    # In the first epoch: one in the middle, two in a row, and the last, which the first one replaces.
    bad = {order[5], order[11], order[12], order[23]}
    write_shards(tmp_path, 24, 10, broken=bad)
    with caplog.at_level(logging.WARNING):
        iterator = batches(tmp_path, batch=6, max_broken_share=0.5)
        whole = take(iterator, 8)
    seen = [tag for batch in whole for tag in tags(batch["image"])]
    for position, tag in enumerate(order):
        k = position
        while order[k] in bad:
            k = k + 1 if (k + 1) % 24 else k + 1 - 24  # Never into the next epoch.
        assert seen[position] == order[k]
        assert (tag in bad) == (seen[position] != tag)
    assert iterator.broken.count == 4
    for record in bad:  # Each is logged once, although it occurs in both epochs.
        assert caplog.text.count(f"{record:09d}.png") == 1
    for p in range(3):
        part = batches(tmp_path, batch=6, process=(p, 3), max_broken_share=1.0)
        part.set_state({"batches": 2, "seed": 0, "records": 24, "global_batch": 6})
        for expected, got in zip(whole[2:], take(part, 6), strict=True):
            np.testing.assert_array_equal(got["image"], expected["image"][p::3])


def test_a_share_of_broken_images_stops_the_run(tmp_path):
    write_shards(tmp_path, 24, 10, broken=range(0, 24, 3))
    with pytest.raises(RunError) as e:
        take(batches(tmp_path, max_broken_share=0.1), 30)
    message = str(e.value)
    assert "config.data.max_broken_share=0.1" in message and ".png" in message and "%" in message
    assert "\n" not in message
    take(batches(tmp_path, max_broken_share=0.6), 30)  # A limit above its share.
    one = tmp_path / "one"
    one.mkdir()
    write_shards(one, 24, 10, broken={5})
    take(batches(one, max_broken_share=0.05), 60)


@pytest.mark.parametrize("count", [1, 40])
def test_all_broken_ends(tmp_path, count):
    write_shards(tmp_path, count, 10, broken=range(count))
    failed("not one of|max_broken_share", lambda: next(batches(tmp_path)))
    failed(f"not one of the {count} images", lambda: next(batches(tmp_path, max_broken_share=1.0)))


def test_a_batch_that_does_not_divide_is_refused(noisy):
    refused("config.batch_size=8 does not divide over 3 processes: use a multiple", batches, noisy, process=(0, 3))
