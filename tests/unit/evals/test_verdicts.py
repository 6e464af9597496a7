"""What a comparison says in words: the verdict from intervals, and the sentence from every set of measured costs."""

import itertools

import pytest
import report_samples as samples

from diva_jax.common import results_schema
from diva_jax.evals import results

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
