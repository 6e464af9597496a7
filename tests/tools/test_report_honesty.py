"""Tests of what the report says when something is wrong, and of what it must not show as certainty."""

import base64
import io
import json
import re

import numpy as np
import pytest
import report_samples as samples
from PIL import Image

from diva_jax import report
from diva_jax.report import about, alarms, charts, evaluation, inputs, pictures, wording


def page_of(folder, **tasks):
    samples.write_evaluation(folder, [], **tasks)
    return report.write(folder)[0].read_text(encoding="utf-8")


def merged(task):
    found = inputs.Inputs(None, {"tasks": {"mmvp": task}}, [])
    return evaluation.prepared(found)["tasks"]["mmvp"]


def strip(page):
    """Returns [(kind, title, text)] of the alarms on a page."""
    found = re.search(r'<ul class="alarms".*?</ul>', page)
    lines = re.findall(r'<li class="(\w+)"><b>(.*?)\.</b> (.*?)</li>', found[0]) if found else []
    return [(kind, title, text.replace("\u00a0", " ")) for kind, title, text in lines]


def test_a_collapsed_encoder_has_no_green_headline(tmp_path):
    mmvp = samples.mmvp_task([])
    good = page_of(tmp_path / "good", mmvp=mmvp, drift=samples.drift_task())
    assert 'class="lead up won"' in good and not strip(good)
    bad = page_of(tmp_path / "bad", mmvp=mmvp, drift=samples.drift_task(ranks=(231.4, 4.1), cosine=0.21))
    found = strip(bad)
    assert [(kind, title) for kind, title, _ in found] == [
        ("bad", "Representation collapsed"), ("bad", "Representation replaced"),
    ]  # fmt: skip
    assert "runs/vitl14:4600: the effective rank fell from 231 to 4.1" in found[0][2] and "0.21" in found[1][2]
    assert 'class="lead up doubted"' in bad and 'class="up doubted">+6.7</b>' in bad and 'class="up won"' not in bad
    assert 'class="up won">+6.7</b>' in good
    assert "Not an improvement: see the first lines of this page." in bad
    assert re.search("<title>Representation collapsed! MMVP-VLM", bad)
    assert bad.index("Representation collapsed") < bad.index("<h1>")


@pytest.mark.parametrize("ranks, cosine, titles", [
    ((100.0, 50.0), 0.5, []),
    ((100.0, 49.9), 0.5, ["Representation collapsed"]),
    ((100.0, 51.0), 0.499, ["Representation replaced"]),
])  # fmt: skip
def test_bounds_of_the_drift(tmp_path, ranks, cosine, titles):
    page = page_of(tmp_path, drift=samples.drift_task(ranks, cosine))
    assert [title for _, title, _ in strip(page)] == titles


def test_noise_and_differences_that_are_none(tmp_path):
    feedback = samples.feedback_task()
    feedback["weights"] = dict(reversed(feedback["weights"].items()))  # The tuned weights are the noise now.
    mmvp = samples.mmvp_task([])
    mmvp["comparisons"][0]["scores"]["pooled"] |= {"difference": 0.7, "interval": [-2.0, 3.5]}
    found = strip(page_of(tmp_path, feedback=feedback, mmvp=mmvp, retrieval=samples.retrieval_task()))
    assert [(kind, title) for kind, title, _ in found] == [
        ("bad", "Feedback is noise"), ("bad", "Worse than before"), ("doubt", "No difference shown"),
    ]  # fmt: skip
    assert "openai: the interval of gap_other (−0.000300 to 0.000700) is not above zero" in found[0][2]
    assert "Retrieval, image retrieval recall@1 (−0.3), " in found[1][2] and "and 2 more." in found[1][2]
    assert found[2][2] == "runs/vitl14:4600: MMVP-VLM, pooled embedding: zero is within the interval of the difference."


def test_a_run_that_collapses_says_so(tmp_path):
    samples.write_run(tmp_path, rows=60, collapses=True)
    page = report.write(tmp_path)[0].read_text(encoding="utf-8")
    assert [title for _, title, _ in strip(page)] == ["Representation collapsed", "Feedback is noise"]
    assert "effective rank fell from 234 to 3." in strip(page)[0][2]
    # An evaluation of its checkpoints has no green headline either.
    samples.write_evaluation(tmp_path / "out", [], tmp_path, mmvp=samples.mmvp_task([]))
    assert 'class="lead up doubted"' in report.write(tmp_path / "out")[0].read_text(encoding="utf-8")


