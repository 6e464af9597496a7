"""The report: the page shows the numbers of the input and loads no other files; in Debian's chromium too."""

import base64
import io
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import report_samples as samples
from helpers import refused
from PIL import Image

from diva_jax import config, report
from diva_jax.report import charts, figures, images, inputs, page


class Page:
    """The elements of a page, whose tags are closed in order: it is well-formed XML, too."""

    def __init__(self, source):
        self.source, root = source, ElementTree.fromstring(source)
        for hidden in (*root.iter("style"), *root.iter("title")):
            hidden.text = ""
        self.tags, self.texts = [(e.tag, e.attrib) for e in root.iter()], list(root.itertext())
        self.text = " ".join(" ".join(self.texts).replace("\u00a0", " ").split())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(The folder of an evaluation with every section, its page, its PNG files); two images cannot be read."""
    folder = samples.write_full(tmp_path_factory.mktemp("report"))
    flipped = json.loads((folder / "results.json").read_text())["tasks"]["mmvp"]["comparisons"][0]["flipped"]
    Path(flipped[0]["images"][0]).unlink()
    Path(flipped[1]["images"][0]).write_bytes(b"no image")
    path, *pngs = report.write(folder)
    return folder, Page(path.read_text(encoding="utf-8")), pngs


def test_the_page_loads_nothing_else(full):
    folder, page, pngs = full
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert page.all("a") and all(attrs["href"].removeprefix("#") in ids for attrs in page.all("a"))
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            inside = tag in ("a", "use") and attrs.get(name, "").removeprefix("#") in ids
            assert inside or attrs.get(name, "data:").startswith("data:"), attrs
        assert not [name for name in attrs if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", page.source)
    assert "default-src 'none'" in page.all("meta")[1]["content"] and page.all("html")[0]["lang"] == "en"
    assert all(attrs["aria-label"] for attrs in page.all("svg"))
    assert pngs and all(p.parent == folder / "report" for p in pngs)
    for image in map(Image.open, pngs):
        assert image.width > 600 and len(image.convert("L").getcolors()) > 10
        assert image.convert("RGBA").getpixel((1, 1)) == (255, 255, 255, 255)


def test_numbers_are_those_of_the_input(full):
    folder, page, _ = full
    shown = [attrs["title"] for attrs in page.all("b") if "title" in attrs]
    for task in json.loads((folder / "results.json").read_text())["tasks"].values():
        for weights in task["weights"].values():
            for s in weights["scores"].values():
                assert str(s["score"]) in shown
        for c in task["comparisons"]:
            for s in c["scores"].values():
                assert str(s.get("difference", s.get("score"))) in shown
    assert "MMVP-VLM, pooled embedding: 19.3 → 25.9 (+6.7, 95% interval 1.5 to 11.9)" in page.text
    assert "Better: zero is outside of the interval. 12 pairs won, 3 lost, exact McNemar p = 0.035." in page.text
    # No difference is stated if zero is within the interval, and a decrease is stated as one.
    assert "19.7 → 21.1 (+1.4, 95% interval −2.2 to 5.0) Zero is within the interval" in page.text
    assert "36.5 → 36.2 (−0.3, 95% interval −0.6 to −0.1) Worse: zero is outside of the interval." in page.text
    assert "openai: condition gap to another image is not different from zero" in page.text
    assert "runs/vitl14:4600: condition gap" not in page.text
    # Numbers of a row have the same decimals.
    assert "0.00020 −0.00030 to 0.00070 0.00310 0.00260 to 0.00360" in page.text
    # The tooltips of the bars have their values: 2 of 15 pairs.
    assert "Orientation and Direction\nopenai: 13.3% (0.0 to 33.3)" in page.source.replace("\u00a0", " ")


def test_flipped_pairs_have_their_images(full):
    folder, page, _ = full
    flipped = json.loads((folder / "results.json").read_text())["tasks"]["mmvp"]["comparisons"][0]["flipped"]
    photographs = [attrs["src"] for attrs in page.all("img") if attrs["src"].startswith("data:image/jpeg")]
    shown = photographs[:-2]  # The last two are those of the segmentation.
    assert len(shown) == 2 * len(flipped) - 2 and page.text.count("cannot be read") == 2
    data = [base64.b64decode(source.removeprefix("data:image/jpeg;base64,")) for source in shown]
    sizes = {Image.open(io.BytesIO(content)).size for content in data}
    assert sizes <= {(320, 320), (320, 291), (320, 267)} and len(sizes) > 1  # The ratios of the three input sizes.
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert page.text.count("Correct only after") == headings.count("MMVP-VLM: pairs that flipped") == 2
    assert samples.HOSTILE in page.text
    # The probability of text 2 for image 2 is one minus that of text 1.
    assert "0.61 ✓ → 0.71 ✓" in page.text and "0.45 ✗ → 0.65 ✓" in page.text


def test_a_workdir(tmp_path):
    samples.write_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4601, "lo')  # An incomplete last row is skipped.
    content = inputs.read(tmp_path)
    shown = Page(page.html(content, page.sections(content)))
    loss = [row["loss"] for row in content.runs[0].rows if "loss" in row]
    assert len(loss) == 460 and f"loss {np.mean(loss[:23]):.3f} → {np.mean(loss[-23:]):.3f}" in shown.text
    assert "step 4,600 of 4,600" in shown.text and "optim.lr 0.0001" in shown.text
    assert str(loss[-1]) in [attrs.get("title") for attrs in shown.all("b")]
    assert [attrs["aria-label"] for attrs in shown.all("svg")][::2] == [
        "Loss", "Gradient norm before clipping", "Learning rate", "Images per second", "mmvp, pooled",
        "feedback, gap other", "drift, effective rank", "drift, effective rank change",
    ]  # fmt: skip
    assert "feedback/gap_other is not different from zero" in shown.text and "end of stage visual_proj" in shown.text
    assert inputs.Run("", 0, (), config.default(objective="genhancer").to_dict(), [], []).total == 110_000


def test_charts_of_an_earlier_report_are_removed_and_no_other_files(tmp_path):
    samples.write_run(tmp_path, rows=6)
    (tmp_path / "report").mkdir()
    Image.new("RGB", (4, 4)).save(mine := tmp_path / "report" / "mine.png")
    before = report.write(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if "eval/" not in line))
    after = report.write(tmp_path)
    assert len(after) < len(before) and set((tmp_path / "report").iterdir()) == {mine, *map(Path, after[1:])}


def test_thumbnails_are_as_encoders_see_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees.
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(np.full((9, 9), 0x4000, np.uint16)).save(tmp_path / "b.png")
    shown = [images._thumbnail(str(tmp_path / name)).uri.partition(",")[2] for name in ("a.jpg", "b.png")]
    turned, deep = (Image.open(io.BytesIO(base64.b64decode(uri))) for uri in shown)
    assert turned.size == (40, 20) and deep.getpixel((4, 4)) == (64, 64, 64)


def chart(draw, *names, **arguments):
    legend = [(name, i) for i, name in enumerate(names)]
    return figures.Chart("name", "Title", legend, lambda width: draw(width, **arguments))


def test_curves():
    # A long curve is drawn with fewer points, and keeps its spikes: the largest value is at the top, 8 pixels below.
    spiky = [(i, 100.0 if i == 77_777 else math.sin(i)) for i in range(100_000)]
    svg = chart(charts.curves, data=[charts.Series("a", 1, spiky)], x_title="step", linear=True).svg(328)
    (curve,) = re.findall(r'<path d="([^"]*)" style="[^"]*stroke-opacity: 0.35', svg)
    assert min(float(y) for y in re.findall(r"[ML] ?[\d.]+ ([\d.]+)", curve)) == pytest.approx(8, abs=0.1)
    assert len(curve) < 50_000
    assert charts.moving_mean([(i, 5.0) for i in range(10)], 4) == [(i, 5.0) for i in range(10)]
    assert charts.moving_mean([(0, 0.0), (1, 3.0), (2, 6.0), (3, 0.0)], 2)[1] == (1, 3.0)
    # A single row, equal values and very large ranges also give a valid axis.
    for data in ([(5, 0.3)], [(0, 1.0), (2, 1.0)], [(1, 1e-7), (2, 1e99)], [(1, -2.0), (2, 1e-9)]):
        svg = chart(charts.curves, data=[charts.Series("a", 1, data)], x_title="step").svg(328)
        assert "nan" not in svg and "inf" not in svg and svg.count("<text") > 4


def test_charts_are_the_same_each_time_and_hold_any_text():
    """Nothing in a label is markup, mathematics, or a character that SVG does not have."""
    name = '$\\frac{1}$ <script>alert("1")</script> \x00\ud800 & 猫'
    drawn = chart(charts.bars, name, name, data=[charts.Row(name, [(name, 0, 25.0, None, name)])], unit="%", high=60.0)
    assert drawn.svg(918) == drawn.svg(918) and drawn.png() == drawn.png()
    page = Page(str(drawn.svg(918)))
    assert page.texts.count('$\\frac{1}$ <script>alert("1")</script> \\x00\\ud800 & 猫') == 1
    assert not page.all("script")


def test_colours_have_enough_contrast():
    """By the bounds of WCAG 2 for text and for graphics."""

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    for role in set(figures.COLOURS) - {"page", "panel", "grid", "axis"}:
        for under, scheme in itertools.product(("page", "panel"), (0, 1)):
            a, b = sorted(luminance(figures.COLOURS[r][scheme]) for r in (role, under))
            bound = 4.5 if role in ("ink", "muted", "won", "lost") else 3.0
            assert (b + 0.05) / (a + 0.05) >= bound, (role, under, scheme)


BROKEN = json.loads(Path(__file__).with_name("refused.json").read_text())


@pytest.mark.parametrize("name, content, says", BROKEN)
def test_bad_input(tmp_path, name, content, says):
    folder = tmp_path / "given"
    if name:
        folder.mkdir()
        (folder / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    refused(says, report.write, folder)
    assert not (folder / "report.html").exists()


def test_strips_of_a_segmentation_and_how_many_flips_are_shown(tmp_path):
    samples.write_evaluation(tmp_path, [], segmentation=samples.segmentation_task(samples.write_images(tmp_path, 2)))
    task = inputs.read(tmp_path).results.tasks["segmentation"]
    labels = [samples.BEFORE, samples.AFTER]
    head, *strips = images.segmented(task, labels)
    assert "not chosen by their scores" in head.arguments["note"] and len(strips) == 2
    for strip in strips:
        assert [label.text for _, label in strip.arguments["images"]] == ["image", "truth", *labels]
        names = [label.text for label in strip.arguments["legend"]]
        assert names == ["cat", "background", "potted plant", "not labelled"]
    truth = strips[0].arguments["images"][1][0].uri.removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(truth))).convert("RGB"))
    cat = images.class_colour(1, "cat")
    assert pixels.shape == (60, 120, 3) and tuple(pixels[0, 60]) == cat and tuple(pixels[0, -1]) == (225, 225, 225)
    assert len({images.class_colour(i, "") for i in range(171)}) == 171
    for damaged in ("", "no base64!", base64.b64encode(b"no image").decode()):
        shown = task.weights[samples.AFTER].pictures
        shown[0] = shown[0].model_copy(update={"predicted": damaged})
        assert images.segmented(task, labels)[1].arguments["line"] == "Image 1 of results.json cannot be read."
    task = samples.mmvp_task(samples.write_images(tmp_path, 2))
    task["comparisons"][0]["flipped"] *= 60
    samples.write_evaluation(tmp_path, [], mmvp=task)
    content = inputs.read(tmp_path)
    shown = Page(page.html(content, page.sections(content)))
    assert "12 more are listed in predictions.csv." in shown.text
    assert sum(attrs["src"].startswith("data:image/jpeg") for attrs in shown.all("img")) == 2 * 48


LOOK = Path(__file__).with_name("look.js").read_text()


def browser():
    """Starts chromium without a window and without network services; skips the test if it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def visit(driver, page, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [entry["message"] for entry in driver.get_log("browser")], sent


def test_in_a_browser(tmp_path):
    (steps := tmp_path / "steps").mkdir()
    pages = {"evaluation": report.write(samples.write_full(tmp_path))[0], "run": report.write(tmp_path / "run")[0]}
    pages["steps"] = report.write(samples.write_steps(steps))[0]
    images = {"evaluation": 28 + 8, "run": 0, "steps": 4}  # Of flipped pairs, and of two strips of four.
    driver = browser()
    try:
        for (name, page), width, scheme in itertools.product(pages.items(), (390, 1280), ("light", "dark")):
            console, sent = visit(driver, page, width, scheme)
            assert not console, console
            assert page.as_uri() in sent  # Requests are recorded; else the next line would pass without them.
            assert not [url for url in sent if url != page.as_uri() and not url.startswith("data:")]
            found = driver.execute_script(LOOK)
            where = (name, width, scheme, found)
            assert found["scroll"] <= found["window"] <= width and found["charts"] > 1, where
            assert not any(found[fault] for fault in ("outside", "clipped", "broken", "small")), where
            assert found["images"] == found["loaded"] == images[name], where
            page_colour = bytes.fromhex(figures.COLOURS["page"][scheme == "dark"][1:])
            assert found["background"] == f"rgb({', '.join(map(str, page_colour))})", where
    finally:
        driver.quit()
