"""The HTML page: what is wrong, the main results, contents, the sections, and the configs. It loads no other files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from diva_jax import config
from diva_jax.common import imports
from diva_jax.common.errors import UserError
from diva_jax.common.fields import flatten
from diva_jax.models import backbones
from diva_jax.report import alarms, evaluation, images, training, wording
from diva_jax.report.figures import COLOURS, NARROW, Chart, Part, Section, colour_role
from diva_jax.report.inputs import Inputs, Session

# Packages whose versions the header names.
_NAMED_PACKAGES = ("diva_jax", "jax", "flax", "python")
_CHANGED = ": what differs from the defaults"


def sections(inputs: Inputs) -> list[Section]:
    """Returns the sections of all inputs that are present."""
    out = evaluation.sections(inputs) if inputs.results else []
    if content := inputs.image_rows:
        out.append(Section(content.title, images.rows(content, Path(inputs.folder)), content.note))
    out += training.sections(inputs.runs)
    configs = about(inputs)
    return out + ([Section("Config and versions", configs)] if configs else [])


def charts(body: list[Section]) -> list[Chart]:
    """Returns the charts of some sections, in order."""
    return [chart for s in body for part in s.body if part.macro == "charts" for chart in part.arguments["charts"]]


def html(inputs: Inputs, body: list[Section]) -> str:
    """The HTML document with the result of `sections(inputs)`."""
    findings = evaluation.findings(inputs) if inputs.results else []
    findings += [training.finding(run) for run in inputs.runs]
    wrong = alarms.of(inputs)
    title = f"{findings[0].what}: {findings[0].figures}"
    if wrong and wrong[0].kind == "bad":
        title = f"{wrong[0].title}! {title}"
    contents: dict[str, int] = {}
    for number, s in enumerate(body):
        # Sections of the same title are one link, to the first.
        contents.setdefault(s.title, number)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("diva_jax.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.globals.update(colour_role=colour_role, narrow=NARROW)
    return templates.get_template("page.html").render(
        title=title,
        folder=inputs.folder.resolve().name,
        alarms=wrong,
        first=findings[0],
        findings=findings[1:],
        facts=list(facts(inputs)),
        contents=contents,
        sections=body,
        footer=sources(inputs),
        colours=COLOURS,
    )


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


def _defaults(stored: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the flat default config of a run's objective, with the nearest backbone of the table; None if unknown."""
    name = str(stored.get("objective"))
    if "." in name and not imports.is_own(name):
        return None
    try:
        own = stored["backbone"]
        name = min(
            backbones.TABLE,
            key=lambda row: sum(own.get(f) != v for f, v in vars(backbones.TABLE[row]).items() if f != "text"),
        )
        defaults = flatten(json.loads(config.default(name, objective=stored["objective"]).to_json()))
    except (KeyError, TypeError, AttributeError, UserError):
        return None
    return defaults if flatten(stored).keys() & defaults.keys() else None


def about(inputs: Inputs) -> list[Part]:
    """Returns the content of the section, as lists that can be opened; of configs, what differs from the defaults."""
    lists: list[tuple[str, dict[str, Any]]] = []
    stored = [(f"Training config, {run.name}", run.config) for run in inputs.runs]
    if r := inputs.results:
        steps = {w.label: "" if w.step is None else f", step {w.step}" for w in r.weights}
        lists.append(("Versions", {**r.versions, "devices": r.devices}))
        lists.append(("Weights", {w.label: f"{w.source}{steps[w.label]}" for w in r.weights}))
        lists.append(("Data", {name: task.data for name, task in r.tasks.items() if task.data}))
        lists.append(("Evaluation options", flatten(r.options or {})))
        stored.insert(0, ("Evaluation config", r.config or {}))
    for title, own in stored:
        values, defaults = flatten(own), _defaults(own)
        if defaults is None:
            lists.append((title, values))
            continue
        changed = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
        shown = {k: f"{v} (default {defaults[k]})" if k in defaults else v for k, v in changed.items()}
        lists.append((title + _CHANGED, shown))
        lists.append((f"{title}: the rest", {k: v for k, v in values.items() if k not in changed}))
    return [Part("fields", title=t, values=v, opened=t.endswith(_CHANGED)) for t, v in lists if v]


def sources(inputs: Inputs) -> str:
    """Returns the text of the footer: the files that the page was made from."""
    files = [n for n in ("results.json", "predictions.csv", "metrics.jsonl") if (inputs.folder / n).is_file()]
    return f"Generated from {', '.join(files)} in {inputs.folder}. Exact values are in the tooltips."
