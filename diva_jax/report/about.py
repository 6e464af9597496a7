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
from diva_jax.report.inputs import Inputs
from diva_jax.report.sections import Part

# Packages whose versions the header names.
_NAMED_PACKAGES = ("diva_jax", "jax", "flax", "python")


def _line(name: str, when: str, took: str, devices: str, versions: dict[str, Any]) -> str:
    """`NAME: 2026-01-31 12:00 UTC, 12 min long, ...`, of what is known; "" where nothing is."""
    when = when[:16].replace("T", " ") + (" UTC" if when.endswith("+00:00") else "")
    known = [f"{package} {versions[package]}" for package in _NAMED_PACKAGES if package in versions]
    facts = [fact for fact in (when, took, devices, *known) if fact]
    return f"{name}: {', '.join(facts)}" if facts else ""


def facts(inputs: Inputs) -> Iterator[str]:
    """Returns one line for the evaluation and one per run: date, duration, devices and versions, as far as recorded."""
    if r := inputs.results:
        took = f"{wording.duration(r.seconds)} long" if r.seconds else ""
        yield _line("Evaluation", r.created, took, r.devices, r.versions)
    for run in inputs.runs:
        seconds = run.seconds()
        took = f"{wording.duration(seconds)} long" if seconds else ""
        took += f" in {len(run.sessions)} sessions" if len(run.sessions) > 1 else ""
        first, last = (run.sessions[0], run.sessions[-1]) if run.sessions else (None, None)
        place = (last.devices, last.versions) if last else ("", {})
        yield _line(f"Run {run.name}", first.started if first else "", took, *place)


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
    lists: list[tuple[str, dict[str, Any], bool]] = []
    if r := inputs.results:
        steps = {w.label: "" if w.step is None else f", step {w.step}" for w in r.weights}
        lists.append(("Versions", {**r.versions, "devices": r.devices}, False))
        lists.append(("Weights", {w.label: f"{w.source}{steps[w.label]}" for w in r.weights}, False))
        lists.append(("Data", {name: task.data for name, task in r.tasks.items() if task.data}, False))
        lists.append(("Evaluation options", flatten(r.options or {}), False))
        lists += _config("Evaluation config", r.config or {})
    for run in inputs.runs:
        lists += _config(f"Training config, {run.name}", run.config)
    return [Part("fields", title=t, values=values, opened=opened) for t, values, opened in lists if values]


def _config(title: str, config: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """Returns the fields that differ from the defaults, open, and all others, folded."""
    values = flatten(config)
    if (defaults := _defaults(config)) is None:
        return [(title, values, False)]
    changed = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
    shown = {k: f"{v} (default {defaults[k]})" if k in defaults else v for k, v in changed.items()}
    rest = {k: v for k, v in values.items() if k not in changed}
    return [(f"{title}: what differs from the defaults", shown, True), (f"{title}: the rest", rest, False)]


def sources(inputs: Inputs) -> str:
    """Returns the text of the footer: the files that the page was made from."""
    files = [n for n in ("results.json", "predictions.csv", "metrics.jsonl") if (inputs.folder / n).is_file()]
    return f"Generated from {', '.join(files)} in {inputs.folder}. Exact values are in the tooltips."
