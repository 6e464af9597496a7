"""`make demo` in a short form, and once as it is: the documented arm, its control, and a report of both."""

import json

import pytest
from ml_collections import ConfigDict

from diva_jax.world import arms

QUICK = ("batch_size=8", "eval.bootstrap=100", "eval.batch_size=32", "checkpoint.every=1")


def scores(folder) -> dict[str, float]:
    """Returns the pooled score on the pairs, by weights."""
    task = json.loads((folder / "eval/results.json").read_text())["tasks"]["mmvp"]
    return {name: w["scores"]["pooled"]["score"] for name, w in task["weights"].items()}


def test_the_demo_tunes_the_documented_arm(home):
    """`stages`, and as its control `shuffled`, with the fields of the experiment."""
    quick = [f"--override=--config.{field}" for field in ("steps=2", *QUICK)]
    printed = home.run("world.demo", "--out=demo", "--pairs=1", *quick)
    assert "demo/eval/report.html" in printed and printed.count("% of matches") == 3
    assert "tuned:2 against the control control:2: " in printed
    assert set(scores(home / "demo")) == {"clip", "control:2", "tuned:2"}
    page = (home / "demo/eval/report.html").read_text()
    assert "What the generator sees" in page and "cannot be read" not in page
    for name, arm in (("tuned", "stages"), ("control", "shuffled")):
        found = ConfigDict(json.loads((home / "demo" / name / "config.json").read_text()))
        want = arms.arm_config(arms.ARMS[arm], seed=0, steps=2, batch_size=8, random="")
        for section in ("condition", "diva", "optim"):
            assert found[section] == ConfigDict(json.loads(want.to_json()))[section], (name, section)
    again = home.run("world.demo", "--out=demo", "--pairs=1", *quick)
    assert "$ python" not in again, "a step that is done was repeated"


@pytest.mark.slow
def test_the_demo_ends_above_its_control(home):
    """As the experiment found it: docs/DOES_IT_WORK.md."""
    home.run("world.demo", "--out=whole_demo")
    found = scores(home / "whole_demo")
    clip, control, tuned = found.values()
    assert tuned > control, found
