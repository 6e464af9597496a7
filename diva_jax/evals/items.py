"""Tasks whose scores are means over items, such as images, pairs or queries: from the values of every item follow the
scores, their intervals and the comparison of two sets of weights on the same items."""

import abc
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from diva_jax.common.errors import UserError
from diva_jax.evals import Outcome, Settings, Task, stats


@dataclasses.dataclass(frozen=True)
class Values:
    """What a metric is the mean of: values [N], one per item, 0 to 1, with the `strata` or `clusters` of
    `stats.bootstrap`. `tested` is whether two sets of weights are compared by McNemar's test, which takes items for
    independent; an item whose value is above one half counts as right."""

    values: np.ndarray
    strata: np.ndarray | None = None
    clusters: np.ndarray | None = None
    tested: bool = True

    def resampling(self, settings: Settings) -> dict[str, Any]:
        """Returns the arguments of `stats.bootstrap`."""
        groups = {"strata": self.strata, "clusters": self.clusters}
        return {"resamples": settings.bootstrap, "seed": settings.seed} | groups


def resolved(path: str) -> str:
    """Returns where data is, for results.json: a `tfds:` spec as it is, else an absolute path."""
    return path if path.startswith("tfds:") else str(Path(path).expanduser().resolve())


def set_and_folder(entry: str, sets: Collection[str]) -> tuple[str, Path] | None:
    """Parses `SET=FOLDER`; None where it has another form or the set is none of `sets`."""
    name, _, folder = entry.partition("=")
    return (name, Path(folder).expanduser()) if name in sets and folder else None


def require_count(where: Path, count: int, published: int, title: str, what: str, option: str) -> None:
    """A UserError where `where` has not as many of `what` ("images") as the published set; `option` allows that."""
    if count != published:
        raise UserError(
            f"{where} has {count} {what}, {title} has {published}: fetch the rest, or set --config.eval.{option} to "
            "score a part"
        )


class ItemTask(Task):
    """A task whose metrics are means over items."""

    settings: Settings

    @abc.abstractmethod
    def answer(self, model) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
        """Applies one set of weights, an `encode.Model`: (what `values` needs, rows of predictions.csv without the
        label of the weights, further results)."""

    @abc.abstractmethod
    def values(self, metric: str, held: dict[str, Any]) -> Values:
        """Returns what a metric is the mean of; `held` is the first result of `answer`."""

    def score(self, metric: str, held: dict[str, Any]) -> dict[str, Any]:
        """Returns a metric's entry in `scores` of results.json."""
        counted = self.values(metric, held)
        return stats.estimate(counted.values, **counted.resampling(self.settings))

    def evaluate(self, model) -> Outcome:
        """Returns every metric's score with its interval, and the rows of every item."""
        held, rows, further = self.answer(model)
        scores = {metric: self.score(metric, held) for metric in self.metrics}
        return Outcome({"scores": scores} | further, [{"weights": model.label, **row} for row in rows], held)

    def compare(self, before: Outcome, after: Outcome) -> dict[str, Any]:
        """Returns every metric's paired difference, interval and McNemar test."""
        scores = {}
        for metric in self.metrics:
            b, a = (self.values(metric, outcome.held) for outcome in (before, after))
            test = stats.mcnemar(b.values > 0.5, a.values > 0.5) if a.tested else None
            scores[metric] = stats.paired(b.values, a.values, **a.resampling(self.settings)) | {"mcnemar": test}
        return {"scores": scores}
