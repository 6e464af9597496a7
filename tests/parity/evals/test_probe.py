"""The linear probe against scikit-learn's regression, the search against CLIP_benchmark's, kNN against torch."""

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import linear_probe
from helpers import close
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from diva_jax.evals import linear


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_fit_is_scikit_learns_logistic_regression(decay):
    x, y = load_digits(return_X_y=True)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    train, test = slice(0, 700), slice(700, 1100)
    oracle = LogisticRegression(C=1 / (decay * 700), tol=1e-8, max_iter=5000).fit(x[train], y[train])
    weights, biases = linear.fit(x[train], y[train], 10, decay, 1000)
    want = oracle.decision_function(x[test])
    got = x[test] @ weights + biases
    # The softmax does not change with a common offset of the biases.
    want, got = (z - z.mean(axis=1, keepdims=True) for z in (want, got))
    close(got, want, 2e-3)
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.997


@pytest.mark.parametrize("seed", range(8))
def test_search_is_clip_benchmarks(seed, monkeypatch):
    """Its loop over its own `find_peak`, with the accuracy of each weight decay given."""
    accuracies = np.random.default_rng(seed).integers(1, 9, 97) / 10
    monkeypatch.setattr(linear_probe, "train", lambda a, b, c, weight_decay, *rest: weight_decay)
    by_decay = dict(zip(linear.DECAYS.tolist(), accuracies, strict=True))
    monkeypatch.setattr(linear_probe, "infer", lambda model, *rest: (torch.tensor(by_decay[model]),) * 2)
    monkeypatch.setattr(linear_probe, "accuracy", lambda logits, target, topk: [float(logits)])
    decays = linear.DECAYS.tolist()

    def find(numbers):
        return linear_probe.find_peak(decays, numbers, *[None] * 9, seed)

    best, span = find(range(0, 97, 16)), 8
    np.testing.assert_allclose(np.logspace(-6, 2, 7), linear.DECAYS[::16])
    while span > 0:
        best = find([max(best - span, 0), best, min(best + span, 96)])
        span //= 2
    assert linear.search(lambda i: accuracies[i]) == best


def test_neighbours_are_dinos():
    """The votes as DINO's eval_knn.py computes them."""
    rng = np.random.default_rng(0)
    x, q = (
        z / np.linalg.norm(z, axis=1, keepdims=True)
        for z in (rng.standard_normal((90, 7)), rng.standard_normal((31, 7)))
    )
    y = rng.integers(0, 6, 90)
    similarity, nearest = torch.tensor(q @ x.T).topk(20, largest=True, sorted=True)
    hot = torch.nn.functional.one_hot(torch.tensor(y)[nearest], 6)
    votes = (hot * similarity.div(0.07).exp()[..., None]).sum(1)
    got = linear.neighbours(q, x, y, 6, 20, 0.07)
    want = votes / votes.sum(1, keepdim=True)
    np.testing.assert_allclose(got / got.sum(axis=1, keepdims=True), want, rtol=1e-4, atol=1e-7)
