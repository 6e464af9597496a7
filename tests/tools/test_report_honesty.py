"""Tests of what the report says when something is wrong, and of what it must not show as certainty."""

import json
import re

import pytest
import report_samples as samples

from diva_jax.report import evaluation, inputs, page
from diva_jax.training import checkpoint


def read(folder, **tasks):
    samples.write_evaluation(folder, [], folder, **tasks)
    (folder / "checkpoints" / "4600").mkdir(parents=True, exist_ok=True)
    return inputs.read(folder)


def html(content) -> str:
    """The page without its charts, which take most of the time."""
    body = page.sections(content)
    for section in body:
        section.body[:] = [part for part in section.body if part.macro != "charts"]
    return page.html(content, body)


def strip(source):
    """Returns [(kind, title, text)] of the alarms on a page."""
    lines = source.partition('<ul class="alarms"')[2].partition("</ul>")[0].replace("\u00a0", " ")
    return re.findall(r'<li class="(\w+)"><b>(.*?)\.</b> (.*?)</li>', lines)


def test_a_collapsed_encoder_has_no_green_headline(tmp_path):
    mmvp = samples.mmvp_task([])
    good = html(read(tmp_path / "good", mmvp=mmvp, drift=samples.drift_task()))
    assert 'class="lead up won"' in good and 'class="up won">+6.7</b>' in good and not strip(good)
    bad = html(read(tmp_path / "bad", mmvp=mmvp, drift=samples.drift_task(ranks=(231.4, 4.1), cosine=0.21)))
    collapsed, replaced = strip(bad)
    assert collapsed[:2] == ("bad", "Representation collapsed") and replaced[:2] == ("bad", "Representation replaced")
    assert "runs/vitl14:4600: the effective rank fell from 231 to 4.1" in collapsed[2] and "0.21" in replaced[2]
    assert 'class="lead up doubted"' in bad and 'class="up doubted">+6.7</b>' in bad and 'class="up won"' not in bad
    assert "Not an improvement: see the first lines of this page." in bad
    assert "<title>Representation collapsed! MMVP-VLM" in bad
    assert bad.index("Representation collapsed.") < bad.index("<h1>")


def test_the_headline_is_the_verdict(tmp_path):
    """With one chart of matches against zero-shot accuracy, where both were measured."""
    for matches, drift, says, kind in (
        ([-1.0, 2.0], {}, "differently calibrated", "zero"),
        ([0.5, 2.0], {}, "sees more", "up won"),
        ([0.5, 2.0], {"drift": samples.drift_task(cosine=0.21)}, "sees more", "up doubted"),
        ([-3.0, -1.0], {}, "sees less", "down lost"),
    ):
        task = samples.pairs_task([1.0, 3.0], matches)
        content = read(tmp_path, mmvp=task, zeroshot=samples.task("zeroshot"), **drift)
        first = evaluation.findings(content)[0]
        assert (first.what, first.figures, first.kind) == (f"{samples.AFTER} against {samples.BEFORE}", says, kind)
        assert "zero-shot -0.1 [-0.2, +0.0]" in first.meaning and ("Not an improvement" in first.meaning) == bool(drift)
    assert f"<h1><span>{first.what}:</span> sees less</h1>" in html(content)
    (chart,) = (chart for chart in page.charts(page.sections(content)) if chart.name == "matches-zeroshot")
    arrow = chart.draw(918).figure.axes[0].texts[-1]
    assert [label for label, _ in chart.legend] == [samples.BEFORE, samples.AFTER]
    assert arrow.xyann == (75.5, 40.0) and arrow.xy == (75.4, 40.0)
    alone = read(tmp_path / "alone", mmvp=task)
    assert not [c for c in page.charts(page.sections(alone)) if c.name == "matches-zeroshot"]
    assert "a gain in pairs alone is not a result" in html(alone)


