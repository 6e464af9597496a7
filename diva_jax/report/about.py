"""The section of versions, sources and configs, and the lines of the header that say when and where."""

import json
from collections.abc import Iterator
from typing import Any

from diva_jax import config as configs
from diva_jax.common import imports
from diva_jax.common.errors import UserError
from diva_jax.common.fields import flatten
from diva_jax.models import backbones
from diva_jax.report import wording
from diva_jax.report.inputs import Inputs, Session
from diva_jax.report.sections import Part

# Packages whose versions the header names.
_NAMED_PACKAGES = ("diva_jax", "jax", "flax", "python")
_CHANGED = ": what differs from the defaults"


def facts(inputs: Inputs) -> Iterator[str]:
    """Returns one line for the evaluation and one per run: date, duration, devices and versions, as far as recorded."""
    known = []
    if r := inputs.results:
        known.append(("Evaluation", r.created, r.seconds, "", r.devices, r.versions))
    for run in inputs.runs:
        first, last = (run.sessions[0], run.sessions[-1]) if run.sessions else (Session(), Session())
        several = f" in {len(run.sessions)} sessions" if len(run.sessions) > 1 else ""
        known.append((f"Run {run.name}", first.started, run.seconds(), several, last.devices, last.versions))
    for name, when, seconds, several, devices, versions in known:
        when = when[:16].replace("T", " ") + (" UTC" if when.endswith("+00:00") else "")
        took = (f"{wording.duration(seconds)} long" if seconds else "") + several
        packages = [f"{package} {versions[package]}" for package in _NAMED_PACKAGES if package in versions]
        if line := ", ".join(fact for fact in (when, took, devices, *packages) if fact):
            yield f"{name}: {line}"


def _defaults(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the flat default config of a run's objective, with the nearest backbone of the table; None if unknown."""
    name = str(config.get("objective"))
    if "." in name and not imports.is_own(name):
        return None
    try:
        own = config["backbone"]
        name = min(
            backbones.TABLE,
            key=lambda row: sum(own.get(f) != v for f, v in vars(backbones.TABLE[row]).items() if f != "text"),
        )
        defaults = flatten(json.loads(configs.default(name, objective=config["objective"]).to_json()))
    except (KeyError, TypeError, AttributeError, UserError):
        return None
    return defaults if flatten(config).keys() & defaults.keys() else None


def section(inputs: Inputs) -> list[Part]:
    """Returns the content of the section, as lists that can be opened; of configs, what differs from the defaults."""
    lists: dict[str, dict[str, Any]] = {}
    configs = {f"Training config, {run.name}": run.config for run in inputs.runs}
    if r := inputs.results:
        steps = {w.label: "" if w.step is None else f", step {w.step}" for w in r.weights}
        lists["Versions"] = {**r.versions, "devices": r.devices}
        lists["Weights"] = {w.label: f"{w.source}{steps[w.label]}" for w in r.weights}
        lists["Data"] = {name: task.data for name, task in r.tasks.items() if task.data}
        lists["Evaluation options"] = flatten(r.options or {})
        configs = {"Evaluation config": r.config or {}} | configs
    for title, config in configs.items():
        values, defaults = flatten(config), _defaults(config)
        if defaults is None:
            lists[title] = values
            continue
        changed = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
        shown = {k: f"{v} (default {defaults[k]})" if k in defaults else v for k, v in changed.items()}
        lists[title + _CHANGED] = shown
        lists[f"{title}: the rest"] = {k: v for k, v in values.items() if k not in changed}
    return [Part("fields", title=t, values=v, opened=t.endswith(_CHANGED)) for t, v in lists.items() if v]


def sources(inputs: Inputs) -> str:
    """Returns the text of the footer: the files that the page was made from."""
    files = [n for n in ("results.json", "predictions.csv", "metrics.jsonl") if (inputs.folder / n).is_file()]
    return f"Generated from {', '.join(files)} in {inputs.folder}. Exact values are in the tooltips."
