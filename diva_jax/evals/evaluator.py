"""Runs tasks on weights and compares the results, for `python -m diva_jax.evaluate` and for the train loop."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from diva_jax import evals
from diva_jax.common import paths
from diva_jax.common.errors import RunError, UserError
from diva_jax.data import tokenizers
from diva_jax.evals import Outcome, encode, results, seeds, weight_sets
from diva_jax.evals.encode import Encoder, Model, Towers
from diva_jax.models.backbones import spec_of
from diva_jax.training import partition
from diva_jax.weights import parts


def data_of(tasks: list[str], given: list[str]) -> dict[str, str]:
    """Task -> path, from --task and --data; a UserError for a task without data, or data without a task."""
    if not tasks:
        raise UserError("--task is missing: give one or more, e.g. --task=mmvp,zeroshot")
    if len(tasks) == 1 and len(given) == 1 and not given[0].startswith(f"{tasks[0]}="):
        return {tasks[0]: given[0]}
    found = evals.entries(given, "--data")
    if strange := [t for t in found if t not in tasks]:
        raise UserError(f"--data={strange[0]}=... belongs to no task: give it to --task too, or remove it")
    if missing := [t for t in tasks if t not in found]:
        raise UserError(f"the task {missing[0]} has no data: give --data={missing[0]}=PATH")
    return {t: found[t] for t in tasks}


class Evaluator:
    """Tasks on a mesh: tables and lists are checked when it is built, towers are compiled once, for all weights.

    `data` is task, a name or a dotted path -> where its data is. `tasks` are by short name, in order; `options`, for
    results.json; `workdir` is that of a run that trains meanwhile. A UserError where one of these is wrong."""

    def __init__(self, config, mesh, data: Mapping[str, str], workdir: epath.Path | None = None):
        self.config, self.mesh = config, mesh
        self.settings, sections = evals.parse(config.eval, data)
        self.tasks = {
            evals.short(name): evals.find(name).prepare(path, sections[name], self.settings)
            for name, path in data.items()
        }
        shared = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in ("every", "data")}
        self.options = shared | {evals.short(name): s.to_dict() for name, s in sections.items() if s}
        for task in self.tasks.values():
            task.workdir = workdir
            task.bind(config, mesh)
        self.towers = Towers(spec_of(config), mesh, self.settings)
        texts = dict.fromkeys(text for task in self.tasks.values() for text in task.texts)
        self._rows = {text: i for i, text in enumerate(texts)}
        self._ids, self._embeddings, self._before = {}, {}, None

    def _texts(self, encoder: Encoder) -> np.ndarray:
        """The embeddings of all texts of the tasks by the encoder's text tower; those of a source's tower are kept."""
        if not self._rows:
            return np.zeros((0, 0), np.float32)
        source, spec = encoder.source, self.towers.spec
        if source not in self._ids:
            folder = self.settings.tokenizer or parts.tokenizer_folder(source, "--weights")
            self._ids[source] = tokenizers.open_tokenizer(spec.text, folder, "config.eval.tokenizer")(list(self._rows))
        if encoder.text is not None:
            return self.towers.texts(encoder.text, self._ids[source])
        if source not in self._embeddings:
            arrays = encode.tower("text", source, spec, self.mesh, self.config.mesh.min_shard)
            self._embeddings[source] = self.towers.texts(arrays, self._ids[source])
        return self._embeddings[source]

    def model(self, label: str, encoder: Encoder) -> Model:
        """Returns weights in the form that tasks use."""
        return Model(label, self.towers, encoder, self._rows, self._texts(encoder))

    def evaluate(self, model: Model) -> dict[str, Outcome]:
        """Returns the outcome of each task."""
        return {name: task.evaluate(model) for name, task in self.tasks.items()}

    def scalars(
        self, towers: Mapping[str, Mapping[str, jax.Array]], params: Mapping[str, jax.Array]
    ) -> tuple[dict[str, float], list[str]]:
        """The scores of parameters in training, and their differences from those of the initial encoder, loaded from
        `config.backbone.source` by the first call: ({key: value}, notes for the reader).

        `towers` is tower -> name -> array, see `Objective.towers`; `params` has every parameter of the objective, for
        tasks that score it. Keys are those of `Task.scalars`, usually `eval/<task>/<metric>`, and for a task with
        `compared_in_training` `eval/<task>/<metric>_change`, or the metric's name for a comparison that is itself the
        score, such as drift's cosine; each also with `/low` and `/high`, its interval. Every process must call this."""
        source, out, notes = self.config.backbone.source, {}, []
        compared = {name: task for name, task in self.tasks.items() if task.compared_in_training}
        if self._before is None and compared:
            vision = encode.tower("vision", source, self.towers.spec, self.mesh, self.config.mesh.min_shard)
            before = self.model("before", Encoder(vision, None, source, {}, source))
            self._before = {name: task.evaluate(before) for name, task in compared.items()}
        now = Encoder(towers["vision"], towers.get("text"), source, params, source)
        for name, after in self.evaluate(self.model("now", now)).items():
            notes += after.results.get("notes", [])
            out |= results.flat(self.tasks[name].scalars(name, after))
            if name in compared:
                changes = self.tasks[name].compare(self._before[name], after)["scores"].items()
                out |= results.flat({f"eval/{name}/{m}{'_change' * ('difference' in s)}": s for m, s in changes})
        return out, notes

    def report(
        self, outcomes: Mapping[str, Sequence[dict[str, Outcome]]], control: str = ""
    ) -> tuple[dict[str, Any], list[dict]]:
        """(`tasks` of results.json, rows of predictions.csv) of label -> the outcomes of its members, of which a group
        has several, see `seeds`. Each is compared with the first, and with `control`, where that is another one."""
        labels = list(outcomes)
        pairs = [(labels[0], label) for label in labels[1:]]
        if control in labels[1:]:
            pairs += [(control, label) for label in labels[1:] if label != control]
        tasks, rows = {}, []
        for name, task in self.tasks.items():
            by_label = {label: [by_task[name] for by_task in members] for label, members in outcomes.items()}
            mine = [row for members in by_label.values() for outcome in members for row in outcome.rows]
            comparisons = []
            for before, after in pairs:
                compared = seeds.compare(task, by_label[before], by_label[after])
                of_images = compared.pop("rows", [])
                mine += of_images if before == labels[0] else []
                comparisons.append({"before": before, "after": after, **compared})
            tasks[name] = {
                "title": task.title,
                "data": paths.without_secrets(task.data),
                **{name: getattr(task, name) for name in ("count", "items")},
                "metrics": {m: {"better": "higher", **info} for m, info in task.metrics.items()},
                "weights": {label: seeds.outcome(task, members) for label, members in by_label.items()},
                "comparisons": comparisons,
            }
            rows += [{"task": name, **row} for row in mine]
        return tasks, rows


