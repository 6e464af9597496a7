"""Files of a report, changed field by field and byte by byte: a page, or one sentence, and no file elsewhere."""

import json
import os

import numpy as np
import pytest
import report_samples as samples
from mutations import changed, damaged

from diva_jax import report
from diva_jax.common.errors import UserError
from diva_jax.report import images, inputs, page

pytestmark = pytest.mark.attack


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`out` with a small evaluation and `run` with a short run, as (root, content of results.json)."""
    root = tmp_path_factory.mktemp("report")
    files = samples.write_images(root, 2)
    tasks = {"mmvp": samples.mmvp_task(files), "feedback": samples.feedback_task(), "drift": samples.drift_task()}
    tasks |= {"pairs": samples.pairs_task([0.5, 2.0], [-1.0, 1.0]), "zeroshot": samples.zeroshot_task()}
    for found in tasks["mmvp"]["weights"].values():
        found["patterns"] = found["patterns"][:2]
    for found in tasks["feedback"]["weights"].values():
        found["timesteps"] = found["timesteps"][:2]
    samples.write_run(root / "run", rows=6)
    return root, samples.write_evaluation(root / "out", files, root / "run", **tasks)


def outcome(place) -> str | None:
    """The page, or None where the files are refused; any other exception fails the test."""
    try:
        content = inputs.read(place)
        return page.html(content, page.sections(content))
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 1500
        return None


@pytest.mark.parametrize("seed", range(4))
def test_results(folder, seed):
    root, good = folder
    rng = np.random.default_rng(seed)
    for case in range(12):
        content = changed(rng, good, 2)[0] if case % 3 else None
        data = json.dumps(content).encode() if content else damaged(rng, json.dumps(good).encode())
        (root / "out/results.json").write_bytes(data)
        found = outcome(root / "out")
        assert found is None or "<script>alert" not in found
    (root / "out/results.json").write_text(json.dumps(good))
    assert outcome(root / "out")


@pytest.mark.parametrize("seed", range(2))
def test_logs_of_a_run(folder, seed, tmp_path):
    root, _ = folder
    rng = np.random.default_rng(seed)
    lines = (root / "run/metrics.jsonl").read_text().splitlines()
    config = json.loads((root / "run/config.json").read_text())
    for case in range(10):
        rows = list(lines)
        i = int(rng.integers(len(rows)))
        rows[i] = json.dumps(changed(rng, json.loads(rows[i]), 2)[0])
        data = "".join(f"{row}\n" for row in rows).encode()
        (tmp_path / "metrics.jsonl").write_bytes(damaged(rng, data) if case % 3 == 0 else data)
        (tmp_path / "config.json").write_text(json.dumps(changed(rng, config, 1)[0] if case % 2 else config))
        outcome(tmp_path)


NAMES = ["../../up", "/abs", "a/b", "..", "", ".", "x\0y", "con:aux", "é" * 200, "n\n", "same", "SAME"]


def test_names_are_never_paths(folder, tmp_path):
    """Names of tasks and metrics are part of the names of images."""
    task = samples.feedback_task()
    for weights in task["weights"].values():
        weights["timesteps"] = [
            b | {"scores": {"gap_other": b["scores"]["gap_other"]}} for b in weights["timesteps"][:2]
        ]
    results = {"schema": 1, "weights": [{"label": n} for n in task["weights"]], "tasks": {n: task for n in NAMES}}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/results.json").write_text(json.dumps(results))
    before = {p for p in tmp_path.rglob("*")}
    written = report.write(tmp_path / "in")
    assert len(set(written)) == len(written) == 1 + len(NAMES)
    for made in {p for p in tmp_path.rglob("*")} - before:
        assert made == tmp_path / "in/report" or made.parent == tmp_path / "in/report" or made.name == "report.html"


def test_nothing_is_written_through_links(tmp_path):
    samples.write_run(tmp_path / "run", rows=6)
    names = [path.name for path in report.write(tmp_path / "run")[1:]]
    (tmp_path / "precious").write_text("precious")
    for place in ("report.html", *(f"report/{name}" for name in names)):
        (tmp_path / "run" / place).unlink()
        (tmp_path / "run" / place).symlink_to(tmp_path / "precious")
    report.write(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / "run/report").rename(tmp_path / "elsewhere")
    (tmp_path / "run/report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="report is a link, through which nothing is written: remove it"):
        report.write(tmp_path / "run")


def test_what_is_no_image_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name in ("pipe.jpg", "zero.jpg", "a.eps", "", "\0", "gone.png", "a" * 5000):
        assert images._thumbnail(str(tmp_path / name)).uri == ""


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x", "gs://no-such-bucket-at-all", "s3://x/y", "\0", "", "."])
def test_workdirs_that_cannot_be_found_are_left_out(tmp_path, source):
    samples.write_evaluation(tmp_path, [], source, drift=samples.drift_task())
    assert outcome(tmp_path)
