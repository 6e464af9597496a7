"""Zero-shot classification and probes: metrics, and every layout of data, valid and invalid."""

import io
import json
from functools import partial

import numpy as np
import pytest
from eval_data import FakeModel, encoded, evaluated, patch, prepared, unit, write_class_folders
from helpers import refused
from records import write_tar, write_tfds

from diva_jax.evals.tasks import probe, zeroshot

NAMES = ["cat", "small dog", "bird", "cow", "fish", "ant"]
LABELS = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 5]

prepare = partial(prepared, "zeroshot")


@pytest.fixture
def folders(tmp_path):
    root = write_class_folders(tmp_path / "images", LABELS, [f"n{i:02d}/deep" for i in range(6)])
    (root / "classnames.txt").write_text("\n".join(NAMES))
    return root


def write_tars(root, labels=LABELS):
    (root / "test").mkdir(parents=True)
    # 10 comes after 1, not before.
    for shard, rows in {0: range(5), 1: range(5, 9), 10: range(9, len(labels))}.items():
        members = {}
        for i in rows:
            members |= {f"x/{i}.cls": str(labels[i]).encode(), f"x/{i}.seg.png": b"other"}
            members[f"x/{i}.webp"] = encoded(patch(i), "WEBP")
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}.\n")
    return root


