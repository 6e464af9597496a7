"""The HTML page: what is wrong, the main results, contents, the sections, and the configs. It loads no other files."""

from pathlib import Path

import jinja2

from diva_jax.report import about, alarms, evaluation, images, training
from diva_jax.report.figures import COLOURS, NARROW, Chart, colour_role
from diva_jax.report.inputs import Inputs
from diva_jax.report.sections import Section


def sections(inputs: Inputs) -> list[Section]:
    """Returns the sections of all inputs that are present."""
    out = evaluation.sections(inputs) if inputs.results else []
    if content := inputs.image_rows:
        out.append(Section(content.title, images.rows(content, Path(inputs.folder)), content.note))
    out += training.sections(inputs.runs)
    configs = about.section(inputs)
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
        facts=list(about.facts(inputs)),
        contents=contents,
        sections=body,
        footer=about.sources(inputs),
        colours=COLOURS,
    )
