"""Drift, retrieval and the shifts of ImageNet: scores by hand, ties, layouts of data, bad data."""

from types import SimpleNamespace

import numpy as np
import pytest
import trees
from eval_data import FakeModel, encoded, evaluated, patch, prepared, unit, write_image

from diva_jax.data import images
from diva_jax.evals.tasks import drift, judge, retrieval, robustness, zeroshot

COUNT, DIM = 40, 12


class Given(FakeModel):
    def __init__(self, embeddings, label="fake"):
        super().__init__()
        self.draw, self.label = lambda *shape: embeddings, label


@pytest.mark.parametrize(
    "mode, there", [("squash", "squash"), ("shortest:40", "shortest:60"), ("squash:44", "squash:66")]
)
def test_the_judge_sees_the_part_of_the_image_that_the_encoder_sees(mode, there):
    """At the resolution of its own VAE: 48 pixels, where the encoder's images have 32."""
    spec = SimpleNamespace(image_size=32, resize_mode=mode, interpolation="bicubic")
    objective, image = SimpleNamespace(image_size=48, spec=spec), patch(3).resize((90, 70))
    task = SimpleNamespace(program=SimpleNamespace(objective=objective), _read=lambda i: image)
    np.testing.assert_array_equal(judge.Judge._pixels(task, 0), images.prepare(image, 48, there, "bicubic"))


def test_drift_of_what_is_unmoved_turned_and_moved(tmp_path):
    for i in range(COUNT):
        write_image(tmp_path / f"{i % 3}" / f"{i}.png", i)
    task = prepared("drift", tmp_path, neighbours=5)
    embeddings = np.random.default_rng(0).standard_normal((COUNT, DIM)) + 0.5

    def compared(after, label="fake"):
        return task.compare(task.evaluate(Given(embeddings)), task.evaluate(Given(after, label)))

    found = compared(7 * embeddings, "scaled")
    assert found["scores"]["cosine"]["score"] == pytest.approx(1)
    assert found["scores"]["knn_overlap"] == {"score": 100, "interval": [100, 100]}
    assert found["scores"]["effective_rank"]["difference"] == pytest.approx(0)
    assert len(found["rows"]) == 2 * COUNT and found["rows"][0]["weights"] == "scaled"
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((DIM, DIM)))
    found = compared(embeddings @ turn)["scores"]  # As a whole, which keeps the neighbours.
    assert found["knn_overlap"]["score"] == 100 and found["cosine"]["score"] < 0.6
    moved = np.random.default_rng(2).standard_normal((COUNT, DIM))
    found = compared(moved)["scores"]
    near = [np.argsort(-unit(x) @ unit(x).T + 9 * np.eye(COUNT), axis=1)[:, :5] for x in (embeddings, moved)]
    kept = [len(set(a) & set(b)) / 5 for a, b in zip(*near, strict=True)]
    assert found["cosine"]["score"] == pytest.approx((unit(embeddings) * unit(moved)).sum(1).mean())
    assert found["knn_overlap"]["score"] == pytest.approx(100 * np.mean(kept))
    for metric in ("cosine", "knn_overlap"):
        low, high = found[metric]["interval"]
        assert low < found[metric]["score"] < high


def test_effective_rank():
    rng = np.random.default_rng(3)
    assert drift.effective_rank(np.eye(8)) == pytest.approx(8)
    assert drift.effective_rank(np.outer(rng.standard_normal(50), rng.standard_normal(9))) == pytest.approx(1, abs=1e-6)
    assert 8.5 < drift.effective_rank(rng.standard_normal((400, 9))) <= 9
    assert drift.effective_rank(rng.standard_normal((400, 9)) * np.geomspace(1, 1e-3, 9)) < 4
    # Collapsed to a point, except for noise.
    assert drift.effective_rank(1 + 1e-6 * rng.standard_normal((400, 9))) < 1.001


CAPTIONED = 23
CAPTIONS = [[f"caption {j} of {i}" for j in range(1 + i % 5)] for i in range(CAPTIONED)]


def test_captions_of_an_image_belong_together(tmp_path):
    """Recalls are compared with clip_benchmark's in tests/parity."""
    rows = [(f"{i}.png", caption, "x") for i, captions in enumerate(CAPTIONS) for caption in captions]
    table = dict(zip(("image", "caption", "note"), zip(*rows, strict=True), strict=True))
    trees.change(tmp_path, {f"{i}.png": encoded(patch(i)) for i in range(CAPTIONED)} | {"captions.csv": table})
    task = prepared("retrieval", tmp_path / "captions.csv")
    assert task.count == CAPTIONED and task.texts == [c for captions in CAPTIONS for c in captions]
    model, found, compared = evaluated(task)
    assert model.sizes[0] == [patch(i).size for i in range(CAPTIONED)]
    assert len(found.rows) == len(task.texts) + CAPTIONED
    # The captions of one image are not independent, which McNemar's test assumes.
    assert all((s["mcnemar"] is None) == metric.startswith("image") for metric, s in compared["scores"].items())


