"""The report's sections on training runs: progress, curves, and evaluations during training."""

from functools import partial
from statistics import fmean, median

from diva_jax.report import wording
from diva_jax.report.charts import Chart, Series, curves, paired, points
from diva_jax.report.inputs import Run
from diva_jax.report.sections import Section, cell, paragraph, table
from diva_jax.report.wording import Finding

# Key of metrics.jsonl -> (title, whether the chart takes half of a wide page), in order of importance.
_CURVES = {
    "loss": ("Loss", False),
    "grad_norm": ("Gradient norm before clipping", False),
    "lr": ("Learning rate", True),
    "images_per_s": ("Images per second", True),
}
_EVALUATED = ("eval/", "feedback/")  # Prefixes of keys from evaluations during training.


def finding(run: Run) -> Finding:
    """Returns a run's progress and the change of its loss."""
    loss = [v for _, v in run.curve("loss")]
    last = run.rows[-1]["step"]
    far = f"{run.name}, step {last:,}" + (f" of {run.total:,}" if run.total else "")
    if not loss:
        return Finding(far, "no loss logged", "")
    some = max(1, len(loss) // 20)
    first, now = fmean(loss[:some]), fmean(loss[-some:])
    figures = f"loss {wording.compact(first)}\u00a0→\u00a0{wording.compact(now)}"
    return Finding(far, figures, f"Means over the first and the last {some} of {len(loss)} logged rows.")


def sections(runs: list[Run]) -> list[Section]:
    """Returns a section with the curves of all runs, and one with the evaluations during training."""
    if not runs:
        return []
    body: list[str | Chart] = [_summary(runs)]
    for key, (title, half) in _CURVES.items():
        data = [Series(r.name, r.index, r.curve(key)) for r in runs if r.curve(key)]
        if data:
            draw = partial(curves, title=title, data=data, x_title="step", marks=_stages(runs))
            smooth = max(len(s.points) for s in data) > 20 and key in ("loss", "grad_norm")
            body.append(
                Chart(f"training-{key}", draw, half, "The bold line is the moving mean over 5% of the rows." * smooth)
            )
    found = _evaluated(runs)
    return [Section("Training", body)] + ([Section("During training", found)] if found else [])


def _stages(runs: list[Run]) -> list[tuple[float, str]]:
    """Returns the step at which the first run's second stage begins, if the run has reached it."""
    run = runs[0]
    inside = 0 < run.warmup < run.rows[-1]["step"]
    return [(run.warmup, "end of the stage that trains only visual_proj")] if inside else []


def _summary(runs: list[Run]) -> str:
    lines = []
    for r in runs:
        last = r.rows[-1]
        speed, wait = [v for _, v in r.curve("images_per_s")], [v for _, v in r.curve("data_wait")]
        loss = r.curve("loss")
        of = f"of {r.total:,}" if r.total else ""
        lines.append(
            [
                r.name,
                cell(f"{last['step']:,}", [of], last["step"]),
                cell(wording.number(loss[-1][1], "") if loss else "–", ["last row"], loss[-1][1] if loss else None),
                cell(wording.compact(median(speed)) if speed else "–", ["median"]),
                cell(f"{100 * median(wait):.0f}%" if wait else "–", ["median"]),
                cell(f"{(r.curve('broken_images') or [(0, 0)])[-1][1]:,.0f}"),
            ]
        )
    return table(["Run", "Steps", "Loss", "Images/s", "Data wait", "Broken images"], lines, short=True)


def _evaluated(runs: list[Run]) -> list[str | Chart]:
    """Returns one small chart per key of the evaluations during training, with intervals where they were logged.

    `KEY/low` and `KEY/high` are the interval of `KEY`.
    """
    keys = [k for r in runs for row in r.rows for k in row if k.startswith(_EVALUATED)]
    ends = ("/low", "/high")
    charts, lines = [], []
    for key in dict.fromkeys(k for k in keys if not k.endswith(ends)):
        data = []
        for r in runs:
            if found := r.curve(key):
                low, high = (dict(r.curve(key + end)) for end in ends)
                at = [(low[x], high[x]) if x in low and x in high else None for x, _ in found]
                data.append(Series(r.name, r.index, found, at))
                if "gap" in key and at[-1] and wording.excludes_zero(at[-1]) is False:
                    interval = wording.interval(at[-1], "")
                    lines.append(f"{r.name}, step {found[-1][0]:,}: {key} is not different from zero ({interval}).")
        title = ", ".join(key.removeprefix("eval/").replace("_", " ").split("/"))
        draw = partial(points, title=title, data=data, x_title="step")
        charts.append(Chart("training-" + key.replace("/", "-"), draw))
    return [paragraph(line, "plain") for line in lines] + paired(charts)
