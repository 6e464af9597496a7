"""Rows, the progress line, and the error for numbers that are not finite."""

import json

import numpy as np
import pytest

from diva_jax.common.errors import RunError
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
    with pytest.raises(RunError, match=f"step 7: {named} not finite"):
        progress.flush()


def test_rows_past_the_checkpoint_and_torn_rows_are_dropped(tmp_path):
    lines = [json.dumps({"step": s, "loss": 0.0}) for s in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "lo']))
    writer = metrics.Writer(tmp_path, 2, tensorboard=False)
    writer.write(3, {"loss": 9.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(1, 0.0), (2, 0.0), (3, 9.0)]


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600 * 26 + 62, "26:01:02")])
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


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
