"""The report's sections on evaluation results: scores, patterns, timesteps and flipped items."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from diva_jax.common.results_schema import Comparison, Difference, Metric, Results, Score, Summary, Task, Weights
from diva_jax.evals.results import LESS, MORE
from diva_jax.report import alarms, images, wording
from diva_jax.report.charts import Row, Series, arrows, bars, legend, points
from diva_jax.report.figures import Cell, Chart, Label, Part, Section, colour_role, in_pairs
from diva_jax.report.inputs import Inputs
from diva_jax.report.wording import Finding

# Weights that a task has scores of: the index of their colour, their label, and their scores.
Used = list[tuple[int, str, Weights]]
_NO_IMPROVEMENT = "Not an improvement: see the first lines of this page."


def findings(inputs: Inputs) -> list[Finding]:
    """The main results as sentences: first what comparisons say in words, then the differences with an interval in each
    task's first metric (with two sets of weights, in all metrics of tasks with at most three), the last weights first.
    Without such differences, those without an interval; without any, the scores themselves."""
    results, doubted, known, others = inputs.results, alarms.doubted(inputs), [], []
    for task in results.tasks.values():
        names = list(task.metrics)
        names = names if len(names) <= 3 and len(results.labels) == 2 else names[:1]
        for c in reversed(task.comparisons):
            for metric in names:
                if difference := c.differences().get(metric):
                    finding = _finding(task, c, metric, len(results.labels) > 2, c.after in doubted)
                    (known if difference.known_interval else others).append(finding)
    return [_in_words(s, doubted) for s in results.summary] + (known or others or list(_scores_alone(results)))


def _in_words(s: Summary, doubted: set[str]) -> Finding:
    kind, meaning = {MORE: "up won", LESS: "down lost"}.get(s.says, "zero"), f"{s.detail}."
    if s.after in doubted and s.says == MORE:
        kind, meaning = "up doubted", f"{_NO_IMPROVEMENT} {meaning}"
    return Finding(s.what, s.says, meaning, kind)


def _finding(task: Task, c: Comparison, metric: str, several: bool, doubted: bool) -> Finding:
    info, difference = task.metrics[metric], c.differences()[metric]
    control = c.before in task.controls
    what = f"{task.title}, {info.title}" + (f", {c.after}" if several else "")
    what += f" against the control {c.before}" if control else ""
    before, after = (task.weights[label].scores[metric] for label in (c.before, c.after))
    meaning = wording.verdict(difference, info.direction)
    if test := difference.mcnemar:
        meaning += f" {test.won} {task.items} won, {test.lost} lost, exact McNemar p {wording.p_value(test.p)}."
    kind = wording.direction(difference, info.direction, doubted)
    if control and info.direction and not kind.endswith(("won", "doubted")):
        meaning = f"{c.after} does not beat the control, so nothing can be claimed. {meaning}"
    if doubted:
        meaning = f"{_NO_IMPROVEMENT} {meaning}"
    return Finding(what, wording.change(before, after, difference, info.unit), meaning, kind)


def _scores_alone(results: Results) -> Iterator[Finding]:
    """Returns the scores of an evaluation without comparisons."""
    for task in results.tasks.values():
        for metric, info in list(task.metrics.items())[:1]:
            for label, weights in task.weights.items():
                if score := weights.scores.get(metric):
                    decimals = wording.places([score.score, *(score.known_interval or ())], info.unit)
                    figures = wording.number(score.score, info.unit, decimals)
                    if score.known_interval:
                        figures += f" (95% interval {wording.interval(score.known_interval, info.unit, decimals)})"
                    meaning = f"Score of {label}; there are no other weights to compare with."
                    yield Finding(f"{task.title}, {info.title}", figures, meaning)


def sections(inputs: Inputs) -> list[Section]:
    """Returns one section per task, each followed by the sections of its flipped items."""
    labels, doubted = inputs.results.labels, alarms.doubted(inputs)
    out = [Section("Matches and zero-shot", [Part("charts", charts=kept)])] if (kept := _kept(inputs.results)) else []
    for name, task in inputs.results.tasks.items():
        parts = [_score_table(labels, task, doubted), *_between(task), *_zero_lines(task)]
        used = [(i, label, task.weights[label]) for i, label in enumerate(labels) if label in task.weights]
        charts = _patterns(name, task, used) + _timesteps(name, task, used) or _all_scores(name, task, used)
        parts += [Part("charts", charts=charts)] if charts else []
        parts += images.segmented(task, labels)
        count = f"{task.count:,} {task.items}" if task.count else ""
        out += [Section(task.title, parts, count), *images.flipped(task)]
    return out


def _kept(results: Results) -> list[Chart]:
    """Returns one chart of matches against zero-shot accuracy, with an arrow for each comparison with the reference."""
    found = [(results.tasks[v.task], v.matches) for s in results.summary for v in s.verdicts]
    found = [(task, metric) for task, metric in found if metric in task.metrics]
    cost = results.tasks.get("zeroshot")
    if not (found and cost and "acc1" in cost.metrics):
        return []
    (task, metric), data = found[0], {}
    for i, label in enumerate(results.labels):
        scores = [t.weights[label].scores.get(m) for t, m in ((cost, "acc1"), found[0]) if label in t.weights]
        if len(scores) == 2 and all(scores):
            data[label] = (i, *scores)
    if results.labels[0] not in data or len(data) < 2:
        return []
    draw = partial(arrows, data=list(data.values()), x_title="zero-shot accuracy, %")
    title = f"{task.title}, {task.metrics[metric].title} [%], against zero-shot accuracy [%]"
    note = "Arrows lead from the reference; whiskers are 95% intervals. To the right and up is better."
    return [Chart("matches-zeroshot", title, [(label, i) for label, (i, *_) in data.items()], draw, note=note)]


def _score_table(labels: list[str], task: Task, doubted: set[str]) -> Part:
    """Returns the table of scores: one row per metric, one column per set of weights and per comparison."""
    used = [w for w in labels if w in task.weights]
    compared = [c for c in task.comparisons if c.differences()]
    head = [Label("Score")] + [Label(w, role=colour_role(labels.index(w))) for w in used]
    against = [f"{c.after} against {c.before}" if c.before in task.controls else c.after for c in compared]
    head += [Label("Difference" if len(compared) == 1 else f"Difference, {what}") for what in against]
    columns = [(task.weights[w].scores, False) for w in used]
    rows = _rows(task, columns + [(c.differences(), c.after in doubted) for c in compared])
    known = any(s.known_interval for scores, _ in columns for s in scores.values())
    return Part("table", head=head, rows=rows, note="Small figures are 95% intervals." if known else "")


def _rows(task: Task, columns: Sequence[tuple[Mapping[str, Score | Difference], bool]]) -> list[tuple[Label, list]]:
    """A row for each metric that one of the columns has: (metric -> score or difference, whether that is doubted)."""
    rows = []
    for metric, info in task.metrics.items():
        cells = [(scores.get(metric), doubted) for scores, doubted in columns]
        if known := [s for s, _ in cells if s]:
            decimals = wording.places([x for s in known for x in (s.value, *(s.known_interval or ()))], info.unit)
            rows.append((Label(info.title, info.unit), [s and _cell(s, info, decimals, d) for s, d in cells]))
    return rows


def _cell(s: Score | Difference, info: Metric, decimals: int | None, doubted: bool) -> Cell:
    unit = info.unit
    below = ["no interval: all items agree" if s.all_agree else wording.interval(s.known_interval, unit, decimals)]
    if s.runs_interval:
        below.append(f"{len(s.runs)} runs, {wording.interval(s.runs_interval, unit, decimals)}")
    if isinstance(s, Score):
        if s.seeds:
            below.append(f"{len(s.seeds)} seeds, σ {wording.number(s.seeds_std, unit, decimals)}")
        return Cell(wording.number(s.score, unit, decimals), below, s.score)
    if test := s.mcnemar:
        below += [f"{test.won} won, {test.lost} lost", f"p {wording.p_value(test.p)}"]
    kind = wording.direction(s, info.direction, doubted)
    return Cell(wording.signed(s.difference, unit, decimals), below, s.difference, kind)


def _between(task: Task) -> list[Part]:
    """Returns the table of metrics that are defined only for two sets of weights, such as cosine similarity."""
    rows = _rows(task, [({m: s for m, s in c.scores.items() if isinstance(s, Score)}, False) for c in task.comparisons])
    head = [Label("Between"), *(Label(f"{c.before} and {c.after}") for c in task.comparisons)]
    return [Part("table", head=head, rows=rows)] if rows else []


def _zero_lines(task: Task) -> Iterator[Part]:
    """Returns one sentence for every condition gap whose interval contains zero."""
    for label, weights in task.weights.items():
        for metric, s in weights.scores.items():
            if "gap" in metric and wording.excludes_zero(s.known_interval) is False:
                info = task.metrics[metric]
                ends = wording.interval(s.known_interval, info.unit)
                line = f"{label}: {info.title} is not different from zero (95% interval {ends}): these data show no "
                yield Part("paragraph", line=f"{line}signal about the image in the U-Net's feedback.", kind="plain")


def _patterns(name: str, task: Task, used: Used) -> list[Chart]:
    """Returns one bar chart per metric with one row per pattern; all charts have the same axis."""
    charts = []
    for metric, info in task.metrics.items():
        if info.answers in ("text", "group"):
            continue
        groups: dict[str, list] = {}
        for i, label, weights in used:
            for p in weights.patterns:
                if s := p.scores.get(metric):
                    groups.setdefault(p.name, []).append(_bar(label, i, s, info.unit, p.name))
        if groups:
            rows = [Row(pattern, values) for pattern, values in groups.items()]
            charts.append((f"{name}-patterns-{metric}", f"Score per pattern, {info.title}", rows, info.unit))
    return in_pairs(_bar_charts(charts))


def _all_scores(name: str, task: Task, used: Used) -> list[Chart]:
    """Returns a bar chart of all scores in percent if there are at least two of them."""
    rows = []
    for metric, info in task.metrics.items():
        scores = [(i, label, weights.scores.get(metric)) for i, label, weights in used if info.unit == "%"]
        if values := [_bar(label, i, s, "%", info.title) for i, label, s in scores if s]:
            rows.append(Row(info.title, values))
    return _bar_charts([(f"{name}-scores", "Scores", rows, "%")]) if len(rows) > 1 else []


def _bar(label: str, index: int, s: Score, unit: str, what: str) -> tuple:
    """A value of a `charts.Row`."""
    ends = s.known_interval
    between = f" ({wording.interval(ends, unit)})" if ends else ""
    return label, index, s.score, ends, f"{what}\n{label}: {wording.number(s.score, unit)}{unit}{between}"


def _bar_charts(charts: list[tuple[str, str, list[Row], str]]) -> list[Chart]:
    """Charts (name, title, rows, unit) with one axis, to 100 if the largest value exceeds 80, else to that value."""
    ends = [e for _, _, rows, _ in charts for r in rows for v in r.values for e in (v[2], *(v[3] or ()))]
    high, out = 100.0 if max(ends, default=0.0) > 80 else max([1.0, *ends]), []
    for name, title, rows, unit in charts:
        values = [v for r in rows for v in r.values]
        note = "Whiskers are 95% intervals; where all items agree there is none." * any(v[3] for v in values)
        legend = list(dict.fromkeys((v[0], v[1]) for v in values))
        out.append(Chart(name, title, legend, partial(bars, data=rows, unit=unit, high=high), note=note))
    return out


def _timesteps(name: str, task: Task, used: Used) -> list[Chart]:
    """Returns one chart per metric of the diffusion feedback: scores at the centres of the timestep bins."""
    charts = []
    for metric, info in task.metrics.items():
        data = []
        for i, label, weights in used:
            if bins := [b for b in weights.timesteps if metric in b.scores]:
                places = [((b.low + b.high) / 2, b.scores[metric].score) for b in bins]
                data.append(Series(label, i, places, [b.scores[metric].known_interval for b in bins]))
        if data:
            draw = partial(points, data=data, x_title="timestep", unit=info.unit)
            charts.append(Chart(f"{name}-{metric}", f"{info.title} by timestep", legend(data), draw))
    return in_pairs(charts)
