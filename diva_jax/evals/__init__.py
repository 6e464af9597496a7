"""Evaluation tasks: modules of `diva_jax.evals.tasks`, or any importable modules, found by name.

A task module defines
  `SECTION` (optional): the dataclass of its options, see `common.fields`; they become `config.eval.<name>`,
  `prepare(path, section, settings) -> Task`: reads and checks the data at `path` before any weights are loaded, and
    raises a UserError that names the file and row where something is wrong. `section` is the task's own section of
    `config.eval`, which it parses into a dataclass of its own; `settings` is the part that all tasks share.
A new task is a new module; nothing else changes. docs/EVALUATION.md describes the files that an evaluation writes.
"""

import abc
import dataclasses
import os
import pkgutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diva_jax.common import config_files, fields, paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import Rule, at_least, choice, field
from diva_jax.data import labelled
from diva_jax.evals import stats, tasks


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of `config.eval` that all tasks share."""

    every: int = field(
        0,
        "A training run is evaluated each time after this many steps, and before the first and after the last one; "
        "0: never.",
        at_least(0),
    )
    data: tuple[str, ...] = field(
        (),
        "A training run is evaluated on these, texts TASK=PATH such as mmvp=data/MMVP_VLM.",
        Rule(lambda entries: all(isinstance(e, str) for e in entries), "must be texts TASK=PATH"),
    )
    batch_size: int = field(64, "Images or texts per pass over all devices; scores do not depend on it.", at_least(1))
    bootstrap: int = field(10_000, "Each interval is that of this many resamples.", at_least(1))
    seed: int = field(0, "The seed of the resamples and of all random draws of a task.", at_least(0))
    dtype: str = choice(("float32", "bfloat16"), "The towers' dtype; float32 uses the chip's full precision.")
    tokenizer: str = field("", "The tokenizer's files are in this folder; if empty, they are those of the weights.")


@dataclasses.dataclass
class Outcome:
    """The result of a task for one set of weights: `results` (`scores` and all else that the task reports, written to
    results.json unchanged), `rows` of predictions.csv, and what `Task.compare` needs, `held`, which is not written."""

    results: dict[str, Any]
    rows: list[dict[str, Any]]
    held: dict[str, Any]


class Task(abc.ABC):
    """A task whose data has been read and checked."""

    title: str  # Its name for the reader.
    data: str  # Absolute path or spec of the data.
    count: int  # How many of what ("pairs", "images").
    items: str
    # Name -> {"title", "unit"} of everything that `evaluate` and `compare` report; final once `bind` returns. "better"
    # may say which values are better: "higher", where it is missing, "lower", or "" where neither is.
    metrics: dict[str, dict[str, str]]
    texts: Sequence[str] = ()  # Every text whose embedding `evaluate` will ask for.
    # Whether the train loop also logs how the scores differ from those of the encoder that the run began with;
    # `python -m diva_jax.evaluate` always compares.
    compared_in_training: bool = True
    workdir: epath.Path | None = None  # Of the run that it is evaluated in; its selfcheck's results may be there.

    def bind(self, config: ConfigDict, mesh) -> None:  # noqa: B027 - most tasks need nothing from the run.
        """Called once with the whole config and the mesh, before any weights are loaded and before `evaluate`; a
        UserError where the task cannot be done with this config."""

    @abc.abstractmethod
    def evaluate(self, model) -> Outcome:
        """Scores one set of weights, an `encode.Model`."""

    @abc.abstractmethod
    def compare(self, before: Outcome, after: Outcome) -> dict[str, Any]:
        """Compares two sets of weights on the same data: `scores`, each with a `difference` or, where the comparison is
        itself the score, a `score`; optionally `flipped`, items whose answer changed, and `rows` of predictions.csv."""

    def scalars(self, name: str, outcome: Outcome) -> dict[str, dict[str, Any]]:
        """Returns the scores that the train loop logs for an outcome, by full key; `name` is the name of the task."""
        return {f"eval/{name}/{metric}": score for metric, score in outcome.results["scores"].items()}


def names() -> list[str]:
    """Returns the names of the tasks of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(tasks.__path__))


