"""Intervals against plain resampling, and the McNemar test against enumeration."""

import itertools

import numpy as np
import pytest

from diva_jax.evals import stats


def plain(values, resamples, strata=None, clusters=None):
    """The textbook bootstrap: means of drawn indices."""
    rng, means = np.random.default_rng(1), []
    values = np.asarray(values, float)
    for _ in range(resamples):
        if clusters is not None:
            names = np.unique(clusters)
            chosen = [np.flatnonzero(clusters == c) for c in rng.choice(names, len(names))]
            means.append(values[np.concatenate(chosen)].mean())
        elif strata is not None:
            parts = [values[strata == s] for s in np.unique(strata)]
            means.append(np.mean([rng.choice(p, len(p)).mean() for p in parts]))
        else:
            means.append(rng.choice(values, len(values)).mean())
    return np.quantile(means, (0.025, 0.975))


@pytest.mark.parametrize("kind", ["plain", "strata", "clusters", "shares"])
def test_interval_equals_plain_resampling(kind):
    rng = np.random.default_rng(0)
    values = rng.random(90) if kind == "shares" else rng.random(90) < 0.3
    kw = {}
    if kind == "strata":  # Unequal strata: the mean of their means is not the mean.
        kw["strata"] = np.repeat([0, 1, 2], (10, 20, 60))
        values = rng.random(90) < np.array([0.9, 0.5, 0.1])[kw["strata"]]
    if kind == "clusters":  # The items of a cluster are equal: the interval is wider than for single items.
        kw["clusters"] = np.repeat(np.arange(18), 5)
        values = (rng.random(18) < 0.4)[kw["clusters"]]
    ours = stats.bootstrap(values, resamples=20_000, seed=0, **kw)
    np.testing.assert_allclose(ours, plain(values, 4000, **kw), atol=0.015)
    assert ours == stats.bootstrap(values, resamples=20_000, seed=0, **kw)
    if kind == "clusters":
        single = stats.bootstrap(values, resamples=20_000, seed=0)
        assert ours[1] - ours[0] > 1.5 * (single[1] - single[0])


def test_mean_is_exact_and_ignores_the_order():
    values = np.array([1e16, 1.0, -1e16] * 5)
    assert stats.mean(values) == stats.mean(values[::-1]) == 5 / 15
    strata = np.array([0, 0, 0, 1])
    assert stats.mean(np.array([1, 0, 1, 1]), strata) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("won, lost", [(0, 0), (3, 0), (5, 2), (4, 4), (1, 9)])
def test_mcnemar_counts_every_split(won, lost):
    before = np.array([False] * won + [True] * lost + [True, False, True])
    after = np.array([True] * won + [False] * lost + [True, False, True])
    n = won + lost
    splits = [abs(sum(s) - n / 2) for s in itertools.product((0, 1), repeat=n)]
    p = np.mean([s >= abs(won - n / 2) for s in splits])
    assert stats.mcnemar(before, after) == {"won": won, "lost": lost, "p": pytest.approx(p)}
