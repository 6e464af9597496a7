"""Intervals and tests for scores that are means over items, bootstrap and McNemar; and what is right where images and
texts meet, of which docs/EVALUATION.md has the definitions.

Winoground (arXiv 2204.03162) defines the choices of texts and images and the group, "Test-Time Matching" (arXiv
2510.07632) the match. Matches show which images are distinguished, choices also whether cosines are calibrated: both
texts may be a little closer to the same image.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Labels = np.ndarray | None
# Largest number of resampled counts in memory, 32 MB.
_MAX_COUNTS = 2**22


def bootstrap(
    values: np.ndarray, *, resamples: int, seed: int, strata: Labels = None, clusters: Labels = None
) -> list[float]:
    """The 95% percentile bootstrap interval [low, high] of the mean of values [N], in their unit, the same for a seed.

    With `strata`, labels [N], the mean is that of the strata's means, and items are drawn within each: for a benchmark
    with a fixed number of items of each kind. Strata of one item are drawn as one of several. With `clusters`, labels
    [N], whole clusters are drawn: for items that are not independent, such as the captions of one image. The deviations
    of a stratum of n draws are multiplied by sqrt(n / (n - 1)): their variance is (n - 1) / n of that of new items."""
    values = np.asarray(values, np.float64)
    strata = np.zeros(len(values), int) if strata is None else np.unique(strata, return_inverse=True)[1]
    strata = np.where(np.bincount(strata)[strata] == 1, -1, strata)
    rng, parts, shares = np.random.default_rng(seed), [], []
    for stratum in np.unique(strata):
        here = strata == stratum
        shares.append(here.sum() if stratum < 0 else 1)
        sums, counts = values[here], np.ones(here.sum())
        if clusters is not None:
            _, index = np.unique(np.asarray(clusters)[here], return_inverse=True)
            sums, counts = np.bincount(index, sums), np.bincount(index, counts)
        # The number of draws of each distinct cluster is multinomial, so that 50,000 right or wrong answers have the
        # cost of two clusters.
        levels, weights = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
        chunk, means = max(1, _MAX_COUNTS // len(levels)), []
        for start in range(0, resamples, chunk):
            drawn = rng.multinomial(len(sums), weights / len(sums), size=min(chunk, resamples - start))  # [R, levels]
            means.append((drawn @ levels[:, 0]) / (drawn @ levels[:, 1]))
        middle, n = sums.sum() / counts.sum(), len(sums)
        parts.append(middle + (np.concatenate(means) - middle) * (n / max(n - 1, 1)) ** 0.5)
    drawn = np.average(parts, axis=0, weights=shares).clip(values.min(), values.max())
    return [float(q) for q in np.quantile(drawn, (0.025, 0.975))]


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


# Key of each of the four numbers -> its name for readers.
ANSWERS = {"image": "pairs", "text": "texts", "group": "groups", "match": "matches"}
# Decimals to which cosines are rounded, so that the rounding of embeddings and sums does not turn a tie into an answer.
_DECIMALS = 7


def rounded(scores: np.ndarray) -> np.ndarray:
    """Cosines in units of the seventh decimal, float64: sums and comparisons of them are exact."""
    return np.rint(np.asarray(scores, np.float64) * 10**_DECIMALS)


def _chosen(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether in each row the right columns are higher than all others: [..., R, C], bool [R, C] -> bool [...]."""
    return (np.where(right, scores, np.inf).min(axis=-1) > np.where(right, -np.inf, scores).max(axis=-1)).all(axis=-1)


def _matched(scores: np.ndarray) -> np.ndarray:
    """Whether giving text i to image i has a higher sum than any other one-to-one assignment: [..., K, T] -> [...]."""
    from scipy.optimize import linear_sum_assignment  # Here, see `mcnemar`.

    # Scores are whole numbers: the sum must be the highest even with less than one taken off it.
    count, texts = scores.shape[-2:]
    own, handicap = np.arange(count), 0.5 ** count.bit_length() * np.eye(count, texts)
    tables = (scores - handicap).reshape(-1, count, texts)
    best = [linear_sum_assignment(table, maximize=True)[1] for table in tables]
    return np.reshape([np.array_equal(chosen, own) for chosen in best], scores.shape[:-2])


def answers(scores: np.ndarray, right: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Which items are right, bool [...], under scores [..., images, texts], cosines, those that agree to seven decimals
    being equal; a tie is wrong, and so is an item with a score that is not finite.

    `right` are the (image, text) numbers that belong together in all items; every image has a text. "text": for each
    image, its texts score higher than all others. "image": for each text that has an image, its images do. "group":
    both. "match", where every image has one text of its own: they have the highest sum of all assignments."""
    scores = rounded(scores)
    finite = np.isfinite(scores).all(axis=(-2, -1))
    scores = np.where(finite[..., None, None], scores, 0.0)
    mask = np.zeros(scores.shape[-2:], bool)
    mask[tuple(zip(*right, strict=True))] = True
    asked = mask.any(axis=0)  # A text without an image is a wrong alternative.
    out = {
        "image": finite & _chosen(scores[..., asked].swapaxes(-1, -2), mask[:, asked].T),
        "text": finite & _chosen(scores, mask),
    }
    out["group"] = out["image"] & out["text"]
    if one_to_one(right):
        order = [text for _, text in sorted(right)]
        out["match"] = finite & _matched(scores[..., order + [t for t in range(mask.shape[1]) if t not in order]])
    return out


def one_to_one(right: Sequence[tuple[int, int]]) -> bool:
    """Whether every image has one text, which no other has."""
    return all(len(set(numbers)) == len(right) for numbers in zip(*right, strict=True))


def pair_metrics(key: str, **of: str) -> dict[str, dict[str, str]]:
    """The entries of a task's `metrics`: `KEY` counts pairs, `KEY_text`, `KEY_group` and `KEY_match` the rest; `of` has
    the `readout` or `dataset` that the four numbers belong to."""
    (name,) = of.values()
    return {
        key if kind == "image" else f"{key}_{kind}": {"title": f"{what}, {name}", "unit": "%", "answers": kind, **of}
        for kind, what in ANSWERS.items()
    }
