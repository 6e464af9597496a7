"""Embeddings and readouts; files of an evaluation, what a comparison says in words; the section `config.eval`."""

import csv
import dataclasses
import functools
import itertools
import json
import re
import sys
import types

import jax
import numpy as np
import pytest
import report_samples as samples
from eval_data import eval_config, patch, unit
from helpers import failed, refused
from ml_collections import ConfigDict
from places import ROOT
from specs import EVAL_CLIP as CLIP, EVAL_SIGLIP as SIGLIP

from diva_jax import config, evals
from diva_jax.common import results_schema
from diva_jax.evals import Settings, encode, evaluator, results, stats, weight_sets
from diva_jax.models.backbones import TABLE, Features, build
from diva_jax.models.backbones.shared.transformer import Text
from diva_jax.models.layers import Keys
from diva_jax.training import partition
from diva_jax.weights import origins

PIECES = ["\r", "\n", "\r\n", '"', "'", ",", ";", "\t", "=", "+", "-", "@", "a", "é", "\x00", "\x1b[31m", " ", "\u2028"]


def content(tmp_path, names) -> dict:
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
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as f:
        *found, last = csv.DictReader(f)
    for row, text in zip(found, texts, strict=True):
        assert row["text"] in (text, "'" + text) and not row["text"].startswith(results._FORMULA_PREFIXES)
        assert (row["text"] == text) == (not text.startswith(results._FORMULA_PREFIXES))
        assert float(row["score"]) == -0.25 * int(row["item"]) and row["correct"] in ("True", "False")
    assert last["file"] == "caf\\udce9.jpg"
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["tasks"].keys() == {*texts, name}


def test_what_the_report_could_not_show_is_an_error(tmp_path, capsys):
    """Of the run, after the files are written; a verdict on something unknown is one of the form."""
    wrong = content(tmp_path / "sample", ["mine"])
    wrong["tasks"]["mine"]["comparisons"][0]["scores"]["cosine"]["score"] = "0.9"
    failed(r"tasks\.mine\.comparisons\.0\.scores\.cosine\.score\.score is '0\.9'", results.write, tmp_path, wrong, [])
    assert json.loads((tmp_path / "results.json").read_text()) == wrong
    good = samples.write_evaluation(tmp_path, [], mmvp=samples.pairs_task(ENDS[1], ENDS[0]))
    results.write(tmp_path, good, [])
    assert f"replaces the evaluation of openai, runs/vitl14:4600 from {good['created']}" in capsys.readouterr().out
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


def test_weights_are_known_by_their_place_and_not_by_its_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origins, "find", lambda text, _: origins.Place(*(at := origins.split_step(text)), at[0]))
    sets = weight_sets.find(["clip", "runs/a:2", "./runs/a:4", "runs/a/:6", "runs/b:2"])
    assert weight_sets.checkpoints_by_run(sets) == {"runs/a": ["a:2", "a:4", "a:6"], "runs/b": ["b:2"]}
    assert [given.label for given in weight_sets.find(["a/x", "b/x/"])] == ["a/x", "b/x/"]
    refused("--weights=runs/a/:4 names the same weights as runs/a:4", weight_sets.find, ["runs/a:4", "runs/a/:4"])
    refused("names the same weights twice", weight_sets.find, ["clip", "g=runs/a:4,./runs/a:4"])


ENDS = {1: [0.5, 3.0], 0: [-1.0, 2.0], -1: [-4.0, -0.2]}
OTHERS = ("zeroshot", "retrieval", "drift")
FIGURES = ("zero-shot -0.1 [-0.2, +0.0]", "retrieval -0.3 [-0.6, -0.1], -0.3", "drift 0.973 [0.971, 0.975]")


def summaries(pairs, matches, control=None, **others):
    task = samples.pairs_task(ENDS[pairs], ENDS[matches])
    if control is not None:
        task["weights"]["control"] = task["weights"][samples.AFTER]
        against = samples.pairs_task(ENDS[control], ENDS[control])["comparisons"][0]
        first = task["comparisons"][0]
        task["comparisons"] = [first | {"after": "control"}, first, against | {"before": "control"}]
    return results.summaries({"mmvp": task} | others)


@pytest.mark.parametrize("pairs, matches", list(itertools.product(ENDS, ENDS)))
def test_the_verdict_is_that_of_the_intervals_and_what_was_not_measured_is_said(pairs, matches):
    for given in (c for n in range(4) for c in itertools.combinations(OTHERS, n)):
        (found,) = summaries(pairs, matches, **{name: samples.task(name) for name in given})
        want = {1: "sees more", -1: "sees less"}.get(matches)
        want = want or ("differently calibrated" if pairs else "no difference shown")
        assert found["says"] == found["verdicts"][0]["says"] == want
        low, high = ENDS[matches]
        figures = f"matches {(low + high) / 2:+.1f} [{low:+.1f}, {high:+.1f}] (MMVP-VLM, pooled embedding)"
        assert figures in found["detail"]
        assert found["not_measured"] == [title for name, (title, _) in results.COSTS.items() if name not in given]
        assert ("a gain in pairs alone is not a result" in found["detail"]) == ("zeroshot" not in given)
        assert [figure in found["detail"] for figure in FIGURES] == [name in given for name in OTHERS]