def short(name: str) -> str:
    """Returns the name of a task in the config, results and logs: the last component of a dotted path."""
    return name.rpartition(".")[2]


def find(name: str):
    """Imports the module of a task: one of `names`, or a dotted path; a UserError where there is none."""
    own = name in names()
    if not own and "." not in name:
        raise UserError(f"the task {name} is not known: use {listing(names())}, or the dotted path of a module")
    path = f"{tasks.__name__}.{name}" if own else name
    module = config_files.module(path, "--task", "give a module that is on PYTHONPATH")
    if not hasattr(module, "prepare"):
        raise UserError(f"the module {name} is not a task, it lacks prepare: see diva_jax/evals/__init__.py")
    return module


def declared(tasks: Iterable[str]) -> dict[str, fields.Field]:
    """The declarations of the fields of `config.eval` and of these tasks' options, by dotted path."""
    out = fields.declared(Settings)
    for name in tasks:
        out |= {f"{short(name)}.{option}": f for option, f in fields.declared_by(find(name)).items()}
    return out


def default(others: Iterable[str] = ()) -> ConfigDict:
    """The section `config.eval`: `Settings`, and the options of each task and of `others`, dotted paths."""
    out = fields.config_dict(Settings)
    for name in (*names(), *others):
        if options := fields.default_of(find(name)):
            out[short(name)] = options
    return out


def entries(given: Iterable[str], field: str) -> dict[str, str]:
    """Task -> path, from the texts TASK=PATH of `field`; a UserError for others, and where a task has two paths."""
    out: dict[str, str] = {}
    for entry in given:
        task, _, path = entry.partition("=")
        if not task or not path:
            raise UserError(f"{field} has {entry!r}, which is not TASK=PATH: write e.g. 'mmvp=data/MMVP_VLM'")
        if (first := out.setdefault(task, path)) != path:
            raise UserError(f"{field} has two paths for the task {task}, {first} and {path}: give one")
    return out


def parse(section: ConfigDict, wanted: Iterable[str] = ()) -> tuple[Settings, dict[str, ConfigDict]]:
    """Checks `config.eval` and parses it: (what all tasks share, {task as in `wanted`: its own section, complete}).

    `wanted` are names or dotted paths of tasks to run; those that `data` names are checked too. A task outside this
    package may have no section; its defaults apply then. A UserError for an unknown task or field, a value that its
    owner's rules refuse, or two tasks of one short name."""
    given, wanted = section.to_dict(), list(wanted)
    named = [*wanted, *entries(given["data"], "config.eval.data")]
    others = [name for name in dict.fromkeys(named) if name not in names()]
    modules = {name: find(name) for name in (*names(), *others)}
    shared = [f.name for f in dataclasses.fields(Settings)]
    taken = [*shared, *map(short, modules)]
    if twice := [name for name in others if taken.count(short(name)) > 1]:
        raise UserError(f"the task {twice[0]}: config.eval has another {short(twice[0])!r}, rename the module")
    known = default(others).to_dict()
    fields.check(given, declared(modules), "config.eval")
    if bool(given["every"]) != bool(given["data"]):
        problem = f"config.eval.every={given['every']} with config.eval.data={given['data']}"
        raise UserError(f"{problem}: set both, every to at least 1 and data to texts TASK=PATH, or neither")
    settings = fields.parse(Settings, {name: given[name] for name in shared}, "config.eval")
    return settings, {n: ConfigDict(known.get(short(n), {}) | given.get(short(n), {})) for n in wanted}


# How many classes are named for an image; with fewer in all, the accuracy @5 says nothing.
AT = 5
# Factor of the cosines, as in every published evaluation; no answer depends on it.
LOGIT_SCALE = 100
# Queries that are ranked at once; fixed, so that the rounding of a score depends on nothing else.
QUERIES = 256
_RECALL = "mean_per_class_recall"


