"""The files of an evaluation hold any text, in the declared form; what a comparison says in words."""

import csv
import itertools
import json
import re
import typing

import numpy as np
import pydantic
import pytest
import report_samples as samples
from places import ROOT

from diva_jax.common import results_schema
from diva_jax.common.errors import RunError
from diva_jax.evals import results

PIECES = ["\r", "\n", "\r\n", '"', "'", ",", ";", "\t", "=", "+", "-", "@", "a", "é", "\x00", "\x1b[31m", " ", "\u2028"]


def read(folder) -> list[dict]:
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def content(tmp_path, names) -> dict:
    """A valid results.json with tasks of these names."""
    task = samples.drift_task()
    return samples.write_evaluation(tmp_path, [], **{"drift": task}) | {"tasks": dict.fromkeys(names, task)}


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(5))
def test_csv_readers_get_back_what_was_written(tmp_path, seed):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(PIECES, int(rng.integers(0, 7)))) for _ in range(100)]
    rows = [
        {"task": "t", "item": i, "text": text, "score": -0.25 * i, "correct": i % 2 == 0, "own": None}
        for i, text in enumerate(texts)
    ]
    results.write(tmp_path, content(tmp_path, texts), rows)
    found = read(tmp_path)
    assert len(found) == len(rows)
    for row, text in zip(found, texts, strict=True):
        assert row["text"] in (text, "'" + text) and not row["text"].startswith(results._FORMULA_PREFIXES)
        assert (row["text"] == text) == (not text.startswith(results._FORMULA_PREFIXES))
        assert float(row["score"]) == -0.25 * int(row["item"]) and row["correct"] in ("True", "False")
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["tasks"].keys() == set(texts)


@pytest.mark.attack
def test_names_of_files_that_are_no_text(tmp_path):
    """Python stands for a byte that is not UTF-8 by half of a surrogate pair, which UTF-8 does not have."""
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    results.write(tmp_path, content(tmp_path, [name]), [{"file": name}])
    assert read(tmp_path)[0]["file"] == "caf\\udce9.jpg"
    assert list(json.loads((tmp_path / "results.json").read_text("utf-8"))["tasks"]) == [name]


def test_what_the_report_could_not_show_is_an_error_after_the_files_are_written(tmp_path):
    wrong = content(tmp_path / "sample", ["mine"])
    wrong["tasks"]["mine"]["comparisons"][0]["scores"]["cosine"]["score"] = "0.9"
    with pytest.raises(RunError, match=r"tasks\.mine\.comparisons\.0\.scores\.cosine\.score\.score is '0\.9'"):
        results.write(tmp_path, wrong, [])
    assert json.loads((tmp_path / "results.json").read_text()) == wrong


def fields_of(form, seen: set) -> set[str]:
    """The names of the fields of a form and of those that it is made of."""
    if isinstance(form, type) and issubclass(form, pydantic.BaseModel) and form not in seen:
        seen.add(form)
        parts = [fields_of(field.annotation, seen) for field in form.model_fields.values()]
        return set(form.model_fields).union(*parts)
    return set().union(*(fields_of(part, seen) for part in typing.get_args(form)))


def test_the_documented_form_is_the_declared_one():
    page = (ROOT / "docs" / "EVALUATION.md").read_text()
    example = json.loads(re.search(r"```json\n(.*?)```", page, re.S)[1])
    assert results_schema.Results.model_validate(example).labels == ["openai", "vitl14:4600"]
    words = set(re.findall(r"\w+", page))
    assert fields_of(results_schema.Results, set()) <= words


ENDS = {1: [0.5, 3.0], 0: [-1.0, 2.0], -1: [-4.0, -0.2]}


def summaries(pairs, matches, control=None, **others):
    task = samples.pairs_task(ENDS[pairs], ENDS[matches])
    if control is not None:
        task["weights"]["control"] = task["weights"][samples.AFTER]
        against = samples.pairs_task(ENDS[control], ENDS[control])["comparisons"][0]
        task["comparisons"] = [*task["comparisons"], against | {"before": "control"}]
        task["comparisons"].insert(0, task["comparisons"][0] | {"after": "control"})
    return results.summaries({"mmvp": task} | others)


