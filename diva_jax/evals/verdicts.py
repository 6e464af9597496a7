"""What a comparison of weights says in words: whether the tuned ones see more, and what that cost."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from diva_jax.common.results_schema import Comparison, Difference, Score, Summary, Task, Verdict
from diva_jax.evals.matching import ANSWERS

MORE, LESS, CALIBRATED, NONE = "sees more", "sees less", "differently calibrated", "no difference shown"
# What tuning may cost: the task, its name for readers, and the metrics that say it.
COSTS = {
    "zeroshot": ("zero-shot", ("acc1",)),
    "retrieval": ("retrieval", ("image_retrieval_recall@1", "text_retrieval_recall@1")),
    "drift": ("drift", ("cosine",)),
    "probe": ("probe", ("linear_acc1",)),
}


def words(pairs: int, matches: int) -> str:
    """The verdict on a difference in pairs and one in matches, each as `Difference.sign` has it.

    A change of the matches is one of what is told apart, a change of the pairs alone one of calibration.
    """
    return {1: MORE, -1: LESS}.get(matches, CALIBRATED if pairs else NONE)


def of(name: str, task: Task, c: Comparison) -> Iterator[Verdict]:
    """The verdict for each readout or set of a task that has pairs and matches."""
    differences = c.differences()
    matches = {(info.readout, info.dataset): m for m, info in task.metrics.items() if info.answers == "match"}
    for metric, info in task.metrics.items():
        match = matches.get((info.readout, info.dataset))
        if info.answers == "image" and metric in differences and match in differences:
            says = words(*(differences[m].sign for m in (metric, match)))
            yield Verdict(task=name, pairs=metric, matches=match, says=says)


def _figure(s: Difference | Score, unit: str) -> str:
    sign, value = ("+", s.difference) if isinstance(s, Difference) else ("", s.score)
    form = sign + (".1f" if unit == "%" else ".3f")
    text = f"{value:{form}}" + (f" [{s.interval[0]:{form}}, {s.interval[1]:{form}}]" if s.interval else "")
    if s.runs_interval:
        text += f", over {len(s.runs)} runs [{s.runs_interval[0]:{form}}, {s.runs_interval[1]:{form}}]"
    return text


def _gains(tasks: Mapping[str, Task], c: Mapping[str, Comparison], verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The figures of each verdict, after its words where these are not the first one's; of equal readouts once."""
    shown = set()
    for v in verdicts:
        info, differences = tasks[v.task].metrics[v.pairs], c[v.task].differences()
        figures = [_figure(differences[metric], "%") for metric in (v.pairs, v.matches)]
        text = "{} {}, {} {}".format(ANSWERS["image"], figures[0], ANSWERS["match"], figures[1])
        if not info.readout or (v.task, text) not in shown:
            other = f"{v.says}: " if v.says != verdicts[0].says else ""
            yield f"{other}{text} ({tasks[v.task].title}, {info.readout or info.dataset})"
        shown.add((v.task, text))


def summaries(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`summary` of results.json from its `tasks`: an entry for each comparison with pairs and matches, those of tuned
    weights first, those of controls with the reference last."""
    try:
        tasks = {name: Task.model_validate(task) for name, task in content.items()}
    except pydantic.ValidationError:  # `results.write` says so after it has written the files.
        return []
    controls = set().union(*(task.controls for task in tasks.values()))
    out = []
    for ends in dict.fromkeys((c.before, c.after) for task in tasks.values() for c in task.comparisons):
        compared = {n: c for n, task in tasks.items() for c in task.comparisons if (c.before, c.after) == ends}
        before, after = ends
        verdicts = [v for name, c in compared.items() for v in of(name, tasks[name], c)]
        if not verdicts:
            continue
        detail, missing = list(_gains(tasks, compared, verdicts)), []
        if before in controls:
            if verdicts[0].says != MORE:
                detail.append("it does not see more than the control, so nothing can be claimed")
        else:
            for name, (title, metrics) in COSTS.items():
                scores = {
                    m: compared[name].scores[m] for m in metrics if name in compared and m in compared[name].scores
                }
                if scores:
                    units = (tasks[name].metrics[m].unit for m in scores)
                    detail.append(f"{title} " + ", ".join(map(_figure, scores.values(), units)))
            missing = [title for name, (title, _) in COSTS.items() if name not in compared]
        if missing:
            more = ": a gain in pairs alone is not a result" if "zero-shot" in missing else ""
            detail.append(f"not measured: {', '.join(missing)}{more}")
        found = {"before": before, "after": after, "control": before in controls, "says": verdicts[0].says}
        out.append(Summary(**found, detail="; ".join(detail), verdicts=verdicts, not_measured=missing).model_dump())
    return sorted(out, key=lambda s: (s["after"] in controls, s["control"]))
