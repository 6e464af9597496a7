"""Intervals and tests for scores that are means over items: bootstrap and McNemar."""

import math
from typing import Any

import numpy as np

# Largest number of resampled counts in memory, 32 MB.
_MAX_COUNTS = 2**22


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap means [resamples] of N clusters with these sums and counts. The number of draws of each *distinct*
    cluster is multinomial, so that 50,000 right or wrong answers have the cost of two clusters."""
    levels, weights = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    n = len(sums)
    chunk = max(1, _MAX_COUNTS // len(levels))
    means = []
    for start in range(0, resamples, chunk):
        drawn = rng.multinomial(n, weights / n, size=min(chunk, resamples - start))  # [R, levels]
        means.append((drawn @ levels[:, 0]) / (drawn @ levels[:, 1]))
    return np.concatenate(means)


def bootstrap(
    values: np.ndarray,
    *,
    resamples: int,
    seed: int,
    strata: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
) -> list[float]:
    """The 95% percentile bootstrap interval [low, high] of the mean of values [N], in their unit, the same for a seed.

    With `strata`, labels [N], the mean is that of the strata's means, and items are drawn within each: for a benchmark
    with a fixed number of items of each kind. With `clusters`, labels [N], whole clusters are drawn: for items that are
    not independent, such as the captions of one image.
    """
    values = np.asarray(values, np.float64)
    strata = np.zeros(len(values), int) if strata is None else np.asarray(strata)
    rng = np.random.default_rng(seed)
    parts = []
    for stratum in np.unique(strata):
        here = strata == stratum
        sums, counts = values[here], np.ones(here.sum())
        if clusters is not None:
            _, index = np.unique(np.asarray(clusters)[here], return_inverse=True)
            sums, counts = np.bincount(index, sums), np.bincount(index, counts)
        parts.append(_resampled_means(sums, counts, resamples, rng))
    return [float(q) for q in np.quantile(np.mean(parts, axis=0), (0.025, 0.975))]


def mean_ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """The mean of the ratios over the classes whose denominator is not 0; [..., C] twice -> [...]; NaN without any."""
    there = denominators > 0
    ratios = np.where(there, numerators / np.where(there, denominators, 1), 0.0)
    with np.errstate(invalid="ignore"):
        return ratios.sum(axis=-1) / there.sum(axis=-1)


def bootstrap_ratios(*pairs: tuple[np.ndarray, np.ndarray], resamples: int, seed: int) -> list[float]:
    """The 95% percentile bootstrap interval [low, high], over items, of a mean ratio of sums such as the mIoU, in
    shares. `pairs` are (numerators, denominators) per item and class, each [N, C]; with two pairs, those of the same
    items before and after, the interval is of the difference."""
    rng = np.random.default_rng(seed)
    n = len(pairs[0][0])
    chunk = max(1, _MAX_COUNTS // n)
    values = []
    for start in range(0, resamples, chunk):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, resamples - start)).astype(np.float64)
        ratios = [mean_ratio(drawn @ a, drawn @ b) for a, b in pairs]
        values.append(ratios[-1] - ratios[0] if len(pairs) > 1 else ratios[0])
    return [float(q) for q in np.nanquantile(np.concatenate(values), (0.025, 0.975))]


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict[str, int | float]:
    """The exact two-sided McNemar test of two models' correct answers, bool [N], on the same items. `won` is the number
    that only `after` has correct, `lost` that only `before` has, `p` the probability of a split at least as uneven if
    each of these were won or lost with probability 1/2 (1 if there are none)."""
    from scipy.stats import binomtest  # Here, because importing it takes a second, which training does not need.

    before, after = np.asarray(before, bool), np.asarray(after, bool)
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {"won": won, "lost": lost, "p": p}


def estimate(values: np.ndarray, *, scale: float = 100.0, **how) -> dict[str, Any]:
    """The mean of values [N] as `score` and its bootstrap `interval`, times `scale`; `strata` as in `bootstrap`."""
    interval = bootstrap(values, **how)
    return {"score": scale * mean(values, how.get("strata")), "interval": [scale * end for end in interval]}


def paired(before: np.ndarray, after: np.ndarray, **how) -> dict[str, Any]:
    """The mean `difference` of two models on the same items, [N], 0 to 1, in percent, and its bootstrap `interval`."""
    change = estimate(np.asarray(after, np.float64) - np.asarray(before, np.float64), **how)
    return {"difference": change["score"], "interval": change["interval"]}


def mean(values: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Computes the mean, or the mean of the strata's means; exact summation makes it independent of the order."""
    values = np.asarray(values, np.float64)
    if strata is None:
        return math.fsum(values) / len(values)
    strata = np.asarray(strata)
    parts = [mean(values[strata == s]) for s in np.unique(strata)]
    return math.fsum(parts) / len(parts)
