"""Files of an evaluation and what a comparison says in words; the section `config.eval`, tasks from outside."""

import csv
import dataclasses
import itertools
import json
import re
import sys
import types

import numpy as np
import pytest
import report_samples as samples
from eval_data import eval_config
from helpers import failed, refused
from ml_collections import ConfigDict
from places import ROOT
from specs import EVAL_CLIP as CLIP

from diva_jax import config, evals
from diva_jax.common import results_schema
from diva_jax.evals import Settings, encode, evaluator, results
from diva_jax.training import partition

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
    """Also where a name is no text: Python stands for a byte that is not UTF-8 by half of a surrogate pair."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(PIECES, int(rng.integers(0, 7)))) for _ in range(100)]
    own = {"task": "t", "own": None}
    rows = [own | dict(item=i, text=text, score=-0.25 * i, correct=i % 2 == 0) for i, text in enumerate(texts)]
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    results.write(tmp_path, content(tmp_path, [*texts, name]), [*rows, {"item": 100, "text": name, "file": name}])
    *found, last = read(tmp_path)
    for row, text in zip(found, texts, strict=True):
        assert row["text"] in (text, "'" + text) and not row["text"].startswith(results._FORMULA_PREFIXES)
        assert (row["text"] == text) == (not text.startswith(results._FORMULA_PREFIXES))
        assert float(row["score"]) == -0.25 * int(row["item"]) and row["correct"] in ("True", "False")
    assert last["file"] == "caf\\udce9.jpg"
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["tasks"].keys() == {*texts, name}


def test_what_the_report_could_not_show_is_an_error(tmp_path):
    """Of the run, after the files are written; a verdict on something unknown is one of the form."""
    wrong = content(tmp_path / "sample", ["mine"])
    wrong["tasks"]["mine"]["comparisons"][0]["scores"]["cosine"]["score"] = "0.9"
    failed(r"tasks\.mine\.comparisons\.0\.scores\.cosine\.score\.score is '0\.9'", results.write, tmp_path, wrong, [])
    assert json.loads((tmp_path / "results.json").read_text()) == wrong
    good = samples.write_evaluation(tmp_path, [], mmvp=samples.pairs_task(ENDS[1], ENDS[0]))
    results_schema.Results.model_validate(good)
    for change in ({"task": "x"}, {"pairs": "x"}, {"matches": "x"}):
        summary = good["summary"][0] | {"verdicts": [good["summary"][0]["verdicts"][0] | change]}
        with pytest.raises(ValueError, match="a verdict on"):
            results_schema.Results.model_validate(good | {"summary": [summary]})


def test_the_documented_form_is_the_declared_one():
    page = (ROOT / "docs" / "EVALUATION.md").read_text()
    example = json.loads(re.search(r"```json\n(.*?)```", page, re.S)[1])
    assert results_schema.Results.model_validate(example).labels == ["openai", "vitl14:4600"]
    schema = results_schema.Results.model_json_schema()
    fields = set(schema["properties"]).union(*(form.get("properties", ()) for form in schema["$defs"].values()))
    assert len(fields) > 30 and fields <= set(re.findall(r"\w+", page))


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


def test_the_words_are_first_on_the_screen():
    task = samples.pairs_task(ENDS[1], ENDS[0])
    lines = results.table({"summary": results.summaries({"mmvp": task}), "tasks": {"mmvp": task}}).splitlines()
    assert lines[0].startswith(f"{samples.AFTER} against {samples.BEFORE}: differently calibrated; pairs +1.8 [+0.5, ")
    rows = [line.split() for line in lines if f"-> {samples.AFTER}" in line]
    assert [row[3] for row in rows] == ["pooled", "pooled_match"]
    assert rows[1][-4:] == ["texts", "+1.75", "groups", "+1.75"]
    assert results.summaries({"drift": samples.drift_task(), "zeroshot": samples.zeroshot_task()}) == []
    wrong = samples.drift_task()
    wrong["comparisons"][0]["scores"]["cosine"]["score"] = "0.9"
    assert summaries(1, 1, drift=wrong) == []


TASKS = ["choice", "drift", "feedback", "judge", "mmvp", "probe", "retrieval", "robustness", "segmentation", "zeroshot"]


def test_defaults_bad_values_and_unknown_fields():
    c = config.default().eval.to_dict()
    assert set(c) == {f.name for f in dataclasses.fields(Settings)} | set(TASKS) - {"retrieval"}
    assert evals.names() == TASKS
    settings, own = evals.parse(evals.default(), TASKS)
    assert settings == Settings() and list(own) == TASKS
    assert own["feedback"].to_dict() == c["feedback"] and not own["retrieval"]
    both = "set both, every to at least 1 and data to texts TASK=PATH, or neither"
    cases = [
        (dict(dtype="float16"), "config.eval.dtype='float16' must be float32 or bfloat16"),
        (dict(every=-1, data=("drift=x",)), "config.eval.every=-1 must be at least 0"),
        (dict(every=3), both),
        (dict(data=("drift=x",)), both),
    ]
    cases += [(dict(every=3, data=(e,)), f"has '{e}', which is not TASK=PATH") for e in ("drift", "drift=", "=x")]
    cases += [(dict(every=3, data=(f"{n}=x",)), f"the task {n} is not known: use choice,.*") for n in ("stats", "none")]
    cases += [({field: 3}, f"the config has no field eval.{field}") for field in ("images", "my_task")]
    for changes, says in [*cases, (dict(mmvp={"draws": 3}), "the config has no field eval.mmvp.draws")]:
        section = ConfigDict(evals.default().to_dict() | changes)
        refused(says, evals.parse, section)
        if "no field" in says:
            c = config.default()
            with c.unlocked():
                c.eval = section
            refused("the config has no field eval.", config.validate, c, 1)


def test_a_task_from_outside_the_package(tmp_path, monkeypatch):
    c, outside = eval_config(CLIP, tmp_path), "outside.length"
    mesh = partition.make_mesh(c.mesh)
    c.eval.update(every=2, data=(f"{outside}=four",), seed=7)
    config.validate(c, 1)
    task = evaluator.Evaluator(c, mesh, {outside: "four"}).tasks["length"]
    assert task.options.scale == 2.0 and task.settings.seed == 7  # No section: the defaults.
    with c.unlocked():
        c.eval.length = evals.find(outside).default()
    c.eval.length.scale = 3.0
    config.validate(c, 1)
    run = evaluator.in_training(c, mesh)
    assert run.options["length"] == {"scale": 3.0} and "every" not in run.options and "mmvp" not in run.options
    outcomes = run.evaluate(run.model("x", encode.Encoder({}, None, "", {}, "")))
    tasks, rows = run.report([("x", outcomes), ("y", outcomes)])
    assert tasks["length"]["weights"]["x"]["scores"]["length"]["score"] == 12 and rows == []
    assert tasks["length"]["comparisons"][0]["scores"]["length"]["difference"] == 0
    c.eval.length.scale = 0.0
    refused("config.eval.length.scale=0.0 must be above 0", evaluator.Evaluator, c, mesh, {outside: "four"})
    monkeypatch.setitem(sys.modules, "outside.empty", types.ModuleType("outside.empty"))
    for name in ("data", "mmvp"):
        monkeypatch.setitem(sys.modules, f"outside.{name}", evals.find(outside))
    for name, says in (
        ("outside.none", "--task=.outside.none. cannot be imported .*PYTHONPATH"),
        ("outside.empty", "the module outside.empty is not a task, it lacks prepare"),
        ("outside.data", "config.eval has another 'data', rename the module"),
        ("outside.mmvp", "config.eval has another 'mmvp', rename the module"),
    ):
        refused(says, evals.parse, evals.default(), [name])
