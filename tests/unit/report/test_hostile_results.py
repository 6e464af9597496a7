"""A report of files that were made to do harm: no file elsewhere, and no read that does not end."""

import json
import os

import pytest
import report_samples as samples

from diva_jax import report
from diva_jax.common.errors import UserError
from diva_jax.report import images, inputs, page

pytestmark = pytest.mark.attack


NAMES = ["../../up", "/abs", "a/b", "..", "", ".", "x\0y", "con:aux", "é" * 200, "n\n", "same", "SAME"]


def test_names_are_never_paths(tmp_path):
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
    content = inputs.read(tmp_path)
    assert page.html(content, page.sections(content))