def test_colours_say_better_or_worse_and_not_the_sign():
    gained = {"difference": 2.0, "interval": [1.0, 3.0]}
    fell = {"difference": -2.0, "interval": [-3.0, -1.0]}
    for which, up, down in (("higher", "up won", "down lost"), ("lower", "up lost", "down won"), ("", "up", "down")):
        assert wording.direction(gained, which) == up and wording.direction(fell, which) == down
        assert wording.direction(gained | {"interval": [-1.0, 3.0]}, which) == "zero"
        assert wording.direction(gained | {"interval": None}, which) == ""
    assert wording.direction(gained, "higher", doubted=True) == "up doubted"
    assert wording.direction(fell, "higher", doubted=True) == "down lost"
    # Results of before `better` was written: percentages are better where they are higher, others are not judged.
    assert [wording.better({"unit": u}) for u in ("%", "")] == ["higher", ""]
    assert wording.better({"unit": "%", "better": ""}) == ""


def test_a_lower_loss_is_better(tmp_path):
    task = samples.feedback_task()
    difference = {"difference": -0.01, "interval": [-0.012, -0.008], "mcnemar": None}
    task["comparisons"] = [{"before": samples.BEFORE, "after": samples.AFTER, "scores": {"loss_own": difference}}]
    page = page_of(tmp_path, feedback=task)
    assert 'class="lead down won"' in page and "Better: zero is outside of the interval." in page


def test_readouts_that_are_the_same_are_one(tmp_path):
    images = samples.write_images(tmp_path, 6)
    task = samples.mmvp_task(images)
    for part in (task["weights"][samples.BEFORE], task["weights"][samples.AFTER], *task["comparisons"]):
        part["scores"]["published"] = part["scores"]["pooled"]
    for weights in task["weights"].values():
        for pattern in weights["patterns"]:
            pattern["scores"]["published"] = pattern["scores"]["pooled"]
    flipped = [f | {"metric": "pooled"} for f in samples.flips(images)]
    task["comparisons"][0]["flipped"] = flipped + [f | {"metric": "published"} for f in flipped]
    once = merged(task)
    assert list(once["metrics"]) == ["pooled"]
    page = page_of(tmp_path / "out", mmvp=task)
    assert page.count("MMVP-VLM: pairs that flipped</h2>") == 1
    assert "pooled embedding and published readout, cls + mean(random 76), l2, which are the same" in page
    # One value that differs makes them two.
    task["weights"][samples.AFTER]["patterns"][3]["scores"]["published"] = samples.score(1.0, 0.5)
    assert len(merged(task)["metrics"]) == 2


def test_an_interval_of_width_zero_is_none(tmp_path):
    task = samples.mmvp_task([])
    for weights in task["weights"].values():
        for pattern in weights["patterns"]:
            pattern["scores"]["pooled"] = {"score": 0.0, "interval": [0.0, 0.0]}
    task["weights"][samples.AFTER]["scores"]["pooled"]["interval"] = [25.9, 25.9]
    task["comparisons"][0]["scores"]["pooled"] |= {"interval": [6.7, 6.7]}
    samples.write_evaluation(tmp_path, [], mmvp=task)
    found = evaluation.prepared(inputs.read(tmp_path))
    (section,) = evaluation.sections(found)
    published, pooled = [c for c in section.body if isinstance(c, charts.Chart)][::-1]
    whisker = 'stroke-width="1.2"'
    assert whisker in published.draw(918).svg() and whisker not in pooled.draw(918).svg()
    assert section.body[0].count("no interval: all items agree") == 2
    assert "All items differ by the same" not in section.body[0]
    first = evaluation.findings(found)[0]
    assert first.what == "MMVP-VLM, published readout, cls + mean(random 76), l2"  # The pooled one has no interval.
    samples.write_run(tmp_path / "run", rows=12)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(re.sub(r'(/(?:low|high)": )[-.\d]+', r"\g<1>0.5", lines))
    assert not [a for a in alarms.of(inputs.read(tmp_path / "run")) if a.title == "Feedback is noise"]


def test_differences_without_an_interval_are_still_differences(tmp_path):
    task = samples.drift_task()
    scores = task["comparisons"][0]["scores"]
    scores["effective_rank"] = {"difference": -33.2, "interval": None, "mcnemar": None}
    page = page_of(tmp_path, drift=task).replace("\u00a0", " ")
    assert "<span>Drift, effective rank:</span> 231 → 198 <small>(−33)</small>" in page
    assert "This difference has no interval, so chance cannot be excluded." in page and "no other weights" not in page


