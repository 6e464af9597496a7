"""Complete runs of the training command: uninterrupted, killed and resumed, refused."""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import small
from e2e_config import WORLD, get_config, rotations
from helpers import failed, refused, rows
from places import SUPPORT

from diva_jax.training import checkpoint
from diva_jax.training.loop import Run

TOTAL = 14


def start(config, workdir, *more):
    return commands.start("main", f"--config={SUPPORT}/e2e_config.py:{config}", f"--workdir={workdir}", *more)


def final_state(config, workdir) -> dict[str, np.ndarray]:
    p = small.program(get_config(str(config)))
    assert checkpoint.latest_step(workdir) == TOTAL
    state, data, meta = checkpoint.restore(workdir, TOTAL, p.abstract_state(len(p.stages) - 1))
    assert data["batches"] == TOTAL and ("anchor" in meta["sources"]) == bool(p.config.anchor.weight)
    assert meta["sources"].get("anchor", meta["sources"]["vision"]) == meta["sources"]["vision"]
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, commands.output(start(files, workdir, "--config.log.tensorboard=True"))


def test_a_run_reports_what_it_does(files, uninterrupted, monkeypatch):
    workdir, out = uninterrupted
    tables = [int(n.replace(",", "")) for n in re.findall(r"^total +([\d,]+) +[\d,]+", out, re.M)]
    projection = [int(n.replace(",", "")) for n in re.findall(r"^visual_proj +([\d,]+) ", out, re.M)]
    assert tables[0] == projection[0] > 0 and tables[1] > tables[0]  # The first stage trains the projection alone.
    assert "stage visual_proj: steps 0 to 2" in out and "stage tune: steps 2 to 14" in out
    line = r"^step (\d+)/14  loss [\d.]+  grad [\d.e+-]+  lr [\d.e+-]+  [\d.]+ images/s  data wait \d+%  ETA \d+:\d\d$"
    assert [int(n) for n in re.findall(line, out, re.M)] == list(range(1, TOTAL + 1))
    assert [r["step"] for r in rows(workdir)] == list(range(1, TOTAL + 1))
    assert {"loss", "grad_norm", "lr", "images_per_s", "data_wait", "broken_images"} <= set(rows(workdir)[0])
    monkeypatch.setenv("HOME", str(workdir.parent))
    assert checkpoint.steps(f"~/{workdir.name}") == [9, 12, 14]  # The last three, without what is frozen.
    saved = (workdir / "checkpoints/14/state/_METADATA").read_text()
    assert all((part in saved) == (part[:3] == "vis") for part in ("vision/", "visual_proj/", "unet/", "vae/", "text_"))
    assert (workdir / "done").exists() and list((workdir / "tensorboard").glob("events*"))


def test_a_finished_run_is_extended(files, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    out = commands.output(start(files, tmp_path / "run", "--config.steps=13"))
    assert "config.steps was 12 and is 13" in out and "step 15/15" in out
    assert checkpoint.latest_step(tmp_path / "run") == 15 and (tmp_path / "run" / "done").exists()
    assert [r["step"] for r in rows(tmp_path / "run")] == list(range(1, 16))
    (done := tmp_path / "run/done").unlink()  # As where a run is killed before it could write it.
    assert "done: 15 steps" in commands.output(start(files, done.parent, "--config.steps=13")) and done.exists()


def interrupted(config, workdir, step: int, sig: signal.Signals) -> int | None:
    """Sends a signal at a step; returns the step of the newest checkpoint."""
    process = start(config, workdir)
    commands.wait_for_step(process, step)
    process.send_signal(sig)
    code, _, err = commands.finish(process)
    assert code == (0 if sig == signal.SIGTERM else -sig) and not (workdir / "done").exists(), err
    return checkpoint.latest_step(workdir)


@pytest.mark.parametrize("objective", ["", *WORLD])
def test_interrupted_run_ends_bit_identical(files, uninterrupted, tmp_path, objective):
    """DIVA's by SIGTERM, and then as the others by SIGKILL, at any step."""
    config, workdir, (whole, printed) = files, tmp_path / "run", uninterrupted
    first, rng = 1, random.SystemRandom()
    if objective:
        config, whole = f"{objective}:", tmp_path / "whole"
        printed = commands.output(start(config, whole))
    else:
        first = rng.randint(1, TOTAL - 5)
        assert (saved := interrupted(config, workdir, first, signal.SIGTERM)) >= first
        first = saved + 1
    said = "compares the images of a micro-batch with each other: 8 at once, not the 16 of a step"
    assert (said in printed) == (objective == "salm")
    saved = interrupted(config, workdir, step := rng.randint(first, TOTAL - 3), signal.SIGKILL)
    assert (f"checkpoint of step {saved}" in commands.output(start(config, workdir))) == (saved is not None)
    ours, want = final_state(config, workdir), final_state(config, whole)
    assert set(ours) == set(want) and any("adapter/" in n for n in ours) == (objective == "salm")
    for name, array in want.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=f"{name}, interrupted at step {step}")
    assert [r["step"] for r in rows(workdir)] == list(range(1, TOTAL + 1))


def test_not_finite_stops_with_the_step_and_keeps_the_last_checkpoint(files, tmp_path):
    c = rotations(files, optim__name="sgd", optim__lr=1e30, optim__clip=0.0, checkpoint__every=1)
    c.optim.warmup = 0.4  # The first step's learning rate is 0, so its checkpoint is good.
    failed(r"step \d+: .*not finite", lambda: Run(c, tmp_path).run())
    assert (kept := checkpoint.latest_step(tmp_path)) is not None
    state, _, _ = checkpoint.restore(tmp_path, kept, small.program(c).abstract_state(0))
    assert all(np.isfinite(np.asarray(a)).all() for a in state["params"].values())


# What is bad -> [fields of the config, what the line has]; "$" is an empty folder.
BAD = json.loads(Path(__file__).with_name("refused.json").read_text())


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_is_written(files, uninterrupted, tmp_path, what):
    fields, named = BAD[what]
    (tmp_path / "empty").mkdir()
    c = get_config(str(files))
    c.accum = 1  # This process has eight devices.
    c.update_from_flattened_dict({n: str(tmp_path / "empty") if v == "$" else v for n, v in fields.items()})
    workdir = uninterrupted[0] if what == "another run's workdir" else tmp_path / "new"
    before = sorted(uninterrupted[0].rglob("*"))
    refused(re.escape(named), lambda: Run(c, workdir).run())
    assert not (tmp_path / "new" / "checkpoints").exists() and sorted(uninterrupted[0].rglob("*")) == before
