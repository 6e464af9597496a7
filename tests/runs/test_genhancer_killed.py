"""GenHancer's two stages as commands: killed around the boundary of the stages, a run ends bit-identical."""

import signal
import time

import commands
import genhancer_config
import jax
import numpy as np
import pytest
from genhancer_config import get_config
from places import SUPPORT
from small import program

from diva_jax.training import checkpoint

BOUNDARY, TOTAL = 3, 7


def start(files, workdir):
    return commands.start("main", f"--config={SUPPORT}/genhancer_config.py:{files}", f"--workdir={workdir}")


def final_state(files, workdir) -> dict[str, np.ndarray]:
    assert checkpoint.latest_step(workdir) == TOTAL
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        state, data, _ = checkpoints.restore(TOTAL, program(get_config(str(files))).abstract_state(1))
    assert data["batches"] == TOTAL
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genhancer")
    genhancer_config.write_files(folder)
    return folder


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The final state of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    out = commands.output(start(files, workdir))
    assert f"steps 0 to {BOUNDARY}" in out and f"steps {BOUNDARY} to {TOTAL}" in out
    return final_state(files, workdir)


def test_killed_before_and_after_the_boundary(files, whole, tmp_path):
    """Killed in stage 1, then, as soon as the checkpoint between the stages is there, again."""
    workdir = tmp_path / "run"
    for step in (BOUNDARY - 1, BOUNDARY):
        if (checkpoint.latest_step(workdir) or 0) >= step:  # The first kill came late.
            continue
        process = start(files, workdir)
        commands.wait_for_step(process, step)
        until = time.monotonic() + 60  # The step's checkpoint is written in the background.
        while (checkpoint.latest_step(workdir) or 0) < step and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert commands.finish(process)[0] == -signal.SIGKILL
        assert checkpoint.latest_step(workdir) < TOTAL
    assert checkpoint.latest_step(workdir) >= BOUNDARY
    assert "resumed from the checkpoint of step" in commands.output(start(files, workdir))
    ours = final_state(files, workdir)
    assert ours.keys() == whole.keys() and any("/lora/" in name for name in ours)
    for name, array in whole.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
