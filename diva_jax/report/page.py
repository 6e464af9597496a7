"""The HTML page, which loads no other files: what is wrong, the main results, contents, and the sections."""

import json
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2

from diva_jax import config
from diva_jax.common import config_files
from diva_jax.common.errors import UserError
from diva_jax.common.fields import flatten
from diva_jax.models import backbones
from diva_jax.report import evaluation, images, wording
from diva_jax.report.charts import Series, curves, legend, points
from diva_jax.report.figures import COLOURS, NARROW, Chart, Label, Part, Section, colour_role, in_pairs
from diva_jax.report.inputs import Inputs, Run
from diva_jax.report.wording import Finding

_CHANGED = ": what differs from the defaults"
# Key of metrics.jsonl -> (title, whether it is read against zero, in half of a wide page), in order of importance.
_CURVES = {
    "loss": ("Loss", False),
    "grad_norm": ("Gradient norm before clipping", False),
    "lr": ("Learning rate", True),
    "images_per_s": ("Images per second", True),
}
# Prefixes of keys from evaluations during training, and suffixes of the ends of their intervals.
_EVALUATED = ("eval/", "feedback/")
_ENDS = ("/low", "/high")


def sections(inputs: Inputs) -> list[Section]:
    """Returns the sections of all inputs that are present."""
    out = evaluation.sections(inputs) if inputs.results else []
    if content := inputs.image_rows:
        out.append(Section(content.title, images.rows(content, Path(inputs.folder)), content.note))
    out += run_sections(inputs.runs)
    configs = about(inputs)
    return out + ([Section("Config and versions", configs)] if configs else [])


def charts(body: list[Section]) -> list[Chart]:
    """Returns the charts of some sections, in order."""
    return [chart for s in body for part in s.body if part.macro == "charts" for chart in part.arguments["charts"]]


def html(inputs: Inputs, body: list[Section]) -> str:
    """The HTML document with the result of `sections(inputs)`."""
    findings = evaluation.findings(inputs) if inputs.results else []
    findings += [run_finding(run) for run in inputs.runs]
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("diva_jax.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.globals.update(colour_role=colour_role, narrow=NARROW, wording=wording, median=median)
    content = dict(inputs=inputs, findings=findings, alarms=evaluation.alarms(inputs), sections=body, colours=COLOURS)
    return templates.get_template("page.html").render(content)


def _defaults(stored: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the flat default config of a run's objective, with the nearest backbone of the table; None if unknown."""
    name = str(stored.get("objective"))
    if "." in name and not config_files.is_own(name):
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
        lists.append(("Versions", {**r.versions, "devices": r.devices}))
        lists.append(("Weights", {w.label: "; ".join(p.place for p in w.members or [w]) for w in r.weights}))
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


def run_finding(run: Run) -> Finding:
    """Returns a run's progress and the change of its loss."""
    loss = [v for _, v in run.curve("loss")]
    progress = f"{run.name}, step {run.rows[-1]['step']:,}" + (f" of {run.total:,}" if run.total else "")
    if not loss:
        return Finding(progress, "", figures="no loss logged")
    some = max(1, len(loss) // 20)
    means = fmean(loss[:some]), fmean(loss[-some:])
    figures = "\u00a0→\u00a0".join(wording.number(v, "", wording.places(means, "")) for v in means)
    meaning = f"Means over the first and the last {some} of {len(loss)} logged rows."
    return Finding(progress, meaning, figures=f"loss {figures}")


def run_sections(runs: list[Run]) -> list[Section]:
    """Returns a section with the curves of all runs, and one with the evaluations during training."""
    if not runs:
        return []
    charts, first = [], runs[0]
    marks = [(end, f"end of stage {name}") for name, end in first.stages[:-1] if 0 < end < first.rows[-1]["step"]]
    for key, (title, half) in _CURVES.items():
        if data := [Series(r.name, r.index, r.curve(key)) for r in runs if r.curve(key)]:
            draw = partial(curves, data=data, x_title="step", marks=marks, linear=half)
            smooth = max(len(s.points) for s in data) > 20 and not half
            note = "The bold line is the moving mean over 5% of the rows." * smooth
            charts.append(Chart(f"training-{key}", title, legend(data), draw, half, note))
    head = [Label(name) for name in ("Run", "Steps", "Loss", "Images/s", "Data wait", "Broken images")]
    training = [Part("runs", head=head, runs=runs), Part("charts", charts=charts)]
    found = {"Training": training[: 1 + bool(charts)], "During training": _evaluated(runs)}
    return [Section(title, parts) for title, parts in found.items() if parts]


def _evaluated(runs: list[Run]) -> list[Part]:
    """One small chart per key of the evaluations during training; `KEY/low` and `KEY/high` are its interval."""
    keys = dict.fromkeys(k for r in runs for row in r.rows for k in row if k.startswith(_EVALUATED))
    charts, lines = [], []
    for key in (k for k in keys if not k.endswith(_ENDS)):
        data = []
        for r in runs:
            if curve := r.curve(key):
                low, high = (dict(r.curve(key + end)) for end in _ENDS)
                # An interval of width zero comes from items that all agree.
                at = [(low[x], high[x]) if x in low and x in high and low[x] < high[x] else None for x, _ in curve]
                data.append(Series(r.name, r.index, curve, at))
                if "gap" in key and wording.excludes_zero(at[-1]) is False:
                    interval = wording.interval(at[-1], "", wording.places(at[-1], ""))
                    lines.append(f"{r.name}, step {curve[-1][0]:,}: {key} is not different from zero ({interval}).")
        title = ", ".join(key.removeprefix("eval/").replace("_", " ").split("/"))
        if data:
            draw = partial(points, data=data, x_title="step")
            charts.append(Chart("training-" + key.replace("/", "-"), title, legend(data), draw))
    parts = [Part("paragraph", line=line, kind="plain") for line in lines]
    return parts + ([Part("charts", charts=in_pairs(charts))] if charts else [])
