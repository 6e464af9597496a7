"""Zero-shot classification: metrics, and every layout of data, valid and invalid."""

import io
import json

import numpy as np
import pytest
from eval_data import encoded, patch
from records import write_tar

from diva_jax.common.errors import UserError
from diva_jax.common.fields import default_of
from diva_jax.evals import Settings
from diva_jax.evals.tasks import zeroshot

NAMES = ["cat", "small dog", "bird", "cow", "fish", "ant"]
LABELS = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 5]


def prepare(path, **options):
    section = default_of(zeroshot)
    section.update(options)
    return zeroshot.prepare(str(path), section, Settings(bootstrap=1000))


@pytest.fixture
def folders(tmp_path):
    for i, label in enumerate(LABELS):
        path = tmp_path / "pictures" / f"n{label:02d}" / "deep" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(patch(i)))
    (tmp_path / "pictures" / "classnames.txt").write_text("\n".join(NAMES))
    return tmp_path / "pictures"


def write_tars(root, labels=LABELS, **extra):
    (root / "test").mkdir(parents=True)
    for shard in (0, 1, 10):  # 10 comes after 1, not before.
        rows = {0: range(5), 1: range(5, 9), 10: range(9, len(labels))}[shard]
        members = {}
        for i in rows:
            members |= {
                f"x/{i}.cls": str(labels[i]).encode(),
                f"x/{i}.seg.png": b"other",
                f"x/{i}.webp": encoded(patch(i), "WEBP"),
            }
        write_tar(root / "test" / f"{shard}.tar", members | extra)
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}.\n")
    return root


class Fake:
    label = "fake"

    def __init__(self, task, seed=0):
        rng = np.random.default_rng(seed)
        self.pooled = rng.standard_normal((task.count, 9))
        self.by_text = {t: rng.standard_normal(9) for t in task.texts}

    def images(self, read, count):
        assert read(count - 1).mode == "RGB"
        return {"pooled": self.pooled}

    def texts(self, texts):
        return np.stack([self.by_text[t] for t in texts])


