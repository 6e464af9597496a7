"""Runs tasks on weights, compares, writes: behind `python -m diva_jax.evaluate`, and in the train loop."""

import csv
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diva_jax import __version__, evals
from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.data import tokenizers
from diva_jax.evals import Options, Outcome, encoders
from diva_jax.evals.encode import Model, Towers
from diva_jax.models.backbones import spec_of

COLUMNS = ("task", "weights", "metric", "seed", "item", "file", "text", "truth", "predicted", "score", "correct")


def data_of(tasks: list[str], given: list[str]) -> dict[str, str]:
    """Task -> path, from --task and --data.

    Raises:
      UserError: a task without data, or data without a task.
    """
    if not tasks:
        raise UserError("--task is missing: give one or more, e.g. --task=mmvp,zeroshot")
    if len(tasks) == 1 and len(given) == 1 and not given[0].startswith(f"{tasks[0]}="):
        return {tasks[0]: given[0]}
    found = dict(item.split("=", 1) for item in given if "=" in item)
    if strange := [item for item in given if item.split("=", 1)[0] not in tasks]:
        raise UserError(f"--data={strange[0]} belongs to no task: write --data=TASK=PATH, TASK one of {listing(tasks)}")
    if missing := [t for t in tasks if not found.get(t)]:
        raise UserError(f"the task {missing[0]} has no data: give --data={missing[0]}=PATH")
    return {t: found[t] for t in tasks}


def in_training(config, mesh) -> "Evaluator | None":
    """What evaluates a run as `config.eval` says; None where it says never.

    Raises:
      UserError: an entry of `config.eval.data` is no TASK=PATH, or as `Evaluator`.
    """
    c = config.eval
    if not c.every:
        return None
    if wrong := [entry for entry in c.data if not all(entry.partition("="))]:
        raise UserError(f"config.eval.data has {wrong[0]!r}, which is no TASK=PATH: write e.g. 'mmvp=data/MMVP_VLM'")
    options = Options(batch_size=c.batch_size, images=c.images, draws=c.draws, seed=config.seed)
    return Evaluator(config, mesh, dict(entry.split("=", 1) for entry in c.data), options, c.tokenizer)


def labels_of(sources: Sequence[str], steps: Sequence[int | None]) -> list[str]:
    """A short name for each: the last part of its path and the step, or all of it where two would be alike."""

    def label(name: str, step: int | None) -> str:
        return name if step is None else f"{name}:{step}"

    short = [label(Path(s).name or s, step) for s, step in zip(sources, steps, strict=True)]
    return short if len(set(short)) == len(short) else [label(s, n) for s, n in zip(sources, steps, strict=True)]


