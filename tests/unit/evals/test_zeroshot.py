"""Zero-shot classification: metrics, and every layout of data, valid and invalid."""

import io
import json
from functools import partial

import numpy as np
import pytest
from eval_data import FakeModel, encoded, evaluated, patch, prepared, unit, write_class_folders
from records import write_tar

from diva_jax.common.errors import UserError
from diva_jax.evals.tasks import zeroshot

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
    """tests/parity has the same against scikit-learn."""
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


def test_scores_that_are_not_finite_are_wrong(folders):
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


def test_fewer_than_five_classes_have_no_acc5(tmp_path):
    root = write_tars(tmp_path / "tars", labels=[i % 4 for i in LABELS])
    (root / "classnames.txt").write_text("a\nb\nc\nd\n")
    assert set(prepare(root).metrics) == {"acc1", "mean_per_class_recall"}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    import tensorflow_datasets as tfds

    class Labelled(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=NAMES),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for i, label in enumerate(LABELS):
                yield i, {"image": io.BytesIO(encoded(patch(i))), "label": label}

    folder = tmp_path_factory.mktemp("tfds")
    Labelled(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_dir):
    task = prepare(f"tfds:labelled/test?data_dir={tfds_dir}")
    assert sorted(task.images.targets) == LABELS and task.classes == NAMES
    sizes = sorted(task.images.read(i).size for i in range(task.count))
    assert sizes == sorted(patch(i).size for i in range(len(LABELS)))
    for spec, says in (
        ("tfds:labelled", "must read tfds:name/split"),
        ("tfds:labelled/test?data_dir={}&where=x", "must read tfds:name/split"),
        ("tfds:labelled/train?data_dir={}", "cannot be read"),
        ("tfds:labelled/test?label=x&data_dir={}", "cannot be read"),
        ("tfds:none/test?data_dir={}", "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(spec.format(tfds_dir))


def test_names_and_prompts_from_json(folders, tmp_path):
    def written(value):
        path = tmp_path / "names.json"
        path.write_text(json.dumps(value))
        return str(path)

    (folders / "classnames.txt").unlink()
    assert prepare(folders).classes == [f"n{i:02d}" for i in range(6)]
    by_folder = {f"n{i:02d}": name for i, name in enumerate(NAMES)}
    for given in (NAMES, by_folder):
        assert prepare(folders, classes=written(given)).classes == NAMES
    assert prepare(folders, templates=written(["one {c}"])).texts[1] == "one n01"
    task = prepare(folders, templates=written({f"n{i:02d}": ["has fur"] * (i + 1) for i in range(6)}))
    assert task._sizes == [1, 2, 3, 4, 5, 6]
    for option, value, says in (
        ("classes", NAMES[:3], "3 class names, but labels from 0 to 5"),
        ("classes", {"n00": "cat"}, "no name for n01, n02"),
        ("templates", ["a photo"], "has no {c}"),
        ("templates", {"n00": ["x"]}, "has no prompts for n01"),
        ("templates", [], "must hold a list"),
        ("templates", [1], "has 1 at 0, where it must hold a text"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(folders, **{option: written(value)})
    with pytest.raises(UserError, match="cannot be read as"):
        prepare(folders, classes=str(tmp_path / "none.json"))


def test_imagenets_prompts_and_names():
    assert len(zeroshot.imagenet("templates")) == 80 and len(set(zeroshot.imagenet("classes"))) >= 998
    assert all("{c}" in t for t in zeroshot.imagenet("templates"))


BROKEN_TARS = {
    "1.tar: the sample at byte 512 lacks an image": {"0.cls": b"1"},
    "1.tar: the sample at byte 512 lacks a .cls member": {"0.png": encoded(patch(0))},
    "1.tar: '0.cls' cannot be used .invalid literal": {"0.cls": b"x", "0.png": encoded(patch(0))},
    "6 class names, but labels from 0 to 6": {"0.cls": b"6", "0.png": encoded(patch(0))},
}


def test_broken_tars_are_refused(tmp_path):
    root = write_tars(tmp_path / "tars")
    for says, members in BROKEN_TARS.items():
        write_tar(root / "test" / "1.tar", members)
        with pytest.raises(UserError, match=says):
            prepare(root)
    (root / "test" / "1.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="1.tar cannot be read as a tar archive"):
        prepare(root)
    (root / "test" / "1.tar").unlink()
    (root / "test" / "nshards.txt").write_text("4")
    with pytest.raises(UserError, match="counts 4 shards, but 1.tar is missing"):
        prepare(root)
    (root / "test" / "nshards.txt").unlink()
    (root / "classnames.txt").unlink()
    with pytest.raises(UserError, match="the data names no classes"):
        prepare(root)


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        prepare(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither tar shards nor a folder of images"):
        prepare(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="a has no image in it"):
        prepare(tmp_path)
    (tmp_path / "a" / "1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"the image .*1.png cannot be read"):
        prepare(tmp_path).images.read(0)
