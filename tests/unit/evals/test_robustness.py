"""Shifts of ImageNet: labels by number and by WordNet id, class subsets, ObjectNet's mapping files, bad folders."""

import json

import numpy as np
import pytest
from eval_data import encoded, patch

from diva_jax.common.errors import UserError
from diva_jax.common.fields import default_of
from diva_jax.evals import Settings
from diva_jax.evals.tasks import robustness, zeroshot

NAMES = zeroshot.imagenet("classes")


def write(root, folders):
    for n, folder in enumerate(folders):
        for i in range(1 + n % 3):
            path = root / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(patch(7 * n + i)))
    return root


def prepare(tmp_path, path, **options):
    (tmp_path / "templates.json").write_text('["a {c}", "the {c}."]')
    section = default_of(robustness)
    section.update({"allow_partial": True, "templates": str(tmp_path / "templates.json")} | options)
    return robustness.prepare(path, section, Settings(bootstrap=100))


class Fake:
    label = "fake"

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.words, self.found = {}, []

    def images(self, read, count):
        self.found.append((self.rng.standard_normal((count, 6)), read(0).size))
        return {"pooled": self.found[-1][0]}

    def texts(self, texts):
        for t in texts:
            self.words.setdefault(t, self.rng.standard_normal(6))
        return np.stack([self.words[t] for t in texts])


def test_labels_are_the_folders_numbers(tmp_path):
    """Sorted as text, 10 and 100 would come before 2."""
    found = robustness.read_set("v2", write(tmp_path, ["2", "10", "100", "0"]), True)
    assert found.classes == [NAMES[i] for i in (0, 2, 10, 100)]
    assert {n.split("/")[0]: found.classes[t] for n, t in zip(found.names, found.targets, strict=True)} == {
        "0": NAMES[0],
        "2": NAMES[2],
        "10": NAMES[10],
        "100": NAMES[100],
    }


@pytest.mark.parametrize("name", ["a", "r", "sketch"])
def test_wnids_give_the_subset_in_imagenets_order(tmp_path, name):
    ids = robustness.wnids()
    assert len(ids) == len(set(ids)) == 1000 and ids == sorted(ids)
    assert [NAMES[ids.index(w)] for w in ("n01440764", "n02123045", "n15075141")] == [
        "tench",
        "tabby cat",
        "toilet paper",
    ]
    found = robustness.read_set(name, write(tmp_path, [ids[900], ids[3], ids[40]]), True)
    assert found.classes == [NAMES[3], NAMES[40], NAMES[900]] and set(found.targets) == {0, 1, 2}


def write_objectnet(root):
    titles = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "backpack": "Backpack"}
    write(root / "images", titles)
    (root / "mappings").mkdir()
    (root / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(titles))
    overlap = {"Backpack": "backpack, back pack", "Alarm clock": "analog clock; digital clock"}
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    return root


def test_objectnets_classes_of_imagenet_without_the_border(tmp_path):
    found = robustness.read_set("objectnet", write_objectnet(tmp_path), True)
    assert found.classes == ["alarm clock", "backpack"]
    assert [n.split("/")[0] for n in found.names] == ["alarm_clock"] * 2 + ["backpack"] * 3
    whole = np.asarray(patch(7))
    np.testing.assert_array_equal(np.asarray(found.read(0)), whole[2:-2, 2:-2])


def test_scores_by_hand_among_the_sets_own_classes(tmp_path):
    ids = robustness.wnids()
    write(tmp_path / "a", ids[5:9]), write_objectnet(tmp_path / "o")
    task = prepare(tmp_path, f"a={tmp_path}/a,objectnet={tmp_path}/o")
    model = Fake()
    found = task.evaluate(model)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    for (prefix, data), (pooled, _) in zip(task.classified.items(), model.found, strict=True):
        texts = [[model.words[f"a {c}"], model.words[f"the {c}."]] for c in data.classes]
        table = unit(unit(np.array(texts)).mean(axis=1))
        right = (unit(pooled) @ table.T).argmax(axis=1) == data.labels
        assert found.results["scores"][f"{prefix}acc1"]["score"] == pytest.approx(100 * right.mean())
        recall = np.mean([right[np.equal(data.labels, c)].mean() for c in range(len(data.classes))])
        assert found.results["scores"][f"{prefix}mean_per_class_recall"]["score"] == pytest.approx(100 * recall)
    after = task.evaluate(Fake(3))
    for metric, s in task.compare(found, after)["scores"].items():
        change = after.results["scores"][metric]["score"] - found.results["scores"][metric]["score"]
        assert s["difference"] == pytest.approx(change) and (s["mcnemar"] is None) == metric.endswith("recall")


def test_bad_folders_are_refused(tmp_path):
    ids = robustness.wnids()
    root = write(tmp_path / "x", [ids[0], ids[1]])
    for path, says in (
        ("a", "must read SET=FOLDER"),
        (f"b={root}", "must read SET=FOLDER"),
        (f"a={root},a={root}", "names a set twice"),
        (f"a={root}/none", "is not a folder"),
        (f"v2={root}", "n01440764 is not named after a label"),
        (f"objectnet={root}", "has no mappings/folder_to_objectnet_label.json"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(tmp_path, path)
    with pytest.raises(UserError, match="has 2 classes, ImageNet-A has 200.*allow_partial"):
        prepare(tmp_path, f"a={root}", allow_partial=False)
    (root / "n1").mkdir()
    with pytest.raises(UserError, match="n1 is not named after a WordNet id"):
        prepare(tmp_path, f"r={root}")
    (root / "n1").rename(root / ids[2])
    with pytest.raises(UserError, match=f"{ids[2]} has no image"):
        prepare(tmp_path, f"r={root}")
