"""Zero-shot classification and probes: metrics, and every layout of data, valid and invalid."""

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trees
from eval_data import FakeModel, encoded, evaluated, patch, prepared, unit, write_class_folders
from helpers import refused
from records import write_tfds

from diva_jax.data import labelled
from diva_jax.evals.tasks import probe

NAMES = ["cat", "small dog", "bird", "cow", "fish", "ant"]
LABELS = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 5]

prepare = partial(prepared, "zeroshot")


@pytest.fixture
def folders(tmp_path):
    root = write_class_folders(tmp_path / "images", LABELS, [f"n{i:02d}/deep" for i in range(6)])
    (root / "classnames.txt").write_text("\n".join(NAMES))
    return root


def members(labels, rows, suffix="png"):
    """A class and an image of each row, with another image of its sample."""
    kinds = {"cls": lambda i: str(labels[i]), "seg.png": lambda i: "other"}
    kinds[suffix] = lambda i: encoded(patch(i), suffix.upper())
    return {f"x/{i}.{ext}": data(i) for i in rows for ext, data in kinds.items()}


def write_tars(root, labels=LABELS, names=NAMES):
    shards = {0: range(5), 1: range(5, 9), 10: range(9, len(labels))}  # 10 comes after 1, not before.
    files = {f"test/{shard}.tar": members(labels, rows, "webp") for shard, rows in shards.items()}
    files |= {"classnames.txt": "\n".join([*names, ""]), "zeroshot_classification_templates.txt": "a {c}\nthe {c}.\n"}
    trees.change(root, files)
    return root


def test_scores_are_those_of_the_rows(folders):
    """tests/parity compares them with clip_benchmark's."""
    task = prepare(folders)
    assert task.count == 13 and list(task.images.targets) == LABELS and len(task.texts) == 6 * 80
    assert task.texts[80] == "a bad photo of a small dog."
    _, found, compared = evaluated(task)
    right = np.array([row["correct"] for row in found.rows])
    assert [row["truth"] for row in found.rows] == [NAMES[label] for label in LABELS]
    assert list(right) == [row["predicted"] == row["truth"] == row["top5"].split("; ")[0] for row in found.rows]
    assert found.results["scores"]["acc1"]["score"] == pytest.approx(100 * right.mean())
    assert found.rows[3]["file"] == "n01/deep/003.png"
    now = task.evaluate(FakeModel(1)).held[""][:, 0]
    test = compared["scores"]["acc1"]["mcnemar"]
    assert test["won"] == (now & ~right).sum() and test["lost"] == (right & ~now).sum()
    assert compared["scores"]["mean_per_class_recall"]["mcnemar"] is None
    broken, drawn = FakeModel(), FakeModel().draw(13)
    drawn[:2] = np.nan
    broken.images = lambda *_, **__: dict.fromkeys(("pooled", "published"), drawn)
    found = task.evaluate(broken)
    assert not found.held[""][:2].any() and found.held[""][2:].any()  # Scores that are not finite are wrong.


def test_tars_in_clip_benchmarks_layout(tmp_path):
    root = write_tars(tmp_path / "tars")
    for path in (root, root / "test"):
        task = prepare(path)
        assert list(task.images.targets) == LABELS and task.texts[:3] == ["a cat", "the cat.", "a small dog"]
        assert task.images.read(12).size == patch(12).size and task.images.names[9] == "10.tar[9]"
    root = write_tars(tmp_path / "few", [i % 4 for i in LABELS], "abcd")
    assert set(prepare(root).metrics) == {"acc1", "mean_per_class_recall"}


def test_tfds(tmp_path):
    def features(kinds):
        return {"image": kinds.Image(shape=(None, None, 3)), "label": kinds.ClassLabel(names=NAMES)}

    examples = [{"image": io.BytesIO(encoded(patch(i))), "label": label} for i, label in enumerate(LABELS)]
    write_tfds(tmp_path, "Labelled", "test", features, examples)
    task = prepare(f"tfds:labelled/test?data_dir={tmp_path}")
    assert sorted(task.images.targets) == LABELS and task.classes == NAMES
    sizes = sorted(task.images.read(i).size for i in range(task.count))
    assert sizes == sorted(patch(i).size for i in range(len(LABELS)))
    refused("no class label 'x', only label", prepare, f"tfds:labelled/test?label=x&data_dir={tmp_path}")


GIVEN = json.loads(Path(__file__).with_name("classes.json").read_text())


@pytest.mark.parametrize("option, value, expected", GIVEN)
def test_names_and_prompts_from_json(folders, tmp_path, option, value, expected):
    files = {"classnames.txt": None, "zeroshot_classification_templates.txt": "one {c}\n"}
    trees.change(folders, files | {"../given.json": json.dumps(value)})
    given = {option: str(tmp_path / "given.json")}
    if isinstance(expected, str):
        refused(expected, prepare, folders, **given)
    else:
        assert prepare(folders, **given).classified[""].prompts[1] == expected