@pytest.mark.parametrize("pairs, matches", list(itertools.product(ENDS, ENDS)))
def test_the_verdict_is_that_of_the_intervals(pairs, matches):
    (found,) = summaries(pairs, matches)
    want = {1: "sees more", -1: "sees less"}.get(matches, "differently calibrated" if pairs else "no difference shown")
    assert found["says"] == found["verdicts"][0]["says"] == want
    low, high = ENDS[matches]
    assert f"matches {(low + high) / 2:+.1f} [{low:+.1f}, {high:+.1f}] (MMVP-VLM, pooled embedding)" in found["detail"]


SIGNS = [(None, 0), ([0, 0], 0), ([0, 2], 0), ([-2, 0], 0), ([1, 1], 1), ([-3, -1], -1), ([2, 5], 1)]


@pytest.mark.parametrize("items, over_items", SIGNS)
@pytest.mark.parametrize("runs, over_runs", SIGNS)
def test_a_claim_needs_the_interval_over_items_and_the_one_over_runs(items, over_items, runs, over_runs):
    found = results_schema.Difference(difference=1.0, interval=items, runs_interval=runs).sign
    assert found == (over_items if runs is None or over_items == over_runs else 0)


OTHERS = {"zeroshot": samples.zeroshot_task, "retrieval": samples.retrieval_task, "drift": samples.drift_task}


@pytest.mark.parametrize("given", [c for n in range(4) for c in itertools.combinations(OTHERS, n)], ids=",".join)
def test_what_was_not_measured_is_said(given):
    (found,) = summaries(1, 0, **{name: OTHERS[name]() for name in given})
    missing = [title for name, (title, _) in results.COSTS.items() if name not in given]
    assert found["not_measured"] == missing
    assert ("a gain in pairs alone is not a result" in found["detail"]) == ("zeroshot" not in given)
    figures = ("zero-shot -0.1 [-0.2, +0.0]", "retrieval -0.3 [-0.6, -0.1], -0.3", "drift 0.973 [0.971, 0.975]")
    for name, figure in zip(OTHERS, figures, strict=True):
        assert (figure in found["detail"]) == (name in given)


@pytest.mark.parametrize("control", ENDS)
def test_the_same_against_a_control(control):
    found = summaries(1, 1, control, zeroshot=samples.zeroshot_task())
    ends = [(s["after"], s["before"], s["control"]) for s in found]
    tuned = samples.AFTER
    assert ends == [(tuned, samples.BEFORE, False), (tuned, "control", True), ("control", samples.BEFORE, False)]
    assert found[1]["not_measured"] == [] and "zero-shot" not in found[1]["detail"]
    assert ("nothing can be claimed" in found[1]["detail"]) == (control != 1)


def test_nothing_is_said_without_pairs_and_matches():
    assert results.summaries({"drift": samples.drift_task(), "zeroshot": samples.zeroshot_task()}) == []
    wrong = samples.drift_task()
    wrong["comparisons"][0]["scores"]["cosine"]["score"] = "0.9"
    assert summaries(1, 1, drift=wrong) == []


def test_a_verdict_on_something_unknown_is_refused(tmp_path):
    content = samples.write_evaluation(tmp_path, [], mmvp=samples.pairs_task(ENDS[1], ENDS[0]))
    results_schema.Results.model_validate(content)
    for change in ({"task": "x"}, {"pairs": "x"}, {"matches": "x"}):
        wrong = content["summary"][0] | {"verdicts": [content["summary"][0]["verdicts"][0] | change]}
        with pytest.raises(ValueError, match="a verdict on"):
            results_schema.Results.model_validate(content | {"summary": [wrong]})


def test_the_words_are_first_on_the_screen():
    task = samples.pairs_task(ENDS[1], ENDS[0])
    lines = results.table({"summary": results.summaries({"mmvp": task}), "tasks": {"mmvp": task}}).splitlines()
    assert lines[0].startswith(f"{samples.AFTER} against {samples.BEFORE}: differently calibrated; pairs +1.8 [+0.5, ")
    rows = [line.split() for line in lines if f"-> {samples.AFTER}" in line]
    assert [row[3] for row in rows] == ["pooled", "pooled_match"]
    assert rows[1][-4:] == ["texts", "+1.75", "groups", "+1.75"]
