"""Rows, the progress line, and the error for numbers that are not finite."""

import contextlib
import io
import json
import sys
import time
from unittest import mock

import numpy as np
import pytest
from helpers import failed, refused

from diva_jax.common import log
from diva_jax.training import metrics


def values(loss, grad=1.0):
    return {"loss": np.float32(loss), "grad_norm": np.float32(grad), "lr": np.float32(0.1)}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_means_over_their_window(tmp_path, capsys):
    writer = metrics.Writer(tmp_path, 0, tensorboard=True)
    progress = metrics.Progress(writer, 0, 5, every=2, images=4, utilisation=1e-3)
    for step, loss in enumerate([1.0, 2.0, 3.0, 5.0, 7.0], 1):
        progress.add(step, values(loss))
    progress.flush()
    writer.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(2, 1.5), (4, 4.0), (5, 7.0)]
    assert all(r["mfu"] == pytest.approx(r["images_per_s"] * 1e-3) for r in rows(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("step 4/5  loss 4.0000") and "MFU" in lines[1]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("bad, named", [(values(np.nan), "loss"), (values(1.0, np.inf), "grad_norm")])
def test_not_finite_names_step_and_quantity(tmp_path, bad, named):
    progress = metrics.Progress(None, 0, 9, every=1, images=1)
    progress.add(7, bad)
    failed(f"step 7: {named} not finite", progress.flush)


def test_rows_past_the_checkpoint_and_torn_rows_are_dropped(tmp_path):
    lines = [json.dumps({"step": s, "loss": 0.0}) for s in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "lo']))
    writer = metrics.Writer(tmp_path, 2, tensorboard=False)
    writer.write(3, {"loss": 9.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(1, 0.0), (2, 0.0), (3, 9.0)]


def test_sessions_are_listed_and_rows_have_their_time(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    for begins in (0, 2):
        writer = metrics.Writer(tmp_path, begins, tensorboard=False)
        for step in (begins + 1, begins + 2):
            clock[0] += 7.5
            writer.write(step, {"loss": 1.0})
        writer.close()
        clock[0] += 1000
    assert [(r["step"], r["seconds"]) for r in rows(tmp_path)] == [(1, 7.5), (2, 15.0), (3, 7.5), (4, 15.0)]
    sessions = json.loads((tmp_path / "sessions.json").read_text())
    assert [s["step"] for s in sessions] == [0, 2] and sessions[0]["started"].endswith("+00:00")
    assert all(s["devices"] == "8 x cpu" and {"diva_jax", "jax", "python"} <= set(s["versions"]) for s in sessions)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    with contextlib.closing(log.progress("counting", 4, "items", every=0.0)) as bar:
        bar.update(3)
    assert capsys.readouterr().out.splitlines()[-1].startswith("counting: 3/4 items, ")
    with contextlib.closing(log.progress("counting", 4, "items", every=3600.0)) as bar:
        bar.update(3)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with contextlib.closing(log.progress("counting", 4, "items")) as bar:
        log.say("a message")
        bar.update(3)
    assert "counting:   0%" in terminal.getvalue() and "a message\n" in terminal.getvalue()
    told = []
    with log.waiting("compiling", told.append, every=0.01):
        while len(told) < 2:
            time.sleep(0.01)
    count = len(told)
    time.sleep(0.05)
    assert len(told) == count and told[0] == "compiling: 0 min so far"


@pytest.fixture
def wandb(monkeypatch):
    """Takes the place of the package wandb."""
    fake = mock.MagicMock()
    fake.init.return_value = fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_same_rows_and_one_run_per_workdir(tmp_path, wandb):
    for step in (0, 2):
        writer = metrics.Writer(tmp_path / "a", step, tensorboard=False, wandb="mine", config={"steps": 9})
        writer.write(step + 1, {"loss": 1.0 + step})
        writer.close()
    metrics.Writer(tmp_path / "b", 0, tensorboard=False, wandb="mine").close()
    assert wandb.log.call_args_list == [mock.call({"loss": 1.0}, step=1), mock.call({"loss": 3.0}, step=3)]
    assert wandb.finish.call_count == 3
    first, again, other = (call.kwargs for call in wandb.init.call_args_list)
    assert first == again and first["id"] != other["id"] and first["project"] == "mine" and first["resume"] == "allow"
    assert first["config"] == {"steps": 9} and first["name"] == "a"
    wandb.init.side_effect = ZeroDivisionError
    refused("config.log.wandb='mine'.*WANDB_MODE=offline", metrics.Writer, tmp_path, 0, tensorboard=False, wandb="mine")


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(6))
def test_lines_that_are_no_rows_are_removed_with_a_message(tmp_path, capsys, seed):
    """Whatever stands in the log of a run that resumes: rows up to its step are kept, and what follows is appended."""
    rng = np.random.default_rng(seed)
    good = [json.dumps({"step": i, "loss": 0.5}).encode() for i in range(1, 7)]
    odd = [b"", b"[]", b"3", b"null", b'"step"', b"{}", b'{"step": "2"}', b'{"step": true}', b'{"step": NaN}', b"\xff"]
    odd += [b"{" * 100_000, b'{"step": 1, "loss', b"\x00", b'{"step": [1]}']
    lines = list(good)
    for line in (added := [odd[i] for i in rng.integers(len(odd), size=3)]):
        lines.insert(int(rng.integers(len(lines))), line)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    writer = metrics.Writer(tmp_path, 4, tensorboard=False)
    writer.write(5, {"loss": 1.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(i, 0.5) for i in (1, 2, 3, 4)] + [(5, 1.0)]
    assert f"{len(added)} lines that are no rows of a log are removed" in capsys.readouterr().out