def test_numbers_of_a_row_have_the_same_decimals():
    assert wording.places([0.2043, 0.1941, None], "") == 3 and wording.places([231.4, 4.1], "") == 0
    assert wording.places([19.26, 25.9], "%") == 1 and wording.places([1e-7], "") is None
    assert wording.places([], "") == wording.places([0.0], "") == 0
    assert [wording.number(v, "", 4) for v in (0.0031, 0.2, -0.00001)] == ["0.0031", "0.2000", "0.0000"]
    assert wording.signed(0.00001, "", 3) == "0.000" and wording.signed(-0.5, "", 2) == "−0.50"
    assert wording.interval([1.04, 12.0], "%") == "1.0\u00a0to\u00a012.0"


def test_the_learning_rate_is_on_a_linear_axis():
    data = [charts.Series("a", 1, [(i, 1e-4 * (1 - i / 100) + 1e-9) for i in range(100)])]
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", charts.curves(918, "lr", data, "step", linear=True).svg())
    assert {"0", "0.00002", "0.0001"} <= set(ticks)
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", charts.curves(918, "loss", data, "step").svg())
    assert "1e−6" in ticks


def test_dates_durations_devices_versions_and_contents(tmp_path):
    page = report.write(samples.write_full(tmp_path))[0].read_text(encoding="utf-8")
    for line in (
        "Evaluation: 2026-01-31 12:00 UTC, 1 h 20 min long, 8 x cpu, diva_jax 0.1.0, jax 0.10.2, python 3.11.9",
        "Run run: 2026-01-30 09:30 UTC, 2 h 0 min long in 2 sessions, 16 x TPU v5e, diva_jax 0.1.0, jax 0.10.2",
    ):
        assert line in page, line
    links = dict(re.findall(r'<a href="#(s\d+)">(.*?)</a>', page))
    assert list(links.values())[:2] == ["MMVP-VLM", "MMVP-VLM: pairs that flipped"]
    assert list(links.values())[-2:] == ["During training", "Config and versions"]
    for anchor, title in links.items():
        assert f'<section id="{anchor}"><header><h2>{title}</h2>' in page
    assert [wording.duration(s) for s in (0.44, 81.2, 725, 12_000)] == ["0.4 s", "81 s", "12 min", "3 h 20 min"]


def test_differences_from_the_defaults_come_first(tmp_path):
    samples.write_run(tmp_path, rows=3)
    found = about.section(inputs.read(tmp_path))
    opened, folded = re.findall(r"<details( open)?><summary>(.*?) <small>", found)
    assert opened[0] and opened[1].endswith("what differs from the defaults") and not folded[0]
    first = found.split("</details>")[0]
    assert "<dt>optim.momentum</dt><dd>0.8 (default 0.9)</dd>" in first and "<dt>optim.name</dt>" not in first
    assert first.count("<dt>") == 3
    # Without a known objective all fields are shown, folded.
    config = json.loads((tmp_path / "config.json").read_text()) | {"objective": "not_installed.method"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = about.section(inputs.read(tmp_path))
    assert "<details open>" not in found and "<dt>optim.name</dt><dd>sgd</dd>" in found


def test_strips_of_a_segmentation(tmp_path):
    task = samples.segmentation_task(samples.write_images(tmp_path, 2))
    head, *rows = pictures.strips(task, [samples.BEFORE, samples.AFTER])
    assert "not chosen by their scores" in head and len(rows) == 4
    for strip, legend in zip(rows[::2], rows[1::2], strict=True):
        captions = re.findall(r"<figcaption>(?:<i.*?</i>&#8288;)?(.*?)</figcaption>", strip)
        assert captions == ["image", "truth", samples.BEFORE, samples.AFTER]
        names = re.findall(r"</i>([^<]*)</span>", legend)
        assert names == ["cat", "background", "potted plant", "not labelled"]
    truth = re.findall(r'src="data:image/png;base64,([^"]*)"', rows[0])[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(truth))).convert("RGB"))
    cat = pictures.colour(1, "cat")
    assert pixels.shape == (60, 120, 3) and tuple(pixels[0, 60]) == cat and tuple(pixels[0, -1]) == (225, 225, 225)
    assert len({pictures.colour(i, "") for i in range(171)}) == 171
    assert pictures.strips(samples.mmvp_task([]), [samples.BEFORE]) == []
    for damaged in ("", "no base64!", base64.b64encode(b"no picture").decode()):
        task["weights"][samples.AFTER]["pictures"][0]["predicted"] = damaged
        assert "Picture 1 of results.json cannot be read." in pictures.strips(task, [samples.BEFORE, samples.AFTER])[1]
