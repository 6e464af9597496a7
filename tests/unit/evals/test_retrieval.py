"""Retrieval: recalls against sorting, ties, clusters of captions, CSV files."""

from functools import partial

import numpy as np
import pytest
from eval_data import encoded, evaluated, patch, prepared, unit, write_image
from helpers import refused
from records import write_tar

from diva_jax.evals.tasks import retrieval

COUNT = 23
CAPTIONS = [[f"caption {j} of {i}" for j in range(1 + i % 5)] for i in range(COUNT)]

prepare = partial(prepared, "retrieval")


@pytest.fixture
def table(tmp_path):
    rows = ["image,caption,note"]
    for i, captions in enumerate(CAPTIONS):
        write_image(tmp_path / f"{i}.png", i)
        rows += [f'{i}.png,"{caption}",x' for caption in captions]
    path = tmp_path / "captions.csv"
    path.write_text("\n".join(rows))
    return path


def test_recalls_equal_sorting(table):
    task = prepare(table)
    assert task.count == COUNT and task.texts == [c for captions in CAPTIONS for c in captions]
    model, found, compared = evaluated(task)
    assert model.sizes[0] == [patch(i).size for i in range(COUNT)]
    scores = unit(model.texts(task.texts)) @ unit(model.pooled[0]).T
    owner = [i for i, captions in enumerate(CAPTIONS) for _ in captions]
    for k in (1, 5, 10):
        image = [owner[t] in np.argsort(-scores[t])[:k] for t in range(len(owner))]
        text = [any(owner[t] == i for t in np.argsort(-scores[:, i])[:k]) for i in range(COUNT)]
        got = found.results["scores"]
        assert got[f"image_retrieval_recall@{k}"]["score"] == pytest.approx(100 * np.mean(image))
        assert got[f"text_retrieval_recall@{k}"]["score"] == pytest.approx(100 * np.mean(text))
    assert len(found.rows) == len(owner) + COUNT
    # The captions of one image are not independent, which McNemar's test assumes.
    assert all((s["mcnemar"] is None) == metric.startswith("image") for metric, s in compared["scores"].items())


def test_among_equals_the_first_wins():
    answers = np.ones((6, 2))
    right = np.zeros((2, 6), bool)
    right[0, [3, 5]] = right[1, 0] = True
    np.testing.assert_array_equal(retrieval.ranks(np.ones((2, 2)), answers, right), [3, 0])
    # An encoder that has collapsed to one point retrieves by chance.
    n = 300
    found = retrieval.ranks(np.ones((n, 2)), np.ones((n, 2)), np.eye(n, dtype=bool))
    np.testing.assert_array_equal(found, np.arange(n))


def test_scores_that_are_not_finite_are_wrong():
    right = np.eye(3, dtype=bool)
    answers = np.eye(3)
    np.testing.assert_array_equal(retrieval.ranks(np.full((3, 3), np.nan), answers, right), [3, 3, 3])
    # A wrong answer whose score is not finite is ahead of the right one.
    answers[1, 0] = np.nan
    np.testing.assert_array_equal(retrieval.ranks(np.eye(3), answers, right), [1, 3, 1])


def test_tars_with_several_captions(tmp_path):
    (tmp_path / "test").mkdir()
    members = {}
    for i, captions in enumerate(CAPTIONS):
        members |= {f"s{i}.jpg": encoded(patch(i), "JPEG"), f"s{i}.txt": "\n".join(captions).encode()}
    write_tar(tmp_path / "test" / "0.tar", members)
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    task = prepare(tmp_path)
    assert task.images.targets == CAPTIONS and list(task.owner[:4]) == [0, 1, 1, 2]
    write_tar(tmp_path / "test" / "0.tar", members | {"s1.txt": b""})
    refused(r"0.tar\[1\] has no caption", prepare, tmp_path)


def test_bad_data_is_refused(table, tmp_path):
    lines = table.read_text().splitlines()
    for line, says in (
        ("none.png,a thing,x", "names .*none.png, which does not exist"),
        (f"{'x' * 5000},a thing,x", "line 3: a text of 5000 characters is no path"),
        ("1.png,,", "line 3: image or caption is empty"),
        (",a thing,x", "line 3: image or caption is empty"),
        ("1.png,a thing", "line 3: the row is not CSV .it has 2 fields, the header 3"),
    ):
        table.write_text("\n".join([*lines[:2], line, *lines[3:]]))
        refused(says, prepare, table)
    for text, says in (("file,caption\n1.png,x\n", "has no column image"), ("image,caption\n", "has no rows")):
        table.write_text(text)
        refused(says, prepare, table)
    for path in (tmp_path / "none.csv", tmp_path):
        refused("neither a folder of tar shards nor a CSV file", prepare, path)
