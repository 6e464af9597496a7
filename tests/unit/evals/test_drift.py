"""Drift of an unchanged encoder, a changed one, and one that has collapsed."""

from functools import partial

import numpy as np
import pytest
from eval_data import FakeModel, prepared, unit, write_image
from helpers import refused

from diva_jax.evals.tasks import drift

COUNT, DIM = 40, 12

prepare = partial(prepared, "drift", neighbours=5)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("drift")
    for i in range(COUNT):
        write_image(root / f"{i % 3}" / f"{i}.png", i)
    return prepare(root)


class Given(FakeModel):
    """A model with these embeddings."""

    def __init__(self, embeddings, label="fake"):
        super().__init__()
        self.draw, self.label = lambda count: embeddings, label


@pytest.fixture(scope="module")
def embeddings():
    return np.random.default_rng(0).standard_normal((COUNT, DIM)) + 0.5


def test_unmoved(task, embeddings):
    before, after = task.evaluate(Given(embeddings)), task.evaluate(Given(7 * embeddings, "scaled"))
    found = task.compare(before, after)
    assert found["scores"]["cosine"]["score"] == pytest.approx(1)
    assert found["scores"]["knn_overlap"] == {"score": 100, "interval": [100, 100]}
    assert found["scores"]["effective_rank"]["difference"] == pytest.approx(0)
    assert len(found["rows"]) == 2 * COUNT and found["rows"][0]["weights"] == "scaled"


def test_turned_as_a_whole_keeps_its_neighbours(task, embeddings):
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((DIM, DIM)))
    found = task.compare(task.evaluate(Given(embeddings)), task.evaluate(Given(embeddings @ turn)))["scores"]
    assert found["knn_overlap"]["score"] == 100 and found["cosine"]["score"] < 0.6


def test_moved(task, embeddings):
    moved = np.random.default_rng(2).standard_normal((COUNT, DIM))
    found = task.compare(task.evaluate(Given(embeddings)), task.evaluate(Given(moved)))["scores"]

    def near(x):
        return [
            set(sorted(range(COUNT), key=lambda j: -unit(x)[i] @ unit(x)[j] + 9 * (i == j))[:5]) for i in range(COUNT)
        ]

    kept = [len(a & b) / 5 for a, b in zip(near(embeddings), near(moved), strict=True)]
    cosines = (unit(embeddings) * unit(moved)).sum(1)
    assert found["cosine"]["score"] == pytest.approx(cosines.mean())
    assert found["knn_overlap"]["score"] == pytest.approx(100 * np.mean(kept))
    for metric in ("cosine", "knn_overlap"):
        low, high = found[metric]["interval"]
        assert low < found[metric]["score"] < high


def test_effective_rank():
    rng = np.random.default_rng(3)
    assert drift.effective_rank(np.eye(8)) == pytest.approx(8)
    assert drift.effective_rank(np.outer(rng.standard_normal(50), rng.standard_normal(9))) == pytest.approx(1, abs=1e-6)
    whole = drift.effective_rank(rng.standard_normal((400, 9)))
    assert 8.5 < whole <= 9
    assert drift.effective_rank(rng.standard_normal((400, 9)) * np.geomspace(1, 1e-3, 9)) < 4
    # Collapsed to a point, except for noise.
    assert drift.effective_rank(1 + 1e-6 * rng.standard_normal((400, 9))) < 1.001


def test_bad_folders_are_refused(tmp_path):
    refused("is not a folder", prepare, tmp_path / "none")
    (tmp_path / "a.png").write_bytes(b"")
    refused("has 1 images, too few for 5 neighbours.*--config.eval.drift.neighbours", prepare, tmp_path)
