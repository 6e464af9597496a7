"""Groups of runs that differ in their seed alone: one set of weights with an interval over items and one over runs; and
the best of several checkpoints of one run, beside what the best of as many would be by chance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diva_jax.evals import ItemTask, Outcome, Settings, Task, stats

# Largest number of random signs in memory, 32 MB.
_MAX_SIGNS = 2**25


def student(after: Sequence[float], before: Sequence[float] = (0.0,)) -> list[float] | None:
    """Student's 95% interval [low, high] of the difference of two means over runs, with Welch's degrees of freedom. A
    side with a single value counts as known exactly; None where no side has two values that differ."""
    from scipy.special import stdtrit

    sides = [np.asarray(side, np.float64) for side in (after, before)]
    variances = [(side.var(ddof=1) / len(side), len(side) - 1) for side in sides if len(side) > 1]
    total, middle = sum(v for v, _ in variances), float(sides[0].mean() - sides[1].mean())
    if total**0.5 <= 1e-9 * max(np.abs(side).max() for side in sides):
        return None
    half = float(stdtrit(total**2 / sum(v**2 / n for v, n in variances), 0.975) * total**0.5)
    return [middle - half, middle + half]


def _items(task: ItemTask, metric: str, members: Sequence[Outcome]) -> tuple[np.ndarray, dict[str, Any]]:
    """The mean over runs of each item's value, and how items are resampled."""
    values = [task.values(metric, outcome.held) for outcome in members]
    return np.mean([v.values for v in values], axis=0), values[0].resampling(task.settings)


def _over_runs(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of a score over runs, which has no interval over items yet."""
    runs = [s["score"] for s in scores]
    return {"score": float(np.mean(runs)), "interval": None, "runs": runs, "runs_interval": student(runs)}


def _shared(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that all have: a run whose gradient is zero has none of the gradient's direction."""
    return [m for m in results[0]["scores"] if all(m in r["scores"] for r in results)]


def outcome(task: Task, members: Sequence[Outcome]) -> dict[str, Any]:
    """The results of a group: the means over its runs of all scores, and of the scores of patterns."""
    results = [m.results for m in members]
    if len(members) == 1:
        return results[0]
    scores = {m: _over_runs([r["scores"][m] for r in results]) for m in _shared(results)}
    if isinstance(task, ItemTask):
        for metric in scores:
            values, how = _items(task, metric, members)
            scores[metric]["interval"] = stats.estimate(values, **how)["interval"]
    patterns = []
    for parts in zip(*(r.get("patterns", []) for r in results), strict=True):
        means = {m: _over_runs([p["scores"][m] for p in parts]) for m in _shared(parts)}
        patterns.append(parts[0] | {"scores": means})
    notes = list(dict.fromkeys(note for r in results for note in r.get("notes", [])))
    return {"scores": scores, "patterns": patterns, "notes": notes}


def compare(task: Task, before: Sequence[Outcome], after: Sequence[Outcome]) -> dict[str, Any]:
    """Compares two groups, of which each may be of one: as `Task.compare`, with `runs` and `runs_interval`."""
    if len(before) == len(after) == 1:
        return task.compare(before[0], after[0])
    cells = [[task.compare(b, a) for b in before] for a in after]
    scores, rows = {}, [values for row in cells for values in row[0].get("rows", [])]
    for metric in _shared([cell for row in cells for cell in row]):
        kind = "difference" if "difference" in cells[0][0]["scores"][metric] else "score"
        table = np.array([[cell["scores"][metric][kind] for cell in row] for row in cells])
        runs = table.mean(axis=1) if len(after) > 1 else table.mean(axis=0)
        sides = [[m.results["scores"][metric]["score"] for m in side] for side in (after, before) if kind != "score"]
        ends = student(*sides) if sides else student(runs)
        scores[metric] = {kind: float(table.mean()), "interval": None, "runs": runs.tolist(), "runs_interval": ends}
        if isinstance(task, ItemTask):
            (was, _), (now, how) = _items(task, metric, before), _items(task, metric, after)
            scores[metric] |= stats.paired(was, now, **how) | {"mcnemar": None}
    return {"scores": scores, "rows": rows}


def largest_by_chance(changes: np.ndarray, clusters: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The largest of K mean changes under the hypothesis that none of them is real, [resamples], from `changes` [K, N],
    what each item adds to each. Before and after are exchanged for each cluster of items (labels [N]), in all K."""
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.stack([np.bincount(index, row) for row in changes], axis=1)  # [clusters, K]
    rng, chunk, out = np.random.default_rng(seed), max(1, _MAX_SIGNS // len(sums)), []
    for start in range(0, resamples, chunk):
        signs = rng.integers(0, 2, (min(chunk, resamples - start), len(sums)), np.int8) * 2.0 - 1
        out.append((signs @ sums).max(axis=1))
    return np.concatenate(out)


def best_notes(
    tasks: Mapping[str, Task], outcomes: Mapping, runs: Mapping[str, Sequence[str]], chosen: bool, settings: Settings
) -> list[str]:
    """A sentence for every run with several checkpoints (workdir -> their labels): with `chosen` about its best, in the
    first task, else that it has no claim. `outcomes` are those of `Evaluator.report`, first those of the reference."""
    several = {run: labels for run, labels in runs.items() if len(labels) > 1}
    if not chosen:
        return [
            f"{run} is given at {len(labels)} checkpoints, and the best of them is no result: name one, or add --best, "
            "which says what the best of them would be by chance"
            for run, labels in several.items()
        ]
    name, task = next(iter(tasks.items()))
    # Checkpoints are compared in the first of matches, else in the first metric.
    metric = next((m for m, info in task.metrics.items() if info.get("answers") == "match"), next(iter(task.metrics)))
    title = f"{task.title}, {task.metrics[metric]['title']}"
    if not isinstance(task, ItemTask):
        return [
            f"{run}: the best of {len(labels)} checkpoints cannot be compared with chance in {title}"
            for run, labels in several.items()
        ]
    reference, how = _items(task, metric, [found[name] for found in next(iter(outcomes.values()))])
    n, out = len(reference), []
    strata = np.zeros(n, int) if how["strata"] is None else np.unique(how["strata"], return_inverse=True)[1]
    weights = 100 / (np.bincount(strata)[strata] * (strata.max() + 1))
    clusters = np.arange(n) if how["clusters"] is None else how["clusters"]
    for run, labels in several.items():
        values = [task.values(metric, outcomes[label][0][name].held).values for label in labels]
        changes, count = np.stack([(after - reference) * weights for after in values]), len(labels)
        chance = largest_by_chance(changes, clusters, settings.bootstrap, settings.seed)
        means = changes.sum(axis=1)
        best = int(np.argmax(means.round(9)))
        p = (1 + np.sum(chance >= means[best] - 1e-9)) / (len(chance) + 1)
        out.append(
            f"{run}: the best of {count} checkpoints in {title} is {labels[best]} with {means[best]:+.2f}; where none "
            f"differs from the reference, the best of {count} has {np.quantile(chance, 0.95):+.2f} or more in 5% of "
            f"{len(chance):,} permutations over items (p = {p:.2g})"
        )
    return out