def test_scores_by_hand(folders):
    task = prepare(folders)
    assert task.count == 13 and list(task.images.targets) == LABELS and len(task.texts) == 6 * 80
    assert task.texts[80] == "a bad photo of a small dog."
    model, found, compared = evaluated(task)
    scores = {k: v["score"] / 100 for k, v in found.results["scores"].items()}
    classes = [
        unit(unit(np.stack([model.words[t.replace("{c}", n)] for t in zeroshot.imagenet("templates")])).mean(0))
        for n in NAMES
    ]
    logits = unit(model.pooled[0]) @ np.stack(classes).T
    right = logits.argmax(1) == LABELS
    recalls = [right[np.equal(LABELS, c)].mean() for c in range(len(NAMES))]
    assert scores["acc1"] == pytest.approx(right.mean())
    at5 = [label != np.argmin(x) for label, x in zip(LABELS, logits, strict=True)]
    assert scores["acc5"] == pytest.approx(np.mean(at5))
    assert scores["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert [r["predicted"] for r in found.rows] == [NAMES[c] for c in logits.argmax(1)]
    assert [r["correct"] for r in found.rows] == list(right)
    assert found.rows[3]["truth"] == "small dog" and found.rows[3]["file"] == "n01/deep/003.png"
    assert found.rows[3]["top5"].split("; ")[0] == found.rows[3]["predicted"]
    now = task.evaluate(FakeModel(1)).held[""][:, 0]
    test = compared["scores"]["acc1"]["mcnemar"]
    assert test["won"] == (now & ~right).sum() and test["lost"] == (right & ~now).sum()
    assert compared["scores"]["mean_per_class_recall"]["mcnemar"] is None

    class Broken(FakeModel):
        def draw(self, *shape):
            out = super().draw(*shape)
            out[:2] = np.nan if shape else out[:2]
            return out

    found = prepare(folders).evaluate(Broken())
    assert not found.held[""][:2].any() and found.held[""][2:].any()


def test_tars_in_clip_benchmarks_layout(tmp_path):
    root = write_tars(tmp_path / "tars")
    for path in (root, root / "test"):
        task = prepare(path)
        assert list(task.images.targets) == LABELS and task.texts[:3] == ["a cat", "the cat.", "a small dog"]
        assert task.images.read(12).size == patch(12).size
        assert task.images.names[9] == "10.tar[9]"
    root = write_tars(tmp_path / "few", labels=[i % 4 for i in LABELS])
    (root / "classnames.txt").write_text("a\nb\nc\nd\n")
    assert set(prepare(root).metrics) == {"acc1", "mean_per_class_recall"}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    def features(kinds):
        return {"image": kinds.Image(shape=(None, None, 3)), "label": kinds.ClassLabel(names=NAMES)}

    examples = [{"image": io.BytesIO(encoded(patch(i))), "label": label} for i, label in enumerate(LABELS)]
    folder = tmp_path_factory.mktemp("tfds")
    write_tfds(folder, "Labelled", "test", features, examples)
    return folder


def test_tfds(tfds_dir):
    task = prepare(f"tfds:labelled/test?data_dir={tfds_dir}")
    assert sorted(task.images.targets) == LABELS and task.classes == NAMES
    sizes = sorted(task.images.read(i).size for i in range(task.count))
    assert sizes == sorted(patch(i).size for i in range(len(LABELS)))
    refused("no class label 'x', only label", prepare, f"tfds:labelled/test?label=x&data_dir={tfds_dir}")


def written(folder, value) -> str:
    path = folder / "given.json"
    path.write_text(json.dumps(value))
    return str(path)


FOLDERS = [f"n{i:02d}" for i in range(6)]
# Option, its JSON, and the texts of the second class, or what the refusal says.
GIVEN = [
    ("classes", NAMES, ["one small dog"]),
    ("classes", dict(zip(FOLDERS, NAMES, strict=True)), ["one small dog"]),
    ("classes", {"n99": "x", **{f: [f, f"{f} x"] for f in FOLDERS}}, ["one n01", "one n01 x"]),
    ("classes", [[n, f"{n} x"] for n in NAMES], ["one small dog", "one small dog x"]),
    ("classes", NAMES[:3], "3 class names, but labels from 0 to 5"),
    ("classes", [*NAMES, "more"], "7 class names, but labels from 0 to 5"),
    ("classes", {"n00": "cat"}, "no name for n01, n02"),
    ("classes", dict.fromkeys(FOLDERS, 3), "has 3 at 'n00', where it must hold a text or a list of texts"),
    ("classes", [*NAMES[:5], ""], "has .''. at 5, where it must hold"),
    ("classes", 3, "must hold a list"),
    ("templates", ["has {c}"], ["has n01"]),
    ("templates", ["has {}", "{c}!"], ["has n01", "n01!"]),
    ("templates", "a {c}", ["a n01"]),
    ("templates", {f: ["has fur"] * (i + 1) for i, f in enumerate(FOLDERS)}, ["has fur"] * 2),
    ("templates", {f: f"{f} has fur" for f in FOLDERS}, ["n01 has fur"]),
    ("templates", ["a photo"], "has no {c}"),
    ("templates", [["a {c}", "b {c}"]], "lists in a list say no class"),
    ("templates", {"n00": ["x"]}, "has no prompts for n01"),
    ("templates", {f: [1] for f in FOLDERS}, "has .1. at 'n00', where it must hold"),
    ("templates", [], "must hold a list"),
]  # fmt: skip


@pytest.mark.parametrize("option, value, expected", GIVEN)
def test_names_and_prompts_from_json(folders, tmp_path, option, value, expected):
    (folders / "classnames.txt").unlink()
    (folders / "zeroshot_classification_templates.txt").write_text("one {c}\n")
    if isinstance(expected, str):
        refused(expected, lambda: prepare(folders, **{option: written(tmp_path, value)}))
    else:
        task = prepare(folders, **{option: written(tmp_path, value)})
        assert task.classified[""].prompts[1] == expected


def test_labels_of_folders(tmp_path, caplog, folders):
    names = [f"word {i}" for i in range(12)]
    root = write_class_folders(tmp_path / "numbers", list(range(12)), list(map(str, range(12))))
    assert prepare(root).classes == list(map(str, range(12)))
    assert "12 class names look like codes (0, 1, 2 and 9 more)" in caplog.text
    caplog.clear()
    (root / "classnames.txt").write_text("\n".join(names) + "\n\n")
    task = prepare(root)
    assert [names[int(n.split("/")[0])] for n in task.images.names] == [names[t] for t in task.images.targets]
    assert task.classes == names and not caplog.text
    (root / "classnames.txt").write_text("\n".join(names[:-1]))
    refused("has 11 names, but there are 12 folders", prepare, root)
    root = write_class_folders(tmp_path / "ids", [0, 1], ["n01443537", "n02123045"])
    assert prepare(root, classes="imagenet").classes == ["goldfish", "tabby cat"]
    assert "look like codes" in (prepare(root) and caplog.text)
    for split in (["train", "test"], ["Train", "val", "extra"], ["test"]):
        root = write_class_folders(tmp_path / "-".join(split), list(range(len(split))), split)
        refused("which are splits of a data set and no classes", prepare, root)
    assert prepare(write_class_folders(tmp_path / "vehicles", [0, 1], ["bus", "train"])).classes == ["bus", "train"]
    refused("cannot be read", prepare, folders, classes=str(tmp_path / "none.json"))


BROKEN_TARS = {
    "1.tar: the sample at byte 512 lacks an image": {"0.cls": b"1"},
    "1.tar: the sample at byte 512 lacks a .cls member": {"0.png": encoded(patch(0))},
    "1.tar: '0.cls' cannot be used .invalid literal": {"0.cls": b"x", "0.png": encoded(patch(0))},
    "6 class names, but labels from 0 to 6": {"0.cls": b"6", "0.png": encoded(patch(0))},
}


def test_broken_folders_are_refused(tmp_path):
    refused("is not a folder", prepare, tmp_path / "nothing")
    refused("neither tar shards nor a folder of images", prepare, tmp_path)
    (tmp_path / "a").mkdir()
    refused("a has no image in it", prepare, tmp_path)
    (tmp_path / "a" / "1.png").write_bytes(b"broken")
    refused(r"the image .*1.png cannot be read", lambda: prepare(tmp_path).images.read(0))
    root = write_tars(tmp_path / "tars")
    for says, members in BROKEN_TARS.items():
        write_tar(root / "test" / "1.tar", members)
        refused(says, prepare, root)
    (root / "test" / "1.tar").write_bytes(b"x" * 2000)
    refused("1.tar cannot be read as a tar archive", prepare, root)
    (root / "test" / "1.tar").unlink()
    (root / "test" / "nshards.txt").write_text("4")
    refused("counts 4 shards, but 1.tar is missing", prepare, root)
    (root / "test" / "nshards.txt").unlink()
    (root / "classnames.txt").unlink()
    refused("the data names no classes", prepare, root)


TRAIN, TEST = [0, 0, 1, 1, 1, 2, 2, 0, 1], [0, 1, 1, 2, 2]

probe_task = partial(prepared, "probe", neighbours=3, iterations=30)


def write_folders(root, labels):
    return write_class_folders(root, labels, ["a", "b", "c"])


def probe_tars(root, labels):
    root.mkdir(parents=True)
    members = {}
    for i, label in enumerate(labels):
        members |= {f"{i}.cls": str(label).encode(), f"{i}.png": encoded(patch(i))}
    write_tar(root / "0.tar", members)
    return root


@pytest.mark.parametrize("form", ["val", "two", "tars"])
def test_scores_of_both_probes(tmp_path, form):
    name = "val" if form == "val" else "test"
    write = probe_tars if form == "tars" else write_folders
    write(tmp_path / "train", TRAIN), write(tmp_path / name, TEST)
    task = probe_task(f"train={tmp_path}/train,test={tmp_path}/test" if form == "two" else tmp_path)
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
    weights, biases = probe.fit(x, task.train_labels, 3, found.results["weight_decay"], 30)
    right = (queries @ weights + biases).argmax(axis=1) == labels
    assert scores["linear_acc1"]["score"] == pytest.approx(100 * right.mean())
    assert [r["correct"] for r in found.rows[: len(TEST)]] == list(right)
    assert found.results["weight_decay"] in probe.DECAYS and "linear_acc5" not in scores
    assert all((s["mcnemar"] is None) == metric.endswith("recall") for metric, s in compared["scores"].items())
    if form == "two":
        _, found, _ = evaluated(probe_task(task.data, weight_decay=0.25))
        assert found.results["weight_decay"] == 0.25


def test_gradient_vanishes_at_the_fit_and_rows_are_padded(monkeypatch):
    rng = np.random.default_rng(0)
    x, y, decay = rng.standard_normal((37, 5)), rng.integers(0, 3, 37), 0.01
    whole = probe.fit(x, y, 3, decay, 500)
    monkeypatch.setattr(probe, "_ROWS", 8)
    weights, biases = probe.fit(x, y, 3, decay, 500)
    np.testing.assert_allclose(weights, whole[0], atol=2e-3)
    p = np.exp(x @ weights + biases)
    error = p / p.sum(axis=1, keepdims=True) - np.eye(3)[y]
    np.testing.assert_allclose(x.T @ error / 37 + decay * weights, 0, atol=2e-5)
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=2e-5)


