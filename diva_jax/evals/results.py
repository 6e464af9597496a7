"""The output of an evaluation: results.json, predictions.csv and the table, see docs/EVALUATION.md; and what a
comparison of weights says in words: whether the tuned ones see more, and what that cost."""

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pydantic

from diva_jax.common import json_files, log, paths
from diva_jax.common.errors import RunError, UserError, explained, listing
from diva_jax.common.results_schema import SCHEMA, Comparison, Difference, Results, Score, Summary, Task, Verdict
from diva_jax.evals.stats import ANSWERS

COLUMNS = ("task", "weights", "metric", "seed", "item", "file", "text", "truth", "predicted", "score", "correct")

MORE, LESS, CALIBRATED, NONE = "sees more", "sees less", "differently calibrated", "no difference shown"
# What tuning may cost: the task, its name for readers, and the metrics that say it.
COSTS = {
    "zeroshot": ("zero-shot", ("acc1",)),
    "retrieval": ("retrieval", ("image_retrieval_recall@1", "text_retrieval_recall@1")),
    "drift": ("drift", ("cosine",)),
    "probe": ("probe", ("linear_acc1",)),
}
# How a formula begins, for one spreadsheet program or another.
_FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")


def flat(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns `KEY`, and `KEY/low` and `KEY/high` if there is an interval, for each score or difference."""
    out = {}
    for key, s in scores.items():
        out[key] = s["difference"] if "difference" in s else s["score"]
        if s["interval"]:
            out |= {f"{key}/low": s["interval"][0], f"{key}/high": s["interval"][1]}
    return out


def summary(row: Mapping[str, float]) -> str:
    """Formats a row of `scalars` without bins: `mmvp/pooled 25.93, feedback/gap_other 0.00021 (0.0001 to 0.0003)`."""

    def text(key: str) -> str:
        ends = [row.get(f"{key}/{end}") for end in ("low", "high")]
        interval = "" if None in ends else " ({:.3g} to {:.3g})".format(*ends)
        return f"{key.removeprefix('eval/')} {row[key]:.4g}{interval}"

    shown = [k for k in row if k.startswith(("eval/", "feedback/")) and not k.endswith(("/low", "/high"))]
    return ", ".join(map(text, shown))


def about(config, options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of results.json about the evaluation itself; `options` are `Evaluator.options`."""
    return {
        "schema": SCHEMA,
        "created": log.now(),
        **log.describe(),
        "config": paths.values_without_secrets(json.loads(config.to_json())),
        "options": options,
    }


def write(folder: Path, results: Mapping[str, Any], rows: Sequence[Mapping]) -> None:
    """Writes results.json and predictions.csv, each as a whole, and says which evaluation they replace. A UserError
    where the folder cannot be written; a RunError after that where scores have not the form of `Results`."""
    extra, earlier = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS), None
    with contextlib.suppress(UserError):
        earlier = json_files.read(folder / "results.json", Results, "", None)
    with explained(f"--out={folder} cannot be written", "use a folder with write access and room"):
        with (
            paths.whole_file(folder / "predictions.csv") as temporary,
            # Names of files may be no text; what has no place in UTF-8 is written as an escape, as JSON has it.
            open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as f,
        ):
            # Every text is quoted: Python would leave out the quotes around a carriage return, which ends a row.
            writer = csv.DictWriter(f, [*COLUMNS, *extra], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            writer.writeheader()
            for row in rows:  # A text that a spreadsheet takes for a formula gets an apostrophe before it.
                formulas = {k for k, v in row.items() if isinstance(v, str) and v.startswith(_FORMULA_PREFIXES)}
                writer.writerow({k: f"'{v}" if k in formulas else v for k, v in row.items()})
        content = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
        paths.write_whole(folder / "results.json", content.encode("utf-8", "backslashreplace"))
    if earlier:
        log.say(f"{folder}: this replaces the evaluation of {listing(earlier.labels)} from {earlier.created}")
    try:
        Results.model_validate(results)
    except pydantic.ValidationError as e:
        problem = f"{folder / 'results.json'} is written, but cannot be reported: {json_files.first_error(e)}"
        raise RunError(f"{problem}: see diva_jax/common/results_schema.py for what a task returns") from e


def table(results: Mapping[str, Any]) -> str:
    """Formats the content of results.json: what it says in words, scores with intervals, differences and notes."""
    template = jinja2.Environment(loader=jinja2.PackageLoader("diva_jax.evals", "")).get_template("table.j2")
    summary = [Summary.model_validate(s) for s in results["summary"]]
    return template.render(results=results, summary=summary, answers=ANSWERS).strip("\n")


def words(pairs: int, matches: int) -> str:
    """The verdict on a difference in pairs and one in matches, each as `Difference.sign` has it.

    A change of the matches shows that more or fewer images are distinguished, one of pairs alone is calibration."""
    return {1: MORE, -1: LESS}.get(matches, CALIBRATED if pairs else NONE)


def verdicts_of(name: str, task: Task, c: Comparison) -> Iterator[Verdict]:
    """The verdict for each readout or set of a task that has pairs and matches."""
    differences = c.differences()
    matches = {(info.readout, info.dataset): m for m, info in task.metrics.items() if info.answers == "match"}
    for metric, info in task.metrics.items():
        match = matches.get((info.readout, info.dataset))
        if info.answers == "image" and metric in differences and match in differences:
            says = words(*(differences[m].sign for m in (metric, match)))
            yield Verdict(task=name, pairs=metric, matches=match, says=says)


def _brief(s: Difference | Score, unit: str) -> str:
    form = "+" * isinstance(s, Difference) + (".1f" if unit == "%" else ".3f")
    text = f"{s.value:{form}}" + (f" [{s.interval[0]:{form}}, {s.interval[1]:{form}}]" if s.interval else "")
    if s.runs_interval:
        text += f", over {len(s.runs)} runs [{s.runs_interval[0]:{form}}, {s.runs_interval[1]:{form}}]"
    return text


def _gains(tasks: Mapping[str, Task], c: Mapping[str, Comparison], verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The figures of each verdict, after its words where these are not the first one's; of equal readouts once."""
    shown = set()
    for v in verdicts:
        info, differences = tasks[v.task].metrics[v.pairs], c[v.task].differences()
        figures = [_brief(differences[metric], "%") for metric in (v.pairs, v.matches)]
        text = "{} {}, {} {}".format(ANSWERS["image"], figures[0], ANSWERS["match"], figures[1])
        if not info.readout or (v.task, text) not in shown:
            other = f"{v.says}: " if v.says != verdicts[0].says else ""
            yield f"{other}{text} ({tasks[v.task].title}, {info.readout or info.dataset})"
        shown.add((v.task, text))


def summaries(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`summary` of results.json from its `tasks`: each comparison with pairs and matches, those of controls last."""
    try:
        tasks = {name: Task.model_validate(task) for name, task in content.items()}
    except pydantic.ValidationError:  # `write` says so after it has written the files.
        return []
    controls = set().union(*(task.controls for task in tasks.values()))
    out = []
    for ends in dict.fromkeys((c.before, c.after) for task in tasks.values() for c in task.comparisons):
        compared = {n: c for n, task in tasks.items() for c in task.comparisons if (c.before, c.after) == ends}
        before, after = ends
        verdicts = [v for name, c in compared.items() for v in verdicts_of(name, tasks[name], c)]
        if not verdicts:
            continue
        detail, missing = list(_gains(tasks, compared, verdicts)), []
        if before in controls:
            if verdicts[0].says != MORE:
                detail.append("it does not see more than the control, so nothing can be claimed")
        else:
            for name, (title, metrics) in COSTS.items():
                scores = compared[name].scores if name in compared else {}
                if costs := [_brief(scores[m], tasks[name].metrics[m].unit) for m in metrics if m in scores]:
                    detail.append(f"{title} {', '.join(costs)}")
            missing = [title for name, (title, _) in COSTS.items() if name not in compared]
        if missing:
            more = ": a gain in pairs alone is not a result" if "zero-shot" in missing else ""
            detail.append(f"not measured: {', '.join(missing)}{more}")
        found = {"before": before, "after": after, "control": before in controls, "says": verdicts[0].says}
        out.append(Summary(**found, detail="; ".join(detail), verdicts=verdicts, not_measured=missing).model_dump())
    return sorted(out, key=lambda s: (s["after"] in controls, s["control"]))