@pytest.mark.parametrize("over", ["interval", "runs_interval"])
def test_noise_and_differences_that_are_none(tmp_path, over):
    feedback = samples.task("feedback")
    for score in [s for w in feedback["weights"].values() for s in w["scores"].values() if over not in s]:
        score[over] = score.pop("interval")  # Of a group of runs.
    # The tuned weights are the noise now.
    feedback["weights"] = dict(reversed(feedback["weights"].items()))
    mmvp = samples.mmvp_task([])
    mmvp["comparisons"][0]["scores"]["pooled"] |= {"difference": 0.7, "interval": [-2.0, 3.5]}
    found = strip(html(read(tmp_path, feedback=feedback, mmvp=mmvp, retrieval=samples.task("retrieval"))))
    assert [kind for kind, _, _ in found] == ["bad", "bad", "doubt"]
    assert [title for _, title, _ in found] == ["No signal in the feedback", "Worse than before", "No difference shown"]
    assert "openai: the interval of gap_other (−0.000300 to 0.000700) is not above zero" in found[0][2]
    assert "Retrieval, image retrieval recall@1 (−0.3), " in found[1][2] and "and 2 more." in found[1][2]
    assert found[2][2] == "runs/vitl14:4600: MMVP-VLM, pooled embedding: zero is within the interval of the difference."


def test_a_run_that_collapses_says_so_beyond_the_bounds_of_the_drift(tmp_path):
    samples.write_run(tmp_path, rows=60, collapses=True)
    found = evaluation.alarms(inputs.read(tmp_path))
    assert [alarm.what for alarm in found] == ["Representation collapsed", "No signal in the feedback"]
    assert "effective rank fell from 234 to 3." in found[0].meaning
    # An evaluation of its checkpoints has no green headline either.
    samples.write_evaluation(tmp_path / "out", [], tmp_path, mmvp=samples.mmvp_task([]))
    assert evaluation.findings(inputs.read(tmp_path / "out"))[0].kind == "up doubted"
    for ranks, cosine, titles in (
        ((100.0, 50.0), 0.5, []),
        ((100.0, 49.9), 0.5, ["Representation collapsed"]),
        ((100.0, 51.0), 0.499, ["Representation replaced"]),
    ):
        found = evaluation.alarms(read(tmp_path / "bounds", drift=samples.drift_task(ranks, cosine)))
        assert [a.what for a in found] == titles


def test_another_run_of_the_recorded_name_is_not_that_which_was_evaluated(tmp_path):
    samples.write_run(run := tmp_path / "run", rows=6)
    results = samples.write_evaluation(out := tmp_path / "out", [], run, mmvp=samples.mmvp_task([]))
    assert [r.name for r in inputs.read(out).runs] == ["run"]
    samples.write_run(run, rows=6, total=3000)  # It never got to step 4600.
    assert not inputs.read(out).runs and inputs.read(out).missing == (str(run),)
    (run / "checkpoints" / "4600").mkdir(parents=True)
    for text, known in (("a", 1), ("b", 0)):
        (run / "checkpoints" / "4600" / "_CHECKPOINT_METADATA").write_text(text)
        results["weights"][1].setdefault("checkpoint", checkpoint.identity(run, 4600))
        (out / "results.json").write_text(json.dumps(results))
        assert len(inputs.read(out).runs) == known


@pytest.mark.parametrize("difference", [-3.0, -0.5, 0.5, 3.0])
@pytest.mark.parametrize("better", ["higher", "lower", ""])
def test_sentences_on_a_control_do_not_contradict_themselves(tmp_path, better, difference):
    task, images = samples.mmvp_task([]), samples.write_images(tmp_path, 4)
    task["weights"]["control"] = task["weights"][samples.BEFORE]
    for metric in task["metrics"].values():
        metric["better"] = better
    ends = {"difference": difference, "interval": [difference - 1, difference + 1]}
    first = task["comparisons"][0] | {"flipped": samples.flips(images)}
    against = {"before": "control", "after": samples.AFTER, "scores": {"pooled": ends, "published": ends}}
    task["comparisons"] = [first | {"after": "control"}, first, against | {"flipped": first["flipped"]}]
    results = samples.write_evaluation(tmp_path, [], mmvp=task)
    results["weights"].append({"label": "control", "source": "runs/control", "step": 4600})
    (tmp_path / "results.json").write_text(json.dumps(results))
    content = inputs.read(tmp_path)
    finding = evaluation.findings(content)[0]
    assert finding.what == f"MMVP-VLM, pooled embedding, {samples.AFTER} against the control control"
    beaten = better and abs(difference) > 1 and (difference > 0) == (better == "higher")
    refused = f"{samples.AFTER} does not beat the control, so nothing can be claimed."
    assert finding.meaning.startswith(refused) == (better != "" and not beaten)
    assert ("Better" in finding.meaning) == bool(beaten)
    named = [alarm for alarm in evaluation.alarms(content) if "the control" in alarm.what + alarm.meaning]
    assert len(named) == (0 if beaten or (abs(difference) > 1 and not better) else 1)
    flipped = [s for s in page.sections(content) if s.title.endswith("that flipped")]
    order = [s.note.partition(",")[2].split(" against ") for s in flipped if s.note.startswith("pooled")]
    after = f" {samples.AFTER}"
    assert order == [[after, samples.BEFORE], [after, "the control control"], [" control", samples.BEFORE]]