def run(
    config, weights: Sequence[str], data: Mapping[str, str], control: str = "", choose_best: bool = False
) -> tuple[dict[str, Any], list[dict], list[str]]:
    """Evaluates sets of weights, one after another, on all devices: (the content of results.json, the rows of
    predictions.csv, why sets are not among them). `weights` are those of `weight_sets.find`. The first is compared with
    each of the others, and so is `control`, one of them, if any; `choose_best` is for `seeds.best_notes`. A UserError
    where data or weights are invalid, a RunError where embeddings of the first are not finite. A later set whose
    embeddings are not, or whose checkpoint was removed since the start, is left out."""
    mesh, began = partition.make_mesh(config.mesh), time.perf_counter()
    sets = weight_sets.find(weights)
    by_name = {name: given.label for given in sets[1:] for name in (given.given, given.label)}
    if control and control not in by_name:
        raise UserError(f"control={control} must be one of the weights, and not the first")
    runner = Evaluator(config, mesh, data)
    members = {label: place for given in sets for label, place in given.members.items()}
    # All weights are checked before the first are evaluated, which may take hours.
    texts = bool(runner._rows)
    other = dict.fromkeys(s for p in members.values() for s in encode.check(p.source, p.step, config, texts))
    lent, lender = encode.lend(members, mesh)
    outcomes, listed, failed = {}, [], []
    for given in sets:
        found = []
        try:
            entry = given.entry()
            for label, place in given.members.items():
                encoder = encode.read(place.source, place.step, config, mesh)
                if place.step is None:
                    encoder = encoder._replace(params=lent, borrowed=lender)
                found.append(runner.evaluate(runner.model(label, encoder)))
                del encoder  # Only one set of weights is on the devices at a time.
        except (RunError, UserError) as e:
            if not listed or jax.process_count() > 1:  # Others may have read what this process could not.
                raise
            failed.append(f"{given.label} has no scores ({e})")
        else:
            listed.append(entry)
            outcomes[given.label] = found
    tasks, rows = runner.report(outcomes, by_name.get(control, ""))
    notes = [*failed, *(f"{text}, which is used" for text in other)]
    runs = weight_sets.checkpoints_by_run([given for given in sets[1:] if given.label in outcomes])
    notes += seeds.best_notes(runner.tasks, outcomes, runs, choose_best, runner.settings)
    about = results.about(config, runner.options) | {"seconds": round(time.perf_counter() - began, 1)}
    out = {"weights": listed, "notes": notes, "summary": results.summaries(tasks), "tasks": tasks}
    return about | out, rows, failed
