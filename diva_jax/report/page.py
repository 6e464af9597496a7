"""The HTML page: a header with the main results, the sections, and the configs. It loads no other files."""

import itertools
from html import escape
from typing import Any

from diva_jax.report import evaluation, training
from diva_jax.report.charts import Chart
from diva_jax.report.inputs import Inputs, flat
from diva_jax.report.sections import Section
from diva_jax.report.style import css
from diva_jax.report.wording import Finding

# Chart widths [CSS pixels]: full and half of a wide page, and a phone. Charts are drawn once per width and not
# scaled, so that their text has the same size as the page's.
WIDE, HALF, NARROW = 918, 426, 328
# The browser may not load anything: images and styles are embedded in the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def sections(inputs: Inputs) -> list[Section]:
    """Returns the sections of all inputs that are present."""
    found = evaluation.sections(inputs.results) if inputs.results else []
    return found + training.sections(inputs.runs)


def html(inputs: Inputs, body: list[Section]) -> str:
    """Returns the HTML document.

    Args:
      inputs: the content of the report.
      body: the result of `sections(inputs)`.
    """
    found = evaluation.findings(inputs.results) if inputs.results else []
    found += [training.finding(run) for run in inputs.runs]
    parts = [_header(inputs, found), *(_section(s) for s in body), _setup(inputs), _footer(inputs)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(found[0].what)}: {escape(found[0].figures)}</title>"
        f'<link rel="icon" href="data:,"><style>{css()}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(inputs: Inputs, found: list[Finding]) -> str:
    created = (inputs.results or {}).get("created", "")[:16].replace("T", " ")
    eyebrow = " · ".join(p for p in ("diva_jax report", inputs.folder.resolve().name, created) if p)
    first, *others = found
    figures, _, rest = first.figures.partition(" (")
    tail = f" <small>{escape('(' + rest)}</small>" if rest else ""
    lines = "".join(
        f'<li class="{f.kind}">{escape(f"{f.what}: {f.figures}")}<small>{escape(f.meaning)}</small></li>'
        for f in others
    )
    return (
        f'<header><p class="eyebrow">{escape(eyebrow)}</p>'
        f"<h1><span>{escape(first.what)}:</span> {escape(figures)}{tail}</h1>"
        + (f'<p class="lead {first.kind}">{escape(first.meaning)}</p>' if first.meaning else "")
        + (f'<ul class="findings">{lines}</ul>' if lines else "")
        + "</header>"
    )


def _section(s: Section) -> str:
    note = f"<p>{escape(s.note)}</p>" if s.note else ""
    body = []
    for is_chart, run in itertools.groupby(s.body, lambda part: isinstance(part, Chart)):
        inside = "".join(_figure(part) if is_chart else part for part in run)
        body.append(f'<div class="figures">{inside}</div>' if is_chart else inside)
    return f"<section><header><h2>{escape(s.title)}</h2>{note}</header>{''.join(body)}</section>"


def _figure(chart: Chart) -> str:
    note = f"<figcaption>{escape(chart.note)}</figcaption>" if chart.note else ""
    wide, narrow = (chart.draw(w).svg() for w in (HALF if chart.half else WIDE, NARROW))
    kind = ' class="half"' if chart.half else ""
    return f'<figure{kind}><div class="wide">{wide}</div><div class="narrow">{narrow}</div>{note}</figure>'


def _setup(inputs: Inputs) -> str:
    """Returns the section of versions, sources and configs, each as a list that can be opened."""
    lists = []
    if inputs.results:
        r = inputs.results
        lists.append(("Versions", {**r.get("versions", {}), "devices": r.get("devices", "")}))
        lists.append(("Weights", {w["label"]: _source(w) for w in r["weights"]}))
        lists.append(("Data", {n: t["data"] for n, t in r["tasks"].items() if "data" in t}))
        lists.append(("Evaluation options", flat(r.get("options") or {})))
        lists.append(("Evaluation config", flat(r.get("config") or {})))
    lists += [(f"Training config, {run.name}", flat(run.config)) for run in inputs.runs]
    body = [_details(title, values, i == 0) for i, (title, values) in enumerate(lists) if values]
    return f"<section><header><h2>Config and versions</h2></header>{''.join(body)}</section>" if body else ""


def _source(w: dict[str, Any]) -> str:
    return f"{w.get('source')}" + (f", step {w['step']}" if w.get("step") is not None else "")


def _details(title: str, values: dict[str, Any], opened: bool) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)} <small>{len(values)}</small></summary>"
        f"<dl>{rows}</dl></details>"
    )


def _footer(inputs: Inputs) -> str:
    files = [n for n in ("results.json", "predictions.csv", "metrics.jsonl") if (inputs.folder / n).is_file()]
    where = escape(f"{', '.join(files)} in {inputs.folder}")
    return f"<footer>Generated from {where}. Exact values are in the tooltips.</footer>"
