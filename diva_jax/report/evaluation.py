"""The report's sections on evaluation results: scores, patterns, timesteps and flipped items."""

from functools import partial
from html import escape
from typing import Any

from diva_jax.report import alarms, flips, pictures, wording
from diva_jax.report.charts import Chart, Row, Series, paired, points, rows
from diva_jax.report.inputs import Inputs
from diva_jax.report.sections import Section, cell, paragraph, swatch, table
from diva_jax.report.wording import Finding


def labels(results: dict[str, Any]) -> list[str]:
    """Returns the labels of the weights. The first one is the reference of comparisons."""
    return [w["label"] for w in results["weights"]]


def prepared(inputs: Inputs) -> dict[str, Any]:
    """Returns the results as the functions below take them.

    `doubted` has the labels of weights whose scores are not read as improvements, see `alarms.doubted`. Readouts of a
    task that are the same are one metric.
    """
    tasks = {name: _once(task) for name, task in inputs.results["tasks"].items()}
    return inputs.results | {"tasks": tasks, "doubted": alarms.doubted(inputs)}


def _once(task: dict[str, Any]) -> dict[str, Any]:
    """Merges readouts that are the same, as a backbone's published readout and its pooled embedding can be.

    Metrics with patterns are readouts of the same items; those with equal values everywhere become the first of them,
    whose title names all.
    """
    if not any("patterns" in w for w in task["weights"].values()):
        return task

    def values(metric: str) -> list:
        weights = [[w["scores"].get(metric), *(p["scores"].get(metric) for p in w.get("patterns", []))]
                   for w in task["weights"].values()]  # fmt: skip
        flipped = [
            [{k: v for k, v in f.items() if k != "metric"} for f in c.get("flipped", []) if f["metric"] == metric]
            for c in task.get("comparisons", [])
        ]
        return [weights, [c["scores"].get(metric) for c in task.get("comparisons", [])], flipped]

    kept: dict[str, list[str]] = {}
    for metric in task["metrics"]:
        first = next((m for m in kept if values(m) == values(metric)), metric)
        kept.setdefault(first, []).append(metric)
    metrics = {m: dict(task["metrics"][m]) for m in kept}
    for m, same in kept.items():
        metrics[m]["title"] = " and ".join(task["metrics"][n]["title"] for n in same)
        metrics[m]["title"] += ", which are the same" * (len(same) > 1)
    return task | {"metrics": metrics}


def findings(results: dict[str, Any]) -> list[Finding]:
    """Returns the main results as sentences, in order of importance.

    These are the differences with an interval in each task's first metric, the last weights first. If there are two
    sets of weights, all metrics of tasks with at most three metrics are included. If there are no such differences,
    those without an interval are returned, and if there are none at all, the scores themselves.
    """
    known, others = [], []
    for task in results["tasks"].values():
        names = list(task["metrics"])
        names = names if len(names) <= 3 and len(results["weights"]) == 2 else names[:1]
        for c in reversed(task.get("comparisons", [])):
            for m in names:
                if "difference" in (d := c["scores"].get(m, {})):
                    found = _finding(task, c, m, len(results["weights"]) > 2, c["after"] in results["doubted"])
                    (known if d.get("interval") else others).append(found)
    return known or others or _alone(results)


def _finding(task: dict, c: dict, metric: str, several: bool, doubted: bool) -> Finding:
    info, difference = task["metrics"][metric], c["scores"][metric]
    what = f"{task['title']}, {info['title']}" + (f", {c['after']}" if several else "")
    control = c["before"] != next(iter(task["weights"]))  # The first weights are the reference.
    what += f" against the control {c['before']}" if control else ""
    before, after = (task["weights"][c[w]]["scores"][metric] for w in ("before", "after"))
    test = wording.mcnemar(difference.get("mcnemar"), task.get("items", "items"))
    meaning = wording.verdict(difference, wording.better(info)) + (f" {test}." if test else "")
    kind = wording.direction(difference, wording.better(info), doubted)
    if control and kind != "up":
        meaning = f"{c['after']} does not beat the control, so nothing can be claimed. {meaning}"
    if doubted:
        meaning = f"Not an improvement: see the first lines of this page. {meaning}"
    return Finding(what, wording.change(before, after, difference, info["unit"]), meaning, kind)


