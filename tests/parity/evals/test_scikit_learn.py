"""Zero-shot classification against scikit-learn's metrics, on random embeddings."""

from types import SimpleNamespace

import numpy as np
import pytest
from eval_data import encoded, patch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from diva_jax.common.fields import default_of
from diva_jax.evals import Settings
from diva_jax.evals.tasks import zeroshot

LABELS = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 5]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learns(tmp_path, seed):
    for i, label in enumerate(LABELS):
        path = tmp_path / "pictures" / f"n{label}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(patch(i)))
    (tmp_path / "templates.json").write_text('["a {c}"]')
    section = default_of(zeroshot)
    section.templates = str(tmp_path / "templates.json")
    task = zeroshot.prepare(str(tmp_path / "pictures"), section, Settings(bootstrap=50))
    rng = np.random.default_rng(seed)
    images, classes = rng.standard_normal((len(LABELS), 9)), rng.standard_normal((6, 9))
    assert task.texts == [f"a n{i}" for i in range(6)]
    model = SimpleNamespace(label="x", images=lambda read, count: {"pooled": images}, texts=lambda texts: classes)
    scores = {k: v["score"] / 100 for k, v in task.evaluate(model).results["scores"].items()}
    logits = images @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
    assert scores["acc1"] == pytest.approx(np.mean(logits.argmax(1) == LABELS))
    assert scores["acc5"] == pytest.approx(top_k_accuracy_score(LABELS, logits, k=5))
    assert scores["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(LABELS, logits.argmax(1)))
