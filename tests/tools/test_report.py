"""Tests of the report: the page shows the numbers of the input and loads no other files."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import commands
import numpy as np
import pytest
import report_samples as samples
from PIL import Image

from diva_jax import report
from diva_jax.common.errors import UserError
from diva_jax.report import charts, inputs, wording
from diva_jax.report.canvas import COLOURS


@pytest.fixture
def full(tmp_path):
    return samples.write_full(tmp_path)


class Page(HTMLParser):
    """The elements of a page. Parsing fails if tags are not closed in order."""

    VOID = {"meta", "link", "img"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]):
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


def headings(page):
    """Returns the titles of the sections."""
    return re.findall(r"<h2>(.*?)</h2>", page.read_text(encoding="utf-8"))


def test_the_page_loads_nothing_else(full):
    path, *pngs = report.write(full)
    page = Page(path)
    source = path.read_text(encoding="utf-8")
    assert not {"script", "iframe", "object", "embed", "base", "form", "a"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            assert attrs.get(name, "data:").startswith("data:"), attrs
        assert not [name for name in attrs if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", source)
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert page.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs["aria-label"] for attrs in page.all("svg"))
    assert pngs and all(p.parent == full / "report" for p in pngs)
    for png in pngs:
        with Image.open(png) as image:
            assert image.width > 600 and len(image.convert("L").getcolors()) > 10


def test_numbers_are_those_of_the_input(full):
    results = json.loads((full / "results.json").read_text())
    path, *_ = report.write(full)
    page = Page(path)
    shown = [attrs["title"] for attrs in page.all("b") if "title" in attrs]
    for task in results["tasks"].values():
        for weights in task["weights"].values():
            for s in weights["scores"].values():
                assert str(s["score"]) in shown
        for c in task["comparisons"]:
            for s in c["scores"].values():
                assert str(s.get("difference", s.get("score"))) in shown
    assert "MMVP-VLM, pooled embedding: 19.3 → 25.9 (+6.7, 95% interval 1.5 to 11.9)" in page.text
    assert "Higher: zero is outside of the interval. 12 pairs won, 3 lost, exact McNemar p = 0.035." in page.text
    # No difference is stated if zero is within the interval, and a decrease is stated as one.
    assert "19.7 → 21.1 (+1.4, 95% interval −2.2 to 5.0) Zero is within the interval" in page.text
    assert "36.5 → 36.2 (−0.3, 95% interval −0.6 to −0.1) Lower: zero is outside of the interval." in page.text
    assert "openai: condition gap to another image is not different from zero" in page.text
    assert "runs/vitl14:4600: condition gap" not in page.text
    # The tooltips of the bars have their values: 2 of 15 pairs.
    assert "Orientation and Direction\nopenai: 13.3% (0.0 to 33.3)" in path.read_text(encoding="utf-8")


def test_flipped_pairs_have_their_images(full):
    results = json.loads((full / "results.json").read_text())
    flipped = results["tasks"]["mmvp"]["comparisons"][0]["flipped"]
    Path(flipped[0]["images"][0]).unlink()
    Path(flipped[1]["images"][0]).write_bytes(b"no image")
    page = Page(report.write(full)[0])
    images = page.all("img")
    assert len(images) == 2 * len(flipped) - 2
    sizes = set()
    for attrs in images:
        data = base64.b64decode(attrs["src"].removeprefix("data:image/jpeg;base64,"))
        sizes.add(Image.open(io.BytesIO(data)).size)
    assert sizes <= {(320, 320), (320, 291), (320, 267)} and len(sizes) > 1  # the ratios of the three input sizes
    assert page.text.count("cannot be read") == 2
    assert page.text.count("Correct only after") == page.text.count("pairs that flipped") == 2
    assert (
        samples.HOSTILE in page.text
    )  # shown as text; `test_the_page_loads_nothing_else` checks that there is no script
    # The probability of text 2 for image 2 is one minus that of text 1.
    assert "0.61 ✓ → 0.71 ✓" in page.text and "0.45 ✗ → 0.65 ✓" in page.text


def test_the_number_of_flips_shown_is_limited(tmp_path):
    images = samples.write_images(tmp_path, 2)
    task = samples.mmvp_task(images)
    task["comparisons"][0]["flipped"] *= 60
    samples.write_evaluation(tmp_path, images, mmvp=task)
    page = Page(report.write(tmp_path)[0])
    assert len(page.all("img")) == 2 * 48 and "12 more are listed in predictions.csv." in page.text


def test_sections_without_data_are_omitted(tmp_path):
    images = samples.write_images(tmp_path, 4)
    samples.write_evaluation(tmp_path / "eval", images)
    page = report.write(tmp_path / "eval")[0]
    # There are flipped pairs for two metrics, one section each. The source is not a folder, so there is no run.
    assert headings(page) == ["MMVP-VLM", *2 * ["MMVP-VLM: pairs that flipped"], "Config and versions"]
    samples.write_run(tmp_path / "run", rows=3)
    (tmp_path / "run" / "config.json").unlink()
    assert headings(report.write(tmp_path / "run")[0]) == ["Training", "During training"]
    task = samples.retrieval_task()
    task["comparisons"], task["weights"] = [], {samples.BEFORE: task["weights"][samples.BEFORE]}
    samples.write_evaluation(tmp_path / "one", images, retrieval=task)
    text = Page(report.write(tmp_path / "one")[0]).text
    assert "Retrieval, image retrieval recall@1: 36.5 (95% interval 36.1 to 36.9)" in text
    assert "Difference" not in text


def test_a_workdir(tmp_path):
    samples.write_run(tmp_path / "run")
    page, *pngs = report.write(tmp_path / "run")
    text = Page(page).text
    loss = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = [v for v in loss if v is not None]
    assert f"loss {np.mean(loss[:23]):.3g} → {np.mean(loss[-23:]):.3g}" in text and "step 4,600 of 4,600" in text
    assert str(loss[-1]) in [attrs.get("title") for attrs in Page(page).all("b")]
    assert {p.stem for p in pngs} >= {"training-loss", "training-grad_norm", "training-feedback-gap_other"}
    assert "feedback/gap_other is not different from zero" in text
    assert "optim.lr 0.0001" in text


def test_several_steps_of_one_run(tmp_path):
    """Each is compared with the first, in a table that scrolls; the run that they share is shown once."""
    images = samples.write_images(tmp_path, 4)
    samples.write_run(tmp_path / "run", rows=30)
    task = samples.mmvp_task(images)
    for label in ("runs/vitl14:1000", "runs/vitl14:2000"):
        task["weights"][label] = task["weights"][samples.AFTER]
        task["comparisons"].append(task["comparisons"][0] | {"after": label, "flipped": []})
    results = samples.write_evaluation(tmp_path / "out", images, tmp_path / "run", mmvp=task)
    for step in (1000, 2000):
        results["weights"].append({"label": f"runs/vitl14:{step}", "source": str(tmp_path / "run"), "step": step})
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    page = Page(report.write(tmp_path / "out")[0])
    assert "MMVP-VLM, pooled embedding, runs/vitl14:2000: 19.3 → 25.9" in page.text
    assert page.text.count("run, step 4,600 of 4,600") == 1
    assert [attrs["class"] for attrs in page.all("div") if attrs.get("class") in ("scrolls", "stacks")] == [
        "scrolls", "stacks",
    ]  # fmt: skip


def test_curves():
    spiky = [(i, 100.0 if i == 77_777 else math.sin(i)) for i in range(100_000)]
    thin = charts.thinned(spiky, 1000)
    assert len(thin) <= 1000 and (77_777, 100.0) in thin and thin == sorted(thin)
    flat = charts.moving_mean([(i, 5.0) for i in range(10)], 4)
    assert flat == [(i, 5.0) for i in range(10)]
    assert charts.moving_mean([(0, 0.0), (1, 3.0), (2, 6.0), (3, 0.0)], 2)[1] == (1, 3.0)
    # A single row, equal values and very large ranges also give a valid axis.
    for data in ([(5, 0.3)], [(1, 0.0), (2, 0.0)], [(1, 1e-7), (2, 1e9)], [(1, -2.0), (2, 1e-9)]):
        for width in (328, 918):
            canvas = charts.curves(width, "Loss", [charts.Series("a", 1, data)], "step")
            assert "nan" not in canvas.svg() and canvas.png().width == 2 * (width + 36)


def test_bars_are_as_long_as_their_values():
    data = [charts.Row("a", [("x", 0, 25.0, None, ""), ("y", 1, 50.0, (40.0, 60.0), "")])]
    canvas = charts.rows(918, "Bars", data, "%", 60.0)
    bars = re.findall(r'<polygon points="([^"]*)" fill="var\(--s([01])\)">', canvas.svg())
    length = {}
    for corners, index in bars:
        xs = [float(p.split(",")[0]) for p in corners.split()]
        length[index] = max(xs) - min(xs)
    assert length["1"] / length["0"] == pytest.approx(2, rel=1e-3)
    # The PNG shows the same: the areas of the bars have the same ratio, except for the whiskers.
    pixels = np.asarray(canvas.png())
    areas = [(pixels == tuple(bytes.fromhex(COLOURS[r][0][1:]))).all(-1)[80:].sum() for r in ("s0", "s1")]
    assert 1.6 < areas[1] / areas[0] < 2.1


def test_colours_have_enough_contrast():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for scheme in (0, 1):
        for under in ("page", "panel"):
            for role in set(COLOURS) - {"page", "panel", "grid", "axis"}:
                a, b = sorted(luminance(COLOURS[r][scheme]) for r in (role, under))
                bound = 4.5 if role in ("ink", "muted", "won", "lost") else 3.0  # WCAG 2: text, graphics
                assert (b + 0.05) / (a + 0.05) >= bound, (role, under, scheme)


def test_wording():
    assert [wording.compact(v) for v in (0, 4600, 0.25, 1e-4, -2.5e-7, 12345.6, 999.96)] == [
        "0", "4,600", "0.25", "0.0001", "−2.5e−7", "12,346", "1000",
    ]  # fmt: skip
    assert wording.number(25.926, "%") == "25.9" and wording.number(0.2, "") == "0.200"
    assert wording.number(None, "%") == "–" and wording.number(float("nan"), "") == "–"
    doubtful = {"difference": 5, "interval": [1, 9], "mcnemar": {"won": 5, "lost": 0, "p": 0.0625}}
    assert (
        wording.verdict(doubtful)
        == "Higher: zero is outside of the interval, but the exact test does not exclude chance."
    )
    assert wording.signed(-0.31, "%") == "−0.3" and wording.signed(6.667, "%") == "+6.7"
    assert [wording.excludes_zero(e) for e in ([-1, 1], [0.0, 2.0], [0.1, 2], [-2, -1], None)] == [
        False, False, True, True, None,
    ]  # fmt: skip


BROKEN = {
    "missing": (lambda d: d.rmdir(), "is not a folder"),
    "empty": (lambda d: None, "neither results.json"),
    "no rows": (lambda d: (d / "metrics.jsonl").write_text(""), "neither results.json"),
    "broken line": (
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo\n{"step": 3}\n'),
        "metrics.jsonl, line 2 is not JSON",
    ),
    "no step": (lambda d: (d / "metrics.jsonl").write_text('{"loss": 1}\n'), "line 1 has no step"),
    "broken results": (lambda d: (d / "results.json").write_text('{"schema": 1,\n "tasks"'), "line 2 is not JSON"),
    "other schema": (lambda d: (d / "results.json").write_text('{"schema": 2}'), "is not of schema 1"),
    "no tasks": (lambda d: (d / "results.json").write_text('{"schema": 1, "weights": []}'), "has no 'tasks'"),
    "half a task": (
        lambda d: (d / "results.json").write_text('{"schema": 1, "tasks": {"mmvp": {"title": "MMVP"}}}'),
        "mmvp has no 'metrics'",
    ),
    "not text": (lambda d: (d / "results.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input(tmp_path, case):
    folder = tmp_path / "given"
    folder.mkdir()
    breaks, message = BROKEN[case]
    breaks(folder)
    with pytest.raises(UserError, match=re.escape(message)) as e:
        report.write(folder)
    assert "\n" not in str(e.value) and not (folder / "report.html").exists()


def test_an_incomplete_last_row_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert [row["step"] for row in inputs.read(tmp_path).runs[0].rows] == [1]


def test_command(tmp_path):
    samples.write_run(tmp_path / "run", rows=30)
    assert "report.html and" in commands.succeed("report", tmp_path / "run")
    for args in ((str(tmp_path / "gone"),), (), (str(tmp_path / "run"), "more")):
        code, out, err = commands.run("report", *args)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), err
