"""Evaluation tasks: modules of `diva_jax.evals.tasks`, or any importable modules, found by name.

A task module defines
  `default() -> ConfigDict`: its options, which become `config.eval.<name>`; empty where it has none,
  `RULES` (optional): what their values must be, a table as for `common.fields.require`,
  `prepare(path, section, settings) -> Task`: reads and checks the data at `path` before any weights are loaded, and
    raises a UserError that names the file and row where something is wrong. `section` is the task's own section of
    `config.eval`, which it parses into a dataclass of its own; `settings` is the part that all tasks share.
A new task is a new module; nothing else changes. docs/EVALUATION.md describes the files that an evaluation writes.
"""

import abc
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from diva_jax.common import fields
from diva_jax.common.errors import UserError, listing
from diva_jax.evals import tasks

_RULES = (
    ("every", lambda n: n >= 0, "must be at least 0"),
    ("batch_size", lambda n: n >= 1, "must be at least 1"),
    ("bootstrap", lambda n: n >= 1, "must be at least 1"),
    ("seed", lambda n: n >= 0, "must be at least 0"),
    ("dtype", lambda name: name in ("float32", "bfloat16"), "must be float32 or bfloat16"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of `config.eval` that all tasks share."""

    every: int = 0  # Training steps between evaluations, with one before the first and after the last step; 0: none.
    data: tuple[str, ...] = ()  # What to evaluate while training: "TASK=PATH" texts, such as "mmvp=data/MMVP_VLM".
    batch_size: int = 64  # Images (or texts) per forward pass, over all devices; any number, no score depends on it.
    bootstrap: int = 10_000  # Resamples per interval.
    seed: int = 0  # Seed of the resamples and of all random draws of a task.
    dtype: str = "float32"  # Compute type of the towers; float32 uses the chip's full precision.
    tokenizer: str = ""  # Folder with the tokenizer's files; empty: that of the weights.


@dataclasses.dataclass
class Outcome:
    """The result of a task for one set of weights.

    Attributes:
      results: `scores` and everything else that the task reports, written to results.json unchanged.
      rows: rows of predictions.csv.
      held: arrays that `Task.compare` needs; they are not written.
    """

    results: dict[str, Any]
    rows: list[dict[str, Any]]
    held: dict[str, Any]


class Task(abc.ABC):
    """A task whose data has been read and checked.

    Attributes:
      title: name for the reader.
      data: absolute path or spec of the data.
      count, items: how many of what ("pairs", "images").
      metrics: name -> {"title", "unit"} of everything that `evaluate` and `compare` report; final once `bind` returns.
        "better" may say which values are better: "higher", where it is missing, "lower", or "" where neither is.
      texts: every text whose embedding `evaluate` will ask for.
      compared_in_training: whether the train loop also logs how the scores differ from those of the encoder that the
        run began with. (`python -m diva_jax.evaluate` always compares.)
    """

    title: str
    data: str
    count: int
    items: str
    metrics: dict[str, dict[str, str]]
    texts: Sequence[str] = ()
    compared_in_training: bool = True

    def bind(self, config: ConfigDict, mesh) -> None:  # noqa: B027 - most tasks need nothing from the run.
        """Called once, before any weights are loaded and before `evaluate`.

        Args:
          config: of `config.default`'s form.
          mesh: the devices that evaluate.

        Raises:
          UserError: the task cannot be done with this config.
        """

    @abc.abstractmethod
    def evaluate(self, model) -> Outcome:
        """Scores one set of weights, an `encode.Model`."""

    @abc.abstractmethod
    def compare(self, before: Outcome, after: Outcome) -> dict[str, Any]:
        """Compares two sets of weights on the same data.

        Returns:
          `scores`, each with a `difference` or, where the comparison is itself the score, a `score`; optionally
          `flipped`, the items whose answer changed, and `rows` for predictions.csv.
        """

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
    """Imports the module of a task.

    Args:
      name: one of `names`, or the dotted path of any importable module that defines a task.

    Raises:
      UserError: there is no such task.
    """
    if "." not in name:
        if name not in names():
            raise UserError(f"the task {name} is not known: use {listing(names())}, or the dotted path of a module")
        return importlib.import_module(f"{tasks.__name__}.{name}")
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"the task {name} cannot be imported ({e}): give a module that is on PYTHONPATH") from e
    if lacks := [f for f in ("default", "prepare") if not hasattr(module, f)]:
        raise UserError(f"the module {name} is not a task, it lacks {listing(lacks)}: see diva_jax/evals/__init__.py")
    return module


def default(others: Iterable[str] = ()) -> ConfigDict:
    """Returns the section `config.eval`: `Settings`, and the options of each task that has options.

    Args:
      others: dotted paths of further tasks.

    Raises:
      UserError: as `find`.
    """
    out = ConfigDict(dataclasses.asdict(Settings()))
    for name in (*names(), *others):
        if options := find(name).default():
            out[short(name)] = options
    return out


def entries(data: Iterable[str]) -> dict[str, str]:
    """Returns task -> path, from the TASK=PATH texts of `config.eval.data`.

    Raises:
      UserError: one of them does not have this form.
    """
    if wrong := [entry for entry in data if not all(entry.partition("="))]:
        raise UserError(f"config.eval.data has {wrong[0]!r}, which is not TASK=PATH: write e.g. 'mmvp=data/MMVP_VLM'")
    return dict(entry.split("=", 1) for entry in data)


def parse(section: ConfigDict, wanted: Iterable[str] = ()) -> tuple[Settings, dict[str, ConfigDict]]:
    """Checks `config.eval` and parses it.

    Args:
      section: of `default`'s form. A task outside this package may have no section; its defaults apply then.
      wanted: the names or dotted paths of tasks to run; those that `data` names are checked too.

    Returns:
      (what all tasks share, {task as in `wanted`: its own section, complete and checked}).

    Raises:
      UserError: an unknown task or field, a value that its owner's rules refuse, or two tasks of one short name.
    """
    given, wanted = section.to_dict(), list(wanted)
    others = [name for name in dict.fromkeys([*wanted, *entries(given["data"])]) if name not in names()]
    modules = {name: find(name) for name in (*names(), *others)}
    shared = [f.name for f in dataclasses.fields(Settings)]
    taken = {*shared, *names()}
    for name in others:
        if short(name) in taken:
            raise UserError(f"the task {name}: config.eval has another {short(name)!r}, rename the module")
        taken.add(short(name))
    known = default(others).to_dict()
    if strange := fields.unknown(given, known, "eval."):
        raise UserError(f"unknown config field {listing(strange)}: see diva_jax/evals for all that exist")
    fields.require(given, _RULES, "config.eval")
    if bool(given["every"]) != bool(given["data"]):
        raise UserError(
            f"config.eval.every={given['every']} with config.eval.data={given['data']}: set both, every to at least 1 "
            "and data to texts TASK=PATH, or neither"
        )
    own = {}
    for name, module in modules.items():
        own[name] = ConfigDict(known.get(short(name), {}) | given.get(short(name), {}))
        fields.require(own[name], getattr(module, "RULES", ()), f"config.eval.{short(name)}")
    settings = Settings(**{field: given[field] for field in shared})
    return settings, {name: own[name] for name in wanted}
