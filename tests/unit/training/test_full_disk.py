"""A disk that is full: one sentence, and nothing of the unfinished file is left on it."""

import resource
import shutil

import jax
import numpy as np
import pytest

from diva_jax.common.errors import RunError, UserError
from diva_jax.training import checkpoint
from diva_jax.weights import writers

pytestmark = pytest.mark.attack


@pytest.fixture
def limited():
    """Files of this process can have 100 kB; writing more than that fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(step: int) -> dict:
    rng = np.random.default_rng(step)
    many = {f"b{i}": jax.numpy.asarray(rng.normal(size=(7, 30)), np.float32) for i in range(20)}
    return {"params": {"a": jax.numpy.asarray(rng.normal(size=(400, 301)), np.float32), **many}, "step": np.int32(step)}


def test_a_checkpoint(tmp_path, monkeypatch, limited, capfd):
    monkeypatch.setattr(checkpoint, "_RETRY_AFTER_S", (0.0, 0.0))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state(3), {"batches": 3}, {}, wait=True)
        limited()
        with pytest.raises(RunError, match=r"step 6: no checkpoint can be written .* one is of step 3: make room"):
            checkpoints.save(6, state(6), {"batches": 6}, {}, wait=True)
    assert checkpoint.steps(tmp_path) == [3]
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["3"]
    # What else is printed is dropped by the command, see `cli._on_unraisable`.
    lines = [line for line in capfd.readouterr().err.splitlines() if "ERROR" in line or "Error writing" in line]
    assert not lines


def test_an_export(tmp_path, limited):
    tensors = {"a": np.ones((400, 301), np.float32)}
    limited()
    with pytest.raises(UserError, match="out cannot be written .*: give a folder with enough room"):
        with writers.new_folder(tmp_path / "out") as folder:
            writers.write_safetensors(folder / "model.safetensors", tensors)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_has_left_is_removed_by_the_next(tmp_path):
    with writers.new_folder(tmp_path / "out") as running:
        left = tmp_path / ".out.abcd1234.unfinished"
        shutil.copytree(running, left)
        (left / "half").write_text("x")
        other = tmp_path / ".out2.abcd1234.unfinished"
        other.mkdir()
        with writers.new_folder(tmp_path / "out") as second:
            assert running.exists() and second.exists() and not left.exists() and other.exists()
        shutil.rmtree(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "out"]