class Values(NamedTuple):
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
    """Returns where data is, for results.json: an absolute path, or a spec such as that of tfds as it is."""
    here = paths.expanded(path)
    return str(here.resolve()) if os.path.exists(here) else path


def set_and_folder(task: str, entry: str, sets: Collection[str]) -> tuple[str, Path]:
    """Parses `SET=FOLDER`; a UserError where the set is none of `sets`, or there is no such folder."""
    name, _, folder = entry.partition("=")
    if name not in sets or not folder:
        raise UserError(f"--data={task}={entry} must read SET=FOLDER with a set of {listing(list(sets))}")
    if not (root := paths.expanded(folder)).is_dir():
        raise UserError(f"--data={task}: {entry} is not a folder: give that of the set")
    return name, root


def require_count(where: Path, count: int, published: int, title: str, what: str, option: str) -> None:
    """A UserError where `where` has not as many of `what` ("images") as the published set; `option` allows that."""
    if count != published:
        problem = f"{where} has {count} {what}, {title} has {published}"
        raise UserError(f"{problem}: fetch the rest, or set --config.eval.{option} to score a part")


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


class Classified(NamedTuple):
    """Labelled images, with targets from 0, and how they are classified. `title` is empty where there is only one such
    set or classifier; `at5` is whether the accuracy @5 is scored; `prompts` are the texts of each class, if any."""

    title: str
    images: labelled.Images
    classes: Sequence[str]
    at5: bool = False
    prompts: Sequence[Sequence[str]] = ()

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self.images.targets)


class ClassificationTask(ItemTask):
    """A task that classifies labelled images: `classified` is by prefix of metric names, and `lists_top5` is whether
    predictions.csv has the five most probable classes of each image."""

    items = "images"
    classified: dict[str, Classified]
    lists_top5 = False

    def set_classified(self, classified: dict[str, Classified]) -> None:
        """Sets `classified`, and the metrics, the number of images and the texts that follow from it."""
        self.classified, self.metrics = classified, {}
        self.count = sum(len(data.images) for data in classified.values())
        self.texts = list(dict.fromkeys(t for data in classified.values() for texts in data.prompts for t in texts))
        for prefix, data in classified.items():
            titles = {"acc1": "accuracy @1"} | ({"acc5": "accuracy @5"} if data.at5 else {})
            for name, title in (titles | {_RECALL: "mean per-class recall"}).items():
                self.metrics[prefix + name] = {"title": f"{data.title}, {title}".removeprefix(", "), "unit": "%"}

    def classify(self, logits: Iterable[tuple[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], list[dict]]:
        """Ranks the classes of each image, from (prefix, scores [N, C]): (prefix -> whether each of the first five is
        the right one, bool [N, 5]; rows of predictions.csv). Scores that are not finite count as wrong."""
        held, rows = {}, []
        for prefix, scores in logits:
            data = self.classified[prefix]
            order = np.argsort(-scores, axis=1, kind="stable")[:, :AT]
            held[prefix] = (order == data.labels[:, None]) & np.isfinite(scores).all(axis=1, keepdims=True)
            for i, (label, first) in enumerate(zip(data.labels, order, strict=True)):
                names = [data.classes[c] for c in first]
                item = {"metric": f"{prefix}acc1", "item": i, "file": data.images.names[i]}
                item |= {"truth": data.classes[label], "predicted": names[0], "correct": int(held[prefix][i, 0])}
                top5 = {"top5": "; ".join(names)} if self.lists_top5 else {}
                rows.append(item | {"score": float(scores[i, first[0]])} | top5)
        return held, rows

    def values(self, metric: str, held: dict[str, np.ndarray]) -> Values:
        """Whether each image is classified correctly; the recall, a mean over classes, has no McNemar test."""
        prefix = metric.removesuffix(_RECALL).removesuffix("acc5").removesuffix("acc1")
        if metric.endswith(_RECALL):
            return Values(held[prefix][:, 0], strata=self.classified[prefix].labels, tested=False)
        return Values(held[prefix].any(axis=1) if metric.endswith("acc5") else held[prefix][:, 0])
