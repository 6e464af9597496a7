"""The report's sections on evaluation results: scores, patterns, timesteps and flipped items."""

from functools import partial
from html import escape
from typing import Any

from diva_jax.report import flips, wording
from diva_jax.report.charts import Chart, Row, Series, paired, points, rows
from diva_jax.report.sections import Section, cell, paragraph, swatch, table
from diva_jax.report.wording import Finding


def labels(results: dict[str, Any]) -> list[str]:
    """Returns the labels of the weights. The first one is the reference of comparisons."""
    return [w["label"] for w in results["weights"]]


def findings(results: dict[str, Any]) -> list[Finding]:
    """Returns the main results as sentences, in order of importance.

    These are the differences with an interval in each task's first metric, the last weights first. If there are two
    sets of weights, all metrics of tasks with at most three metrics are included. If there are no such differences,
    the scores themselves are returned.
    """
    out = []
    for task in results["tasks"].values():
        names = list(task["metrics"])
        names = names if len(names) <= 3 and len(results["weights"]) == 2 else names[:1]
        for c in reversed(task.get("comparisons", [])):
            for m in names:
                if c["scores"].get(m, {}).get("interval") and "difference" in c["scores"][m]:
                    out.append(_finding(task, c, m, len(results["weights"]) > 2))
    return out or _alone(results)


def _finding(task: dict, c: dict, metric: str, several: bool) -> Finding:
    info, difference = task["metrics"][metric], c["scores"][metric]
    what = f"{task['title']}, {info['title']}" + (f", {c['after']}" if several else "")
    control = c["before"] != next(iter(task["weights"]))  # The first weights are the reference.
    what += f" against the control {c['before']}" if control else ""
    before, after = (task["weights"][c[w]]["scores"][metric] for w in ("before", "after"))
    test = wording.mcnemar(difference.get("mcnemar"), task.get("items", "items"))
    meaning = wording.verdict(difference) + (f" {test}." if test else "")
    if control and wording.direction(difference) != "up":
        meaning = f"{c['after']} does not beat the control, so nothing can be claimed. {meaning}"
    return Finding(
        what, wording.change(before, after, difference, info["unit"]), meaning, wording.direction(difference)
    )


def _alone(results: dict) -> list[Finding]:
    """Returns the scores of an evaluation without comparisons."""
    out = []
    for task in results["tasks"].values():
        for m, info in list(task["metrics"].items())[:1]:
            for label, found in task["weights"].items():
                if m in found["scores"]:
                    s = found["scores"][m]
                    ends = wording.interval(s.get("interval"), info["unit"])
                    figures = wording.number(s["score"], info["unit"]) + (f" (95% interval {ends})" if ends else "")
                    meaning = f"Score of {label}; there are no other weights to compare with."
                    out.append(Finding(f"{task['title']}, {info['title']}", figures, meaning))
    return out


def sections(results: dict[str, Any]) -> list[Section]:
    """Returns one section per task, each followed by the sections of its flipped items."""
    out = []
    for name, task in results["tasks"].items():
        count = f"{task['count']:,} {task.get('items', 'items')}" if task.get("count") else ""
        body = [_scores(results, task), *_between(task), *_zero_lines(task)]
        body += _patterns(name, task, labels(results)) + _timesteps(name, task, labels(results))
        if not any("patterns" in w or "timesteps" in w for w in task["weights"].values()):
            body += _bars(name, task, labels(results))
        out.append(Section(task["title"], body, count))
        out += flips.sections(task)
    return out


def _scores(results: dict, task: dict) -> str:
    """Returns the table of scores: one row per metric, one column per set of weights and per comparison."""
    used = [w for w in labels(results) if w in task["weights"]]
    compared = [c for c in task.get("comparisons", []) if any("difference" in s for s in c["scores"].values())]
    head = ["Score"] + [f"{swatch(labels(results).index(w))}{escape(w)}" for w in used]
    head += ["Difference" if len(compared) == 1 else f"Difference, {escape(_what(task, c))}" for c in compared]
    lines = []
    for metric, info in task["metrics"].items():
        found = [task["weights"][w]["scores"].get(metric) for w in used]
        if not any(found):
            continue
        unit = info["unit"]
        name = escape(info["title"]) + (f" <small>{escape(unit)}</small>" if unit else "")
        line = [name] + [_score(s, unit) if s else "–" for s in found]
        line += [_difference(c["scores"].get(metric), unit, task.get("items", "items")) for c in compared]
        lines.append(line)
    known = any(s.get("interval") for w in used for s in task["weights"][w]["scores"].values())
    return table(head, lines) + (paragraph("Small figures are 95% intervals.", "fine") if known else "")


def _what(task: dict, c: dict) -> str:
    """Returns what a comparison is of; the first weights are the reference, and other ones are named."""
    against = "" if c["before"] == next(iter(task["weights"])) else f" against {c['before']}"
    return c["after"] + against