def test_a_lower_loss_is_better_and_no_interval_still_a_difference(tmp_path):
    task = samples.task("feedback")
    difference = {"difference": -0.01, "interval": [-0.012, -0.008], "mcnemar": None}
    task["comparisons"] = [{"before": samples.BEFORE, "after": samples.AFTER, "scores": {"loss_own": difference}}]
    source = html(read(tmp_path, feedback=task))
    assert 'class="lead down won"' in source and "Better: zero is outside of the interval." in source
    task = samples.drift_task()
    task["comparisons"][0]["scores"]["effective_rank"] = {"difference": -33.2, "interval": None, "mcnemar": None}
    source = html(read(tmp_path, drift=task)).replace("\u00a0", " ")
    assert "<span>Drift, effective rank:</span> 231 → 198 <small>(−33)</small>" in source
    assert "This difference has no interval, so chance cannot be excluded." in source
    assert "no other weights" not in source


def test_readouts_that_are_the_same_are_one(tmp_path):
    task = samples.mmvp_task(images := samples.write_images(tmp_path, 6))
    task["comparisons"][0]["scores"]["pooled"] = {"difference": -2.0, "interval": [-3.0, -1.0]}
    parts = [*task["weights"].values(), *task["comparisons"]]
    for part in parts + [p for weights in task["weights"].values() for p in weights["patterns"]]:
        part["scores"]["published"] = part["scores"]["pooled"]
    task["comparisons"][0]["flipped"] = [
        f | {"metric": m, "after": [p + 1e-6 * i for p in f["after"]]}  # In another precision.
        for i, m in enumerate(("pooled", "published"))
        for f in samples.flips(images)
    ]
    source = html(read(tmp_path / "out", mmvp=task))
    assert source.count("MMVP-VLM: pairs that flipped</h2>") == 1
    assert "pooled embedding and published readout, cls + mean(random 76), l2, which are the same" in source
    ((_, title, text),) = strip(source)
    assert title == "Worse than before" and text.count("(−2.0)") == 1
    # One value that differs makes them two.
    task["weights"][samples.AFTER]["patterns"][3]["scores"]["published"] = samples.score(1.0, 0.5)
    assert len(read(tmp_path, mmvp=task).results.tasks["mmvp"].metrics) == 2


def test_an_interval_of_width_zero_is_none(tmp_path):
    task = samples.mmvp_task([])
    task["weights"][samples.AFTER]["scores"]["pooled"]["interval"] = [25.9, 25.9]
    task["comparisons"][0]["scores"]["pooled"] |= {"interval": [6.7, 6.7], "mcnemar": None}
    content = read(tmp_path, mmvp=task)
    source = html(content)
    assert source.count("no interval: all items agree") == 2 and "All items differ by the same" not in source
    # The pooled readout has no interval.
    assert evaluation.findings(content)[0].what == "MMVP-VLM, published readout, cls + mean(random 76), l2"
    # It is a difference where the paired test says so.
    change = {"difference": -6.7, "interval": [-6.7, -6.7], "mcnemar": {"won": 0, "lost": 30, "p": 2e-9}}
    task["comparisons"][0]["scores"]["pooled"] = change
    first, (_, title, text) = evaluation.findings(content := read(tmp_path, mmvp=task))[0], strip(html(content))[0]
    assert first.kind == "down lost" and first.meaning.startswith("Worse: every resample has the same difference.")
    assert title == "Worse than before" and "pooled embedding (−6.7)" in text
    samples.write_run(tmp_path / "run", rows=12)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(re.sub(r'(/(?:low|high)": )[-.\d]+', r"\g<1>0.5", lines))
    assert not [a for a in evaluation.alarms(inputs.read(tmp_path / "run")) if a.what.startswith("No signal")]


def test_differences_from_the_defaults_come_first(tmp_path):
    samples.write_run(tmp_path, rows=3)
    first, rest = (part.arguments for part in page.about(inputs.read(tmp_path)))
    assert first["opened"] and first["title"].endswith("what differs from the defaults") and not rest["opened"]
    assert first["values"]["optim.momentum"] == "0.8 (default 0.9)" and "optim.name" not in first["values"]