def test_ranks_among_equals_and_of_what_is_not_finite():
    answers = np.ones((6, 2))
    right = np.zeros((2, 6), bool)
    right[0, [3, 5]] = right[1, 0] = True
    np.testing.assert_array_equal(retrieval.ranks(np.ones((2, 2)), answers, right), [3, 0])
    # An encoder that has collapsed to one point retrieves by chance.
    n = 300
    found = retrieval.ranks(np.ones((n, 2)), np.ones((n, 2)), np.eye(n, dtype=bool))
    np.testing.assert_array_equal(found, np.arange(n))
    right = np.eye(3, dtype=bool)
    answers = np.eye(3)
    np.testing.assert_array_equal(retrieval.ranks(np.full((3, 3), np.nan), answers, right), [3, 3, 3])
    # A wrong answer whose score is not finite is ahead of the right one.
    answers[1, 0] = np.nan
    np.testing.assert_array_equal(retrieval.ranks(np.eye(3), answers, right), [1, 3, 1])


NAMES = zeroshot.imagenet("classes")
IDS = zeroshot.imagenet("wnids")


def write(root, folders):
    for n, folder in enumerate(folders):
        for i in range(1 + n % 3):
            write_image(root / folder / f"{i}.png", 7 * n + i)
    return root


def test_classes_are_those_of_numbers_wnids_and_objectnets_overlap(tmp_path):
    """Sorted as text, 10 and 100 would come before 2; of two of the sets tests/parity has timm's indices."""
    found = robustness.read_set("v2", write(tmp_path / "numbers", ["2", "10", "100", "0"]), True)
    assert found.classes == [NAMES[i] for i in (0, 2, 10, 100)]
    by_folder = {n.split("/")[0]: found.classes[t] for n, t in zip(found.names, found.targets, strict=True)}
    assert by_folder == {str(i): NAMES[i] for i in (0, 2, 10, 100)}
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n15075141": "toilet paper"}
    assert {wnid: NAMES[IDS.index(wnid)] for wnid in known} == known
    write(tmp_path / "wnids", [IDS[900], IDS[3], IDS[40]])
    for name in ("a", "r", "sketch"):
        found = robustness.read_set(name, tmp_path / "wnids", True)
        assert found.classes == [NAMES[3], NAMES[40], NAMES[900]] and set(found.targets) == {0, 1, 2}
    found = robustness.read_set("objectnet", write_objectnet(tmp_path / "objectnet"), True)
    assert found.classes == ["alarm clock", "backpack"]
    assert [n.split("/")[0] for n in found.names] == ["alarm_clock"] * 2 + ["backpack"] * 3
    np.testing.assert_array_equal(np.asarray(found.read(0)), np.asarray(patch(7))[2:-2, 2:-2])


def write_objectnet(root):
    titles = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "backpack": "Backpack"}
    write(root / "images", titles)
    overlap = {"Backpack": "backpack, back pack", "Alarm clock": "analog clock; digital clock"}
    mappings = {"folder_to_objectnet_label": titles, "objectnet_to_imagenet_1k": overlap}
    trees.change(root, {f"mappings/{name}.json": content for name, content in mappings.items()})
    return root


def test_each_set_is_classified_among_its_own_classes(tmp_path):
    (templates := tmp_path / "templates.json").write_text('["a {c}", "the {c}."]')
    write(tmp_path / "a", IDS[5:9]), write_objectnet(tmp_path / "o")
    sets = f"a={tmp_path}/a,objectnet={tmp_path}/o"
    task = prepared("robustness", sets, allow_partial=True, templates=str(templates))
    model, found, compared = evaluated(task)
    for (prefix, data), pooled in zip(task.classified.items(), model.pooled, strict=True):
        texts = [[model.words[f"a {c}"], model.words[f"the {c}."]] for c in data.classes]
        right = (unit(pooled) @ unit(unit(np.array(texts)).mean(axis=1)).T).argmax(axis=1) == data.labels
        assert found.results["scores"][f"{prefix}acc1"]["score"] == pytest.approx(100 * right.mean())
    assert all((s["mcnemar"] is None) == metric.endswith("recall") for metric, s in compared["scores"].items())