def _alone(results: dict) -> list[Finding]:
    """Returns the scores of an evaluation without comparisons."""
    out = []
    for task in results["tasks"].values():
        for m, info in list(task["metrics"].items())[:1]:
            for label, found in task["weights"].items():
                if m in found["scores"]:
                    s = found["scores"][m]
                    decimals = wording.places((s["score"], *(s.get("interval") or ())), info["unit"])
                    ends = wording.interval(s.get("interval"), info["unit"], decimals)
                    figures = wording.number(s["score"], info["unit"], decimals)
                    figures += f" (95% interval {ends})" if ends else ""
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
        body += pictures.strips(task, labels(results))
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
    lines, doubted = [], results["doubted"]
    for metric, info in task["metrics"].items():
        found = [task["weights"][w]["scores"].get(metric) for w in used]
        if not any(found):
            continue
        differences = [c["scores"].get(metric) for c in compared]
        unit, decimals = info["unit"], _places([*found, *differences], info["unit"])
        name = escape(info["title"]) + (f" <small>{escape(unit)}</small>" if unit else "")
        line = [name] + [_score(s, unit, decimals) if s else "–" for s in found]
        line += [
            _difference(d, info, decimals, c["after"] in doubted) for c, d in zip(compared, differences, strict=True)
        ]
        lines.append(line)
    known = any(s.get("interval") for w in used for s in task["weights"][w]["scores"].values())
    return table(head, lines) + (paragraph("Small figures are 95% intervals.", "fine") if known else "")


def _what(task: dict, c: dict) -> str:
    """Returns what a comparison is of; the first weights are the reference, and other ones are named."""
    against = "" if c["before"] == next(iter(task["weights"])) else f" against {c['before']}"
    return c["after"] + against


def _places(found: list[dict | None], unit: str) -> int | None:
    """Returns the decimals of a row with these scores and differences, see `wording.places`."""
    rows = [s for s in found if s]
    values = [s.get(key) for s in rows for key in ("score", "difference")]
    return wording.places([*values, *(e for s in rows for e in s.get("interval") or ())], unit)


def _interval(s: dict, unit: str, decimals: int | None) -> str:
    return "no interval: all items agree" if s.get("alike") else wording.interval(s.get("interval"), unit, decimals)


def _score(s: dict, unit: str, decimals: int | None) -> str:
    below = [_interval(s, unit, decimals)]
    if s.get("seeds"):
        below.append(f"{len(s['seeds'])} seeds, σ {wording.number(s.get('seeds_std'), unit, decimals)}")
    return cell(wording.number(s["score"], unit, decimals), below, s["score"])


def _difference(d: dict | None, info: dict, decimals: int | None, doubted: bool) -> str:
    if not d or "difference" not in d:
        return "–"
    unit, below = info["unit"], [_interval(d, info["unit"], decimals)]
    if test := d.get("mcnemar"):
        below += [f"{test['won']} won, {test['lost']} lost", f"p {wording.p_value(test['p'])}"]
    kind = wording.direction(d, wording.better(info), doubted)
    return cell(wording.signed(d["difference"], unit, decimals), below, d["difference"], kind)


def _between(task: dict) -> list[str]:
    """Returns the table of metrics that are defined only for two sets of weights, such as cosine similarity."""
    lines, compared = [], task.get("comparisons", [])
    for metric, info in task["metrics"].items():
        found = [c["scores"].get(metric) for c in compared]
        if any(f and "score" in f for f in found):
            unit = info["unit"]
            name = escape(info["title"]) + (f" <small>{escape(unit)}</small>" if unit else "")
            lines.append([name] + [_score(f, unit, _places(found, unit)) if f else "–" for f in found])
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
    note = "Whiskers are 95% intervals; where all items agree there is none." if whiskers else ""
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
