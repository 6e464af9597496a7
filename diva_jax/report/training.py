"""The report's sections on training runs: progress, curves, and evaluations during training."""

from functools import partial
from statistics import fmean, median

from diva_jax.report import wording
from diva_jax.report.charts import Series, curves, legend, points
from diva_jax.report.figures import Cell, Chart, Label, Part, Section, in_pairs
from diva_jax.report.inputs import Run
from diva_jax.report.wording import Finding

# Key of metrics.jsonl -> (title, whether the chart takes half of a wide page), in order of importance.
_CURVES = {
    "loss": ("Loss", False),
    "grad_norm": ("Gradient norm before clipping", False),
    "lr": ("Learning rate", True),
    "images_per_s": ("Images per second", True),
}
# Schedules and speeds are read against zero.
_LINEAR = ("lr", "images_per_s")
# Prefixes of keys from evaluations during training, and suffixes of the ends of their intervals.
_EVALUATED = ("eval/", "feedback/")
_ENDS = ("/low", "/high")


def finding(run: Run) -> Finding:
    """Returns a run's progress and the change of its loss."""
    loss = [v for _, v in run.curve("loss")]
    progress = f"{run.name}, step {run.rows[-1]['step']:,}" + (f" of {run.total:,}" if run.total else "")
    if not loss:
        return Finding(progress, "no loss logged", "")
    some = max(1, len(loss) // 20)
    means = fmean(loss[:some]), fmean(loss[-some:])
    figures = "\u00a0→\u00a0".join(wording.number(v, "", wording.places(means, "")) for v in means)
    return Finding(progress, f"loss {figures}", f"Means over the first and the last {some} of {len(loss)} logged rows.")


def sections(runs: list[Run]) -> list[Section]:
    """Returns a section with the curves of all runs, and one with the evaluations during training."""
    if not runs:
        return []
    charts, first = [], runs[0]
    warm = 0 < first.warmup < first.rows[-1]["step"]
    marks = [(first.warmup, "end of the stage that trains only visual_proj")] if warm else []
    for key, (title, half) in _CURVES.items():
        if data := [Series(r.name, r.index, r.curve(key)) for r in runs if r.curve(key)]:
            draw = partial(curves, data=data, x_title="step", marks=marks, linear=key in _LINEAR)
            smooth = max(len(s.points) for s in data) > 20 and key not in _LINEAR
            note = "The bold line is the moving mean over 5% of the rows." * smooth
            charts.append(Chart(f"training-{key}", title, legend(data), draw, half, note))
    evaluated = _evaluated(runs)
    out = [Section("Training", [_summary(runs), *([Part("charts", charts=charts)] if charts else [])])]
    return out + ([Section("During training", evaluated)] if evaluated else [])


def _summary(runs: list[Run]) -> Part:
    rows = []
    for r in runs:
        step, loss, broken = r.rows[-1]["step"], r.last("loss"), r.last("broken_images")
        speed, wait = [v for _, v in r.curve("images_per_s")], [v for _, v in r.curve("data_wait")]
        cells = [
            Cell(f"{step:,}", [f"of {r.total:,}" if r.total else ""], step),
            Cell(wording.number(loss, ""), ["last row"], loss),
            Cell(wording.compact(median(speed)) if speed else wording.DASH, ["median"]),
            Cell(f"{100 * median(wait):.0f}%" if wait else wording.DASH, ["median"]),
            Cell(wording.DASH if broken is None else f"{broken:,.0f}"),
        ]
        rows.append((Label(r.name), cells))
    head = [Label(name) for name in ("Run", "Steps", "Loss", "Images/s", "Data wait", "Broken images")]
    return Part("table", head=head, rows=rows, short=True)


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