def test_many_neighbours_do_not_overflow():
    x = np.eye(3).repeat(2, axis=0)
    votes = probe.neighbours(np.eye(3), x, np.array([0, 0, 1, 1, 2, 2]), 3, 2, 1e-3)
    np.testing.assert_array_equal(votes.argmax(axis=1), [0, 1, 2])


def test_bad_splits_are_refused(tmp_path):
    train = write_folders(tmp_path / "train", TRAIN)
    for path, says in (
        (tmp_path, "has no folders train and test"),
        (f"train={train}", "must read train=PATH,test=PATH"),
        (f"train={train},test={train}", "one split twice"),
        (f"train={train},test={tmp_path}/no", "--data=probe=.*/no is not a folder"),
    ):
        refused(says, probe_task, path)
    test = write_folders(tmp_path / "test", TEST)
    refused("neighbours=99 is more than the 9 training images", probe_task, tmp_path, neighbours=99)
    (test / "c").rename(test / "d")
    refused("differ in the classes c, d", probe_task, tmp_path)
    tars = [probe_tars(tmp_path / "t" / name, labels) for name, labels in (("a", [0, 1]), ("b", [1, 4]))]
    refused(
        r"0.tar\[1\] of the test split has the label 4", probe_task, f"train={tars[0]},test={tars[1]}", neighbours=1
    )
    tars = [probe_tars(tmp_path / "u" / name, [0, 0]) for name in "ab"]
    refused("at least two classes", probe_task, f"train={tars[0]},test={tars[1]}", neighbours=1)