def test_labels_of_folders(tmp_path, caplog):
    names = [f"word {i}" for i in range(12)]
    root = write_class_folders(tmp_path / "numbers", list(range(12)), list(map(str, range(12))))
    assert prepare(root).classes == list(map(str, range(12)))
    assert "12 class names look like codes (0, 1, 2 and 9 more)" in caplog.text
    caplog.clear()
    (root / "classnames.txt").write_text("\n".join(names) + "\n\n")
    task = prepare(root)
    assert [names[int(n.split("/")[0])] for n in task.images.names] == [names[t] for t in task.images.targets]
    assert task.classes == names and not caplog.text
    root = write_class_folders(tmp_path / "ids", [0, 1], ["n01443537", "n02123045"])
    assert prepare(root, classes="imagenet").classes == ["goldfish", "tabby cat"]
    assert "look like codes" in (prepare(root) and caplog.text)
    assert prepare(write_class_folders(tmp_path / "vehicles", [0, 1], ["bus", "train"])).classes == ["bus", "train"]
    (root / "n02123045/001.png").write_bytes(b"broken")
    refused(r"the image .*001.png cannot be read", prepare(root).images.read, 1)


def test_every_image_of_a_class_folder_counts(tmp_path, caplog):
    there = ["cat/a.jpg", "dog/img.draft.jpg", "dog/img.final.jpg", "dog/photo.jpg", "dog/photo.png"]
    trees.change(tmp_path, dict.fromkeys([*there, "cat/b.heic", "dog/photo.txt"], "PNG"))
    images = labelled.class_folders(tmp_path)
    assert images.names == there and images.targets == [0, 1, 1, 1, 1]
    assert caplog.text.count("are not read") == 1 and "b.heic" in caplog.text


TRAIN, TEST = [0, 0, 1, 1, 1, 2, 2, 0, 1], [0, 1, 1, 2, 2]

probe_task = partial(prepared, "probe", neighbours=3, iterations=30)


@pytest.mark.parametrize("form", ["val", "two", "tars"])
def test_scores_of_both_probes(tmp_path, form):
    """Neighbours by hand; tests/parity compares the linear fit and its search with those of other libraries."""
    for folder, labels in (("train", TRAIN), ("val" if form == "val" else "test", TEST)):
        if form == "tars":
            trees.change(tmp_path, {f"{folder}/0.tar": members(labels, range(len(labels)))})
        else:
            write_class_folders(tmp_path / folder, labels, ["a", "b", "c"])
    task = probe_task(f"train={tmp_path}/train,test={tmp_path}/test" if form == "two" else tmp_path)
    labels = task.classified["knn_"].labels
    assert list(labels) == TEST and (list(task.train_labels) == sorted(TRAIN) or form == "tars")
    model, found, compared = evaluated(task)
    x, queries = map(unit, model.pooled)
    votes = np.zeros((len(queries), 3))
    for i, q in enumerate(queries):
        for j in np.argsort(-(x @ q))[:3]:
            votes[i, task.train_labels[j]] += np.exp(x[j] @ q / 0.07)
    weights, biases = probe.fit(x, task.train_labels, 3, found.results["weight_decay"], 30)
    scores = found.results["scores"]
    for kind, logits in (("knn", votes), ("linear", queries @ weights + biases)):
        right = logits.argmax(axis=1) == labels
        assert scores[f"{kind}_acc1"]["score"] == pytest.approx(100 * right.mean())
        recall = np.mean([right[labels == c].mean() for c in range(3)])
        assert scores[f"{kind}_mean_per_class_recall"]["score"] == pytest.approx(100 * recall)
    assert [r["correct"] for r in found.rows[: len(TEST)]] == list(right)
    assert found.results["weight_decay"] in probe.DECAYS and "linear_acc5" not in scores
    assert all((s["mcnemar"] is None) == metric.endswith("recall") for metric, s in compared["scores"].items())
    assert evaluated(probe_task(task.data, weight_decay=0.25))[1].results["weight_decay"] == 0.25


def test_rows_are_padded_and_many_neighbours_do_not_overflow(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((37, 5)), rng.integers(0, 3, 37)
    whole = probe.fit(x, y, 3, 0.01, 500)
    monkeypatch.setattr(probe, "_ROWS", 8)
    np.testing.assert_allclose(probe.fit(x, y, 3, 0.01, 500)[0], whole[0], atol=2e-3)
    votes = probe.neighbours(np.eye(3), np.eye(3).repeat(2, axis=0), np.array([0, 0, 1, 1, 2, 2]), 3, 2, 1e-3)
    np.testing.assert_array_equal(votes.argmax(axis=1), [0, 1, 2])
