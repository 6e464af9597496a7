"""Shifts of ImageNet: labels by number and by WordNet id, class subsets, ObjectNet's mapping files, bad folders."""

import json
from functools import partial

import numpy as np
import pytest
from eval_data import evaluated, patch, prepared, unit, write_image
from helpers import refused

from diva_jax.evals.tasks import robustness, zeroshot

NAMES = zeroshot.imagenet("classes")
IDS = zeroshot.imagenet("wnids")


def write(root, folders):
    for n, folder in enumerate(folders):
        for i in range(1 + n % 3):
            write_image(root / folder / f"{i}.png", 7 * n + i)
    return root


@pytest.fixture
def prepare(tmp_path):
    (tmp_path / "templates.json").write_text('["a {c}", "the {c}."]')
    return partial(prepared, "robustness", allow_partial=True, templates=str(tmp_path / "templates.json"))


def test_labels_are_the_folders_numbers(tmp_path):
    """Sorted as text, 10 and 100 would come before 2."""
    found = robustness.read_set("v2", write(tmp_path, ["2", "10", "100", "0"]), True)
    assert found.classes == [NAMES[i] for i in (0, 2, 10, 100)]
    by_folder = {n.split("/")[0]: found.classes[t] for n, t in zip(found.names, found.targets, strict=True)}
    assert by_folder == {str(i): NAMES[i] for i in (0, 2, 10, 100)}


def test_wnids_give_the_subset_in_imagenets_order(tmp_path):
    assert len(IDS) == len(set(IDS)) == 1000 and sorted(IDS) == IDS
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n15075141": "toilet paper"}
    assert {wnid: NAMES[IDS.index(wnid)] for wnid in known} == known
    write(tmp_path, [IDS[900], IDS[3], IDS[40]])
    for name in ("a", "r", "sketch"):
        found = robustness.read_set(name, tmp_path, True)
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
    np.testing.assert_array_equal(np.asarray(found.read(0)), np.asarray(patch(7))[2:-2, 2:-2])


def test_scores_by_hand_among_the_sets_own_classes(tmp_path, prepare):
    write(tmp_path / "a", IDS[5:9]), write_objectnet(tmp_path / "o")
    task = prepare(f"a={tmp_path}/a,objectnet={tmp_path}/o")
    model, found, compared = evaluated(task)
    for (prefix, data), pooled in zip(task.classified.items(), model.pooled, strict=True):
        texts = [[model.words[f"a {c}"], model.words[f"the {c}."]] for c in data.classes]
        right = (unit(pooled) @ unit(unit(np.array(texts)).mean(axis=1)).T).argmax(axis=1) == data.labels
        assert found.results["scores"][f"{prefix}acc1"]["score"] == pytest.approx(100 * right.mean())
        recall = np.mean([right[np.equal(data.labels, c)].mean() for c in range(len(data.classes))])
        assert found.results["scores"][f"{prefix}mean_per_class_recall"]["score"] == pytest.approx(100 * recall)
    assert all((s["mcnemar"] is None) == metric.endswith("recall") for metric, s in compared["scores"].items())


def test_bad_folders_are_refused(tmp_path, prepare):
    root = write(tmp_path / "x", [IDS[0], IDS[1]])
    for path, says in (
        ("a", "must read SET=FOLDER"),
        (f"b={root}", "must read SET=FOLDER"),
        (f"a={root},a={root}", "names a set twice"),
        (f"a={root}/none", "is not a folder"),
        (f"v2={root}", "n01440764 is not named after a label"),
        (f"objectnet={root}", "has no mappings/folder_to_objectnet_label.json"),
    ):
        refused(says, prepare, path)
    refused("has 2 classes, ImageNet-A has 200.*allow_partial", prepare, f"a={root}", allow_partial=False)
    (root / "n1").mkdir()
    refused("n1 is not named after a WordNet id", prepare, f"r={root}")
    (root / "n1").rename(root / IDS[2])
    refused(f"{IDS[2]} has no image", prepare, f"r={root}")