SIGNS = [(None, 0), ([0, 0], 0), ([0, 2], 0), ([-2, 0], 0), ([1, 1], 0), ([-3, -1], -1), ([2, 5], 1)]


@pytest.mark.parametrize("items, over_items", SIGNS)
@pytest.mark.parametrize("runs, over_runs", SIGNS)
def test_a_claim_needs_the_interval_over_items_and_the_one_over_runs(items, over_items, runs, over_runs):
    found = results_schema.Difference(difference=1.0, interval=items, runs_interval=runs).sign
    assert found == (over_items if runs is None or over_items == over_runs else 0)
    assert results_schema.Difference(difference=1.0, interval=items, runs=[1.0, 1.0]).sign == 0


@pytest.mark.parametrize("n, won, gain, sign", [(30, 30, 1, 1), (30, 7, -1, -1), (2, 2, 1, 0), (30, 4, 1, 0)])
def test_a_change_counts_where_the_interval_and_the_test_exclude_chance(n, won, gain, sign):
    sides = (np.zeros(n), np.arange(n) < won)[::gain]
    task = samples.pairs_task(ENDS[0], ENDS[0])
    compared = task["comparisons"][0]["scores"]
    compared["pooled_match"] = stats.paired(*sides, resamples=20, seed=0) | {"mcnemar": stats.mcnemar(*sides)}
    assert gain * min(compared["pooled_match"]["interval"], key=abs) > 0
    assert won < n or compared["pooled_match"]["interval"] == [100 * gain] * 2
    assert results.summaries({"mmvp": task})[0]["says"] == results.words(0, sign)
    compared["pooled_match"] |= {"runs": [100.0 * gain] * 2, "runs_interval": None}
    assert results.summaries({"mmvp": task})[0]["says"] == results.words(0, 0)


@pytest.mark.parametrize("control", ENDS)
def test_the_same_against_a_control(control):
    found = summaries(1, 1, control, zeroshot=samples.task("zeroshot"))
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
    assert results.summaries({"drift": samples.drift_task(), "zeroshot": samples.task("zeroshot")}) == []
    wrong = samples.drift_task()
    wrong["comparisons"][0]["scores"]["cosine"]["score"] = "0.9"
    assert summaries(1, 1, drift=wrong) == []


TASKS = ["choice", "drift", "feedback", "judge", "mmvp", "probe", "retrieval", "robustness", "segmentation", "zeroshot"]


