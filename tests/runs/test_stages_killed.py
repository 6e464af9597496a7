"""Objectives of two stages as commands: killed around the boundary of the stages, a run ends bit-identical."""

import signal
import time

import commands
import jax
import numpy as np
import pytest
import stages_config
from places import SUPPORT
from small import program

from diva_jax.training import checkpoint

BOUNDARY, TOTAL = 3, 7


def start(given, workdir):
    return commands.start("main", f"--config={SUPPORT}/stages_config.py:{given}", f"--workdir={workdir}")


def final_state(given, workdir) -> dict[str, np.ndarray]:
    assert checkpoint.latest_step(workdir) == TOTAL
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        p = program(stages_config.get_config(given))
        state, data, _ = checkpoints.restore(TOTAL, p.abstract_state(1))
    assert data["batches"] == TOTAL
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    stages_config.write_files(folder)
    return folder


@pytest.mark.parametrize("objective", stages_config.OBJECTIVES)
def test_killed_before_and_after_the_boundary(objective, folder, tmp_path):
    """Killed in stage 1, then, as soon as the checkpoint between the stages is there, again."""
    given, workdir = f"{objective}:{folder}", tmp_path / "run"
    out = commands.output(start(given, tmp_path / "whole"))
    assert f"steps 0 to {BOUNDARY}" in out and f"steps {BOUNDARY} to {TOTAL}" in out
    whole = final_state(given, tmp_path / "whole")
    for step in (BOUNDARY - 1, BOUNDARY):
        if (checkpoint.latest_step(workdir) or 0) >= step:  # The first kill came late.
            continue
        process = start(given, workdir)
        commands.wait_for_step(process, step)
        until = time.monotonic() + 60  # The step's checkpoint is written in the background.
        while (checkpoint.latest_step(workdir) or 0) < step and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert commands.finish(process)[0] == -signal.SIGKILL
        assert checkpoint.latest_step(workdir) < TOTAL
    assert checkpoint.latest_step(workdir) >= BOUNDARY
    assert "resumed from the checkpoint of step" in commands.output(start(given, workdir))
    ours = final_state(given, workdir)
    assert ours.keys() == whole.keys() and any("/lora/" in name for name in ours)
    for name, array in whole.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