def flat(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`KEY`, `KEY/low` and `KEY/high` of each score or difference."""
    out = {}
    for key, s in scores.items():
        out[key] = s["difference"] if "difference" in s else s["score"]
        if s["interval"]:
            out |= {f"{key}/low": s["interval"][0], f"{key}/high": s["interval"][1]}
    return out


def summary(row: Mapping[str, float]) -> str:
    """`mmvp/pooled 25.93, feedback/gap_other 0.00021 (0.0001 to 0.0003)`: a row of `scalars`, without its bins."""

    def text(key: str) -> str:
        ends = [row.get(f"{key}/{end}") for end in ("low", "high")]
        interval = "" if None in ends else " ({:.3g} to {:.3g})".format(*ends)
        return f"{key.removeprefix('eval/')} {row[key]:.4g}{interval}"

    shown = [k for k in row if k.startswith(("eval/", "feedback/")) and not k.endswith(("/low", "/high"))]
    return ", ".join(map(text, shown))


class Evaluator:
    """Tasks on a mesh. Data is read and checked at once, towers are compiled once, whatever the weights.

    Args:
      config: of `config.default`'s form; its `backbone` and `mesh.min_shard` count.
      mesh: what images and texts are split over.
      data: task -> where its data is; the tasks to run, in order.
      options: the same for all tasks.
      tokenizer: folder with the tokenizer's files; empty: that of the weights.

    Raises:
      UserError: a task is unknown, or its data is wrong.
    """

    def __init__(self, config, mesh, data: Mapping[str, str], options: Options | None = None, tokenizer: str = ""):
        self.config, self.mesh, self.options = config, mesh, options or Options()
        self.tasks = {name: evals.find(name).prepare(path, self.options) for name, path in data.items()}
        for task in self.tasks.values():
            if hasattr(task, "bind"):
                task.bind(config, mesh)
        self.towers = Towers(spec_of(config), mesh, self.options)
        texts = dict.fromkeys(text for task in self.tasks.values() for text in task.texts)
        self._rows = {text: i for i, text in enumerate(texts)}
        self._tokenizer, self._embeddings, self._before = tokenizer, {}, None

    def _texts(self, source: str) -> np.ndarray:
        """Embeddings of every text that a task needs, from the source's text tower, which is dropped again."""
        if not self._rows:
            return np.zeros((0, 0), np.float32)
        if source not in self._embeddings:
            arrays, folder = encoders.text(source, self.towers.spec, self.mesh, self.config.mesh.min_shard)
            tokenize = tokenizers.build(self.towers.spec.text, self._tokenizer or folder)
            self._embeddings[source] = self.towers.texts(arrays, tokenize(list(self._rows)))
        return self._embeddings[source]

    def model(self, label: str, arrays: Mapping[str, jax.Array], text: str, borrowed: str = "") -> Model:
        """Weights as tasks see them; `text` is the source of their text tower, `borrowed` as in `Model`."""
        return Model(label, self.config, self.towers, arrays, self._rows, self._texts(text), borrowed)

    def evaluate(self, model: Model) -> dict[str, Outcome]:
        """Task -> what it finds."""
        return {name: task.evaluate(model) for name, task in self.tasks.items()}

    def scalars(self, params: Mapping[str, jax.Array]) -> tuple[dict[str, float], list[str]]:
        """For the train loop: every score of live parameters, and how it differs from the encoder the run began with.

        The first call also evaluates that encoder, loaded from `config.backbone.source`. Every process of a run
        must call.

        Args:
          params: name -> array, sharded as they are: `vision/...` and whatever else a task needs.

        Returns:
          ({`eval/<task>/<metric>`, with `/low` and `/high` behind it where it has an interval, and, where a task
          compares, `eval/<task>/<metric>_change` (`eval/drift/cosine` and the like compare by themselves and have
          no `_change`), in the metric's unit; what a task's own `scalars` gives}, sentences for the reader).
        """
        source, out, notes = self.config.backbone.source, {}, []
        compared = {n: t for n, t in self.tasks.items() if not hasattr(t, "scalars")}
        if self._before is None and compared:
            original = encoders.vision(source, self.towers.spec, self.mesh, self.config.mesh.min_shard)
            before = self.model("before", {**params, **original}, source)
            self._before = {name: task.evaluate(before) for name, task in compared.items()}
        for name, after in self.evaluate(self.model("now", params, source)).items():
            notes += after.results.get("notes", [])
            if name not in compared:
                out |= flat(self.tasks[name].scalars(after))
                continue
            out |= flat({f"eval/{name}/{m}": s for m, s in after.results["scores"].items()})
            changes = self.tasks[name].compare(self._before[name], after)["scores"].items()
            out |= flat({f"eval/{name}/{m}{'_change' * ('difference' in s)}": s for m, s in changes})
        return out, notes

    def report(self, found: Sequence[tuple[str, dict[str, Outcome]]]) -> tuple[dict[str, Any], list[dict]]:
        """(the `tasks` of results.json, the rows of predictions.csv); the first label is compared with each other."""
        tasks, rows = {}, []
        for name, task in self.tasks.items():
            outcomes = [(label, by_task[name]) for label, by_task in found]
            mine = [row for _, o in outcomes for row in o.rows]
            comparisons = []
            for label, after in outcomes[1:]:
                compared = task.compare(outcomes[0][1], after)
                mine += compared.pop("rows", [])
                comparisons.append({"before": outcomes[0][0], "after": label, **compared})
            tasks[name] = {
                "title": task.title,
                "data": task.data,
                "count": task.count,
                "items": task.items,
                "metrics": task.metrics,
                "weights": {label: o.results for label, o in outcomes},
                "comparisons": comparisons,
            }
            rows += [{"task": name, **row} for row in mine]
        return tasks, rows


def about(config, options: Options) -> dict[str, Any]:
    """What results.json says of the evaluation itself; see `evals`."""
    devices = jax.devices()
    packages = ("jax", "jaxlib", "flax", "numpy", "pillow", "transformers")
    versions = {p: importlib.metadata.version(p) for p in packages}
    return {
        "schema": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"diva_jax": __version__, "python": platform.python_version()} | versions,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "config": json.loads(config.to_json()),
        "options": vars(options),
    }


def write(folder: Path, results: Mapping[str, Any], rows: Sequence[Mapping]) -> None:
    """Writes results.json and predictions.csv, each atomically.

    Raises:
      UserError: the folder cannot be written.
    """
    extra = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    try:
        with (
            paths.whole_file(folder / "predictions.csv") as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as f,
        ):
            writer = csv.DictWriter(f, [*COLUMNS, *extra], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        paths.write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    except OSError as e:
        raise UserError(f"--out={folder} cannot be written ({e}): use a folder that you may write") from e


def _figure(s: Mapping[str, Any], unit: str) -> str:
    """A score or difference with its interval: two digits behind the point for %, else four significant ones."""
    form = ".2f" if unit == "%" else ".4g"
    text = f"{s['difference']:+{form}}" if "difference" in s else f"{s['score']:{form}}"
    ends = "  [{}, {}]".format(*(f"{x:{form}}" for x in s["interval"])) if s["interval"] else ""
    test = "  won {won}, lost {lost}, p = {p:.3g}".format(**s["mcnemar"]) if s.get("mcnemar") else ""
    return f"{text:>8}{ends}{test}"


def table(tasks: dict) -> str:
    """The scores with their intervals, the differences, and each weights' notes."""
    lines = []
    for task in tasks.values():
        lines.append(f"{task['title']}: {task['count']} {task['items']}")
        found = [(label, w["scores"]) for label, w in task["weights"].items()]
        found += [(f"{c['before']} -> {c['after']}", c["scores"]) for c in task["comparisons"]]
        for label, scores in found:
            for metric, s in scores.items():
                lines.append(f"  {label:<40}  {metric:<28}{_figure(s, task['metrics'][metric]['unit'])}")
        lines += [f"  {label}: {note}" for label, w in task["weights"].items() for note in w.get("notes", [])]
    return "\n".join(lines)
