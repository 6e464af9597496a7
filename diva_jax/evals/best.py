"""The best of several checkpoints of one run, and what the best of as many would be by chance."""

from collections.abc import Mapping, Sequence

import numpy as np

from diva_jax.evals import Outcome, Task
from diva_jax.evals.items import ItemTask

# Largest number of random signs in memory, 32 MB.
_MAX_SIGNS = 2**25


def main_metric(task: Task) -> str:
    """The metric in which checkpoints are compared: the first of matches, else the first."""
    return next((m for m, info in task.metrics.items() if info.get("answers") == "match"), next(iter(task.metrics)))


def largest_by_chance(changes: np.ndarray, clusters: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The largest of K mean changes under the hypothesis that none of them is real, [resamples], from `changes` [K, N],
    what each item adds to each. Before and after are exchanged for each cluster of items (labels [N]), for all K at
    once, so that checkpoints which answer alike stay alike."""
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.stack([np.bincount(index, row) for row in changes], axis=1)  # [clusters, K]
    rng, chunk, out = np.random.default_rng(seed), max(1, _MAX_SIGNS // len(sums)), []
    for start in range(0, resamples, chunk):
        signs = rng.integers(0, 2, (min(chunk, resamples - start), len(sums)), np.int8) * 2.0 - 1
        out.append((signs @ sums).max(axis=1))
    return np.concatenate(out)


def sentence(
    task: Task, reference: Outcome, checkpoints: Sequence[tuple[str, Outcome]], what: str, resamples: int, seed: int
) -> str:
    """What is to be said of the best of K checkpoints of the run `what`, each (label, outcome)."""
    metric, count = main_metric(task), len(checkpoints)
    title = f"{task.title}, {task.metrics[metric]['title']}"
    if not isinstance(task, ItemTask):
        return f"{what}: the best of {count} checkpoints cannot be compared with chance in {title}"
    before, parts = task.values(metric, reference.held), []
    n = len(before.values)
    strata = np.zeros(n, int) if before.strata is None else np.unique(before.strata, return_inverse=True)[1]
    weights = 100 / (np.bincount(strata)[strata] * (strata.max() + 1))
    for _, outcome in checkpoints:
        parts.append((task.values(metric, outcome.held).values - before.values) * weights)
    changes = np.stack(parts)
    chance = largest_by_chance(changes, np.arange(n) if before.clusters is None else before.clusters, resamples, seed)
    means = changes.sum(axis=1)
    best = int(np.argmax(means.round(9)))
    p = (1 + np.sum(chance >= means[best] - 1e-9)) / (resamples + 1)
    return (
        f"{what}: the best of {count} checkpoints in {title} is {checkpoints[best][0]} with {means[best]:+.2f}; where "
        f"none differs from the reference, the best of {count} has {np.quantile(chance, 0.95):+.2f} or more in 5% of "
        f"{resamples:,} permutations over items (p = {p:.2g})"
    )


def notes(
    tasks: Mapping[str, Task],
    outcomes: Mapping[str, Mapping[str, Outcome]],
    runs: Mapping[str, Sequence[str]],
    chosen: bool,
    resamples: int,
    seed: int,
) -> list[str]:
    """A sentence for every run with several checkpoints (workdir -> their labels): with `chosen` about its best, in the
    first task, else that it has no claim. `outcomes` are label -> task -> outcome, the first label is the reference."""
    name, reference = next(iter(tasks)), next(iter(outcomes.values()))
    several = {run: labels for run, labels in runs.items() if len(labels) > 1}
    if not chosen:
        return [
            f"{run} is given at {len(labels)} checkpoints, and the best of them is no result: name one, or add --best, "
            "which says what the best of them would be by chance"
            for run, labels in several.items()
        ]
    return [
        sentence(
            tasks[name], reference[name], [(label, outcomes[label][name]) for label in labels], run, resamples, seed
        )
        for run, labels in several.items()
    ]
