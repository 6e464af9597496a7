"""The report's sections on evaluation results; and the strip at the top of the page, what is wrong or in doubt."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from diva_jax.common.errors import listing
from diva_jax.common.results_schema import Comparison, Results, Score, Task, Weights
from diva_jax.evals.results import LESS, MORE
from diva_jax.report import images, wording
from diva_jax.report.charts import Row, Series, arrows, bars, legend, points
from diva_jax.report.figures import Chart, Label, Part, Section, colour_role, in_pairs
from diva_jax.report.inputs import Inputs, Run
from diva_jax.report.wording import Finding

# Weights that a task has scores of: the index of their colour, their label, and their scores.
Used = list[tuple[int, str, Weights]]
_NO_IMPROVEMENT = "Not an improvement: see the first lines of this page."


def findings(inputs: Inputs) -> list[Finding]:
    """The main results as sentences: first what comparisons say in words, then the differences with an interval in each
    task's first metric (with two sets of weights, in all metrics of tasks with at most three), the last weights first.
    Without such differences, those without an interval; without any, the scores themselves."""
    results, doubtful, known, others = inputs.results, doubted(inputs), [], []
    for task in results.tasks.values():
        names = list(task.metrics)
        names = names if len(names) <= 3 and len(results.labels) == 2 else names[:1]
        for c in reversed(task.comparisons):
            for metric in names:
                if metric in c.differences():
                    finding = _finding(task, c, metric, len(results.labels) > 2, c.after in doubtful)
                    (known if finding.kind else others).append(finding)
    out = []
    for s in results.summary:
        doubt = s.after in doubtful and s.says == MORE
        kind = "up doubted" if doubt else {MORE: "up won", LESS: "down lost"}.get(s.says, "zero")
        out.append(Finding(s.what, f"{_NO_IMPROVEMENT} " * doubt + f"{s.detail}.", kind, s.says))
    return out + (known or others or list(_scores_alone(results)))


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
    return Finding(what, meaning, kind, wording.change(before, after, difference, info.unit))


def _scores_alone(results: Results) -> Iterator[Finding]:
    """Returns the scores of an evaluation without comparisons."""
    for task in results.tasks.values():
        for metric, info in list(task.metrics.items())[:1]:
            for label, weights in task.weights.items():
                if score := weights.scores.get(metric):
                    decimals = wording.places_of([score], info.unit)
                    figures = wording.number(score.score, info.unit, decimals)
                    if score.known_interval:
                        figures += f" (95% interval {wording.interval(score.known_interval, info.unit, decimals)})"
                    meaning = f"Score of {label}; there are no other weights to compare with."
                    yield Finding(f"{task.title}, {info.title}", meaning, figures=figures)


def sections(inputs: Inputs) -> list[Section]:
    """Returns one section per task, each followed by the sections of its flipped items."""
    labels, doubtful = inputs.results.labels, doubted(inputs)
    kept = _kept(inputs.results)
    out = [Section("Matches and zero-shot", [Part("charts", charts=kept)])] if kept else []
    for name, task in inputs.results.tasks.items():
        used = [(i, label, task.weights[label]) for i, label in enumerate(labels) if label in task.weights]
        compared = [c for c in task.comparisons if c.differences()]
        against = [f"{c.after} against {c.before}" if c.before in task.controls else c.after for c in compared]
        head = [Label("Score"), *(Label(label, f"var(--{colour_role(i)})") for i, label, _ in used)]
        head += [Label("Difference" if len(compared) == 1 else f"Difference, {what}") for what in against]
        columns = [(w.scores, False) for _, _, w in used] + [(c.differences(), c.after in doubtful) for c in compared]
        known = any(s.known_interval for _, _, w in used for s in w.scores.values())
        parts = [_scores(task, head, columns, "Small figures are 95% intervals." if known else "")]
        # Metrics that are defined only for two sets of weights, such as cosine similarity.
        between = [{m: s for m, s in c.scores.items() if isinstance(s, Score)} for c in task.comparisons]
        if any(between):
            head = [Label("Between"), *(Label(f"{c.before} and {c.after}") for c in task.comparisons)]
            parts.append(_scores(task, head, [(scores, False) for scores in between]))
        parts.append(Part("gaps_without_signal", task=task))
        parts += [Part("paragraph", line=f"{label}: {n}.", kind="plain") for _, label, w in used for n in w.notes]
        charts = _patterns(name, task, used) + _timesteps(name, task, used) or _all_scores(name, task, used)
        parts += [Part("charts", charts=charts)] if charts else []
        parts += images.segmented(task, labels)
        out += [Section(task.title, parts, f"{task.count:,} {task.items}" if task.count else ""), *images.flipped(task)]
    return out


def _scores(task: Task, head: list[Label], columns: Sequence[tuple[Mapping, bool]], note: str = "") -> Part:
    """A table with a row for each metric that one of the columns (scores by metric, whether they are doubted) has."""
    found = [(info, [scores.get(metric) for scores, _ in columns]) for metric, info in task.metrics.items()]
    rows = [(info, cells) for info, cells in found if any(cells)]
    return Part("scores", head=head, rows=rows, doubted=[doubt for _, doubt in columns], note=note)


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


# These two bounds are conventions: the effective rank of ImageNet images under CLIP encoders is in the hundreds, and
# tuning moves it by a few percent. A rank of half its value, or a mean cosine of one half, is more than fine-tuning.
MIN_SHARE_OF_EFFECTIVE_RANK = 0.5
MIN_COSINE_TO_ORIGINAL = 0.5
# Metrics of the feedback whose expectation is zero where it is noise.
_NOISE_METRICS = ("gap_other", "gradient_cosine")
_MAX_NAMED_METRICS = 4


def _collapse(before: float | None, after: float | None, cosine: float | None, who: str) -> Iterator[Finding]:
    if before and after is not None and after < MIN_SHARE_OF_EFFECTIVE_RANK * before:
        figures = f"the effective rank fell from {wording.compact(before)} to {wording.compact(after)}"
        means = "other scores of these weights must not be read as improvements"
        text = f"{who}: {figures}. Different images have nearly the same embedding, so {means}."
        yield Finding("Representation collapsed", text, "bad")
    if cosine is not None and cosine < MIN_COSINE_TO_ORIGINAL:
        figures = f"the mean cosine to the original embedding is {wording.compact(cosine)}"
        means = "What was built on the original encoder (its text tower, probes, MLLMs) does not fit these weights"
        yield Finding("Representation replaced", f"{who}: {figures}. {means}.", "bad")


def _drift(task: Task) -> Iterator[tuple[str, Finding]]:
    """Returns (label of the weights, alarm) of each comparison."""
    for c in task.comparisons:
        ranks = [task.weights[label].scores.get("effective_rank") for label in (c.before, c.after)]
        before, after = (rank.score if rank else None for rank in ranks)
        cosine = getattr(c.scores.get("cosine"), "score", None)
        yield from ((c.after, alarm) for alarm in _collapse(before, after, cosine, c.after))


def doubted(inputs: Inputs) -> set[str]:
    """Returns the labels of weights whose representation has collapsed or been replaced, here or in their run."""
    tasks = inputs.results.tasks.values() if inputs.results else ()
    labels = {label for task in tasks for label, _ in _drift(task)}
    return labels.union(*(run.labels for run in inputs.runs if any(_run_drift(run))))


def _noise(label: str, intervals: Mapping[str, list[float] | None], kind: str = "bad") -> Iterator[Finding]:
    """The alarm for intervals of the feedback's metrics that are not above zero."""
    empty = [
        f"{metric} ({wording.interval(ends, '', wording.places(ends, ''))})"
        for metric, ends in intervals.items()
        if ends and ends[0] <= 0
    ]
    if empty:
        means = "these data show no signal about the image in what the encoder is tuned with"
        text = f"{label}: the interval of {' and of '.join(empty)} is not above zero: {means}."
        yield Finding("No signal in the feedback", text, kind)


