"""Probes: the search of the weight decay, votes against counting, splits in every form, bad splits."""

from functools import partial

import numpy as np
import pytest
from eval_data import encoded, evaluated, patch, prepared, unit, write_class_folders
from helpers import refused
from records import write_tar

from diva_jax.evals import linear

TRAIN, TEST = [0, 0, 1, 1, 1, 2, 2, 0, 1], [0, 1, 1, 2, 2]

prepare = partial(prepared, "probe", neighbours=3, iterations=30)


def write_folders(root, labels):
    return write_class_folders(root, labels, ["a", "b", "c"])


def write_tars(root, labels):
    root.mkdir(parents=True)
    members = {}
    for i, label in enumerate(labels):
        members |= {f"{i}.cls": str(label).encode(), f"{i}.png": encoded(patch(i))}
    write_tar(root / "0.tar", members)
    return root


@pytest.mark.parametrize("form", ["val", "two", "tars"])
def test_scores_of_both_probes(tmp_path, form):
    name = "val" if form == "val" else "test"
    write = write_tars if form == "tars" else write_folders
    write(tmp_path / "train", TRAIN), write(tmp_path / name, TEST)
    task = prepare(f"train={tmp_path}/train,test={tmp_path}/test" if form == "two" else tmp_path)
    labels = task.classified["knn_"].labels
    assert list(labels) == TEST and (list(task.train_labels) == sorted(TRAIN) or form == "tars")
    model, found, compared = evaluated(task)
    x, queries = map(unit, model.pooled)
    votes = np.zeros((len(queries), 3))
    for i, q in enumerate(queries):
        for j in np.argsort(-(x @ q))[:3]:
            votes[i, task.train_labels[j]] += np.exp(x[j] @ q / 0.07)
    right = votes.argmax(axis=1) == labels
    scores = found.results["scores"]
    assert scores["knn_acc1"]["score"] == pytest.approx(100 * right.mean())
    recall = np.mean([right[labels == c].mean() for c in range(3)])
    assert scores["knn_mean_per_class_recall"]["score"] == pytest.approx(100 * recall)
    weights, biases = linear.fit(x, task.train_labels, 3, found.results["weight_decay"], 30)
    right = (queries @ weights + biases).argmax(axis=1) == labels
    assert scores["linear_acc1"]["score"] == pytest.approx(100 * right.mean())
    assert [r["correct"] for r in found.rows[: len(TEST)]] == list(right)
    assert found.results["weight_decay"] in linear.DECAYS and "linear_acc5" not in scores
    assert all((s["mcnemar"] is None) == metric.endswith("recall") for metric, s in compared["scores"].items())
    if form == "two":
        _, found, _ = evaluated(prepare(task.data, weight_decay=0.25))
        assert found.results["weight_decay"] == 0.25


def test_gradient_vanishes_at_the_fit_and_rows_are_padded(monkeypatch):
    rng = np.random.default_rng(0)
    x, y, decay = rng.standard_normal((37, 5)), rng.integers(0, 3, 37), 0.01
    whole = linear.fit(x, y, 3, decay, 500)
    monkeypatch.setattr(linear, "_ROWS", 8)
    weights, biases = linear.fit(x, y, 3, decay, 500)
    np.testing.assert_allclose(weights, whole[0], atol=2e-3)
    p = np.exp(x @ weights + biases)
    error = p / p.sum(axis=1, keepdims=True) - np.eye(3)[y]
    np.testing.assert_allclose(x.T @ error / 37 + decay * weights, 0, atol=2e-5)
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=2e-5)


def test_many_neighbours_do_not_overflow():
    x = np.eye(3).repeat(2, axis=0)
    votes = linear.neighbours(np.eye(3), x, np.array([0, 0, 1, 1, 2, 2]), 3, 2, 1e-3)
    np.testing.assert_array_equal(votes.argmax(axis=1), [0, 1, 2])


def test_bad_splits_are_refused(tmp_path):
    train = write_folders(tmp_path / "train", TRAIN)
    for path, says in (
        (tmp_path, "has no folders train and test"),
        (f"train={train}", "must read train=PATH,test=PATH"),
        (f"train={train},test={train}", "one split twice"),
        (f"train={train},test={tmp_path}/no", "--data=probe=.*/no is not a folder"),
    ):
        refused(says, prepare, path)
    test = write_folders(tmp_path / "test", TEST)
    refused("neighbours=99 is more than the 9 training images", prepare, tmp_path, neighbours=99)
    (test / "c").rename(test / "d")
    refused("differ in the classes c, d", prepare, tmp_path)
    tars = [write_tars(tmp_path / "t" / name, labels) for name, labels in (("a", [0, 1]), ("b", [1, 4]))]
    refused(r"0.tar\[1\] of the test split has the label 4", prepare, f"train={tars[0]},test={tars[1]}", neighbours=1)
    tars = [write_tars(tmp_path / "u" / name, [0, 0]) for name in "ab"]
    refused("at least two classes", prepare, f"train={tars[0]},test={tars[1]}", neighbours=1)