def test_scores_by_hand(folders):
    """tests/parity has the same against scikit-learn."""
    task = prepare(folders)
    assert task.count == 13 and list(task.images.targets) == LABELS and len(task.texts) == 6 * 80
    assert task.texts[80] == "a bad photo of a small dog."
    model = Fake(task)
    found = task.evaluate(model)
    scores = {k: v["score"] / 100 for k, v in found.results["scores"].items()}

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    classes = [
        unit(unit(np.stack([model.by_text[t.replace("{c}", n)] for t in zeroshot.imagenet("templates")])).mean(0))
        for n in NAMES
    ]
    logits = unit(model.pooled) @ np.stack(classes).T
    right = logits.argmax(1) == LABELS
    recalls = [right[np.equal(LABELS, c)].mean() for c in range(len(NAMES))]
    assert scores["acc1"] == pytest.approx(right.mean())
    assert scores["acc5"] == pytest.approx(
        np.mean([label != np.argmin(x) for label, x in zip(LABELS, logits, strict=True)])
    )
    assert scores["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert [r["predicted"] for r in found.rows] == [NAMES[c] for c in logits.argmax(1)]
    assert found.rows[3]["truth"] == "small dog" and found.rows[3]["file"] == "n01/deep/003.png"
    for s in found.results["scores"].values():
        assert s["interval"][0] <= s["score"] <= s["interval"][1]


def test_comparison(folders):
    task = prepare(folders)
    before, after = task.evaluate(Fake(task, 0)), task.evaluate(Fake(task, 1))
    found = task.compare(before, after)["scores"]
    for metric, s in found.items():
        change = after.results["scores"][metric]["score"] - before.results["scores"][metric]["score"]
        assert s["difference"] == pytest.approx(change)
    assert found["acc1"]["mcnemar"]["won"] == (after.held[""][:, 0] & ~before.held[""][:, 0]).sum()
    assert found["mean_per_class_recall"]["mcnemar"] is None


def test_scores_that_are_not_finite_are_wrong(folders):
    task = prepare(folders)
    model = Fake(task)
    model.pooled[:2] = np.nan
    found = task.evaluate(model)
    assert not found.held[""][:2].any()


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
    for spec in ("tfds:labelled", f"tfds:labelled/test?data_dir={tfds_dir}&where=x"):
        with pytest.raises(UserError, match="must read tfds:name/split"):
            prepare(spec)
    for spec in (
        "tfds:labelled/train?data_dir={}",
        "tfds:labelled/test?label=x&data_dir={}",
        "tfds:none/test?data_dir={}",
    ):
        with pytest.raises(UserError, match="cannot be read"):
            prepare(spec.format(tfds_dir))


def test_names_and_prompts_from_json(folders, tmp_path):
    def written(value):
        path = tmp_path / "names.json"
        path.write_text(json.dumps(value))
        return str(path)

    (folders / "classnames.txt").unlink()
    assert prepare(folders).classes == [f"n{i:02d}" for i in range(6)]
    assert prepare(folders, classes=written(NAMES)).classes == NAMES
    by_folder = {f"n{i:02d}": name for i, name in enumerate(NAMES)}
    assert prepare(folders, classes=written(by_folder)).classes == NAMES
    assert len(prepare(folders, classes="imagenet").classes) == 1000
    task = prepare(folders, templates=written(["one {c}"]))
    assert task.texts[1] == "one n01"
    task = prepare(folders, templates=written({f"n{i:02d}": ["has fur"] * (i + 1) for i in range(6)}))
    assert task._sizes == [1, 2, 3, 4, 5, 6]
    for classes, says in (
        (NAMES[:3], "3 class names, but labels from 0 to 5"),
        ({"n00": "cat"}, "no name for n01, n02"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(folders, classes=written(classes))
    with pytest.raises(UserError, match="cannot be read as"):
        prepare(folders, classes=str(tmp_path / "none.json"))
    for templates, says in (
        (["a photo"], "has no {c}"),
        ({"n00": ["x"]}, "has no prompts for n01"),
        ([], "must hold a list"),
        ([1], "must hold a list"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(folders, templates=written(templates))


def test_imagenets_prompts_and_names():
    assert len(zeroshot.imagenet("templates")) == 80 and len(set(zeroshot.imagenet("classes"))) >= 998
    assert all("{c}" in t for t in zeroshot.imagenet("templates"))


def broken_tars(tmp_path, case):
    root = write_tars(tmp_path / "tars", labels=["x" if case == "label" else c for c in LABELS])
    if case == "image":
        write_tar(root / "test" / "1.tar", {"0.cls": b"1"})
    if case == "target":
        write_tar(root / "test" / "1.tar", {"0.png": encoded(patch(0))})
    if case == "tar":
        (root / "test" / "1.tar").write_bytes(b"x" * 2000)
    if case == "shard":
        (root / "test" / "nshards.txt").write_text("4")
    if case == "names":
        (root / "classnames.txt").unlink()
    if case == "label out of range":
        write_tar(root / "test" / "1.tar", {"0.cls": b"6", "0.png": encoded(patch(0))})
    return root


@pytest.mark.parametrize(
    "case, says",
    [
        ("image", "1.tar: the sample at byte 512 lacks an image"),
        ("target", "1.tar: the sample at byte 512 lacks a .cls member"),
        ("label", "0.tar: .cls holds 'x'"),
        ("tar", "1.tar cannot be read as a tar archive"),
        ("shard", "counts 4 shards, but 2.tar is missing"),
        ("names", "the data names no classes"),
        ("label out of range", "6 class names, but labels from 0 to 6"),
    ],
)
def test_broken_tars_are_refused(tmp_path, case, says):
    with pytest.raises(UserError, match=says):
        prepare(broken_tars(tmp_path, case))


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        prepare(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither tar shards nor a folder of images"):
        prepare(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="a has no image in it"):
        prepare(tmp_path)
    (tmp_path / "a" / "1.png").write_bytes(b"broken")
    task = prepare(tmp_path)
    with pytest.raises(UserError, match=r"the image .*1.png cannot be read"):
        task.images.read(0)