def _comparisons(results: Results) -> Iterator[Finding]:
    """Differences for the worse in any metric, and main metrics without a difference, per comparison."""
    found: dict[tuple[bool, str, bool], list[str]] = {}
    for task in results.tasks.values():
        for c in task.comparisons:
            differences, of = c.differences(), (c.after, c.before in task.controls)
            for i, (metric, info) in enumerate(task.metrics.items()):
                if d := differences.get(metric):
                    kind, name = wording.direction(d, info.direction), f"{task.title}, {info.title}"
                    if kind.endswith("lost"):
                        figure = wording.signed(d.difference, info.unit, wording.places_of([d], info.unit))
                        found.setdefault((True, *of), []).append(f"{name} ({figure})")
                    elif kind == "zero" and i == 0:
                        found.setdefault((False, *of), []).append(name)
    for (worse, label, control), names in sorted(found.items(), key=lambda item: not item[0][0]):
        listed = listing(names, _MAX_NAMED_METRICS)
        if worse:
            yield Finding(f"Worse than {'the control' if control else 'before'}", f"{label}: {listed}.", "bad")
        else:
            says = f"{label}{' against the control' * control}: {listed}"
            yield Finding("No difference shown", f"{says}: zero is within the interval of the difference.", "doubt")


def _run_drift(run: Run) -> Iterator[Finding]:
    """The drift at the last evaluation of a run in training."""
    rank, change = run.last("eval/drift/effective_rank"), run.last("eval/drift/effective_rank_change")
    before = rank - change if rank is not None and change is not None else None
    yield from _collapse(before, rank, run.last("eval/drift/cosine"), f"run {run.name}, last evaluation")


def alarms(inputs: Inputs) -> list[Finding]:
    """Returns everything that is wrong or in doubt, the worst first."""
    out: list[Finding] = []
    if inputs.results:
        for task in inputs.results.tasks.values():
            out += [alarm for _, alarm in _drift(task)]
            for i, (label, weights) in enumerate(task.weights.items()):
                scores = {m: weights.scores[m] for m in _NOISE_METRICS if m in weights.scores}
                # Weights from before the tuning can still be tuned well, as the projection is trained too.
                kind = "doubt" if i == 0 and len(task.weights) > 1 else "bad"
                out += _noise(label, {m: s.known_interval or s.runs_interval for m, s in scores.items()}, kind)
        out += _comparisons(inputs.results)
        out += [Finding("About the weights", f"{note}.", "doubt") for note in inputs.results.notes]
    lost = "is not here (or another run is), so its curves are missing: start the report where evaluate was started"
    out += [Finding("A run was not found", f"{source} {lost}.", "doubt") for source in inputs.missing]
    for run in inputs.runs:
        ends = {m: [run.last(f"feedback/{m}/{end}") for end in ("low", "high")] for m in _NOISE_METRICS}
        known = {m: e for m, e in ends.items() if None not in e and e[0] < e[1]}
        out += [*_run_drift(run), *_noise(f"run {run.name}, last evaluation", known)]
    return sorted(out, key=lambda alarm: alarm.kind != "bad")