def test_defaults_bad_values_and_unknown_fields():
    c = config.default().eval.to_dict()
    assert set(c) == {f.name for f in dataclasses.fields(Settings)} | set(TASKS) - {"retrieval"}
    settings, own = evals.parse(evals.default(), evals.names())
    assert settings == Settings() and list(own) == TASKS
    assert [evals.resolved(path) for path in (f"{ROOT}/docs/..", "mix:1=a;2=b")] == [str(ROOT), "mix:1=a;2=b"]
    assert own["feedback"].to_dict() == c["feedback"] and not own["retrieval"]
    both = "set both, every to at least 1 and data to texts TASK=PATH, or neither"
    cases = [
        (dict(dtype="float16"), "config.eval.dtype='float16' must be float32 or bfloat16"),
        (dict(every=-1, data=("drift=x",)), "config.eval.every=-1 must be at least 0"),
        *((changes, both) for changes in (dict(every=3), dict(data=("drift=x",)))),
        (dict(every=3, data=("drift=a", "drift=b")), "config.eval.data has two paths for the task drift, a and b"),
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
        c.eval.length = evals.default((outside,)).length
    c.eval.length.scale = 3.0
    config.validate(c, 1)
    run = evaluator.Evaluator(c, mesh, evals.entries(c.eval.data, ""))
    assert run.options["length"] == {"scale": 3.0} and "every" not in run.options and "mmvp" not in run.options
    outcomes = run.evaluate(run.model("x", encode.Encoder({}, None, "", {}, "")))
    tasks, rows = run.report({"x": [outcomes], "y": [outcomes]})
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


COUNT = 19
WINDOWS = [np.asarray(patch(i).resize((42, 42))) for i in range(5)]


@functools.cache
def arrays_of(make, spec):
    return partition.disassemble(make(spec, rngs=Keys(3)))[1]


@functools.cache
def towers_on(spec, devices: int, batch: int, **settings) -> encode.Towers:
    mesh = partition.make_mesh(config.default(spec).mesh, jax.devices()[:devices])
    return encode.Towers(spec, mesh, Settings(batch_size=batch, **settings))


def images(spec, devices: int, batch: int, count: int = COUNT, seeds: int = 3, **settings):
    return towers_on(spec, devices, batch, **settings).images(arrays_of(build, spec), patch, count, seeds)


def embeddings(spec, devices: int, batch: int):
    towers = towers_on(spec, devices, batch)
    ids = np.random.default_rng(0).integers(0, spec.text.vocab_size, (COUNT, spec.text.context_length), np.int32)
    out = images(spec, devices, batch) | {"texts": towers.texts(arrays_of(Text, spec), ids)}
    if spec is CLIP:
        tokens = towers.dense(arrays_of(build, spec), WINDOWS.__getitem__, len(WINDOWS), "clearclip")
        out["dense"] = np.stack(list(tokens))
    return out


@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_same_for_any_devices_and_batch(spec):
    reference = embeddings(spec, 1, 7)
    assert reference["pooled"].shape == (COUNT, spec.embed_dim)
    assert reference["published"].shape == (COUNT, 3 if spec is CLIP else 1, spec.embed_dim)
    for key, found in embeddings(spec, 8, 16).items():
        np.testing.assert_allclose(found, reference[key], atol=2e-6 * np.abs(reference[key]).max(), err_msg=key)
    if spec is CLIP:
        assert reference["dense"].shape == (5, 9, CLIP.embed_dim)


def test_draws_of_each_image_and_rounding():
    few, many = images(CLIP, 8, 16, count=5), images(CLIP, 1, 7)
    np.testing.assert_allclose(few["published"], many["published"][:5], atol=2e-6)
    draws = many["published"]
    assert np.abs(draws[:, 0] - draws[:, 1]).max() > 1e-3 < np.abs(draws[0] - draws[1]).max()
    assert np.abs(images(CLIP, 1, 7, seed=1)["published"] - draws).max() > 1e-3
    exact, rounded = images(CLIP, 1, 7)["pooled"], images(CLIP, 1, 7, seeds=0, dtype="bfloat16")["pooled"]
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.03


def by_hand(tag: str, cls, patches, drawn):
    """The published readouts, computed from their definitions."""
    if tag.startswith("vitl14"):
        return unit(cls + patches[drawn].mean(0))
    if tag.startswith("metaclip"):
        return unit(unit(cls) + unit(patches).mean(0))
    if tag == "dfn_h14_378":
        return unit(cls) + unit(patches[drawn]).mean(0)
    return unit(cls)


@pytest.mark.parametrize("tag", TABLE)
def test_published_readouts(tag):
    rng = np.random.default_rng(4)
    parsed = encode.parse_readout(TABLE[tag].readout)
    counts = {"vitl14": 76, "vitl14_336": 76, "dfn_h14_378": 364}
    assert parsed.patches == counts.get(tag, 0 if "metaclip" in tag else None)
    p, d, rows, seeds = 30, 7, [5, 11], 4
    features = Features(tokens=rng.standard_normal((2, p, d)) * 3, pooled=rng.standard_normal((2, d)) * 2)
    of_rows = [encode.patch_weights(parsed, p, row, seeds, seed=9) for row in rows]
    got = np.asarray(encode.read_out(parsed, features, None if parsed.patches is None else np.stack(of_rows)))
    assert got.shape == (2, seeds if tag in counts else 1, d)
    for b, row in enumerate(rows):
        for k in range(got.shape[1]):
            drawn = np.random.default_rng((9, k, row)).integers(0, p, parsed.patches or 1)
            want = by_hand(tag, features.pooled[b], features.tokens[b], drawn)
            np.testing.assert_allclose(got[b, k], want, atol=1e-5)


def test_unknown_readouts_are_refused():
    mesh = partition.make_mesh(config.default(CLIP).mesh)
    for text in ("mean", "cls + mean(random)", "cls+mean(all)", "l2(cls) + mean(some 3)", "cls + mean(random 0)", ""):
        spec = dataclasses.replace(CLIP, readout=text)
        refused("backbone.readout=.* cannot be read", encode.Towers, spec, mesh, Settings())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    arrays = dict(arrays_of(build, CLIP))
    arrays["proj/matrix"] = arrays["proj/matrix"].at[0, 0].set(value)
    table, texts = {"a": 0, "b": 1, "c": 2}, np.ones((3, CLIP.embed_dim), np.float32)
    texts[1:, 2] = value
    model = encode.Model("run:7", towers_on(CLIP, 1, 7), encode.Encoder(arrays, None, "", {}, ""), table, texts)
    failed("run:7: the embeddings of 5 of 5 images are not finite", model.images, patch, 5, seeds=3)
    tokens = model.dense(WINDOWS.__getitem__, 5, "clearclip")
    failed("run:7: the embeddings of 9 of 9 patches of a window are not finite", next, tokens)
    assert model.texts(["a"]).shape == (1, CLIP.embed_dim)
    failed("run:7: the embeddings of 2 of 3 texts are not finite", model.texts, ["a", "b", "c"])