def _score(s: dict, unit: str) -> str:
    below = [wording.interval(s.get("interval"), unit)]
    if s.get("seeds"):
        below.append(f"{len(s['seeds'])} seeds, σ {wording.number(s.get('seeds_std'), unit)}")
    return cell(wording.number(s["score"], unit), below, s["score"])


def _difference(d: dict | None, unit: str, items: str) -> str:
    if not d or "difference" not in d:
        return "–"
    below = [wording.interval(d.get("interval"), unit)]
    if test := d.get("mcnemar"):
        below += [f"{test['won']} won, {test['lost']} lost", f"p {wording.p_value(test['p'])}"]
    return cell(wording.signed(d["difference"], unit), below, d["difference"], wording.direction(d))


def _between(task: dict) -> list[str]:
    """Returns the table of metrics that are defined only for two sets of weights, such as cosine similarity."""
    lines, compared = [], task.get("comparisons", [])
    for metric, info in task["metrics"].items():
        found = [c["scores"].get(metric) for c in compared]
        if any(f and "score" in f for f in found):
            lines.append([escape(info["title"])] + [_score(f, info["unit"]) if f else "–" for f in found])
    if not lines:
        return []
    return [table(["Between"] + [f"{escape(c['before'])} and {escape(c['after'])}" for c in compared], lines)]


def _zero_lines(task: dict) -> list[str]:
    """Returns one sentence for every condition gap whose interval contains zero."""
    out = []
    for label, found in task["weights"].items():
        for metric, s in found["scores"].items():
            if "gap" in metric and wording.excludes_zero(s.get("interval")) is False:
                info = task["metrics"][metric]
                ends = wording.interval(s["interval"], info["unit"])
                out.append(
                    f"{label}: {info['title']} is not different from zero (95% interval {ends}): these data show no "
                    "signal about the image in the U-Net's feedback."
                )
    return [paragraph(line, "plain") for line in out]


def _patterns(name: str, task: dict, order: list[str]) -> list[Chart]:
    """Returns one bar chart per metric with one row per pattern; all charts have the same axis."""
    have = [w for w in order if task["weights"].get(w, {}).get("patterns")]
    found = []
    for metric, info in task["metrics"].items():
        groups = {}
        for w in have:
            for p in task["weights"][w]["patterns"]:
                if s := p["scores"].get(metric):
                    groups.setdefault(p["name"], []).append(_value(w, order.index(w), s, info["unit"], p["name"]))
        if groups:
            data = [Row(g, v) for g, v in groups.items()]
            found.append((f"{name}-patterns-{metric}", f"Score per pattern, {info['title']}", data, info["unit"]))
    high = _end([row for _, _, data, _ in found for row in data])
    return paired([_row_chart(*chart, high) for chart in found])


def _bars(name: str, task: dict, order: list[str]) -> list[Chart]:
    """Returns a bar chart of all scores in percent if there are at least two of them."""
    data = []
    for metric, info in task["metrics"].items():
        values = [
            _value(w, i, task["weights"][w]["scores"][metric], "%", info["title"])
            for i, w in enumerate(order)
            if info["unit"] == "%" and metric in task["weights"].get(w, {}).get("scores", {})
        ]
        if values:
            data.append(Row(info["title"], values))
    return [_row_chart(f"{name}-scores", "Scores", data, "%", _end(data))] if len(data) > 1 else []


def _value(label: str, index: int, s: dict, unit: str, what: str):
    ends = tuple(s["interval"]) if s.get("interval") else None
    tip = f"{what}\n{label}: {wording.number(s['score'], unit)}{unit}"
    return label, index, s["score"], ends, tip + (f" ({wording.interval(ends, unit)})" if ends else "")


def _end(data: list[Row]) -> float:
    """Returns the upper end of an axis of percentages: 100 if the largest value exceeds 80, else that value."""
    reach = max((e for r in data for v in r.values for e in (v[2], *(v[3] or ()))), default=0.0)
    return 100.0 if reach > 80 else max(reach, 1.0)


def _row_chart(name: str, title: str, data: list[Row], unit: str, high: float) -> Chart:
    whiskers = any(v[3] for r in data for v in r.values)
    note = "Whiskers are 95% intervals." if whiskers else ""
    return Chart(name, partial(rows, title=title, data=data, unit=unit, high=high), note=note)


def _timesteps(name: str, task: dict, order: list[str]) -> list[Chart]:
    """Returns one chart per metric of the diffusion feedback: scores at the centres of the timestep bins."""
    charts = []
    for metric, info in task["metrics"].items():
        data = []
        for w in order:
            bins = [b for b in task["weights"].get(w, {}).get("timesteps", []) if metric in b["scores"]]
            if bins:
                places = [((b["low"] + b["high"]) / 2, b["scores"][metric]["score"]) for b in bins]
                data.append(Series(w, order.index(w), places, [b["scores"][metric].get("interval") for b in bins]))
        if data:
            title = f"{info['title']} by timestep"
            draw = partial(points, title=title, data=data, x_title="timestep", unit=info["unit"])
            charts.append(Chart(f"{name}-{metric}", draw))
    return paired(charts)
