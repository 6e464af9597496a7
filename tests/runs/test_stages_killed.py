"""An objective of two stages as a command: killed at the boundary of the stages, a run ends bit-identical."""

import signal
import time

import commands
import jax
import numpy as np
import pytest
import small
import stages_config
from places import SUPPORT
from small import program

from diva_jax import demo
from diva_jax.training import checkpoint

BOUNDARY, TOTAL = 3, 7


def start(files, workdir):
    return commands.start("main", f"--config={SUPPORT}/stages_config.py:{files}", f"--workdir={workdir}")


def final_state(files, workdir) -> dict[str, np.ndarray]:
    assert checkpoint.latest_step(workdir) == TOTAL
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        p = program(stages_config.get_config(files))
        state, data, _ = checkpoints.restore(TOTAL, p.abstract_state(1))
    assert data["batches"] == TOTAL
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture
def folder(files, tmp_path):
    demo.write_clip(tmp_path / "clip", small.SPEC_28)
    for name in ("photos", "stable-diffusion"):
        (tmp_path / name).symlink_to(files / name)
    return tmp_path


def test_killed_at_the_boundary(folder, tmp_path):
    """Killed as soon as the checkpoint between the stages is there; DCR's adapters have dropout."""
    workdir = tmp_path / "run"
    out = commands.output(start(folder, tmp_path / "whole"))
    assert f"steps 0 to {BOUNDARY}" in out and f"steps {BOUNDARY} to {TOTAL}" in out
    whole = final_state(folder, tmp_path / "whole")
    process = start(folder, workdir)
    commands.wait_for_step(process, BOUNDARY)
    until = time.monotonic() + 60  # The step's checkpoint is written in the background.
    while (checkpoint.latest_step(workdir) or 0) < BOUNDARY and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert commands.finish(process)[0] == -signal.SIGKILL
    assert BOUNDARY <= checkpoint.latest_step(workdir) < TOTAL
    assert "resumed from the checkpoint of step" in commands.output(start(folder, workdir))
    ours = final_state(folder, workdir)
    assert ours.keys() == whole.keys() and any("/lora/" in name for name in ours)
    for name, array in whole.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
