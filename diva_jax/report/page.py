"""The HTML page: what is wrong, the main results, contents, the sections, and the configs. It loads no other files."""

import itertools
from html import escape

from diva_jax.report import about, alarms, evaluation, pictures, training
from diva_jax.report.charts import Chart
from diva_jax.report.inputs import Inputs
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
    found = evaluation.sections(evaluation.prepared(inputs)) if inputs.results else []
    if e := inputs.estimates:
        found.append(Section(e["title"], pictures.estimates(e, inputs.folder), e["note"]))
    return found + training.sections(inputs.runs)


def html(inputs: Inputs, body: list[Section]) -> str:
    """Returns the HTML document.

    Args:
      inputs: the content of the report.
      body: the result of `sections(inputs)`.
    """
    found = evaluation.findings(evaluation.prepared(inputs)) if inputs.results else []
    found += [training.finding(run) for run in inputs.runs]
    wrong = alarms.of(inputs)
    configs = about.section(inputs)
    body = [*body, *([Section("Config and versions", [configs])] if configs else [])]
    parts = [_strip(wrong), _header(inputs, found), _contents(body), *map(_section, body, range(len(body)))]
    title = f"{found[0].what}: {found[0].figures}"
    if wrong and wrong[0].kind == "bad":
        title = f"{wrong[0].title}! {title}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title>"
        f'<link rel="icon" href="data:,"><style>{css()}</style></head>'
        f"<body><main>{''.join(parts)}<footer>{escape(about.sources(inputs))}</footer></main></body></html>\n"
    )


def _strip(wrong: list[alarms.Alarm]) -> str:
    lines = "".join(f'<li class="{a.kind}"><b>{escape(a.title)}.</b> {escape(a.text)}</li>' for a in wrong)
    return f'<ul class="alarms" aria-label="What is wrong or in doubt">{lines}</ul>' if wrong else ""


def _header(inputs: Inputs, found: list[Finding]) -> str:
    first, *others = found
    figures, _, rest = first.figures.partition(" (")
    tail = f" <small>{escape('(' + rest)}</small>" if rest else ""
    lines = "".join(
        f'<li class="{f.kind}">{escape(f"{f.what}: {f.figures}")}<small>{escape(f.meaning)}</small></li>'
        for f in others
    )
    facts = "".join(f"<li>{escape(line)}</li>" for line in about.facts(inputs))
    return (
        f'<header><p class="eyebrow">diva_jax report · {escape(inputs.folder.resolve().name)}</p>'
        f"<h1><span>{escape(first.what)}:</span> {escape(figures)}{tail}</h1>"
        + (f'<p class="lead {first.kind}">{escape(first.meaning)}</p>' if first.meaning else "")
        + (f'<ul class="findings">{lines}</ul>' if lines else "")
        + (f'<ul class="facts">{facts}</ul>' if facts else "")
        + "</header>"
    )


def _contents(body: list[Section]) -> str:
    """Returns the row of links to the sections; sections of the same title are one link, to the first."""
    first: dict[str, int] = {}
    for i, s in enumerate(body):
        first.setdefault(s.title, i)
    links = "".join(f'<a href="#s{i}">{escape(title)}</a>' for title, i in first.items())
    return f'<nav aria-label="Contents">{links}</nav>' if len(first) > 1 else ""


def _section(s: Section, number: int) -> str:
    note = f"<p>{escape(s.note)}</p>" if s.note else ""
    body = []
    for is_chart, run in itertools.groupby(s.body, lambda part: isinstance(part, Chart)):
        inside = "".join(_figure(part) if is_chart else part for part in run)
        body.append(f'<div class="figures">{inside}</div>' if is_chart else inside)
    return f'<section id="s{number}"><header><h2>{escape(s.title)}</h2>{note}</header>{"".join(body)}</section>'


def _figure(chart: Chart) -> str:
    note = f"<figcaption>{escape(chart.note)}</figcaption>" if chart.note else ""
    wide, narrow = (chart.draw(w).svg() for w in (HALF if chart.half else WIDE, NARROW))
    kind = ' class="half"' if chart.half else ""
    return f'<figure{kind}><div class="wide">{wide}</div><div class="narrow">{narrow}</div>{note}</figure>'
