"""`make demo` in a short form, and once as it is."""

import json
from pathlib import Path

import commands
import pytest
from ml_collections import ConfigDict

from diva_jax.world import arms, demo

QUICK = ("steps=2", "batch_size=8", "eval.bootstrap=100", "eval.batch_size=32", "checkpoint.every=2")


def test_the_demo_tunes_the_documented_arms(tmp_path):
    """With the fields of the experiment; what is done is not repeated; the table is that of its endpoints."""
    quick = [f"--config.{field}" for field in QUICK]
    for _, (module, *flags) in demo.commands(Path("demo"), quick, 2):
        commands.succeed(module.removeprefix("diva_jax."), *flags, cwd=tmp_path)
    (tmp_path / "demo/eval/report.html").unlink()
    again = ("--out=demo", "--pairs=2", *(f"--override={flag}" for flag in quick))
    printed = commands.succeed("world.demo", *again, cwd=tmp_path)
    assert [line.split()[3] for line in printed.splitlines() if line.startswith("$ ")] == ["diva_jax.report"]
    assert "made with other flags" in commands.refused("world.demo", *again, "--override=--config.x=9", cwd=tmp_path)
    assert "demo/eval/report.html" in printed and "| matches, absent facts |" in printed
    results = json.loads((tmp_path / "demo/eval/results.json").read_text())["tasks"]["mmvp"]["weights"]
    assert set(results) == {"clip", "judge_control:2", "judge:2", "diva:2"}
    assert "cannot be read" not in (tmp_path / "demo/eval/report.html").read_text()
    for name in demo.ARMS:
        found = ConfigDict(json.loads((tmp_path / "demo" / name / "config.json").read_text()))
        want = ConfigDict(json.loads(arms.arm_config(arms.find(name), 0, arms.Budget(16, 8)).to_json()))
        for section in (*demo.ARMS, "optim", "anchor"):
            assert found.get(section) == want.get(section), (name, section)


@pytest.mark.slow
def test_the_demo_ends_within_what_the_experiment_had(tmp_path):
    """As it is, with optimised code: docs/DOES_IT_WORK.md."""
    assert commands.finish(commands.start("world.demo", "--out=whole_demo", cwd=tmp_path, XLA_FLAGS=""), 3600)[0] == 0
    kept = json.loads(demo.SCORES.read_text())["early"]
    results = json.loads((tmp_path / "whole_demo/eval/results.json").read_text())["tasks"]["mmvp"]["weights"]
    # The fact that is absent: over all four, its gain of about 20 points is a quarter as large.
    relation = [next(p for p in w["patterns"] if p["name"] == "relation") for w in results.values()]
    untuned, control, judge, _ = (pattern["scores"]["pooled_match"]["score"] for pattern in relation)
    assert judge > control + 5 and judge > untuned + 5, results
    assert min(kept["judge"]["matches"]) > max(kept["judge_control"]["matches"])
